"""Fixtures every test folder shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and texts beside the checkout; users of the project do not have it."""
    if not SHARED.is_dir():
        pytest.skip("../shared (reference outputs and texts) is not beside this checkout")
    return SHARED


def assert_logits_close(actual: np.ndarray, reference: np.ndarray) -> None:
    """The numeric rule: fp32 logits within 2e-5 * max(1, max|logit| / 10) of an independent reference."""
    from isomorph.verify.tolerance import allowed_logit_difference

    assert actual.shape == reference.shape and actual.size
    assert np.isfinite(actual).all()
    difference = float(np.abs(actual.astype(np.float64) - reference).max())
    assert difference <= allowed_logit_difference(reference), difference
