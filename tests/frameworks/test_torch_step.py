"""Recorded decode steps: the same logits as the module, in any order of feeds, and refusals that cost nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import isomorph
from conftest import assert_logits_close
from frameworks.random_models import VOCABULARY, random_folder
from isomorph.frameworks import torch_step
from isomorph.kernels import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the C++ extension is not built (no compiler)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder("gemma3_text", tmp_path_factory.mktemp("step") / "model")


def decoded(model, ids: np.ndarray, padding: list[int]) -> np.ndarray:
    """Logits of the second half of `ids`, token by token."""
    state = model.decode_state(len(ids), left_padding=padding)
    state.feed(ids[:, :12])
    return np.stack([state.feed(ids[:, place : place + 1])[:, 0] for place in range(12, ids.shape[1])], 1)


def ids_of(rows: int, tokens: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (rows, tokens))


@pytest.mark.parametrize("padding", [[0], [0, 0, 0], [5, 0, 2]], ids=str)
def test_replayed_steps_give_the_modules_logits(folder, padding):
    recorded, plain = (isomorph.load(folder, dtype="float32") for _ in range(2))
    plain.steps.refusal = "not here"
    ids = ids_of(len(padding))  # longer than the window of 8
    expected = decoded(plain, ids, padding)
    assert_logits_close(decoded(recorded, ids, padding), expected)
    assert recorded.steps.recorded(len(padding)) and not plain.steps.recorded(len(padding))
    with pytest.raises(AssertionError):  # another row's tokens are another result
        assert_logits_close(decoded(recorded, ids[:, ::-1].copy(), padding), expected)


def test_caches_grow_shrink_and_change_rows_between_steps(folder):
    model = isomorph.load(folder, dtype="float32")
    ids = ids_of(2, 100)
    state = model.decode_state(2, max_length=8)
    state.feed(ids[:, :4])
    for place in range(4, 60):  # beyond the room asked for
        logits = state.feed(ids[:, place : place + 1])
    state.trim(20)
    state.reorder([1, 0])
    swapped = ids[::-1]
    for place in range(40, 44):
        logits = state.feed(swapped[:, place : place + 1])
    assert_logits_close(logits[:, 0], model.logits(swapped[:, :44])[:, -1])


def test_two_states_take_turns(folder):
    model = isomorph.load(folder, dtype="float32")
    ids = ids_of(2, 30)
    states = [model.decode_state(1) for _ in ids]
    for state, row in zip(states, ids):
        state.feed(row[None, :10])
    for place in range(10, 30):
        last = [state.feed(row[None, place : place + 1]) for state, row in zip(states, ids)]
    for row, logits in zip(ids, last):
        assert_logits_close(logits[:, 0], model.logits(row)[:, -1])


def test_bfloat16_rounds_where_the_module_rounds(folder):
    recorded, plain = (isomorph.load(folder, dtype="bfloat16") for _ in range(2))
    plain.steps.refusal = "not here"
    exact = isomorph.load(folder, dtype="float32")
    ids = ids_of(1)
    reference = decoded(exact, ids, [0])
    noise, error = (np.sqrt(np.mean((decoded(model, ids, [0]) - reference) ** 2)) for model in (plain, recorded))
    assert 0.5 * noise < error < 1.5 * noise


@pytest.mark.parametrize("reason", ["a mask", "a value read back", "a position that is not an input"])
def test_what_cannot_be_replayed_runs_through_the_module(reason, folder, monkeypatch):
    model = isomorph.load(folder, dtype="float32")
    block = model.module.model.layers[0]
    forward = block.forward

    def altered(hidden_states, *arguments, **options):
        if reason == "a value read back" and hidden_states.sum().item() > 1e9:
            return None
        if reason == "a position that is not an input":
            hidden_states = hidden_states + 0.0 * torch.tensor(float(options["past_key_values"].get_seq_length()))
        if reason == "a mask":
            options["attention_mask"] = torch.zeros(1, 1, 1, 1) if hidden_states.shape[1] == 1 else None
        return forward(hidden_states, *arguments, **options)

    monkeypatch.setattr(block, "forward", altered)
    decoded(model, ids_of(1), [0])
    assert not model.steps.recorded(1) and model.steps.describe(1) == model.steps.refusal


def test_every_instruction_equals_torchs_operator():
    """Each elementwise instruction over values of every size, in its own dtype's rounding."""
    extension = native.extension()
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([0.0, 1e-8, -1e-8, 60.0, -90.0])])
    references = {
        "neg": torch.neg,
        "exp": torch.exp,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda value: torch.nn.functional.gelu(value, approximate="tanh"),
        "relu": torch.relu,
        "cos": torch.cos,
        "sin": torch.sin,
    }
    for name, reference in references.items():
        out, step = torch.empty_like(x), extension.Step()
        views = [extension.View(t.data_ptr(), 0, list(t.shape), list(t.stride())) for t in (out, x)]
        step.elementwise(name, *views, None, 1.0, 0.0)
        start = np.zeros(1, np.int64)
        step.run([], [], [], [], 0, start.ctypes.data)
        expected = reference(x.double())
        scale = expected.abs().clamp(min=1e-3)
        if name.startswith("gelu"):  # 1 + erf cancels far below zero, in torch as well
            scale = torch.maximum(scale, x.abs())
        error = (out - expected).abs() / scale
        assert error.max() < 2e-6, name
    with pytest.raises(ValueError, match="no operation"):
        extension.Step().elementwise("cube", *views, None, 1.0, 0.0)


def test_recording_leaves_the_config_as_it_was(folder):
    model = isomorph.load(folder, dtype="float32")
    before = model.module.config._attn_implementation, model.module.config.pad_token_id
    decoded(model, ids_of(1), [0])
    assert before == (model.module.config._attn_implementation, model.module.config.pad_token_id)
    assert before[0] != torch_step.ATTENTION


def test_a_state_beside_keys_and_values_stays_on_its_module():
    """GELU-GPT's smear looks back at an embedding."""
    model = isomorph.load("pocket:gelu_gpt", dtype="float32")
    state = model.decode_state(1)
    for token in range(3, 9):
        state.feed(np.array([[token]]), last_only=True)
    assert model.steps.describe(1) == "the model remembers more than keys and values"
