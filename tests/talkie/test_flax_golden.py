"""Talkie in Flax against reference outputs: the authors' code (../shared) and our own independent numpy one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from golden.make_talkie import CASES, FOLDER, case, fingerprint
from isomorph.architectures.talkie import modeling_flax
from isomorph.frameworks.model import Model
from tiny import write_checkpoint


@dataclass(frozen=True)
class Golden:
    """A checkpoint and what the numpy reference makes of `ids` [B, T]."""

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
        folder = write_checkpoint(tmp_path_factory.mktemp(name), config, seed, scale)
        found[name] = Golden(folder, ids, stored["logits"], stored["hidden_states"], stored["greedy"])
    return found


def load(source: Path, **options: Any) -> Any:
    return isomorph.load(source, framework="flax", **options)


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
    model = load(golden.source)
    assert_logits_close(model.logits(golden.ids), golden.logits)
    assert_hidden_states_close(model.hidden_states(golden.ids), golden.hidden_states)
    np.testing.assert_array_equal(greedy(model, golden.ids, golden.greedy.shape[1]), golden.greedy)


@pytest.mark.parametrize("source", ["hf", "original.pt"])
@pytest.mark.parametrize(("tables", "suffix"), [("bfloat16", ""), ("float32", "_fp32_rope")])
def test_authors_reference(shared: Path, source: str, tables: str, suffix: str) -> None:
    expected = np.load(shared / "golden/talkie/public/expected.npz")
    model = load(shared / "golden/talkie/public" / source, rope_table_dtype=tables)
    assert_logits_close(model.logits(expected["input_ids"]), expected[f"logits{suffix}"])
    if tables == "bfloat16":
        assert_hidden_states_close(model.hidden_states(expected["input_ids"]), expected["hidden_states"])
    if source == "hf":
        tokens = expected[f"greedy{suffix}"]
        np.testing.assert_array_equal(greedy(model, expected["input_ids"], tokens.shape[1]), tokens)


def test_bfloat16_run_is_as_near_as_the_authors_own(shared: Path) -> None:
    """Against the fp32 logits, the error in bfloat16 is that of the authors' bfloat16 run, within a fifth."""
    expected = np.load(shared / "golden/talkie/public/expected.npz")
    reference = expected["logits"]
    model = load(shared / "golden/talkie/public/hf", dtype="bfloat16")
    error = model.logits(expected["input_ids"]) - reference
    authors_error = expected["logits_bf16_model"] - reference
    assert 0 < np.sqrt(np.mean(error**2)) <= 1.2 * np.sqrt(np.mean(authors_error**2))


# Negative controls: each quirk left out or turned round must break the rule. Every load compiles programs of its own.


def forget(parameter: str, value: float) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """A fault that sets all parameters of this name to `value`."""

    def fault(model: Any, _: pytest.MonkeyPatch) -> None:
        named = [name for name in model.parameters if parameter in name]
        assert named
        for name in named:
            model.parameters[name] = jnp.full_like(model.parameters[name], value)

    return fault


def turn_the_other_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = modeling_flax.apply_rope
    monkeypatch.setattr(modeling_flax, "apply_rope", lambda x, cos, sin: rope(x, cos, -sin))


def leave_queries_unnormed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, width = modeling_flax.rms_norm, model.config.head_dim
    monkeypatch.setattr(modeling_flax, "rms_norm", lambda x, eps: x if x.shape[-1] == width else norm(x, eps))


FAULTS = {
    "head gain": forget("head_g", 1.0),
    "attention gain": forget("attn_gain", 1.0),
    "mlp gain": forget("mlp_gain", 1.0),
    "embedding skip": forget("embed_skip", 0.0),
    "head weight gain": forget("w_g", 1.0),
    "rotation": turn_the_other_way,
    "query and key norm": leave_queries_unnormed,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(goldens: dict[str, Golden], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = goldens["faithful"]
    model = load(golden.source)
    FAULTS[fault](model, monkeypatch)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(golden.ids), golden.logits)


@pytest.mark.parametrize(("name", "other"), [("faithful", "float32"), ("accurate", "bfloat16")])
def test_the_other_rope_tables_are_caught(goldens: dict[str, Golden], name: str, other: str) -> None:
    model = load(goldens[name].source, rope_table_dtype=other)
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(goldens[name].ids), goldens[name].logits)


def test_another_eps_is_caught_at_small_activations(goldens: dict[str, Golden]) -> None:
    golden = goldens["small"]
    config = json.loads((golden.source / "config.json").read_text())
    model = load(golden.source, config=config | {"rms_norm_eps": 1e-5})
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(golden.ids), golden.logits)
