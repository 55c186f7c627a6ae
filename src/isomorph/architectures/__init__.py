"""Architectures of our own: one folder each, found by config.json or by tensor names."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from isomorph.architectures.base import Architecture
from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint

__all__ = ["FOLDERS", "Architecture", "configuration", "find", "get", "registered"]

logger = logging.getLogger(__name__)

FOLDERS = ("talkie", "gelu_gpt", "gpt_oss")

#: Share of a bare checkpoint's tensor names that a layout must know for the checkpoint to count as its architecture's.
RECOGNIZED_SHARE = 0.5


@cache
def registered() -> dict[str, Architecture]:
    """Every architecture, by model_type."""
    found = (import_module(f"isomorph.architectures.{folder}").ARCHITECTURE for folder in FOLDERS)
    return {architecture.model_type: architecture for architecture in found}


def get(model_type: str) -> Architecture | None:
    """The architecture of that model_type; None when it is not one of ours."""
    return registered().get(model_type)


def find(checkpoint: Checkpoint) -> Architecture | None:
    """The checkpoint's architecture: by config.json's model_type, or by tensor names when there is no config.

    None means that it is not one of ours. Raises InputError when there is neither a config nor a familiar name.
    """
    from isomorph.port.table import recognized

    model_type = checkpoint.config.get("model_type") if checkpoint.config is not None else None
    model_type = model_type or checkpoint.overrides.get("model_type")
    if isinstance(model_type, str):
        for other in registered().values():
            if model_type != other.model_type and (reason := other.foreign(checkpoint.config or {})):
                raise InputError(f"{checkpoint.path}: {reason}")
        return get(model_type)
    best, share = None, 0.0
    for architecture in registered().values():
        for layout in architecture.layouts.values():
            known = recognized(layout, checkpoint.tensors) / max(1, len(checkpoint.tensors))
            if known > share:
                best, share = architecture, known
    if best is None or share < RECOGNIZED_SHARE:
        raise InputError(
            f"expected config.json with a model_type, or the tensor names of {', '.join(registered())}; "
            f"found neither in {checkpoint.path}; pass config= a config.json"
        )
    return best


def configuration(
    architecture: Architecture, checkpoint: Checkpoint, layout: str | None = None, *, tell: bool = True
) -> Any:
    """The checkpoint's parsed config, as it is for `layout` (default: the checkpoint's own).

    Without a config.json it is inferred from shapes and published defaults, and the log says which, unless the caller
    only asks again (`tell` False). Raises InputError.
    """
    if checkpoint.config is not None:
        values = dict(checkpoint.config)
        for key, (value, reason) in architecture.unstated(values).items():
            level = logging.WARNING if tell else logging.DEBUG
            logger.log(level, "%s says no %s: %s assumed, %s", checkpoint.path.name, key, value, reason)
            values[key] = value
    else:
        inferred, assumed = architecture.infer_config(checkpoint.tensors)
        told = {line.partition("=")[0] for line in assumed} | checkpoint.overrides.keys()
        shaped = {key: inferred[key] for key in inferred.keys() - told}
        assumed = [line for line in assumed if line.partition("=")[0] not in checkpoint.overrides]
        logger.log(
            logging.WARNING if tell else logging.DEBUG,
            "%s has no config.json: shapes give %s; published defaults assumed: %s",
            checkpoint.path.name,
            ", ".join(f"{key}={value}" for key, value in sorted(shaped.items()) if key != "model_type"),
            ", ".join(assumed) or "none",
        )
        values = {**inferred, **checkpoint.overrides}
    values |= architecture.layouts[layout or architecture.detect(checkpoint)].config
    try:
        parse: Any = architecture.config_class
        return parse.from_dict(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
