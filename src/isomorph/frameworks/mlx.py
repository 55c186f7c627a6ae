"""MLX behind the contract: our own model files, and any architecture that stock mlx-lm has."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from isomorph.errors import InputError
from isomorph.frameworks.mlx_state import MLXDecodeState
from isomorph.frameworks.model import Model

if TYPE_CHECKING:
    from isomorph.architectures.base import Architecture
    from isomorph.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")

#: Names under which configs of stock architectures state their longest sequence.
POSITION_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")

#: What mlx-lm's models call the matrix that chooses experts.
ROUTERS = ("router", "gate")


class MLXModel(Model):
    """A model of mlx-lm's form: `module(ids, cache=None)` gives logits, `module.layers` are its blocks.

    `module` is the `nn.Module`, `device` where it runs. `dtype` names the dtype of activations and of everything
    that is not packed.
    """

    framework = "mlx"

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        *,
        architecture: str,
        dtype: str,
        device: mx.Device,
        limits: Mapping[str, Any],
    ) -> None:
        """`limits` holds `vocab_size` and, where the architecture has one, a key of `POSITION_KEYS`."""
        self.module = module
        self.config = config
        self.architecture = architecture
        self.dtype = dtype
        self.device = device
        self.vocab_size = int(limits["vocab_size"])
        self.max_positions = next((int(limits[key]) for key in POSITION_KEYS if limits.get(key)), sys.maxsize)
        self.num_layers = len(module.layers)

    def to_numpy(self, logits: mx.array) -> np.ndarray:
        """Logits [B, T, >= V] as float32 [B, T, V]: rows that only pad the vocabulary are cut."""
        return np.array(logits[..., : self.vocab_size].astype(mx.float32))

    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        if attention_mask is not None:
            first = attention_mask.argmax(axis=1)
            last = attention_mask.shape[1] - attention_mask[:, ::-1].argmax(axis=1)
            if (attention_mask.sum(axis=1) != last - first).any():
                raise InputError("expected padding before or after the tokens; found padding between them")
            # What follows a token cannot change it: only padding on the left needs more than the causal mask.
            if first.any():
                return self._left_padded_logits(ids, first, last)
        with mx.stream(self.device):
            logits = self.to_numpy(self.module(mx.array(ids.astype(np.int32))))
        mx.clear_cache()
        return logits

    def _left_padded_logits(self, ids: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        try:
            return self._decode_state(len(ids), first, None).feed(ids)
        except InputError:
            # mlx-lm has no padded form of this architecture's cache: row by row, which needs none.
            logits = np.zeros((*ids.shape, self.vocab_size), np.float32)
            for row, (start, stop) in enumerate(zip(first, last)):
                logits[row, start:stop] = self._logits(ids[row : row + 1, start:stop], None)[0]
            return logits

    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        with mx.stream(self.device), recorded(self.module.layers) as states:
            mx.eval(self.module(mx.array(ids.astype(np.int32))))
            if len(states) != self.num_layers + 1:
                raise InputError(
                    f"expected hidden states of {self.num_layers} layers; found that {self.architecture} does not run "
                    "its layers one after another"
                )
            arrays = [np.array(states[index].astype(mx.float32)) for index in sorted(states)]
        mx.clear_cache()
        return arrays

    def _router_logits(self, ids: np.ndarray) -> list[np.ndarray]:
        routers = [
            part
            for layer in self.module.layers
            for path, part in layer.named_modules()
            if path.rpartition(".")[2] in ROUTERS and isinstance(part, (nn.Linear, nn.QuantizedLinear))
        ]
        with mx.stream(self.device), recorded(routers) as states:
            mx.eval(self.module(mx.array(ids.astype(np.int32))))
            return [np.array(states[index].astype(mx.float32)) for index in sorted(states) if index]

    def _decode_state(self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None) -> MLXDecodeState:
        # mlx-lm's caches grow by themselves, so max_length has nothing to allocate.
        with mx.stream(self.device):
            return MLXDecodeState.empty(self, batch_size, left_padding)

    def load_decode_state(self, path: Path) -> MLXDecodeState:
        with mx.stream(self.device):
            return MLXDecodeState.load(self, Path(path))


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[dict[int, mx.array]]:
    """While open: 0 -> the input of the first of `layers`, i + 1 -> the output of the i-th, of whatever runs.

    Python finds `__call__` on the class, so that is where it is wrapped, and put back on leaving.
    """
    states: dict[int, mx.array] = {}
    index = {id(layer): i for i, layer in enumerate(layers)}

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def recording(layer: nn.Module, *arguments: Any, **options: Any) -> Any:
            output = call(layer, *arguments, **options)
            i = index.get(id(layer))
            if i is not None:
                if i == 0:
                    states[0] = next(value for value in (*arguments, *options.values()) if isinstance(value, mx.array))
                states[i + 1] = output[0] if isinstance(output, tuple) else output
            return output

        return recording

    classes: set[Any] = {type(layer) for layer in layers}
    own = {cls: vars(cls).get("__call__") for cls in classes}
    replacements = {cls: wrapped(cls.__call__) for cls in classes}
    try:
        for cls, call in replacements.items():
            cls.__call__ = call
        yield states
    finally:
        for cls, call in own.items():
            if call is None:
                del cls.__call__
            else:
                cls.__call__ = call


def load_model(
    architecture: Architecture | None,
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: str | None = None,
    device: str | None = None,
    numerics: str = "exact",
    trust_remote_code: bool = False,
) -> MLXModel:
    """Build the model and fill it: ours from `modeling_mlx.py`, any other (`architecture` None) by stock mlx-lm.

    `device` is `cpu` or `gpu` (default: MLX's own). `numerics` has one value in MLX. Raises InputError.
    """
    where = chosen_device(device)
    quantized = checkpoint.quantization is not None
    compute = dtype or default_dtype(checkpoint, quantized=quantized, on_cpu=where == mx.cpu)
    with mx.stream(where):
        if architecture is None:
            module, limits = _load_stock(checkpoint, compute, trust_remote_code)
            config = getattr(module, "args", limits)
            name = str(limits.get("model_type"))
        else:
            module = _load_own(architecture, checkpoint, config, compute)
            limits = {key: getattr(config, key) for key in ("vocab_size", "max_position_embeddings")}
            name = architecture.model_type
        if where == mx.cpu and compute != "float32" and has_float_experts(module):
            if dtype is not None:
                raise InputError(
                    f"expected dtype float32, in which alone MLX multiplies unpacked experts on a CPU; found {dtype}"
                )
            compute = "float32"
            module.apply(lambda value: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value)
        module.eval()
        mx.eval(module.parameters())
    return MLXModel(module, config, architecture=name, dtype=compute, device=where, limits=limits)


def has_float_experts(module: nn.Module) -> bool:
    """Whether some stack of experts is not packed."""
    from mlx_lm.models.switch_layers import SwitchLinear

    return any(isinstance(part, SwitchLinear) for part in module.modules())


def chosen_device(name: str | None) -> mx.Device:
    """The MLX device of that name. Raises InputError when this machine has none."""
    if name is None:
        return mx.default_device()
    if name not in ("cpu", "gpu"):
        raise InputError(f"expected device cpu or gpu for mlx; found {name!r}")
    device = mx.Device(mx.gpu if name == "gpu" else mx.cpu)
    if not mx.is_available(device):
        raise InputError("expected a GPU that MLX can use; found none on this machine; use device cpu")
    return device


def default_dtype(checkpoint: Checkpoint, *, quantized: bool, on_cpu: bool) -> str:
    """The dtype to compute in: the one most weights are stored in, except where MLX computes wrongly in it."""
    if quantized and on_cpu:
        # Its quantized products sum in the activations' dtype there: 3 to 8 % off in bfloat16, 6e-7 in float32.
        logger.info("computing in float32: MLX's quantized matrix products on a CPU lose precision in 16 bits")
        return "float32"
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.size
    return max(sizes, key=lambda name: sizes[name])


def _load_own(architecture: Architecture, checkpoint: Checkpoint, config: Any, dtype: str) -> nn.Module:
    """The architecture's own MLX model with the checkpoint's weights; packed weights stay packed."""
    from isomorph.port import mapped

    modeling = architecture.module("modeling_mlx")
    module = modeling.Model(modeling.ModelArgs.from_dict(asdict(config)))
    # The MLX layout that says of the weights what this checkpoint does: a folded head keeps the rounding it was stored
    # with, a bare one is folded by `sanitize`, in the dtype that computes.
    layout = next(
        name
        for name, entry in architecture.layouts.items()
        if entry.container == "mlx" and all(getattr(config, key) == value for key, value in entry.config.items())
    )
    target = getattr(mx, dtype)
    weights = {}
    for tensor in mapped(checkpoint, architecture, layout, config=config, dequantize=False):
        value = mx.array(tensor.read())
        weights[tensor.name] = value.astype(target) if mx.issubdtype(value.dtype, mx.floating) else value
        mx.eval(weights[tensor.name])
    if checkpoint.quantization is not None:
        quantize_modules(module, weights, checkpoint.quantization)
        widen_embeddings(module, target)
    try:
        module.load_weights(list(module.sanitize(weights).items()), strict=True)
    except ValueError as error:
        raise InputError(
            f"expected weights that fit {architecture.model_type} in MLX; found: {one_line(error)}"
        ) from None
    return module


class WideQuantizedEmbedding(nn.QuantizedEmbedding):
    """An embedding in a mode whose scales have no float dtype: MLX looks its rows up in bfloat16, always."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(self._dtype)  # bfloat16 holds each value exactly


def widen_embeddings(module: nn.Module, dtype: mx.Dtype) -> None:
    """Let quantized embeddings return `dtype`, in which the rest of the model then computes."""
    for layer in module.modules():
        if type(layer) is nn.QuantizedEmbedding and layer.mode != "affine":
            layer.__class__ = WideQuantizedEmbedding
            layer._dtype = dtype


def quantize_modules(module: nn.Module, weights: Mapping[str, mx.array], quantization: Mapping[str, Any]) -> None:
    """Put quantized modules where `weights` holds packed ones; bits and group size are read off the shapes.

    `quantization` is config.json's entry; only `mode` matters here: of the module's own entry, else the common one.
    Raises InputError for packed arrays that do not fit the module.
    """

    def settings(path: str, layer: nn.Module) -> dict[str, Any] | bool:
        scales = weights.get(f"{path}.scales")
        if scales is None or not hasattr(layer, "to_quantized"):
            return False
        packed = weights[f"{path}.weight"]
        *rows, columns = layer.weight.shape
        bits, left_bits = divmod(packed.shape[-1] * 32, columns)
        group_size, left_columns = divmod(columns, scales.shape[-1])
        if left_bits or left_columns or list(packed.shape[:-1]) != rows or list(scales.shape[:-1]) != rows:
            raise InputError(
                f"expected packed weights and scales of a {[*rows, columns]} matrix at {path!r}; "
                f"found shapes {list(packed.shape)} and {list(scales.shape)}; correct config.json or the weights"
            )
        own = quantization.get(path)
        # As mlx-lm reads it: a module's own entry that names no mode means affine, whatever the common one is.
        mode = (own if isinstance(own, dict) else quantization).get("mode") or "affine"
        return {"bits": bits, "group_size": group_size, "mode": mode}

    try:
        nn.quantize(module, class_predicate=settings)
    except ValueError as error:
        raise InputError(f"expected a quantization that MLX has; found: {one_line(error)}") from None


def _load_stock(checkpoint: Checkpoint, dtype: str, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The folder as stock mlx-lm loads it, computing in `dtype`, and its config with the text model's keys on top."""
    from mlx_lm.utils import load_model as load_with_mlx_lm

    from isomorph.checkpoint.mlx_quantized import quantized_modules

    if checkpoint.kind != "safetensors":
        raise InputError(f"expected safetensors for mlx-lm; found {checkpoint.path}; convert it first")
    if checkpoint.packing is not None:
        # mlx-lm rounds AWQ's biases to 16 bits, takes GPTQ for AWQ, and others for what they are not.
        raise InputError(
            f"expected weights as MLX stores them; found {checkpoint.packing} in {checkpoint.path}; "
            "run isomorph quantize --recipe lossless first, or use framework torch"
        )
    if checkpoint.quantization is not None and not any(name.endswith(".global_scale") for name in checkpoint.tensors):
        # Over some faults mlx ends the process, others it reads as something else.
        quantized_modules(checkpoint.tensors, checkpoint.quantization)
    try:
        module, config = load_with_mlx_lm(
            checkpoint.folder, lazy=True, model_config=dict(checkpoint.overrides), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # over folders that do not fit mlx-lm raises nearly everything there is
        raise InputError(f"expected a folder that mlx-lm loads; found {checkpoint.path}: {one_line(error)}") from None
    # Some architectures keep a few parameters in float32 on purpose, and say so.
    castable = getattr(module, "cast_predicate", lambda path: True)
    target = getattr(mx, dtype)

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(target) if mx.issubdtype(value.dtype, mx.floating) and castable(path) else value

    module.update(tree_map_with_path(cast, module.parameters()))
    limits = {**config, **(config.get("text_config") or {}), "model_type": config.get("model_type")}
    if "vocab_size" not in limits:
        raise InputError(f"expected vocab_size in the config.json of {checkpoint.path}; found none; pass config=")
    return module, limits


def one_line(error: BaseException) -> str:
    """The error's text without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
