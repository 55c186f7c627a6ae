"""Answers in channels: the harmony format of gpt-oss, in which a model thinks aloud before it answers.

    <|start|>assistant<|channel|>analysis<|message|>what it thinks<|end|>
    <|start|>assistant<|channel|>final<|message|>what it says<|return|>

A message to a tool names its recipient in the header (`commentary to=functions.NAME`) and ends with `<|call|>`.
`<|end|>` ends a message, never the answer. Format: https://github.com/openai/harmony.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isomorph.generate.text import AnswerText

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"

#: What ends an answer: it is done, it calls a tool, the document ends. `<|end|>` only ends one of its messages.
ANSWER_ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")

#: The channel that a user reads; what comes before any header counts as it.
FINAL = "final"

_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True)
class ChannelMessage:
    """One message of an answer: its channel, the tool it is for (None: nobody), and its text."""

    channel: str
    recipient: str | None
    text: str


class ChannelText:
    """The text of one answer in channels, with the interface of `AnswerText`: `text` is the final channel's.

    With `show_analysis` the pieces hold the other channels too, each message after a line with its header.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], show_analysis: bool = False) -> None:
        vocabulary = tokenizer.get_added_vocab()
        self._marks = {vocabulary[name]: name for name in (START, CHANNEL, MESSAGE, END)}
        self._tokenizer = tokenizer
        # A special token is never shown, so only what the caller asked for stops a text.
        self._stops = [stop for stop in stops if stop not in vocabulary]
        self._show_analysis = show_analysis
        self._header: AnswerText | None = None
        self._channel = FINAL
        self._recipient: str | None = None
        self._body = self._new_body()
        self._closed: list[ChannelMessage] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met in the final channel."""
        return self._channel == FINAL and self._body.stopped

    @property
    def messages(self) -> tuple[ChannelMessage, ...]:
        """The messages so far, the open one included."""
        current = ChannelMessage(self._channel, self._recipient, self._body.text)
        return (*self._closed, *([current] if current.text or not self._closed else []))

    @property
    def text(self) -> str:
        """What the final channel says."""
        return "".join(message.text for message in self.messages if message.channel == FINAL)

    def push(self, token: int) -> str:
        """The shown text that `token` makes certain."""
        mark = self._marks.get(token)
        if mark == MESSAGE:
            return self._open()
        if mark is not None:
            piece = self._close()
            # `<|start|>assistant<|channel|>...` is one header; the role in it says nothing new.
            self._header = None if mark == END else AnswerText(self._tokenizer, ())
            return piece
        if self._header is not None:
            self._header.push(token)
            return ""
        return self._shown(self._body.push(token))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self._header is not None else self._shown(self._body.finish())

    def _new_body(self) -> AnswerText:
        return AnswerText(self._tokenizer, self._stops if self._channel == FINAL else ())

    def _open(self) -> str:
        """A header is complete: its message begins."""
        header = ""
        if self._header is not None:
            self._header.finish()
            header = self._header.text.strip()
        recipient = _RECIPIENT.search(header)
        self._recipient = recipient[1] if recipient else None
        words = _RECIPIENT.sub("", header).split()
        self._channel = words[0] if words else FINAL
        self._header = None
        self._body = self._new_body()
        return f"[{header}]\n" if self._show_analysis and self._channel != FINAL else ""

    def _close(self) -> str:
        """A message is complete; between messages there is nothing to close."""
        if self._header is not None or not (piece := self._finished()):
            return ""
        shown, text = piece
        if text:
            self._closed.append(ChannelMessage(self._channel, self._recipient, text))
        self._body = self._new_body()
        return shown + ("\n\n" if self._show_analysis and self._channel != FINAL else "")

    def _finished(self) -> tuple[str, str] | None:
        shown = self._shown(self._body.finish())
        return (shown, self._body.text) if self._body.text else None

    def _shown(self, piece: str) -> str:
        return piece if self._channel == FINAL or self._show_analysis else ""


def answer_ends(tokenizer: Any, ids: set[int]) -> set[int]:
    """`ids` that end an answer as the files say, and as harmony does where the tokenizer has channels."""
    if not has_channels(tokenizer):
        return ids
    vocabulary = tokenizer.get_added_vocab()
    return (ids | {vocabulary[name] for name in ANSWER_ENDS if name in vocabulary}) - {vocabulary[END]}


def has_channels(tokenizer: Any) -> bool:
    """Whether the tokenizer has the marks of channels."""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    return all(name in vocabulary for name in (START, CHANNEL, MESSAGE, END))
