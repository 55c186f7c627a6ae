"""Each named protocol against the same thing written out by hand, over a tokenizer of single characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import isomorph
from isomorph.errors import InputError
from isomorph.evaluate.metrics import log_softmax
from isomorph.evaluate.protocols import PROTOCOLS, articles, encode, protocol_named, stream_of
from numpy_model import NumpyModel

TEXT = "\n = One = \n \n = = Early = = \n café abc\n\n = Two = \n xyz\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({*TEXT, *"abcdefghijklmnopqrstuvwxyz"})
    vocabulary = {name: index for index, name in enumerate(["<bos>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def ids(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


def losses(model: NumpyModel, tokens: list[int]) -> np.ndarray:
    """Loss of each token but the first, seen from the first on."""
    log_p = log_softmax(model.logits(np.array([tokens]))[0])
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]]


def test_gelu_gpt(tokenizer: Any) -> None:
    """Lines joined, BOS, windows of T + 1 at stride T, so every token is a target once; padding is none."""
    model = NumpyModel()
    model.tokenizer = tokenizer
    joined = "\n\n".join(line for line in TEXT.split("\n") if line.strip())
    tokens = [0, *ids(tokenizer, joined)]
    expected = np.concatenate([losses(model, tokens[start : start + 9]) for start in range(0, len(tokens) - 1, 8)])
    record = isomorph.evaluate.perplexity(model, TEXT, "gelu-gpt", window=8)
    assert record.results["tokens_scored"] == len(expected) == len(tokens) - 1
    assert record.results["bytes_scored"] == len(joined.encode())
    np.testing.assert_allclose(record.results["nll_nats_per_token"], expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(
        record.results["bits_per_byte"], expected.sum() / np.log(2) / len(joined.encode()), rtol=1e-12
    )
    # The first token of each window is what other protocols leave out.
    assert (
        record.results["tokens_scored"]
        > isomorph.evaluate.perplexity(model, TEXT, "windowed", window=8).results["tokens_scored"]
    )


def test_targets_equal_to_padding_are_not_scored(tokenizer: Any) -> None:
    model = NumpyModel()
    model.tokenizer = tokenizer
    text = "abc<eos>def<eos>"
    record = isomorph.evaluate.perplexity(model, text, "gelu-gpt", window=32)
    expected = losses(model, [0, *ids(tokenizer, "abc"), 1, *ids(tokenizer, "def"), 1])[[0, 1, 2, 4, 5, 6]]
    assert record.results["tokens_scored"] == 6
    np.testing.assert_allclose(record.results["nll_nats_per_token"], expected.mean(), rtol=1e-12)


def test_windows_are_as_long_as_the_model_was_trained(tokenizer: Any) -> None:
    assert protocol_named("gelu-gpt", trained_length=512).window == protocol_named("gelu-gpt", 512, 512).stride == 512
    assert protocol_named("gelu-gpt", window=64, trained_length=512).stride == 64
    assert protocol_named("windowed", trained_length=512).window == 4096


def test_gpt_oss(tokenizer: Any) -> None:
    """EOS between articles, no BOS, windows without overlap whose first token is not scored."""
    model = NumpyModel()
    model.tokenizer = tokenizer
    one, two = articles(TEXT)
    assert one + two == TEXT and two.startswith(" = Two = \n") and "Early" in one
    tokens = [*ids(tokenizer, one), 1, *ids(tokenizer, two)]
    expected = np.concatenate([losses(model, tokens[start : start + 16]) for start in range(0, len(tokens), 16)])
    record = isomorph.evaluate.perplexity(model, TEXT, "gpt-oss", window=16)
    np.testing.assert_allclose(record.results["nll_nats_per_token"], expected.mean(), rtol=1e-12)
    assert len(record.protocol["unknown"]) == 4 and record.results["tokens_scored"] == len(expected)
    assert record.data["separator_id"] == 1
    assert len(stream_of(protocol_named("gpt-oss", limit=20), tokenizer, TEXT).ids) == 20


def test_llama_cpp(tokenizer: Any) -> None:
    """BOS before the stream and in place of each window's first token; the second half; only full windows."""
    model = NumpyModel()
    model.tokenizer = tokenizer
    tokens = [0, *ids(tokenizer, TEXT)]
    expected = []
    for start in range(0, len(tokens) - 15, 16):
        window = losses(model, [0, *tokens[start + 1 : start + 16]])
        expected.append(window[8:])  # targets 9..15: those that logits 8..14 predict
    record = isomorph.evaluate.perplexity(model, TEXT, "llama.cpp", window=16)
    assert record.results["tokens_scored"] == 7 * len(expected) and len(expected) == len(tokens) // 16
    np.testing.assert_allclose(record.results["nll_nats_per_token"], np.concatenate(expected).mean(), rtol=1e-12)


def test_mlx_lm(tokenizer: Any) -> None:
    model = NumpyModel()
    model.tokenizer = tokenizer
    tokens = ids(tokenizer, TEXT)
    expected = [losses(model, tokens[start : start + 16]) for start in range(0, len(tokens) - 15, 16)]
    record = isomorph.evaluate.perplexity(model, TEXT, "mlx-lm", window=16)
    np.testing.assert_allclose(record.results["nll_nats_per_token"], np.concatenate(expected).mean(), rtol=1e-12)


def test_no_two_protocols_share_a_fingerprint(tokenizer: Any) -> None:
    model = NumpyModel()
    model.tokenizer = tokenizer
    text = TEXT * 20
    prints = {isomorph.evaluate.perplexity(model, text, name, window=16).fingerprint for name in PROTOCOLS}
    assert len(prints) == len(PROTOCOLS)


def test_a_text_without_a_full_window_is_refused(tokenizer: Any) -> None:
    model = NumpyModel()
    model.tokenizer = tokenizer
    for measure in (
        lambda: isomorph.evaluate.perplexity(model, "abc", "llama.cpp", window=16),
        lambda: isomorph.evaluate.divergence(model, model, "abc", "mlx-lm", window=16),
    ):
        with pytest.raises(InputError, match="found none to score"):
            measure()


def test_special_tokens_stand_for_no_byte(tokenizer: Any) -> None:
    stream = encode(PROTOCOLS["gpt-oss"], tokenizer, TEXT)
    assert stream.widths is not None and stream.widths.sum() == len(TEXT.encode())
    assert (stream.widths[stream.ids == 1] == 0).all() and (stream.ids == 1).sum() == 1
