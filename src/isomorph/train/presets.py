"""What to train, ready made: shapes and settings under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isomorph.train.settings import Settings


@dataclass(frozen=True)
class Preset:
    """An architecture, its config, and how to train it on text and then on conversations."""

    architecture: str
    config: Mapping[str, Any]
    text: Settings
    chat: Settings


PRESETS = {
    # 4.6 million parameters, 9.2 MB in bfloat16; every matrix divides into groups of 128 for quantization.
    "pocket": Preset(
        architecture="talkie",
        config={
            "vocab_size": 3840,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 512,
        },
        text=Settings(
            steps=3200,
            batch_size=4,
            sequence_length=512,
            learning_rate=2e-3,
            warmup_steps=150,
            evaluate_every=200,
            checkpoint_every=200,
            seed=1930,
        ),
        chat=Settings(
            steps=500,
            batch_size=4,
            sequence_length=512,
            learning_rate=1e-3,
            warmup_steps=30,
            evaluate_every=200,
            checkpoint_every=200,
            seed=1931,
        ),
    ),
}
