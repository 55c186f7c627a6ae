"""Talkie with every cache mlx-lm has: each gives the logits of the full forward over what it remembers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tuner.trainer import grad_checkpoint

from isomorph.architectures.talkie import modeling_mlx
from isomorph.verify.tolerance import allowed_logit_difference
from tiny import tiny_config, tiny_tensors

LENGTH = 40


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest) -> modeling_mlx.Model:
    config = tiny_config(rope_table_dtype=request.param, head_dim=32)
    model = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(config))
    weights = {name: mx.array(value) for name, value in tiny_tensors(config, seed=4).items()}
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    return model


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 96, (4, LENGTH))


def logits_of(model: nn.Module, ids: np.ndarray, cache: list | None = None) -> np.ndarray:
    return np.array(model(mx.array(ids), cache=cache))


def units(actual: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference in units of what the numeric rule allows; a comparison of nothing is an error."""
    assert actual.shape == reference.shape and actual.size and np.isfinite(actual).all()
    return float(np.abs(actual - reference).max()) / allowed_logit_difference(reference)


def test_a_cache_changes_no_bit_of_the_prefill(model: nn.Module, ids: np.ndarray) -> None:
    cache = make_prompt_cache(model)
    assert all(type(layer) is KVCache for layer in cache)
    np.testing.assert_array_equal(logits_of(model, ids[:1], cache), logits_of(model, ids[:1]))


@pytest.mark.parametrize("batch", [1, 3])
def test_single_tokens_of_a_batch_at_one_offset(model: nn.Module, ids: np.ndarray, batch: int) -> None:
    """One token, several rows, an integer offset: where mlx before 0.32 rotated the rows after the first wrongly."""
    expected = logits_of(model, ids[:batch])
    cache = make_prompt_cache(model)
    steps = [logits_of(model, ids[:batch, step : step + 1], cache) for step in range(LENGTH)]
    assert units(np.concatenate(steps, axis=1), expected) <= 1


def right_padded(ids: np.ndarray, lengths: list[int]) -> np.ndarray:
    return np.where(np.arange(ids.shape[1]) < np.array(lengths)[:, None], ids, 0)


def test_batch_with_an_offset_a_row(model: nn.Module, ids: np.ndarray) -> None:
    """The life of mlx-lm's server batch: ragged prefill, decode, a row leaves, another joins, a row comes out."""
    lengths, expected = [17, 5, 11], [logits_of(model, ids[row : row + 1])[0] for row in range(4)]
    cache = [BatchKVCache([0, 0, 0]) for _ in model.layers]
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=[0, 12, 6])
    logits = logits_of(model, right_padded(ids[:3, :17], lengths), cache)
    for row, length in enumerate(lengths):
        assert units(logits[row, :length], expected[row][:length]) <= 1
    for layer in cache:
        layer.finalize()
    assert cache[0].offset.tolist() == lengths

    def decode(rows: list[int], places: list[int], steps: int) -> list[int]:
        for _ in range(steps):
            captured = [layer.offset for layer in cache]
            before = [offset.tolist() for offset in captured]
            step = logits_of(model, np.array([[ids[row, place]] for row, place in zip(rows, places)]), cache)
            for at, (row, place) in enumerate(zip(rows, places)):
                assert units(step[at, 0], expected[row][place]) <= 1
            assert [offset.tolist() for offset in captured] == before  # nobody wrote into the cache's own array
            places = [place + 1 for place in places]
        return places

    places = decode([0, 1, 2], lengths, 4)
    for layer in cache:
        layer.filter([2, 1])
    joining = make_prompt_cache(model)
    logits_of(model, ids[3:, :25], joining)
    for layer, other in zip(cache, joining):
        layer.extend(BatchKVCache.merge([other]))
    places = decode([2, 1, 3], [places[2], places[1], 25], 4)
    alone = [layer.extract(1) for layer in cache]
    step = logits_of(model, ids[1:2, places[1] : places[1] + 3], alone)
    assert units(step[0], expected[1][places[1] : places[1] + 3]) <= 1


class InPlace(BatchKVCache):
    """Advances its offset in place, as mlx-lm did before its issue 1848: whoever holds the array sees it move."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        held = self.offset
        fetched = super().update_and_fetch(keys, values)
        held += keys.shape[2]
        self.offset = held
        return fetched


def test_a_cache_that_advances_in_place(model: nn.Module, ids: np.ndarray) -> None:
    expected = logits_of(model, ids[:2])
    cache = [InPlace([0, 0]) for _ in model.layers]
    # Chunks of several lengths: a shift that is the same for all tokens would not show, rotation being relative.
    for start, stop in ((0, 5), (5, 6), (6, 9), (9, 10)):
        assert units(logits_of(model, ids[:2, start:stop], cache), expected[:, start:stop]) <= 1
    assert cache[0].offset.tolist() == [10, 10]


def test_an_offset_shared_by_all_rows_is_caught(model: nn.Module, ids: np.ndarray) -> None:
    cache = [BatchKVCache([0, 6]) for _ in model.layers]
    rows = np.stack([ids[0, :20], np.concatenate([np.zeros(6, int), ids[1, :14]])])
    logits_of(model, rows, cache)
    for layer in cache:
        layer.offset = mx.full(layer.offset.shape, layer.offset.max())
    step = logits_of(model, np.stack([ids[0, 20:21], ids[1, 14:15]]), cache)
    assert units(step[0, 0], logits_of(model, ids[:1])[0, 20]) <= 1
    assert units(step[1, 0], logits_of(model, ids[1:2])[0, 14]) > 10


class Remembering(KVCache):
    """Keeps all tokens but lets single tokens see only the first `keep` and the last `size - keep` of them."""

    def __init__(self, size: int, keep: int) -> None:
        super().__init__()
        self.window, self.keep = size, keep

    def make_mask(self, N: int, **options: object) -> object:
        if N > 1:
            return super().make_mask(N, return_array=False, window_size=None)
        place = mx.arange(self.offset + 1)
        return (place < self.keep) | (place > self.offset - (self.window - self.keep))


def test_max_kv_size_is_honoured(model: nn.Module, ids: np.ndarray) -> None:
    cache = make_prompt_cache(model, max_kv_size=16)
    assert all(type(layer) is RotatingKVCache and layer.max_size == 16 for layer in cache)
    caches = {keep: [Remembering(16, keep) for _ in model.layers] for keep in (4, 0)}
    logits = [logits_of(model, ids[:1, :12], cache)]
    logits += [logits_of(model, ids[:1, step : step + 1], cache) for step in range(12, LENGTH)]
    expected = {}
    for keep, remembering in caches.items():
        parts = [logits_of(model, ids[:1, :12], remembering)]
        parts += [logits_of(model, ids[:1, step : step + 1], remembering) for step in range(12, LENGTH)]
        expected[keep] = np.concatenate(parts, axis=1)
    whole = np.concatenate(logits, axis=1)
    assert units(whole, expected[4]) <= 1
    assert units(whole, expected[0]) > 10
    assert units(whole[:, :16], logits_of(model, ids[:1])[:, :16]) <= 1
    assert units(whole, logits_of(model, ids[:1])) > 10
    assert max(layer.keys.shape[2] for layer in cache) <= 16


def test_rotating_batch_equals_one_row_at_a_time(model: nn.Module, ids: np.ndarray) -> None:
    cache = [BatchRotatingKVCache(16, [0, 5]) for _ in model.layers]
    rows = np.stack([ids[0, :12], np.concatenate([np.zeros(5, int), ids[1, :7]])])
    together = [logits_of(model, rows, cache)[:, -1]]
    for step in range(24):
        together.append(logits_of(model, np.stack([ids[0, [12 + step]], ids[1, [7 + step]]]), cache)[:, -1])
    for row, length in enumerate((12, 7)):
        alone = [RotatingKVCache(16) for _ in model.layers]
        parts = [logits_of(model, ids[row : row + 1, :length], alone)[:, -1]]
        parts += [logits_of(model, ids[row : row + 1, [length + step]], alone)[:, -1] for step in range(24)]
        assert units(np.stack(together)[:, row], np.concatenate(parts)) <= 1


def test_quantized_cache(model: nn.Module, ids: np.ndarray) -> None:
    expected = logits_of(model, ids[:1])
    noise = {}
    for bits in (8, 4):
        cache = make_prompt_cache(model)
        logits_of(model, ids[:1, :10], cache)
        cache = [layer.to_quantized(group_size=32, bits=bits) for layer in cache]
        logits = logits_of(model, ids[:1, 10:25], cache)
        logits = np.concatenate([logits, *(logits_of(model, ids[:1, [step]], cache) for step in range(25, 40))], axis=1)
        noise[bits] = np.sqrt(np.mean((logits - expected[:, 10:]) ** 2)) / expected.std()
    # A step of an 8-bit code is 17 times smaller than one of 4 bits; both errors are those of keys and values alone.
    assert 0 < noise[8] < noise[4] / 8 < 0.1


def test_saved_and_trimmed_prompt_cache(model: nn.Module, ids: np.ndarray, tmp_path: Path) -> None:
    cache = make_prompt_cache(model)
    logits_of(model, ids[:1, :30], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"model": "talkie"})
    loaded, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata == {"model": "talkie"}
    assert trim_prompt_cache(loaded, 10) == 10
    expected = logits_of(model, ids[:1])
    assert units(logits_of(model, ids[:1, 20:], loaded), expected[:, 20:]) <= 1
    np.testing.assert_array_equal(logits_of(model, ids[:1, 30:], cache)[:, 0].argmax(), expected[:, 30].argmax())
    assert trim_prompt_cache(loaded, 1) == 1
    assert units(logits_of(model, ids[:1, 38:], loaded)[:, :1], expected[:, 38:39]) > 10  # one token is not there


def test_input_embeddings_stand_for_ids(model: nn.Module, ids: np.ndarray) -> None:
    embedded = model.model.embed(mx.array(ids[:2]))
    logits = model(mx.array(ids[:2]), input_embeddings=embedded)
    np.testing.assert_array_equal(np.array(logits), logits_of(model, ids[:2]))
    assert units(np.array(model(mx.array(ids[:2]), input_embeddings=embedded[::-1])), logits_of(model, ids[:2])) > 10


def test_gradients_with_checkpointing(model: nn.Module, ids: np.ndarray) -> None:
    """mlx-lm's trainer wraps the blocks; what it recomputes must give the same gradient."""

    def loss(module: nn.Module) -> mx.array:
        logits = module(mx.array(ids[:2, :-1]))
        return nn.losses.cross_entropy(logits, mx.array(ids[:2, 1:]), reduction="mean")

    plain = nn.value_and_grad(model, loss)(model)[1]
    call = modeling_mlx.Block.__call__
    try:
        grad_checkpoint(model.layers[0])
        assert modeling_mlx.Block.__call__ is not call
        again = nn.value_and_grad(model, loss)(model)[1]
    finally:
        modeling_mlx.Block.__call__ = call
    first, second = (grads["model"]["blocks"][0] for grads in (plain, again))
    for name in ("attn_gain", "mlp_gain", "embed_skip"):
        assert first[name]["a_g"].item() != 0
        assert np.isclose(first[name]["a_g"].item(), second[name]["a_g"].item(), rtol=1e-5)
