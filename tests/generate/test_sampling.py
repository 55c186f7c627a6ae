"""Filters by their definitions, draws by their distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.errors import InputError
from isomorph.generate.sampling import Sampler, Sampling, samplers

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05])).astype(np.float32)
PROMPT = np.array([1, 2, 3])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        # Top-p sees what top-k left: 4/7 alone is already 0.55 of it.
        ({"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285),
        # Temperature comes before top-p: at 0.5 the first two hold 0.877.
        ({"temperature": 0.5, "top_p": 0.87}, [0.64, 0.36, 0, 0, 0]),
        ({"temperature": 0.0, "top_p": 0.1}, [1, 0, 0, 0, 0]),
    ],
)
def test_filters(options, expected):
    sampling = Sampling(**{"temperature": 1.0} | options)
    np.testing.assert_allclose(sampling.probabilities(LOGITS), expected, rtol=1e-6, atol=1e-9)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, -2.0, 3.0, -3.0], np.float32)
    seen = np.array([True, True, False, False])
    penalized = Sampling(repetition_penalty=2.0).penalized(logits, seen)
    np.testing.assert_array_equal(penalized, [1.0, -4.0, 3.0, -3.0])
    greedy = Sampler(Sampling(repetition_penalty=4.0), np.array([2]), 4)
    # Token 2 is in the prompt (3.0 -> 0.75), then token 0 was drawn (2.0 -> 0.5).
    assert [greedy(logits) for _ in range(3)] == [0, 2, 2]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-400, 400), min_size=1, max_size=30),
    temperature=st.floats(1e-4, 50),
    top_p=st.floats(0.001, 1),
    top_k=st.integers(0, 40),
    min_p=st.floats(0, 1),
)
def test_any_filters_leave_a_distribution_with_the_likeliest_token(logits, temperature, top_p, top_k, min_p):
    scores = np.array(logits, np.float32) / 10
    found = Sampling(temperature, top_p, top_k, min_p).probabilities(scores)
    assert np.isfinite(found).all() and (found >= 0).all() and found[scores.argmax()] > 0
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)


def test_filters_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    random = np.random.default_rng(3)
    worst = 0.0
    for _ in range(60):
        logits = random.normal(0, 4, 50).astype(np.float32)
        prompt = random.integers(0, 50, 12)
        temperature, top_p = random.uniform(0.3, 2), random.uniform(0.2, 0.99)
        top_k, min_p, penalty = int(random.integers(2, 40)), random.uniform(0.001, 0.1), random.uniform(0.8, 1.5)
        steps = [
            theirs.RepetitionPenaltyLogitsProcessor(penalty),
            theirs.TemperatureLogitsWarper(temperature),
            theirs.TopKLogitsWarper(top_k),
            theirs.TopPLogitsWarper(top_p),
            theirs.MinPLogitsWarper(min_p),
        ]
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for step in steps:
            scores = step(torch.from_numpy(prompt)[None], scores)
        seen = np.isin(np.arange(50), prompt)
        found = Sampling(temperature, top_p, top_k, min_p, penalty).probabilities(logits, seen)
        worst = max(worst, np.abs(found - scores.softmax(-1)[0].numpy()).max())
    assert worst < 1e-12


def chi_squared(drawn: np.ndarray, expected: np.ndarray) -> float:
    counts = np.bincount(drawn, minlength=len(expected))
    return float((((counts - len(drawn) * expected) ** 2) / (len(drawn) * expected)).sum())


def test_draws_follow_the_distribution():
    """20,000 draws; chi-squared with 4 degrees of freedom exceeds 33 once in a million."""
    sampler = Sampler(Sampling(temperature=1.0, seed=1), PROMPT, 5)
    drawn = np.array([sampler(LOGITS) for _ in range(20_000)])
    right = np.exp(LOGITS.astype(np.float64))
    assert chi_squared(drawn, right) < 33
    # Negative control: a temperature that is 10 % off is seen.
    wrong = Sampling(temperature=1.1).probabilities(LOGITS)
    assert chi_squared(drawn, wrong) > 33


def test_rows_draw_alike_alone_and_in_a_batch_and_apart_from_each_other():
    sampling = Sampling(temperature=1.0, seed=3)
    flat = np.zeros(1000, np.float32)
    other = np.array([4, 5])

    def draws(sampler: Sampler) -> list[int]:
        return [sampler(flat) for _ in range(8)]

    alone = draws(samplers(sampling, [PROMPT], 1000)[0])
    first, second, third = map(draws, samplers(sampling, [PROMPT, other, PROMPT], 1000))
    assert first == alone
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert draws(Sampler(Sampling(temperature=1.0, seed=4), PROMPT, 1000)) != alone
    assert draws(Sampler(Sampling(temperature=1.0), PROMPT, 1000)) != draws(
        Sampler(Sampling(temperature=1.0), PROMPT, 1000)
    )


def test_a_seed_gives_the_same_tokens_where_logits_differ_by_rounding():
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (200, 500)).astype(np.float32)
    noisy = logits + random.normal(0, 1e-6, logits.shape).astype(np.float32)
    sampling = Sampling(temperature=0.8, seed=9)
    one, other = Sampler(sampling, PROMPT, 500), Sampler(sampling, PROMPT, 500)
    assert [one(row) for row in logits] == [other(row) for row in noisy]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(InputError, match=f"expected {name} .*; found"):
        Sampling(**options)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(InputError, match="NaN"):
        Sampler(Sampling(), PROMPT, 5)(np.array([0, np.nan, 0, 0, 0], np.float32))
