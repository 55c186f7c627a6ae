"""Training data: texts become one memory-mapped file of tokens; a batch is a pure function of its step.

That purity is what makes resuming exact: a run that is killed and started again reads what it would have read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.train.vocabulary import Vocabulary


@dataclass(frozen=True)
class Batch:
    """`ids` int32 [B, T + 1]: inputs are all but the last column, targets all but the first.

    `counted` bool [B, T] says which targets are learned.
    """

    ids: np.ndarray
    counted: np.ndarray


#: A line of a hard-wrapped paragraph, but for its last, has so many characters.
WRAPPED_COLUMNS = (45, 90)

#: The line that begins an article of WikiText: ` = Title = `, where ` = = Section = = ` begins a section.
WIKITEXT_TITLE = re.compile(r" = [^=].* = ")

#: step -> Batch
Batches = Callable[[int], Batch]

#: A file's text -> the texts in it.
Documents = Callable[[str], list[str]]


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The `.txt` files that `paths` name, folders standing for the ones directly in them, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(path.glob("*.txt"))
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"expected a text file or a folder of them; found nothing at {path}")
    if not found:
        raise InputError(f"expected .txt files; found none in {', '.join(map(str, paths))}")
    return found


def read_text(path: Path) -> str:
    """One UTF-8 text, or InputError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"expected UTF-8 text; found byte {error.object[error.start]:#04x} at {error.start} in {path}"
        ) from None


def unwrapped(text: str) -> str:
    """A hard-wrapped text with one line a paragraph; verse, tables and texts that are not wrapped stay as they are."""
    lines = text.split("\n")
    if np.quantile([len(line) for line in lines], 0.99) > WRAPPED_COLUMNS[1]:
        return text
    shortest, longest = WRAPPED_COLUMNS
    joined = [
        line + (" " if shortest <= len(line) <= longest and following[:1].strip() else "\n")
        for line, following in pairwise(lines)
    ]
    return "".join(joined) + lines[-1]


def whole(text: str) -> list[str]:
    """The file is one text."""
    return [text]


def paragraphs(text: str) -> list[str]:
    """The file is one text, its hard-wrapped lines joined."""
    return [unwrapped(text)]


def wikitext(text: str) -> list[str]:
    """The articles of a WikiText file: its lines that are not empty, joined by a blank line as when it is evaluated."""
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        if WIKITEXT_TITLE.fullmatch(line) and articles[-1]:
            articles.append([])
        if line.strip():
            articles[-1].append(line)
    return ["\n\n".join(lines) for lines in articles if lines]


#: `--format` -> what a file's texts are.
FORMATS: dict[str, Documents] = {"plain": whole, "wikitext": wikitext}


def tokenize(files: Sequence[Path], vocabulary: Vocabulary, target: Path, documents: Documents = whole) -> np.ndarray:
    """Write the tokens of the texts in `files`, each followed by the separator, to `target` once.

    Returns them memory-mapped, [N], uint16 where every id fits, else uint32. A target made of other files, of another
    vocabulary or of other `documents` is remade.
    """
    digest = sha256(f"{vocabulary.digest} {documents.__name__}".encode())
    for file in files:
        digest.update(sha256(file.read_bytes()).digest())
    dtype = token_dtype(vocabulary)
    made_of = {"sha256": digest.hexdigest(), "dtype": dtype.name}
    record = target.with_suffix(".json")
    if not (target.is_file() and record.is_file() and json.loads(record.read_text()) == made_of):
        partial = target.with_suffix(".partial")
        with partial.open("wb") as stream:
            for file in files:
                for text in documents(read_text(file)):
                    stream.write(np.array([*vocabulary.encode(text), vocabulary.separator], dtype).tobytes())
        partial.replace(target)
        record.write_text(json.dumps(made_of))
    return np.memmap(target, dtype=dtype, mode="r")


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if len(vocabulary.size_bytes) <= 2**16 else np.uint32)


def windows(tokens: np.ndarray, batch_size: int, length: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
    """Shuffled windows of `length` targets: each epoch cuts the tokens at another offset and in another order.

    Of each batch `share` = (part, parts) takes one of so many equal parts: a process its own.
    """
    part, own = share[0], batch_size // share[1]
    count = (len(tokens) - 1 - length) // length
    if count < 1:
        raise InputError(f"expected at least {2 * length + 1} tokens of text; found {len(tokens)}; give more text")

    def batch(step: int) -> Batch:
        rows = []
        first = step * batch_size + part * own
        for index in range(first, first + own):
            epoch, place = divmod(index, count)
            offset = int(np.random.default_rng((seed, epoch)).integers(length))
            start = offset + int(epoch_order(seed, epoch, count)[place]) * length
            rows.append(tokens[start : start + length + 1])
        return Batch(np.stack(rows).astype(np.int32), np.ones((own, length), bool))

    return batch


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's `count` rows, [count]."""
    return np.random.default_rng((seed, epoch)).permutation(count)
