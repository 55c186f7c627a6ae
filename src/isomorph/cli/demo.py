"""`isomorph demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isomorph.cli.options import Json
from isomorph.cli.output import print_json


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for models, reports and plots.")] = Path("demo-report"),
    as_json: Json = False,
) -> None:
    """Port, verify, quantize and run a small trained model: everything in a few minutes, offline."""
    from isomorph.demo import demo, print_demo

    result = demo(out)
    print_demo(result)
    if as_json:
        print_json(result.to_json())
    if not result:
        raise typer.Exit(1)
