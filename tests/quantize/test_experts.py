"""Experts: written as stock mlx-lm's own conversion of the same checkpoint has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.mlx_quantized import parse_quantization, quantized_modules
from isomorph.errors import InputError
from isomorph.quantize.experts import REARRANGED, STACKED
from isomorph.quantize.stock import BARE_ROUTERS
from isomorph.quantize.write import quantize
from quantize.test_write import assert_same, config_of, stock_result, tensors_of

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "torch_dtype": "bfloat16",
    **dict.fromkeys(
        ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"], 1.0
    ),  # granite's
    "attention_bias": False,
}
INNER = {"granitemoe": 128, "mixtral": 128, "olmoe": 128, "qwen2_moe": 96, "qwen3_moe": 96}


def shapes_of(model_type: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of that type as it is published."""
    hidden, inner = COMMON["hidden_size"], INNER[model_type]
    shapes = {f"{name}.weight": (96, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(2):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (rows, hidden)
            if model_type == "qwen2_moe" and name != "o":
                shapes[f"{block}self_attn.{name}_proj.bias"] = (rows,)
        if model_type in ("olmoe", "qwen3_moe"):
            width = {"q": 64, "k": 32} if model_type == "olmoe" else {"q": 16, "k": 16}
            shapes |= {f"{block}self_attn.{name}_norm.weight": (size,) for name, size in width.items()}
        if model_type == "granitemoe":  # all experts joined
            moe = f"{block}block_sparse_moe."
            shapes[f"{moe}router.layer.weight"] = (4, hidden)
            shapes |= {
                f"{moe}input_linear.weight": (4, 2 * inner, hidden),
                f"{moe}output_linear.weight": (4, hidden, inner),
            }
            continue
        moe = f"{block}{'block_sparse_moe' if model_type == 'mixtral' else 'mlp'}."
        shapes[f"{moe}gate.weight"] = (4, hidden)
        up, gate, down = ("w3", "w1", "w2") if model_type == "mixtral" else ("up_proj", "gate_proj", "down_proj")
        for expert in range(4):
            shapes |= {f"{moe}experts.{expert}.{name}.weight": (inner, hidden) for name in (up, gate)}
            shapes[f"{moe}experts.{expert}.{down}.weight"] = (hidden, inner)
        if model_type == "qwen2_moe":
            shapes |= {f"{moe}shared_expert.{name}_proj.weight": (64, hidden) for name in ("gate", "up", "down")}
            shapes[f"{moe}shared_expert_gate.weight"] = (1, hidden)
    return shapes


def write_model(folder: Path, model_type: str, drop: str = "") -> Path:
    random = np.random.default_rng(4)
    values = {
        name: random.normal(0, 0.2, shape).astype(ml_dtypes.bfloat16) for name, shape in shapes_of(model_type).items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**COMMON, "model_type": model_type}))
    save_file({k: v for k, v in values.items() if k != drop}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("model_type", INNER)
def test_stock_mlx_lms_own_result(model_type, tmp_path):
    """The same names, tensors and quantization config, routers included."""
    pytest.importorskip("mlx_lm")
    source = write_model(tmp_path / "source", model_type)
    expected, config = stock_result(source, tmp_path / "stock", bits=4, group_size=32)
    result = quantize(source, tmp_path / "own", bits=4, group_size=32)
    assert_same(tensors_of(tmp_path / "own"), expected)
    # mlx-lm leaves the mode out where a model asks for its router's settings itself.
    own = config_of(tmp_path / "own")["quantization"]
    assert parse_quantization(own) == parse_quantization(config["quantization"])
    assert result.layout == "mlx-lm"
    experts = [module for module in result.plan if module.role == "expert"]
    assert len(experts) == 6 and all(module.shape[0] == 4 for module in experts)
    assert {module.role for module in result.plan} >= {"router", "expert", "q", "head"}


def test_a_recipe_by_role_and_block(tmp_path):
    source = write_model(tmp_path / "source", "qwen3_moe")
    result = quantize(
        source, tmp_path / "own", 4, 32, recipe={"expert": 3, "router": False}, overrides=["layers.1.*=8"]
    )
    found = {module.path: module.bits for module in result.plan}
    assert found["model.layers.0.mlp.switch_mlp.up_proj"] == 3 and found["model.layers.1.mlp.gate"] == 8
    assert result.skipped == {"model.layers.0.mlp.gate": "the recipe keeps it"}
    assert config_of(tmp_path / "own")["quantization"]["model.layers.0.mlp.gate"] is False


def test_an_expert_that_is_missing_is_named(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    source = write_model(tmp_path / "source", "qwen3_moe", drop=name)
    with pytest.raises(
        InputError, match=re.escape("expected experts 0 to 3 of one shape and dtype for 'model.layers.1.")
    ):
        quantize(source, tmp_path / "own")


def test_sizes_from_a_config_alone(tmp_path):
    """Transformers' own models hold the experts joined; the plan is that of the checkpoint."""
    pytest.importorskip("torch")
    source = write_model(tmp_path / "source", "qwen3_moe")
    whole = quantize(source, tmp_path / "own", bits=4, group_size=32, dry_run=True)
    (source / "model.safetensors").unlink()
    planned = quantize(source, tmp_path / "own", bits=4, group_size=32, dry_run=True)
    assert planned.payload_bytes == whole.payload_bytes and planned.parameters == whole.parameters
    assert sorted(planned.plan, key=lambda m: m.path) == sorted(whole.plan, key=lambda m: m.path)


def test_gpt_oss_from_floats(shared, tmp_path):
    """Interleaved and turned in Transformers: stock mlx-lm cannot convert them, but loads the result."""
    source = shared / "golden" / "gpt-oss" / "public" / "hf"
    quantize(source, tmp_path / "own", bits=8, group_size=32)
    floats = {name: tensor.read() for name, tensor in open_checkpoint(source).tensors.items()}
    own = open_checkpoint(tmp_path / "own")
    modules = quantized_modules(own.tensors, own.config["quantization"])
    experts = "model.layers.1.mlp.experts"
    joined = floats[f"{experts}.gate_up_proj"]
    for name, expected in (
        ("gate_proj", joined[..., ::2].swapaxes(1, 2)),
        ("up_proj", joined[..., 1::2].swapaxes(1, 2)),
        ("down_proj", floats[f"{experts}.down_proj"].swapaxes(1, 2)),
    ):
        found = modules[f"{experts}.{name}"].dequantized().read()
        steps = np.repeat(np.abs(modules[f"{experts}.{name}"].scales.read()), 32, -1)
        # Half a step, and one where the snapped bias cuts the far end.
        assert found.shape == expected.shape and (np.abs(found - expected) <= 1.01 * steps).all()
        # The negative control: the other half is far off.
        assert not (np.abs(found - np.roll(expected, 1, 1)) <= 1.01 * steps).all()
    bias = own.tensors[f"{experts}.up_proj.bias"].read()
    assert np.array_equal(bias, floats[f"{experts}.gate_up_proj_bias"][:, 1::2])
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    assert mlx_lm.load_model(tmp_path / "own", trust_remote_code=True)[0] is not None


@pytest.mark.parametrize("model_type", ["gpt2", "dbrx"])
def test_what_mlx_lm_would_turn_is_refused(model_type, tmp_path):
    source = write_model(tmp_path / "source", "qwen3_moe")
    (source / "config.json").write_text(json.dumps({**COMMON, "model_type": model_type}))
    with pytest.raises(InputError, match=r"run mlx_lm.convert without -q first"):
        quantize(source, tmp_path / "own")


def test_the_tables_are_mlx_lms():
    """Against the source text of the installed mlx-lm."""
    models = Path(pytest.importorskip("mlx_lm.models").__path__[0])
    text = {path.stem: path.read_text() for path in models.glob("*.py")}
    assert all("switch_mlp" in text[name] for name in STACKED)
    assert all(re.search(r"def sanitize.*(transpose|\.T\b|stack)", text[name], re.DOTALL) for name in REARRANGED)
    bare = set()
    for name, source in text.items():
        if gate := re.search(r"self\.gate = (\w+)\(", source):
            body = re.search(rf"class {gate[1]}\(nn\.Module\):.*?(?=\nclass |\Z)", source, re.DOTALL)
            if body and "self.weight = mx." in body[0]:
                bare.add(name)
    renamed = {"joyai_llm_flash", "kimi_k2"}  # mlx-lm's MODEL_REMAPPING: deepseek_v3
    assert bare - REARRANGED - {"muse_spark"} == BARE_ROUTERS - renamed


def test_bare_routers_are_told(tmp_path):
    source = write_model(tmp_path / "source", "qwen3_moe")
    config = {**COMMON, "model_type": "dots1"}
    (source / "config.json").write_text(json.dumps(config))
    result = quantize(source, tmp_path / "own", bits=4, group_size=32, recipe="q4", dry_run=True)
    assert set(result.skipped.values()) == {"a bare parameter, not a module's weight"}
    assert {module.role for module in result.plan if module.bits is None} == {"router"}
