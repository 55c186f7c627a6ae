"""Talkie's tokenizer: the authors' tiktoken `vocab.txt` as a Transformers fast tokenizer, and back.

`vocab.txt` holds one token a line, its bytes in base64 and its rank, which is its id. tiktoken needs nothing else: it
splits text by a regular expression, looks each piece up whole, and otherwise joins, from single bytes on, the adjacent
pair whose *result* has the lowest rank, leftmost first. A fast tokenizer wants named pairs instead, in order.

Why one pair a token is enough, for any ranks. Say tiktoken forms token t somewhere in a piece. No join crossed the
borders of t before that, so the joins inside its bytes were those that tiktoken makes on these bytes alone: each was
the lowest and leftmost of the whole piece, hence of the span. So the last of them, the pair that gave t, is the same in
every text: the one found by running tiktoken's rule on the bytes of t. Every join tiktoken ever makes is thus in the
list, nothing else in the list can come before it, and two places that offer the same rank offer the same pair: 65,279
pairs for the published vocabulary, where listing every split of every token takes 156,379. A token that its own bytes
do not reach is found only as a whole piece, which is what `ignore_merges` does.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomorph.errors import InputError
from isomorph.tokenizer import VocabularyMismatch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCABULARY_FILE = "vocab.txt"

#: tiktoken's `o200k_base` split.
SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

#: The special tokens of each flavour; they take the last ids of the model's vocabulary, in this order.
SPECIAL_TOKENS = {
    "base": ("<|endoftext|>",),
    "instruct": ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
}

#: What ends an answer.
STOP_TOKENS = ("<|endoftext|>", "<|end|>")

#: Vocabulary sizes of the published models, whose `vocab.txt` need not reach up to the special tokens.
PUBLISHED_SIZES = {65536: "base", 65540: "instruct"}

#: The authors' loader takes no rank from here on, whatever the file holds (65535 is `<|endoftext|>`).
RANK_LIMIT = 65535

#: Roles other than these three are dropped, as the authors' code does.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'user', 'assistant'] -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def read_vocabulary(path: Path) -> dict[bytes, int]:
    """The tokens of a `vocab.txt` and their ranks. Raises InputError for a line or a set of ranks that cannot be."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"expected a tiktoken vocabulary at {path}; {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            encoded, digits = fields
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error):
            raise InputError(
                f"expected a base64 token and its rank on line {number} of {path}; found {line[:40]!r}; "
                "give the tiktoken vocab.txt that came with the checkpoint"
            ) from None
        if rank >= RANK_LIMIT:
            continue
        if rank < 0 or not token or token in ranks:
            raise InputError(f"expected a new token and a rank from 0 on line {number} of {path}; found {line[:40]!r}")
        ranks[token] = rank
    if len(set(ranks.values())) != len(ranks):
        raise InputError(f"expected every rank once in {path}; found repeated ranks; fetch the file again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(
            f"expected all 256 single bytes as tokens in {path}; {len(missing)} are missing, first {missing[0]:#04x}; "
            "the file is truncated or not a byte-level vocabulary"
        )
    return ranks


def flavour_of(ranks: Mapping[bytes, int], vocab_size: int) -> str:
    """`base` or `instruct`, from how many ids a model of `vocab_size` has beyond the ranks of its vocabulary."""
    if vocab_size in PUBLISHED_SIZES:
        return PUBLISHED_SIZES[vocab_size]
    room = vocab_size - max(ranks.values()) - 1
    for flavour, names in SPECIAL_TOKENS.items():
        if len(names) == room:
            return flavour
    raise VocabularyMismatch(
        f"expected a model vocabulary of {max(ranks.values()) + 2} (base) or {max(ranks.values()) + 6} (instruct) for "
        f"this vocab.txt; found vocab_size {vocab_size}; give the vocab.txt that came with the checkpoint"
    )


def special_tokens(vocab_size: int, flavour: str) -> dict[str, int]:
    """Name -> id: the last ids of the vocabulary, `<|endoftext|>` first."""
    names = _names(flavour)
    return {name: vocab_size - len(names) + position for position, name in enumerate(names)}


def last_join(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that tiktoken joins last to form `token` from its bytes; None when it does not get there."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        offers = ((ranks.get(left + right, RANK_LIMIT), at) for at, (left, right) in enumerate(pairwise(parts)))
        rank, at = min(offers)
        if rank == RANK_LIMIT:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The ordered pairs that make a byte-pair encoder equal to tiktoken on these ranks (see the module's docstring)."""
    pairs = (last_join(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    return [pair for pair in pairs if pair is not None]


@cache
def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _spelled(token: bytes) -> str:
    table = byte_characters()
    return "".join(table[byte] for byte in token)


def fast_tokenizer(ranks: Mapping[bytes, int], specials: Mapping[str, int], split: str = SPLIT) -> Tokenizer:
    """The `tokenizers` object with these ranks and special tokens, ids as given, that cuts text by the `split`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {_spelled(token): rank for token, rank in ranks.items()}
    highest = max(ranks.values())
    if min(specials.values()) <= highest or vocabulary.keys() & specials.keys():
        raise VocabularyMismatch(
            f"expected a vocabulary whose ranks end below the special tokens at {min(specials.values())}; found rank "
            f"{highest}; give the vocab.txt that came with the checkpoint"
        )
    # The special tokens stand in the vocabulary too, or the library would number them from the last rank on; the split
    # never yields their spelling as one piece, so plain text cannot reach them there.
    vocabulary.update(specials)
    pairs = [(_spelled(left), _spelled(right)) for left, right in merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer


def tokenizer_config(flavour: str, model_max_length: int | None) -> dict[str, Any]:
    """What goes into tokenizer_config.json. The class name is the one that transformers 4 and 5 both know."""
    names = _names(flavour)
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # An instruct model ends a turn with `<|end|>`, a base model a document with `<|endoftext|>`.
        "eos_token": "<|end|>" if flavour == "instruct" else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if flavour == "instruct":
        values["additional_special_tokens"] = [name for name in names if name not in STOP_TOKENS]
        values["chat_template"] = CHAT_TEMPLATE
    if model_max_length is not None:
        values["model_max_length"] = model_max_length
    return values


def load(
    path: Path, vocab_size: int, flavour: str | None = None, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """A Transformers tokenizer straight from a `vocab.txt`, for a model of `vocab_size`.

    `flavour` is `base` or `instruct`; when None it follows from `vocab_size` (see `flavour_of`).
    """
    from transformers import PreTrainedTokenizerFast

    ranks = read_vocabulary(path)
    flavour = flavour or flavour_of(ranks, vocab_size)
    values = tokenizer_config(flavour, model_max_length)
    del values["tokenizer_class"]
    backend = fast_tokenizer(ranks, special_tokens(vocab_size, flavour))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **values)


def write(
    path: Path, target: Path, vocab_size: int, flavour: str | None = None, model_max_length: int | None = None
) -> list[str]:
    """Write the tokenizer of the `vocab.txt` at `path` as a Transformers folder; return the names of the files.

    Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json (the stop ids) and,
    for an instruct model, chat_template.jinja.
    """
    ranks = read_vocabulary(path)
    flavour = flavour or flavour_of(ranks, vocab_size)
    specials = special_tokens(vocab_size, flavour)
    values = tokenizer_config(flavour, model_max_length)
    files = {
        "tokenizer.json": fast_tokenizer(ranks, specials).to_str(pretty=True),
        "tokenizer_config.json": _json(values),
        "special_tokens_map.json": _json(
            {key: values[key] for key in ("eos_token", "pad_token", "additional_special_tokens") if key in values}
        ),
        "generation_config.json": _json(
            {
                "eos_token_id": [specials[name] for name in STOP_TOKENS if name in specials],
                "pad_token_id": specials["<|endoftext|>"],
            }
        ),
    }
    if "chat_template" in values:
        files["chat_template.jinja"] = CHAT_TEMPLATE
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    return list(files)


def write_vocabulary(tokenizer_json: Path, path: Path) -> None:
    """Write the `vocab.txt` of a tokenizer.json: the inverse of `write`. Raises InputError if not byte-level."""
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    try:
        content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        vocabulary: dict[str, int] = content["model"]["vocab"]
        specials = {entry["content"] for entry in content["added_tokens"]}
        tokens = {
            rank: bytes(bytes_of[character] for character in token)
            for token, rank in vocabulary.items()
            if token not in specials
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"expected a byte-level BPE tokenizer.json at {tokenizer_json}; {type(error).__name__}: {error}"
        ) from None
    lines = (f"{base64.b64encode(tokens[rank]).decode()} {rank}\n" for rank in sorted(tokens))
    path.write_text("".join(lines), encoding="ascii")


def _names(flavour: str) -> tuple[str, ...]:
    if flavour not in SPECIAL_TOKENS:
        raise InputError(f"expected a flavour of {' or '.join(SPECIAL_TOKENS)}; found {flavour!r}")
    return SPECIAL_TOKENS[flavour]


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
