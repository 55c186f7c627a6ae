"""Every layout of gpt-oss into every other and back, bit for bit, with experts packed and as floats."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from isomorph.architectures.gpt_oss.config import GptOssConfig, YarnScaling
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.mxfp4 import packed_view
from isomorph.errors import InputError
from tiny_gpt_oss import tiny_config, tiny_tensors, unpacked, write_checkpoint

PACKED, FLOATS = ("published", "mlx-lm", "mlx-fused"), ("transformers", "mlx-lm", "mlx-fused", "flax")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        assert tensor.read().tobytes() == second[name].read().tobytes(), name


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("packed"), tiny_config(), packed=True)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("floats"), tiny_config(), packed=False)


@pytest.mark.parametrize(("start", "through"), list(permutations(PACKED, 2)), ids="-".join)
def test_packed_round_trips(packed: Path, tmp_path: Path, start: str, through: str) -> None:
    isomorph.convert(packed, tmp_path / "start", layout=start)
    isomorph.convert(tmp_path / "start", tmp_path / "there", layout=through)
    isomorph.convert(tmp_path / "there", tmp_path / "back", layout=start)
    assert_same_weights(tmp_path / "start", tmp_path / "back")


@pytest.mark.parametrize(("start", "through"), list(permutations(FLOATS, 2)), ids="-".join)
def test_float_round_trips(floats: Path, tmp_path: Path, start: str, through: str) -> None:
    isomorph.convert(floats, tmp_path / "start", layout=start)
    isomorph.convert(tmp_path / "start", tmp_path / "there", layout=through)
    isomorph.convert(tmp_path / "there", tmp_path / "back", layout=start)
    assert_same_weights(tmp_path / "start", tmp_path / "back")


def test_gate_and_up_rows_alternate(packed: Path, tmp_path: Path) -> None:
    """Against the values themselves: a round trip alone would not notice gate and up swapped on both ways."""
    tensors = tiny_tensors(tiny_config())
    path = "model.layers.1.mlp.experts.gate_up_proj"
    both = unpacked(tensors[f"{path}_blocks"], tensors[f"{path}_scales"])
    isomorph.convert(packed, tmp_path / "mlx", to="mlx", dequantize=True, dtype="float32")
    written = open_checkpoint(tmp_path / "mlx").tensors
    gate, up = (written[f"model.layers.1.mlp.experts.{name}_proj.weight"].read() for name in ("gate", "up"))
    assert np.array_equal(gate, both[:, ::2]) and np.array_equal(up, both[:, 1::2])
    assert not np.array_equal(gate, both[:, 1::2])


def test_what_convert_writes_by_default(packed: Path, floats: Path, tmp_path: Path) -> None:
    assert isomorph.convert(packed, tmp_path / "1", to="mlx", dry_run=True).layout == "mlx-lm"
    assert isomorph.convert(packed, tmp_path / "1", to="transformers", dry_run=True).layout == "published"
    assert isomorph.convert(floats, tmp_path / "1", to="transformers", dry_run=True).layout == "transformers"
    isomorph.convert(packed, tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert config["rope_theta"] == 150000.0 and config["rope_scaling"]["truncate"] is False
    isomorph.convert(tmp_path / "mlx", tmp_path / "back", to="transformers")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4" and "quantization" not in config


def test_packed_weights_are_not_forced_into_floats(packed: Path, floats: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add --dequantize"):
        isomorph.convert(packed, tmp_path / "t", layout="transformers")
    with pytest.raises(InputError, match="published"):
        isomorph.convert(floats, tmp_path / "t", layout="published")
    assert not (tmp_path / "t").exists()


def test_broken_blocks_are_refused(packed: Path) -> None:
    tensors = dict(open_checkpoint(packed).tensors)
    view, config = packed_view(tensors, {"a": 1})
    assert view == tensors and config == {"a": 1}
    path = "model.layers.0.mlp.experts.down_proj"
    blocks = tensors[f"{path}.weight"].renamed(f"{path}_blocks")
    with pytest.raises(InputError, match="as uint8"):
        packed_view({blocks.name: blocks, f"{path}_scales": tensors[f"{path}.scales"]}, {})


def test_config_in_both_styles() -> None:
    published = tiny_config()
    config = GptOssConfig.from_dict(published)
    assert config.rope_scaling == YarnScaling(truncate=False) and config.swiglu_alpha == 1.702
    assert GptOssConfig.from_dict(config.to_dict()) == config
    newer = {key: value for key, value in published.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {**published["rope_scaling"], "rope_theta": published["rope_theta"]}
    assert GptOssConfig.from_dict(newer) == config
    # What Transformers takes where a config does not say: the ramp truncated, the context that is there.
    silent = GptOssConfig.from_dict(published | {"rope_scaling": {"type": "yarn", "factor": 32.0}}).rope_scaling
    assert silent == YarnScaling(truncate=True, original_max_position_embeddings=131072)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 9}, "must agree"),
        ({"nonsense": 1}, "unknown config keys for gpt_oss: nonsense"),
        ({"rope_scaling": {"rope_type": "linear"}}, "must be 'yarn'"),
        ({"rope_scaling": {"factor": 8.0}}, "must be 'yarn', found 'default'"),
        ({"rope_scaling": {"mscale": 1.0}}, "rope_scaling.mscale"),
        ({"rope_scaling": 3}, "must be an object"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "stated twice"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_experts_per_tok": 9}, "at most num_local_experts"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"head_dim": 15}, "must be even"),
        ({"tie_word_embeddings": True}, "must be False"),
        ({"vocab_size": "many"}, "positive integer"),
    ],
)
def test_unsupported_configs_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GptOssConfig.from_dict(tiny_config() | values)


def test_sizes_of_the_published_model(tmp_path: Path) -> None:
    """From its config alone: parameters as published, 12.8 GB of MXFP4 in 13.76 GB of tensors."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            GptOssConfig().to_dict()
            | {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}, "architectures": []}
        )
    )
    found = isomorph.inspect(tmp_path)
    assert found.parameters == 20_914_757_184
    assert round(found.payload_bytes / 1e9, 2) == 13.76


def test_unpacked_experts_of_16_bits_in_mlx_on_a_cpu(floats: Path, tmp_path: Path) -> None:
    """MLX gathers them in float32 alone there: that is what is computed in, and any other dtype is refused."""
    folder = isomorph.convert(floats, tmp_path / "half", to="mlx", dtype="bfloat16").path
    ids = np.arange(40)[None]
    model = isomorph.load(folder, framework="mlx", device="cpu")
    assert model.dtype == "float32"
    assert_logits_close(model.logits(ids), isomorph.load(folder, dtype="float32").logits(ids))
    with pytest.raises(InputError, match=r"expected dtype float32.*found bfloat16"):
        isomorph.load(folder, framework="mlx", device="cpu", dtype="bfloat16")
