"""Talkie in MLX against references that share no code with it; every check is shown to fail when it should."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import isomorph
from golden.make_talkie import CASES, FOLDER, case, fingerprint, forward
from isomorph.architectures.talkie import modeling_mlx, modeling_torch
from isomorph.verify.tolerance import MAX_NOISE_RATIO, allowed_logit_difference
from tiny import tiny_config, tiny_tensors, write_checkpoint


def build(config: dict, tensors: dict[str, np.ndarray]) -> modeling_mlx.Model:
    """The bare model with these weights, as mlx-lm would fill it."""
    model = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(config))
    weights = model.sanitize({name: mx.array(value) for name, value in tensors.items()})
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model


def error(model: modeling_mlx.Model, ids: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference of logits, in units of what the numeric rule allows."""
    logits = np.array(model(mx.array(ids)).astype(mx.float32))
    assert logits.shape == reference.shape and np.isfinite(logits).all()
    return float(np.abs(logits.astype(np.float64) - reference).max()) / allowed_logit_difference(reference)


@pytest.fixture(scope="module", params=sorted(CASES))
def golden(request: pytest.FixtureRequest):
    config, tensors, _ = case(request.param)
    expected = dict(np.load(FOLDER / f"{request.param}.npz"))
    assert str(expected["weights_sha256"]) == fingerprint(tensors)
    return request.param, config, tensors, expected


def test_logits_hidden_states_and_greedy_tokens(golden, tmp_path: Path) -> None:
    name, config, _, expected = golden
    seed, scale = CASES[name][1:]
    model = isomorph.load(write_checkpoint(tmp_path / "model", config, seed, scale), framework="mlx")
    ids = expected["input_ids"]
    allowed = allowed_logit_difference(expected["logits"])
    assert model.dtype == "float32" and model.vocab_size == config["vocab_size"]
    assert np.abs(model.logits(ids) - expected["logits"]).max() <= allowed
    states = np.stack(model.hidden_states(ids))
    assert states.dtype == np.float32 and states.shape == expected["hidden_states"].shape
    assert np.abs(states - expected["hidden_states"]).max() <= allowed_logit_difference(expected["hidden_states"])
    for row in range(len(ids)):
        generation = model.generate(ids[row], max_tokens=expected["greedy"].shape[1])
        assert generation.token_ids == expected["greedy"][row].tolist()


GAINS = [name for name in tiny_tensors(tiny_config()) if name.endswith(("head_g", "a_g", "w_g"))]


@pytest.mark.parametrize("gain", GAINS)
def test_every_gain_and_skip_shows_when_left_out(gain: str) -> None:
    config, tensors, ids = case("faithful")
    reference = np.load(FOLDER / "faithful.npz")["logits"]
    without = np.zeros_like if "embed_skip" in gain else np.ones_like
    assert error(build(config, tensors | {gain: without(tensors[gain])}), ids, reference) > 100


@pytest.mark.parametrize("name, change, least", [
    ("small", {"rms_norm_eps": 1e-5}, 100),
    ("small", {"rms_norm_eps": 0.0}, 100),
    ("faithful", {"rope_table_dtype": "float32"}, 10),
    ("accurate", {"rope_table_dtype": "bfloat16"}, 10),
    ("faithful", {"rope_theta": 10000.0}, 100),
])  # fmt: skip
def test_a_wrong_constant_shows(name: str, change: dict, least: float) -> None:
    config, tensors, ids = case(name)
    assert error(build(config | change, tensors), ids, np.load(FOLDER / f"{name}.npz")["logits"]) > least


def swapped(x, cos, sin):
    return rotation(x, cos, -sin)


def interleaved(x, cos, sin):
    pairs = mx.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    return rotation(pairs, cos, sin)


rotation = modeling_mlx.apply_rope


@pytest.mark.parametrize("wrong", [swapped, interleaved])
def test_another_rotation_shows(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors, ids = case("faithful")
    reference = np.load(FOLDER / "faithful.npz")["logits"]
    assert error(build(config, tensors), ids, reference) <= 1
    monkeypatch.setattr(modeling_mlx, "apply_rope", wrong)
    assert error(build(config, tensors), ids, reference) > 100


@pytest.mark.parametrize("tables", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [
    {"head_dim": 2, "num_attention_heads": 3, "hidden_size": 20},
    {"head_dim": 80, "num_attention_heads": 2, "num_hidden_layers": 1, "rope_theta": 40_000_000.0},
    {"head_dim": 128, "num_attention_heads": 1, "rope_theta": 1_000_000.0},
])  # fmt: skip
def test_other_shapes(shape: dict, tables: str) -> None:
    config = tiny_config(**shape, rope_table_dtype=tables)
    tensors = tiny_tensors(config, seed=5)
    ids = np.random.default_rng(5).integers(0, config["vocab_size"], (1, 100))
    assert error(build(config, tensors), ids, forward(config, tensors, ids)[0]) <= 1


@pytest.mark.parametrize("tables", ["bfloat16", "float32"])
def test_positions_past_the_tables_are_still_right(tables: str) -> None:
    config = tiny_config(rope_table_dtype=tables)
    tensors = tiny_tensors(config, seed=6)
    ids = np.random.default_rng(6).integers(0, config["vocab_size"], (1, 96))
    reference = forward(config, tensors, ids)[0]
    assert error(build(config | {"max_position_embeddings": 32}, tensors), ids, reference) <= 1


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_tables_are_those_of_torch_to_the_last_bit(head_dim: int) -> None:
    """At the published base and length; one other entry is an error of 1e-3 at its position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(2048, dtype=torch.float32), 1.0 / (1_000_000.0**exponents))
    args = modeling_mlx.ModelArgs(head_dim=head_dim, rope_theta=1_000_000.0, max_position_embeddings=2048)
    for ours, theirs in zip(modeling_mlx.rope_tables(args), (angles.cos(), angles.sin())):
        assert np.array_equal(np.array(ours.astype(mx.float32)), theirs.bfloat16().float().numpy())
    other = modeling_mlx.rope_tables(modeling_mlx.ModelArgs(head_dim=head_dim, rope_theta=1_000_001.0))
    assert not np.array_equal(np.array(other[0].astype(mx.float32)), angles.cos().bfloat16().float().numpy())


def test_bfloat16_is_as_close_to_exact_as_rounding_allows() -> None:
    """The port's error in bfloat16 against that of the same weights and the same arithmetic in another library."""
    config, tensors, ids = case("faithful")
    exact = np.load(FOLDER / "faithful.npz")["logits"]
    rounded = {name: mx.array(value).astype(mx.bfloat16) for name, value in tensors.items()}
    model = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize(rounded).items()), strict=True)
    ours = np.array(model(mx.array(ids)).astype(mx.float32))
    values = {key: config[key] for key in config if key not in ("architectures", "model_type", "dtype", "torch_dtype")}
    reference = modeling_torch.TalkieForCausalLM(modeling_torch.TalkieConfig(**values)).to(torch.bfloat16).eval()
    reference.load_state_dict({name: torch.from_numpy(value).bfloat16() for name, value in tensors.items()})
    with torch.no_grad():
        theirs = reference(torch.from_numpy(ids), use_cache=False).logits.float().numpy()
    ratio = np.sqrt(np.mean((ours - exact) ** 2) / np.mean((theirs - exact) ** 2))
    assert 1 / MAX_NOISE_RATIO <= ratio <= MAX_NOISE_RATIO
    worse = ours + 4 * (ours - exact)
    assert np.sqrt(np.mean((worse - exact) ** 2) / np.mean((theirs - exact) ** 2)) > MAX_NOISE_RATIO


@pytest.mark.parametrize("source", ["hf", "original.pt"])
@pytest.mark.parametrize("tables, suffix", [(None, ""), ("float32", "_fp32_rope")])
def test_the_authors_outputs(shared: Path, source: str, tables: str | None, suffix: str) -> None:
    folder = shared / "golden" / "talkie" / "public"
    expected = np.load(folder / "expected.npz")
    model = isomorph.load(folder / source, framework="mlx", rope_table_dtype=tables)
    ids, reference = expected["input_ids"], expected[f"logits{suffix}"]
    logits = model.logits(ids)
    assert np.abs(logits - reference).max() <= allowed_logit_difference(reference)
    other = expected["logits" if suffix else "logits_fp32_rope"]
    assert np.abs(logits - other).max() > allowed_logit_difference(other)
    if not suffix:
        states, wanted = np.stack(model.hidden_states(ids)), expected["hidden_states"]
        assert np.abs(states - wanted).max() <= allowed_logit_difference(wanted)
    continued = model.generate(ids, max_tokens=expected[f"greedy{suffix}"].shape[1])
    assert [generation.token_ids for generation in continued] == expected[f"greedy{suffix}"].tolist()


def test_bfloat16_agrees_with_the_authors_in_bfloat16(shared: Path) -> None:
    folder = shared / "golden" / "talkie" / "public"
    expected = np.load(folder / "expected.npz")
    exact, theirs = expected["logits"], expected["logits_bf16_model"]
    model = isomorph.load(folder / "hf", framework="mlx", dtype="bfloat16")
    ours = model.logits(expected["input_ids"])
    own_agreement = np.mean(theirs.argmax(-1) == exact.argmax(-1))
    assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) >= own_agreement
    assert np.sqrt(np.mean((ours - exact) ** 2) / np.mean((theirs - exact) ** 2)) <= MAX_NOISE_RATIO
