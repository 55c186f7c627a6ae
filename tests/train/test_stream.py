"""Streamed tokens: a pure function of the step, also after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isomorph.errors import InputError
from isomorph.train.stream import Source, TokenFile, streamed
from isomorph.train.vocabulary import Vocabulary

TEXTS = [f"text number {number} " * (number % 7 + 1) for number in range(1000)]
BYTES = Vocabulary(lambda text: list(text.encode()), 0, np.ones(256, np.int64), "bytes")
EXPECTED = np.frombuffer("".join(text + "\0" for text in TEXTS).encode(), np.uint8)


def texts(skip: int) -> Iterator[str]:
    return iter(TEXTS[skip:])


def test_rows_follow_each_other(tmp_path: Path) -> None:
    batches = streamed(texts, BYTES, tmp_path / "stream.bin", batch_size=3, length=50)
    for step in (0, 4, 2, 60):
        ids = batches(step).ids
        for row in range(3):
            start = (step * 3 + row) * 50
            np.testing.assert_array_equal(ids[row], EXPECTED[start : start + 51])


def test_a_killed_stream_reads_on(tmp_path: Path) -> None:
    target = tmp_path / "stream.bin"
    straight = [streamed(texts, BYTES, tmp_path / "other.bin", 3, 50)(step).ids for step in range(300)]
    first = streamed(texts, BYTES, target, 3, 50)
    assert all(np.array_equal(first(step).ids, straight[step]) for step in range(100))
    with target.open("ab") as stream:
        stream.write(b"cut off")  # written, and killed before the record of it
    asked: list[int] = []

    def watched(skip: int) -> Iterator[str]:
        asked.append(skip)
        return texts(skip)

    again = streamed(watched, BYTES, target, 3, 50)
    assert all(np.array_equal(again(step).ids, straight[step]) for step in range(300))
    assert asked[0] > 0


def test_after_the_last_text_comes_the_first(tmp_path: Path) -> None:
    tokens = TokenFile(texts, BYTES, tmp_path / "stream.bin")
    np.testing.assert_array_equal(tokens.read(len(EXPECTED), 30), EXPECTED[:30])
    with pytest.raises(InputError, match="found none"):
        TokenFile(lambda skip: iter([]), BYTES, tmp_path / "empty.bin").read(0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    path = tmp_path / "dataset"
    path.mkdir()
    for part in range(2):
        rows = TEXTS[part::2]
        (path / f"train-{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def test_a_dataset_is_streamed_from_any_text_on_and_shared(folder: Path) -> None:
    source = Source(str(folder))
    everything = list(source.texts())
    assert sorted(everything) == sorted(TEXTS)
    assert list(source.texts(skip=990)) == everything[990:]
    shares = [list(source.texts(share=(part, 2))) for part in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(TEXTS)
    assert min(map(len, shares)) == 500


def test_datasets_that_are_none_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        next(Source(str(folder / "nowhere")).texts())
    with pytest.raises(InputError, match="split 'test'"):
        next(Source(str(folder), split="test").texts())
    with pytest.raises(InputError, match="found text; give --column"):
        next(Source(str(folder), column="content").texts())
