"""Every decode state, however it was come by, gives the logits of the full forward pass over its tokens.

Each test compares with `Model.logits` over the very sequences that the state should hold, within the numeric rule.
The last section breaks states on purpose: the same comparison must then fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from conftest import assert_logits_close
from isomorph import InputError
from isomorph.frameworks.model import DecodeState, Model

from .conftest import SHIFTED_FROM, Case

LENGTH = 24
#: Left padding of each row of the padded tests.
PADDING = (0, 3, 7)


@pytest.fixture(scope="module")
def ids(model: Model) -> np.ndarray:
    return np.random.default_rng(5).integers(0, model.vocab_size, (3, LENGTH))


@pytest.fixture(scope="module")
def expected(model: Model, ids: np.ndarray) -> np.ndarray:
    """Full forward logits [3, LENGTH, V]."""
    return model.logits(ids)


def fed(state: DecodeState, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Logits of feeding `ids` in chunks of these sizes, side by side."""
    ends = np.cumsum(sizes)
    assert ends[-1] == ids.shape[1]
    return np.concatenate([state.feed(ids[:, end - size : end]) for size, end in zip(sizes, ends)], axis=1)


def padded(ids: np.ndarray, padding: Sequence[int], filler: int) -> np.ndarray:
    """Row b's first tokens, after `padding[b]` times `filler`."""
    rows = [np.concatenate([np.full(count, filler), row[: len(row) - count]]) for row, count in zip(ids, padding)]
    return np.stack(rows)


def assert_continues(state: DecodeState, model: Model, sequences: Sequence[np.ndarray], new: np.ndarray) -> None:
    """Feeding `new` [B, T] gives each row the logits of its own sequence, extended by it, alone."""
    logits = state.feed(new)
    for row, sequence in enumerate(sequences):
        alone = model.logits(np.concatenate([sequence, new[row]])[None])
        assert_logits_close(logits[row], alone[0, -new.shape[1] :])
    assert state.lengths.tolist() == [len(sequence) + new.shape[1] for sequence in sequences]


@pytest.mark.parametrize(
    "sizes",
    [[LENGTH], [9, 15], [1, 5, 1, 7, 10], [10, 1, 13], [1] * LENGTH],
    ids=["prefill", "two chunks", "many chunks", "re-feed after a step", "single steps"],
)
def test_feeding_equals_the_full_forward(model: Model, ids: np.ndarray, expected: np.ndarray, sizes: list[int]) -> None:
    state = model.decode_state(3)
    assert state.batch_size == 3
    assert state.lengths.tolist() == [0, 0, 0]
    assert_logits_close(fed(state, ids, sizes), expected)
    assert state.lengths.tolist() == [LENGTH] * 3


def test_last_only_gives_the_last_logits(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    state = model.decode_state(3)
    logits = state.feed(ids, last_only=True)
    assert logits.shape == (3, 1, model.vocab_size)
    assert_logits_close(logits, expected[:, -1:])


@pytest.mark.parametrize("filler", [0, 17])
def test_left_padding_is_not_seen(model: Model, ids: np.ndarray, expected: np.ndarray, filler: int) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    logits = fed(state, padded(ids, PADDING, filler), [15, 1, 8])
    for row, count in enumerate(PADDING):
        assert_logits_close(logits[row, count:], expected[row, : LENGTH - count])
    assert state.lengths.tolist() == [LENGTH - count for count in PADDING]


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_equals_one_by_one(model: Model, ids: np.ndarray, expected: np.ndarray, side: str) -> None:
    mask = np.stack([np.arange(LENGTH) >= count for count in PADDING])
    rows = padded(ids, PADDING, 0)
    if side == "right":
        mask = mask[:, ::-1]
        rows = np.stack([np.roll(row, -count) for row, count in zip(rows, PADDING)])
    logits = model.logits(rows, attention_mask=mask)
    for row, count in enumerate(PADDING):
        assert_logits_close(logits[row, mask[row]], expected[row, : LENGTH - count])


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 2], [1, 1, 1, 2, 0]])
def test_reorder_filters_and_duplicates(model: Model, ids: np.ndarray, rows: list[int]) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    state.feed(padded(ids, PADDING, 0)[:, :16])
    state.reorder(rows)
    assert state.batch_size == len(rows)
    sequences = [ids[row, : 16 - PADDING[row]] for row in rows]
    assert_continues(state, model, sequences, ids[: len(rows) % 3 + 1].repeat(3, axis=0)[: len(rows), :5])


def test_reordered_rows_go_their_own_ways(model: Model, ids: np.ndarray) -> None:
    """Duplicates must not share memory: what one row is fed must not reach its twin."""
    state = model.decode_state(2)
    state.feed(ids[:2, :10])
    state.reorder([1, 1])
    assert_continues(state, model, [ids[1, :10]] * 2, ids[[0, 2], :4])


def test_extend_joins_states_of_different_lengths(model: Model, ids: np.ndarray) -> None:
    state, other = model.decode_state(2), model.decode_state(1)
    state.feed(ids[:2, :14])
    other.feed(ids[2:, :6])
    state.extend(other)
    assert state.batch_size == 3
    assert_continues(state, model, [ids[0, :14], ids[1, :14], ids[2, :6]], ids[:, 18:])


def test_extend_by_a_longer_state(model: Model, ids: np.ndarray) -> None:
    state, other = model.decode_state(1), model.decode_state(2, left_padding=[1, 4])
    state.feed(ids[2:, :6])
    other.feed(padded(ids[:2], [1, 4], 0)[:, :14])
    state.extend(other)
    assert_continues(state, model, [ids[2, :6], ids[0, :13], ids[1, :10]], ids[:, 18:])


def test_trim_forgets_the_last_tokens(model: Model, ids: np.ndarray) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    rows = padded(ids, PADDING, 0)
    state.feed(rows[:, :18])
    state.trim(0)
    state.trim(5)
    assert state.lengths.tolist() == [13 - count for count in PADDING]
    assert_continues(state, model, [ids[row, : 13 - count] for row, count in enumerate(PADDING)], ids[:, ::-1][:, :6])


def test_trim_to_nothing_starts_anew(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    state = model.decode_state(3)
    state.feed(ids[::-1, :9])
    state.trim(9)
    assert_logits_close(state.feed(ids), expected)


def test_saved_state_loads_bit_for_bit(model: Model, ids: np.ndarray, tmp_path: Path) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    state.feed(padded(ids, PADDING, 0)[:, :16])
    path = tmp_path / "state.safetensors"
    state.save(path)
    loaded = model.load_decode_state(path)
    assert loaded.lengths.tolist() == state.lengths.tolist()
    new = ids[:, 16:]
    np.testing.assert_array_equal(loaded.feed(new), state.feed(new))
    again = model.load_decode_state(path)
    assert_continues(again, model, [ids[row, : 16 - count] for row, count in enumerate(PADDING)], new)


def test_everything_in_turn(model: Model, ids: np.ndarray, tmp_path: Path) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    fed(state, padded(ids, PADDING, 0)[:, :15], [12, 1, 2])
    state.trim(2)  # 13, 10, 6 tokens
    state.reorder([2, 0, 0])
    other = model.decode_state(1)
    other.feed(ids[1:2, :4])
    state.extend(other)
    state.save(tmp_path / "state")
    state = model.load_decode_state(tmp_path / "state")
    state.reorder([3, 1, 0])
    sequences = [ids[1, :4], ids[0, :13], ids[2, :6]]
    assert_continues(state, model, sequences, ids[:, 20:])
    sequences = [np.concatenate([sequence, row[20:]]) for sequence, row in zip(sequences, ids)]
    assert_continues(state, model, sequences, ids[:, :1])


def test_greedy_tokens_with_and_without_a_state_agree(model: Model, ids: np.ndarray) -> None:
    state, sequence = model.decode_state(3), ids[:, :8]
    logits = state.feed(sequence, last_only=True)
    for _ in range(12):
        token = logits[:, -1].argmax(axis=-1)[:, None]
        np.testing.assert_array_equal(token[:, 0], model.logits(sequence)[:, -1].argmax(axis=-1))
        sequence = np.concatenate([sequence, token], axis=1)
        logits = state.feed(token)


def test_mistakes_are_refused_in_one_line(model: Model, ids: np.ndarray, tmp_path: Path) -> None:
    state = model.decode_state(3, left_padding=PADDING)
    state.feed(padded(ids, PADDING, 0)[:, :10])
    with pytest.raises(InputError, match="trim"):
        state.trim(4)  # the third row holds 3
    with pytest.raises(InputError):
        state.reorder([0, 3])
    with pytest.raises(InputError):
        state.feed(np.full((3, 1), model.vocab_size))
    with pytest.raises(InputError):
        state.feed(ids[:2, :1])
    with pytest.raises(InputError, match=str(model.max_positions)):
        for _ in range(3):
            state.feed(ids)
    (tmp_path / "broken").write_bytes(b"not a state")
    with pytest.raises(InputError) as caught:
        model.load_decode_state(tmp_path / "broken")
    assert "\n" not in str(caught.value)


# Negative controls: each fault must be caught by the comparison used above.


def test_a_lost_token_is_caught(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    state = model.decode_state(3)
    state.feed(ids[:, :10])
    state.trim(1)
    with pytest.raises(AssertionError):
        assert_logits_close(state.feed(ids[:, 10:]), expected[:, 10:])


def test_attended_padding_is_caught(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    state = model.decode_state(3)  # not told about the padding
    logits = state.feed(padded(ids, PADDING, 0))
    for row, count in list(enumerate(PADDING))[1:]:
        with pytest.raises(AssertionError):
            assert_logits_close(logits[row, count:], expected[row, : LENGTH - count])


def test_a_forgotten_reorder_is_caught(model: Model, ids: np.ndarray) -> None:
    state = model.decode_state(3)
    state.feed(ids[:, :10])
    with pytest.raises(AssertionError):
        assert_continues(state, model, [ids[1, :10], ids[0, :10], ids[2, :10]], ids[:, :3])


def test_positions_off_by_one_are_caught(
    model: Model, case: Case, ids: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.shift_positions(monkeypatch)
    state = model.decode_state(3)
    assert_logits_close(state.feed(ids[:, :SHIFTED_FROM]), expected[:, :SHIFTED_FROM])
    with pytest.raises(AssertionError):
        assert_logits_close(state.feed(ids[:, SHIFTED_FROM:]), expected[:, SHIFTED_FROM:])
