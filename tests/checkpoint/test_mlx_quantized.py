"""Quantized folders: their values as floats, and one clear line for each way they can be wrong."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from isomorph.checkpoint import from_array
from isomorph.checkpoint.mlx_quantized import dequantized, is_quantized, parse_quantization, quantized_modules
from isomorph.checkpoint.tensor import Tensor
from isomorph.errors import InputError
from isomorph.quantize.arrays import dequantize_array, quantize_array
from isomorph.quantize.settings import Settings

FOUR_BIT = Settings(4, 64)
QUANTIZATION = {"group_size": 64, "bits": 4, "mode": "affine"}


def module(path: str, settings: Settings = FOUR_BIT, shape=(6, 256), dtype=ml_dtypes.bfloat16) -> dict[str, Tensor]:
    weight = np.random.default_rng(len(path)).standard_normal(shape).astype(dtype)
    packed = quantize_array(weight, settings)
    parts = zip(("weight", "scales", "biases"), packed)
    return {f"{path}.{name}": from_array(f"{path}.{name}", part) for name, part in parts if part is not None}


def replaced(tensors: dict[str, Tensor], name: str, value: np.ndarray) -> dict[str, Tensor]:
    return {**tensors, name: from_array(name, value)}


def test_values_and_order():
    gain = from_array("a.gain", np.ones(3, np.float32))
    tensors = {
        **module("a.q"),
        "a.gain": gain,
        **module("a.k", Settings(8, 32)),
        **module("a.v", Settings.of(mode="mxfp4")),
    }
    quantization = {**QUANTIZATION, "a.k": {"bits": 8, "group_size": 32}, "a.v": {"mode": "mxfp4"}}
    assert is_quantized(tensors) and not is_quantized({"a.gain": gain})
    floats = dequantized(tensors, quantization)
    assert list(floats) == ["a.q.weight", "a.gain", "a.k.weight", "a.v.weight"]
    modules = quantized_modules(tensors, quantization)
    for path in ("a.q", "a.k", "a.v"):
        value = floats[f"{path}.weight"].read()
        assert value.shape == floats[f"{path}.weight"].shape == modules[path].shape == (6, 256)
        assert str(value.dtype) == floats[f"{path}.weight"].dtype == "bfloat16"
        streamed = np.concatenate(list(floats[f"{path}.weight"].blocks()))
        assert streamed.tobytes() == value.tobytes()
    wide = dequantized(tensors, quantization, dtype="float32")["a.q.weight"].read()
    assert wide.dtype == np.float32
    assert not np.array_equal(wide.astype(ml_dtypes.bfloat16).astype(np.float32), wide)


def test_runs_of_rows(monkeypatch):
    from isomorph.checkpoint import mlx_quantized

    tensors = module("m", Settings(3, 32), shape=(100, 96))
    monkeypatch.setattr(mlx_quantized, "BLOCK_BYTES", 96 * 2 * 7)
    tensor = dequantized(tensors, {"bits": 3, "group_size": 32})["m.weight"]
    blocks = list(tensor.blocks())
    assert [len(block) for block in blocks] == [7] * 14 + [2]
    assert np.concatenate(blocks).tobytes() == tensor.read().tobytes()


def test_stacked_experts():
    tensors = module("layers.0.switch_mlp.up_proj", shape=(3, 4, 128))
    tensor = dequantized(tensors, QUANTIZATION)["layers.0.switch_mlp.up_proj.weight"]
    assert tensor.shape == (3, 4, 128) and tensor.read().shape == (3, 4, 128)


def test_settings_that_the_config_leaves_out_are_inferred():
    """As mlx-lm does: the defaults where they fit, otherwise the only settings that the shapes allow."""
    tensors = {**module("a"), **module("b", Settings(3, 32))}
    modules = quantized_modules(tensors, QUANTIZATION)
    assert modules["a"].settings == Settings(4, 64) and modules["b"].settings == Settings(3, 32)
    # 6 bits in groups of 64 store as many bits a group as 3 in groups of 128: only the width can tell.
    ambiguous = {**module("a"), **module("c", Settings(6, 64))}
    with pytest.raises(InputError, match="add its own settings under 'quantization'"):
        quantized_modules(ambiguous, QUANTIZATION)
    assert quantized_modules(ambiguous, QUANTIZATION, {"a": 256, "c": 256})["c"].settings == Settings(6, 64)
    assert quantized_modules(ambiguous, {**QUANTIZATION, "c": {"bits": 6, "group_size": 64}})["c"].shape == (6, 256)
    # Defaults that nothing has are a mistake, even where shapes allow one reading only.
    with pytest.raises(InputError, match=r"expected 4-bit affine in groups of 64, .* found 'b' with 3-bit"):
        quantized_modules(module("b", Settings(3, 32)), QUANTIZATION)


def test_entries_of_the_config():
    quantization = {**QUANTIZATION, "a": {"bits": 8}, "b": False, "c": {"mode": "mxfp8"}, "linear_class": "x"}
    default, own = parse_quantization(quantization)
    assert default == Settings(4, 64)
    # What an entry leaves out comes from the mode's defaults, as mlx-lm fills it, not from the folder's.
    assert own == {"a": Settings(8, 64), "b": None, "c": Settings(8, 32, "mxfp8")}


def faults():
    """Each way a folder can be wrong: (what, tensors, quantization, part of the message)."""
    good = module("m")
    words, scales, biases = (good[f"m.{part}"].read() for part in ("weight", "scales", "biases"))
    without = {
        part: {name: t for name, t in good.items() if name != f"m.{part}"} for part in ("weight", "scales", "biases")
    }
    yield (
        "no scales",
        without["scales"],
        QUANTIZATION,
        "expected m.scales beside the packed words of 'm.weight'; found none",
    )
    yield "no biases", without["biases"], QUANTIZATION, "expected m.biases beside its scales; found none"
    yield "no words", without["weight"], QUANTIZATION, "expected m.weight beside 'm.scales'; found none"
    yield "no config", good, None, "expected 'quantization' in config.json"
    yield "config of another kind", good, "4bit", "expected an object as 'quantization' in config.json"
    yield "no bits", good, {"group_size": 64}, "expected bits and group_size under 'quantization'"
    yield "bits of null", good, {"group_size": 64, "bits": None}, "expected bits and group_size under 'quantization'"
    yield "kept, it says", good, {**QUANTIZATION, "m": False}, "expected 'm' as plain weights"
    yield (
        "other bits",
        good,
        {**QUANTIZATION, "m": {"bits": 8}},
        "expected m with 8 bits in groups of 64; found 32 words",
    )
    yield (
        "other groups",
        good,
        {**QUANTIZATION, "m": {"bits": 4, "group_size": 32}},
        "expected m with 4 bits in groups of 32",
    )
    yield (
        "impossible bits",
        good,
        {**QUANTIZATION, "m": {"bits": 7}},
        "quantization of 'm': expected bits of 2, 3, 4, 5, 6, 8",
    )
    yield "impossible group", good, {"bits": 4, "group_size": 48}, "expected group_size of 32, 64, 128"
    yield "unknown mode", good, {**QUANTIZATION, "mode": "int4"}, "expected a mode of affine, mxfp4"
    yield "unknown key", good, {**QUANTIZATION, "m": {"bit": 4}}, "found 'bit'"
    cut = replaced(good, "m.scales", scales[:, :3])
    yield "too few scales", cut, QUANTIZATION, "expected m with 4 bits in groups of 64"
    yield (
        "too few rows",
        replaced(good, "m.scales", scales[:5]),
        QUANTIZATION,
        "with the same rows; found [6, 32] and [5, 4]",
    )
    yield "words cut", replaced(good, "m.weight", words[:, :30]), QUANTIZATION, "found 30 words and 4 scales a row"
    yield "one axis", replaced(good, "m.scales", scales[0]), QUANTIZATION, "with the same rows"
    yield "empty", replaced(good, "m.scales", scales[:, :0]), QUANTIZATION, "with the same rows"
    yield (
        "float words",
        replaced(good, "m.weight", words.astype(np.float32)),
        QUANTIZATION,
        "expected packed uint32 words",
    )
    yield (
        "integer scales",
        replaced(good, "m.scales", scales.astype(np.int32)),
        QUANTIZATION,
        "expected m.scales as float32",
    )
    other = replaced(good, "m.biases", biases.astype(np.float32))
    yield (
        "biases of another dtype",
        other,
        QUANTIZATION,
        "expected m.biases like its scales, bfloat16 [6, 4]; found float32",
    )
    yield "biases of another shape", replaced(good, "m.biases", biases[:, :2]), QUANTIZATION, "found bfloat16 [6, 2]"
    mx = module("m", Settings.of(mode="mxfp4"))
    microscaled = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    yield "float scales in mxfp4", replaced(mx, "m.scales", np.ones((6, 8), np.float16)), microscaled, "with 4 bits"
    yield "biases in mxfp4", {**mx, "m.biases": good["m.biases"]}, microscaled, "expected no biases in mode mxfp4"
    plain = {"m.weight": from_array("m.weight", np.ones((6, 256), np.float16))}
    yield (
        "config promises more",
        plain,
        {**QUANTIZATION, "m": {"bits": 4}},
        "expected 'm' quantized, as config.json says",
    )
    scaled = {**good, "m.global_scale": from_array("m.global_scale", np.ones(1, np.float32))}
    yield "global scale", scaled, QUANTIZATION, "found m.global_scale, which is not supported"


@pytest.mark.parametrize(("tensors", "quantization", "message"), [pytest.param(*f[1:], id=f[0]) for f in faults()])
def test_malformed(tensors, quantization, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        dequantized(tensors, quantization)
    assert "\n" not in str(caught.value)


def test_all_faults_are_counted():
    tensors = {name: t for path in "abc" for name, t in module(path).items() if not name.endswith("biases")}
    with pytest.raises(InputError, match=r"expected a.biases .* \(and 2 more faults\)"):
        dequantized(tensors, QUANTIZATION)


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite(part, value):
    tensors = module("m")
    broken = tensors[f"m.{part}"].read().copy()
    broken[2, 1] = value
    tensor = dequantized(replaced(tensors, f"m.{part}", broken), QUANTIZATION)["m.weight"]
    for read in (tensor.read, lambda: list(tensor.blocks())):
        with pytest.raises(InputError, match=f"expected finite {part}; found NaN or infinity in m.{part}"):
            read()


@pytest.mark.parametrize(("mode", "code"), [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F), ("nvfp4", 0xFF)])
def test_eight_bit_scales_that_are_not_finite(mode, code):
    settings = Settings.of(mode=mode)
    tensors = module("m", settings)
    broken = tensors["m.scales"].read().copy()
    broken[0, 0] = code
    with pytest.raises(InputError, match=r"found NaN or infinity in m\.scales"):
        dequantized(replaced(tensors, "m.scales", broken), settings.to_dict())["m.weight"].read()


def test_values_equal_the_array_functions():
    weight = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float16)
    packed = quantize_array(weight, Settings(5, 32))
    tensors = {f"m.{name}": from_array(f"m.{name}", part) for name, part in packed._asdict().items()}
    value = dequantized(tensors, {"bits": 5, "group_size": 32})["m.weight"].read()
    assert value.tobytes() == dequantize_array(packed, Settings(5, 32)).tobytes()
