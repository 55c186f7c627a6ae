"""One training run: vocabulary, text, conversations, export; each part is skipped or resumed when it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from isomorph import architectures
from isomorph.architectures.base import Architecture
from isomorph.errors import InputError, did_you_mean
from isomorph.train.conversations import ChatIds, conversations, mixed
from isomorph.train.data import read_text, text_files, tokenize, unwrapped, windows
from isomorph.train.export import export
from isomorph.train.metrics import held_out_evaluation
from isomorph.train.settings import Settings
from isomorph.train.trainer import train
from isomorph.train.vocabulary import learn_vocabulary, load_encoding, save_vocabulary

#: Windows that stand for all held-out text while training goes on.
HELD_OUT_ROWS = 64

#: Spread of the rows of the chat marks before they are trained: what the authors of Talkie add to their base model.
FRESH_ROW_SPREAD = 0.02


@dataclass(frozen=True)
class Run:
    """What a run made."""

    path: Path
    architecture: str
    parameters: int
    size_bytes: int
    text_steps: int
    chat_steps: int
    held_out_bits_per_byte: float | None
    held_out_nats_per_token: float | None


def run(
    architecture_name: str,
    config: Mapping[str, Any],
    text: Settings,
    out: Path,
    data: Sequence[Path],
    *,
    chat: Settings | None = None,
    chat_data: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    vocabulary: Path | None = None,
    model_parallel: int = 1,
) -> Run:
    """Train `architecture_name` with shapes `config` on the texts of `data` and write `out/model`.

    Without a `vocabulary` (a tiktoken `vocab.txt`) one is learned from the texts, of the size that
    `config["vocab_size"]` leaves beside the special tokens. With `chat_data`, books of questions and answers, a
    second stage follows, half of whose rows are still text, with lines unwrapped. `held_out` texts are measured, never
    trained on. A run that was stopped goes on where its last checkpoint is. Raises InputError.
    """
    architecture, parsed = _architecture(architecture_name, config)
    stages = [settings for settings in (text, chat) if settings is not None]
    longest = max(settings.sequence_length for settings in stages)
    if longest > parsed.max_position_embeddings:
        raise InputError(
            f"expected a sequence length of at most {parsed.max_position_embeddings} (max_position_embeddings); "
            f"found {longest}"
        )
    mesh = _mesh(model_parallel, stages)
    files, chat_files, held_out_files = (text_files(paths) if paths else [] for paths in (data, chat_data, held_out))
    tokenizer = architecture.module("tokenizer")
    specials: dict[str, int] = tokenizer.special_tokens(parsed.vocab_size, "instruct")
    if vocabulary is not None:
        tokenizer.flavour_of(tokenizer.read_vocabulary(vocabulary), parsed.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    _same_run(
        out / "settings.json",
        {
            "architecture": architecture_name,
            "config": parsed.to_dict(),
            "text": asdict(text),
            "chat": asdict(chat) if chat else None,
            "data": digests(files),
            "chat_data": digests(chat_files),
            "vocabulary": digests([vocabulary] if vocabulary else []),
        },
    )
    vocab = out / "vocab.txt"
    if vocabulary is not None:
        vocab.write_bytes(vocabulary.read_bytes())
    elif not vocab.is_file():
        save_vocabulary(learn_vocabulary(map(read_text, files), parsed.vocab_size - len(specials)), vocab)
    encoding = load_encoding(vocab)
    tokens = tokenize(files, encoding, specials["<|endoftext|>"], out / "tokens.bin")
    evaluate_on = partial(held_out_evaluation, held_out_files, encoding, text.sequence_length)
    make_model = partial(architecture.module("modeling_flax").Model, parsed)
    train_stage = partial(train, make_model, mesh=mesh, evaluate=evaluate_on(rows=HELD_OUT_ROWS) if held_out else None)
    batches = windows(tokens, text.batch_size, text.sequence_length, text.seed)
    parameters = train_stage(batches, text, out / "text", stage="text")
    if chat is not None and chat_files:
        rows = max(1, chat.batch_size // 2)
        marks = ChatIds(specials["<|end|>"], specials["<|user|>"], specials["<|assistant|>"])
        batches = conversations(chat_files, encoding, marks, rows, chat.sequence_length, chat.seed)
        if chat.batch_size > rows:
            # Nobody types hard-wrapped lines: from here on the model shall not break its own.
            tokens = tokenize(files, encoding, specials["<|endoftext|>"], out / "paragraphs.bin", unwrapped)
            batches = mixed(batches, windows(tokens, chat.batch_size - rows, chat.sequence_length, chat.seed))
        fresh = [identity for name, identity in specials.items() if name != "<|endoftext|>"]
        start = with_fresh_rows(parameters, parsed.vocab_size, fresh, chat.seed)
        parameters = train_stage(batches, chat, out / "chat", stage="chat", start=start)
    final = evaluate_on() if held_out else None
    measured = export(architecture, parsed, parameters, make_model, out, files, held_out_files, final)
    weights = out / "model" / "model.safetensors"
    return Run(
        path=out / "model",
        architecture=architecture_name,
        parameters=sum(value.size for value in parameters.values()),
        size_bytes=weights.stat().st_size,
        text_steps=text.steps,
        chat_steps=chat.steps if chat and chat_files else 0,
        held_out_bits_per_byte=measured.get("held_out_bits_per_byte"),
        held_out_nats_per_token=measured.get("held_out_nats_per_token"),
    )


def with_fresh_rows(
    parameters: Mapping[str, jax.Array], vocab_size: int, rows: Sequence[int], seed: int
) -> dict[str, np.ndarray]:
    """`parameters` with new random `rows` in every matrix [V, ...]: text never shows those ids, and unlearns them."""
    generator = np.random.default_rng(seed)
    fresh = {}
    for name, value in parameters.items():
        array = np.array(value)
        if array.ndim == 2 and len(array) == vocab_size:
            array[list(rows)] = FRESH_ROW_SPREAD * generator.standard_normal((len(rows), array.shape[1]))
        fresh[name] = array
    return fresh


def digests(files: Sequence[Path]) -> list[str]:
    """sha256 of each file."""
    return [sha256(file.read_bytes()).hexdigest() for file in files]


def _architecture(name: str, config: Mapping[str, Any]) -> tuple[Architecture, Any]:
    """The architecture of that name and `config` parsed by it."""
    architecture = architectures.get(name)
    if architecture is None:
        known = architectures.registered()
        raise InputError(f"expected an architecture of {', '.join(known)}; found {name!r}{did_you_mean(name, known)}")
    try:
        return architecture, architecture.config_class.from_dict(config)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def _mesh(model_parallel: int, stages: Sequence[Settings]) -> Mesh | None:
    """Every device: `model_parallel` of them share a matrix, the rest share the batch. None on one device."""
    devices = np.array(jax.devices())
    if model_parallel < 1 or len(devices) % model_parallel:
        raise InputError(f"expected model_parallel to divide {len(devices)} devices; found {model_parallel}")
    sharing = len(devices) // model_parallel
    for settings in stages:
        if settings.batch_size // settings.accumulate % sharing:
            raise InputError(
                f"expected a batch_size, divided by accumulate, that divides over {sharing} devices; "
                f"found {settings.batch_size} and {settings.accumulate}"
            )
    return Mesh(devices.reshape(-1, model_parallel), ("data", "model")) if len(devices) > 1 else None


def _same_run(path: Path, settings: dict[str, Any]) -> None:
    """Keep what a run began with, and refuse to go on with something else."""
    if not path.is_file():
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    begun = _flat(json.loads(path.read_text()))
    asked = _flat(json.loads(json.dumps(settings)))
    differing = sorted(key for key in begun.keys() | asked.keys() if begun.get(key) != asked.get(key))
    if differing:
        raise InputError(
            f"expected the settings that the run in {path.parent} began with; found others for {', '.join(differing)}; "
            "use another --out"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for name, value in settings.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat.update({f"{name}.{key}".rstrip("."): item for key, item in inner.items()})
    return flat
