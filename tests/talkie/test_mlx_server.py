"""The real `mlx_lm.server` on a folder that convert wrote: eight people at once get what each would get alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import isomorph
from serving import ask, server
from speaking import with_tokenizer

#: Questions of eight lengths; two share a beginning, so that the server reuses a cache.
QUESTIONS = (
    "the cat",
    "the cat sat on the mat and said nothing at all",
    "x",
    "in the beginning there was",
    "on and on it goes, and nobody knows where it ends or why it does",
    "8",
    "once upon a time",
    "what is the capital of the other place, and who lives there?",
)


def together(address: str) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(len(QUESTIONS)) as people:
        return list(people.map(lambda question: ask(address, question), QUESTIONS))


def alone(address: str) -> list[tuple[str, str]]:
    # A request with a seed never joins a batch.
    return [ask(address, question, seed=0) for question in QUESTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("served")
    isomorph.convert(with_tokenizer(base / "source"), base / "served", layout="mlx-folded")
    return base / "served"


def test_eight_requests_at_once_get_the_answers_of_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    with server(folder, tmp_path / "log") as address:
        cold = together(address)
        expected = alone(address)
        assert cold == expected
        assert together(address) == expected  # now with what the prompt cache remembers
    assert len(set(expected)) == len(QUESTIONS) and all(answer for answer, _ in expected)


def test_rows_that_share_an_offset_would_be_seen(folder: Path, tmp_path: Path) -> None:
    """The control: with the longest row's offset for all, the same questions get other answers in a batch only."""
    file = folder / "modeling_mlx.py"
    right = file.read_text()
    wrong = right.replace("offset = offset + 0", "offset = int(mx.max(offset))")
    assert wrong != right
    file.write_text(wrong)
    try:
        with server(folder, tmp_path / "log") as address:
            expected = alone(address)
            assert together(address) != expected
            assert alone(address) == expected
    finally:
        file.write_text(right)
