"""Windows, perplexity and divergence on a toy model, against the same sums written out."""

from __future__ import annotations

import json

import numpy as np
import pytest

import isomorph
from isomorph.evaluate.metrics import log_softmax
from isomorph.evaluate.protocols import encode, protocol_named
from numpy_model import NumpyModel

IDS = np.random.default_rng(3).integers(0, 50, 300)


def scored(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    protocol = protocol_named("windowed", window=window, stride=stride)
    return [(part.start, part.end, part.score_from) for part in protocol.windows(tokens, 10_000)]


def test_windows_without_overlap_leave_out_their_first_token():
    assert scored(10, 4, 4) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    # A last window of one token has nothing to score.
    assert scored(9, 4, 4) == [(0, 4, 1), (4, 8, 5)]


def test_overlapping_windows_score_every_token_once():
    parts = scored(11, 4, 2)
    assert parts == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8), (8, 11, 10)]
    assert [i for _, end, first in parts for i in range(first, end)] == list(range(1, 11))


def test_perplexity_is_the_exponential_of_the_mean_loss():
    model = NumpyModel()
    record = isomorph.evaluate.perplexity(model, IDS, window=100, stride=100)
    losses = []
    for start in (0, 100, 200):
        ids = IDS[start : start + 100]
        log_p = log_softmax(model.logits(ids[None])[0])
        losses += [-log_p[i, ids[i + 1]] for i in range(99)]
    assert record.results["tokens_scored"] == 297
    np.testing.assert_allclose(record.results["nll_nats_per_token"], np.mean(losses), rtol=1e-12)
    np.testing.assert_allclose(record.results["perplexity"], np.exp(np.mean(losses)), rtol=1e-12)
    low, high = record.results["perplexity_interval_95"]
    assert low < record.results["perplexity"] < high
    assert record.results["bits_per_byte"] is None


def test_windows_are_cut_to_the_context_and_the_record_says_so():
    record = isomorph.evaluate.perplexity(NumpyModel(), IDS)
    assert (record.protocol["window"], record.protocol["stride"]) == (128, 128)
    assert json.loads(json.dumps(record.to_json(), allow_nan=False))["kind"] == "perplexity"


def test_fingerprints_differ_when_tokens_or_windows_do():
    def fingerprint(ids: np.ndarray, **numbers: int) -> str | None:
        return isomorph.evaluate.perplexity(NumpyModel(), ids, **numbers).fingerprint

    same = fingerprint(IDS, window=100, stride=100)
    assert same == fingerprint(IDS, window=100, stride=100)
    assert len({same, fingerprint(IDS, window=100, stride=50), fingerprint(IDS[:-1], window=100, stride=100)}) == 3


def test_divergence_of_a_model_from_itself_is_zero_and_from_another_is_not():
    same = isomorph.evaluate.divergence(NumpyModel(), NumpyModel(), IDS)
    assert abs(same.results["kl_nats_per_token"]) < 1e-12 and same.results["top1_agreement"] == 1
    other = isomorph.evaluate.divergence(NumpyModel(), NumpyModel(seed=1), IDS)
    assert other.results["kl_nats_per_token"] > 0.1 and other.results["top1_agreement"] < 0.9
    assert other.results["kl"]["p99"] >= other.results["kl_nats_per_token"]


def test_bad_input_is_one_line():
    for call, message in [
        (lambda: isomorph.evaluate.perplexity(NumpyModel(), IDS[:1]), "at least 2 tokens"),
        (lambda: isomorph.evaluate.perplexity(NumpyModel(), "text"), "no tokenizer"),
        (lambda: isomorph.evaluate.perplexity(NumpyModel(), IDS, protocol="windowd"), "did you mean 'windowed'"),
        (lambda: isomorph.evaluate.perplexity(NumpyModel(), IDS, window=10, stride=20), "stride between 1"),
        (lambda: isomorph.evaluate.perplexity(NumpyModel("nan"), IDS), "finite logits"),
        (lambda: isomorph.evaluate.divergence(NumpyModel(), NumpyModel(vocab_size=9), IDS), "one vocabulary"),
    ]:
        with pytest.raises(isomorph.InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


class Characters:
    """A fast tokenizer of one token a character, two for those beyond ASCII, as byte-level ones may have."""

    is_fast = True

    def __call__(self, text: str, **options: object) -> dict[str, list]:
        spans = [(i, i + 1) for i, character in enumerate(text) for _ in range(1 if character < "\x80" else 2)]
        return {"input_ids": [0] * len(spans), "offset_mapping": spans}


def test_bytes_are_those_of_the_scored_tokens():
    stream = encode(protocol_named("windowed"), Characters(), "aé€z")
    assert stream.widths is not None and stream.widths.tolist() == [1, 2, 0, 3, 0, 1]
