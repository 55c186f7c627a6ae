"""GELU-GPT in stock mlx-lm's hands: whatever it does to a cache, the logits are those of the full forward.

Sequences are longer than both windows (128 and 256), so every cache here has wrapped; each section ends with a control.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    BatchRotatingKVCache,
    CacheList,
    LRUPromptCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tuner.trainer import grad_checkpoint

from isomorph.architectures.gelu_gpt import modeling_mlx
from isomorph.verify.tolerance import allowed_logit_difference
from tiny_gelu_gpt import tiny_config, tiny_tensors

LENGTH, WINDOW = 300, 128


def build(**overrides: Any) -> modeling_mlx.Model:
    config = tiny_config(**overrides)
    model = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(config))
    weights = {name: mx.array(value) for name, value in tiny_tensors(config, seed=4).items()}
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    return model


@pytest.fixture(scope="module")
def model() -> modeling_mlx.Model:
    return build()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 120, (4, LENGTH))


@pytest.fixture(scope="module")
def expected(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits of the full forward, without any cache, [4, LENGTH, V]."""
    return logits_of(model, ids)


def logits_of(model: nn.Module, ids: np.ndarray, cache: list | None = None) -> np.ndarray:
    return np.array(model(mx.array(ids), cache=cache))


def units(actual: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference in units of what the numeric rule allows; a comparison of nothing is an error."""
    assert actual.shape == reference.shape and actual.size and np.isfinite(actual).all()
    return float(np.abs(actual - reference).max()) / allowed_logit_difference(reference)


def batch_cache(model: nn.Module, rows: int) -> list[Any]:
    """As mlx-lm makes the cache of a batch: merged from those of its rows."""
    return [layer[0].merge(list(layer)) for layer in zip(*(make_prompt_cache(model) for _ in range(rows)))]


def prefilled(model: nn.Module, tokens: np.ndarray) -> list[Any]:
    cache = make_prompt_cache(model)
    logits_of(model, tokens[None], cache)
    return cache


@pytest.mark.parametrize(
    "sizes",
    [[300], [128, 1, 1, 170], [129, 130, 41], [1, 127, 2, 126, 44], [200, 1, 30, 1, 1, 67], [1] * 300],
    ids=["prefill", "at the window", "past the window", "from one token", "re-feeds", "single tokens"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_feeding_equals_the_full_forward(
    model: nn.Module, ids: np.ndarray, expected: np.ndarray, sizes: list[int], batch: int
) -> None:
    cache, logits = make_prompt_cache(model), []
    for end, size in zip(np.cumsum(sizes), sizes):
        logits.append(logits_of(model, ids[:batch, end - size : end], cache))
    assert units(np.concatenate(logits, axis=1), expected[:batch]) <= 1


def forget(cache: list[Any]) -> None:
    """Lose what smear remembers."""
    embedded = cache[0][1]
    embedded.keys, embedded.values = mx.zeros_like(embedded.keys), mx.zeros_like(embedded.values)


def test_a_forgotten_embedding_shows_at_the_next_token(model: nn.Module, ids: np.ndarray, expected: np.ndarray) -> None:
    cache = prefilled(model, ids[0, :200])
    forget(cache)
    assert units(logits_of(model, ids[:1, 200:201], cache), expected[:1, 200:201]) > 100


def test_each_layer_keeps_its_window_and_no_more(model: nn.Module, ids: np.ndarray) -> None:
    cache, held = prefilled(model, ids[0, :250]), []
    for step in range(250, 350):
        mx.eval(model(mx.array(ids[:1, step % LENGTH][:, None]), cache=cache))
        if step in (258, 349):
            held.append(sum(layer.nbytes for layer in cache))
    keys = [cache[0][0].keys, *(layer.keys for layer in cache[1:])]
    assert [layer.shape[2] for layer in keys] == [WINDOW + 1, WINDOW + 1, 257]
    assert held[0] == held[1] and cache[0][1].keys.shape == (1, 1, WINDOW + 1, 24)
    assert len(cache) == len(model.layers)  # speculative decoding tells two models' caches apart by that


# Batches: rows start, leave and join at their own places.


def left_padded(ids: np.ndarray, padding: Sequence[int], length: int) -> np.ndarray:
    return np.stack([np.concatenate([np.full(count, 7), row[: length - count]]) for row, count in zip(ids, padding)])


@pytest.mark.parametrize("sizes", [[180, 1, 1, 1, 100], [3, 1, 140, 1, 138], [60] * 4 + [43]])
def test_left_padding(model: nn.Module, ids: np.ndarray, expected: np.ndarray, sizes: list[int]) -> None:
    padding = [0, 5, 77]
    rows, cache, logits = left_padded(ids, padding, 283), batch_cache(model, 3), []
    for layer in cache:
        layer.prepare(left_padding=padding)
    for end, size in zip(np.cumsum(sizes), sizes):
        logits.append(logits_of(model, rows[:, end - size : end], cache))
    whole = np.concatenate(logits, axis=1)
    for row, count in enumerate(padding):
        assert units(whole[row, count:], expected[row, : 283 - count]) <= 1
    unaware = logits_of(model, rows, batch_cache(model, 3))
    assert units(unaware[2, 77:], expected[2, : 283 - 77]) > 100


class Batch:
    """The life of mlx-lm's server batch: `rows` are indices of `ids`, `places` how many tokens each one holds."""

    def __init__(self, model: nn.Module, ids: np.ndarray, expected: np.ndarray) -> None:
        self.model, self.ids, self.expected = model, ids, expected
        self.rows: list[int] = []
        self.places: list[int] = []
        self.cache: list[Any] = []

    def prompt(self, rows: list[int], lengths: list[int], step: int) -> None:
        """A ragged prefill, padded on the right and in chunks."""
        self.rows, self.places, self.cache = rows, lengths, batch_cache(self.model, len(rows))
        longest = max(lengths)
        padded = np.where(np.arange(longest) < np.array(lengths)[:, None], self.ids[rows, :longest], 0)
        for layer in self.cache:
            layer.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
        for start in range(0, longest, step):
            logits_of(self.model, padded[:, start : start + step], self.cache)
        for layer in self.cache:
            layer.finalize()
        assert self.cache[0][0].offset.tolist() == lengths

    def decode(self, steps: int) -> float:
        """Feed each row its next tokens; the worst step's difference in units."""
        worst = 0.0
        for _ in range(steps):
            fed = self.ids[self.rows, self.places][:, None]
            worst = max(
                worst, units(logits_of(self.model, fed, self.cache)[:, 0], self.expected[self.rows, self.places])
            )
            self.places = [place + 1 for place in self.places]
        return worst

    def keep(self, kept: list[int]) -> None:
        for layer in self.cache:
            layer.filter(kept)
        self.rows, self.places = [self.rows[at] for at in kept], [self.places[at] for at in kept]

    def join(self, row: int, length: int) -> None:
        for layer, joining in zip(self.cache, prefilled(self.model, self.ids[row, :length])):
            layer.extend(joining.merge([joining]))
        self.rows, self.places = [*self.rows, row], [*self.places, length]


@pytest.mark.parametrize("lengths", [[170, 5, 131], [2, 1, 3], [290, 128, 129]])
@pytest.mark.parametrize("step", [512, 50])
def test_rows_of_a_batch_go_their_own_ways(
    model: nn.Module, ids: np.ndarray, expected: np.ndarray, lengths: list[int], step: int
) -> None:
    batch = Batch(model, ids, expected)
    batch.prompt([0, 1, 2], lengths, step)
    assert batch.decode(5) <= 1
    batch.keep([2, 1])
    assert batch.decode(2) <= 1
    batch.join(3, 250)
    assert batch.decode(6) <= 1
    batch.join(0, 1)
    assert batch.decode(6) <= 1
    alone = [layer.extract(1) for layer in batch.cache]
    row, place = batch.rows[1], batch.places[1]
    fed = logits_of(model, ids[[row], place : place + 9], alone)
    assert units(fed[0], expected[row, place : place + 9]) <= 1
    # Rows that come out of a batch and are merged into another, as the server's prompt cache does.
    again = [
        layer[0].merge(list(layer)) for layer in zip(*([held.extract(at) for held in batch.cache] for at in (2, 0)))
    ]
    batch.cache, batch.rows, batch.places = again, [batch.rows[2], batch.rows[0]], [batch.places[2], batch.places[0]]
    assert batch.decode(6) <= 1


def swap(cache: list[Any]) -> None:
    """Give each row its neighbour's embedding."""
    embedded = cache[0][1]
    embedded.keys, embedded.values = embedded.keys[::-1], embedded.values[::-1]


def shift(cache: list[Any]) -> None:
    """Point at the embedding before the last."""
    cache[0][1]._idx -= 1


@pytest.mark.parametrize("fault", [forget, swap, shift])
def test_a_fault_in_what_smear_remembers_of_a_batch_shows(
    model: nn.Module, ids: np.ndarray, expected: np.ndarray, fault: Callable[[list[Any]], None]
) -> None:
    batch = Batch(model, ids, expected)
    batch.prompt([0, 1, 2], [170, 140, 131], 512)
    batch.keep([2, 1])
    fault(batch.cache)
    assert batch.decode(1) > 100


@pytest.mark.parametrize("tables", ["float32", "bfloat16"])
def test_either_rotation_turns_each_row_from_its_own_place(tables: str) -> None:
    trunk = build(rope_table_dtype=tables).model
    x, places = mx.random.normal((3, 4, 5, 12), key=mx.random.key(0)), [0, 7, 200]
    turned = np.array(trunk.rope(5, mx.array(places))(x))
    alone = np.concatenate([np.array(trunk.rope(5, place)(x[row : row + 1])) for row, place in enumerate(places)])
    assert np.abs(turned - alone).max() < 1e-6
    assert np.abs(turned - np.array(trunk.rope(5, 7)(x))).max() > 0.1


def test_rows_that_share_an_offset_would_be_seen(model: nn.Module, ids: np.ndarray, expected: np.ndarray) -> None:
    batch = Batch(model, ids, expected)
    batch.prompt([0, 1], [170, 40], 512)
    batch.cache[0][0].offset = mx.full((2,), 170)
    assert batch.decode(1) > 10


def greedy(model: nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """Without any cache."""
    sequence = list(prompt)
    for _ in range(tokens):
        sequence.append(int(logits_of(model, np.array([sequence]))[0, -1].argmax()))
    return sequence[len(prompt) :]


def test_batch_generator_gives_each_prompt_its_own_continuation(model: nn.Module, ids: np.ndarray) -> None:
    """mlx-lm's continuous batching, which batch_generate and the server run: three at a time, prefill in chunks."""
    prompts = [ids[row, :length].tolist() for row, length in ((0, 200), (1, 3), (2, 131), (3, 1), (0, 90), (1, 150))]
    generator = BatchGenerator(model, max_tokens=6, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=64)
    answers: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    generator.close()
    assert list(answers.values()) == [greedy(model, prompt, 6) for prompt in prompts]


# Going back, and coming back.


@pytest.mark.parametrize("kept", [0, 1, 57, 99])
def test_trimmed_caches_go_on_from_the_new_end(
    model: nn.Module, ids: np.ndarray, expected: np.ndarray, kept: int
) -> None:
    cache = prefilled(model, ids[0, :100])
    assert trim_prompt_cache(cache, 100 - kept) == 100 - kept
    # Another continuation first: what the trimmed slots held must not come back.
    logits_of(model, ids[1:2, :3], cache)
    logits_of(model, ids[1:2, 3:4], cache)
    assert trim_prompt_cache(cache, 4) == 4
    steps = [logits_of(model, ids[:1, step : step + 1], cache) for step in (kept, kept + 1)]
    rest = logits_of(model, ids[:1, kept + 2 :], cache)
    assert units(np.concatenate([*steps, rest], axis=1), expected[:1, kept:]) <= 1


def test_a_trimmed_batch(model: nn.Module, ids: np.ndarray, expected: np.ndarray) -> None:
    batch = Batch(model, ids, expected)
    batch.prompt([0, 1, 2], [100, 20, 61], 512)
    batch.decode(4)
    assert trim_prompt_cache(batch.cache, 9) == 9
    batch.places = [place - 9 for place in batch.places]
    assert batch.decode(60) <= 1


def test_an_embedding_that_stays_behind_the_trim_shows(model: nn.Module, ids: np.ndarray, expected: np.ndarray) -> None:
    cache = prefilled(model, ids[0, :100])
    trim_prompt_cache([CacheList(cache[0][0]), *cache[1:]], 20)
    assert units(logits_of(model, ids[:1, 80:], cache)[:, :1], expected[:1, 80:81]) > 100


def test_a_wrapped_window_is_not_trimmed(model: nn.Module, ids: np.ndarray) -> None:
    cache = prefilled(model, ids[0, : WINDOW + 1])
    assert not can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1) == 0
    assert can_trim_prompt_cache(prefilled(model, ids[0, :WINDOW]))


@pytest.mark.parametrize("length", [60, 200])
def test_saved_caches_load_bit_for_bit(model: nn.Module, ids: np.ndarray, length: int, tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    cache, new = prefilled(model, ids[0, :length]), ids[:1, length : length + 3]
    save_prompt_cache(path, cache, {"model": "gelu"})
    loaded, metadata = load_prompt_cache(path, return_metadata=True)
    assert metadata == {"model": "gelu"} and isinstance(loaded[0], CacheList)
    expected = logits_of(model, new, cache)
    np.testing.assert_array_equal(logits_of(model, new, loaded), expected)
    loaded = load_prompt_cache(path)
    forget(loaded)
    assert units(logits_of(model, new, loaded), expected) > 100


def test_the_servers_prompt_cache(model: nn.Module, ids: np.ndarray, expected: np.ndarray) -> None:
    """A conversation goes on, another shares its beginning, one is asked again; what is stored stays as it is."""
    store = LRUPromptCache(max_size=4)
    first = ids[0, :110].tolist()
    store.insert_cache("model", first, prefilled(model, ids[0, :110]))
    other = [*first[:70], *ids[1, 70:90].tolist()]
    for prompt, reused in ((ids[0, :150].tolist(), 110), (other, 70), (first[:40], 39), (first, 110)):
        cache, rest = store.fetch_nearest_cache("model", prompt)
        assert len(prompt) - len(rest) == reused
        fed = [*rest, 5]
        whole = logits_of(model, np.array([[*prompt, 5]]))
        assert units(logits_of(model, np.array([fed]), cache), whole[:, -len(fed) :]) <= 1
    # Past the window only whole prefixes are reused, never a trimmed one.
    store.insert_cache("model", ids[2, :200].tolist(), prefilled(model, ids[2, :200]))
    cache, rest = store.fetch_nearest_cache("model", ids[2, :220].tolist())
    assert len(rest) == 20
    assert units(logits_of(model, np.array([rest]), copy.deepcopy(cache)), expected_tail(model, ids[2, :220], 20)) <= 1
    assert store.fetch_nearest_cache("model", ids[2, :150].tolist())[0] is None


def expected_tail(model: nn.Module, sequence: np.ndarray, count: int) -> np.ndarray:
    return logits_of(model, sequence[None])[:, -count:]


def test_chunked_prefill_and_decode_of_mlx_lm(model: nn.Module, ids: np.ndarray) -> None:
    prompt = ids[0, :200]
    steps = generate_step(mx.array(prompt), model, max_tokens=12, prefill_step_size=37)
    assert [int(token) for token, _ in steps] == greedy(model, prompt.tolist(), 12)


def test_speculative_decoding_goes_back_to_the_last_accepted_token(model: nn.Module, ids: np.ndarray) -> None:
    """Within the window; a draft of other weights is mostly refused, and each refusal trims both models' caches."""
    draft = build(sequence_len=512, n_layer=1)
    prompt = ids[0, :40]
    steps = speculative_generate_step(mx.array(prompt), model, draft, num_draft_tokens=3, max_tokens=24)
    tokens, from_draft = zip(*((int(token), drafted) for token, _, drafted in steps))
    assert list(tokens) == greedy(model, prompt.tolist(), 24)
    assert not all(from_draft)


def test_gradients_with_checkpointing(ids: np.ndarray) -> None:
    """mlx-lm's trainer wraps the blocks; what it recomputes must give the same gradient, lambdas and gates included."""
    model = build()

    def loss(module: nn.Module) -> mx.array:
        logits = module(mx.array(ids[:2, :40]))
        return nn.losses.cross_entropy(logits, mx.array(ids[:2, 1:41]), reduction="mean")

    plain = nn.value_and_grad(model, loss)(model)[1]
    call = modeling_mlx.Block.__call__
    try:
        grad_checkpoint(model.layers[0])
        assert modeling_mlx.Block.__call__ is not call
        again = nn.value_and_grad(model, loss)(model)[1]
    finally:
        modeling_mlx.Block.__call__ = call
    for name in ("smear_lambda", "backout_lambda", "resid_lambdas", "x0_lambdas"):
        first, second = (np.array(grads["model"][name]) for grads in (plain, again))
        assert (first != 0).all() and np.allclose(first, second, rtol=1e-4)
    gates = [np.array(grads["model"]["blocks"][2]["attn"]["ve_gate"]["weight"]) for grads in (plain, again)]
    assert (gates[0] != 0).all() and np.allclose(*gates, rtol=1e-3, atol=1e-6)


def test_caches_are_classes_that_mlx_lm_knows_by_name(model: nn.Module) -> None:
    assert [type(layer) for layer in make_prompt_cache(model)] == [CacheList, RotatingKVCache, RotatingKVCache]
    assert [type(layer) for layer in batch_cache(model, 2)[0].caches] == [BatchRotatingKVCache] * 2
