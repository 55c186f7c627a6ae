"""Progress bars, always on stderr, so that stdout stays the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on by so many units, and may rename what it is doing."""

    def __call__(self, amount: float = 1, description: str | None = None) -> None: ...


@contextmanager
def progress(description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """A bar on stderr while the block runs; yields `advance(amount, description=None)`.

    `unit` is `bytes` for sizes, else a noun in the plural. Where stderr is not a terminal nothing is drawn.
    """
    if not sys.stderr.isatty():
        yield _unseen
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(amount: float = 1, description: str | None = None) -> None:
            bar.update(task, advance=amount, description=description)

        yield advance


def _unseen(amount: float = 1, description: str | None = None) -> None:
    """Nothing is drawn: not even the library that would is imported."""
