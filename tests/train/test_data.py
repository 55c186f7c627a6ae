"""Batches are a pure function of the step: nothing repeats or is left out, whatever was asked for before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isomorph.errors import InputError
from isomorph.train.conversations import ChatIds, conversations, mixed, questions_and_answers
from isomorph.train.data import text_files, tokenize, unwrapped, wikitext, windows
from isomorph.train.vocabulary import Vocabulary, load_encoding, tiktoken_vocabulary

from .conftest import CATECHISM, SHAPE

END_OF_TEXT = SHAPE["vocab_size"] - 5


def loaded(path: Path, vocab_size: int = SHAPE["vocab_size"]) -> Vocabulary:
    return tiktoken_vocabulary(path, END_OF_TEXT, vocab_size)


MARKS = ChatIds(end=END_OF_TEXT + 1, user=END_OF_TEXT + 2, assistant=END_OF_TEXT + 3)


def test_tokens_are_the_texts_with_separators(books: Path, vocabulary: Path, tmp_path: Path) -> None:
    encoding = load_encoding(vocabulary)
    files = text_files([books])
    assert [file.name for file in files] == ["one.txt", "two.txt"]
    tokens = tokenize(files, loaded(vocabulary), tmp_path / "tokens.bin")
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    assert len(ends) == 2
    assert ends[-1] == len(tokens) - 1
    assert encoding.decode(tokens[: ends[0]].tolist()) == files[0].read_text()


def test_tokens_are_made_once_and_remade_for_other_texts(books: Path, vocabulary: Path, tmp_path: Path) -> None:
    target = tmp_path / "tokens.bin"
    first = tokenize(text_files([books]), loaded(vocabulary), target)
    made = target.stat().st_mtime_ns
    tokenize(text_files([books]), loaded(vocabulary), target)
    assert target.stat().st_mtime_ns == made
    other = tokenize([books / "one.txt"], loaded(vocabulary), target)
    assert len(other) < len(first)


def test_large_vocabularies_take_four_bytes(books: Path, vocabulary: Path, tmp_path: Path) -> None:
    tokens = tokenize([books / "one.txt"], loaded(vocabulary, vocab_size=100_000), tmp_path / "tokens.bin")
    assert tokens.dtype == np.uint32
    assert tokens[-1] == END_OF_TEXT


def test_hard_wrapped_paragraphs_become_one_line_each() -> None:
    line = "A line of a paragraph that was set in a column,"
    wrapped = f"{line}\n{line}\nand its end.\n\nCHAPTER II\nA short\nverse of three\n\n{line}\n    indented\n"
    expected = f"{line} {line} and its end.\n\nCHAPTER II\nA short\nverse of three\n\n{line}\n    indented\n"
    assert unwrapped(wrapped) == expected
    long_lines = f"{line}\n{line * 3}\n{line}\n" * 5
    assert unwrapped(long_lines) == long_lines
    assert unwrapped("") == ""


def test_articles_of_wikitext() -> None:
    text = " \n = One = \n \n First . \n = = Section = = \n Second = third . \n \n = Two = \n Fourth . \n"
    assert wikitext(text) == [
        " = One = \n\n First . \n\n = = Section = = \n\n Second = third . ",
        " = Two = \n\n Fourth . ",
    ]


def test_bad_texts_are_refused(tmp_path: Path, vocabulary: Path) -> None:
    with pytest.raises(InputError, match="nothing at"):
        text_files([tmp_path / "missing"])
    with pytest.raises(InputError, match="found none"):
        text_files([tmp_path])
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match="0xe9"):
        tokenize([tmp_path / "latin.txt"], loaded(vocabulary), tmp_path / "tokens.bin")
    with pytest.raises(InputError, match="more text"):
        windows(np.arange(20), batch_size=1, length=16, seed=0)


def test_an_epoch_holds_every_window_once() -> None:
    length, batch_size = 8, 3
    tokens = np.arange(8 * 32 + 3, dtype=np.uint16)
    batches = windows(tokens, batch_size, length, seed=1)
    count = (len(tokens) - 1 - length) // length
    rows = np.concatenate([batches(step).ids for step in range(-(-2 * count // batch_size))])
    for epoch in (rows[:count], rows[count : 2 * count]):
        starts = np.sort(epoch[:, 0])
        np.testing.assert_array_equal(np.diff(starts), length)
        np.testing.assert_array_equal(epoch - epoch[:, :1], np.tile(np.arange(length + 1), (count, 1)))
    assert not np.array_equal(rows[:count], rows[count : 2 * count])


def test_a_batch_depends_on_its_step_alone() -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    straight, jumping = (windows(tokens, 4, 16, seed=2) for _ in range(2))
    in_order = [straight(step).ids for step in range(80)]
    for step in (79, 3, 50, 3, 0):
        np.testing.assert_array_equal(jumping(step).ids, in_order[step])
    assert not np.array_equal(windows(tokens, 4, 16, seed=3)(0).ids, in_order[0])


def test_processes_share_a_batch() -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    whole_batch = windows(tokens, 4, 16, seed=2)(7).ids
    shares = [windows(tokens, 4, 16, seed=2, share=(part, 2))(7).ids for part in range(2)]
    np.testing.assert_array_equal(np.concatenate(shares), whole_batch)


def test_questions_and_answers_of_both_printed_forms() -> None:
    assert questions_and_answers(CATECHISM) == [
        ("What is meant by a vacuum?", "A vacuum means an empty space."),
        ("Who was he?", "He was a captain."),
    ]


def test_only_answers_and_their_end_count(books: Path, vocabulary: Path) -> None:
    encoding = load_encoding(vocabulary)
    batch = conversations([books / "questions" / "catechism.txt"], loaded(vocabulary), MARKS, 8, 200, seed=0)(0)
    two_turns = max(range(8), key=lambda row: int((batch.ids[row] == MARKS.user).sum()))
    ids, counted = batch.ids[two_turns], batch.counted[two_turns]
    learned = ids[1:][counted].tolist()
    answers = [encoding.encode_ordinary(text) for text in ("A vacuum means an empty space.", "He was a captain.")]
    assert learned == [*answers[0], MARKS.end, *answers[1], MARKS.end]
    assert ids[0] == MARKS.user
    asked = encoding.encode_ordinary("What is meant by a vacuum?")
    assert ids[: len(asked) + 3].tolist() == [MARKS.user, *asked, MARKS.end, MARKS.assistant]


def test_books_without_questions_are_refused(books: Path, vocabulary: Path) -> None:
    with pytest.raises(InputError, match="questions and answers"):
        conversations([books / "one.txt"], loaded(vocabulary), MARKS, 2, 32, seed=0)


def test_mixed_batches_hold_rows_of_both() -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    first, second = windows(tokens, 1, 16, seed=0), windows(tokens, 3, 16, seed=1)
    both = mixed(first, second)(5)
    np.testing.assert_array_equal(both.ids, np.concatenate([first(5).ids, second(5).ids]))
    assert both.counted.shape == (4, 16)
