"""The published reports' figures are the floor, on the pocket model over 2,048 held-out tokens."""

from __future__ import annotations

import numpy as np
import pytest

import isomorph
from isomorph import pocket
from isomorph.evaluate.metrics import top_margin
from isomorph.verify.prompts import make_prompt

TOKENS = 2048


def logits(framework: str, dtype: str) -> np.ndarray:
    """[TOKENS, V] of the pocket model over its held-out excerpt."""
    model = isomorph.load(pocket.path(), framework=framework, dtype=dtype)
    rows = make_prompt(model, tokens=TOKENS).rows
    return np.concatenate([model.logits(row[None])[0] for row in rows])


@pytest.fixture(scope="module")
def runs() -> dict[str, np.ndarray]:
    frameworks = ("torch", "mlx")
    return {f"{fw} {dtype}": logits(fw, dtype) for fw in frameworks for dtype in ("float32", "bfloat16")}


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    return float((left.argmax(-1) == right.argmax(-1)).mean())


def test_at_least_two_thousand_tokens(runs: dict[str, np.ndarray]):
    assert len(runs["torch float32"]) >= 2000


def test_float32_differs_by_no_more_than_the_published_parity(runs: dict[str, np.ndarray]):
    # 1.3e-5 was reported at logits of ordinary size; larger ones have proportionally larger roundings.
    allowed = 1.3e-5 * max(1, np.abs(runs["torch float32"]).max() / 10)
    assert np.abs(runs["mlx float32"] - runs["torch float32"]).max() <= allowed
    assert np.abs(runs["mlx bfloat16"] - runs["torch float32"]).max() > allowed


def test_bfloat16_ports_agree_as_often_as_the_reference_does_with_itself(runs: dict[str, np.ndarray]):
    own = agreement(runs["torch bfloat16"], runs["torch float32"])
    # Give or take two standard errors of the difference of two counts.
    error = (2 * own * (1 - own) / len(runs["torch float32"])) ** 0.5
    assert agreement(runs["mlx bfloat16"], runs["torch bfloat16"]) >= own - 2 * error
    # Positions moved by one, the mistake of an off-by-one cache, agree far less.
    assert agreement(runs["mlx bfloat16"][1:], runs["torch bfloat16"][:-1]) < own


def test_where_the_margin_exceeds_the_noise_they_agree(runs: dict[str, np.ndarray]):
    noise = np.abs(runs["torch bfloat16"] - runs["torch float32"]).max()
    clear = top_margin(runs["torch bfloat16"]) > noise
    assert clear.mean() > 0.5
    assert agreement(runs["mlx bfloat16"][clear], runs["torch bfloat16"][clear]) >= 0.989
