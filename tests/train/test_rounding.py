"""Training through MXFP4: what the model sees is what the format stores, and gradients pass as if it were not there."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isomorph.checkpoint import open_checkpoint
from isomorph.quantize.arrays import dequantize_array, quantize_array
from isomorph.quantize.grid import MXFP4
from isomorph.quantize.packed import Packed
from isomorph.tokenizer import load_tokenizer
from isomorph.train import train
from isomorph.train.rounding import rounded, straight_through
from tiny_gpt_oss import tiny_config

RANDOM = np.random.default_rng(5)
KERNEL = RANDOM.normal(0, 0.1, (3, 96, 40)).astype(np.float32)
KERNEL[0, :32, 0] = 0
KERNEL[1, :32, 1] *= 1e-30


def test_rounds_as_the_quantizer_does() -> None:
    """Groups run along the inputs, which the format has last."""
    weights = np.ascontiguousarray(KERNEL.swapaxes(1, 2))
    stored = dequantize_array(quantize_array(weights, MXFP4), MXFP4, np.dtype(np.float32))
    seen = np.asarray(rounded(jnp.asarray(KERNEL)))
    assert np.array_equal(seen, stored.swapaxes(1, 2))
    assert not np.array_equal(seen, np.asarray(rounded(jnp.asarray(KERNEL.reshape(3, 40, 96).swapaxes(1, 2)))))


def test_only_what_is_named_is_rounded_and_gradients_pass() -> None:
    parameters = {"a.experts.kernel": jnp.asarray(KERNEL), "a.kernel": jnp.asarray(KERNEL)}
    seen = straight_through("*.experts.*")(parameters)
    assert np.array_equal(seen["a.experts.kernel"], rounded(parameters["a.experts.kernel"]))
    assert seen["a.kernel"] is parameters["a.kernel"]
    assert straight_through(None)(parameters) == parameters
    gradients = jax.grad(lambda given: (straight_through("*")(given)["a.kernel"] ** 2).sum())(parameters)
    assert np.array_equal(gradients["a.kernel"], 2 * seen["a.experts.kernel"])


@pytest.mark.full
def test_a_run_writes_the_published_layout(tmp_path: Path) -> None:
    """Experts in blocks and scales, in values what training saw last; harmony's marks in the vocabulary."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away again. " * 200)
    config = tiny_config(vocab_size=300, num_hidden_layers=1, layer_types=["sliding_attention"], num_local_experts=4)
    del config["dtype"], config["architectures"], config["initial_context_length"]
    settings = {"steps": 2, "batch_size": 2, "sequence_length": 32, "mxfp4": "*.experts.*.kernel"}
    result = train(tmp_path / "run", [tmp_path / "text.txt"], architecture="gpt_oss", config=config, settings=settings)
    checkpoint = open_checkpoint(result.path)
    path = "model.layers.0.mlp.experts.down_proj"
    assert checkpoint.tensors[f"{path}.weight"].dtype == "uint32"
    assert checkpoint.tensors["lm_head.weight"].dtype == "bfloat16"
    kernels = open_checkpoint(tmp_path / "run" / "flax").tensors
    kernel = kernels[f"{path}.kernel"].read()
    words, scales = (checkpoint.tensors[f"{path}.{part}"].read() for part in ("weight", "scales"))

    stored = dequantize_array(Packed(words, scales, None), MXFP4)
    assert np.array_equal(stored.swapaxes(1, 2).astype(np.float32), kernel.astype(np.float32))

    tokenizer = load_tokenizer(result.path, None, None)
    assert tokenizer.convert_tokens_to_ids("<|call|>") == 299 and tokenizer.eos_token == "<|return|>"
    assert tokenizer("fox").input_ids == tokenizer("fox", add_special_tokens=False).input_ids
