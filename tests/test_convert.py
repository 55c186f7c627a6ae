"""`isomorph.convert`: what a target folder holds, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isomorph import InputError, convert, quantize
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint import writer as writing
from tiny import tiny_config, write_checkpoint


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "source", tiny_config(bos_token_id=None, use_cache=True))


@pytest.mark.parametrize(
    ("to", "layout"),
    [(None, "mlx-lm"), ("mlx", "mlx-lm"), ("transformers", "transformers"), ("flax", "flax"), ("original", "original")],
)
def test_each_target_has_its_layout(tmp_path: Path, source: Path, to: str | None, layout: str) -> None:
    result = convert(source, tmp_path / "t", to)
    assert (result.layout, result.source_layout, result.architecture) == (layout, "transformers", "talkie")
    assert result.path == tmp_path / "t"
    assert result.files == sorted(path.name for path in (tmp_path / "t").iterdir())
    assert result.payload_bytes == sum(t.nbytes for t in open_checkpoint(tmp_path / "t").tensors.values())
    assert result.bits_per_weight == 32
    assert ("model.pt" in result.files) == (to == "original")


def test_config_says_what_stock_libraries_look_for(tmp_path: Path, source: Path) -> None:
    transformers = config_in(convert(source, tmp_path / "t", "transformers").path)
    assert transformers["auto_map"]["AutoModelForCausalLM"] == "modeling_torch.TalkieForCausalLM"
    assert transformers["use_cache"] is True
    assert transformers["rms_norm_eps"] == 1.1920928955078125e-07
    folded = config_in(convert(tmp_path / "t", tmp_path / "f", layout="mlx-folded").path)
    assert folded["model_file"] == "modeling_mlx.py"
    assert folded["lm_head_gain_folded"] is True
    assert "auto_map" not in folded
    plain = config_in(convert(tmp_path / "f", tmp_path / "p", "mlx", dtype="bfloat16").path)
    assert "model_file" not in plain
    assert plain["dtype"] == plain["torch_dtype"] == "bfloat16"


def test_modelling_code_is_a_verbatim_copy(tmp_path: Path, source: Path) -> None:
    import isomorph.architectures.talkie as talkie

    home = Path(talkie.__file__).parent
    for layout in ("transformers", "mlx-folded", "flax"):
        folder = convert(source, tmp_path / layout, layout=layout).path
        for code in folder.glob("*.py"):
            assert code.read_bytes() == (home / code.name).read_bytes()


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path: Path, source: Path) -> None:
    for options in ({"to": "mlx"}, {"layout": "mlx-folded", "dtype": "bfloat16"}, {"to": "original"}):
        plan = convert(source, tmp_path / "t", dry_run=True, **options)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
        done = convert(source, tmp_path / "t", **options)  # type: ignore[arg-type]
        assert sorted(plan.files) == done.files
        for key in ("layout", "dtype", "tensors", "parameters", "payload_bytes", "bits_per_weight"):
            assert getattr(plan, key) == getattr(done, key)
        # A plan for a target that exists is still a plan.
        assert convert(source, tmp_path / "t", dry_run=True, **options).dry_run  # type: ignore[arg-type]
        for path in (tmp_path / "t").iterdir():
            path.unlink()
        (tmp_path / "t").rmdir()


def test_a_dry_run_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "talkie", "torch_dtype": "bfloat16"}')
    plan = convert(tmp_path, tmp_path / "t", "mlx", dry_run=True)
    assert (plan.tensors, plan.parameters, plan.payload_bytes) == (443, 13_280_257_721, 26_560_515_442)
    assert plan.bits_per_weight == 16
    assert plan.files[0] == "model-00001-of-00006.safetensors"
    # Said before anything else that would be missing, such as room.
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    for verb in (partial(convert, to="mlx"), partial(quantize, bits=4)):
        with pytest.raises(InputError, match="only a config"):
            verb(tmp_path, tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_shards_and_their_index(tmp_path: Path, source: Path) -> None:
    result = convert(source, tmp_path / "t", "mlx", max_shard_bytes=100_000)
    shards = [name for name in result.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in result.files
    whole, parts = open_checkpoint(source).tensors, open_checkpoint(tmp_path / "t").tensors
    assert all(np.array_equal(whole[name].read(), parts[name].read()) for name in whole)


def test_a_repeated_conversion_gives_equal_bytes(tmp_path: Path, source: Path) -> None:
    for layout in ("original", "transformers-folded", "flax"):
        first = convert(source, tmp_path / f"{layout}-1", layout=layout).path
        second = convert(source, tmp_path / f"{layout}-2", layout=layout).path
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes()


def test_an_interrupted_conversion_goes_on(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(source, tmp_path / "whole", layout="mlx-folded").path
    original, calls = writing._write_tensor, []

    def interrupted(file: Any, tensor: Any, advance: Any) -> int:
        calls.append(tensor.name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(file, tensor, advance)

    monkeypatch.setattr(writing, "_write_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "t", layout="mlx-folded")
    assert not (tmp_path / "t").exists()
    calls[:] = ["already"] * 30
    convert(source, tmp_path / "t", layout="mlx-folded")
    assert len(calls) == 30 + 35 - 19
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes()


def test_a_source_that_changed_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "m", seed=0)
    original = writing._write_container

    def cut(path: Path, *rest: Any) -> None:
        original(path, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_container", cut)
        with pytest.raises(KeyboardInterrupt):
            convert(model, tmp_path / "t", "mlx")
    write_checkpoint(tmp_path / "m", seed=1)
    convert(model, tmp_path / "t", "mlx")
    new, old = open_checkpoint(tmp_path / "t").tensors, open_checkpoint(model).tensors
    assert all(np.array_equal(new[name].read(), old[name].read()) for name in old)


BAD = {
    "target exists": ({}, "does not exist"),
    "unknown to": ({"to": "mlxx"}, r"did you mean 'mlx'"),
    "unknown layout": ({"layout": "flaxx"}, r"did you mean 'flax'"),
    "layout of another framework": ({"to": "mlx", "layout": "flax"}, "mlx-lm or mlx-folded"),
    "unknown dtype": ({"dtype": "bf16"}, "bfloat16, float16, float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused(tmp_path: Path, source: Path, name: str) -> None:
    options, message = BAD[name]
    target = tmp_path / "t"
    if name == "target exists":
        target.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        convert(source, target, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_a_model_and_nothing_else(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "t", "transformers")
    convert(source, tmp_path / "t", "mlx", force=True)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    for target in (tmp_path / "photos", tmp_path):
        with pytest.raises(InputError, match="expected a model folder"):
            convert(source, target, "mlx", force=True)
    model = write_checkpoint(tmp_path / "m")
    for own in (model, tmp_path):
        with pytest.raises(InputError, match="apart from the source"):
            convert(model, own, "mlx", force=True)
    assert (tmp_path / "photos" / "cat.png").is_file()
    assert (model / "model.safetensors").is_file()


def test_a_bad_tensor_found_midway_leaves_nothing(tmp_path: Path, source: Path) -> None:
    folded = convert(source, tmp_path / "f", layout="mlx-folded").path
    other = convert(write_checkpoint(tmp_path / "o", seed=9), tmp_path / "g", layout="mlx-folded").path
    (folded / "lm_head_fold.npz").write_bytes((other / "lm_head_fold.npz").read_bytes())
    with pytest.raises(InputError, match=r"lm_head_fold\.npz"):
        convert(folded, tmp_path / "t", "transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "g", "o"]


def test_the_tokenizer_travels(tmp_path: Path, shared: Path) -> None:
    pytest.importorskip("torch")
    text = shared / "golden" / "talkie" / "text"
    ranks = len((text / "vocab.txt").read_text().split("\n")) - 1
    source = write_checkpoint(tmp_path / "m", tiny_config(vocab_size=ranks + 5))
    vocabulary = (text / "vocab.txt").read_bytes()
    original = convert(source, tmp_path / "original", "original").path
    (original / "vocab.txt").write_bytes(vocabulary)
    transformers = convert(original, tmp_path / "transformers", "transformers").path
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (transformers / name).is_file(), name
    mlx = convert(transformers, tmp_path / "mlx", "mlx").path
    assert (mlx / "tokenizer.json").read_bytes() == (transformers / "tokenizer.json").read_bytes()
    back = convert(mlx, tmp_path / "back", "original").path
    assert (back / "vocab.txt").is_file()


def llama(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_architectures_of_stock_libraries_are_copied(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    result = convert(source, tmp_path / "mlx", "mlx", dtype="bfloat16")
    assert (result.architecture, result.dtype) == ("llama", "bfloat16")
    assert config_in(result.path)["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in open_checkpoint(result.path).tensors.values()} == {"bfloat16"}
    mlx_lm = pytest.importorskip("mlx_lm")
    model, _ = mlx_lm.utils.load_model(result.path)
    assert model.model_type == "llama"
    from transformers import AutoModelForCausalLM

    copy = convert(source, tmp_path / "copy", "transformers")
    state = AutoModelForCausalLM.from_pretrained(copy.path).state_dict()
    original = open_checkpoint(source).tensors
    assert all(np.array_equal(state[name].numpy(), original[name].read()) for name in original)
    for options, message in (
        ({"to": "flax"}, "only makes copies"),
        ({"layout": "transformers"}, "only makes copies"),
        ({"to": "original"}, "only makes copies"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, tmp_path / "t", **options)  # type: ignore[arg-type]


def test_names_that_transformers_lacks_are_not_called_its_own(tmp_path: Path) -> None:
    from isomorph.checkpoint import safetensors_files, write_folder

    source = llama(tmp_path / "llama")
    whole = open_checkpoint(source)
    tensors = list(whole.tensors.values())
    files = {"config.json": json.dumps(whole.config).encode()}
    write_folder(tmp_path / "same", safetensors_files(tensors, {"format": "mlx"}), files, inputs=None)
    assert convert(tmp_path / "same", tmp_path / "back", "transformers").layout == "transformers"
    renamed = [tensors[0].renamed("model.other.weight"), *tensors[1:]]
    write_folder(tmp_path / "other", safetensors_files(renamed, {"format": "mlx"}), files, inputs=None)
    with pytest.raises(InputError, match=r"tensors of Transformers' llama; found .* lacks"):
        convert(tmp_path / "other", tmp_path / "t", "transformers")


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", tiny_config(model_type="talky"))
    with pytest.raises(InputError, match="'talky'"):
        convert(source, tmp_path / "t", "mlx")


def test_quantized_models_keep_their_codes_or_become_floats(tmp_path: Path) -> None:
    from isomorph import quantize

    sizes = {"hidden_size": 64, "intermediate_size": 128, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    source = write_checkpoint(tmp_path / "m", tiny_config(**sizes))
    quantize(source, tmp_path / "q", bits=4, group_size=32)
    before = open_checkpoint(tmp_path / "q")
    copy = convert(tmp_path / "q", tmp_path / "copy", "mlx")
    assert (copy.layout, copy.tensors) == ("mlx-folded", len(before.tensors))
    assert 4.5 < copy.bits_per_weight < 6
    after = open_checkpoint(copy.path)
    assert after.quantization == before.quantization
    assert all(after.tensors[n].read().tobytes() == t.read().tobytes() for n, t in before.tensors.items())
    floats = convert(tmp_path / "q", tmp_path / "f", "transformers", dtype="float32", dequantize=True)
    assert (floats.tensors, floats.bits_per_weight) == (36, 32)
    assert "quantization" not in config_in(floats.path)
    near, exact = open_checkpoint(floats.path).tensors, open_checkpoint(source).tensors
    name = "model.blocks.0.mlp.mlp_gate.weight"
    difference = near[name].read() - exact[name].read().astype(np.float32)
    assert 0 < np.abs(difference).max() < 0.5 * np.abs(exact[name].read().astype(np.float32)).max()
    for options, message in (
        ({"to": "transformers"}, "add --dequantize"),
        ({"to": "mlx", "dtype": "bfloat16"}, "no dtype for a quantized model"),
    ):
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "q", tmp_path / "t", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "t").exists()
