"""Named ways to turn a text into scored tokens. Two perplexities compare only when their fingerprints are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from isomorph.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Window:
    """Feed tokens `start:end` of the stream; score the targets from index `score_from` (of the stream) to `end`."""

    start: int
    end: int
    score_from: int


@dataclass(frozen=True)
class Stream:
    """A text as one row of token ids, with the bytes each token stands for where they are known.

    `byte_ends[i]` is the number of the text's UTF-8 bytes covered by tokens up to and including i.
    """

    ids: np.ndarray
    byte_ends: np.ndarray | None
    text_sha256: str | None

    def bytes_of(self, start: int, end: int) -> int | None:
        """Bytes of tokens `start:end`, or None when unknown."""
        if self.byte_ends is None or end <= start:
            return None if self.byte_ends is None else 0
        return int(self.byte_ends[end - 1] - (self.byte_ends[start - 1] if start else 0))


@dataclass(frozen=True)
class Protocol:
    """How a text becomes tokens and windows.

    `window` tokens are seen at a time, windows begin every `stride` tokens; a token is scored once, in the first window
    that holds it; the very first of the stream, and of each window when stride equals window, has no context and is
    not scored. `limit` cuts the stream, None takes all of it. `tokenize(tokenizer, text)` gives the ids.
    """

    name: str
    description: str
    window: int = 4096
    stride: int = 4096
    limit: int | None = None
    tokenize: Callable[[Any, str], Stream] = lambda tokenizer, text: encode(tokenizer, text)

    def parameters(self) -> dict[str, Any]:
        """What a fingerprint holds besides the ids."""
        return {key: value for key, value in asdict(replace(self, tokenize=encode)).items() if key != "tokenize"}

    def windows(self, tokens: int, context: int) -> Iterator[Window]:
        """Windows over a stream of `tokens`, at most `context` long."""
        window = min(self.window, context)
        stride = min(self.stride, window)
        scored = 1
        for start in range(0, tokens, stride):
            end = min(start + window, tokens)
            # The first token of a window that shares nothing with the one before has nothing to be predicted from.
            first = max(scored, start + 1)
            if first < end:
                yield Window(start, end, first)
            scored = end
            if end == tokens:
                return

    def fingerprint(self, stream: Stream, context: int) -> str:
        """Twelve hexadecimal digits over ids, windows and the protocol's name: what makes two results comparable."""
        document = {**self.parameters(), "windows": [asdict(w) for w in self.windows(len(stream.ids), context)]}
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(stream.ids, dtype="<i8").tobytes())
        return digest.hexdigest()[:12]


def encode(tokenizer: Any, text: str) -> Stream:
    """Token ids of `text` without added special tokens, and the bytes they cover."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        # Characters to bytes once, then look up; tokens inside one character share its end.
        widths = np.array([len(character.encode()) for character in text], dtype=np.int64)
        ends = np.concatenate(([0], widths.cumsum()))[[end for _, end in encoded["offset_mapping"]]]
        return Stream(np.asarray(encoded["input_ids"], dtype=np.int64), np.maximum.accumulate(ends), sha256)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return Stream(np.asarray(encoded["input_ids"], dtype=np.int64), None, sha256)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="windowed",
            description="one stream of tokens in windows; without overlap the first token of each is not scored",
        ),
    )
}


def protocol_named(name: str, **changes: Any) -> Protocol:
    """The protocol of that name with `changes` (those that are not None) to its numbers. Raises InputError."""
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise InputError(f"expected a protocol of {known}; found {name!r}{did_you_mean(name, PROTOCOLS)}")
    chosen = replace(PROTOCOLS[name], **{key: value for key, value in changes.items() if value is not None})
    if chosen.window < 2 or not 1 <= chosen.stride <= chosen.window:
        found = f"window {chosen.window}, stride {chosen.stride}"
        raise InputError(f"expected a window of at least 2 tokens and a stride between 1 and it; found {found}")
    return chosen


def stream_of(protocol: Protocol, tokenizer: Any, text: Any) -> Stream:
    """`text` (a string, or ids [T]) as a stream, cut to the protocol's limit. Raises InputError when too short."""
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("expected ids, because the model has no tokenizer; found text; pass token ids instead")
        stream = protocol.tokenize(tokenizer, text)
    else:
        ids = np.asarray(text)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"expected text or integer ids [T]; found {ids.dtype} of shape {ids.shape}")
        stream = Stream(ids.astype(np.int64), None, None)
    if protocol.limit is not None and len(stream.ids) > protocol.limit:
        ends = None if stream.byte_ends is None else stream.byte_ends[: protocol.limit]
        stream = replace(stream, ids=stream.ids[: protocol.limit], byte_ends=ends)
    if len(stream.ids) < 2:
        raise InputError(f"expected a text of at least 2 tokens; found {len(stream.ids)}; give a longer text")
    return stream
