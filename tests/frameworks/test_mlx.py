"""The MLX backend: stock mlx-lm architectures against Transformers, caches of every kind, one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig

import isomorph
from isomorph import InputError
from isomorph.frameworks import mlx_state
from isomorph.frameworks.model import Model
from isomorph.verify.tolerance import allowed_logit_difference
from tiny import tiny_config, write_checkpoint

CONFIGS: dict[str, Any] = {
    # Keys and values in caches that grow.
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    # Sliding windows: caches that overwrite their oldest tokens.
    "gemma3_text": Gemma3TextConfig(
        vocab_size=64,
        hidden_size=64,  # mlx-lm rounds sqrt(hidden_size) to bfloat16, which is exact for 8
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        max_position_embeddings=64,
    ),
    # Recurrent: a state without positions.
    "mamba": MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, conv_kernel=4, expand=2, use_bias=False
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM

    base = tmp_path_factory.mktemp("stock")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                # Amplified: at the initial 0.02 nothing but the embedding shows. A_log are rates of decay, not weights.
                if parameter.ndim > 1 and "A_log" not in path:
                    parameter.normal_(0.0, 1.2 * parameter.shape[-1] ** -0.5)
        model.save_pretrained(base / name)
    return {name: base / name for name in CONFIGS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: isomorph.load(folder, framework="mlx") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (3, 24))


def assert_same(actual: np.ndarray, reference: np.ndarray) -> None:
    assert actual.shape == reference.shape and actual.size and np.isfinite(actual).all()
    assert np.abs(actual - reference).max() <= allowed_logit_difference(reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_architectures_give_what_transformers_gives(
    name: str, folders: dict[str, Path], models: dict[str, Model], ids: np.ndarray
) -> None:
    reference = isomorph.load(folders[name], framework="torch")
    model = models[name]
    assert (model.architecture, model.dtype, model.vocab_size) == (name, "float32", 64)
    assert model.num_layers == CONFIGS[name].num_hidden_layers
    expected = reference.logits(ids)
    assert_same(model.logits(ids), expected)
    with pytest.raises(AssertionError):
        assert_same(model.logits((ids + 1) % 64), expected)
    states = zip(model.hidden_states(ids), reference.hidden_states(ids), strict=True)
    for ours, theirs in states:
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_either_side_changes_nothing(name: str, models: dict[str, Model], ids: np.ndarray) -> None:
    model = models[name]
    alone = [model.logits(ids[0, 4:20])[0], model.logits(ids[1, :15])[0], model.logits(ids[2])[0]]
    mask = np.zeros(ids.shape, int)
    for row, part in enumerate((slice(4, 20), slice(0, 15), slice(None))):
        mask[row, part] = 1
    logits = model.logits(ids, attention_mask=mask)
    for row in range(3):
        assert_same(logits[row, mask[row] == 1], alone[row])
    with pytest.raises(AssertionError):
        assert_same(model.logits(ids)[0, 4:20], alone[0])
    mask[2, 9] = 0
    with pytest.raises(InputError, match="padding between"):
        model.logits(ids, attention_mask=mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_states_of_stock_architectures(
    name: str, models: dict[str, Model], ids: np.ndarray, tmp_path: Path
) -> None:
    model = models[name]
    expected = model.logits(ids)
    state = model.decode_state(3)
    assert_same(state.feed(ids[:, :10]), expected[:, :10])
    steps = [state.feed(ids[:, step : step + 1]) for step in range(10, 14)]
    assert_same(np.concatenate(steps, axis=1), expected[:, 10:14])
    state.reorder([2, 0])
    state.save(tmp_path / "state")
    state = model.load_decode_state(tmp_path / "state")
    state.extend(state_of(model, ids[1:2, :14]))
    logits = state.feed(ids[[2, 0, 1], 14:15])
    assert_same(logits, expected[[2, 0, 1], 14:15])
    assert state.lengths.tolist() == [15, 15, 15]


def state_of(model: Model, ids: np.ndarray) -> Any:
    state = model.decode_state(len(ids))
    state.feed(ids)
    return state


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_cache_cannot_forget_is_read_again(
    name: str, models: dict[str, Model], ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = models[name], models[name].logits(ids)
    for rows in (ids[:1], ids):
        state = state_of(model, rows)
        state.trim(7)
        assert_same(state.feed(rows[:, 17:]), expected[: len(rows), 17:])
    if name != "llama":  # the control: its cache alone cannot
        monkeypatch.setattr(mlx_state, "can_trim_prompt_cache", lambda caches: True)
        state = state_of(model, ids)
        with pytest.raises((AssertionError, AttributeError)):
            state.trim(7)
            assert_same(state.feed(ids[:, 17:]), expected[:, 17:])


def test_what_a_cache_cannot_do_is_refused(models: dict[str, Model], ids: np.ndarray) -> None:
    with pytest.raises(InputError, match="left padding"):
        models["mamba"].decode_state(2, left_padding=[0, 3])
    with pytest.raises(InputError, match="same model"):
        state_of(models["llama"], ids).extend(state_of(models["gemma3_text"], ids))
    waiting = models["llama"].decode_state(2, left_padding=[2, 0])
    with pytest.raises(InputError, match="padding is still to come"):
        state_of(models["llama"], ids).extend(waiting)


def test_a_state_of_another_model_is_refused(models: dict[str, Model], ids: np.ndarray, tmp_path: Path) -> None:
    state_of(models["llama"], ids).save(tmp_path / "state")
    with pytest.raises(InputError, match="gemma3_text"):
        models["gemma3_text"].load_decode_state(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[: len(whole) // 2])
    for path in (tmp_path / "state", tmp_path / "nothing"):
        with pytest.raises(InputError) as caught:
            models["llama"].load_decode_state(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        state_of(models["llama"], ids).save(tmp_path / "no folder" / "state")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["state"]


def test_dtype_as_asked(folders: dict[str, Path], models: dict[str, Model], ids: np.ndarray) -> None:
    model = isomorph.load(folders["llama"], framework="mlx", dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert model.module.model.embed_tokens.weight.dtype == mx.bfloat16
    exact = models["llama"].logits(ids)
    difference = np.abs(model.logits(ids) - exact).max()
    assert allowed_logit_difference(exact) < difference <= 20 * allowed_logit_difference(exact, "bfloat16")


def test_hidden_states_leave_nothing_behind(models: dict[str, Model], ids: np.ndarray) -> None:
    model = models["llama"]
    block = type(model.module.layers[0])
    call = block.__call__
    model.hidden_states(ids)
    with pytest.raises(InputError):
        model.hidden_states(np.full((1, 3), 64))
    assert block.__call__ is call and "__call__" in vars(block)


def test_repeated_calls_keep_no_memory(models: dict[str, Model], ids: np.ndarray) -> None:
    model = models["llama"]

    def work() -> int:
        model.logits(ids)
        model.hidden_states(ids)
        state = model.decode_state(3, left_padding=[0, 1, 2])
        for _ in range(3):
            state.feed(ids[:, :5])
            state.reorder([1, 0, 2])
        del state
        return mx.get_active_memory()

    first = work()
    assert [work() for _ in range(4)] == [first] * 4


def test_code_in_a_folder_runs_only_when_trusted(folders: dict[str, Path], tmp_path: Path, ids: np.ndarray) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "model_file": "mine.py"}))
    (folder / "mine.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    with pytest.raises(InputError, match="trust_remote_code") as caught:
        isomorph.load(folder, framework="mlx")
    assert "\n" not in str(caught.value)
    model = isomorph.load(folder, framework="mlx", trust_remote_code=True)
    assert_same(model.logits(ids), isomorph.load(folders["llama"], framework="mlx").logits(ids))


@pytest.mark.parametrize("break_it, complaint", [
    (lambda config: config | {"model_type": "nothing"}, "nothing"),
    (lambda config: config | {"num_hidden_layers": 3}, "mlx-lm"),
    (lambda config: {key: value for key, value in config.items() if key != "hidden_size"}, "hidden_size"),
])  # fmt: skip
def test_folders_that_mlx_lm_refuses(break_it: Any, complaint: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(break_it(config)))
    with pytest.raises(InputError, match=complaint) as caught:
        isomorph.load(folder, framework="mlx")
    assert "\n" not in str(caught.value)


def test_devices(folders: dict[str, Path]) -> None:
    assert isomorph.load(folders["llama"], framework="mlx", device="cpu").device == mx.cpu
    with pytest.raises(InputError, match="device"):
        isomorph.load(folders["llama"], framework="mlx", device="tpu")
    if not mx.is_available(mx.Device(mx.gpu)):
        with pytest.raises(InputError, match="GPU"):
            isomorph.load(folders["llama"], framework="mlx", device="gpu")


def test_packed_weights_that_do_not_fit(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64, intermediate_size=96)
    folder = write_checkpoint(tmp_path / "packed", config)
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.blocks.1.mlp.mlp_gate"
    packed, scales, biases = mx.quantize(weights[f"{name}.weight"], group_size=32, bits=8)
    weights |= {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
    quantization = {"group_size": 32, "bits": 8}
    (folder / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    model = isomorph.load(folder, framework="mlx")
    assert model.module.model.blocks[1].mlp.mlp_gate.bits == 8 and not hasattr(model.module.lm_head, "bits")
    weights[f"{name}.scales"] = scales[:-1]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(InputError, match="mlp_gate"):
        isomorph.load(folder, framework="mlx")
