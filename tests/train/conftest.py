"""A text, its vocabulary and a tiny shape, shared by the tests of the trainer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from isomorph.train.vocabulary import learn_vocabulary, save_vocabulary

#: config.json keys of a model that trains in a second.
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
SPECIALS = 5


def sentences(count: int, seed: int) -> str:
    """English-like text with something to learn: subject, verb, object, in lines."""
    choose = random.Random(seed).choice
    who = ["The engine", "A gentleman", "The old boiler", "My aunt", "The captain"]
    what = ["condenses", "observed", "repaired", "will not forget", "remembers"]
    whom = ["the steam", "a candle", "the café at noon", "eleven letters", "the tide"]
    return "\n".join(f"{choose(who)} {choose(what)} {choose(whom)}." for _ in range(count)) + "\n"


CATECHISM = """A catechism.

1. _Q._--What is meant
by a vacuum?

_A._--A vacuum means an
empty space.

It is rarely met with.

2. _Q._--What is the rule?

_A._--The following rule:

Q. 3. {71} Who was he?
A. He was a captain.
"""


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two texts, `held_out/` with a third and `catechism.txt` beside it."""
    folder = tmp_path_factory.mktemp("books")
    for seed, name in enumerate(("one", "two")):
        (folder / f"{name}.txt").write_text(sentences(400, seed))
    (folder / "held_out").mkdir()
    (folder / "held_out" / "three.txt").write_text(sentences(100, 7))
    (folder / "questions").mkdir()
    (folder / "questions" / "catechism.txt").write_text(CATECHISM)
    return folder


@pytest.fixture(scope="session")
def vocabulary(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt learned from the two texts, of the size that `SHAPE` leaves for it."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    texts = [file.read_text() for file in sorted(books.glob("*.txt"))]
    save_vocabulary(learn_vocabulary(texts, SHAPE["vocab_size"] - SPECIALS), path)
    return path
