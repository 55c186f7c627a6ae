"""gpt-oss quantized: the published build, the lossless one, and what stock mlx-lm makes of the same source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import isomorph
from isomorph.architectures.gpt_oss.config import GptOssConfig
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.mlx_quantized import parse_quantization, unquantized
from isomorph.cli import run
from isomorph.errors import InputError
from isomorph.quantize.settings import Settings
from isomorph.quantize.write import Module, Quantized, quantize
from quantize.test_write import assert_same, config_of, stock_result, tensors_of
from tiny_gpt_oss import float_tensors, tiny_config, tiny_tensors

#: Options -> payload of the real 20B in bytes: matrices by settings, and 13.9 MB of biases, norms and sinks.
SIZES = {
    "--bits 6 --group-size 32": 18_308_669_568,
    "--bits 5 --group-size 32": 15_695_472_768,
    "--bits 4 --group-size 32": 13_082_275_968,
    "--bits 8 --group-size 64": 22_228_464_768,
    "--recipe lossless": 12_076_119_168,
    "--recipe lossless --set expert=5/32": 16_256_496_768,
    "--bits 6 --group-size 32 --set expert=mxfp4": 11_739_504_768,
    "--bits 6 --group-size 32 --set embed=keep": 18_960_194_688,
    "--bits 6 --group-size 32 --set embed=keep --set head=keep": 19_611_719_808,
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published 20B, as far as its config.json goes."""
    folder = tmp_path_factory.mktemp("real")
    config = GptOssConfig().to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: experts in MXFP4, the rest bfloat16; widths that groups of 64 divide."""
    folder = tmp_path_factory.mktemp("source")
    config = tiny_config(intermediate_size=64, dtype="bfloat16", torch_dtype="bfloat16")
    tensors = tiny_tensors(config)
    floats = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items() if value.dtype == np.float32}
    save_file(tensors | floats, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return folder


@pytest.fixture(scope="module")
def floats(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in bfloat16 as mlx-lm holds them, without our model file: stock mlx-lm converts them."""
    folder = tmp_path_factory.mktemp("floats") / "mlx"
    isomorph.convert(packed, folder, to="mlx", dequantize=True)
    config = {key: value for key, value in config_of(folder).items() if key != "model_file"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def expert_values(folder: Path) -> dict[str, np.ndarray]:
    """Every expert matrix as float32."""
    tensors = unquantized(open_checkpoint(folder), "float32").tensors
    return {name: value.read() for name, value in tensors.items() if "experts" in name and name.endswith(".weight")}


def settings_by_module(config: dict, result: Quantized) -> dict[str, Settings | None]:
    """What a config.json says of each quantized matrix."""
    default, own = parse_quantization(config["quantization"])
    return {module.path: own.get(module.path, default) for module in result.plan if module.bits}


def experts_of(result: Quantized) -> list[Module]:
    return [module for module in result.plan if module.role == "expert" and module.bits]


@pytest.mark.parametrize("options", SIZES)
def test_sizes_of_the_real_model(options: str, real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(real), str(real / "none"), *options.split(), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["payload_bytes"] == SIZES[options]
    assert found["parameters"] == 20_914_757_184
    experts = [module for module in found["plan"] if module["role"] == "expert" and module["bits"]]
    assert len(experts) == 72 and {module["grid"] for module in experts} == {"mxfp4"}
    assert all(module["exact"] for module in experts) == (options[7:9] not in ("4 ", "8 "))


def test_the_sum_by_hand(real: Path) -> None:
    """6 bits and two 16-bit numbers a group of 32, the router at 8 bits in groups of 64, and what is no matrix."""
    hidden, experts, layers, vocabulary, heads, groups = 2880, 32, 24, 201088, 64 * 64, 8 * 64
    matrices = 2 * vocabulary * hidden + layers * hidden * (2 * heads + 2 * groups + 3 * experts * hidden)
    routers = layers * experts * hidden
    vectors = layers * (2 * hidden + heads + 2 * groups + hidden + 64 + experts) + hidden
    biases = layers * experts * 3 * hidden
    assert SIZES["--bits 6 --group-size 32"] == matrices * 7 // 8 + routers * 17 // 16 + 2 * (vectors + biases)
    assert matrices + routers + vectors + biases == 20_914_757_184


def test_sizes_of_the_120b(tmp_path: Path) -> None:
    """From its config.json, against the sum by hand: MXFP4 has 17 bytes for 32 weights, 8-bit / 64 has 17 for 16."""
    layers, experts, hidden, vocabulary = 36, 128, 2880, 201088
    config = GptOssConfig(num_hidden_layers=layers, num_local_experts=experts).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    stacks = layers * experts * 3 * hidden**2
    matrices = 2 * vocabulary * hidden + layers * hidden * (2 * 64 * 64 + 2 * 8 * 64 + experts)
    vectors = layers * (3 * hidden + 64 * 64 + 2 * 8 * 64 + 64 + experts + 3 * experts * hidden) + hidden
    assert stacks + matrices + vectors == 116_829_156_672
    published, lossless = (
        isomorph.inspect(tmp_path),
        quantize(tmp_path, tmp_path / "n", recipe="lossless", dry_run=True),
    )
    assert published.parameters == lossless.parameters == stacks + matrices + vectors
    assert published.payload_bytes == stacks * 17 // 32 + 2 * (matrices + vectors) == 65_248_815_744
    assert lossless.payload_bytes == stacks * 17 // 32 + matrices * 17 // 16 + 2 * vectors == 63_254_703_744


@pytest.mark.parametrize(("bits", "group_size"), [(6, 32), (5, 32), (4, 32), (8, 64)])
def test_the_published_build(bits: int, group_size: int, packed: Path, floats: Path, tmp_path: Path) -> None:
    """Rounded again, as it was published: bit for bit what stock mlx-lm makes of the dequantized weights."""
    pytest.importorskip("mlx_lm")
    expected, config = stock_result(floats, tmp_path / "stock", bits=bits, group_size=group_size)
    result = quantize(packed, tmp_path / "own", bits, group_size, requantize=True)
    assert_same(tensors_of(tmp_path / "own"), expected)
    assert settings_by_module(config_of(tmp_path / "own"), result) == settings_by_module(config, result)
    assert result.requantized and not any(module.exact for module in result.plan)
    assert sum(value.nbytes for value in expected.values()) == result.payload_bytes


def test_stock_convert_leaves_experts_alone(packed: Path, tmp_path: Path) -> None:
    """`mlx_lm.convert -q --q-bits 6 --q-group-size 32` on the published files: not the published 6-bit build."""
    pytest.importorskip("mlx_lm")
    expected, config = stock_result(packed, tmp_path / "stock", bits=6, group_size=32)
    result = quantize(packed, tmp_path / "own", 6, 32, overrides=["expert=mxfp4"])
    assert_same(tensors_of(tmp_path / "own"), expected)
    assert settings_by_module(config_of(tmp_path / "own"), result) == settings_by_module(config, result)
    assert all(module.exact for module in experts_of(result))


@pytest.mark.parametrize(("bits", "group_size"), [(6, 32), (5, 32), (8, 32)])
def test_experts_are_exact_where_the_bits_allow(bits: int, group_size: int, packed: Path, tmp_path: Path) -> None:
    """The published size, without the published error."""
    result = quantize(packed, tmp_path / "exact", bits, group_size)
    assert all(module.exact and module.grid == "mxfp4" for module in experts_of(result)) and not result.requantized
    quantize(packed, tmp_path / "rounded", bits, group_size, requantize=True)
    isomorph.convert(packed, tmp_path / "source", to="mlx")
    source, exact, rounded = (expert_values(tmp_path / name) for name in ("source", "exact", "rounded"))
    assert len(source) == 9
    for name, values in source.items():
        assert np.array_equal(exact[name], values), name
        assert not np.array_equal(rounded[name], values), name
    assert tensors_of(tmp_path / "exact").keys() == tensors_of(tmp_path / "rounded").keys()


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_what_would_be_lossy_is_refused(bits: int, group_size: int, packed: Path, floats: Path, tmp_path: Path) -> None:
    """Packed or as floats, with the loss that it would have."""
    loss = quantize(packed, tmp_path / "asked", bits, group_size, requantize=True).loss
    assert loss is not None
    for source in (packed, floats):
        with pytest.raises(InputError, match=r"4-bit mxfp4 in groups of 32 already.*loses (\S+)%") as refused:
            quantize(source, tmp_path / "target", bits, group_size)
        stated = float(re.findall(r"loses (\S+)%", str(refused.value))[0]) / 100
        assert 0.5 < stated / loss.max_relative_rms < 1.5
        assert not (tmp_path / "target").exists()


def test_lossless_keeps_every_code(packed: Path, floats: Path, tmp_path: Path) -> None:
    """Packed experts pass through; from floats they are found again, down to the sign of zero."""
    from_packed = quantize(packed, tmp_path / "packed", recipe="lossless")
    from_floats = quantize(floats, tmp_path / "floats", recipe="lossless")
    assert from_packed.payload_bytes == from_floats.payload_bytes and from_packed.layout == "mlx-lm"
    assert {(module.bits, module.mode) for module in experts_of(from_floats)} == {(4, "mxfp4")}
    isomorph.convert(packed, tmp_path / "mlx", to="mlx")
    source, stored = tensors_of(tmp_path / "mlx"), tensors_of(tmp_path / "packed")
    words = [name for name in source if "experts" in name and name.endswith((".weight", ".scales"))]
    assert len(words) == 18
    assert_same({name: stored[name] for name in words}, {name: source[name] for name in words})
    wanted, found = expert_values(tmp_path / "mlx"), expert_values(tmp_path / "floats")
    for name, values in wanted.items():
        assert values.tobytes() == found[name].tobytes(), name


def test_affine_and_back_to_the_published_files(packed: Path, tmp_path: Path) -> None:
    """MXFP4 -> affine 5/32 -> MXFP4: the same blocks, but that -0 has become 0."""
    others = dict.fromkeys(("embed", "head", "q", "k", "v", "o", "router"), False)
    kept = {"expert": {"bits": 5, "group_size": 32}, **others}
    quantize(packed, tmp_path / "affine", recipe=kept)
    quantize(tmp_path / "affine", tmp_path / "again", recipe="lossless", overrides=["*=keep", "expert=mxfp4"])
    isomorph.convert(tmp_path / "again", tmp_path / "published", to="transformers")
    source, back = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "published"))
    for name, values in source.items():
        if name.endswith("_blocks"):
            low, high = values & 15, values >> 4
            values = np.where(low == 8, 0, low) | np.where(high == 8, 0, high).astype(np.uint8) << np.uint8(4)
            assert (low == 8).any()
        assert values.tobytes() == back[name].tobytes(), name


def test_a_fine_tune_on_no_grid_needs_no_permission(tmp_path: Path) -> None:
    """Weights that somebody trained on: nothing to lose that was not always lost."""
    config = tiny_config(intermediate_size=64)
    values = float_tensors(tiny_tensors(config))
    tuned = {
        name: value + np.float32(1e-3) * np.sin(np.arange(value.size, dtype=np.float32)).reshape(value.shape)
        for name, value in values.items()
    }
    (tmp_path / "source").mkdir()
    save_file(tuned, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    result = quantize(tmp_path / "source", tmp_path / "own", bits=4, group_size=32)
    assert not any(module.exact or module.grid for module in result.plan)
