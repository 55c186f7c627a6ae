"""Talkie's Flax model beyond its numbers: masks, positions, shapes compiled, placement on several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import isomorph
from conftest import assert_logits_close
from isomorph.architectures.talkie.config import TalkieConfig
from isomorph.architectures.talkie.modeling_flax import Model, rope_tables
from isomorph.errors import InputError
from isomorph.frameworks.flax import FlaxModel, bucket
from isomorph.frameworks.nnx_parameters import merge, split
from tiny import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", tiny_config(max_position_embeddings=64), seed=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> FlaxModel:
    loaded = isomorph.load(folder, framework="flax")
    assert isinstance(loaded, FlaxModel)
    return loaded


@pytest.fixture(scope="module")
def ids(model: FlaxModel) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocab_size, (2, 20))


def test_plain_call_equals_the_masked_pass(model: FlaxModel, ids: np.ndarray) -> None:
    """What training calls, `model(ids)`, and what the framework calls, with mask and positions, are one function."""
    plain = np.asarray(merge(model.graph, model.parameters)(jnp.asarray(ids)))
    assert_logits_close(model.logits(ids), plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_either_side_changes_nothing(model: FlaxModel, ids: np.ndarray, side: str) -> None:
    alone = model.logits(ids[1:, :12])
    mask = np.ones(ids.shape, int)
    row = np.zeros(20, int)
    where = slice(8, 20) if side == "left" else slice(0, 12)
    row[where] = ids[1, :12]
    mask[1] = 0
    mask[1, where] = 1
    batch = np.stack([ids[0], row])
    assert_logits_close(model.logits(batch, mask)[1:, where], alone)
    if side == "left":
        with pytest.raises(AssertionError):
            assert_logits_close(model.logits(batch)[1:, where], alone)


def test_positions_past_the_table_are_nan(model: FlaxModel) -> None:
    """The wrapper refuses them; whoever calls the module itself gets no plausible number."""
    module = merge(model.graph, model.parameters)
    states, _ = module.model(jnp.zeros((1, 2), int), lengths=jnp.array([63]))
    assert np.isnan(states[-1][0, 1]).all()


def test_decoding_past_the_last_position_is_refused(model: FlaxModel) -> None:
    state = model.decode_state(1)
    state.feed(np.zeros((1, 63), int))
    state.feed(np.zeros((1, 1), int))
    with pytest.raises(InputError, match="at most 64 tokens"):
        state.feed(np.zeros((1, 1), int))


def test_few_programs_are_compiled(folder: Path) -> None:
    model = isomorph.load(folder, framework="flax")
    for length in range(1, 60):
        model.logits(np.zeros((1, length), int))
    assert model.forward._cache_size() == len({bucket(length) for length in range(1, 60)}) == 4


def test_rope_table_rounding() -> None:
    cos, sin = rope_tables(64, 16, 1e6, "float32")
    rounded, _ = rope_tables(64, 16, 1e6, "bfloat16")
    angle = 63 / 1e6 ** (2 / 16)
    assert cos[63, 1] == pytest.approx(np.cos(angle), abs=1e-6)
    assert sin[63, 1] == pytest.approx(np.sin(angle), abs=1e-6)
    assert 0 < np.abs(rounded.astype(np.float32) - cos).max() <= 2**-9


def test_fresh_parameters_are_those_of_the_config() -> None:
    config = TalkieConfig.from_dict(tiny_config())
    _, parameters = split(Model(config, rngs=nnx.Rngs(0)))
    assert len(parameters) == 11 * config.num_hidden_layers + 3
    assert parameters["model.blocks.0.attn.attn_query.kernel"].shape == (48, 64)
    assert float(parameters["model.blocks.0.embed_skip.a_g"][0]) == 0.0


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "other", tiny_config(model_type="llama"))
    with pytest.raises(InputError, match="talkie"):
        isomorph.load(folder, framework="flax")


def test_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="cpu"):
        isomorph.load(folder, framework="flax", device="cpu:99")


def test_decode_state_of_another_model_is_refused(model: FlaxModel, tmp_path: Path) -> None:
    other_folder = write_checkpoint(tmp_path / "other", tiny_config(rope_theta=999.0, max_position_embeddings=64))
    state = isomorph.load(other_folder, framework="flax").decode_state(1)
    state.feed(np.zeros((1, 4), int))
    state.save(tmp_path / "state")
    with pytest.raises(InputError, match="of this model"):
        model.load_decode_state(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(InputError, match="decode state"):
        model.load_decode_state(tmp_path / "state")


EIGHT_DEVICES = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
import isomorph

folder, out = sys.argv[1:]
model = isomorph.load(folder, framework="flax")
ids = np.load(f"{out}/ids.npy")
assert len(jax.devices()) == 8
model.shard(Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model")))
placed = model.parameters["model.blocks.0.attn.attn_query.kernel"]
assert placed.sharding.shard_shape(placed.shape) == (48, 16), placed.sharding
state = model.decode_state(2)
steps = [state.feed(ids[:, :9]), *(state.feed(ids[:, at : at + 1]) for at in range(9, ids.shape[1]))]
np.savez(f"{out}/sharded.npz", full=model.logits(ids), steps=np.concatenate(steps, axis=1))
"""


def test_eight_devices_equal_one(model: FlaxModel, folder: Path, ids: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EIGHT_DEVICES, str(folder), str(tmp_path)]
    subprocess.run(command, env={**os.environ, **flags}, check=True, timeout=300)
    sharded = np.load(tmp_path / "sharded.npz")
    alone = model.logits(ids)
    assert_logits_close(sharded["full"], alone)
    assert_logits_close(sharded["steps"], alone)
    with pytest.raises(AssertionError):
        assert_logits_close(sharded["full"][::-1], alone)


def test_a_mesh_that_does_not_divide_is_refused(model: FlaxModel) -> None:
    seven: Any = SimpleNamespace(shape={"model": 7})
    with pytest.raises(InputError, match="7 devices"):
        model.shard(seven)
