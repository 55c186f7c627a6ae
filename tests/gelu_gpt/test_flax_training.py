"""What training leaves behind: its checkpoints are models in every framework."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import isomorph
from conftest import assert_logits_close
from isomorph.architectures.gelu_gpt.config import GeluGPTConfig
from isomorph.architectures.gelu_gpt.modeling_flax import Model
from isomorph.architectures.talkie.modeling_flax import Model as Talkie
from isomorph.frameworks.flax import FlaxModel
from isomorph.frameworks.nnx_parameters import merge, split
from isomorph.kernels import dense
from isomorph.train.data import Batch
from isomorph.train.loss import summed_loss
from isomorph.train.settings import Settings
from isomorph.train.trainer import native_operations, train

CONFIG = GeluGPTConfig(sequence_len=32, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def batches(step: int) -> Batch:
    ids = np.random.default_rng(step).integers(0, 100, (4, 33)).astype(np.int32)
    return Batch(ids, np.ones((4, 32), bool))


SETTINGS = Settings(
    steps=3, batch_size=4, sequence_length=32, learning_rate=0.01, warmup_steps=1, checkpoint_every=3, log_every=1
)


def losses(out: Path, settings: Settings = SETTINGS, remat: bool = False) -> np.ndarray:
    """Of the run's steps."""
    train(partial(Model, CONFIG, remat=remat), batches, settings, out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def test_accumulation_remat_and_bfloat16_train_alike(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain")
    assert plain.shape == (3,) and plain[2] != plain[0]
    # The same sums in another order: float32 rounding, which a step of AdamW may double.
    np.testing.assert_allclose(losses(tmp_path / "parts", replace(SETTINGS, accumulate=2)), plain, rtol=2**-20)
    np.testing.assert_allclose(losses(tmp_path / "remat", remat=True), plain, rtol=2**-20)
    # Logits stay near 0 in three steps, so the loss moves by no more than a rounding to bfloat16 moves it.
    rounded = losses(tmp_path / "bfloat16", replace(SETTINGS, dtype="bfloat16"))
    np.testing.assert_allclose(rounded, plain, rtol=2**-8)
    with pytest.raises(AssertionError):  # negative control: it did compute in bfloat16
        np.testing.assert_allclose(rounded, plain, rtol=2**-20)


def loss_and_gradients(**operations: Any) -> dict[str, np.ndarray]:
    """Of a model whose window (128) its rows exceed, whose queries share keys and whose weights are amplified."""
    config = GeluGPTConfig(sequence_len=300, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
    graph, parameters = split(Model(config, rngs=nnx.Rngs(0), **operations))
    random = np.random.default_rng(0)
    noise = {name: random.standard_normal(value.shape) / 16 for name, value in parameters.items()}
    parameters = {name: value + noise[name].astype(np.float32) for name, value in parameters.items()}
    ids = random.integers(0, 100, (2, 301)).astype(np.int32)
    counted = np.ones((2, 300), bool)
    run = jax.jit(
        jax.value_and_grad(
            lambda parameters: summed_loss(merge(graph, parameters), jnp.asarray(ids), jnp.asarray(counted))
        )
    )
    loss, gradients = run(parameters)
    return {"loss": np.asarray(loss)} | {name: np.asarray(value) for name, value in gradients.items()}


def furthest(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference of an array, as a share of its largest value."""
    return max(np.abs(found[name] - value).max() / np.abs(value).max() for name, value in expected.items())


@pytest.mark.skipif(not dense.usable(), reason="the C++ extension is not built")
def test_the_extension_gives_the_same_loss_and_gradients() -> None:
    native = native_operations(Model)
    assert native.keys() == {"multiply", "attend"}
    plain = loss_and_gradients()
    # Sums of up to 600 terms, some thousand roundings deep, of which most cancel.
    assert furthest(loss_and_gradients(**native), plain) < 2**-14
    off_by_one = {**native, "attend": lambda q, k, v, window: dense.attend(q, k, v, window - 1)}
    assert furthest(loss_and_gradients(**off_by_one), plain) > 2**-10


def test_only_what_a_model_takes_is_given() -> None:
    assert native_operations(Talkie) == {}


def test_checkpoints_of_a_run_load_in_every_framework(tmp_path: Path) -> None:
    parameters = train(partial(Model, CONFIG), batches, replace(SETTINGS, checkpoint_every=2), tmp_path)
    run, ids = tmp_path / "checkpoints", np.arange(30)[None]
    flax = isomorph.load(run, framework="flax")
    assert isinstance(flax, FlaxModel)
    assert flax.config == CONFIG
    for name, value in flax.parameters.items():
        np.testing.assert_array_equal(value, parameters[name])
    for framework in ("torch", "mlx"):
        assert_logits_close(isomorph.load(run, framework=framework).logits(ids), flax.logits(ids))
    earlier = isomorph.load(run / "2", framework="flax").logits(ids)
    assert np.abs(earlier - flax.logits(ids)).max() > 1e-3  # a control: an earlier step is another model
