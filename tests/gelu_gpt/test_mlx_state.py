"""isomorph's decode state of GELU-GPT in MLX over sequences that outgrow both windows (128 and 256 tokens)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from isomorph.frameworks.mlx_state import leaves
from isomorph.frameworks.model import DecodeState, Model
from tiny_gelu_gpt import tiny_config, write_checkpoint

LENGTH = 330
PADDING = (0, 30, 150)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return isomorph.load(write_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(), seed=9), framework="mlx")


@pytest.fixture(scope="module")
def ids(model: Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocab_size, (3, LENGTH))


@pytest.fixture(scope="module")
def expected(model: Model, ids: np.ndarray) -> np.ndarray:
    """Full forward logits [3, LENGTH, V]."""
    return model.logits(ids)


def go_on(state: DecodeState, ids: np.ndarray, expected: np.ndarray, rows: list[int], sizes: list[int]) -> None:
    """Feed row b of the state what follows in sequence `rows[b]`, and compare with that sequence alone."""
    for size in sizes:
        places = state.lengths
        logits = state.feed(np.stack([ids[row, place : place + size] for row, place in zip(rows, places)]))
        for answer, row, place in zip(logits, rows, places):
            assert_logits_close(answer, expected[row, place : place + size])


def padded_state(model: Model, ids: np.ndarray, tokens: int) -> DecodeState:
    state = model.decode_state(3, left_padding=PADDING)
    rows = [np.concatenate([np.full(count, 7), row])[:tokens] for row, count in zip(ids, PADDING)]
    state.feed(np.stack(rows), last_only=True)
    return state


def test_the_life_of_a_state(model: Model, ids: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    """Padded prefill, steps, re-feeds, rollback past what a window keeps, beams, a join, a save and a load."""
    state = padded_state(model, ids, 200)
    go_on(state, ids, expected, [0, 1, 2], [1, 5, 1, 1, 40])
    state.trim(45)
    assert state.lengths.tolist() == [203, 173, 53]
    go_on(state, ids, expected, [0, 1, 2], [1, 3, 1, 60])
    state.reorder([2, 0, 0])
    other = model.decode_state(1)
    other.feed(ids[1:2, :140])
    state.extend(other)
    state.save(tmp_path / "state")
    state = model.load_decode_state(tmp_path / "state")
    go_on(state, ids, expected, [2, 0, 0, 1], [1, 4, 1])
    state.trim(100)
    go_on(state, ids, expected, [2, 0, 0, 1], [2, 1])


def test_a_single_row_goes_back_past_its_windows(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    state = model.decode_state(1)
    state.feed(ids[:1, :320], last_only=True)
    for back in (1, 200, 100, 19):
        state.trim(back)
        go_on(state, ids, expected, [0], [1, 2])
        state.trim(3)
    assert state.lengths.tolist() == [0]


def test_a_ragged_batch(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    mask = np.stack([np.arange(LENGTH) >= count for count in PADDING])
    rows = np.stack([np.roll(row, count) for row, count in zip(ids, PADDING)])
    for side, taken in ((rows, mask), (ids, mask[:, ::-1])):
        logits = model.logits(side, attention_mask=taken)
        for row, count in enumerate(PADDING):
            assert_logits_close(logits[row, taken[row]], expected[row, : LENGTH - count])


def test_memory_stops_growing(model: Model, ids: np.ndarray) -> None:
    state = model.decode_state(2)
    sizes = []
    for _ in range(5):
        state.feed(ids[:2, :300], last_only=True)
        sizes.append(sum(cache.nbytes for cache in leaves(state._caches)))
    assert sizes[1:] == [sizes[1]] * 4


def test_a_lost_embedding_is_caught(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    for tokens in (170, 200):
        state = padded_state(model, ids, tokens)
        embedded = state._caches[0][1]
        embedded.keys = mx.zeros_like(embedded.keys)
        with pytest.raises(AssertionError):
            go_on(state, ids, expected, [0, 1, 2], [1])
