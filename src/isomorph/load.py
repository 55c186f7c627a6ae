"""`isomorph.load`: a checkpoint, its architecture and a framework become a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from isomorph.errors import InputError, did_you_mean
from isomorph.frameworks import FRAMEWORKS, STOCK
from isomorph.frameworks.model import Model
from isomorph.stage import callable_module

NUMERICS = ("exact", "fast")


def load(
    source: str | Path,
    framework: str = "torch",
    dtype: str | None = None,
    device: str | None = None,
    tokenizer: Any = None,
    config: Mapping[str, Any] | str | Path | None = None,
    numerics: str = "exact",
    rope_table_dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load `source` (a folder, an original checkpoint file or a Hub id) in `framework` (torch, mlx or flax).

    Framework `mlx-lm` is stock mlx-lm with its own model, faults included, where `mlx` has isomorph's.
    `dtype` is the compute dtype (`float32`, `bfloat16`, `float16`, in torch also `float64`; default: as stored).
    `tokenizer` is a folder or file to take the tokenizer from, or a tokenizer. `config` overrides or replaces
    config.json. `rope_table_dtype` overrides how cos and sin are rounded. Architectures that are not ours load through
    Transformers (torch) or mlx-lm (mlx); code that a repository ships runs only with `trust_remote_code`.
    Raises InputError.
    """
    known = (*FRAMEWORKS, *STOCK)
    if framework not in known:
        raise InputError(
            f"expected a framework of {', '.join(known)}; found {framework!r}{did_you_mean(framework, known)}"
        )
    if numerics not in NUMERICS:
        raise InputError(f"expected numerics {' or '.join(NUMERICS)}; found {numerics!r}")
    if numerics == "fast" and framework != "torch":
        raise InputError(f"expected numerics exact with framework {framework}; found fast; use framework torch")
    if dtype not in (None, "float32", "bfloat16", "float16") and (dtype, framework) != ("float64", "torch"):
        raise InputError(f"expected dtype float32, bfloat16 or float16 (torch also float64); found {dtype!r}")

    from isomorph import architectures
    from isomorph.checkpoint import open_checkpoint
    from isomorph.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(source, config=config)
    architecture = architectures.find(checkpoint)
    parsed = None
    if architecture is not None:
        parsed = architectures.configuration(architecture, checkpoint)
        if rope_table_dtype is not None:
            try:
                parsed = replace(parsed, rope_table_dtype=rope_table_dtype)
            except (TypeError, ValueError) as error:
                raise InputError(f"rope_table_dtype={rope_table_dtype!r} does not fit this model: {error}") from None
    elif rope_table_dtype is not None:
        raise InputError("expected rope_table_dtype only for architectures of isomorph's own; leave it out")
    try:
        backend = import_module(f"isomorph.frameworks.{framework.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"framework {framework!r} needs the package {error.name!r}, which is not installed; "
            f"run: pip install 'isomorph[{framework.partition('-')[0]}]'"
        ) from None
    model: Model = backend.load_model(
        architecture,
        checkpoint,
        parsed,
        dtype=dtype,
        device=device,
        numerics=numerics,
        trust_remote_code=trust_remote_code,
    )
    model.source = checkpoint.path
    model.tokenizer = load_tokenizer(checkpoint.path, architecture, parsed, override=tokenizer)
    return model


callable_module(__name__)
