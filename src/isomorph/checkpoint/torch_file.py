"""Reading an original torch file: tensors only, never code, memory-mapped."""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor
from isomorph.errors import InputError

logger = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".ckpt")

#: Where a training checkpoint keeps the model's tensors; without any of these the top level is the model.
STATE_KEYS = ("model_state_dict", "state_dict", "model")

#: What `torch.compile` puts into parameter names.
COMPILED_PREFIX = "_orig_mod."


def read_torch(path: Path) -> dict[str, Tensor]:
    """Lazily read tensors of `path`. Raises InputError for a damaged file, and for one that asks to run code."""
    return open_torch(path)[0]


def open_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Lazily read tensors of `path`, and the model's `config` that may stand beside them. Raises InputError."""
    try:
        import torch
    except ModuleNotFoundError:
        raise InputError(
            f"reading {path.name} needs the package 'torch', which is not installed; run: pip install 'isomorph[torch]'"
        ) from None

    try:
        # Only the zip form (torch >= 1.6) can be mapped; an older file is read whole.
        mapped = zipfile.is_zipfile(path)
        if not mapped:
            logger.info("%s is not a torch zip file: it is read into memory whole", path.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            document = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to run code ({code[1]})" if code else "it is damaged or not a torch file"
        raise InputError(
            f"expected a torch file of plain tensors; found {path}, refused because {reason}; "
            "save the model's state_dict alone with torch.save"
        ) from None
    except Exception as error:
        # Over damaged bytes zip reader and unpickler raise nearly everything there is, assertions included.
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"expected a torch file; found {path}, which torch cannot read ({detail[:120]}); download it again"
        ) from None
    state = _state(path, document)
    config = document.get("config") if state is not document else None
    return _tensors(path, state), dict(config) if isinstance(config, Mapping) else {}


def _state(path: Path, document: Any) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise InputError(
            f"expected a dictionary of tensors in {path}; found a {type(document).__name__}; "
            "save the model's state_dict"
        )
    for key in STATE_KEYS:
        if isinstance(document.get(key), Mapping):
            if rest := [str(name) for name in document if name != key]:
                logger.info("%s: tensors are under %r; ignored beside it: %s", path.name, key, ", ".join(rest))
            return document[key]
    return document


def _tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    tensors: dict[str, Tensor] = {}
    ignored = []
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            ignored.append(f"{key!r} is a {type(value).__name__}")
            continue
        name = str(key).replace(COMPILED_PREFIX, "")
        if name in tensors:
            raise InputError(
                f"expected each tensor once in {path}; found {name!r} twice, with and without '_orig_mod.'; remove one"
            )
        tensors[name] = _tensor(path, name, value)
    if ignored:
        logger.info("%s: ignored what is not a tensor: %s", path.name, ", ".join(ignored))
    if not tensors:
        raise InputError(f"expected tensors in {path} (top level or under {', '.join(STATE_KEYS)}); found none")
    return tensors


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    import torch

    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in NUMPY_DTYPES or value.layout != torch.strided or value.is_quantized:
        raise InputError(f"expected dense tensors of plain dtypes in {path}; found {name!r}: {value.layout}, {dtype}")

    def read() -> np.ndarray:
        array = value.detach().resolve_conj().resolve_neg()
        if dtype == "bfloat16" or dtype.startswith("float8"):
            # numpy has no such dtype: reinterpret the bits.
            bits = array.view(torch.int16 if dtype == "bfloat16" else torch.uint8)
            return bits.numpy().view(NUMPY_DTYPES[dtype])
        return array.numpy()

    return Tensor(name, tuple(value.shape), dtype, read)
