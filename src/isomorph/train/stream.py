"""Texts of a Hub dataset, streamed: tokens are appended to a file as training comes to them.

Batches are a pure function of their step here too: a run that is killed finds the tokens it had read, and reads on
behind them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.errors import InputError
from isomorph.train.data import Batch, Batches, token_dtype
from isomorph.train.vocabulary import Vocabulary

#: Documents that are tokenized at once.
READ_AHEAD = 256

#: Documents that a vocabulary is learned from.
VOCABULARY_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Source:
    """A dataset of the Hub, or a local folder of its files: `column` of the rows of `split` are the texts."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"

    def texts(self, skip: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
        """The texts from number `skip` on, of the part of the dataset that a process reads. Raises InputError."""
        if find_spec("datasets") is None:
            raise InputError("expected datasets, which reads the Hub's; run: pip install 'isomorph[data]'")
        import datasets
        from datasets.distributed import split_dataset_by_node

        try:
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            rows = split_dataset_by_node(rows, rank=share[0], world_size=share[1])
        except Exception as error:  # the library raises its own, OSError and ValueError alike
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise InputError(f"expected a dataset {self.name!r}, split {self.split!r}; {reason}") from None
        for row in rows.skip(skip):
            if self.column not in row:
                raise InputError(
                    f"expected a column {self.column!r} in {self.name!r}; found {', '.join(row)}; give --column"
                )
            yield row[self.column]


def streamed(
    texts: Callable[[int], Iterator[str]],
    vocabulary: Vocabulary,
    target: Path,
    batch_size: int,
    length: int,
) -> Batches:
    """Batches of `batch_size` rows in the order of the texts, each text followed by the separator.

    `texts(skip)` gives the texts from number `skip` on; after the last one they begin again. `target` keeps the tokens.
    """
    tokens = TokenFile(texts, vocabulary, target)

    def batch(step: int) -> Batch:
        start = step * batch_size * length
        flat = tokens.read(start, batch_size * length + 1)
        rows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
        return Batch(rows.astype(np.int32), np.ones((batch_size, length), bool))

    return batch


class TokenFile:
    """A file of tokens that grows from texts as far as it is read."""

    def __init__(self, texts: Callable[[int], Iterator[str]], vocabulary: Vocabulary, target: Path) -> None:
        self.texts, self.vocabulary, self.target = texts, vocabulary, target
        self.dtype = token_dtype(vocabulary)
        self.record = target.with_suffix(".json")
        known: dict[str, Any] = {"vocabulary": vocabulary.digest, "documents": 0, "tokens": 0}
        if self.record.is_file() and (found := json.loads(self.record.read_text()))["vocabulary"] == vocabulary.digest:
            known = found
        self.known = known
        self.rows = texts(known["documents"])
        self.stream = target.open("r+b" if target.is_file() else "w+b")
        # What a kill left behind the last record is read again.
        self.stream.truncate(known["tokens"] * self.dtype.itemsize)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count`, [count]."""
        while self.known["tokens"] < start + count:
            self._grow()
        self.stream.seek(start * self.dtype.itemsize)
        return np.frombuffer(self.stream.read(count * self.dtype.itemsize), self.dtype)

    def _grow(self) -> None:
        read = list(islice(self.rows, READ_AHEAD))
        documents = self.known["documents"] + len(read)
        if not read:
            if not self.known["documents"]:
                raise InputError("expected a dataset with texts; found none in it")
            self.rows, documents = self.texts(0), 0
        ids = [identity for text in read for identity in (*self.vocabulary.encode(text), self.vocabulary.separator)]
        self.stream.seek(self.known["tokens"] * self.dtype.itemsize)
        self.stream.write(np.array(ids, self.dtype).tobytes())
        self.stream.flush()
        self.known = {**self.known, "documents": documents, "tokens": self.known["tokens"] + len(ids)}
        partial = self.record.with_suffix(".partial")
        partial.write_text(json.dumps(self.known))
        partial.replace(self.record)
