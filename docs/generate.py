"""Write the parts of README.md that the code knows better: the table of verbs and the support matrix.

Usage: python docs/generate.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def verbs() -> str:
    """A row for each verb: its name and the first sentence of its help."""
    from typer.main import get_command

    from isomorph.cli import app

    commands = getattr(get_command(app), "commands")  # noqa: B009 - the group class is typer's own
    rows = [
        f"| `isomorph {name}` | {(command.help or '').strip().splitlines()[0]} |" for name, command in commands.items()
    ]
    return "\n".join(["| verb | what it does |", "| --- | --- |", *rows])


def matrix() -> str:
    """A row for each architecture and layout: which frameworks load it, and what writes it."""
    from isomorph import architectures
    from isomorph.frameworks import FRAMEWORKS

    rows = []
    for architecture in architectures.ARCHITECTURES.values():
        for name, layout in architecture.layouts.items():
            targets = [f"`--to {target}`" for target, default in architecture.defaults.items() if default == name]
            written = ", ".join([*targets, f"`--layout {name}`"])
            loads = ["yes" if framework in architecture.native else "no" for framework in FRAMEWORKS]
            rows.append(f"| {architecture.model_type} | `{name}` | {' | '.join(loads)} | {layout.stock} | {written} |")
    library = "| any other | as the library stores it | if Transformers has it | if mlx-lm has it | no | itself | a cast copy |"
    head = f"| architecture | layout | {' | '.join(FRAMEWORKS)} | loads without isomorph in | written by |"
    return "\n".join([head, "| --- " * (len(FRAMEWORKS) + 4) + "|", *rows, library])


def generated(text: str) -> str:
    """`text` with each marked block made anew."""
    for name, make in (("verbs", verbs), ("matrix", matrix)):
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        body = make()
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md: expected one block {name!r}, found {count}")
    return text


def main() -> int:
    old = README.read_text()
    new = generated(old)
    if "--check" in sys.argv:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
