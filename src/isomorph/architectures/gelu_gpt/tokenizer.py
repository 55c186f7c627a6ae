"""nanochat's tokenizer, a pickled tiktoken `Encoding`, as a Transformers fast tokenizer: read without running code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomorph.architectures.talkie.tokenizer import fast_tokenizer
from isomorph.errors import InputError
from isomorph.tokenizer import VocabularyMismatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_FILE = "tokenizer.pkl"

#: What begins every document, and what ends an answer (nanochat).
BEGIN, END = "<|bos|>", "<|assistant_end|>"

#: What bounds turns and documents.
SPECIAL_TOKENS = {"nanochat": (BEGIN, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", END)}


@dataclass(frozen=True)
class Vocabulary:
    """What the pickle holds: how text is cut, the rank of each token, the id of each special one."""

    split: str
    ranks: Mapping[bytes, int]
    specials: Mapping[str, int]


class Encoding:
    """Stands for tiktoken's class while unpickling: it keeps the state and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Unpickler(pickle.Unpickler):
    """Builds plain values and one `Encoding`; whatever else a pickle names is code, and refused."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks to run code ({module}.{name})")
        return Encoding


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a `tokenizer.pkl`. Raises InputError for anything but an `Encoding`'s own values."""
    try:
        with path.open("rb") as file:
            state = Unpickler(file).load().state
        ranks, specials = state["mergeable_ranks"], state["special_tokens"]
        split = state["pat_str"]
        sound = isinstance(split, str) and specials and set(map(type, ranks)) == {bytes}
        if not sound or {type(value) for value in (*ranks.values(), *specials.values())} != {int}:
            raise ValueError("it holds no ranks of tokens")
    except Exception as error:
        # Over damaged bytes an unpickler raises nearly everything there is.
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"expected a pickled tiktoken Encoding of nanochat's at {path}; found otherwise ({detail[:100]}); "
            "pass tokenizer= a folder with tokenizer.json"
        ) from None
    return Vocabulary(split, ranks, specials)


def settings(vocabulary: Vocabulary, model_max_length: int | None) -> dict[str, Any]:
    """What goes into tokenizer_config.json."""
    names = list(vocabulary.specials)
    begin = BEGIN if BEGIN in names else names[0]
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": END if END in names else begin,
        "pad_token": begin,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [name for name in names if name != begin],
    }
    return values if model_max_length is None else {**values, "model_max_length": model_max_length}


def checked(path: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary at `path`, when it is one for a model of `vocab_size`."""
    vocabulary = read_vocabulary(path)
    largest = max(*vocabulary.ranks.values(), *vocabulary.specials.values())
    if largest >= vocab_size:
        raise VocabularyMismatch(
            f"expected token ids below vocab_size {vocab_size}; found {largest} in {path}; "
            "give the tokenizer that the model was trained with"
        )
    return vocabulary


def load(path: Path, vocab_size: int, model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A Transformers tokenizer straight from a `tokenizer.pkl`, for a model of `vocab_size`."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = checked(path, vocab_size)
    values = settings(vocabulary, model_max_length)
    del values["tokenizer_class"]
    backend = fast_tokenizer(vocabulary.ranks, vocabulary.specials, vocabulary.split)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **values)


def write(path: Path, target: Path, vocab_size: int, model_max_length: int | None = None) -> list[str]:
    """Write the tokenizer of the `tokenizer.pkl` at `path` as a Transformers folder; return the names of the files."""
    vocabulary = checked(path, vocab_size)
    values = settings(vocabulary, model_max_length)
    ends = {values["eos_token"], values["bos_token"]}
    generation = {
        "bos_token_id": vocabulary.specials[values["bos_token"]],
        "eos_token_id": sorted(vocabulary.specials[name] for name in ends),
        "pad_token_id": vocabulary.specials[values["pad_token"]],
    }
    backend = fast_tokenizer(vocabulary.ranks, vocabulary.specials, vocabulary.split)
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(values, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    return list(files)
