"""Tensors of a checkpoint as torch's, and how a module takes them up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from isomorph.checkpoint.mlx_quantized import QuantizedModule
from isomorph.errors import InputError
from isomorph.quantize.settings import Settings


def torch_view(value: np.ndarray) -> torch.Tensor:
    """A tensor over the array's own memory, mapped where it is; treat it as read-only."""
    bits = {"bfloat16": np.int16, "uint32": np.int32}.get(value.dtype.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        value = np.asarray(value, order="C")  # ascontiguousarray would give a scalar a dimension
        tensor = torch.from_numpy(value if bits is None else value.view(bits))
    return tensor.view(torch.bfloat16) if value.dtype.name == "bfloat16" else tensor


def packed_parts(entry: QuantizedModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Settings]:
    """`weight, scales, biases, settings` of a module, over the file's memory; scales checked to be finite."""
    weight, scales = torch_view(entry.weight.read()), torch_view(entry.scales.read())
    biases = None if entry.biases is None else torch_view(entry.biases.read())
    for name, part in (("scales", scales), ("biases", biases)):
        if part is None:
            continue
        # In bytes, E8M0 has one NaN and E4M3 one of either sign.
        byte_nan = (part & 0x7F == 0x7F) if entry.settings.mode == "nvfp4" else part == 0xFF
        if (byte_nan if part.dtype == torch.uint8 else ~torch.isfinite(part)).any():
            raise InputError(f"expected finite {name}; found NaN or infinity in {entry.path}.{name}; quantize it again")
    return weight, scales, biases, entry.settings


def put(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    """Fill a parameter or buffer, also where it is on the meta device and has no memory yet."""
    old = getattr(owner, name)
    if not old.is_meta:
        old.data = value  # the same object: others may be tied to it
    elif isinstance(old, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(name, value)


def check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises InputError unless both are equal."""
    if tuple(found) != tuple(wanted):
        raise InputError(
            f"expected {name} of shape {list(wanted)}; found {list(found)}; correct the weights or config.json"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
