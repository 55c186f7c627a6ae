"""Stacked experts of MLX folders in Transformers' modules: packed where all three are, else its own parameters."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from isomorph.checkpoint import Tensor
from isomorph.checkpoint.mlx_quantized import QuantizedModule
from isomorph.frameworks.torch_tensors import check_shape, dtype_name, packed_parts, put, torch_view
from isomorph.kernels.modules import QuantizedExpertLinear, QuantizedExperts

logger = logging.getLogger(__name__)

#: Experts as mlx-lm stacks them, [E, N, K]: `X.switch_mlp.gate_proj`, in gpt-oss `X.experts.gate_proj`. As published,
#: gpt-oss has one matrix for gate and up, whose rows take turns.
EXPERTS = re.compile(r"^(.*)\.(?:switch_mlp|experts)\.(gate_up|gate|up|down)_proj$")

#: The matrices that one block may have, in the order in which its activation takes their products.
FORMS = (("gate", "up", "down"), ("gate_up", "down"))


def place_experts(
    module: nn.Module,
    path: str,
    owners: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, QuantizedModule],
    fast: bool,
) -> set[str]:
    """Fill the experts at `path` of `module` from the matrices `owners`; the names filled, none if not understood.

    All packed, they stay packed; otherwise they become the module's own parameters. Raises InputError.
    """
    old: Any = module.get_submodule(path)
    form = next((form for form in FORMS if set(form) == set(owners)), None)
    if form is None or not getattr(old, "has_gate", False) or getattr(old, "has_post_expert_norm", False):
        return set()
    if "gate_up" in form and old.is_concatenated:
        return set()
    names = {f"{path}.{name}" for name, _ in old.named_parameters()}
    count, outputs, inner = (old.down_proj.transpose(1, 2) if old.is_transposed else old.down_proj).shape
    biases: dict[str, torch.Tensor] = {}
    for part in form:
        shape = (outputs, inner) if part == "down" else (len(part.split("_")) * inner, outputs)
        entry = packed.get(owners[part])
        check_shape(owners[part], entry.shape if entry else tensors[f"{owners[part]}.weight"].shape, (count, *shape))
        if old.has_bias:
            biases[part] = torch_view(tensors[f"{owners[part]}.bias"].read())
            check_shape(f"{owners[part]}.bias", biases[part].shape, (count, shape[0]))
    if all(owners[part] in packed for part in form):
        made = [
            QuantizedExpertLinear(*packed_parts(packed[owners[part]]), bias=biases.get(part), fast=fast)
            for part in form
        ]
        module.set_submodule(path, QuantizedExperts(made[:-1], made[-1], gating(old, fused=len(made) == 2)))
        return names
    if any(owner in packed for owner in owners.values()):
        logger.warning("%s: experts packed only in part are unpacked in memory; quantize all three matrices", path)
    dtype = old.down_proj.dtype
    values = []
    for part in form:
        entry = packed.get(owners[part])
        tensor = entry.dequantized(dtype_name(dtype)) if entry else tensors[f"{owners[part]}.weight"]
        values.append(torch_view(tensor.read()).to(dtype))
    for name, whole in (("gate_up_proj", _joined(values[:-1], old.is_concatenated)), ("down_proj", values[-1])):
        put(old, name, (whole.transpose(1, 2) if old.is_transposed else whole).contiguous())
    if old.has_bias:
        put(old, "gate_up_proj_bias", _joined([biases[part].to(dtype) for part in form[:-1]], old.is_concatenated))
        put(old, "down_proj_bias", biases["down"].to(dtype, copy=True))
    return names


def _joined(parts: Sequence[torch.Tensor], concatenated: bool) -> torch.Tensor:
    """Gate and up [E, F, ...] as one [E, 2F, ...], one after the other or in turn; a fused one as it is."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), 1) if concatenated else torch.stack(list(parts), 2).flatten(1, 2)


def gating(experts: Any, fused: bool) -> Callable[..., torch.Tensor]:
    """How `experts`, a module of Transformers, makes one hidden vector of those of gate and up, or of both in one."""
    apply = type(experts)._apply_gate
    if apply.__name__ == "_default_apply_gate":
        activation = experts.act_fn
        return lambda gate, up: activation(gate) * up
    # The module's own function, over the attributes it reads but not the weights.
    bare = copy.copy(experts)
    bare._parameters = {}
    if fused:
        return lambda both: apply(bare, both)
    if experts.is_concatenated:
        return lambda gate, up: apply(bare, torch.cat([gate, up], -1))
    return lambda gate, up: apply(bare, torch.stack([gate, up], -1).flatten(-2))
