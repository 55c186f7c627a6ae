"""Numbers against their textbook definitions, computed another way, with what must not equal them."""

from __future__ import annotations

import numpy as np
import pytest

from isomorph.evaluate.degeneration import first_loop
from isomorph.evaluate.metrics import Summary, compare_logits, kl_divergence, token_nll, top_k_overlap, top_margin


def logits(seed: int, tokens: int = 40, vocabulary: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (tokens, vocabulary)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values.astype(np.longdouble))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_kl_is_the_sum_over_the_vocabulary_in_nats_per_token():
    p, q = softmax(logits(0)), softmax(logits(1))
    expected = (p * np.log(p / q)).sum(-1)
    kl = kl_divergence(logits(0), logits(1))
    assert kl.shape == (40,) and kl.dtype == np.float64
    np.testing.assert_allclose(kl, expected.astype(np.float64), rtol=1e-12)
    # Negative controls: the other direction, and the mean over the vocabulary, are other numbers.
    assert np.abs(kl_divergence(logits(1), logits(0)) - kl).max() > 0.1
    assert np.abs((p * np.log(p / q)).mean(-1) - kl).max() > 0.1


def test_kl_of_equal_distributions_is_zero_whatever_the_offset():
    assert np.abs(kl_divergence(logits(0), logits(0) + 50)).max() < 1e-12


def test_kl_survives_logits_of_minus_infinity_and_large_ones():
    masked = logits(0)
    masked[:, 3] = -np.inf
    assert np.isfinite(kl_divergence(masked, logits(1))).all()
    assert np.isfinite(kl_divergence(logits(0) * 1e4, logits(1) * 1e4)).all()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    whole = kl_divergence(logits(0), logits(1)), token_nll(logits(0), np.arange(40) % 30)
    monkeypatch.setattr("isomorph.evaluate.metrics.CHUNK_VALUES", 100)
    np.testing.assert_array_equal(kl_divergence(logits(0), logits(1)), whole[0])
    np.testing.assert_array_equal(token_nll(logits(0), np.arange(40) % 30), whole[1])


def test_token_nll_is_minus_the_log_probability_of_the_target():
    targets = np.arange(40) % 30
    expected = -np.log(softmax(logits(0))[np.arange(40), targets])
    np.testing.assert_allclose(token_nll(logits(0), targets), expected.astype(np.float64), rtol=1e-12)


def test_top_k_and_margin():
    reference = np.array([[1.0, 4.0, 3.0, 0.0], [9.0, 1.0, 2.0, 3.0]])
    candidate = np.array([[4.0, 3.0, 1.0, 0.0], [9.0, 1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(top_k_overlap(reference, candidate, 2), [0.5, 1.0])
    np.testing.assert_array_equal(top_margin(reference), [1.0, 6.0])


def test_summary_has_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(2, 3, 10_000)
    summary = Summary.of(values)
    assert abs(summary.standard_error - 0.03) < 1e-3
    assert abs(summary.mean - 2) < 4 * summary.standard_error
    assert summary.max == values.max() and summary.tokens == 10_000


@pytest.mark.parametrize("values", [[], [1.0, np.nan]])
def test_summary_of_nothing_or_nan_is_nan(values: list[float]):
    assert np.isnan(Summary.of(np.array(values)).mean)


def test_comparison_refuses_nothing_and_other_shapes_and_spoils_on_nan():
    with pytest.raises(ValueError, match="non-empty"):
        compare_logits(logits(0)[:0], logits(0)[:0])
    with pytest.raises(ValueError, match="equal"):
        compare_logits(logits(0), logits(0)[:, 1:])
    spoilt = logits(0)
    spoilt[3, 3] = np.nan
    comparison = compare_logits(logits(0), spoilt)
    assert np.isnan(comparison.max_abs) and np.isnan(comparison.top1_agreement)


def test_loops_are_found_where_they_begin_with_the_shortest_period():
    start = list(range(100, 150))
    loop = first_loop(start + [1, 2, 3, 4, 5, 6, 7] * 6)
    assert loop is not None and (loop.start, loop.period) == (50, 7)
    # It need not last to the end.
    assert first_loop(start + [1, 2, 3, 4, 5, 6, 7] * 6 + start) == loop
    assert first_loop([5] * 40).period == 1


def test_what_is_not_a_loop():
    assert first_loop([]) is None
    assert first_loop(list(range(300))) is None
    assert first_loop([*range(50), *[1, 2, 3] * 3, *range(60, 100)]) is None  # nine tokens are too few
    assert first_loop([*range(40), *range(40)]) is None  # twice is no loop
