"""A pipeline of two: what an iterator yields next is made in the background while the caller works."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: Items made ahead of the one in use: blocks of a few megabytes, where this is used.
DEPTH = 2


def ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items in the same order, made in one other thread. Its exceptions are raised here, in their place."""
    end = object()
    with ThreadPoolExecutor(1) as worker:
        pending = deque(worker.submit(next, items, end) for _ in range(DEPTH))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(worker.submit(next, items, end))
                yield item
        finally:
            for future in pending:
                future.cancel()
