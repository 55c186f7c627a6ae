"""Training small models of any architecture that has a Flax model: `train`, or `isomorph train`.

vocabulary (tiktoken form) -> tokens, memory-mapped -> text -> conversations in the chat template -> model folder.
Whatever is done already is not done again, and a stopped stage goes on from its last checkpoint exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomorph.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from isomorph.train.run import Run

#: What a run imports, some of it only at its end, and the extra that brings it.
NEEDED = {"jax": "flax", "flax": "flax", "optax": "flax", "orbax.checkpoint": "flax", "matplotlib": "report"}


def train(
    out: str | Path,
    data: Sequence[str | Path] = (),
    *,
    preset: str | None = None,
    architecture: str | None = None,
    depth: int | None = None,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    chat_settings: Mapping[str, Any] | None = None,
    chat_data: Sequence[str | Path] = (),
    held_out: Sequence[str | Path] = (),
    form: str = "plain",
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    column: str = "text",
    vocabulary: str | Path | None = None,
    seeds: int = 1,
    other_seeds: float = 1.0,
    fsdp: int = 1,
    model_parallel: int = 1,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Run:
    """Train a model on texts and write it to `out/model`.

    The texts are those of `data` (files, or folders of .txt files) or the `column` of a Hub `dataset`'s `split`, which
    is streamed; a local folder of its files does as well.

    `preset` (pocket) names an architecture, shapes and settings; so does `depth`, from which the recipe of gelu_gpt
    follows. `architecture`, `config` (keys of config.json), `settings` and `chat_settings` (fields of `Settings`)
    override parts of it. `chat_data` are books of questions and answers for a second stage in the chat template;
    `held_out` texts are measured and never trained on; `form` says how texts lie in files. `vocabulary` is a tiktoken
    vocab.txt (talkie) or a tokenizer.json or its folder; without one it is learned from the texts. With `seeds` above 1
    more models are trained, for `other_seeds` times the steps, to see the spread. Repeating the call goes on where an
    earlier one stopped. On several devices every matrix is split over `fsdp` times `model_parallel` of them, and the
    batch over all but the latter. For several processes, give each the address of a `coordinator`, or "auto" where a
    cluster says it, how many `processes` there are and which one it is; `out` is a folder that all of them see. Raises
    InputError.
    """
    for package, extra in NEEDED.items():
        if find_spec(package.partition(".")[0]) is None:
            raise InputError(f"expected {package}, which training needs; run: pip install 'isomorph[{extra}]'")
    if coordinator is not None:
        join(coordinator, processes, process)
    from isomorph.train.presets import PRESETS, recipe
    from isomorph.train.run import Plan, run
    from isomorph.train.settings import Settings
    from isomorph.train.stream import Source

    if bool(data) == (dataset is not None):
        raise InputError("expected either data, texts or folders of them, or a dataset; give one of the two")
    if seeds < 1 or not 0 < other_seeds <= 1:
        raise InputError(f"expected seeds from 1 on and other_seeds in 0..1; found {seeds} and {other_seeds:g}")

    if preset is not None and preset not in PRESETS:
        raise InputError(f"expected a preset of {', '.join(PRESETS)}; found {preset!r}{did_you_mean(preset, PRESETS)}")
    settings = dict(settings or {})
    base = PRESETS[preset] if preset is not None else None
    if depth is not None:
        base = recipe(architecture or "gelu_gpt", depth, config or {}, settings)
    shapes = {**(base.config if base else {}), **(config or {})}
    if not shapes.get("vocab_size"):
        raise InputError(
            "expected the model's shapes; found no vocab_size; give a preset, a depth, or a config with its keys"
        )
    if base is None and not settings.get("steps"):
        raise InputError("expected a number of steps; found none; give steps, a preset or a depth")
    text = replace(base.text if base else Settings(steps=1), **settings)
    chat = replace((base and base.chat) or replace(text, warmup_steps=30), **(chat_settings or {}))
    plan = Plan(
        architecture or (base.architecture if base else "talkie"),
        shapes,
        text,
        [Path(path) for path in data],
        chat=chat if chat_data else None,
        chat_data=[Path(path) for path in chat_data],
        held_out=[Path(path) for path in held_out],
        form=form,
        source=Source(dataset, dataset_config, split, column) if dataset is not None else None,
        vocabulary=Path(vocabulary) if vocabulary is not None else None,
        seeds=seeds,
        other_seeds=other_seeds,
        fsdp=fsdp,
        model_parallel=model_parallel,
    )
    return run(plan, Path(out))


def join(coordinator: str, processes: int | None, process: int | None) -> None:
    """Make this process one of several that train together. Raises InputError."""
    import jax

    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"expected a coordinator HOST:PORT, the number of processes and which one this is; {reason}"
        ) from None
