"""Each check of `verify` on a toy model: it passes for an equal one and fails for one with its fault."""

from __future__ import annotations

import json

import numpy as np
import pytest

import isomorph
from isomorph.verify.certificate import Certificate, Check
from isomorph.verify.noise import measure_noise
from numpy_model import NumpyModel


def statuses(certificate: Certificate) -> dict[str, str]:
    return {check.name: check.status for check in certificate.checks}


def test_equal_models_pass_every_check():
    certificate = isomorph.verify(NumpyModel(), NumpyModel())
    assert certificate, certificate.failures
    assert certificate.logits["max_abs"] == 0 and certificate.logits["top1_agreement"] == 1
    assert certificate.first_divergence is None
    assert {"cached = uncached, float32", "batch = single, float32", "batch decode = single, float32"} <= set(
        statuses(certificate)
    )


def test_one_wrong_position_is_seen_and_one_unlucky_one_is_not():
    exact = np.random.default_rng(0).normal(size=(512, 32))
    reference, unlucky, wrong = (
        exact + 0.01 * np.random.default_rng(seed).normal(size=exact.shape) for seed in (1, 2, 3)
    )
    unlucky[44], wrong[44] = exact[44] + 0.04, exact[44] + 0.08
    lucky, faulty = (measure_noise(values, reference, exact, "bfloat16") for values in (unlucky, wrong))
    assert lucky.worst_error > 2 * lucky.worst_floor and not lucky.too_large
    assert faulty.error < 2 * faulty.floor and faulty.too_large


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("noise", "logits, float32: largest difference"),
        ("late", "logits, float32: largest difference"),
        ("nan", "finite, float32"),
        ("cache", "cached = uncached, float32"),
        ("mask", "batch = single, float32"),
        ("mask", "batch decode = single, float32"),
        ("hidden", "layers, float32: share of the limit"),
    ],
)
def test_each_fault_fails_its_check(fault: str, check: str):
    certificate = isomorph.verify(NumpyModel(), NumpyModel(fault))
    assert not certificate
    assert statuses(certificate)[check] == "fail"


def test_a_fault_in_the_reference_fails_as_well():
    assert not isomorph.verify(NumpyModel("nan"), NumpyModel())


def test_first_divergence_names_the_first_wrong_state():
    assert isomorph.verify(NumpyModel(), NumpyModel("hidden")).first_divergence == "block 1"
    assert isomorph.verify(NumpyModel(), NumpyModel("noise")).first_divergence == "logits"
    assert isomorph.verify(NumpyModel(), NumpyModel(seed=1)).first_divergence == "embedding"


def test_models_of_different_shape_fail_without_being_compared():
    certificate = isomorph.verify(NumpyModel(), NumpyModel(vocab_size=51))
    assert not certificate
    assert "vocabulary 51" in str(certificate.failures[0].measured)


def test_low_precision_is_judged_by_the_scaled_rule_when_nothing_finer_can_run():
    assert isomorph.verify(NumpyModel(dtype="bfloat16"), NumpyModel(dtype="bfloat16"))
    assert not isomorph.verify(NumpyModel(dtype="bfloat16"), NumpyModel(dtype="bfloat16", seed=1))


def test_a_certificate_that_compared_nothing_fails():
    assert not Certificate({}, {}, {})
    assert not Certificate({}, {}, {}, checks=[Check("long greedy run", "pass")])


def test_short_prompts_are_warned_of_and_ids_are_used_as_given():
    ids = np.arange(20)
    certificate = isomorph.verify(NumpyModel(), NumpyModel(), text=ids)
    assert certificate.prompt["tokens"] == 20
    assert [check.name for check in certificate.warnings] == ["prompt length"]


def test_json_has_the_documented_keys_and_no_infinities():
    for fault in (None, "nan"):
        document = json.loads(json.dumps(isomorph.verify(NumpyModel(), NumpyModel(fault)).to_json(), allow_nan=False))
        assert document["passed"] is (fault is None)
        assert {"max_abs", "mean_abs", "top1_agreement", "kl_nats_per_token"} <= set(document["logits"])
        assert {"noise_ratio", "first_divergence", "checks", "levels", "environment", "prompt"} <= set(document)


def test_text_without_a_tokenizer_is_refused_in_one_line():
    with pytest.raises(isomorph.InputError, match="expected ids, because the model has no tokenizer"):
        isomorph.verify(NumpyModel(), NumpyModel(), text="words")
