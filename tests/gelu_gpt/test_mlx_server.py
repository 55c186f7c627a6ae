"""The real `mlx_lm.server` on a folder that convert wrote: eight people at once get what each would get alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import isomorph
from serving import answer, ask, server
from speaking import gelu_gpt_with_tokenizer

LONG = "It was a bright cold day in April, and the clocks were striking thirteen. Nobody in the house had noticed it. "

#: One token a byte: shorter than the window of 128, as long, longer than both windows; some share a beginning.
QUESTIONS = (
    "the cat",
    "the cat sat on the mat and said nothing at all",
    "x",
    LONG,
    LONG + "Why was that?",
    LONG + LONG + LONG,
    LONG + LONG + "And then?",
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
    isomorph.convert(gelu_gpt_with_tokenizer(base / "source"), base / "served", to="mlx")
    return base / "served"


@pytest.mark.full
def test_eight_requests_at_once_get_the_answers_of_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    with server(folder, tmp_path / "log") as address:
        cold = together(address)
        expected = alone(address)
        assert cold == expected
        assert together(address) == expected  # now with what the prompt cache remembers
    assert len(set(expected)) == len(QUESTIONS) and all(text for text, _ in expected)
    # One of them without any server or cache.
    model = isomorph.load(folder, framework="mlx")
    prompt = sequence = model.tokenizer.encode(LONG + "\n")
    for _ in range(40):
        sequence = [*sequence, int(model.logits([sequence])[0, -1].argmax())]
    text = model.tokenizer.decode(sequence[len(prompt) :])
    assert expected[QUESTIONS.index(LONG)][0].rstrip("\ufffd") == text.rstrip("\ufffd")


@pytest.mark.full
def test_a_cache_that_the_server_cuts_back_gives_the_same_answer(folder: Path, tmp_path: Path) -> None:
    """A second question begins as the first: its cache is trimmed within the window, past it an earlier one goes on."""
    said = {}
    for remembering in (True, False):
        with server(folder, tmp_path / "log") as address:
            for question in (QUESTIONS[1], LONG + LONG):
                if remembering:
                    ask(address, question)
                answered = answer(address, question + "!")
                cached = answered["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached == (len(question) if remembering else 0)
                said[remembering, question] = answered["choices"][0]["message"]["content"]
    for question in (QUESTIONS[1], LONG + LONG):
        assert said[True, question] == said[False, question]


@pytest.mark.full
def test_rows_that_share_an_embedding_would_be_seen(folder: Path, tmp_path: Path) -> None:
    """The control: with the first row's previous embedding for all, a batch gives other answers."""
    file = folder / "modeling_mlx.py"
    right = file.read_text()
    wrong = right.replace("half[:, :, cache._idx - 1]", "half[:1, :, cache._idx - 1] + 0 * half[:, :, 0]")
    assert wrong != right
    file.write_text(wrong)
    try:
        with server(folder, tmp_path / "log") as address:
            expected = alone(address)
            assert alone(address) == expected
            assert together(address) != expected  # and what it remembers of these is wrong as well
    finally:
        file.write_text(right)
