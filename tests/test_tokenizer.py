"""Finding, loading and carrying along the tokenizer of a model folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from isomorph import architectures
from isomorph.architectures.talkie import tokenizer as talkie
from isomorph.errors import InputError
from isomorph.tokenizer import copy_tokenizer, load_tokenizer
from isomorph.train.vocabulary import save_vocabulary

RANKS = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the"]
CONFIG = SimpleNamespace(vocab_size=len(RANKS) + 5, max_position_embeddings=64)
TALKIE = architectures.get("talkie")


def write_vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    save_vocabulary(RANKS, path)
    return path


@pytest.fixture
def original(tmp_path) -> Path:
    """An original checkpoint file with its vocab.txt beside it."""
    folder = tmp_path / "original"
    folder.mkdir()
    write_vocabulary(folder)
    (folder / "model.pt").touch()
    return folder / "model.pt"


@pytest.fixture
def fast(original, tmp_path) -> Path:
    """A folder with the same tokenizer in Transformers' form."""
    folder = tmp_path / "fast"
    folder.mkdir()
    copy_tokenizer(original, folder, TALKIE, CONFIG)
    return folder


def test_from_every_place_the_same_ids(original, fast):
    places = [original, original.parent, fast]
    found = [load_tokenizer(place, TALKIE, CONFIG) for place in places]
    found += [
        load_tokenizer(fast, TALKIE, CONFIG, override=override)
        for override in (original.parent, original.parent / "vocab.txt", fast, str(fast / "tokenizer.json"), found[0])
    ]
    # A folder needs neither the architecture nor the config.
    found.append(load_tokenizer(fast, None, None))
    text = "the <|user|>theé"
    assert [tokenizer.encode(text) for tokenizer in found] == [[257, 32, 261, 257, 195, 169]] * len(found)
    assert all(tokenizer.eos_token_id == 260 and tokenizer.chat_template for tokenizer in found)


def test_other_architectures_load_through_their_own_class(tmp_path):
    from transformers import GPT2Tokenizer

    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    source = GPT2Tokenizer.from_pretrained(tmp_path)
    target = tmp_path / "saved"
    source.save_pretrained(target)
    tokenizer = load_tokenizer(target, None, None)
    assert tokenizer.encode("abba") == source.encode("abba") and "GPT2" in type(tokenizer).__name__


def test_without_a_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path, TALKIE, CONFIG) is None
    # Another architecture's vocab.txt is not tiktoken's.
    write_vocabulary(tmp_path)
    assert load_tokenizer(tmp_path, None, None) is None
    target = tmp_path / "target"
    target.mkdir()
    assert copy_tokenizer(tmp_path, target, None, None) == [] == list(target.iterdir())


def test_a_vocabulary_of_another_model_is_named_and_left_out(original, tmp_path, caplog):
    other = SimpleNamespace(vocab_size=100, max_position_embeddings=64)
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(original, TALKIE, other) is None
        assert copy_tokenizer(original, tmp_path, TALKIE, other) == []
    assert caplog.text.count("expected a model vocabulary of 260 (base) or 264 (instruct)") == 2
    with pytest.raises(InputError, match="expected a model vocabulary"):
        load_tokenizer(original, TALKIE, other, override=original.parent)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer.json", "[1, 2]"),
        ("tokenizer_config.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1, 2]"),
    ],
)
def test_damaged_files_are_refused_in_one_line(fast, name, content):
    (fast / name).write_text(content)
    with pytest.raises(InputError, match="fetch") as refusal:
        load_tokenizer(fast, TALKIE, CONFIG)
    assert "\n" not in str(refusal.value)


def test_overrides_that_are_not_there(tmp_path, original):
    with pytest.raises(InputError, match="found nothing at"):
        load_tokenizer(original, TALKIE, CONFIG, override=tmp_path / "nowhere")
    with pytest.raises(InputError, match="found neither"):
        load_tokenizer(original, TALKIE, CONFIG, override=tmp_path)
    with pytest.raises(InputError, match="this architecture does not use"):
        load_tokenizer(original, None, None, override=original.parent / "vocab.txt")


def test_a_tokenizer_survives_every_copy(original, fast, tmp_path):
    def copied(source: Path, name: str, original: bool = False) -> Path:
        target = tmp_path / name
        target.mkdir()
        written = copy_tokenizer(source, target, TALKIE, CONFIG, original=original)
        assert sorted(written) == sorted(entry.name for entry in target.iterdir())
        return target

    again = copied(fast, "again")
    assert {entry.name: entry.read_bytes() for entry in again.iterdir()} == {
        entry.name: entry.read_bytes() for entry in fast.iterdir()
    }
    assert "chat_template.jinja" in {entry.name for entry in again.iterdir()}
    for number, source in enumerate((fast, original)):
        back = copied(source, f"back-{number}", original=True) / talkie.VOCABULARY_FILE
        assert back.read_bytes() == (original.parent / "vocab.txt").read_bytes()
