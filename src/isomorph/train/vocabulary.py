"""The vocabulary of a run: given or learned, a byte-level BPE as tiktoken's `vocab.txt` or as `tokenizer.json`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.architectures.talkie.tokenizer import SPLIT, byte_characters, read_vocabulary
from isomorph.errors import InputError
from isomorph.tokenizer import FAST, copy_tokenizer, load_tokenizer, own_module

if TYPE_CHECKING:
    import tiktoken

    from isomorph.architectures.base import Architecture, SpecialTokens

#: Begins, ends and pads a text in a vocabulary that is learned as `tokenizer.json`.
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """What turns text into ids. `encode` takes text as plain text; `separator` stands between two texts.

    `size_bytes` int64 [V] is what each id adds to a text, in UTF-8 bytes, 0 for special tokens; `digest` names the
    vocabulary.
    """

    encode: Callable[[str], list[int]]
    separator: int
    size_bytes: np.ndarray
    digest: str


def special_tokens(architecture: Architecture, config: Any) -> dict[str, int]:
    """Special token -> id of an architecture whose vocabulary is a tiktoken `vocab.txt`; empty for all others."""
    own = own_module(architecture)
    if own is None or not hasattr(own, "special_tokens"):
        return {}
    return own.special_tokens(config.vocab_size, "instruct")


def check_vocabulary(given: Path, architecture: Architecture, config: Any) -> None:
    """Raise InputError when `given` (a vocab.txt, tokenizer.json or tokenizer folder) is none for the model."""
    if special_tokens(architecture, config):
        own = architecture.module("tokenizer")
        own.flavour_of(own.read_vocabulary(given), config.vocab_size)
    else:
        fast_vocabulary(given, config.vocab_size)


def vocabulary_file(given: Path) -> Path:
    """The file that says what a vocabulary is: `given`, or the tokenizer.json of a folder."""
    return given / FAST if given.is_dir() else given


def prepare_vocabulary(
    given: Path | None, architecture: Architecture, config: Any, texts: Callable[[], Iterable[str]], out: Path
) -> Vocabulary:
    """The run's vocabulary, in `out/vocab.txt` or `out/tokenizer`: the one `given`, or one learned from `texts()`."""
    specials = special_tokens(architecture, config)
    if specials:
        target = out / "vocab.txt"
        if given is not None:
            target.write_bytes(given.read_bytes())
        elif not target.is_file():
            save_vocabulary(learn_vocabulary(texts(), config.vocab_size - len(specials)), target)
        return tiktoken_vocabulary(target, specials[END_OF_TEXT], config.vocab_size)
    target = out / "tokenizer"
    if given is not None:
        target.mkdir(exist_ok=True)
        copy_tokenizer(given, target, None, config)
    elif not (target / FAST).is_file():
        context = config.max_position_embeddings
        learn_fast(texts(), config.vocab_size, target, context, architecture.special_tokens)
    return fast_vocabulary(target, config.vocab_size)


def tiktoken_vocabulary(path: Path, separator: int, vocab_size: int) -> Vocabulary:
    """The vocabulary of a `vocab.txt`, whose special tokens the architecture adds. Raises InputError."""
    encoding = load_encoding(path)
    sizes = np.zeros(vocab_size, np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        sizes[rank] = len(token)
    digest = sha256(repr((sorted(encoding._mergeable_ranks.items()), separator)).encode()).hexdigest()
    return Vocabulary(encoding.encode_ordinary, separator, sizes, digest)


def fast_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a folder's `tokenizer.json`; texts are separated by `<|endoftext|>`, or else by BOS or EOS.

    Raises InputError when it has none of them, or more ids than `vocab_size`.
    """
    tokenizer = load_tokenizer(folder, None, None, override=folder)
    candidates = (tokenizer.get_added_vocab().get(END_OF_TEXT), tokenizer.bos_token_id, tokenizer.eos_token_id)
    separator = next((identity for identity in candidates if identity is not None), None)
    if separator is None:
        raise InputError(f"expected a tokenizer with bos_token or eos_token in {folder}; found neither")
    if len(tokenizer) > vocab_size:
        raise InputError(f"expected a tokenizer of at most vocab_size {vocab_size} ids; found {len(tokenizer)}")
    backend = tokenizer.backend_tokenizer
    sizes = np.zeros(vocab_size, np.int64)
    special = {identity for identity, added in tokenizer.added_tokens_decoder.items() if added.special}
    byte_level = "ByteLevel" in str(backend.decoder)
    for token, identity in tokenizer.get_vocab().items():
        if identity not in special:
            sizes[identity] = len(token) if byte_level else _sentencepiece_bytes(token)
    digest = sha256(backend.to_str().encode()).hexdigest()
    return Vocabulary(
        lambda text: backend.encode(text, add_special_tokens=False).ids, separator, sizes, f"{digest} {separator}"
    )


def learn_fast(texts: Iterable[str], vocab_size: int, folder: Path, context: int, special: SpecialTokens) -> None:
    """Learn a byte-level BPE of `vocab_size` ids, `special` tokens the last, and write it as a Transformers tokenizer.

    `context` is the most tokens that the model takes. Raises InputError.
    """
    from tokenizers import processors

    tokenizer = _learned(texts, vocab_size - len(special.names))
    tokenizer.add_special_tokens(list(special.names))
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise InputError(
            f"expected text enough for a vocabulary of {vocab_size}; found {size} tokens in it; give more text "
            "or a smaller vocab_size"
        )
    identities = {name: tokenizer.token_to_id(name) for name in special.names}
    if special.begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special.bos} $A",
            pair=f"{special.bos} $A {special.bos} $B",
            special_tokens=[(special.bos, identities[special.bos])],
        )
    folder.mkdir(exist_ok=True)
    named = {"bos_token": special.bos, "eos_token": special.ends[0], "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **named,
    }
    ends = [identities[name] for name in special.ends]
    generation = {
        "bos_token_id": identities[special.bos],
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": identities[END_OF_TEXT],
    }
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", named),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    # The last file: its presence says that the folder is complete.
    tokenizer.save(str(folder / FAST))


def learn_vocabulary(texts: Iterable[str], ranks: int) -> list[bytes]:
    """The `ranks` tokens that byte-pair encoding learns from `texts`: the 256 bytes, then the merges in order.

    Text is cut into words by the published pattern of tiktoken's `o200k_base`, as Talkie does.
    """
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    ordered = sorted(_learned(texts, ranks).get_vocab().items(), key=lambda item: item[1])
    learned = [bytes(characters[character] for character in token) for token, _ in ordered]
    merged = [token for token in learned if len(token) > 1]
    return [bytes([value]) for value in range(256)] + merged


def save_vocabulary(tokens: list[bytes], path: Path) -> None:
    """Write `vocab.txt`: the token of rank r on line r."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines), encoding="ascii")


def load_encoding(path: Path) -> tiktoken.Encoding:
    """The tiktoken encoding of a `vocab.txt`, without special tokens: every text is plain text to it."""
    import tiktoken

    return tiktoken.Encoding(path.stem, pat_str=SPLIT, mergeable_ranks=read_vocabulary(path), special_tokens={})


def _learned(texts: Iterable[str], size: int) -> Any:
    """The byte-level BPE of `size` tokens that `tokenizers` learns from texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # `ByteLevel` writes each byte as one printable character; sorted, they are the base alphabet of every vocabulary.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    return tokenizer


def _sentencepiece_bytes(token: str) -> int:
    """UTF-8 bytes of a SentencePiece token: `<0x0A>` is one byte, `\\u2581` a blank."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").encode())


def _pieces(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[str]:
    """Texts in pieces that end at a line's end, so that the trainer can work on them side by side."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + characters) + 1 or len(text)
            yield text[start:end]
            start = end
