"""The shipped pocket gpt-oss: what its card says, and builds of it that compute what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from isomorph import pocket
from isomorph.checkpoint import open_checkpoint
from isomorph.frameworks.model import Model
from isomorph.quantize.write import quantize

TEXT = " The ship was launched in 1912 and sold to the navy . It was used in the war until 1945 ."

#: Only the experts change.
OTHERS_KEPT = dict.fromkeys(("embed", "head", "q", "k", "v", "o", "router"), False)


@pytest.fixture(scope="module")
def model() -> Model:
    return isomorph.load("pocket:gpt_oss", framework="torch", dtype="float32")


def test_it_is_what_its_card_says() -> None:
    folder = pocket.path("gpt_oss")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    found, card = isomorph.inspect(folder), (folder / "README.md").read_text()
    assert (found.layout, found.parameters, found.payload_bytes) == ("published", 2_050_736, 1_791_328)
    assert "2.1 million parameters" in card and "CC BY-SA" in card and f"{found.payload_bytes:,}" in card
    tensors = open_checkpoint(folder).tensors
    for name, tensor in tensors.items():
        if name.endswith(("sinks", "bias", "proj_bias")):  # all of them began as zeros
            assert (np.abs(tensor.read().astype(np.float32)) > 1e-3).any(), name
    assert sum(tensor.dtype == "uint32" for tensor in tensors.values()) == 8


def test_it_predicts_text(model: Model) -> None:
    """Far better than chance; scrambled tokens, the control, are far from it."""
    ids = np.array([model.tokenizer.encode(TEXT)])

    def nats(ids: np.ndarray) -> float:
        logits = model.logits(ids[:, :-1]).astype(np.float64)
        log_sums = np.log(np.exp(logits).sum(-1))
        return float((log_sums - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]).mean())

    assert nats(ids) < 3.7
    assert nats(np.random.default_rng(0).permuted(ids, axis=1)) > 5


@pytest.mark.parametrize("bits", [5, 6])
def test_exact_builds_compute_the_same(bits: int, model: Model, tmp_path: Path) -> None:
    """Experts as affine codes, logits as before within the numeric rule; rounded ones, the control, are off."""
    ids = np.array([model.tokenizer.encode(4 * TEXT)])
    expected = model.logits(ids)
    recipe = {"expert": {"bits": bits, "group_size": 32}, **OTHERS_KEPT}
    for name, rounding in (("exact", False), ("rounded", True)):
        quantize(pocket.path("gpt_oss"), tmp_path / name, recipe=recipe, requantize=rounding)
    assert_logits_close(isomorph.load(tmp_path / "exact", framework="torch", dtype="float32").logits(ids), expected)
    with pytest.raises(AssertionError):
        assert_logits_close(
            isomorph.load(tmp_path / "rounded", framework="torch", dtype="float32").logits(ids), expected
        )
