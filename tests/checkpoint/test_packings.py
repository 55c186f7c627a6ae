"""Checkpoints of other quantizers: read as MLX stores the same weights, to the bit, or refused.

Every format is written here from its own definition, one code at a time, and its weights computed in float64.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

import isomorph
from conftest import assert_logits_close
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.mlx_quantized import quantized_modules, unquantized
from isomorph.errors import InputError
from isomorph.quantize.write import quantize

N, K = 64, 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)

Stored = tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]


def stream_of_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, n] as one little-endian number a row, in int32 words [R, n * bits / 32]."""
    rows = []
    for row in codes:
        number = sum(int(code) << bits * place for place, code in enumerate(row))
        rows.append([number >> 32 * word & 0xFFFFFFFF for word in range(len(row) * bits // 32)])
    return np.array(rows, np.uint32).view(np.int32)


def drawn(bits: int, groups: int, seed: int = 3, scale: Any = np.float16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points [N, G] and scales [N, G]."""
    random = np.random.default_rng(seed)
    codes, zeros = random.integers(0, 1 << bits, (N, K)), random.integers(1, 1 << bits, (N, groups))
    return codes, zeros, random.uniform(0.002, 0.02, (N, groups)).astype(scale)


def integers(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(code - zero) * scale, float64 [N, K]."""
    wide = K // scales.shape[1]
    return (codes - np.repeat(zeros, wide, axis=1)) * np.repeat(scales.astype(np.float64), wide, axis=1)


def awq(groups: int = 2, order: tuple[int, ...] = (0, 2, 4, 6, 1, 3, 5, 7)) -> Stored:
    """AutoAWQ, WQLinear_GEMM: eight outputs a word, in that order."""
    codes, zeros, scales = drawn(4, groups)

    def packed(values: np.ndarray) -> np.ndarray:
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for nibble, output in enumerate(order):
                words[:, column] |= values[:, 8 * column + output].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    tensors = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    entry = {"quant_method": "awq", "bits": 4, "group_size": K // groups, "zero_point": True, "version": "gemm"}
    return tensors, entry, integers(codes, zeros, scales)


def gptq(bits: int = 4, groups: int = 2, form: str = "gptq") -> Stored:
    """AutoGPTQ: codes down the inputs, zero points along the outputs, less one in the first form."""
    codes, zeros, scales = drawn(bits, groups)
    tensors = {
        "qweight": np.ascontiguousarray(stream_of_bits(codes, bits).T),
        "qzeros": stream_of_bits(zeros.T - (form == "gptq"), bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(K) // (K // groups)).astype(np.int32),
    }
    entry = {"quant_method": "gptq", "bits": bits, "desc_act": False, "checkpoint_format": form}
    return tensors, entry, integers(codes, zeros, scales)


def compressed(format: str, tensors: dict[str, np.ndarray], weights: np.ndarray, **arguments: Any) -> Stored:
    group = {"targets": ["Linear"], "weights": arguments}
    return tensors, {"quant_method": "compressed-tensors", "format": format, "config_groups": {"0": group}}, weights


def packed_integers(bits: int = 4, groups: int = 8, symmetric: bool = True) -> Stored:
    """compressed-tensors, pack_to_int32: codes and zero points count from the middle of their range."""
    codes, zeros, scales = drawn(bits, groups, scale=BFLOAT16)
    zeros = np.full_like(zeros, 1 << bits - 1) if symmetric else zeros
    tensors = {
        "weight_packed": stream_of_bits(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array([N, K], np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(stream_of_bits(zeros.T, bits).T)
    return compressed("pack-quantized", tensors, integers(codes, zeros, scales), num_bits=bits)


def bytes_a_channel() -> Stored:
    codes, _, scales = drawn(8, 1, scale=BFLOAT16)
    tensors = {"weight": (codes - 128).astype(np.int8), "weight_scale": scales}
    return compressed("int-quantized", tensors, integers(codes, np.full((N, 1), 128), scales), num_bits=8)


def fp8(shape: tuple[int, int] = (1, 2), powers: bool = True, key: str = "weight_scale_inv") -> Stored:
    random = np.random.default_rng(5)
    values = random.normal(0, 60, (N, K)).astype(np.float32).astype(E4M3)
    scales = np.float32(2.0) ** random.integers(-12, -8, shape) * (1 if powers else np.float32(1.1))
    wide = np.repeat(np.repeat(scales, N // shape[0], axis=0), K // shape[1], axis=1)
    weights = values.astype(np.float32) * wide
    weights = weights.astype(np.float64) if powers else weights.astype(BFLOAT16).astype(np.float64)
    tensors = {"weight": values, key: scales.astype(np.float32)}
    if key == "weight_scale":
        return compressed("float-quantized", tensors, weights, num_bits=8, type="float")
    entry = {"quant_method": "fp8", "weight_block_size": [N // shape[0], K // shape[1]], "fmt": "e4m3"}
    return tensors, entry, weights


def float4(scale: str, overall: float | None = None) -> Stored:
    random = np.random.default_rng(6)
    codes = random.integers(0, 16, (N, K))
    size = 32 if scale == "E8M0" else 16
    if scale == "E8M0":
        stored = random.integers(118, 124, (N, K // size)).astype(np.uint8)
        steps = 2.0 ** (stored.astype(np.float64) - 127)
    else:
        stored = random.uniform(1, 200, (N, K // size)).astype(E4M3)
        steps = (stored.astype(np.float32) / np.float32(overall or 1)).astype(np.float64)
    weights = E2M1[codes] * np.repeat(steps, size, axis=1)
    tensors = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8), "weight_scale": stored}
    if overall is not None:
        tensors["weight_global_scale"] = np.array([overall], np.float32)
        weights = weights.astype(BFLOAT16).astype(np.float64)
    name = "mxfp4-pack-quantized" if scale == "E8M0" else "nvfp4-pack-quantized"
    return compressed(name, tensors, weights, num_bits=4, type="float")


#: Name -> what is stored, and what the quantizer calls exact: mode, bits, group size; None for floats.
FORMATS: dict[str, tuple[Callable[[], Stored], tuple[str, int, int] | None]] = {
    "awq": (awq, ("affine", 4, 128)),
    "awq in groups of 64": (lambda: awq(4), ("affine", 4, 64)),
    "gptq": (gptq, ("affine", 4, 128)),
    "gptq_v2": (lambda: gptq(form="gptq_v2"), ("affine", 4, 128)),
    "gptq 2-bit": (lambda: gptq(2, 8), ("affine", 2, 32)),
    "gptq 3-bit": (lambda: gptq(3, 2), ("affine", 3, 128)),
    "gptq 8-bit, a group a row": (lambda: gptq(8, 1), ("affine", 8, 128)),
    "compressed-tensors": (packed_integers, ("affine", 4, 32)),
    "compressed-tensors with zero points": (lambda: packed_integers(4, 2, False), ("affine", 4, 128)),
    "compressed-tensors 8-bit": (lambda: packed_integers(8, 2), ("affine", 8, 128)),
    "compressed-tensors int8": (bytes_a_channel, ("affine", 8, 128)),
    "fp8 with powers of two": (fp8, ("mxfp8", 8, 32)),
    "fp8": (lambda: fp8(powers=False), None),
    "compressed-tensors fp8": (lambda: fp8((N, 1), False, "weight_scale"), None),
    "compressed-tensors mxfp4": (lambda: float4("E8M0"), ("mxfp4", 4, 32)),
    "compressed-tensors nvfp4": (lambda: float4("E4M3", 1.0), ("nvfp4", 4, 16)),
    "compressed-tensors nvfp4, scaled": (lambda: float4("E4M3", 300.0), None),
}


def write(
    folder: Path, stored: Stored, *paths: str, beside: dict[str, np.ndarray] | None = None, **config: Any
) -> Path:
    """A folder whose matrices at `paths` are all `stored`."""
    tensors, entry, _ = stored
    values = {f"{path}.{part}": value for path in paths or ("layer",) for part, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(values | (beside or {}), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": entry} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> np.ndarray:
    """The matrix `layer` as float64."""
    tensors = unquantized(open_checkpoint(folder), "float32").tensors
    assert list(tensors) == ["layer.weight"]
    return tensors["layer.weight"].read().astype(np.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same_weights(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, exact = FORMATS[name]
    stored = make()
    checkpoint = open_checkpoint(write(tmp_path, stored))
    assert checkpoint.packing == stored[1]["quant_method"] and checkpoint.tensors["layer.weight"].shape[0] == N
    modules = quantized_modules(checkpoint.tensors, checkpoint.quantization)
    settings = modules["layer"].settings if modules else None
    assert exact == (None if settings is None else (settings.mode, settings.bits, settings.group_size))
    assert ("read as bfloat16" in caplog.text) == (exact is None)
    assert np.array_equal(weights_of(tmp_path), stored[2])
    for tensor in checkpoint.tensors.values():
        value = tensor.read()
        assert (value.shape, str(value.dtype)) == (tensor.shape, tensor.dtype)
        assert np.concatenate(list(tensor.blocks())).tobytes() == value.tobytes()


@pytest.mark.parametrize(
    "wrong", [lambda: awq(order=tuple(range(8))), lambda: awq(order=(0, 4, 1, 5, 2, 6, 3, 7)), lambda: gptq(3, 2)]
)
def test_another_order_shows(wrong: Callable[[], Stored], tmp_path: Path) -> None:
    """AWQ's nibbles in another order; GPTQ's zero points of the first form taken for the second's."""
    tensors, entry, weights = wrong()
    if entry["quant_method"] == "gptq":
        entry["checkpoint_format"] = "gptq_v2"
    assert not np.array_equal(weights_of(write(tmp_path, (tensors, entry, weights))), weights)


def test_what_mlx_reads_of_it(tmp_path: Path) -> None:
    """`mx.dequantize` gives the exact weights, in float16 those of AutoAWQ; biases of 16 bits, the control, do not."""
    mx = pytest.importorskip("mlx.core")
    stored = awq()
    module = quantized_modules(*_of(write(tmp_path, stored)))["layer"]
    assert module.biases is not None
    parts = [mx.array(part.read()) for part in (module.weight, module.scales, module.biases)]
    assert np.array_equal(np.array(mx.dequantize(*parts, group_size=128, bits=4)), stored[2])
    halves = module.dequantized("float16").read()
    assert halves.tobytes() == stored[2].astype(np.float16).tobytes()
    short = [parts[0], *(part.astype(mx.float16) for part in parts[1:])]
    found = np.array(mx.dequantize(*short, group_size=128, bits=4))
    assert not np.array_equal(found, halves) and not np.array_equal(np.array(short[2]), np.array(parts[2]))


def _of(folder: Path) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.tensors, checkpoint.quantization


@pytest.mark.parametrize("shape", [(1, 2), (N // 32, K // 64)])
def test_fp8_as_transformers_reads_it(shape: tuple[int, int], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, entry, _ = fp8(shape, powers=False)
    values = torch.from_numpy(tensors["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(tensors["weight_scale_inv"])
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16).float().numpy()
    found = weights_of(write(tmp_path, (tensors, entry, expected)))
    assert np.array_equal(found, expected)
    tensors["weight_scale_inv"] = tensors["weight_scale_inv"][:, ::-1].copy()
    assert not np.array_equal(weights_of(write(tmp_path, (tensors, entry, expected))), expected)


def test_fp8_blocks_that_the_matrix_ends_in(tmp_path: Path) -> None:
    """Blocks of 48: the last has fewer rows and columns, and 48 columns are no whole groups, so weights are floats."""
    tensors, entry, _ = fp8()
    scales = np.arange(1, 13, dtype=np.float32).reshape(2, 6)
    entry |= {"weight_block_size": [48, 48]}
    every = np.repeat(np.repeat(scales, 48, axis=0), 48, axis=1)[:N, :K]
    expected = (tensors["weight"].astype(np.float32) * every).astype(BFLOAT16).astype(np.float64)
    assert np.array_equal(
        weights_of(write(tmp_path, (tensors | {"weight_scale_inv": scales}, entry, expected))), expected
    )


def awq_with(**entry: Any) -> Stored:
    tensors, own, weights = awq()
    return tensors, own | entry, weights


def gptq_with(change: Callable[[dict[str, np.ndarray]], None], **entry: Any) -> Stored:
    tensors, own, weights = gptq()
    change(tensors)
    return tensors, own | entry, weights


def shuffled(tensors: dict[str, np.ndarray]) -> None:
    tensors["g_idx"] = np.random.default_rng(0).permutation(tensors["g_idx"])


def wrapped(tensors: dict[str, np.ndarray]) -> None:
    tensors["qzeros"][0, 0] = -1


def wide_scales(tensors: dict[str, np.ndarray]) -> None:
    tensors["scales"] = np.full(tensors["scales"].shape, 0.1, np.float32)


def cut(tensors: dict[str, np.ndarray]) -> None:
    tensors["qweight"] = tensors["qweight"][:, :-8].copy()


REFUSALS: dict[str, tuple[Callable[[], Stored], str]] = {
    "another packing": (lambda: awq_with(version="gemv"), "version gemv of 4 bits"),
    "act-order": (lambda: gptq_with(shuffled), r"act-order \(desc_act\) in layer.g_idx"),
    "an ambiguous zero point": (lambda: gptq_with(wrapped), "zero points below 15"),
    "marlin": (lambda: gptq_with(lambda tensors: None, is_marlin_format=True), "checkpoint_format marlin"),
    "scales of 32 bits": (lambda: gptq_with(wide_scales), "scales of 16 bits"),
    "groups of 16": (lambda: awq(16), "groups that 32 divides; found 16"),
    "another shape": (lambda: gptq_with(cut), r"expected layer.\w+ as"),
    "a part missing": (lambda: gptq_with(lambda tensors: tensors.__delitem__("scales")), "expected layer.scales"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_exact_form_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSALS[name]
    with pytest.raises(InputError, match=message):
        weights_of(write(tmp_path, make()))


DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "gone": lambda value: None,
    "flat": lambda value: value.reshape(-1),
    "halved": lambda value: value[: len(value) // 2],
    "deeper": lambda value: value[None],
    "of integers": lambda value: value.astype(np.float32).astype(np.int16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_parts_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """Or say something else, as half of a matrix does; they never come as anything but an InputError."""
    refused = 0
    tensors, entry, weights = FORMATS[name][0]()
    for part, damage in itertools.product(tensors, DAMAGES):
        changed = DAMAGES[damage](tensors[part])
        others = {key: value for key, value in tensors.items() if key != part}
        if changed is not None:
            others[part] = np.ascontiguousarray(changed)
        write(tmp_path, (others, entry, weights), beside={"other": np.ones(1)})
        try:
            checkpoint = open_checkpoint(tmp_path)
            for tensor in unquantized(checkpoint, "float32").tensors.values():
                tensor.read()
        except InputError as error:
            assert "\n" not in str(error), (part, damage)
            refused += 1
    assert refused >= 3 * len(tensors) - 3


LLAMA = {
    "torch_dtype": "float16",
    "vocab_size": 96,
    "hidden_size": K,
    "intermediate_size": K,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NARROW = ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")


@pytest.fixture(scope="module")
def others() -> dict[str, np.ndarray]:
    """What is not packed in the tiny llama below."""
    random = np.random.default_rng(8)
    layer = "model.layers.0."
    matrices = [f"{layer}self_attn.{name}_proj" for name in "qo"] + [
        f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    values = {f"{name}.weight": random.normal(0, 0.1, (K, K)) for name in matrices}
    values |= {f"{name}.weight": random.normal(0, 0.3, (96, K)) for name in ("model.embed_tokens", "lm_head")}
    norms = [f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"]
    values |= {f"{name}.weight": random.uniform(0.5, 1.5, K) for name in norms}
    return {name: value.astype(np.float16) for name, value in values.items()}


@pytest.mark.parametrize("name", ["awq", "gptq 3-bit", "fp8 with powers of two", "fp8", "compressed-tensors mxfp4"])
def test_a_model_runs_and_is_stored_without_loss(name: str, others: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Loaded as it is, quantized losslessly, converted and dequantized: the logits of the same weights as floats."""
    make, exact = FORMATS[name]
    stored = make()
    config = LLAMA | ({"torch_dtype": "bfloat16"} if exact is None else {})
    source = write(tmp_path / "source", stored, *NARROW, beside=others, **config)
    floats = {f"{path}.weight": stored[2].astype(np.float32) for path in NARROW}
    wide = {key: value.astype(np.float32) for key, value in others.items()}
    (tmp_path / "floats").mkdir()
    safetensors.save_file(floats | wide, tmp_path / "floats" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "floats" / "config.json").write_text(json.dumps(LLAMA | {"model_type": "llama"}))
    ids = np.random.default_rng(9).integers(0, 96, (1, 40))
    expected = isomorph.load(tmp_path / "floats", dtype="float32").logits(ids)
    assert_logits_close(isomorph.load(source, dtype="float32").logits(ids), expected)
    isomorph.convert(source, tmp_path / "dequantized", to="transformers", dequantize=True, dtype="float32")
    assert_logits_close(isomorph.load(tmp_path / "dequantized", dtype="float32").logits(ids), expected)

    keep = ["*=keep"] + ([f"{path}=mxfp8" for path in NARROW] if exact is None else [])
    result = quantize(source, tmp_path / "exact", recipe="lossless", overrides=keep, requantize=exact is None)
    stored_as = {(module.mode, module.bits, module.group_size) for module in result.plan if module.path in NARROW}
    assert stored_as == {exact or ("mxfp8", 8, 32)}
    assert result.payload_bytes == sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "exact").tensors.values())
    found = isomorph.load(tmp_path / "exact", dtype="float32").logits(ids)
    if exact is None:
        assert result.loss is not None and result.loss.mean_relative_rms > 0.01
        with pytest.raises(AssertionError):
            assert_logits_close(found, expected)
        return
    assert all(module.exact for module in result.plan)
    assert_logits_close(found, expected)
    isomorph.convert(source, tmp_path / "mlx", to="mlx")
    pytest.importorskip("mlx_lm")
    for folder in ("exact", "mlx"):
        assert_logits_close(isomorph.load(tmp_path / folder, framework="mlx", dtype="float32").logits(ids), expected)


def test_settings_that_hold_it_and_that_do_not(others: dict[str, np.ndarray], tmp_path: Path) -> None:
    """AWQ in groups of 128: the same codes in finer groups, or with more bits; fewer bits only when asked for."""
    source = write(tmp_path / "source", awq(), *NARROW, beside=others, **LLAMA)
    expected = unquantized(open_checkpoint(source), "float32").tensors[f"{NARROW[0]}.weight"].read()
    for bits, size in ((4, 128), (4, 64), (6, 32), (8, 128)):
        target = tmp_path / f"{bits}-{size}"
        result = quantize(source, target, bits, size)
        assert [module.exact for module in result.plan if module.path in NARROW] == [True, True]
        found = unquantized(open_checkpoint(target), "float32").tensors[f"{NARROW[0]}.weight"].read()
        assert np.array_equal(found, expected)
    with pytest.raises(InputError, match=r"4-bit affine in groups of 128 already.*loses \d"):
        quantize(source, tmp_path / "fewer", 3, 128)


def test_inspect_and_the_frameworks_say_what_it_is(
    tmp_path: Path, others: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "source", awq(), *NARROW, beside=others, **LLAMA)
    found = isomorph.inspect(source)
    assert "awq" in found.description and found.loads["isomorph"] == "torch"
    assert found.quantization is not None and found.quantization.modules == {"4-bit group 128 affine": 2}
    assert found.parameters == 2 * N * K + sum(value.size for value in others.values())
    pytest.importorskip("mlx_lm")
    with pytest.raises(InputError, match=r"found awq .* run isomorph quantize --recipe lossless"):
        isomorph.load(source, framework="mlx")
    with pytest.raises(InputError, match="transformers can hold as awq has them"):
        isomorph.convert(source, tmp_path / "target", to="transformers")
    (source / "model.safetensors").unlink()
    assert isomorph.inspect(source).bits_per_weight == 16
    assert "is quantized, its weights are not here: sizes are those of float16" in caplog.text


def test_experts_are_stacked_with_their_codes(tmp_path: Path) -> None:
    """A mixture of experts in AWQ, each expert alone: one stack of codes in torch and in what is written."""
    pytest.importorskip("mlx_lm")
    tensors, entry, weights = awq(groups=8)
    random = np.random.default_rng(10)
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.{name}_proj": (rows, K) for name, rows in (("q", K), ("k", 64), ("v", 64), ("o", K))}
    shapes |= {f"{layer}mlp.gate": (4, K), "model.embed_tokens": (96, K), "lm_head": (96, K)}
    shapes |= {f"{layer}self_attn.{name}_norm": (64,) for name in "qk"} | {"model.norm": (K,)}
    shapes |= {f"{layer}{name}_layernorm": (K,) for name in ("input", "post_attention")}
    others = {f"{name}.weight": random.normal(0, 0.1, shape).astype(np.float16) for name, shape in shapes.items()}
    experts = [f"{layer}mlp.experts.{expert}." for expert in range(4)]
    others |= {f"{expert}down_proj.weight": random.normal(0, 0.1, (K, N)).astype(np.float16) for expert in experts}
    paths = [f"{expert}{name}_proj" for expert in experts for name in ("gate", "up")]
    config = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config |= {"moe_intermediate_size": N, "norm_topk_prob": True, "mlp_only_layers": []}
    source = write(tmp_path / "source", (tensors, entry, weights), *paths, beside=others, **config)
    ids = np.random.default_rng(9).integers(0, 96, (1, 40))
    isomorph.convert(source, tmp_path / "floats", to="transformers", dequantize=True, dtype="float32")
    expected = isomorph.load(tmp_path / "floats", dtype="float32").logits(ids)
    assert_logits_close(isomorph.load(source, dtype="float32").logits(ids), expected)
    result = quantize(source, tmp_path / "exact", recipe="lossless", overrides=["*=keep"])
    stacks = [module for module in result.plan if module.bits]
    assert {(module.bits, module.group_size, module.shape, module.exact) for module in stacks} == {
        (4, 32, (4, N, K), True)
    }
    for framework in ("torch", "mlx"):
        found = isomorph.load(tmp_path / "exact", framework=framework, dtype="float32").logits(ids)
        assert_logits_close(found, expected)
    with pytest.raises(InputError, match="run isomorph quantize --recipe lossless"):
        isomorph.convert(source, tmp_path / "mlx", to="mlx")
