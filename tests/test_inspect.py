"""`isomorph.inspect`: layout, where it loads, dtypes, sizes and memory, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from isomorph import InputError, convert
from isomorph import inspect as stage
from isomorph.inspect import Inspection, available_bytes, inspect, summary
from isomorph.port import stock
from isomorph.quantize.write import quantize
from tiny import tiny_config, tiny_tensors, write_checkpoint
from tiny_gpt_oss import tiny_config as tiny_gpt_oss
from tiny_gpt_oss import write_checkpoint as write_gpt_oss

LAYOUTS = ("original", "transformers", "transformers-folded", "mlx-lm", "mlx-folded", "flax")


def config_folder(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "talkie", **values}))
    return folder


def test_the_published_model_from_its_config_alone(tmp_path: Path) -> None:
    found = inspect(config_folder(tmp_path, torch_dtype="bfloat16"))
    # 26,560,565,098 bytes on disk, of which the header takes the rest.
    assert (found.tensors, found.parameters, found.payload_bytes) == (443, 13_280_257_721, 26_560_515_442)
    assert (found.kind, found.declared_dtype, found.bits_per_weight) == ("config", "bfloat16", 16)
    assert found.memory is not None
    assert found.memory.tokens == 2048
    assert found.memory.kv_cache_bytes == 1_677_721_600  # 2 * 40 layers * 40 heads * 128 * 2048 * 2 bytes


def test_a_quantized_config_alone(tmp_path: Path) -> None:
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"bits": 8, "group_size": 32}}
    quantization["model.embed"] = False  # type: ignore[assignment]
    found = inspect(config_folder(tmp_path, torch_dtype="bfloat16", quantization=quantization))
    embed, head = 65540 * 5120 * 2, 65540 * (5120 + 2 * 2 * 5120 // 32)
    rest = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13696) * 4.5 / 8 + 2 * 40 * (40 + 3)
    assert found.payload_bytes == embed + head + rest
    assert found.layout == "mlx-folded"
    assert found.quantization is not None
    assert found.quantization.modules == {"4-bit group 64 affine": 280, "8-bit group 32 affine": 1}
    assert found.quantization.unquantized == ["model.embed.weight"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told(tmp_path: Path, layout: str) -> None:
    folder = convert(write_checkpoint(tmp_path / "m"), tmp_path / "t", layout=layout).path
    found = inspect(folder)
    assert found.layout == layout
    assert found.loads["isomorph"] == "torch, mlx, flax"
    expected = {
        "original": ("no", "no"),
        "transformers": ("with trust_remote_code", "natively"),
        "transformers-folded": ("with trust_remote_code", "no"),
        "mlx-lm": ("no", "natively"),
        "mlx-folded": ("no", "with trust_remote_code"),
        "flax": ("no", "no"),
    }[layout]
    for library, how in zip(("transformers", "mlx-lm"), expected):
        assert found.loads[library].startswith(how), found.loads
    assert found.loads["vllm"].startswith("with" if layout == "transformers-folded" else "no")
    assert found.stored_dtypes == {"float32": found.payload_bytes}
    assert len(summary(found)) >= 7


def test_code_that_is_missing_is_noticed(tmp_path: Path) -> None:
    # As the reference case has it: the right names, but no auto_map.
    assert inspect(write_checkpoint(tmp_path / "m")).loads["transformers"].startswith("no: config.json names no code")
    folded = convert(tmp_path / "m", tmp_path / "t", layout="mlx-folded").path
    (folded / "modeling_mlx.py").unlink()
    assert "not there" in inspect(folded).loads["mlx-lm"]
    transformers = convert(tmp_path / "m", tmp_path / "u", "transformers").path
    (transformers / "modeling_torch.py").unlink()
    assert "modeling_torch.py, which is not there" in inspect(transformers).loads["transformers"]
    config = json.loads((folded / "config.json").read_text())
    del config["model_file"]
    (folded / "config.json").write_text(json.dumps(config))
    assert inspect(folded).loads["mlx-lm"].startswith("no: config.json names no code")


def test_declared_and_stored_dtypes_differ(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(torch_dtype="bfloat16", dtype="float32"))
    config = tiny_config(dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert found.declared_dtype == "bfloat16"
    assert list(found.stored_dtypes) == ["float32"]
    assert "declared bfloat16; stored float32" in summary(found)["dtype"]


@pytest.mark.parametrize(
    ("context", "available", "fits", "reason"),
    [(100, 10**9, True, "fits"), (100, 1000, False, "not enough memory"), (300, 10**9, False, "longer than")],
)
def test_whether_it_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int, available: int, fits: bool, reason: str
) -> None:
    monkeypatch.setattr(stage, "available_bytes", lambda: available)
    found = inspect(write_checkpoint(tmp_path), context)
    assert found.memory is not None
    assert (found.memory.fits, found.memory.tokens) == (fits, context)
    assert found.memory.reason.startswith(reason)
    assert found.memory.kv_cache_bytes == 2 * 3 * 4 * 16 * context * 4
    assert ("yes" if fits else "no") in summary(found)["runs here"]


def test_available_memory_is_a_plausible_number() -> None:
    import psutil

    assert 0 <= available_bytes() <= psutil.virtual_memory().total


def test_what_load_would_refuse_is_refused(tmp_path: Path) -> None:
    for context in (0, -1):
        with pytest.raises(InputError, match="at least 1 token"):
            inspect(tmp_path, context)
    tensors = tiny_tensors(tiny_config())
    del tensors["lm_head"]
    write_checkpoint(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="missing 'lm_head'"):
        inspect(tmp_path)


def test_buffers_are_left_out_of_the_sizes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    plain = inspect(tmp_path)
    save_file({**tiny_tensors(tiny_config()), "model.cos": np.ones(1000, np.float32)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert (found.parameters, found.payload_bytes) == (plain.parameters, plain.payload_bytes)
    assert list(found.dropped) == ["model.cos"]


def llama(folder: Path, **values: Any) -> Path:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4}
    return config_folder(folder, **{"model_type": "llama", "vocab_size": 100, "dtype": "bfloat16", **sizes, **values})


def test_architectures_of_stock_libraries(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = inspect(llama(tmp_path, max_position_embeddings=64))
    assert (found.parameters, found.bits_per_weight, found.architecture) == (95_040, 16, "llama")
    assert found.loads["transformers"] == "natively"
    assert found.memory is not None
    assert found.memory.kv_cache_bytes == 2 * 2 * 64 * 64 * 2
    tied = inspect(llama(tmp_path, tie_word_embeddings=True))
    assert tied.parameters == 95_040 - 100 * 64


def test_model_types_of_transformers_are_read_off_its_files() -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    assert all(map(stock.transformers_has, auto.CONFIG_MAPPING_NAMES))
    assert not any(map(stock.transformers_has, ("nobody", "Llama", "lla", "LlamaConfig", "")))


def test_an_architecture_nobody_has(tmp_path: Path) -> None:
    save_file({"x": np.ones((4, 4), np.float16)}, config_folder(tmp_path, model_type="nobody") / "model.safetensors")
    found = inspect(tmp_path)
    assert (found.parameters, found.payload_bytes, found.loads["isomorph"]) == (16, 32, "no")
    assert found.memory is None
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="'nobody'"):
        inspect(tmp_path)


def test_quantized_weights_of_other_architectures_are_counted(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.ones((8, 8), np.uint32),
        "a.scales": np.ones((8, 1), np.float16),
        "a.biases": np.ones((8, 1), np.float16),
        "b.weight": np.ones((8, 16), np.uint32),
        "b.scales": np.ones((8, 1), np.float16),
        "b.biases": np.ones((8, 1), np.float16),
        "c.weight": np.ones((2, 2), np.float16),
    }
    quantization = {"group_size": 64, "bits": 4, "b": {"bits": 8}}
    save_file(
        tensors,
        config_folder(tmp_path, model_type="nobody", quantization=quantization) / "model.safetensors",
        metadata={"format": "mlx"},
    )
    found: Inspection = inspect(tmp_path)
    assert found.parameters == 8 * 64 + 8 * 64 + 4
    assert found.layout == "mlx-lm"
    assert found.quantization is not None
    assert found.quantization.modules == {"4-bit group 64 affine": 1, "8-bit group 64 affine": 1}


def test_mxfp4_codes_count_as_weights(shared: Path) -> None:
    found = inspect(shared / "golden" / "gpt-oss" / "public" / "mxfp4")
    whole = inspect(shared / "golden" / "gpt-oss" / "public" / "hf")
    assert found.parameters == whole.parameters == 292_192
    assert found.bits_per_weight < whole.bits_per_weight == 32


def test_the_grid_that_weights_lie_on_is_shown(tmp_path: Path) -> None:
    """Of 16-bit weights that came from MXFP4, in any layout, and of a wider format that holds it; of no others."""
    packed = write_gpt_oss(tmp_path / "packed", tiny_gpt_oss(), packed=True)
    floats = write_gpt_oss(tmp_path / "floats", tiny_gpt_oss(), packed=False)
    assert inspect(packed).grids == {}
    convert(packed, tmp_path / "mlx", to="mlx", dequantize=True)
    quantize(packed, tmp_path / "affine", 5, 32, recipe={"expert": 5})
    experts, mxfp4 = "model.layers.*.mlp.experts", "4-bit mxfp4 in groups of 32"
    apart = dict.fromkeys((f"{experts}.{name}_proj" for name in ("gate", "up", "down")), mxfp4)
    assert inspect(floats).grids == {f"{experts}.gate_up_proj": mxfp4, f"{experts}.down_proj": mxfp4}
    assert inspect(tmp_path / "mlx").grids == inspect(tmp_path / "affine").grids == apart
    assert summary(inspect(floats))["lies on a grid"] == f"{mxfp4}: {experts}.down_proj, {experts}.gate_up_proj"
    assert inspect(write_checkpoint(tmp_path / "trained", tiny_config())).grids == {}
