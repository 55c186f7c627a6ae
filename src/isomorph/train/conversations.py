"""Questions and answers of printed catechisms as training rows in the chat template; only answers are learned.

A row starts at a question and goes on with the questions that follow it in its book, as one conversation of several
turns: `<|user|>question<|end|><|assistant|>answer<|end|>...`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isomorph.errors import InputError
from isomorph.train.data import Batch, Batches, epoch_order, read_text

if TYPE_CHECKING:
    from isomorph.train.vocabulary import Vocabulary

#: `12. _Q._--text` or `Q. 12. {3} text`, at the start of a line; likewise the answer's mark.
QUESTION = re.compile(r"^(?:\d+\.\s*_Q\._--|Q\. (?:\d+\. ?)?(?:\{\d+\} ?)?)", re.MULTILINE)
ANSWER = re.compile(r"^(?:_A\._--|A\. )", re.MULTILINE)


@dataclass(frozen=True)
class ChatIds:
    """Ids of the template's marks."""

    end: int
    user: int
    assistant: int


def questions_and_answers(text: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs of one book, lines joined; of a long answer the first paragraph.

    An answer that announces a table or a rule and breaks off there is left out.
    """
    turns = []
    for chunk in QUESTION.split(text)[1:]:
        parts = ANSWER.split(chunk, maxsplit=1)
        question, answer = (" ".join(part.strip().split("\n\n")[0].split()) for part in (*parts, "")[:2])
        if question and answer.endswith((".", "!", "?", '"', "'", ")")):
            turns.append((question, answer))
    return turns


def conversations(
    files: Sequence[Path], vocabulary: Vocabulary, marks: ChatIds, batch_size: int, length: int, seed: int
) -> Batches:
    """Rows of `length` targets; each epoch starts one row at every question, in another order.

    Answers and their `<|end|>` count; not so questions, marks and the padding after the last whole turn.
    """
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for file in files:
        turns = [_turn(turn, vocabulary, marks) for turn in questions_and_answers(read_text(file))]
        rows += [row for start in range(len(turns)) if (row := _row(turns[start:], length, marks.end)) is not None]
    if not rows:
        raise InputError(
            f"expected questions and answers marked 'Q.' and 'A.'; found none in {', '.join(map(str, files))}"
        )

    def batch(step: int) -> Batch:
        chosen = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(index, len(rows))
            chosen.append(rows[epoch_order(seed, epoch, len(rows))[place]])
        return Batch(np.stack([ids for ids, _ in chosen]), np.stack([counted for _, counted in chosen]))

    return batch


def mixed(first: Batches, second: Batches) -> Batches:
    """Batches whose rows come from both."""

    def batch(step: int) -> Batch:
        one, other = first(step), second(step)
        return Batch(np.concatenate([one.ids, other.ids]), np.concatenate([one.counted, other.counted]))

    return batch


def _turn(turn: tuple[str, str], vocabulary: Vocabulary, marks: ChatIds) -> tuple[list[int], list[int]]:
    """A turn's ids and, for each, whether it is to be learned."""
    question, answer = (vocabulary.encode(text) for text in turn)
    asked = [marks.user, *question, marks.end, marks.assistant]
    return [*asked, *answer, marks.end], [0] * len(asked) + [1] * (len(answer) + 1)


def _row(
    turns: Sequence[tuple[list[int], list[int]]], length: int, padding: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """As many whole turns as fit: ids [length + 1] and which targets count [length]; None when not one fits."""
    ids: list[int] = []
    learned: list[int] = []
    for turn_ids, turn_learned in turns:
        if len(ids) + len(turn_ids) > length + 1:
            break
        ids += turn_ids
        learned += turn_learned
    if not ids:
        return None
    missing = length + 1 - len(ids)
    return (
        np.array(ids + [padding] * missing, np.int32),
        np.array(learned[1:] + [0] * missing, bool),
    )
