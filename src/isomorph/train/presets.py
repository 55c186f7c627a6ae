"""What to train, ready made: shapes and settings under a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from isomorph import architectures
from isomorph.errors import InputError
from isomorph.train.settings import Settings


@dataclass(frozen=True)
class Preset:
    """An architecture, its config, and how to train it on text and then on conversations."""

    architecture: str
    config: Mapping[str, Any]
    text: Settings
    chat: Settings | None = None


#: Chinchilla's ratio of training tokens to parameters, https://arxiv.org/abs/2203.15556.
TOKENS_PER_PARAMETER = 20

#: Channels of a head, and of the width for each layer: depth 12 is 768 wide (nanochat).
HEAD_DIM = WIDTH_PER_LAYER = 64

#: Peak learning rate of the published GELU-GPT (mlnomad/gelu-d12-chinchilla-261M).
PEAK = 0.01

#: Windows a step, and tokens a window.
RECIPE_BATCH, RECIPE_SEQUENCE = 256, 1024

#: Share of the steps that lead to the peak.
WARMUP_SHARE = 0.02


def recipe(architecture_name: str, depth: int, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Preset:
    """The published recipe at `depth` layers: shapes, then as many steps as 20 tokens a parameter take.

    `config` and `settings` override parts of it, and the number of steps follows them. Raises InputError.
    """
    if architecture_name != "gelu_gpt":
        raise InputError(f"expected no depth for {architecture_name}: the recipe is gelu_gpt's; give its shapes")
    if depth < 1:
        raise InputError(f"expected a depth of at least 1; found {depth}")
    architecture = architectures.get(architecture_name)
    assert architecture is not None
    defaults = Settings(steps=1, batch_size=RECIPE_BATCH, sequence_length=RECIPE_SEQUENCE, learning_rate=PEAK)
    text = replace(defaults, **settings)
    width = WIDTH_PER_LAYER * depth
    heads = width // HEAD_DIM
    shapes = {
        "n_layer": depth,
        "n_embd": width,
        "n_head": heads,
        "n_kv_head": heads,
        "vocab_size": 32768,
        "sequence_len": text.sequence_length,
        **config,
    }
    try:
        parsed = architecture.config_class.from_dict(shapes)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    parameters = sum(math.prod(shape) for shape in architecture.parameters(parsed).values())
    if "steps" not in settings:
        tokens_per_step = text.batch_size * text.sequence_length
        text = replace(text, steps=math.ceil(TOKENS_PER_PARAMETER * parameters / tokens_per_step))
    if "warmup_steps" not in settings:
        text = replace(text, warmup_steps=max(1, round(WARMUP_SHARE * text.steps)))
    return Preset(architecture_name, shapes, text)


PRESETS = {
    # 2.1 million parameters, 0.7 million of them at work on a token, in windows that are a fraction of the context.
    "pocket-gpt-oss": Preset(
        architecture="gpt_oss",
        config={
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "max_position_embeddings": 512,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 128,
                "truncate": False,
            },
        },
        text=Settings(
            steps=1800,
            batch_size=8,
            sequence_length=512,
            learning_rate=4e-3,
            warmup_steps=100,
            mxfp4="*.experts.*.kernel",
            evaluate_every=200,
            checkpoint_every=50,
            seed=2025,
        ),
    ),
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
