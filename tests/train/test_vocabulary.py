"""The learned vocabulary is one that tiktoken, and the tokenizer made from it, read alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from isomorph.architectures.talkie import tokenizer
from isomorph.train.vocabulary import learn_vocabulary, load_encoding

from .conftest import SHAPE, SPECIALS, sentences


def test_bytes_come_first_then_merges_of_what_is_known(vocabulary: Path) -> None:
    ranks = tokenizer.read_vocabulary(vocabulary)
    tokens = sorted(ranks, key=ranks.__getitem__)
    assert len(tokens) == SHAPE["vocab_size"] - SPECIALS
    assert tokens[:256] == [bytes([value]) for value in range(256)]
    known = set(tokens[:256])
    for token in tokens[256:]:
        assert any(token[:at] in known and token[at:] in known for at in range(1, len(token))), token
        known.add(token)


def test_frequent_words_become_one_token(vocabulary: Path) -> None:
    encoding = load_encoding(vocabulary)
    assert len(encoding.encode_ordinary(" engine")) < len(" engine") / 2
    assert len(encoding.encode_ordinary(" zyx")) == 4


def test_every_text_round_trips(vocabulary: Path) -> None:
    encoding = load_encoding(vocabulary)
    text = sentences(20, 3) + "naïve — 𝄞 \r\n\t <|end|> 1930"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_the_fast_tokenizer_agrees(vocabulary: Path) -> None:
    fast = tokenizer.load(vocabulary, SHAPE["vocab_size"])
    text = sentences(50, 4)
    assert fast.encode(text) == load_encoding(vocabulary).encode_ordinary(text)


def test_learning_is_deterministic() -> None:
    text = sentences(200, 5)
    assert learn_vocabulary([text], 280) == learn_vocabulary([text], 280)
    assert learn_vocabulary([text], 280) != learn_vocabulary([text.upper()], 280)
    assert np.unique(learn_vocabulary([text], 280)).size == 280
