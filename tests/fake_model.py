"""A language model that is a Python function, to test what runs on the decode-state contract without a framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.architectures.talkie import tokenizer as talkie
from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState, Model

Rule = Callable[[list[int]], np.ndarray]


class FakeModel(Model):
    """`rule` maps all tokens of a row so far to logits [V]. `fed` lists the shape of every feed."""

    framework = "fake"
    architecture = "talkie"
    config = None
    dtype = "float32"
    num_layers = 1

    def __init__(self, rule: Rule, vocab_size: int, max_positions: int = 200, tokenizer: Any = None) -> None:
        self.rule = rule
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.tokenizer = tokenizer
        self.fed: list[tuple[int, int]] = []
        self.states: list[FakeState] = []

    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        return np.stack([[self.rule(row[: end + 1].tolist()) for end in range(len(row))] for row in ids])

    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        raise NotImplementedError

    def _decode_state(self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None) -> DecodeState:
        self.states.append(FakeState(self, batch_size, left_padding, max_length))
        return self.states[-1]

    def load_decode_state(self, path: Path) -> DecodeState:
        raise NotImplementedError


class FakeState(DecodeState):
    """Remembers the tokens of each row; refuses what a real cache could not do."""

    trimmable = True

    def __init__(
        self, model: FakeModel, batch_size: int, left_padding: np.ndarray | None, max_length: int | None
    ) -> None:
        self.model = model
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding
        self.max_length = max_length

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], dtype=np.int64)

    def feed(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        ids = np.asarray(ids)
        assert ids.shape[0] == len(self.rows) and (self.padding < ids.shape[1]).all()
        self.model.fed.append(ids.shape)
        logits = np.zeros((*ids.shape, self.model.vocab_size), np.float32)
        for index, row in enumerate(self.rows):
            for at in range(int(self.padding[index]), ids.shape[1]):
                row.append(int(ids[index, at]))
                logits[index, at] = self.model.rule(row)
        self.padding = np.zeros_like(self.padding)
        assert self.max_length is None or self.lengths.max() <= self.max_length
        assert self.lengths.max() <= self.model.max_positions
        return logits[:, -1:] if last_only else logits

    def reorder(self, rows: Sequence[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]
        self.padding = self.padding[list(rows)]

    def extend(self, other: DecodeState) -> None:
        raise NotImplementedError

    def trim(self, tokens: int) -> None:
        if not self.trimmable and tokens:
            raise InputError("expected a state that can go back; found one that cannot")
        assert tokens <= self.lengths.min()
        self.rows = [row[: len(row) - tokens] for row in self.rows]

    def save(self, path: Path) -> None:
        raise NotImplementedError


def hashed_rule(vocab_size: int) -> Rule:
    """Logits that depend on every token of the row and on its position."""
    table = np.random.default_rng(5).normal(0, 3, (997, vocab_size)).astype(np.float32)
    return lambda tokens: table[sum((at + 1) * (token + 3) for at, token in enumerate(tokens)) % 997]


def scripted_rule(answer: Sequence[int], prompt_tokens: int, vocab_size: int) -> Rule:
    """Says the tokens of `answer` after a prompt of `prompt_tokens`, whatever it was, then token 0 for ever."""

    def rule(tokens: list[int]) -> np.ndarray:
        at = len(tokens) - prompt_tokens
        logits = np.zeros(vocab_size, np.float32)
        logits[answer[at] if 0 <= at < len(answer) else 0] = 9.0
        return logits

    return rule


def small_tokenizer(flavour: str = "instruct") -> Any:
    """Talkie's tokenizer over the single bytes and a few longer tokens: 270 ranks, then the special tokens."""
    from transformers import PreTrainedTokenizerFast

    longer = [b"th", b" th", b"the", b" the", b"in", b"ing", b"end", b"<|", b"|>", b"\n\n", b"ee", b"er", b"at", b"on"]
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *longer])}
    names = talkie.SPECIAL_TOKENS[flavour]
    backend = talkie.fast_tokenizer(ranks, talkie.special_tokens(len(ranks) + len(names), flavour))
    values = talkie.tokenizer_config(flavour, None)
    del values["tokenizer_class"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **values)
