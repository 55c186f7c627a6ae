"""The cache of torch models holds no more of a layer than its window and what can be taken back."""

from __future__ import annotations

import numpy as np
import pytest

import isomorph
import tiny_gelu_gpt
from conftest import assert_logits_close
from frameworks.random_models import random_folder
from isomorph.frameworks import torch_cache
from isomorph.frameworks.torch_cache import ROLLBACK

TOKENS = 600


@pytest.fixture(scope="module", params=["gelu_gpt", "gemma3_text", "mistral"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows") / "model"
    if request.param == "gelu_gpt":  # windows of 129 and 65
        tiny_gelu_gpt.write_checkpoint(folder, tiny_gelu_gpt.tiny_config(sequence_len=64), seed=3)
    else:
        random_folder(request.param, folder, sliding_window=8, max_position_embeddings=TOKENS)
    return isomorph.load(folder, dtype="float32")


def held_bytes(state) -> int:
    """Memory of the buffers themselves, filled or not."""
    return sum(buffer.untyped_storage().nbytes() for layer in state.cache.layers for buffer in layer.buffers)


def most_bytes(state) -> int:
    """What the layers may take at most: full layers twice their tokens, others their window and what rolls back."""
    total = 0
    for layer in state.cache.layers:
        slots = 2 * TOKENS if layer.window is None else layer.window - 1 + 2 * ROLLBACK
        total += sum(buffer[:, :, 0].nbytes for buffer in layer.buffers) * slots
    return total


def fed(model, ids: np.ndarray):
    """The state after `ids`, in chunks, then token by token; and the logits of those single tokens."""
    state = model.decode_state(len(ids))
    for start in range(0, TOKENS - 300, 100):
        state.feed(ids[:, start : start + 100], last_only=True)
    return state, np.concatenate([state.feed(ids[:, at : at + 1]) for at in range(TOKENS - 300, TOKENS)], axis=1)


def test_a_long_generation_holds_only_windows(model, monkeypatch):
    ids = np.random.default_rng(0).integers(3, model.vocab_size, (2, TOKENS))
    state, logits = fed(model, ids)
    assert_logits_close(logits, model.logits(ids)[:, -300:])
    assert held_bytes(state) <= most_bytes(state)
    assert state.lengths.tolist() == [TOKENS, TOKENS]

    # Negative control: the same generation with windows that never let go.
    monkeypatch.setattr(torch_cache, "ROLLBACK", TOKENS)
    whole, _ = fed(model, ids)
    assert held_bytes(whole) > most_bytes(state)


def test_what_a_window_left_behind_is_read_again(model):
    ids = np.random.default_rng(1).integers(3, model.vocab_size, (2, TOKENS))
    state, _ = fed(model, ids)
    runs = []
    forward = model.forward
    model.forward = lambda *args: runs.append(args[0].shape) or forward(*args)
    try:
        state.trim(ROLLBACK)
        assert not runs  # still held
        state.trim(TOKENS // 2)
        assert runs == [(2, TOKENS // 2 - ROLLBACK)]
    finally:
        del model.forward
    kept = ids[:, : TOKENS // 2 - ROLLBACK]
    new = ids[:, -9:]
    assert_logits_close(state.feed(new), model.logits(np.concatenate([kept, new], axis=1))[:, -9:])


def test_a_window_that_keeps_one_token_too_few_is_caught(model, monkeypatch):
    monkeypatch.setattr(torch_cache, "ROLLBACK", 1)  # which makes up for one
    monkeypatch.setattr(model, "windows", [window and window - 2 for window in model.windows])
    ids = np.random.default_rng(0).integers(3, model.vocab_size, (2, TOKENS))
    _, logits = fed(model, ids)
    with pytest.raises(AssertionError):
        assert_logits_close(logits, model.logits(ids)[:, -300:])
