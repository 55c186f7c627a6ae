"""`verify` on real models: right ports pass in every framework, each named mutation of one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import isomorph
from isomorph.verify.mutations import MUTATIONS, mutate
from tiny import tiny_config, write_checkpoint

#: Small enough for a test, longer than any shift of positions, with a few decode steps.
SIZES: dict[str, Any] = {"tokens": 96, "greedy_tokens": 8}


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("float32") / "model")


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(dtype="bfloat16", torch_dtype="bfloat16", hidden_size=64, intermediate_size=96)
    return write_checkpoint(tmp_path_factory.mktemp("bfloat16") / "model", config)


@pytest.fixture(scope="module")
def small_activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model", embedding_scale=3e-4)


@pytest.mark.parametrize("framework", ["torch", "mlx", "flax"])
def test_a_right_port_passes_in_float32(float32: Path, framework: str):
    certificate = isomorph.verify(float32, float32, candidate_framework=framework, **SIZES)
    assert certificate, certificate
    assert certificate.noise_ratio is not None and certificate.noise_ratio < 2
    assert certificate.logits["max_abs"] <= 2e-5 * max(1, certificate.logits["reference_max_abs_logit"] / 10)


def test_a_right_port_passes_in_bfloat16_and_is_compared_in_float32_as_well(bfloat16: Path, tmp_path: Path):
    isomorph.convert(bfloat16, tmp_path / "mlx", to="mlx")
    certificate = isomorph.verify(bfloat16, tmp_path / "mlx", report=tmp_path / "report", **SIZES)
    assert certificate, certificate
    assert [level.dtype for level in certificate.levels] == ["bfloat16", "float32"]
    assert certificate.candidate["framework"] == "mlx" and certificate.candidate["stored_dtype"] == "bfloat16"
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"report.md", "report.json", "layers.png", "agreement.png", "differences.png"}
    assert "passed" in (tmp_path / "report" / "report.md").read_text().splitlines()[0]


@pytest.mark.parametrize("layout", ["mlx-folded", "transformers-folded"])
def test_a_folded_head_is_rounding_by_design(bfloat16: Path, tmp_path: Path, layout: str):
    isomorph.convert(bfloat16, tmp_path / "folded", layout=layout)
    certificate = isomorph.verify(bfloat16, tmp_path / "folded", **SIZES)
    assert certificate, certificate
    assert certificate.levels[-1].judge == "own weights"


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_caught_in_float32(float32: Path, tmp_path: Path, name: str):
    mutated = mutate(float32, tmp_path / name, name)
    certificate = isomorph.verify(float32, mutated, candidate_framework="mlx", **SIZES)
    assert not certificate
    assert certificate.first_divergence is not None
    # Not the weights alone: what the model computes is seen to differ.
    assert any(check.name.startswith(("logits", "finite")) for check in certificate.failures)


@pytest.mark.parametrize("name", ["skip-dropped", "eps-1e-5", "rope-tables"])
def test_mutations_are_caught_in_bfloat16_too(bfloat16: Path, tmp_path: Path, name: str):
    mutated = mutate(bfloat16, tmp_path / name, name)
    certificate = isomorph.verify(bfloat16, mutated, candidate_framework="mlx", **SIZES)
    assert not certificate
    low = [check for check in certificate.failures if "bfloat16" in check.name]
    # Faults below the noise of bfloat16 are seen in float32 only.
    assert bool(low) is (MUTATIONS[name].shows_in == "bfloat16")


def test_a_wrong_eps_shows_most_where_activations_are_small(small_activations: Path, tmp_path: Path):
    mutated = mutate(small_activations, tmp_path / "eps", "eps-1e-5")
    assert isomorph.verify(small_activations, small_activations, candidate_framework="mlx", **SIZES)
    certificate = isomorph.verify(small_activations, mutated, candidate_framework="mlx", **SIZES)
    assert not certificate
    assert certificate.logits["max_abs"] > 0.1


def test_loaded_models_are_compared_as_they_are(float32: Path, tmp_path: Path):
    reference = isomorph.load(float32)
    assert isomorph.verify(reference, isomorph.load(float32, framework="mlx"), **SIZES)
    candidate = isomorph.load(float32)
    candidate.module.model.blocks[1].mlp_gain.a_g.data.fill_(1)  # type: ignore[attr-defined]
    certificate = isomorph.verify(reference, candidate, **SIZES)
    assert not certificate
    assert certificate.first_divergence == "block 1"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_judged_on_its_own_weights(bfloat16: Path, tmp_path: Path, bits: int):
    isomorph.quantize(bfloat16, tmp_path / "quantized", bits=bits, group_size=32)
    certificate = isomorph.verify(bfloat16, tmp_path / "quantized", **SIZES)
    assert certificate, certificate
    assert certificate.levels[0].judge == "own weights" and certificate.levels[0].dtype == "float32"
    # The price of the bits is in the figures, and is not hidden by the verdict.
    assert certificate.logits["kl_nats_per_token"] > 1e-6


def test_a_port_mistake_before_quantization_is_found(bfloat16: Path, tmp_path: Path):
    wrong = mutate(bfloat16, tmp_path / "wrong", "query-key-swapped")
    isomorph.quantize(wrong, tmp_path / "quantized", bits=8, group_size=32)
    certificate = isomorph.verify(bfloat16, tmp_path / "quantized", **SIZES)
    assert [check.name for check in certificate.failures] == ["weights: relative error of quantization"]
    assert "attn_query" in certificate.failures[0].detail or "attn_key" in certificate.failures[0].detail


def test_a_backend_that_computes_badly_is_named(bfloat16: Path, tmp_path: Path):
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("the fault is that of MLX on a CPU")
    isomorph.quantize(bfloat16, tmp_path / "quantized", bits=8, group_size=32)
    certificate = isomorph.verify(bfloat16, tmp_path / "quantized", candidate_dtype="bfloat16", **SIZES)
    assert certificate, certificate
    (backend,) = [check for check in certificate.checks if check.name.startswith("backend")]
    assert backend.measured is not None and [level.dtype for level in certificate.levels] == ["float32"]
