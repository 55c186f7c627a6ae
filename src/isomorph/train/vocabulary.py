"""A byte-level BPE vocabulary in tiktoken's form: one `base64(token) rank` a line, ranks in merge order."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from isomorph.architectures.talkie.tokenizer import SPLIT, byte_characters, read_vocabulary

if TYPE_CHECKING:
    import tiktoken


def learn_vocabulary(texts: Iterable[str], ranks: int) -> list[bytes]:
    """The `ranks` tokens that byte-pair encoding learns from `texts`: the 256 bytes, then the merges in order.

    Text is cut into words by the published pattern of tiktoken's `o200k_base`, as Talkie does.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # `ByteLevel` writes each byte as one printable character; sorted, they are the base alphabet of every vocabulary.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=ranks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
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


def _pieces(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[str]:
    """Texts in pieces that end at a line's end, so that the trainer can work on them side by side."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + characters) + 1 or len(text)
            yield text[start:end]
            start = end
