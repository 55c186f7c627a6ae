"""The torch framework: our own models and, through stock Transformers, everybody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import isomorph
from conftest import assert_logits_close
from isomorph import InputError
from isomorph.frameworks.torch import TorchModel
from tiny import tiny_config, write_checkpoint

MODELING = Path(isomorph.__file__).parent / "architectures" / "talkie" / "modeling_torch.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Absolute positions: whoever counts padding is found out."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def ids_of(model: Any, rows: int = 2, length: int = 12) -> np.ndarray:
    return np.random.default_rng(7).integers(0, model.vocab_size, (rows, length))


def refused(source: Path, **options: Any) -> str:
    """The one line with which loading `source` is refused."""
    with pytest.raises(InputError) as caught:
        isomorph.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("expected"), message
    return message


# Our own


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_stored_one_unless_asked(tmp_path: Path, stored: str) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(dtype=stored, torch_dtype=stored))
    model: Any = isomorph.load(folder)
    assert model.dtype == stored
    wide: Any = isomorph.load(folder, dtype="float32")
    assert wide.dtype == "float32"
    tensors = load_file(folder / "model.safetensors")
    for loaded in (model, wide):
        assert isinstance(loaded, TorchModel)
        assert not loaded.module.training
        for name, parameter in loaded.module.named_parameters():
            assert str(parameter.dtype) == f"torch.{loaded.dtype}"
            assert not parameter.requires_grad
            np.testing.assert_array_equal(parameter.float().numpy(), tensors[name].astype(np.float32))
    assert model.logits(ids_of(model)).dtype == np.float32


def test_facts_of_the_model(tmp_path: Path) -> None:
    model: Any = isomorph.load(write_checkpoint(tmp_path, tiny_config()))
    facts = (model.framework, model.architecture, model.vocab_size, model.num_layers, model.max_positions)
    assert facts == ("torch", "talkie", 96, 3, 256)
    assert model.config.hidden_size == 48
    with pytest.raises(InputError, match="256"):
        model.logits(np.zeros((1, 257), np.int64))


def test_a_folded_head_stays_as_stored(tmp_path: Path) -> None:
    """In float32 the folded bfloat16 head keeps its rounding, as in every other library."""
    source = write_checkpoint(tmp_path / "source", tiny_config(dtype="bfloat16", torch_dtype="bfloat16"))
    isomorph.convert(source, tmp_path / "folded", to="transformers", layout="transformers-folded")
    plain: Any = isomorph.load(source, dtype="float32")
    folded: Any = isomorph.load(tmp_path / "folded", dtype="float32")
    weights = load_file(source / "model.safetensors")
    rounded = (weights["lm_head"] * weights["lm_head_gain.w_g"]).astype(np.float32)
    np.testing.assert_array_equal(folded.module.lm_head.weight.numpy(), rounded)
    ids = ids_of(plain)
    assert np.abs(folded.logits(ids) - plain.logits(ids)).max() > 1e-3
    np.testing.assert_array_equal(isomorph.load(tmp_path / "folded").logits(ids), isomorph.load(source).logits(ids))


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert "'abacus'" in refused(folder, device="abacus")
    if not torch.cuda.is_available():
        assert "cuda" in refused(folder, device="cuda")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model: Any = isomorph.load(write_checkpoint(tmp_path / "three"))
    other: Any = isomorph.load(write_checkpoint(tmp_path / "two", tiny_config(num_hidden_layers=2)))
    wide: Any = isomorph.load(tmp_path / "three", dtype="bfloat16")
    state = model.decode_state(1)
    state.feed(ids_of(model, rows=1))
    state.save(tmp_path / "state")
    for stranger in (other, wide):
        with pytest.raises(InputError, match="feed the tokens anew"):
            stranger.load_decode_state(tmp_path / "state")
        with pytest.raises(InputError, match="same model"):
            stranger.decode_state(1).extend(state)
    assert not list(tmp_path.glob("*.partial"))


def test_left_padding_of_a_whole_row_is_refused(tmp_path: Path) -> None:
    model: Any = isomorph.load(write_checkpoint(tmp_path))
    with pytest.raises(InputError, match="left_padding"):
        model.decode_state(2, left_padding=[0, 12]).feed(ids_of(model))


# Everybody else's


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stock_model(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    model: Any = isomorph.load(folder)
    assert (model.architecture, model.dtype, model.max_positions) == (family, "float32", 64)
    ids = ids_of(model)
    reference = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[family].from_pretrained(folder)
    with torch.no_grad():
        out = reference(torch.from_numpy(ids), output_hidden_states=True)
    np.testing.assert_array_equal(model.logits(ids), out.logits.numpy())
    states = model.hidden_states(ids)
    assert len(states) == model.num_layers + 1
    # Transformers' last entry is normalised; ours never are.
    for ours, theirs in zip(states[:-1], out.hidden_states):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert np.abs(states[-1] - out.hidden_states[-1].numpy()).max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stock_decode_state(family: str, request: pytest.FixtureRequest) -> None:
    model: Any = isomorph.load(request.getfixturevalue(family))
    ids = ids_of(model)
    full = model.logits(ids)
    state = model.decode_state(2, left_padding=[0, 3])
    padded = np.stack([ids[0], np.concatenate([[89] * 3, ids[1, :-3]])])
    logits = np.concatenate([state.feed(padded[:, :8]), state.feed(padded[:, 8:9]), state.feed(padded[:, 9:])], axis=1)
    assert_logits_close(logits[0], full[0])
    assert_logits_close(logits[1, 3:], full[1, :-3])
    state.trim(4)
    state.reorder([1, 1, 0])
    assert_logits_close(state.feed(ids[[1, 1, 0], 5:7])[:2], full[[1, 1], 5:7])
    mask = np.array([[True] * 12, [False] * 3 + [True] * 9])
    assert_logits_close(model.logits(padded, attention_mask=mask)[1, 3:], full[1, :-3])


def test_stock_model_with_sliding_windows(shared: Path) -> None:
    """gpt-oss: windows of 8 in every other layer, prompts of 48."""
    folder = shared / "golden/gpt-oss/public"
    model: Any = isomorph.load(folder / "hf")
    expected = np.load(folder / "expected.npz")
    ids = expected["input_ids"]
    assert_logits_close(model.logits(ids), expected["logits"])
    for ours, theirs in zip(model.hidden_states(ids[:1])[1:], expected["hidden_states"]):
        assert_logits_close(ours, theirs)
    state = model.decode_state(2)
    state.feed(ids)
    state.trim(20)
    assert_logits_close(state.feed(ids[:, 28:]), expected["logits"][:, 28:])


def test_stock_dtype(llama: Path) -> None:
    model: Any = isomorph.load(llama, dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert model.logits(ids_of(model)).dtype == np.float32


def broken(source: Path, target: Path, tensors: Any = None, **config: Any) -> Path:
    """A copy of a stock folder with config keys set (None: removed) and `tensors` applied to its weights."""
    target.mkdir()
    values = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    weights = load_file(source / "model.safetensors")
    save_file(tensors(weights) if tensors else weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_unloadable_stock_folders_are_refused(llama: Path, tmp_path: Path) -> None:
    assert "did you mean 'llama'" in refused(broken(llama, tmp_path / "type", model_type="lama"))
    renamed = lambda weights: {name.replace("q_proj", "q_projection"): value for name, value in weights.items()}
    assert "did you mean" in refused(broken(llama, tmp_path / "names", renamed))
    assert "another shape and 8 more" in refused(broken(llama, tmp_path / "shape", intermediate_size=64))


def test_code_of_a_repository_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "fork", seed=5)
    ours: Any = isomorph.load(folder)
    config = tiny_config(
        model_type="talkie_fork",
        auto_map={
            "AutoConfig": "modeling_torch.TalkieConfig",
            "AutoModelForCausalLM": "modeling_torch.TalkieForCausalLM",
        },
    )
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    code = MODELING.read_text() + f"\nfrom pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "modeling_torch.py").write_text(code.replace('model_type = "talkie"', 'model_type = "talkie_fork"'))
    assert "trust_remote_code" in refused(folder)
    assert not marker.exists()
    theirs: Any = isomorph.load(folder, trust_remote_code=True)
    assert marker.exists()
    np.testing.assert_array_equal(theirs.logits(ids_of(ours)), ours.logits(ids_of(ours)))
