"""MLX-quantized folders in Flax: packed weights stay packed, and compute what torch computes with them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import isomorph
import tiny_gelu_gpt
from conftest import assert_logits_close
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.mlx_quantized import quantized_modules
from isomorph.errors import InputError


def mxfp4(path: str, role: str, shape: tuple[int, ...]) -> dict:
    return {"mode": "mxfp4"}


RECIPES = {"q4": "q4", "q6": "q6", "q8": "q8", "q4-mixed": "q4-mixed", "mxfp4": mxfp4}


@pytest.fixture(scope="module", params=RECIPES)
def folder(request, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / request.param
    isomorph.quantize("pocket:talkie", target, recipe=RECIPES[request.param])
    return target


@pytest.fixture(scope="module")
def q4(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "folder"
    isomorph.quantize("pocket:talkie", target, recipe="q4")
    return target


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3800, (2, 40))


def test_packed_weights_compute_what_torch_computes(folder, ids):
    model = isomorph.load(folder, framework="flax", dtype="float32")
    reference = isomorph.load(folder, framework="torch", dtype="float32").logits(ids)
    assert_logits_close(model.logits(ids), reference)

    checkpoint = open_checkpoint(folder)
    packed = quantized_modules(checkpoint.tensors, checkpoint.quantization)
    names = {f"{path}.{part}" for path in packed for part in ("weight", "scales", "biases")}
    held = {name: value for name, value in model.parameters.items() if name in names}
    assert sum(value.nbytes for value in held.values()) == sum(
        part.nbytes
        for entry in packed.values()
        for part in (entry.weight, entry.scales, entry.biases)
        if part is not None
    )
    matrices = {name for name, value in model.parameters.items() if value.ndim == 2 and name not in held}
    kept = {"model.embed.embedding"} if folder.name == "q4-mixed" else set()  # bfloat16 in that recipe
    assert matrices == kept

    # One scale off by a 64th, and the same comparison fails.
    name = "model.blocks.2.mlp.mlp_linear.scales"
    scale = model.parameters[name]
    model.parameters[name] = scale + 1 if scale.dtype == jnp.uint8 else scale * (1 + 2**-6)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids), reference)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_by_layer_and_a_tied_head_stay_packed(tied, tmp_path):
    config = tiny_gelu_gpt.tiny_config(n_embd=64, n_kv_head=4, tie_embeddings=tied)
    isomorph.quantize(tiny_gelu_gpt.write_checkpoint(tmp_path / "model", config), tmp_path / "q4", group_size=32)
    model = isomorph.load(tmp_path / "q4", framework="flax")
    ids = np.random.default_rng(0).integers(0, 120, (2, 140))
    reference = isomorph.load(tmp_path / "q4", framework="torch").logits(ids)
    assert_logits_close(model.logits(ids), reference)
    packed = {name.rpartition(".")[0] for name, value in model.parameters.items() if value.dtype == jnp.uint32}
    assert {"wte", "value_embeds.0", "blocks.2.mlp.c_proj"} <= packed
    assert ("lm_head" in packed) != tied
    model.parameters["wte.scales"] *= 1 + 2**-6
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids), reference)


def test_steps_equal_the_full_pass(q4, ids):
    model = isomorph.load(q4, framework="flax", dtype="float32")
    state = model.decode_state(2)
    steps = [state.feed(ids[:, :30]), *(state.feed(ids[:, at : at + 1]) for at in range(30, 40))]
    assert_logits_close(np.concatenate(steps, axis=1), model.logits(ids))


def test_bfloat16_activations(q4, ids):
    wide = isomorph.load(q4, framework="flax", dtype="float32").logits(ids)
    narrow = isomorph.load(q4, framework="flax")
    assert narrow.dtype == "bfloat16"
    error = np.abs(narrow.logits(ids) - wide)
    assert 1e-4 < error.mean() < 0.1


FOUR_DEVICES = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
import isomorph

folder, out = sys.argv[1:]
model = isomorph.load(folder, framework="flax", dtype="float32")
ids = np.load(f"{out}/ids.npy")
model.logits(ids)  # a program for one device, which must not be used again
model.shard(Mesh(np.array(jax.devices()), ("model",)))
column, row = (model.parameters[f"model.blocks.0.mlp.{name}.weight"] for name in ("mlp_gate", "mlp_resid"))
assert column.sharding.shard_shape(column.shape) == (128, 32), column.sharding
assert row.sharding.shard_shape(row.shape) == (256, 16), row.sharding
np.save(f"{out}/sharded.npy", model.logits(ids))
"""


def test_four_devices_equal_one(q4, ids, tmp_path):
    np.save(tmp_path / "ids.npy", ids[:, :16])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FOUR_DEVICES, str(q4), str(tmp_path)]
    subprocess.run(command, env={**os.environ, **flags}, check=True, timeout=300)
    sharded = np.load(tmp_path / "sharded.npy")
    alone = isomorph.load(q4, framework="flax", dtype="float32").logits(ids[:, :16])
    assert_logits_close(sharded, alone)
    with pytest.raises(AssertionError):
        assert_logits_close(sharded[::-1], alone)


@pytest.mark.parametrize("framework", ["flax", "mlx"])
def test_fast_numerics_are_torchs_alone(q4, framework):
    with pytest.raises(InputError, match=f"numerics exact with framework {framework}; found fast"):
        isomorph.load(q4, framework=framework, numerics="fast")


def test_scales_that_are_not_finite_are_refused(q4):
    checkpoint = open_checkpoint(q4)
    entry = quantized_modules(checkpoint.tensors, checkpoint.quantization)["lm_head"]
    scales = entry.scales.read().copy()
    scales[5, 1] = np.nan
    broken = replace(entry, scales=replace(entry.scales, read=lambda: scales))
    with pytest.raises(InputError, match=r"finite scales; found NaN or infinity in lm_head\.scales"):
        broken.read()
