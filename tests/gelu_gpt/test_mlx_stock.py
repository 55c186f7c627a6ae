"""What convert and quantize write for MLX, in stock mlx-lm and in a process that cannot import isomorph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model as load_with_mlx_lm

import isomorph
from conftest import assert_logits_close
from isomorph.architectures.gelu_gpt import modeling_mlx
from isomorph.frameworks.model import Model
from speaking import gelu_gpt_with_tokenizer, without_isomorph

BEGINNING = "In the beginning there was another one, and it said what the first one had said. "

#: One token a byte: from a single one to more than both windows (128 and 256) hold.
PROMPTS = ["x", "the cat", BEGINNING, 2 * BEGINNING, 4 * BEGINNING, "on and on it goes"]

STOCK = """
import json
import mlx.core as mx
from mlx_lm import batch_generate, load, stream_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

texts, scratch, folder = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
model, tokenizer = load(folder, trust_remote_code=True)
prompts = [tokenizer.encode(text) for text in texts]
single = [[step.token for step in stream_generate(model, tokenizer, prompt, max_tokens=16)] for prompt in prompts]
batch = batch_generate(
    model, tokenizer, prompts, max_tokens=16, return_token_ids=True, completion_batch_size=3, prefill_batch_size=3,
    prefill_step_size=100,
).token_ids
# The cache of a longer prompt, saved, loaded and trimmed to a shared beginning; one past the window, gone on from.
cache = make_prompt_cache(model)
mx.eval(model(mx.array([prompts[2] + [3, 1, 4]]), cache=cache))
save_prompt_cache(scratch, cache)
cache = load_prompt_cache(scratch)
assert trim_prompt_cache(cache, 4) == 4
trimmed = [step.token for step in stream_generate(model, tokenizer, prompts[2][-1:], max_tokens=16, prompt_cache=cache)]
cache = make_prompt_cache(model)
mx.eval(model(mx.array([prompts[4][:-5]]), cache=cache))
save_prompt_cache(scratch, cache)
cache = load_prompt_cache(scratch)
loaded = [step.token for step in stream_generate(model, tokenizer, prompts[4][-5:], max_tokens=16, prompt_cache=cache)]
print(json.dumps({
    "module": type(model).__module__, "logits": model(mx.array([prompts[4]])).tolist(),
    "single": single, "batch": batch, "trimmed": trimmed, "loaded": loaded,
}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    source = gelu_gpt_with_tokenizer(base / "source", rope_table_dtype="bfloat16")
    isomorph.convert(source, base / "mlx", to="mlx")
    return {"source": source, "mlx": base / "mlx"}


def greedy(model: Model, prompt: list[int], tokens: int) -> list[int]:
    """Without any cache."""
    sequence = list(prompt)
    for _ in range(tokens):
        sequence.append(int(model.logits(sequence)[0, -1].argmax()))
    return sequence[len(prompt) :]


def without_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_folders_run_in_stock_mlx_lm_without_isomorph(folders: dict[str, Path], tmp_path: Path) -> None:
    said = without_isomorph(STOCK, json.dumps(PROMPTS), tmp_path / "cache.safetensors", folders["mlx"])
    assert said["module"] == "custom_model"
    reference = isomorph.load(folders["source"], framework="torch")
    end = reference.tokenizer.eos_token_id
    prompts = [reference.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert_logits_close(np.array(said["logits"], np.float32), reference.logits(prompts[4]))
    expected = [without_end(greedy(reference, prompt, 16), end) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > len(PROMPTS) / 2
    for name in ("single", "batch"):
        assert [without_end(tokens, end) for tokens in said[name]] == expected
    assert without_end(said["trimmed"], end) == expected[2]
    assert without_end(said["loaded"], end) == expected[4]


def test_model_file_runs_only_when_trusted_and_is_ours(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_with_mlx_lm(folders["mlx"])
    assert (folders["mlx"] / "modeling_mlx.py").read_text() == Path(modeling_mlx.__file__).read_text()


def assert_quantized_folder_is_right(target: Path, floats: Path, *, bits: int, group_size: int) -> Any:
    """In stock mlx-lm, here in MLX, and as plain matrices in torch: the same numbers."""
    model = isomorph.load(target, framework="mlx", dtype="float32")
    trunk = model.module.model
    assert [isinstance(layer, nn.QuantizedEmbedding) for layer in trunk.value_embeds] == [True, False, True]
    for layer in (trunk.wte, trunk.lm_head, trunk.value_embeds[2], trunk.blocks[1].mlp.c_fc):
        assert (layer.bits, layer.group_size) == (bits, group_size)
    assert not any(hasattr(layer, "bits") for layer in (trunk.smear_gate, trunk.blocks[0].attn.ve_gate))
    ids = np.random.default_rng(0).integers(0, 257, (2, 200))
    logits = model.logits(ids)
    stock, _ = load_with_mlx_lm(target, trust_remote_code=True)
    np.testing.assert_array_equal(np.array(stock(mx.array(ids))), logits)
    isomorph.convert(target, floats, to="transformers", dequantize=True)
    assert_logits_close(logits, isomorph.load(floats, framework="torch", dtype="float32").logits(ids))
    return ids, logits


@pytest.mark.parametrize("bits, group_size", [(4, 32), (8, 32), (3, 32)])
def test_what_isomorph_quantizes(folders: dict[str, Path], bits: int, group_size: int, tmp_path: Path) -> None:
    isomorph.quantize(folders["source"], tmp_path / "quantized", bits=bits, group_size=group_size)
    ids, logits = assert_quantized_folder_is_right(
        tmp_path / "quantized", tmp_path / "floats", bits=bits, group_size=group_size
    )
    original = isomorph.load(folders["source"], framework="mlx").logits(ids)
    with pytest.raises(AssertionError):
        assert_logits_close(logits, original)


def test_what_mlx_lm_quantizes(folders: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    options: dict[str, Any] = {"quantize": True, "q_bits": 4, "q_group_size": 32, "trust_remote_code": True}
    mlx_lm.convert(str(folders["mlx"]), mlx_path=str(target), **options)
    assert_quantized_folder_is_right(target, tmp_path / "floats", bits=4, group_size=32)


def test_a_tied_head_is_quantized_with_its_embedding(tmp_path: Path) -> None:
    source = gelu_gpt_with_tokenizer(tmp_path / "source", tie_embeddings=True)
    isomorph.quantize(source, tmp_path / "quantized", bits=4, group_size=32)
    isomorph.convert(tmp_path / "quantized", tmp_path / "floats", to="transformers", dequantize=True)
    ids = np.random.default_rng(1).integers(0, 257, (1, 200))
    expected = isomorph.load(tmp_path / "floats", framework="torch").logits(ids)
    stock, _ = load_with_mlx_lm(tmp_path / "quantized", trust_remote_code=True)
    assert_logits_close(np.array(stock(mx.array(ids))), expected)


def test_rope_tables_of_an_export_are_left_out() -> None:
    model = modeling_mlx.Model(modeling_mlx.ModelArgs(n_layer=2, n_embd=48, n_head=2, n_kv_head=2, vocab_size=64))
    weights = {"model.rope_cos": mx.zeros(4), "model.rope_sin": mx.zeros(4), "model.wte.weight": mx.zeros((64, 48))}
    assert list(model.sanitize(weights)) == ["model.wte.weight"]
