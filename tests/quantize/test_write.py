"""Quantized folders: stock mlx-lm's own result, the in-memory result, loading without isomorph, resuming, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from conftest import assert_logits_close
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.ahead import DEPTH
from isomorph.checkpoint.mlx_quantized import parse_quantization, quantized_modules
from isomorph.cli import run
from isomorph.convert import convert
from isomorph.errors import InputError
from isomorph.quantize import stream
from isomorph.quantize.arrays import quantize_array
from isomorph.quantize.settings import Settings
from isomorph.quantize.write import quantize
from tiny import tiny_config, write_checkpoint

#: Widths that groups of 64 divide; the head dimension makes heads * head_dim unlike hidden_size.
WIDTHS = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 48, "vocab_size": 160}


@pytest.fixture(scope="module")
def talkie(tmp_path_factory) -> Path:
    """A tiny Talkie in bfloat16, in the Transformers layout."""
    config = tiny_config(**WIDTHS, dtype="bfloat16", torch_dtype="bfloat16")
    return write_checkpoint(tmp_path_factory.mktemp("talkie") / "source", config)


def write_llama(folder: Path, dtype=ml_dtypes.bfloat16, **overrides) -> Path:
    """A tiny random llama as Transformers stores it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(np.dtype(dtype)),
        **overrides,
    }
    random = np.random.default_rng(3)
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{block}self_attn.{name}_proj.weight": (hidden // 2, hidden) for name in "kv"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{block}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{block}self_attn.rotary_emb.inv_freq"] = (16,)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    values = {name: random.normal(0, 0.2, shape).astype(dtype) for name, shape in shapes.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).tensors.items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype and value.shape == right[name].shape, name
        assert value.tobytes() == right[name].tobytes(), name


def stock_result(
    source: Path, target: Path, recipe: str | None = None, **options
) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and config as `mlx_lm.convert -q` makes them, without its tokenizer."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = load_model(source, lazy=True)
    dtype = getattr(mx, config["torch_dtype"])
    cast = lambda value: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
    model.update(tree_map(cast, model.parameters()))
    settings = {"group_size": None, "bits": None, **options}
    if recipe is not None:
        settings["quant_predicate"] = mixed_quant_predicate_builder(recipe, model, settings["group_size"] or 64)
    model, config = quantize_model(model, config, **settings)
    save_model(target, model)
    return tensors_of_stock(target), config


def tensors_of_stock(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 64},
        {"bits": 3, "group_size": 32},
        {"bits": 8, "group_size": 128},
        {"mode": "mxfp4"},
        {"mode": "nvfp4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["talkie", "llama"])
def test_stock_mlx_lms_own_result(kind, options, talkie, tmp_path):
    """The same tensors, bit for bit, and the same quantization config; skips what the group size does not divide."""
    pytest.importorskip("mlx_lm")
    source = talkie if kind == "talkie" else write_llama(tmp_path / "llama")
    expected, config = stock_result(source, tmp_path / "stock", **options)
    result = quantize(source, tmp_path / "own", layout="mlx-lm" if kind == "talkie" else None, **options)
    assert_same(tensors_of(tmp_path / "own"), expected)
    own = config_of(tmp_path / "own")
    assert own["quantization"] == config["quantization"] == own["quantization_config"]
    # 160 and 192 columns do not divide into groups of 128; Talkie's bare head never does.
    if options.get("group_size") == 128:
        assert any("do not divide into groups of 128" in reason for reason in result.skipped.values())
    with safe_open(tmp_path / "own" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "mlx"}


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4"])
def test_mixed_recipes_are_mlx_lms(recipe, tmp_path):
    pytest.importorskip("mlx_lm")
    source = write_llama(tmp_path / "llama", tie_word_embeddings=True)
    expected, config = stock_result(source, tmp_path / "stock", recipe=recipe, group_size=32)
    quantize(source, tmp_path / "own", group_size=32, recipe=recipe)
    assert_same(tensors_of(tmp_path / "own"), expected)
    assert config_of(tmp_path / "own")["quantization"] == config["quantization"]


def test_weights_are_cast_as_mlx_lm_casts_them(tmp_path):
    pytest.importorskip("mlx_lm")
    source = write_llama(tmp_path / "llama", dtype=np.float32, torch_dtype="float16")
    expected, _ = stock_result(source, tmp_path / "stock", bits=4, group_size=32)
    quantize(source, tmp_path / "own", bits=4, group_size=32)
    assert_same(tensors_of(tmp_path / "own"), expected)


STOCK = """
import sys
sys.modules["isomorph"] = None  # Importing it fails, as where it is not installed.
from pathlib import Path
import numpy as np, mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import load_model
widened = lambda value: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
for folder in sys.argv[1:]:
    model, _ = load_model(Path(folder), trust_remote_code=not folder.endswith("untrusted"))
    model.update(tree_map(widened, model.parameters()))
    np.save(f"{folder}.npy", np.array(model(mx.array([[5, 17, 3, 80, 41, 2, 9]]))))
"""


def test_stock_mlx_lm_runs_it(tmp_path):
    """In a process where isomorph cannot be imported, in float32, against the same weights dequantized."""
    pytest.importorskip("mlx_lm")
    source = write_checkpoint(tmp_path / "source", tiny_config(**WIDTHS))
    quantize(source, tmp_path / "plain", bits=4)
    quantize(source, tmp_path / "mixed", bits=8, overrides=["blocks.1.*=3", "o=mxfp4", "embed=keep"])
    quantize(source, tmp_path / "untrusted", bits=4, layout="mlx-lm")
    assert "lm_head.scales" in open_checkpoint(tmp_path / "plain").tensors
    assert "model_file" not in config_of(tmp_path / "untrusted")
    for name in ("plain", "mixed"):
        convert(tmp_path / name, tmp_path / f"{name}-floats", layout="mlx-folded", dequantize=True, dtype="float32")
    convert(source, tmp_path / "before", layout="mlx-folded")
    names = ("plain", "plain-floats", "mixed", "mixed-floats", "untrusted", "before")
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *(str(tmp_path / name) for name in names)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    logits = {name: np.load(tmp_path / f"{name}.npy") for name in names}
    assert_logits_close(logits["plain"], logits["plain-floats"])
    assert_logits_close(logits["mixed"], logits["mixed-floats"])
    assert np.isfinite(logits["untrusted"]).all()
    # The negative control: weights that were not quantized are far off.
    with pytest.raises(AssertionError):
        assert_logits_close(logits["plain"], logits["before"])


def test_equals_the_in_memory_result(talkie, tmp_path, monkeypatch):
    """Streamed in many small blocks, the folder holds what quantizing each whole matrix gives."""
    from isomorph.checkpoint import tensor

    monkeypatch.setattr(tensor, "BLOCK_BYTES", 5000)
    result = quantize(talkie, tmp_path / "target", recipe="q6", overrides=["blocks.1.*=3/32"])
    convert(talkie, tmp_path / "floats", layout="mlx-folded")
    floats, stored = tensors_of(tmp_path / "floats"), tensors_of(tmp_path / "target")
    for module in result.plan:
        settings = Settings(module.bits, module.group_size, module.mode)
        parts = quantize_array(floats[f"{module.path}.weight"], settings)
        for name, part in zip(("weight", "scales", "biases"), parts):
            assert stored[f"{module.path}.{name}"].tobytes() == part.tobytes(), module.path
    assert {module.bits for module in result.plan} == {6, 3}
    assert result.loss.matrices == len(result.plan) == 23
    assert 0 < result.loss.mean_relative_rms < result.loss.max_relative_rms < 0.2
    assert ".blocks.1." in result.loss.worst
    assert sum(value.nbytes for value in stored.values()) == result.payload_bytes


def test_shards(talkie, tmp_path):
    quantize(talkie, tmp_path / "one")
    quantize(talkie, tmp_path / "many", max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 5
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "one"))
    assert_same(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))


def test_words_are_aligned_in_the_file(talkie, tmp_path):
    """Gains of two bytes would leave every later word crooked; they go last."""
    quantize(talkie, tmp_path / "target")
    for name, value in tensors_of(tmp_path / "target").items():
        assert value.ctypes.data % 8 == 0 or value.dtype != np.uint32, name


def test_config_says_what_was_done(talkie, tmp_path):
    quantize(talkie, tmp_path / "target", overrides=["blocks.2.*=6/32", "embed=keep"])
    default, own = parse_quantization(config_of(tmp_path / "target")["quantization"])
    assert default == Settings(4, 64)
    assert own["model.embed"] is None and own["model.blocks.2.mlp.mlp_gate"] == Settings(6, 32)
    assert len(own) == 8
    assert config_of(tmp_path / "target")["model_file"] == "modeling_mlx.py"
    modules = quantized_modules(
        open_checkpoint(tmp_path / "target").tensors, config_of(tmp_path / "target")["quantization"]
    )
    assert modules["lm_head"].shape == (160, 128) and "model.embed" not in modules


def test_the_fold_is_kept_only_beside_an_exact_head(talkie, tmp_path):
    quantize(talkie, tmp_path / "a")
    quantize(talkie, tmp_path / "b", overrides=["head=keep"])
    assert not (tmp_path / "a" / "lm_head_fold.npz").exists()
    assert (tmp_path / "b" / "lm_head_fold.npz").exists()


KILLED = """
import os, signal, sys
from isomorph.quantize import stream
done = 0
words = stream.QuantizedStream._words
def counted(self):
    global done
    done += 1
    if done > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    yield from words(self)
stream.QuantizedStream._words = counted
from isomorph.quantize.write import quantize
quantize(sys.argv[1], sys.argv[2], bits=3)
"""


def test_resumes_after_a_kill(talkie, tmp_path):
    target = tmp_path / "target"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(talkie), str(target), "9"])
    assert killed.returncode == -signal.SIGKILL and not target.exists()
    result = quantize(talkie, target, bits=3)
    # Nine were quantized; those that were waiting to be written are made again.
    assert 23 - 9 <= result.loss.matrices < 23 - 9 + DEPTH
    quantize(talkie, tmp_path / "at-once", bits=3)
    for path in (tmp_path / "at-once").iterdir():
        assert path.read_bytes() == (target / path.name).read_bytes(), path.name
    assert os.listdir(target) and not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_other_settings_do_not_resume(talkie, tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(talkie), str(tmp_path / "target"), "9"])
    assert quantize(talkie, tmp_path / "target", bits=4).loss.matrices == 23


def test_a_quantized_source_is_refused_unless_asked_for(talkie, tmp_path):
    quantize(talkie, tmp_path / "q8", bits=8)
    with pytest.raises(InputError, match=r"8-bit affine in groups of 64 already.*loses \d\.\d\d% .*add --requantize"):
        quantize(tmp_path / "q8", tmp_path / "q4")
    again = quantize(tmp_path / "q8", tmp_path / "q4", bits=4, requantize=True)
    assert again.requantized and again.loss.mean_relative_rms > 0.05
    # What stays as it is needs no permission.
    same = quantize(tmp_path / "q8", tmp_path / "same", bits=8)
    assert not same.requantized and same.loss is None and all(module.exact for module in same.plan)
    assert_same(tensors_of(tmp_path / "q8"), tensors_of(tmp_path / "same"))
    llama = write_llama(tmp_path / "llama")
    quantize(llama, tmp_path / "llama8", bits=8, group_size=32)
    with pytest.raises(InputError, match="add --requantize"):
        quantize(tmp_path / "llama8", tmp_path / "llama4")
    assert quantize(tmp_path / "llama8", tmp_path / "llama4", group_size=32, requantize=True).bits == 4


def test_packed_modules_that_are_copied_are_checked(talkie, tmp_path):
    quantize(talkie, tmp_path / "q8", bits=8)
    file = tmp_path / "q8" / "model.safetensors"
    tensors = {name: value.copy() for name, value in tensors_of(tmp_path / "q8").items()}
    scales = next(name for name in tensors if name.endswith(".scales"))
    quantize(tmp_path / "q8", tmp_path / "same", bits=8)
    tensors[scales][0, 0] = np.nan
    save_file(tensors, file, {"format": "mlx"})
    with pytest.raises(InputError, match=f"expected finite scales; found NaN or infinity in {re.escape(scales)}"):
        quantize(tmp_path / "q8", tmp_path / "other", bits=8)
    assert not (tmp_path / "other").exists()


def test_dequantized_values_are_the_codes_values(talkie, tmp_path):
    quantize(talkie, tmp_path / "q4")
    convert(tmp_path / "q4", tmp_path / "floats", layout="mlx-folded", dequantize=True)
    config = config_of(tmp_path / "floats")
    assert "quantization" not in config and "quantization_config" not in config and config["dtype"] == "bfloat16"
    modules = quantized_modules(open_checkpoint(tmp_path / "q4").tensors, config_of(tmp_path / "q4")["quantization"])
    floats = tensors_of(tmp_path / "floats")
    for path, module in modules.items():
        assert floats[f"{path}.weight"].tobytes() == module.dequantized().read().tobytes(), path


def test_dequantizing_a_stock_model(tmp_path):
    """An MLX-quantized llama becomes floats under the same names, so Transformers has it again."""
    source = write_llama(tmp_path / "llama")
    quantize(source, tmp_path / "q4", bits=4, group_size=32, overrides=["o=mxfp4"])
    convert(tmp_path / "q4", tmp_path / "floats", dequantize=True)
    own = tensors_of(tmp_path / "floats")
    modules = quantized_modules(open_checkpoint(tmp_path / "q4").tensors, config_of(tmp_path / "q4")["quantization"])
    before = {name: value for name, value in tensors_of(source).items() if "inv_freq" not in name}
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in before.items()}
    for path, module in modules.items():
        assert own[f"{path}.weight"].tobytes() == module.dequantized().read().tobytes()
    assert "quantization" not in config_of(tmp_path / "floats")


def test_weights_that_cannot_be_quantized_leave_nothing_behind(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config(**WIDTHS))
    values = dict(tensors_of(source))
    for value, message in (
        (np.nan, "found NaN or infinity in 'model.blocks.1.mlp.mlp_gate.weight'"),
        (3e38, "overflows"),
    ):
        broken = values["model.blocks.1.mlp.mlp_gate.weight"].copy()
        broken[3, :2] = (value, -value)
        save_file({**values, "model.blocks.1.mlp.mlp_gate.weight": broken}, source / "model.safetensors")
        with pytest.raises(InputError, match=message):
            quantize(source, tmp_path / "target")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_existing_target(talkie, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--force"):
        quantize(talkie, tmp_path / "target")
    quantize(talkie, tmp_path / "target", force=True)
    assert "quantization" in config_of(tmp_path / "target")


def test_command_line(talkie, tmp_path, capsys):
    assert run(["quantize", str(talkie), str(tmp_path / "target"), "--bits", "3", "--set", "o=keep", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["parameters"] == sum(value.size for value in tensors_of_floats(talkie))
    stored = sum(value.nbytes for value in tensors_of(tmp_path / "target").values())
    assert document["payload_bytes"] == stored
    assert document["bits_per_weight"] == 8 * stored / document["parameters"]
    assert {module["reason"] for module in document["plan"] if module["bits"] is None} == {"the recipe keeps it"}
    assert "not quantized, the recipe keeps it: 3 matrices" in err and "relative RMS error" in err
    assert run(["quantize", str(talkie), str(tmp_path / "other"), "--bits", "3", "--dry-run"]) == 0
    assert re.search(r"would write .*other.* bits per weight", capsys.readouterr().err)
    assert run(["quantize", str(talkie), str(tmp_path / "target"), "--bits", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def tensors_of_floats(talkie: Path) -> list[np.ndarray]:
    """The source's tensors as the folded layout counts them: without the head's gain."""
    return [value for name, value in tensors_of(talkie).items() if name != "lm_head_gain.w_g"]


def test_a_matrix_is_quantized_once(talkie, tmp_path, monkeypatch):
    calls = []
    original = stream.quantize_array

    def counted(block, *arguments):
        calls.append(block.size)
        return original(block, *arguments)

    monkeypatch.setattr(stream, "quantize_array", counted)
    result = quantize(talkie, tmp_path / "target")
    assert sum(calls) == sum(int(np.prod(module.shape)) for module in result.plan)
