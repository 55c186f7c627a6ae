"""One training run: vocabulary, text, conversations, export; each part is skipped or resumed when it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from isomorph import architectures
from isomorph.architectures.base import Architecture
from isomorph.errors import InputError, did_you_mean
from isomorph.train.conversations import ChatIds, conversations, mixed
from isomorph.train.data import FORMATS, paragraphs, read_text, text_files, tokenize, windows
from isomorph.train.export import export
from isomorph.train.metrics import held_out_evaluation, last_losses
from isomorph.train.settings import Settings
from isomorph.train.stream import VOCABULARY_DOCUMENTS, Source, streamed
from isomorph.train.trainer import taken_parameters, train
from isomorph.train.vocabulary import (
    END_OF_TEXT,
    check_vocabulary,
    prepare_vocabulary,
    special_tokens,
    vocabulary_file,
)

#: Windows that stand for all held-out text while training goes on.
HELD_OUT_ROWS = 64

#: Spread of the rows of the chat marks before they are trained: what the authors of Talkie add to their base model.
FRESH_ROW_SPREAD = 0.02


@dataclass(frozen=True)
class Run:
    """What a run made. `seeds` has the last losses of every seed, the first of which is the model."""

    path: Path
    architecture: str
    parameters: int
    size_bytes: int
    text_steps: int
    chat_steps: int
    held_out_bits_per_byte: float | None
    held_out_nats_per_token: float | None
    seeds: list[dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What to train on what, see `isomorph.train.train`. `chat` is None without a second stage."""

    architecture: str
    config: Mapping[str, Any]
    text: Settings
    data: Sequence[Path]
    chat: Settings | None = None
    chat_data: Sequence[Path] = ()
    held_out: Sequence[Path] = ()
    form: str = "plain"
    source: Source | None = None
    vocabulary: Path | None = None
    seeds: int = 1
    other_seeds: float = 1.0
    fsdp: int = 1
    model_parallel: int = 1


def run(plan: Plan, out: Path) -> Run:
    """Carry out `plan` in the folder `out` and write `out/model`; what an earlier call did is not done again.

    Without a vocabulary one is learned from the texts. A second stage, on books of questions and answers, draws half of
    its rows from the texts still, with lines unwrapped. Raises InputError.
    """
    text, chat = plan.text, plan.chat
    architecture, parsed = _architecture(plan.architecture, plan.config)
    make_model = model_maker(architecture, parsed, [text] if chat is None else [text, chat])
    mesh = _mesh(plan)
    files, chat_files, held_out = (
        text_files(paths) if paths else [] for paths in (plan.data, plan.chat_data, plan.held_out)
    )
    if plan.form not in FORMATS:
        raise InputError(
            f"expected a format of {', '.join(FORMATS)}; found {plan.form!r}{did_you_mean(plan.form, FORMATS)}"
        )
    documents = FORMATS[plan.form]
    specials = special_tokens(architecture, parsed)
    if chat is not None and not specials:
        raise InputError(f"expected an architecture with a chat template for a second stage; found {plan.architecture}")
    if plan.vocabulary is not None:
        check_vocabulary(plan.vocabulary, architecture, parsed)
    if plan.source is not None:
        next(plan.source.texts(), None)  # a name that is none is refused before anything is written
    made_of = {
        "architecture": plan.architecture,
        "config": parsed.to_dict(),
        "text": asdict(text),
        "chat": asdict(chat) if chat else None,
        "data": [asdict(plan.source)] if plan.source else digests(files),
        "chat_data": digests(chat_files),
        "vocabulary": digests([vocabulary_file(plan.vocabulary)] if plan.vocabulary else []),
        "form": plan.form,
    }
    with first_process_first():
        out.mkdir(parents=True, exist_ok=True)
        same_run(out / "settings.json", made_of)
        vocabulary = prepare_vocabulary(plan.vocabulary, architecture, parsed, partial(_texts, plan, files), out)
        tokens = tokenize(files, vocabulary, out / "tokens.bin", documents) if files else None
    measure = partial(held_out_evaluation, held_out, vocabulary, text.sequence_length, documents)
    train_stage = partial(train, make_model, mesh=mesh, evaluate=measure(rows=HELD_OUT_ROWS) if held_out else None)
    share = jax.process_index(), jax.process_count()

    def train_text(settings: Settings, folder: Path) -> dict[str, jax.Array]:
        if tokens is not None:
            batches = windows(tokens, settings.batch_size, settings.sequence_length, settings.seed, share)
        else:
            assert plan.source is not None
            read, own = partial(plan.source.texts, share=share), settings.batch_size // share[1]
            batches = streamed(read, vocabulary, out / f"stream{share[0]}.bin", own, settings.sequence_length)
        return train_stage(batches, settings, folder, stage="text")

    parameters = train_text(text, out / "text")
    for number in range(1, plan.seeds):
        steps = max(1, round(text.steps * plan.other_seeds))
        train_text(replace(text, seed=text.seed + number, steps=steps), out / f"seed{text.seed + number}")
    if chat is not None:
        rows = max(1, chat.batch_size // 2)
        marks = ChatIds(specials["<|end|>"], specials["<|user|>"], specials["<|assistant|>"])
        batches = conversations(chat_files, vocabulary, marks, rows, chat.sequence_length, chat.seed)
        if chat.batch_size > rows:
            # Nobody types hard-wrapped lines: from here on the model shall not break its own.
            tokens = tokenize(files, vocabulary, out / "paragraphs.bin", paragraphs)
            batches = mixed(batches, windows(tokens, chat.batch_size - rows, chat.sequence_length, chat.seed))
        fresh = [identity for name, identity in specials.items() if name != END_OF_TEXT]
        start = with_fresh_rows(parameters, parsed.vocab_size, fresh, chat.seed)
        parameters = train_stage(batches, chat, out / "chat", stage="chat", start=start)
    seeds = [last_losses(folder, text.seed + number) for number, folder in enumerate(seed_folders(out, plan))]
    parameters = everywhere(parameters)
    measured: dict[str, float] = {}
    with first_process_first():
        if jax.process_index() == 0:
            evaluate = measure() if held_out else None
            measured = export(
                architecture, parsed, parameters, make_model, out, files, held_out, evaluate, seeds, plan.source
            )
    return Run(
        path=out / "model",
        architecture=plan.architecture,
        parameters=sum(value.size for value in parameters.values()),
        size_bytes=(out / "model" / "model.safetensors").stat().st_size,
        text_steps=text.steps,
        chat_steps=chat.steps if chat is not None else 0,
        held_out_bits_per_byte=measured.get("held_out_bits_per_byte"),
        held_out_nats_per_token=measured.get("held_out_nats_per_token"),
        seeds=seeds,
    )


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through the block alone; the others follow and find what it wrote in the shared folder."""
    if jax.process_count() == 1:
        yield
        return
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("first process")
    yield
    if jax.process_index() == 0:
        multihost_utils.sync_global_devices("first process")


def everywhere(parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters as every process can read them."""
    return parameters if jax.process_count() == 1 else multihost_utils.process_allgather(parameters, tiled=True)


def _texts(plan: Plan, files: Sequence[Path]) -> Iterator[str]:
    """The texts that a vocabulary is learned from."""
    if plan.source is not None:
        return islice(plan.source.texts(), VOCABULARY_DOCUMENTS)
    return (text for file in files for text in FORMATS[plan.form](read_text(file)))


def seed_folders(out: Path, plan: Plan) -> list[Path]:
    """Where each seed's `metrics.jsonl` is; the first is the one that becomes the model."""
    first = plan.text.seed
    return [out / "text", *(out / f"seed{first + number}" for number in range(1, plan.seeds))]


def model_maker(architecture: Architecture, config: Any, stages: Sequence[Settings]) -> Callable[..., nnx.Module]:
    """What builds the model, `make(dtype=, rngs=)`. Raises InputError where a stage does not fit it."""
    longest = max(settings.sequence_length for settings in stages)
    if longest > config.max_position_embeddings:
        raise InputError(
            f"expected a sequence length of at most {config.max_position_embeddings} (max_position_embeddings); "
            f"found {longest}"
        )
    model = architecture.module("modeling_flax").Model
    if not stages[0].remat:
        return partial(model, config)
    if "remat" not in taken_parameters(model):
        raise InputError(f"expected no remat for {architecture.model_type}, whose Flax model has none; leave it out")
    return partial(model, config, remat=True)


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


def _mesh(plan: Plan) -> Mesh | None:
    """Every device: `model_parallel` share a matrix's columns, `fsdp` its rows, the rest the batch; None on one."""
    devices = np.array(jax.devices())
    for name, count in (("fsdp", plan.fsdp), ("model_parallel", plan.model_parallel)):
        if count < 1:
            raise InputError(f"expected {name} of at least 1; found {count}")
    if len(devices) % (plan.fsdp * plan.model_parallel):
        raise InputError(
            f"expected fsdp * model_parallel to divide {len(devices)} devices; "
            f"found {plan.fsdp} * {plan.model_parallel}"
        )
    sharing = len(devices) // plan.model_parallel
    for settings in (plan.text, plan.chat):
        if settings is not None and settings.batch_size // settings.accumulate % sharing:
            raise InputError(
                f"expected a batch_size, divided by accumulate, that divides over {sharing} devices; "
                f"found {settings.batch_size} and {settings.accumulate}"
            )
    if jax.process_count() > 1 and jax.local_device_count() % plan.model_parallel:
        raise InputError(
            f"expected model_parallel to divide the {jax.local_device_count()} devices of each process; "
            f"found {plan.model_parallel}"
        )
    if len(devices) == 1:
        return None
    return Mesh(devices.reshape(-1, plan.fsdp, plan.model_parallel), ("data", "fsdp", "model"))


def same_run(path: Path, settings: dict[str, Any]) -> None:
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
