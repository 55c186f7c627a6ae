"""What ends an answer: the union of what the model's files, its tokenizer and its architecture say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isomorph.errors import InputError
from isomorph.generate.channels import answer_ends

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model
    from isomorph.generate.options import Options


@dataclass(frozen=True)
class StopRules:
    """Token ids that end an answer, and strings that end it wherever they appear in its text."""

    ids: frozenset[int]
    strings: tuple[str, ...]


def stop_rules(model: Model, options: Options | None = None) -> StopRules:
    """The rules of `model`, with the caller's own stop strings.

    Ids: `eos_token_id` of generation_config.json, of config.json and of the tokenizer (files disagree, and each alone
    has been wrong), and the special tokens by which our architectures mark turns or harmony ends an answer. A marker
    that the model writes out as plain text stops it too. Raises InputError for stop strings without a tokenizer.
    """
    ids = {*_ids(getattr(model.config, "eos_token_id", None)), *_ids(getattr(model.tokenizer, "eos_token_id", None))}
    if model.source is not None:
        folder = model.source if model.source.is_dir() else model.source.parent
        for name in ("generation_config.json", "config.json"):
            ids.update(_ids(_read(folder / name).get("eos_token_id")))
    markers = chat_markers(model)
    ids = answer_ends(model.tokenizer, ids | set(markers.values()))
    strings = options.stop_strings if options is not None else ()
    if strings and model.tokenizer is None:
        raise InputError(
            "expected no stop strings, because the model has no tokenizer; pass tokenizer= or leave out stop"
        )
    return StopRules(frozenset(id for id in ids if id < model.vocab_size), (*strings, *markers))


def chat_markers(model: Model) -> dict[str, int]:
    """Name -> id of the special tokens that bound turns and documents, for architectures of ours; else empty."""
    from isomorph import architectures
    from isomorph.tokenizer import own_module

    own = own_module(architectures.get(model.architecture))
    known: dict[str, int] = getattr(model.tokenizer, "get_added_vocab", dict)()
    if own is None:
        return {}
    names = dict.fromkeys(name for flavour in own.SPECIAL_TOKENS.values() for name in flavour)
    return {name: known[name] for name in names if name in known}


def _ids(value: Any) -> Iterable[int]:
    """`eos_token_id` may be absent, one id or a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"expected JSON in {path}; {error}; fetch the file again or remove it") from None
    return values if isinstance(values, dict) else {}
