"""`verify` on gpt-oss: right ports pass with their routing, stock mlx-lm's YaRN and permuted routers are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import isomorph
from isomorph.cli import run
from isomorph.verify.capture import Capture
from isomorph.verify.routing import compare_routing, margins, routing_check
from tiny_gpt_oss import tiny_config, write_checkpoint

CONFIG = tiny_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
SIZES = {"tokens": 64, "greedy_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("packed"), CONFIG, seed=5)


@pytest.mark.parametrize("framework", ["mlx", pytest.param("flax", marks=pytest.mark.full)])
def test_a_right_port_passes_with_its_routing(folder: Path, framework: str) -> None:
    certificate = isomorph.verify(folder, folder, candidate_framework=framework, **SIZES)
    assert certificate, certificate
    assert [layer.layer for layer in certificate.levels[0].routing] == [0, 1]
    assert certificate.routing is not None and certificate.routing["agreement"] == 1.0
    assert any(check.name.startswith("routing") and check.status == "pass" for check in certificate.checks)


def test_stock_mlx_lm_fails_at_rope(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm ignores YaRN's `truncate: false`; the very folder passes with isomorph's model (above)."""
    sizes = ["--tokens", "64", "--greedy-tokens", "4"]
    options = ["--candidate-framework", "mlx-lm", "--json", "--report", str(tmp_path / "report")]
    assert run(["verify", str(folder), str(folder), *options, *sizes]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["candidate"]["framework"] == "mlx-lm" and document["first_divergence"] == "block 0"
    assert 1 <= document["levels"][0]["first_wrong_position"] < 16
    report = (tmp_path / "report" / "report.md").read_text()
    assert "first beyond its limit: block 0, from position" in report and "rope" in report
    assert "## Experts" in report


def test_a_fault_that_positions_do_not_make_is_told_from_rope(folder: Path, tmp_path: Path) -> None:
    wrong = write_checkpoint(tmp_path / "eps", CONFIG | {"rms_norm_eps": 1e-2}, seed=5)
    certificate = isomorph.verify(folder, wrong, candidate_framework="mlx", **SIZES)
    assert not certificate and certificate.levels[0].first_wrong_position == 0


def test_a_window_one_longer_shows_where_it_begins(folder: Path, tmp_path: Path) -> None:
    wrong = write_checkpoint(tmp_path / "window", CONFIG | {"sliding_window": 17}, seed=5)
    certificate = isomorph.verify(folder, wrong, candidate_framework="mlx", **SIZES)
    assert not certificate and certificate.levels[0].first_wrong_position == 16


def test_permuted_routers_are_found(tmp_path: Path) -> None:
    right, wrong = (write_checkpoint(tmp_path / name, CONFIG, seed=5, packed=False) for name in ("right", "wrong"))
    tensors = load_file(wrong / "model.safetensors")
    name = "model.layers.1.mlp.router.weight"
    tensors[name] = np.ascontiguousarray(np.roll(tensors[name], 1, axis=0))
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    certificate = isomorph.verify(right, wrong, candidate_framework="mlx", **SIZES)
    assert not certificate and certificate.routing is not None and certificate.routing["agreement"] < 0.9
    check = next(check for check in certificate.checks if check.name.startswith("routing"))
    assert check.status == "fail" and "first beyond it: layer 1" in check.detail


def capture(*routers: np.ndarray) -> Capture:
    return Capture("float32", np.zeros((len(routers[0]), 2)), [], list(routers), 2)


def test_only_a_near_tie_may_go_elsewhere() -> None:
    logits = np.array([[3.0, 1.0, 0.0, -1.0], [1.0, 2.0, 1.0 - 1e-6, 0.0]])
    assert np.allclose(margins(logits, 2), [1.0, 1e-6], rtol=1e-6, atol=0)
    near, far = logits.copy(), logits.copy()
    near[1, 2] += 2e-6
    far[0, 2] += 1.5
    assert routing_check(compare_routing(capture(near), capture(logits), None), "float32").status == "pass"
    assert compare_routing(capture(near), capture(logits), None)[0].agreement == 0.5
    assert routing_check(compare_routing(capture(far), capture(logits), None), "float32").status == "fail"
    nothing = np.full_like(logits, np.nan)
    assert routing_check(compare_routing(capture(nothing), capture(logits), None), "float32").status == "fail"
    with pytest.raises(ValueError, match="routers of shapes"):
        compare_routing(capture(logits, logits), capture(logits), None)
