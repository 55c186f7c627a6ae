"""gpt-oss' Flax model: packed experts stay packed, and experts spread over a mesh compute what one device does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from isomorph.checkpoint import open_checkpoint
from tiny_gpt_oss import tiny_config, write_checkpoint

CONFIG = tiny_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("packed"), CONFIG, seed=3)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 24))


@pytest.mark.parametrize("form", ["published", "affine"])
def test_packed_experts_stay_packed(folder: Path, ids: np.ndarray, tmp_path: Path, form: str) -> None:
    if form == "affine":
        isomorph.convert(folder, tmp_path / "floats", to="mlx", dequantize=True, dtype="float32")
        folder = isomorph.quantize(tmp_path / "floats", tmp_path / "q6", bits=6, group_size=32).path
    model = isomorph.load(folder, framework="flax", dtype="float32")
    reference = isomorph.load(folder, framework="torch", dtype="float32").logits(ids)
    assert_logits_close(model.logits(ids), reference)

    tensors = open_checkpoint(folder).tensors
    stored = sum(
        tensor.nbytes for name, tensor in tensors.items() if "experts" in name and tensor.dtype in ("uint32", "uint8")
    )
    held = [value for name, value in model.parameters.items() if "experts" in name and not name.endswith("bias")]
    assert not any(jnp.issubdtype(value.dtype, jnp.floating) and value.ndim > 3 for value in held)
    assert sum(value.nbytes for value in held if value.dtype in (jnp.uint32, jnp.uint8)) == stored

    # One scale of one expert off, and the same comparison fails.
    scales = model.parameters[f"{EXPERTS}.down_proj.scales"]
    changed = scales[0] + 1 if scales.dtype == jnp.uint8 else scales[0] * (1 + 2**-6)
    model.parameters[f"{EXPERTS}.down_proj.scales"] = scales.at[0].set(changed)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids), reference)


EIGHT_DEVICES = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
import isomorph

packed, floats, out = sys.argv[1:]
ids = np.load(f"{out}/ids.npy")
found = {}
for name, folder in {"packed": packed, "floats": floats}.items():
    model = isomorph.load(folder, framework="flax", dtype="float32")
    model.shard(Mesh(np.array(jax.devices()).reshape(4, 2), ("expert", "model")))
    part = "weight" if name == "packed" else "kernel"
    placed = model.parameters[f"model.layers.0.mlp.experts.gate_proj.{part}"]
    assert placed.sharding.shard_shape(placed.shape)[0] == 2, placed.sharding
    found[name] = model.logits(ids)
np.savez(f"{out}/sharded.npz", **found)
"""


def test_eight_devices_equal_one(ids: np.ndarray, tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}  # compiled for eight devices
    packed = write_checkpoint(tmp_path / "packed", config, seed=3)
    floats = write_checkpoint(tmp_path / "floats", config, seed=3, packed=False)
    np.save(tmp_path / "ids.npy", ids)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EIGHT_DEVICES, str(packed), str(floats), str(tmp_path)]
    subprocess.run(command, env={**os.environ, **flags}, check=True, timeout=300)
    sharded = np.load(tmp_path / "sharded.npz")
    alone = isomorph.load(packed, framework="flax", dtype="float32").logits(ids)
    for name in ("packed", "floats"):
        assert_logits_close(sharded[name], alone)
    with pytest.raises(AssertionError):
        assert_logits_close(sharded["packed"][::-1], alone)
