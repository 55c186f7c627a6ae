"""Folders that stock mlx-lm quantized, run by our kernels, against the same weights dequantized."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import isomorph
from conftest import assert_logits_close
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.mlx_quantized import dequantized
from isomorph.errors import InputError
from isomorph.frameworks.torch_quantized import quantized_model, torch_view

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}

#: model type -> what its config needs beyond the common keys; the quick tests take the first of each kind.
MODELS: dict[str, dict] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "mistral": {},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32, **EXPERTS},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        **EXPERTS,
    },
    "smollm3": {},
    "granite": {},
    "starcoder2": {},
    "stablelm": {"partial_rotary_factor": 0.25},
    "cohere": {},
    "helium": {"head_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5, "intermediate_size": 256},
    "seed_oss": {"head_dim": 16},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
}
#: Keys that mlx-lm wants in config.json and Transformers does not write.
MLX_KEYS: dict[str, dict] = {
    "stablelm": {"partial_rotary_factor": 0.25},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
    "qwen3_moe": {"num_experts": 4},
}
QUICK = ("llama", "qwen2", "mixtral", "gemma3_text")

CONVERT = """
import sys
from pathlib import Path
from mlx_lm import utils
source, target, bits, size, mode = sys.argv[1:]
model, config = utils.load_model(Path(source))
model, config = utils.quantize_model(model, config, int(size), int(bits), mode=mode)
target = Path(target)
target.mkdir()
utils.save_model(target, model)
utils.save_config(config, config_path=target / "config.json")
"""


def random_folder(model_type: str, folder: Path) -> Path:
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[model_type](**COMMON | MODELS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Amplified, or a wrong layer would hardly show.
            if "norm" in name:
                # Gemma adds one.
                parameter.uniform_(-0.5, 0.5) if "gemma" in model_type else parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"rope_theta": 10000.0, **values, **MLX_KEYS.get(model_type, {}), "torch_dtype": "float32"})
    )
    return folder


def mlx_quantized(model_type: str, folder: Path, bits: int, size: int, mode: str = "affine") -> Path:
    """What stock mlx-lm makes of a random model; in a process of its own, as mlx and torch both take the cores."""
    source = random_folder(model_type, folder / "source")
    arguments = [str(source), str(folder / "quantized"), str(bits), str(size), mode]
    done = subprocess.run([sys.executable, "-c", CONVERT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "quantized"


def dequantized_twin(folder: Path) -> torch.nn.Module:
    """The same folder with every weight as float32, through the same loader without anything packed."""
    checkpoint = open_checkpoint(folder)
    plain = dequantized(checkpoint.tensors, checkpoint.quantization, "float32")
    saved = folder.parent / "plain"
    shutil.copytree(folder, saved)
    values = {k: v for k, v in checkpoint.config.items() if not k.startswith("quantization")}
    (saved / "config.json").write_text(json.dumps(values | {"quantization": {"bits": 4, "group_size": 64}}))
    from dataclasses import replace

    module, _ = quantized_model(replace(open_checkpoint(saved), tensors=plain), "float32", fast=False)
    return module.eval()


def check(model_type: str, tmp_path: Path, bits: int, size: int, mode: str = "affine") -> None:
    pytest.importorskip("mlx_lm")
    folder = mlx_quantized(model_type, tmp_path, bits, size, mode)
    model = isomorph.load(folder, framework="torch", dtype="float32")
    kinds = {type(part).__name__ for part in model.module.modules()}
    assert "QuantizedLinear" in kinds
    assert ("QuantizedExperts" in kinds) == bool(MODELS[model_type].get("num_experts_per_tok"))
    ids = np.random.default_rng(0).integers(3, 160, (2, 24))
    with torch.inference_mode():
        reference = dequantized_twin(folder)(torch.from_numpy(ids)).logits.numpy()
    assert_logits_close(model.logits(ids), reference)
    packed = next(
        part
        for part in model.module.modules()
        if type(part).__name__.startswith("Quantized") and hasattr(part, "scales")
    )
    packed.scales = packed.scales * 1.01
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids), reference)


@pytest.mark.parametrize("model_type", QUICK)
def test_runs_what_mlx_quantized(model_type, tmp_path):
    check(model_type, tmp_path, 4, 32)


@pytest.mark.full
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(
    "bits,size,mode", [(3, 32, "affine"), (6, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4")], ids=str
)
def test_runs_what_mlx_quantized_at_any_width(model_type, bits, size, mode, tmp_path):
    check(model_type, tmp_path, bits, size, mode)


def test_unknown_and_missing_parameters_are_named(tmp_path):
    folder = mlx_quantized("llama", tmp_path, 4, 32)
    checkpoint = open_checkpoint(folder)
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
        tensors = {
            ("other." + key if key.startswith(name.removesuffix(".weight")) else key): value
            for key, value in checkpoint.tensors.items()
        }
        object.__setattr__(checkpoint, "tensors", tensors)
        with pytest.raises(InputError, match="missing"):
            quantized_model(checkpoint, "float32", fast=False)
        checkpoint = open_checkpoint(folder)


def test_views_do_not_copy():
    array = np.arange(6, dtype=np.uint32)
    assert torch_view(array).data_ptr() == array.ctypes.data
