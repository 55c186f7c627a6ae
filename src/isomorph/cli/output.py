"""What a verb prints: JSON on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(document: Any) -> None:
    """One line of JSON on stdout; NaN and infinities, which JSON lacks, become null."""
    from isomorph.records import to_json

    sys.stdout.write(json.dumps(to_json(document), allow_nan=False) + "\n")


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


def show(title: str, rows: dict[str, str]) -> None:
    """A table of two columns for people, on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True, markup=False).print(table)
