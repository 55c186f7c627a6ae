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
    data: Sequence[str | Path],
    *,
    preset: str | None = None,
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    chat_settings: Mapping[str, Any] | None = None,
    chat_data: Sequence[str | Path] = (),
    held_out: Sequence[str | Path] = (),
    vocabulary: str | Path | None = None,
    model_parallel: int = 1,
) -> Run:
    """Train a model on the texts of `data` (files, or folders of .txt files) and write it to `out/model`.

    `preset` (pocket) names an architecture, shapes and settings; `architecture`, `config` (keys of config.json),
    `settings` and `chat_settings` (fields of `Settings`) override parts of it. `chat_data` are books of questions and
    answers for a second stage in the chat template; `held_out` texts are measured and never trained on. `vocabulary`
    is a tiktoken vocab.txt; without one it is learned from the texts. Repeating the call goes on where an earlier one
    stopped. On several devices the batch is split, and every matrix over `model_parallel` of them. Raises InputError.
    """
    for package, extra in NEEDED.items():
        if find_spec(package.partition(".")[0]) is None:
            raise InputError(f"expected {package}, which training needs; run: pip install 'isomorph[{extra}]'")
    from isomorph.train.presets import PRESETS
    from isomorph.train.run import run
    from isomorph.train.settings import Settings

    if preset is not None and preset not in PRESETS:
        raise InputError(f"expected a preset of {', '.join(PRESETS)}; found {preset!r}{did_you_mean(preset, PRESETS)}")
    base = PRESETS[preset] if preset is not None else None
    shapes = {**(base.config if base else {}), **(config or {})}
    if not shapes.get("vocab_size"):
        raise InputError("expected the model's shapes; found no vocab_size; give a preset, or a config with its keys")
    if base is None and not (settings or {}).get("steps"):
        raise InputError("expected a number of steps; found none; give steps or a preset")
    text = replace(base.text if base else Settings(steps=1), **(settings or {}))
    chat = replace(base.chat if base else replace(text, warmup_steps=30), **(chat_settings or {}))
    return run(
        architecture or (base.architecture if base else "talkie"),
        shapes,
        text,
        Path(out),
        [Path(path) for path in data],
        chat=chat if chat_data else None,
        chat_data=[Path(path) for path in chat_data],
        held_out=[Path(path) for path in held_out],
        vocabulary=Path(vocabulary) if vocabulary is not None else None,
        model_parallel=model_parallel,
    )
