"""The tokenizer of a model folder: loaded for any architecture, and carried along when a model is converted."""

from __future__ import annotations

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from isomorph.checkpoint.source import read_json
from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.architectures.base import Architecture

logger = logging.getLogger(__name__)

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

#: Files that Transformers tokenizers consist of, with what generation needs to know beside them.
FILES = (
    FAST,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)

#: Class names that say no more than what tokenizer.json says itself, so that the light loader is enough.
GENERIC_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")


class VocabularyMismatch(InputError):
    """A sound vocabulary file that is not this model's."""


def load_tokenizer(path: Path, architecture: Architecture | None, config: Any, override: Any = None) -> Any:
    """The Transformers-style tokenizer of the model at `path` (its folder, or an original file); None when it has none.

    `config` is the architecture's parsed config. `override` is a tokenizer, or where to take one from: a folder, a
    tokenizer.json or a vocab.txt. Nothing is downloaded and no code of the folder runs. Raises InputError when the
    files are there but cannot be read.
    """
    if override is not None and not isinstance(override, (str, Path)):
        return override
    if override is not None:
        place = Path(override).expanduser()
        if not place.exists():
            raise InputError(f"expected a tokenizer folder, tokenizer.json or vocab.txt; found nothing at {place}")
        tokenizer = _load_from(place, architecture, config)
        if tokenizer is None:
            raise InputError(f"expected {FAST} or vocab.txt in the tokenizer folder {place}; found neither")
        return tokenizer
    try:
        return _load_from(path if path.is_dir() else path.parent, architecture, config)
    except VocabularyMismatch as error:
        logger.warning("no tokenizer for %s: %s", path.name, error)
        return None


def copy_tokenizer(
    source: Path, target: Path, architecture: Architecture | None, config: Any, *, original: bool = False
) -> list[str]:
    """Put the tokenizer of the model at `source` into the folder `target`; return the names of the files written.

    Transformers files are copied; an original vocab.txt becomes Transformers files, or the other way round for an
    `original` target. A model without tokenizer gives an empty list.
    """
    folder = source if source.is_dir() else source.parent
    own = own_module(architecture)
    vocabulary = folder / own.VOCABULARY_FILE if own is not None else None
    if original:
        if vocabulary is not None and vocabulary.is_file():
            shutil.copyfile(vocabulary, target / vocabulary.name)
            return [vocabulary.name]
        if own is not None and vocabulary is not None and hasattr(own, "write_vocabulary"):
            if not (folder / FAST).is_file():
                return []
            own.write_vocabulary(folder / FAST, target / vocabulary.name)
            return [vocabulary.name]
    present = [name for name in FILES if (folder / name).is_file()]
    for name in present:
        if name.endswith(".json"):
            read_json(folder / name)  # a damaged file is refused here, not carried on
    if set(present) - {"generation_config.json"} or own is None or vocabulary is None or not vocabulary.is_file():
        for name in present:
            shutil.copyfile(folder / name, target / name)
        return present
    try:
        return own.write(
            vocabulary, target, config.vocab_size, model_max_length=getattr(config, "max_position_embeddings", None)
        )
    except VocabularyMismatch as error:
        logger.warning("no tokenizer for %s: %s", source.name, error)
        return []


def own_module(architecture: Architecture | None) -> ModuleType | None:
    """The architecture's `tokenizer.py`, or None when it has none."""
    if architecture is None or find_spec(f"isomorph.architectures.{architecture.folder}.tokenizer") is None:
        return None
    return architecture.module("tokenizer")


def _load_from(place: Path, architecture: Architecture | None, config: Any) -> Any:
    own = own_module(architecture)
    if place.is_file():
        if place.name == FAST:
            return _load_transformers(place.parent)
        if own is None:
            raise InputError(
                f"expected {FAST} or a folder with it; found {place.name}, which this architecture does not use"
            )
        return own.load(place, config.vocab_size, model_max_length=getattr(config, "max_position_embeddings", None))
    if any((place / name).is_file() for name in (FAST, "tokenizer.model", "spiece.model", "vocab.json")):
        return _load_transformers(place)
    if own is not None and (place / own.VOCABULARY_FILE).is_file():
        return _load_from(place / own.VOCABULARY_FILE, architecture, config)
    return None


def _load_transformers(folder: Path) -> Any:
    settings = _settings(folder)
    options: dict[str, Any] = {"local_files_only": True}
    try:
        if (folder / FAST).is_file() and settings.get("tokenizer_class") in GENERIC_CLASSES:
            # The generic class imports in a quarter of the time that choosing among all of them takes.
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        # The Rust library raises bare Exception for a file it cannot parse.
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"expected a Transformers tokenizer in {folder}; it cannot be read ({reason}); fetch its files again or "
            "pass tokenizer="
        ) from None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"expected JSON in {path}; {error}; fetch the file again") from None
    if not isinstance(settings, dict):
        raise InputError(f"expected a JSON object in {path}; found {type(settings).__name__}; fetch the file again")
    return settings
