"""gpt-oss in every framework against our own independent numpy reference and against Transformers' (../shared)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from golden.make_gpt_oss import CASES, FOLDER, case
from golden.make_talkie import fingerprint
from isomorph.frameworks.model import Model
from tiny_gpt_oss import write_checkpoint

FRAMEWORKS = ("torch", "mlx", "flax")


@dataclass(frozen=True)
class Golden:
    """A checkpoint and what the reference makes of `ids` [B, T]."""

    source: Path
    ids: np.ndarray
    logits: np.ndarray
    hidden_states: np.ndarray
    greedy: np.ndarray


@pytest.fixture(scope="session")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Golden]:
    found = {}
    for name in CASES:
        config, tensors, ids, seed = case(name)
        stored = np.load(FOLDER / f"{name}.npz")
        assert str(stored["weights_sha256"]) == fingerprint(tensors), "numpy draws other weights: run make_gpt_oss.py"
        folder = write_checkpoint(tmp_path_factory.mktemp(name), config, seed)
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


def assert_same_model(model: Model, golden: Golden) -> None:
    assert_logits_close(model.logits(golden.ids), golden.logits)
    states = model.hidden_states(golden.ids[:1])
    assert len(states) == len(golden.hidden_states)
    for actual, reference in zip(states, golden.hidden_states):
        assert_logits_close(actual, reference[:1])
    assert np.array_equal(greedy(model, golden.ids, golden.greedy.shape[1]), golden.greedy)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_own_reference(goldens: dict[str, Golden], name: str, framework: str) -> None:
    assert_same_model(isomorph.load(goldens[name].source, framework=framework, dtype="float32"), goldens[name])


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("form", ["hf", "mxfp4"])
def test_transformers_reference(shared: Path, form: str, framework: str) -> None:
    folder = shared / "golden" / "gpt-oss" / "public"
    stored = np.load(folder / ("expected.npz" if form == "hf" else "expected_mxfp4.npz"))
    model = isomorph.load(folder / form, framework=framework, dtype="float32")
    assert_logits_close(model.logits(stored["input_ids"]), stored["logits"])
    for actual, reference in zip(model.hidden_states(stored["input_ids"][:1])[1:], stored["hidden_states"]):
        assert_logits_close(actual, reference)
    routers = model.router_logits(stored["input_ids"])
    assert len(routers) == len(stored["router_indices"])
    for actual, reference, indices in zip(routers, stored["router_logits"], stored["router_indices"]):
        actual = actual.reshape(reference.shape)
        assert_logits_close(actual, reference)
        best = np.argsort(-actual, axis=-1, kind="stable")[:, : indices.shape[1]]
        assert np.array_equal(np.sort(best), np.sort(indices))
    assert np.array_equal(greedy(model, stored["input_ids"], stored["greedy"].shape[1]), stored["greedy"])


def test_softmax_over_all_experts_shows(goldens: dict[str, Golden], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    def forward(self: Any, x: Any) -> tuple:
        logits, _, chosen = route(self, x)
        return logits, logits.softmax(-1).gather(-1, chosen), chosen

    route = GptOssTopKRouter.forward
    monkeypatch.setattr(GptOssTopKRouter, "forward", forward)
    model = isomorph.load(goldens["odd"].source, dtype="float32")
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(goldens["odd"].ids), goldens["odd"].logits)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gate_and_up_read_one_after_the_other_show(goldens: dict[str, Golden], framework: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(goldens["odd"].source / "model.safetensors")
    for name, value in tensors.items():
        if "gate_up_proj" in name:
            tensors[name] = np.concatenate([value[:, ::2], value[:, 1::2]], axis=1)
    (tmp_path / "config.json").write_bytes((goldens["odd"].source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = isomorph.load(tmp_path, framework=framework, dtype="float32")
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(goldens["odd"].ids), goldens["odd"].logits)


MUTATIONS = {
    "window one longer": {"sliding_window": 17},
    "ramp truncated": {"rope_scaling": {**case("odd")[0]["rope_scaling"], "truncate": True}},
    "no YaRN factor": {"rope_scaling": {**case("odd")[0]["rope_scaling"], "factor": 1.0}},
    "another clamp": {"swiglu_limit": 6.0},
    "another gate": {"swiglu_alpha": 1.0},
    "layers shifted": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "one expert fewer": {"num_experts_per_tok": 3},
    "another eps": {"rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("framework", ["mlx", "flax"])
def test_each_mistake_in_a_config_shows(goldens: dict[str, Golden], framework: str, mutation: str) -> None:
    golden = goldens["odd"]
    model = isomorph.load(golden.source, framework=framework, dtype="float32", config=MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(golden.ids), golden.logits)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_silent_sinks_and_biases_show(goldens: dict[str, Golden], framework: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    golden = goldens["odd"]
    tensors = load_file(golden.source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((golden.source / "config.json").read_bytes())
    for part in ("sinks", "router.bias", "gate_up_proj_bias"):
        broken = {name: np.zeros_like(value) if name.endswith(part) else value for name, value in tensors.items()}
        save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AssertionError):
            assert_same_model(
                isomorph.load(tmp_path, framework=framework, dtype="float32"), replace(golden, source=tmp_path)
            )
