"""From tokens to text that is safe to show: no half characters, no half stop strings, no chat markers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: An incomplete UTF-8 character is at most this many bytes, each of which may decode to one replacement character.
PARTIAL_BYTES = 3

REPLACEMENT = "�"


class IncrementalDecoder:
    """Text of a growing list of tokens, piece by piece; a character whose bytes are not all there is held back.

    The window that is decoded again for each token starts where a former text ended, because some tokenizers treat
    the first token of a text differently (they drop its leading blank).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._released = ""

    def push(self, token: int) -> str:
        """Take one more token and return the text that is now certain."""
        self._pending.append(token)
        text = self._new_text()
        certain = text.rstrip(REPLACEMENT) if text.endswith(REPLACEMENT) else text
        certain = text[: max(len(certain), len(text) - PARTIAL_BYTES)]
        piece = certain[len(self._released) :]
        if text and certain == text:
            self._context, self._pending, self._released = self._pending, [], ""
        else:
            self._released = certain
        return piece

    def finish(self) -> str:
        """The text that was held back; bytes that never became a character show as U+FFFD."""
        piece = self._new_text()[len(self._released) :] if self._pending else ""
        self._context, self._pending, self._released = [], [], ""
        return piece

    def _new_text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts a text at the first stop string that is completed in it, wherever the pieces it comes in are cut."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take more text and return what cannot become part of a stop string; nothing after a stop."""
        if self.stopped:
            return ""
        self._held += piece
        ends = [(at + len(stop), at) for stop in self._strings if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            # The one completed first; of several that end there, the longest.
            kept, self._held = self._held[: min(ends)[1]], ""
            return kept
        safe = len(self._held) - self._overlap()
        kept, self._held = self._held[:safe], self._held[safe:]
        return kept

    def finish(self) -> str:
        """What was held back in case a stop string came."""
        kept, self._held = self._held, ""
        return kept

    def _overlap(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._strings), default=1) - 1)
        return next(
            (
                size
                for size in range(longest, 0, -1)
                if any(stop.startswith(self._held[-size:]) for stop in self._strings)
            ),
            0,
        )


class AnswerText:
    """The text of one answer as its tokens come: decoded, and cut at stop strings."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        return self._add(self._stops.push(self._decoder.push(token)))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        rest = self._stops.push(self._decoder.finish())
        return self._add(rest + self._stops.finish())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece
