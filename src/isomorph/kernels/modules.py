"""Torch modules that hold packed weights as they lie in a file and multiply with them directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from isomorph.kernels import native, ops
from isomorph.quantize.settings import Settings

_operators: ContextVar[bool] = ContextVar("isomorph_operators", default=False)


@contextmanager
def through_operators() -> Iterator[None]:
    """Modules call `torch.ops.isomorph`, which whoever records operations sees, rather than the extension itself."""
    token = _operators.set(True)
    try:
        yield
    finally:
        _operators.reset(token)


class PackedModule(nn.Module):
    """`weight` int32 [..., N, K * bits / 32], `scales` and `biases` [..., N, K / group_size]: buffers.

    Tensors over a memory-mapped file stay mapped. Casting the module leaves them alone: dtypes are the format's.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        biases: torch.Tensor | None,
        settings: Settings,
        fast: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.view(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("biases", biases)
        self.settings = settings
        self.fast = fast
        self._handle: tuple[tuple[int, int], Any] | None = None

    @property
    def in_features(self) -> int:
        return self.scales.shape[-1] * self.settings.group_size

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def handle(self) -> Any:
        """The extension's view of the buffers, made anew when they have moved."""
        key = self.weight.data_ptr(), self.scales.data_ptr()
        if self._handle is None or self._handle[0] != key:
            self._handle = key, native.packed_handle(self.weight, self.scales, self.biases, self.settings)
        return self._handle[1]

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedModule:
        kept = {name: getattr(self, name) for name in ("scales", "biases") if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        self._handle = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}  # a copy has buffers of its own

    def _direct(self, x: torch.Tensor) -> bool:
        """Whether to call the extension without the operator's dispatch, which costs more than a small product."""
        return (
            not (torch.compiler.is_compiling() or _operators.get())
            and x.device.type == "cpu"
            and not (x.requires_grad and torch.is_grad_enabled())
            and x.dtype in native.TYPES
            and native.extension() is not None
        )

    def _arguments(self) -> tuple[int, int, str]:
        return self.settings.bits, self.settings.group_size, self.settings.mode

    def extra_repr(self) -> str:
        bits, size, mode = self._arguments()
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={bits}, group_size={size}, mode={mode}"


class QuantizedLinear(PackedModule):
    """`x [..., K] -> x @ w.T + bias [..., N]` in x's dtype."""

    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        biases: torch.Tensor | None,
        settings: Settings,
        fast: bool = False,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(weight, scales, biases, settings, fast)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._direct(x):
            rows = ops._flat(x)
            y = ops.linear_with_handle(self.handle(), rows, self.out_features, self.settings, self.fast)
            y = y.view(*x.shape[:-1], self.out_features)
        else:
            packed = self.weight, self.scales, self.biases
            y = torch.ops.isomorph.quantized_linear(x, *packed, *self._arguments(), self.fast)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(PackedModule):
    """`ids [...] -> rows [..., K]` in `dtype`, times `scale` where an architecture scales its embeddings."""

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        biases: torch.Tensor | None,
        settings: Settings,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        fast: bool = False,
    ) -> None:
        super().__init__(weight, scales, biases, settings, fast)
        self.dtype = dtype
        self.scale = scale

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        packed = self.weight, self.scales, self.biases
        rows = torch.ops.isomorph.dequantize_rows(*packed, ids, *self._arguments(), self.dtype)
        # The architecture's own rounding: its scale is a tensor of the compute dtype.
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)

    def as_linear(self) -> QuantizedLinear:
        """The output head that is tied to this embedding: same buffers, also after both have moved to a device."""
        head = QuantizedLinear(self.weight, self.scales, self.biases, self.settings, fast=self.fast)
        self._buffers.update(head._buffers)
        head._buffers = self._buffers
        return head


class QuantizedExpertLinear(PackedModule):
    """Weights [E, N, ...]: row i of the result is row i * M // R of `x [M, K]` times expert `experts[i]`, i < R.

    `bias` is [E, N] or None.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        biases: torch.Tensor | None,
        settings: Settings,
        fast: bool = False,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(weight, scales, biases, settings, fast)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        chosen = experts.reshape(-1).long().contiguous()
        if self._direct(x):
            y = native.multiply_experts(self.handle(), ops._flat(x), chosen, self.out_features, self.fast)
        else:
            packed = self.weight, self.scales, self.biases
            y = torch.ops.isomorph.quantized_experts_linear(x, *packed, chosen, *self._arguments(), self.fast)
        return y if self.bias is None else y + self.bias.index_select(0, chosen).to(y.dtype)


class QuantizedExperts(nn.Module):
    """Gated experts: sum over the chosen of weight * down(gating(gate(x), up(x))), as Transformers calls them.

    `gate_up` is the matrices of gate and up, or one that holds both: `gating` takes the product of each.
    """

    def __init__(
        self,
        gate_up: Sequence[QuantizedExpertLinear],
        down: QuantizedExpertLinear,
        gating: Callable[..., torch.Tensor],
    ) -> None:
        super().__init__()
        self.gate_up, self.down_proj = nn.ModuleList(gate_up), down
        self.gating = gating

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` [M, D], `top_k_index` and `top_k_weights` [M, k] -> [M, D]."""
        hidden = self.gating(*(part(hidden_states, top_k_index) for part in self.gate_up))
        parts = self.down_proj(hidden, top_k_index) * top_k_weights.reshape(-1, 1).to(hidden.dtype)
        return parts.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


#: Rows up to which our own product with bfloat16 weights reads them faster than torch's.
FEW_ROWS = 16


class Bfloat16Linear(nn.Linear):
    """A bfloat16 `nn.Linear` that multiplies few rows with our own kernel, fp32 accumulation as torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x.numel() <= FEW_ROWS * x.shape[-1] and x.dtype == self.weight.dtype == torch.bfloat16
        training = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not few or training or x.device.type != "cpu":
            return super().forward(x)
        if torch.compiler.is_compiling() or _operators.get():
            y = torch.ops.isomorph.bfloat16_linear(x, self.weight)
        else:
            y = native.multiply_bfloat16(self.weight, ops._flat(x)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def speed_up(model: nn.Module) -> nn.Module:
    """Give the bfloat16 linear layers of a model on the CPU the product for few rows; the model itself is returned."""
    extension = native.extension()
    if extension is None or not extension.has_wide():  # only measured to be faster with AVX-512
        return model
    for part in model.modules():
        weight = part.weight if type(part) is nn.Linear else None
        if (
            weight is not None
            and weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
        ):
            part.__class__ = Bfloat16Linear
    return model
