"""Named ways to turn a text into scored tokens. Two perplexities compare only when their fingerprints are equal."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from isomorph.errors import InputError, did_you_mean

#: The heading of an article of WikiText; sections have more signs.
ARTICLE = re.compile(r"^ ?= [^=].*[^=] = ?$", re.MULTILINE)


@dataclass(frozen=True)
class Window:
    """Feed tokens `start:end - 1` of the stream; score the targets from index `score_from` (of the stream) to `end`."""

    start: int
    end: int
    score_from: int


@dataclass(frozen=True)
class Stream:
    """A text as one row of token ids, with the bytes each token stands for where they are known.

    `widths[i]` is the number of the text's UTF-8 bytes that token i adds. `skipped[i]` says that token i is never a
    target. `opening` is the id that stands in for the first token of every window, `separator` the one between
    documents, where a protocol has one.
    """

    ids: np.ndarray
    widths: np.ndarray | None = None
    skipped: np.ndarray | None = None
    opening: int | None = None
    separator: int | None = None
    text_sha256: str | None = None

    def fed(self, part: Window) -> np.ndarray:
        """The ids of a window that the model reads, [T]."""
        ids = self.ids[part.start : part.end - 1].copy()
        if self.opening is not None:
            ids[0] = self.opening
        return ids

    def targets(self, part: Window) -> np.ndarray:
        """Indices of the tokens that the window scores."""
        indices = np.arange(part.score_from, part.end)
        return indices if self.skipped is None else indices[~self.skipped[indices]]

    def cut(self, limit: int) -> Stream:
        """The first `limit` tokens."""
        widths, skipped = (None if part is None else part[:limit] for part in (self.widths, self.skipped))
        return replace(self, ids=self.ids[:limit], widths=widths, skipped=skipped)


@dataclass(frozen=True)
class Protocol:
    """How a text becomes tokens and windows.

    `window` tokens are read at a time, windows begin every `stride` tokens; a token is scored once, in the first window
    that holds it. What has no context, the first token of a window that shares nothing with the one before, is not
    scored, unless windows `carry`: then each also scores the first token of the next. With `trained_length` windows are
    as long as the model's `sequence_len`, where its config has one. `limit` cuts the stream.

    `documents` cuts the text before it is tokenized: `whole`, `lines` (not blank, joined by blank lines) or `articles`
    (of WikiText). `begin` puts the tokenizer's BOS before the stream, `open_windows` in place of the first token of
    each window, `separate` its EOS between documents; where the tokenizer has none, nothing. `skip_padding` leaves out
    targets equal to the padding token (EOS where there is none). `partial` scores a last window that is not full;
    `second_half` scores only that of each window. `unknown` lists what the publication does not say.
    """

    name: str
    description: str
    window: int = 4096
    stride: int = 4096
    limit: int | None = None
    trained_length: bool = False
    documents: str = "whole"
    begin: bool = False
    separate: bool = False
    open_windows: bool = False
    carry: bool = False
    partial: bool = True
    second_half: bool = False
    skip_padding: bool = False
    unknown: tuple[str, ...] = field(default=())

    def parameters(self) -> dict[str, Any]:
        """What a fingerprint holds besides the ids."""
        return asdict(self)

    def windows(self, tokens: int, context: int) -> Iterator[Window]:
        """Windows over a stream of `tokens`, of which a model of that `context` reads at most so many."""
        window = min(self.window, context)
        stride = min(self.stride, window)
        scored = 1
        for start in range(0, tokens, stride):
            full = start + window + self.carry
            if full > tokens and not self.partial:
                return
            end = min(full, tokens)
            first = max(scored, start + (window // 2 if self.second_half else 0) + 1)
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


def lines(text: str) -> list[str]:
    """The lines of a text that are not blank, joined by blank lines: one document."""
    return ["\n\n".join(line for line in text.split("\n") if line.strip())]


def articles(text: str) -> list[str]:
    """The articles of WikiText, each from its heading on; what comes before the first heading belongs to the first."""
    starts = [match.start() for match in ARTICLE.finditer(text)]
    borders = [0, *starts[1:], len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


DOCUMENTS: dict[str, Callable[[str], list[str]]] = {
    "whole": lambda text: [text],
    "lines": lines,
    "articles": articles,
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="windowed",
            description="one stream of tokens in windows; without overlap the first token of each is not scored",
        ),
        Protocol(
            name="gelu-gpt",
            description="GELU-GPT's card (WikiText-103 test): lines joined by blank lines, BOS, each token scored",
            window=1024,
            stride=1024,
            trained_length=True,
            documents="lines",
            begin=True,
            carry=True,
            skip_padding=True,
        ),
        Protocol(
            name="gpt-oss",
            description="the card of the 6-bit gpt-oss (WikiText-2 test): articles with EOS between, 100,000 tokens",
            limit=100_000,
            documents="articles",
            separate=True,
            unknown=(
                "how documents are split: by article here",
                "whether a BOS stands first: none here",
                "whether the first token of a window is scored: not here",
                "which EOS: the tokenizer's here, separator_id under data",
            ),
        ),
        Protocol(
            name="llama.cpp",
            description="llama-perplexity: windows of 512 that open with BOS, the second half of each scored",
            window=512,
            stride=512,
            begin=True,
            open_windows=True,
            partial=False,
            second_half=True,
        ),
        Protocol(
            name="mlx-lm",
            description="mlx_lm.perplexity: windows of 512, all but the first token scored; there on conversations",
            window=512,
            stride=512,
            partial=False,
        ),
    )
}


def protocol_named(
    name: str,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    trained_length: int | None = None,
) -> Protocol:
    """The protocol of that name with other numbers where they are given; a stride goes with its window.

    `trained_length` is the model's. Raises InputError.
    """
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise InputError(f"expected a protocol of {known}; found {name!r}{did_you_mean(name, PROTOCOLS)}")
    chosen = PROTOCOLS[name]
    if window is None and chosen.trained_length:
        window = trained_length
    if window is not None:
        chosen = replace(chosen, window=window, stride=window if chosen.stride == chosen.window else chosen.stride)
    if stride is not None:
        chosen = replace(chosen, stride=stride)
    if limit is not None:
        chosen = replace(chosen, limit=limit)
    if chosen.limit is not None and chosen.limit < 2:
        raise InputError(f"expected a limit of at least 2 tokens; found {chosen.limit}; leave it out for all of them")
    if chosen.window < 2 or not 1 <= chosen.stride <= chosen.window:
        found = f"window {chosen.window}, stride {chosen.stride}"
        raise InputError(f"expected a window of at least 2 tokens and a stride between 1 and it; found {found}")
    return chosen


def stream_of(protocol: Protocol, tokenizer: Any, text: Any) -> Stream:
    """`text` as a stream, cut to the protocol's limit: a string, or ids [T], which are taken as they are.

    Raises InputError when it is too short.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("expected ids, because the model has no tokenizer; found text; pass token ids instead")
        stream = encode(protocol, tokenizer, text)
    else:
        ids = np.asarray(text)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"expected text or integer ids [T]; found {ids.dtype} of shape {ids.shape}")
        stream = Stream(ids.astype(np.int64))
    if protocol.limit is not None:
        stream = stream.cut(protocol.limit)
    if len(stream.ids) < 2:
        raise InputError(f"expected a text of at least 2 tokens; found {len(stream.ids)}; give a longer text")
    return stream


def encode(protocol: Protocol, tokenizer: Any, text: str) -> Stream:
    """The token ids of `text` as the protocol has them, and the bytes they stand for."""
    bos, eos = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    parts = [_encode(tokenizer, document) for document in DOCUMENTS[protocol.documents](text)]
    if protocol.separate and eos is not None:
        parts = [part for document in parts for part in (document, _special(eos))][:-1]
    if protocol.begin and bos is not None:
        parts.insert(0, _special(bos))
    ids = np.concatenate([ids for ids, _ in parts])
    known = [widths for _, widths in parts if widths is not None]
    padding = getattr(tokenizer, "pad_token_id", None)
    padding = eos if padding is None else padding
    return Stream(
        ids,
        np.concatenate(known) if len(known) == len(parts) else None,
        ids == padding if protocol.skip_padding and padding is not None else None,
        bos if protocol.open_windows else None,
        eos if protocol.separate else None,
        hashlib.sha256(text.encode()).hexdigest(),
    )


def _encode(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids without added special tokens, and their bytes where the tokenizer knows its offsets."""
    if not getattr(tokenizer, "is_fast", False):
        return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64), None
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    # Characters to bytes once, then look up; tokens inside one character share its end.
    sizes = np.array([len(character.encode()) for character in text], dtype=np.int64)
    ends = np.concatenate(([0], sizes.cumsum()))[[end for _, end in encoded["offset_mapping"]]]
    widths = np.diff(np.maximum.accumulate(ends), prepend=0)
    return np.asarray(encoded["input_ids"], dtype=np.int64), widths


def _special(token: int) -> tuple[np.ndarray, np.ndarray]:
    """A token that stands for no byte."""
    return np.array([token], dtype=np.int64), np.zeros(1, dtype=np.int64)
