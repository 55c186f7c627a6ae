"""GELU-GPT in MLX against references that share no code with it; every check is shown to fail when it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import isomorph
from conftest import assert_logits_close
from golden.make_gelu_gpt import CASES, FOLDER, MISTAKES, case, fingerprint, forward
from isomorph.architectures.gelu_gpt import modeling_mlx
from isomorph.architectures.gelu_gpt.config import GeluGPTConfig
from isomorph.verify.tolerance import MAX_NOISE_RATIO, allowed_logit_difference
from tiny_gelu_gpt import tiny_config, tiny_tensors, write_checkpoint


def build(config: dict, tensors: dict[str, np.ndarray]) -> modeling_mlx.Model:
    """The bare model with these weights, as mlx-lm would fill it."""
    model = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(config))
    weights = model.sanitize({name: mx.array(value) for name, value in tensors.items()})
    model.load_weights(list(weights.items()), strict=True)
    return model


def error(model: modeling_mlx.Model, ids: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference of logits, in units of what the numeric rule allows."""
    logits = np.array(model(mx.array(ids)))
    assert logits.shape == reference.shape and logits.dtype == np.float32 and np.isfinite(logits).all()
    return float(np.abs(logits.astype(np.float64) - reference).max()) / allowed_logit_difference(reference)


@pytest.mark.parametrize("name", CASES)
def test_logits_hidden_states_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    config, tensors, ids = case(name)
    expected = np.load(FOLDER / f"{name}.npz")
    assert str(expected["weights_sha256"]) == fingerprint(tensors)
    np.testing.assert_array_equal(expected["input_ids"], ids)
    model = isomorph.load(write_checkpoint(tmp_path / "model", config, *CASES[name][1:]), framework="mlx")
    assert (model.dtype, model.vocab_size) == ("float32", config["vocab_size"])
    assert model.max_positions == 10 * config["sequence_len"]
    assert_logits_close(model.logits(ids)[:, ::8], expected["logits"])
    states = np.stack(model.hidden_states(ids))
    assert states.dtype == np.float32
    assert_logits_close(states[:, :, ::32], expected["hidden_states"])
    continued = model.generate(ids, max_tokens=expected["greedy"].shape[1])
    assert [generation.token_ids for generation in continued] == expected["greedy"].tolist()


@pytest.fixture(scope="module")
def odd() -> tuple[modeling_mlx.Model, dict, dict[str, np.ndarray], np.ndarray]:
    """The case with grouped keys, an odd depth and a padded vocabulary."""
    config, tensors, ids = case("gqa-odd-padded")
    model = build(config, tensors)
    assert error(model, ids, forward(config, tensors, ids)[0]) <= 1
    return model, config, tensors, ids


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if mistake != "eps"])
def test_a_mistake_shows(odd: Any, mistake: str) -> None:
    model, config, tensors, ids = odd
    assert error(model, ids, forward(config, tensors, ids, mistake)[0]) > 10


def test_another_eps_shows_at_small_activations() -> None:
    config, tensors, ids = case("small")
    model = build(config, tensors)
    assert error(model, ids, forward(config, tensors, ids)[0]) <= 1
    assert error(model, ids, forward(config, tensors, ids, "eps")[0]) > 100


def test_the_other_rope_table_shows() -> None:
    config, tensors, ids = case("nanochat")
    reference = forward(config, tensors, ids)[0]
    assert error(build(config, tensors), ids, reference) <= 1
    assert error(build(config | {"rope_table_dtype": "float32"}, tensors), ids, reference) > 10


@pytest.mark.parametrize("change", [
    {"n_layer": 1},
    {"n_layer": 5, "n_kv_head": 1, "window_pattern": "LSS"},
    {"n_embd": 40, "n_head": 20, "n_kv_head": 5, "vocab_size": 7, "pad_vocab_size_to": 1},
    {"mlp": "relu2", "tie_embeddings": False, "sequence_len": 64},
    {"rope_base": 500.0, "rope_table_dtype": "bfloat16", "window_pattern": "S"},
])  # fmt: skip
def test_other_shapes(change: dict) -> None:
    """Over 300 tokens, so that the long windows bite as well."""
    config = tiny_config(**change)
    tensors = tiny_tensors(config, seed=5)
    ids = np.random.default_rng(5).integers(0, config["vocab_size"], (1, 300))
    assert error(build(config, tensors), ids, forward(config, tensors, ids)[0]) <= 1


def test_positions_past_the_tables_are_still_right() -> None:
    config = tiny_config(rope_table_dtype="bfloat16")
    tensors = tiny_tensors(config, seed=6)
    ids = np.random.default_rng(6).integers(0, 120, (1, 128))
    model = build(config, tensors)
    tables = model.model._tables
    model.model._tables = tuple(table[:64] for table in tables)
    assert error(model, ids, forward(config, tensors, ids)[0]) <= 1


def test_bfloat16_is_as_close_to_exact_as_rounding_allows(tmp_path: Path) -> None:
    """The port's error in bfloat16, of logits and of each layer, against that of the same weights in torch."""
    config = tiny_config(rope_table_dtype="bfloat16", dtype="bfloat16", torch_dtype="bfloat16")
    ids = np.random.default_rng(7).integers(0, 120, (1, 200))
    tensors = tiny_tensors(config, seed=7)
    folder = write_checkpoint(tmp_path / "model", config, seed=7)
    exact, states = forward(config, tensors, ids)

    def noise(framework: str) -> np.ndarray:
        model = isomorph.load(folder, framework=framework, dtype="bfloat16")
        pairs = zip([model.logits(ids), *model.hidden_states(ids)], [exact, *states], strict=True)
        return np.array([np.sqrt(np.mean((actual - reference) ** 2)) for actual, reference in pairs])

    ours, theirs = noise("mlx"), noise("torch")
    assert (ours <= MAX_NOISE_RATIO * theirs).all() and (theirs <= MAX_NOISE_RATIO * ours).all()
    wrong = forward(config, tensors, ids, "scale q only")[0]
    assert np.sqrt(np.mean((wrong - exact) ** 2)) > MAX_NOISE_RATIO * theirs[0]


@pytest.mark.parametrize(
    "overrides", [{}, {"n_layer": 12, "sequence_len": 1024}, {"n_layer": 1, "window_pattern": "L"}]
)
def test_the_files_own_arguments_say_what_the_config_says(overrides: dict) -> None:
    """The shipped file cannot import the config, so what they both derive must agree."""
    config = GeluGPTConfig.from_dict(tiny_config(**overrides))
    args = modeling_mlx.ModelArgs.from_dict(config.to_dict())
    for name in ("head_dim", "padded_vocab_size", "windows"):
        assert getattr(args, name) == getattr(config, name)
    layers = range(config.n_layer)
    assert [*map(args.has_value_embedding, layers)] == [*map(config.has_value_embedding, layers)]


def test_the_published_model_has_its_parameters() -> None:
    model = modeling_mlx.Model(modeling_mlx.ModelArgs())  # lazy: none of them is computed
    assert sum(value.size for _, value in tree_flatten(model.parameters())) == 261_096_338
    untied = modeling_mlx.Model(modeling_mlx.ModelArgs(tie_embeddings=False))
    assert sum(value.size for _, value in tree_flatten(untied.parameters())) == 261_096_338 + 32768 * 768


@pytest.mark.parametrize("change, complaint", [
    ({"mlp": "swiglu"}, "mlp"),
    ({"rope_table_dtype": "float16"}, "rope_table_dtype"),
    ({"window_pattern": "SX"}, "window_pattern"),
])  # fmt: skip
def test_config_values_it_does_not_have_are_refused(change: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        modeling_mlx.ModelArgs.from_dict(tiny_config() | change)


@pytest.mark.parametrize("name, source", [
    ("public-gelu-mha", "hf"), ("public-relu2-untied", "hf"), ("public-relu2-untied", "nanochat"),
])  # fmt: skip
def test_nanochats_own_outputs(shared: Path, name: str, source: str) -> None:
    folder = shared / "golden" / "nanochat" / name
    expected = np.load(folder / "expected.npz")
    model = isomorph.load(folder / source, framework="mlx")
    ids = expected["input_ids"]
    assert_logits_close(model.logits(ids), expected["logits"])
    assert_logits_close(np.stack(model.hidden_states(ids[:1])), expected["hidden_states"])
    continued = model.generate(ids, max_tokens=expected["greedy"].shape[1])
    assert [generation.token_ids for generation in continued] == expected["greedy"].tolist()
    # Cached as uncached, over a prompt in three chunks and single tokens.
    state = model.decode_state(2)
    parts = [state.feed(ids[:, start:stop]) for start, stop in ((0, 90), (90, 91), (91, 180))]
    parts += [state.feed(ids[:, step : step + 1]) for step in range(180, 200)]
    assert_logits_close(np.concatenate(parts, axis=1), expected["logits"])
