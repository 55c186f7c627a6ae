"""The one exception a user's mistake raises: a single line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad input or usage: says what was expected, what was found and what to do next, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or an empty string when nothing known comes close."""
    close = get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
