"""Microscaling modes in MLX compute in the dtype asked for, as the same weights dequantized do in torch."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from isomorph.frameworks.mlx import quantize_modules
from tiny import tiny_config, write_checkpoint

IDS = np.arange(40)[None] * 7 % 90


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_computes_in_float32(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_config(hidden_size=64, intermediate_size=96))
    isomorph.quantize(source, tmp_path / "packed", mode=mode, bits=None, group_size=None)
    reference = isomorph.load(tmp_path / "packed", dtype="float32").logits(IDS)
    assert_logits_close(isomorph.load(tmp_path / "packed", framework="mlx", dtype="float32").logits(IDS), reference)
    # Control: with MLX's own embedding the whole model computes in bfloat16.
    monkeypatch.setattr("isomorph.frameworks.mlx.widen_embeddings", lambda module, dtype: None)
    with pytest.raises(AssertionError):
        assert_logits_close(isomorph.load(tmp_path / "packed", framework="mlx", dtype="float32").logits(IDS), reference)


def test_an_entry_without_mode_is_affine() -> None:
    packed, scales, biases = mx.quantize(mx.random.normal((8, 64)), group_size=64, bits=8)
    weights = {"0.weight": packed, "0.scales": scales, "0.biases": biases}
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    named = {f"layers.{name}": value for name, value in weights.items()}
    quantize_modules(model, named, {"mode": "mxfp4", "layers.0": {"bits": 8, "group_size": 64}})
    assert model.layers[0].mode == "affine"
