"""Experts as mlx-lm's models hold them: one stack [E, N, K] a projection, which is quantized as one matrix.

mlx-lm stacks the experts of a Transformers checkpoint as it loads them. Many of its models (0.32) can do so with floats
only, so quantized experts are written the way they end up, which is also how `mlx_lm.convert` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from isomorph.checkpoint.tensor import Tensor
from isomorph.errors import InputError

#: model_types of which Transformers stores each expert alone and mlx-lm calls the stacks `switch_mlp`.
STACKED = frozenset(
    [
        "ernie4_5_moe",
        "glm4_moe",
        "granitemoe",
        "lfm2_moe",
        "minimax",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
    ]
)

#: model_types whose matrices mlx-lm turns or stacks as it loads them, which it can do with floats only.
REARRANGED = frozenset(
    ["Klear", "bailing_moe_v3", "dbrx", "deepseek_v41", "gpt2", "kimi_linear", "mellum", "nemotron_h"]
)

#: What some architectures call the projections.
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_ONE = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(weight|bias|scales|biases)")
#: How granitemoe calls them, joined.
_LINEAR = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}

_ALL = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias)?")


def as_mlx_lm_holds_them(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`tensors` under Transformers' names, floats or packed as MLX packs them, with their experts, if any, stacked.

    Raises InputError for an architecture whose quantized weights mlx-lm could not load under Transformers' names.
    """
    model_type = str(config.get("model_type"))
    if model_type in REARRANGED:
        raise InputError(
            f"expected an architecture whose matrices mlx-lm takes as Transformers stores them; found {model_type!r}, "
            "whose it rearranges; run mlx_lm.convert without -q first and quantize its result"
        )
    if model_type not in STACKED:
        return dict(tensors)
    if model_type == "granitemoe":
        tensors = {
            re.sub(r"\w+_linear\.weight$", lambda match: _LINEAR[match[0]], name): t for name, t in tensors.items()
        }
    if any(_ALL.fullmatch(name) for name in tensors):
        parted = _parted(tensors)
        renamed = {name.replace(".experts.", ".switch_mlp."): tensor for name, tensor in parted.items()}
        return {name: tensor.renamed(name) for name, tensor in renamed.items()}
    return _stacked(tensors)


def _stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts' own tensors joined, each stack where its first expert was."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        path = name
        if match := _ONE.fullmatch(name):
            path = f"{match[1]}.switch_mlp.{_PROJECTIONS.get(match[3], match[3])}.{match[4]}"
        found.setdefault(path, {})[int(match[2]) if match else 0] = tensor
    return {path: _stack(path, parts) if ".switch_mlp." in path else parts[0] for path, parts in found.items()}


def _stack(name: str, parts: Mapping[int, Tensor]) -> Tensor:
    experts = [parts[index] for index in sorted(parts)]
    first = experts[0]
    alike = all((expert.shape, expert.dtype) == (first.shape, first.dtype) for expert in experts)
    if not alike or max(parts) + 1 != len(parts):
        raise InputError(
            f"expected experts 0 to {max(parts)} of one shape and dtype for {name!r}; found gaps or others; "
            "download the checkpoint again"
        )

    def stream() -> Iterator[np.ndarray]:
        for expert in experts:
            yield from expert.blocks()

    return Tensor(
        name, (len(experts), *first.shape), first.dtype, lambda: np.stack([e.read() for e in experts]), stream
    )


def _parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' joined `gate_up_proj` as two; each projection as `.weight` [E, N, K] and perhaps `.bias` [E, N]."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _ALL.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        kind = "bias" if match[3] else "weight"
        names = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for index, projection in enumerate(names):
            path = f"{match[1]}.{projection}.{kind}"
            result[path] = _expert_by_expert(path, tensor, partial(_half, -1 if len(names) == 1 else index))
    return result


def _expert_by_expert(name: str, tensor: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    # The shape of a view of no memory.
    shape = function(np.broadcast_to(np.empty((), np.uint8), tensor.shape[1:])).shape

    def stream() -> Iterator[np.ndarray]:
        for expert in tensor.read():
            yield np.ascontiguousarray(function(expert))

    read = lambda: np.stack(list(stream()))
    return Tensor(name, (tensor.shape[0], *shape), tensor.dtype, read, stream)


def _half(place: int, value: np.ndarray) -> np.ndarray:
    """[2N, K], gate before up; `place` -1 takes all."""
    return value if place < 0 else np.split(value, 2)[place]
