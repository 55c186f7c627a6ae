"""Talkie in torch against reference outputs: the authors' code (../shared) and our own independent numpy one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isomorph
from conftest import assert_logits_close
from golden.make_talkie import CASES, FOLDER, case, fingerprint, forward
from isomorph.architectures.talkie import modeling_torch
from isomorph.frameworks.model import Model
from tiny import tiny_config, tiny_tensors, write_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The references were made with one thread; the order of sums depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Golden:
    """A checkpoint and what a reference makes of `ids` [B, T]."""

    source: Path
    ids: np.ndarray
    logits: np.ndarray
    hidden_states: np.ndarray
    greedy: np.ndarray


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Golden]:
    found = {}
    for name, (_, seed, scale) in CASES.items():
        config, tensors, ids = case(name)
        stored = np.load(FOLDER / f"{name}.npz")
        assert str(stored["weights_sha256"]) == fingerprint(tensors), "numpy draws other weights: run make_talkie.py"
        np.testing.assert_array_equal(stored["input_ids"], ids)
        folder = write_checkpoint(tmp_path_factory.mktemp(name), config, seed, scale)
        found[name] = Golden(folder, ids, stored["logits"], stored["hidden_states"], stored["greedy"])
    return found


def greedy(model: Model, ids: np.ndarray, tokens: int) -> np.ndarray:
    """The next `tokens` greedy tokens of each row [B, tokens], with the decode state."""
    state = model.decode_state(len(ids))
    step, found = ids, []
    for _ in range(tokens):
        step = state.feed(step, last_only=True)[:, -1].argmax(axis=-1)[:, None]
        found.append(step)
    return np.concatenate(found, axis=1)


def assert_hidden_states_close(actual: list[np.ndarray], reference: np.ndarray) -> None:
    """Un-normed states grow with depth, as logits do: the same rule for each."""
    assert len(actual) == len(reference)
    for state, expected in zip(actual, reference):
        assert_logits_close(state, expected)


@pytest.mark.parametrize("name", CASES)
def test_numpy_reference(goldens: dict[str, Golden], name: str) -> None:
    golden = goldens[name]
    model = isomorph.load(golden.source)
    assert_logits_close(model.logits(golden.ids), golden.logits)
    assert_hidden_states_close(model.hidden_states(golden.ids), golden.hidden_states)
    np.testing.assert_array_equal(greedy(model, golden.ids, golden.greedy.shape[1]), golden.greedy)


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ({"num_attention_heads": 1, "head_dim": 2, "num_hidden_layers": 1}, 20),
        ({"num_attention_heads": 5, "head_dim": 6, "hidden_size": 20, "intermediate_size": 33}, 64),
        ({"num_hidden_layers": 5, "rope_theta": 4e7, "rms_norm_eps": 1e-3, "rope_table_dtype": "float32"}, 100),
        ({"head_dim": 64, "num_attention_heads": 2, "rope_theta": 1e6, "max_position_embeddings": 1024}, 600),
    ],
    ids=["one head", "odd sizes", "deep", "long prompt"],
)
def test_other_shapes(tmp_path: Path, overrides: dict[str, Any], length: int) -> None:
    config = tiny_config(**overrides)
    ids = np.random.default_rng(2).integers(0, config["vocab_size"], (1, length))
    logits, states = forward(config, tiny_tensors(config, seed=13), ids)
    model = isomorph.load(write_checkpoint(tmp_path, config, seed=13))
    assert_logits_close(model.logits(ids), logits)
    assert_hidden_states_close(model.hidden_states(ids), np.stack(states))


@pytest.mark.parametrize("source", ["hf", "original.pt"])
@pytest.mark.parametrize(("tables", "suffix"), [("bfloat16", ""), ("float32", "_fp32_rope")])
def test_authors_reference(shared: Path, source: str, tables: str, suffix: str) -> None:
    expected = np.load(shared / "golden/talkie/public/expected.npz")
    model = isomorph.load(shared / "golden/talkie/public" / source, rope_table_dtype=tables)
    assert_logits_close(model.logits(expected["input_ids"]), expected[f"logits{suffix}"])
    tokens = expected[f"greedy{suffix}"]
    np.testing.assert_array_equal(greedy(model, expected["input_ids"], tokens.shape[1]), tokens)
    if tables == "bfloat16":
        states = model.hidden_states(expected["input_ids"])
        assert_hidden_states_close(states, expected["hidden_states"])


def bfloat16_noise_ratio(model: Model, expected: Any) -> float:
    """RMS error of our bfloat16 run over that of the authors', both against their float32 run.

    Their logits of position t come from a pass over the first t + 1 tokens; so do ours here, and on a processor like
    theirs every logit is then the same bit for bit (ratio 1).
    """
    ids = expected["input_ids"]
    logits = np.stack([model.logits(ids[:, : end + 1])[:, -1] for end in range(ids.shape[1])], axis=1)
    errors = [np.sqrt(np.mean((run - expected["logits"]) ** 2)) for run in (logits, expected["logits_bf16_model"])]
    return float(errors[0] / errors[1])


def test_bfloat16_run_is_as_noisy_as_the_authors(shared: Path) -> None:
    expected = np.load(shared / "golden/talkie/public/expected.npz")
    model: Any = isomorph.load(shared / "golden/talkie/public/hf", dtype="bfloat16")
    assert 0.9 < bfloat16_noise_ratio(model, expected) < 1.1
    forget("mlp_gain", 0.95)(model, pytest.MonkeyPatch())
    assert bfloat16_noise_ratio(model, expected) > 1.1  # the negative control


# Negative controls: each quirk left out or turned round must break the rule.


def forget(parameter: str, value: float) -> Any:
    """A fault that sets all parameters of this name to `value`."""

    def fault(model: Any, _: pytest.MonkeyPatch) -> None:
        for name, tensor in model.module.named_parameters():
            if parameter in name:
                tensor.fill_(value)

    return fault


def turn_the_other_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = modeling_torch.apply_rope
    monkeypatch.setattr(modeling_torch, "apply_rope", lambda x, cos, sin: rope(x, cos, -sin))


def leave_out_query_and_key_norm(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, width = modeling_torch.rms_norm, model.config.head_dim
    monkeypatch.setattr(modeling_torch, "rms_norm", lambda x, eps: x if x.shape[-1] == width else norm(x, eps))


FAULTS = {
    "head gain": forget("head_g", 1.0),
    "attention gain": forget("attn_gain", 1.0),
    "mlp gain": forget("mlp_gain", 1.0),
    "embedding skip": forget("embed_skip", 0.0),
    "head weight gain": forget("w_g", 1.0),
    "rotation": turn_the_other_way,
    "query and key norm": leave_out_query_and_key_norm,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(goldens: dict[str, Golden], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = goldens["faithful"]
    model = isomorph.load(golden.source)
    FAULTS[fault](model, monkeypatch)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(golden.ids), golden.logits)


@pytest.mark.parametrize(("name", "other"), [("faithful", "float32"), ("accurate", "bfloat16")])
def test_the_other_rope_tables_are_caught(goldens: dict[str, Golden], name: str, other: str) -> None:
    model = isomorph.load(goldens[name].source, rope_table_dtype=other)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(goldens[name].ids), goldens[name].logits)


def test_another_eps_is_caught_at_small_activations(goldens: dict[str, Golden]) -> None:
    golden = goldens["small"]
    config = json.loads((golden.source / "config.json").read_text())
    model = isomorph.load(golden.source, config=config | {"rms_norm_eps": 1e-5})
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(golden.ids), golden.logits)


def test_one_wrong_parameter_of_a_late_block_is_caught(goldens: dict[str, Golden]) -> None:
    golden = goldens["faithful"]
    model: Any = isomorph.load(golden.source)
    with torch.no_grad():
        model.module.model.blocks[2].mlp.mlp_gate.weight[0] *= 1.05
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(golden.ids), golden.logits)
