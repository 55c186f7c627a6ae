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
    """A row for each architecture and layout: what loads it, with isomorph and without, and what writes it."""
    from isomorph import architectures
    from isomorph.frameworks import FRAMEWORKS

    columns = ["architecture", "layout", *FRAMEWORKS, "stock Transformers", "stock mlx-lm", "written by"]
    rows = [columns, ["---"] * len(columns)]
    for architecture in architectures.registered().values():
        ours = ["yes" if framework in architecture.native else "no" for framework in FRAMEWORKS]
        for layout in architecture.layouts.values():
            stock = [layout.loads[library].partition(":")[0] for library in ("transformers", "mlx-lm")]
            targets = [f"`--to {target}`" for target, name in architecture.defaults.items() if name == layout.name]
            written = targets[0] if targets else f"`--layout {layout.name}`"
            rows.append([architecture.model_type, f"`{layout.name}`", *ours, *stock, written])
    rows.append(
        ["any other", "the library's", "if Transformers has it", "if mlx-lm has it", "no", "yes", "yes", "cast"]
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
