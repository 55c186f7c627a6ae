"""Operations of a recorded step as instructions of the C++ extension, and as plain calls where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isomorph.kernels import native, ops
from isomorph.kernels.modules import FEW_ROWS
from isomorph.quantize.settings import Settings

if TYPE_CHECKING:
    from isomorph.frameworks.torch_cache import SlotCache
    from isomorph.frameworks.torch_step import Node

aten: Any = torch.ops.aten

UNARY = {
    getattr(aten, name + suffix).default: name
    for name in ("neg", "rsqrt", "sqrt", "reciprocal", "exp", "tanh", "sigmoid", "silu", "relu", "cos", "sin")
    for suffix in ("", "_")
}
COPIES = {aten._to_copy.default, aten.clone.default}
BINARY = {
    getattr(getattr(aten, name + suffix), overload): name
    for name in ("add", "sub", "mul", "div")
    for suffix in ("", "_")
    for overload in ("Tensor", "Scalar")
} | {aten.maximum.default: "maximum", aten.minimum.default: "minimum"}
REDUCTIONS = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum", aten.amax.default: "amax"}


class Program:
    """A list of C++ steps and Python calls, run in order; it keeps every tensor alive that it works on."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._kept: list[Any] = []

    def run(self, cache: SlotCache, starts: np.ndarray) -> None:
        """One step over the keys and values in `cache`, whose row b begins at slot `starts[b]`."""
        for part in self._parts:
            if callable(part):
                part()
            else:
                part.run(cache.keys, cache.values, cache.rooms, cache.dropped, cache.filled, starts.ctypes.data)

    def add(self, node: Node, *others: Node) -> None:
        """Append one operation, or several `quantized_linear` of one format and the same activations as one product."""
        self._kept.append((node, *others))
        if node.function is None:
            self.attend(node)
        elif not self._lower(node, *others):
            self._parts.extend(call(part) for part in (node, *others))

    def attend(self, node: Node) -> None:
        query, key, value = (self._view(part) for part in node.arguments)
        sinks = node.options["sinks"]
        self._kept.append(sinks)
        self._step().attend(
            query,
            key,
            value,
            self._view(node.result),
            node.options["layer"],
            node.options["scale"],
            node.options["window"],
            node.options["cap"],
            0 if sinks is None else sinks.data_ptr(),
        )

    def _step(self) -> Any:
        if not self._parts or callable(self._parts[-1]):
            self._parts.append(native.extension().Step())
        return self._parts[-1]

    def _view(self, tensor: torch.Tensor) -> Any:
        return native.extension().View(
            tensor.data_ptr(), native.TYPES[tensor.dtype], list(tensor.shape), list(tensor.stride())
        )

    def _operand(self, value: Any, like: torch.Tensor) -> torch.Tensor:
        """A tensor or number as a tensor of `like`'s shape."""
        if not isinstance(value, torch.Tensor) or value.dtype == torch.float64:
            value = torch.as_tensor(value, dtype=torch.float32)
            self._kept.append(value)
        return value.expand(like.shape)

    def _lower(self, node: Node, *others: Node) -> bool:
        """Append the node to the C++ step; False when it has no such instruction."""
        function, arguments, out = node.function, node.arguments, node.result
        name = str(function.overloadpacket)
        if function == aten.native_layer_norm.default:
            out = out[0]
        if not isinstance(out, torch.Tensor) or out.ndim > 6:
            return False
        floats = [tensor for tensor in node.tensors() if tensor.is_floating_point() and tensor.dtype != torch.float64]
        if any(tensor.dtype not in native.TYPES or tensor.ndim > 6 for tensor in (*floats, out)):
            return False
        if name == "isomorph.dequantize_rows":
            return self._rows(*node.arguments, out=out)
        if name.startswith("isomorph."):
            return self._product(node, *others)
        if function == aten.embedding.default:
            return self._take(arguments[0], arguments[1], out)
        if function == aten.index_select.default:
            return arguments[1] == 0 and self._take(arguments[0], arguments[2], out)
        scalars = [t for t in node.tensors() if t.dtype == torch.float64 and t.numel() == 1]
        if len(floats) + len(scalars) != len(list(node.tensors())):
            return False
        if function in UNARY:
            self._elementwise(UNARY[function], out, arguments[0])
        elif function in COPIES:
            self._elementwise("copy", out, arguments[0])
        elif function == aten.copy_.default:
            self._elementwise("copy", arguments[0], arguments[1])
        elif function == aten.gelu.default:
            tanh = node.options.get("approximate", "none") == "tanh"
            self._elementwise("gelu_tanh" if tanh else "gelu", out, arguments[0])
        elif function == aten.pow.Tensor_Scalar:
            self._elementwise("pow", out, arguments[0], p=float(arguments[1]))
        elif function == aten.clamp.default:
            low, high = (*arguments[1:], None, None)[:2]
            bounds = (-math.inf if low is None else low), (math.inf if high is None else high)
            self._elementwise("clamp", out, arguments[0], p=float(bounds[0]), q=float(bounds[1]))
        elif function in BINARY:
            factor = arguments[2] if len(arguments) > 2 else node.options.get("alpha", 1)
            self._elementwise(BINARY[function], out, arguments[0], arguments[1], p=float(factor))
        elif function == aten.cat.default:
            self._join(node)
        elif function in REDUCTIONS and len(arguments[1]) == 1:
            (dimension,) = arguments[1]
            target = out.movedim(dimension, -1) if out.ndim == arguments[0].ndim else out.unsqueeze(-1)
            self._step().reduce(
                REDUCTIONS[function], self._view(target), self._view(arguments[0].movedim(dimension, -1))
            )
        elif function == aten.addmm.default:
            return not node.options and self._affine(out, *arguments)
        elif function == aten._softmax.default and arguments[1] in (-1, arguments[0].ndim - 1):
            self._step().softmax(self._view(out), self._view(arguments[0]))
        elif function == aten.native_layer_norm.default and len(arguments[1]) == 1:
            self._layer_norm(out, *arguments)
        else:
            return False
        return True

    def _elementwise(self, name: str, out: torch.Tensor, a: Any, b: Any = None, p: float = 1.0, q: float = 0.0) -> None:
        second = None if b is None else self._view(self._operand(b, out))
        self._step().elementwise(name, self._view(out), self._view(self._operand(a, out)), second, p, q)

    def _join(self, node: Node) -> None:
        dimension = node.arguments[1] if len(node.arguments) > 1 else node.options.get("dim", 0)
        start = 0
        for part in node.arguments[0]:
            self._elementwise("copy", node.result.narrow(dimension, start, part.shape[dimension]), part)
            start += part.shape[dimension]

    def _affine(self, out: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> bool:
        """`bias + x @ matrix` of few bfloat16 rows, such as a router's: rounded once, after the bias, as torch does."""
        weight = matrix.T
        if (
            {x.dtype, weight.dtype} != {torch.bfloat16}
            or not (native.extension().has_wide() and weight.is_contiguous() and x.stride(1) == 1)
            or x.shape[0] > FEW_ROWS
        ):
            return False
        product = torch.empty(out.shape, dtype=torch.float32)
        self._kept.append((product, weight))
        given = x.data_ptr(), native.TYPES[x.dtype], x.stride(0), x.shape[0]
        target = product.data_ptr(), native.TYPES[product.dtype]
        self._step().multiply_bfloat16(weight.data_ptr(), *weight.shape, *given, *target)
        self._elementwise("add", out, product, bias)
        return True

    def _layer_norm(self, out: torch.Tensor, x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> None:
        parts = [None if part is None else part.contiguous() for part in (weight, bias)]
        self._kept.append(parts)
        pointers = [0 if part is None else part.data_ptr() for part in parts]
        kind = native.TYPES[next((part.dtype for part in parts if part is not None), torch.float32)]
        self._step().layer_norm(self._view(out), self._view(x), *pointers, kind, eps)

    def _rows(self, weight: Any, scales: Any, biases: Any, indices: Any, *settings: Any, out: torch.Tensor) -> bool:
        if indices.dtype != torch.int64 or not indices.is_contiguous():
            return False
        handle = native.packed_handle(weight, scales, biases, Settings(*settings[:3]))
        self._step().dequantize(handle, indices.data_ptr(), indices.numel(), out.data_ptr(), native.TYPES[out.dtype])
        return True

    def _take(self, table: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> bool:
        """Rows `indices` of `table`, byte by byte."""
        if indices.dtype != torch.int64 or not all(part.is_contiguous() for part in (table, indices, out)):
            return False
        row_bytes = table[0].numel() * table.element_size()
        self._step().take(table.data_ptr(), row_bytes, indices.data_ptr(), indices.numel(), out.data_ptr())
        return True

    def _product(self, node: Node, *others: Node) -> bool:
        name, x = node.function._opname, node.arguments[0]
        rows, nodes = ops._flat(x), (node, *others)
        if name not in ("quantized_linear", "quantized_experts_linear", "bfloat16_linear") or (
            rows.data_ptr() != x.data_ptr() or not all(part.result.is_contiguous() for part in nodes)
        ):
            return False
        kind = native.TYPES[x.dtype]
        given = (rows.data_ptr(), kind, rows.stride(0))
        target = (node.result.data_ptr(), native.TYPES[node.result.dtype])
        if name == "bfloat16_linear":
            weight = node.arguments[1]
            if not weight.is_contiguous() or rows.shape[0] > native.WIDE_ROWS:
                return False
            self._step().multiply_bfloat16(weight.data_ptr(), *weight.shape, *given, rows.shape[0], *target)
            return True
        experts, *_ = rest = list(node.arguments[4:])
        if name == "quantized_experts_linear":
            rest.pop(0)
        *settings, fast = rest
        packed = [part.arguments[1:4] for part in nodes]
        handles = [native.packed_handle(w, scales, biases, Settings(*settings)) for w, scales, biases in packed]
        self._kept.append(handles)
        if name == "quantized_experts_linear":
            if experts.dtype != torch.int64 or not experts.is_contiguous():
                return False
            repeats = experts.numel() // rows.shape[0]
            self._step().multiply_experts(*handles, *given, repeats, experts.data_ptr(), experts.numel(), *target, fast)
            return True
        if not native.streams(rows.shape[0]):
            return False
        results = [part.result.data_ptr() for part in nodes]
        self._step().multiply(handles, *given, rows.shape[0], results, target[1], fast)
        return True


def call(node: Node) -> Callable[[], None]:
    """The operation as torch runs it, its results copied where the recorded step had them."""
    function, arguments, options = node.function, node.arguments, node.options
    if node.written():
        return lambda: function(*arguments, **options)
    if isinstance(node.result, torch.Tensor):
        result = node.result

        def one() -> None:
            result.copy_(function(*arguments, **options))

        return one
    results = [part if isinstance(part, torch.Tensor) else None for part in node.result]

    def several() -> None:
        for place, value in zip(results, function(*arguments, **options)):
            if place is not None:
                place.copy_(value)

    return several
