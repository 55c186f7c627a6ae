"""What training leaves behind: its checkpoints are models in every framework."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

import isomorph
from conftest import assert_logits_close
from isomorph.architectures.gelu_gpt.config import GeluGPTConfig
from isomorph.architectures.gelu_gpt.modeling_flax import Model
from isomorph.frameworks.flax import FlaxModel
from isomorph.train.data import Batch
from isomorph.train.settings import Settings
from isomorph.train.trainer import train

CONFIG = GeluGPTConfig(sequence_len=32, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def batches(step: int) -> Batch:
    ids = np.random.default_rng(step).integers(0, 100, (4, 33)).astype(np.int32)
    return Batch(ids, np.ones((4, 32), bool))


def test_checkpoints_of_a_run_load_in_every_framework(tmp_path: Path) -> None:
    settings = Settings(
        steps=3, batch_size=4, sequence_length=32, learning_rate=0.01, warmup_steps=1, checkpoint_every=2, log_every=2
    )
    parameters = train(partial(Model, CONFIG), batches, settings, tmp_path)
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
