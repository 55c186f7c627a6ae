"""GELU-GPT in torch against reference outputs: nanochat's own (../shared) and our independent numpy one, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from golden.make_gelu_gpt import CASES, FOLDER, MISTAKES, case, fingerprint, forward
from isomorph.architectures.gelu_gpt import modeling_torch
from isomorph.architectures.gelu_gpt.config import FLOAT32_EPS
from tiny_gelu_gpt import write_checkpoint

SHARED_CASES = ("public-gelu-mha", "public-relu2-untied")


def loaded(name: str, folder: Path) -> Any:
    overrides, seed, scale = CASES[name]
    del overrides
    return isomorph.load(write_checkpoint(folder / name, case(name)[0], seed, scale))


def greedy(model: Any, ids: np.ndarray, tokens: int) -> np.ndarray:
    """The next `tokens` greedy tokens of each row [B, tokens], with the decode state."""
    rows = model.generate(ids, max_tokens=tokens)
    return np.array([row.token_ids for row in rows])


@pytest.mark.parametrize("name", CASES)
def test_numpy_reference(name: str, tmp_path: Path) -> None:
    stored = np.load(FOLDER / f"{name}.npz")
    _, tensors, ids = case(name)
    assert fingerprint(tensors) == str(stored["weights_sha256"])
    model = loaded(name, tmp_path)
    logits = model.logits(ids)
    assert_logits_close(logits[:, ::8], stored["logits"])
    states = np.stack(model.hidden_states(ids))[:, :, ::32]
    for actual, expected in zip(states, stored["hidden_states"]):
        assert_logits_close(actual, expected)
    import torch

    shown = torch.from_numpy(ids)
    with torch.inference_mode():
        loss = float(model.module(shown, labels=shown).loss)
    assert loss == pytest.approx(float(stored["loss"]), abs=2e-6)
    np.testing.assert_array_equal(greedy(model, ids, stored["greedy"].shape[1]), stored["greedy"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_caught(mistake: str, tmp_path: Path) -> None:
    name = "small" if mistake == "eps" else "gqa-odd-padded"
    config, tensors, ids = case(name)
    model = loaded(name, tmp_path)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids[:1]), forward(config, tensors, ids[:1], mistake)[0])


def test_no_smear_on_the_first_decoded_token_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("gqa-odd-padded", tmp_path)
    ids = case("gqa-odd-padded")[2]
    state = model.decode_state(2)
    state.feed(ids[:, :150])
    monkeypatch.setattr(modeling_torch, "smear_layer", lambda cache, config: None)
    with pytest.raises(AssertionError):
        assert_logits_close(state.feed(ids[:, 150:]), model.logits(ids)[:, 150:])


@pytest.mark.parametrize("name", SHARED_CASES)
def test_nanochat(name: str, shared: Path) -> None:
    folder = shared / "golden" / "nanochat" / name
    expected = np.load(folder / "expected.npz")
    model: Any = isomorph.load(folder / "hf")
    ids = expected["input_ids"]
    assert_logits_close(model.logits(ids), expected["logits"])
    for actual, state in zip(model.hidden_states(ids[:1]), expected["hidden_states"]):
        assert_logits_close(actual, state)
    np.testing.assert_array_equal(greedy(model, ids, expected["greedy"].shape[1]), expected["greedy"])


def test_nanochat_folder(shared: Path) -> None:
    folder = shared / "golden" / "nanochat" / "public-relu2-untied"
    expected = np.load(folder / "expected.npz")
    model: Any = isomorph.load(folder / "nanochat")
    assert (model.config.mlp, model.config.rms_norm_eps) == ("relu2", FLOAT32_EPS)
    assert_logits_close(model.logits(expected["input_ids"]), expected["logits"])
