"""PyTorch: Talkie and its like from their own model file, everything else through stock Transformers."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn

from isomorph.architectures.base import Architecture
from isomorph.checkpoint import Checkpoint, Tensor
from isomorph.checkpoint.mlx_quantized import is_quantized, quantized_modules
from isomorph.checkpoint.tensor import FLOATING
from isomorph.errors import InputError, did_you_mean
from isomorph.frameworks.model import Model
from isomorph.frameworks.torch_cache import keeps_keys_and_values, windows_of
from isomorph.frameworks.torch_quantized import fill, quantized_model
from isomorph.frameworks.torch_state import TorchDecodeState
from isomorph.frameworks.torch_step import Steps
from isomorph.kernels.modules import speed_up
from isomorph.port import Layout, Reading, read

logger = logging.getLogger(__name__)

FRAMEWORK = "torch"


def load_model(
    architecture: Architecture | None,
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: str | None = None,
    device: str | None = None,
    numerics: str = "exact",
    trust_remote_code: bool = False,
) -> TorchModel:
    """Build the checkpoint's model in `dtype` (default: as stored) on `device` (default: the CPU).

    `architecture` is None for those that are not ours: they load through Transformers, whose code a repository may
    ship only with `trust_remote_code`. Raises InputError.
    """
    device_here = torch_device(device)
    module: Any
    if architecture is None:
        if checkpoint.quantization is not None or checkpoint.packing or is_quantized(checkpoint.tensors):
            module, config = quantized_model(checkpoint, dtype, fast=numerics == "fast")
        else:
            module, config = stock_model(checkpoint, dtype, trust_remote_code)
        name = str(config.model_type)
    else:
        module = own_model(architecture, checkpoint, config, dtype, fast=numerics == "fast")
        name = architecture.model_type
    if module.dtype == torch.float64 and hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # torch's grouped products have no float64
    return TorchModel(speed_up(module.to(device_here).eval().requires_grad_(False)), name, config)


def torch_device(name: str | None) -> torch.device:
    """`name` as a device that works here, or InputError."""
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"expected a device that torch has here; found {name!r} ({reason}); use cpu") from None
    return device


def own_model(
    architecture: Architecture, checkpoint: Checkpoint, config: Any, dtype: str | None, fast: bool = False
) -> nn.Module:
    """The architecture's own model, filled tensor by tensor and not initialised before; packed weights stay packed."""
    file = architecture.module("modeling_torch")
    config_name = architecture.config_class.__name__
    reading = read(checkpoint, architecture, config=config, dequantize=checkpoint.quantization is None)
    layout = native_layout(architecture, reading, config)
    tensors = {tensor.name: tensor for tensor in reading.into(layout)}
    quantization = reading.quantization(layout)
    packed = {} if quantization is None else quantized_modules(tensors, quantization)
    target = getattr(torch, dtype or main_dtype(list(tensors.values())))
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    model_class = getattr(file, config_name.removesuffix("Config") + "ForCausalLM")
    # Buffers, such as rotary frequencies, are computed and small.
    with init_empty_weights(include_buffers=False):
        module = model_class(getattr(file, config_name)(**values, dtype=target))
    for parameter in module.parameters():
        parameter.data = parameter.to(target)
    fill(module, tensors, packed, target, fast)
    return module


def native_layout(architecture: Architecture, reading: Reading, config: Any) -> Layout:
    """The layout that the model's file is filled from: one that leaves packed weights as they lie, if there are any."""
    fitting = [
        layout
        for layout in architecture.layouts.values()
        # A folded head stays folded: unfolding it would undo the rounding that the stored weights have.
        if all(getattr(config, key) == value for key, value in layout.config.items())
    ]
    if reading.packed:
        return next(layout for layout in fitting if layout.packed == "mlx" and reading.keeps(layout))
    return next(layout for layout in fitting if layout.name.startswith(architecture.native[FRAMEWORK]))


def main_dtype(tensors: list[Tensor]) -> str:
    """The floating dtype that most of the stored bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATING:
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def stock_model(checkpoint: Checkpoint, dtype: str | None, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    """Whatever Transformers makes of the folder, and its config."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.utils import logging as transformers_logging

    if checkpoint.kind == "torch":
        raise InputError(
            f"expected an original checkpoint of an architecture of isomorph's own; found {checkpoint.path}; "
            "use a Transformers folder"
        )
    checkpoint.require_weights()
    values = checkpoint.config or {}
    model_type = values.get("model_type")
    remote = "AutoModelForCausalLM" in (values.get("auto_map") or {})
    if model_type not in CONFIG_MAPPING_NAMES and not (remote and trust_remote_code):
        advice = "pass trust_remote_code to run the code it ships" if remote else "convert it to one of them"
        raise InputError(
            f"expected a model_type that isomorph or Transformers knows; found {model_type!r}"
            f"{did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)}; {advice}"
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of misfits is a table; ours is one line
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, **checkpoint.overrides
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # over folders that do not fit Transformers raises nearly everything there is
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"expected a {model_type} model that Transformers loads from {checkpoint.path}; found: {reason[0]}; "
            "correct the folder"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    module, report = loaded
    unknown = sorted(report["unexpected_keys"])
    wrong = [f"no {name!r}{did_you_mean(name, unknown)}" for name in sorted(report["missing_keys"])]
    wrong += [f"{name!r} of another shape" for name in sorted(str(key[0]) for key in report["mismatched_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(
            f"expected every parameter of {type(module).__name__} in {checkpoint.path}; found {wrong[0]}{more}; "
            "correct the weights or config.json"
        )
    if unknown:
        logger.warning("%s has no place for %d tensors, %s first", type(module).__name__, len(unknown), unknown[0])
    return module, config


class TorchModel(Model):
    """A Transformers causal language model behind the common contract; `module` is the torch model itself."""

    framework = FRAMEWORK

    def __init__(self, module: Any, architecture: str, config: Any) -> None:
        text = module.config.get_text_config()
        self.module = module
        self.architecture = architecture
        self.config = config
        self.dtype = str(module.dtype).removeprefix("torch.")
        self.device = module.device
        self.vocab_size = int(text.vocab_size)
        self.num_layers = int(text.num_hidden_layers)
        self.windows = windows_of(text)
        self.cache_layers = self.num_layers + getattr(module, "extra_cache_layers", 0)
        self.max_positions = int(getattr(text, "max_position_embeddings", None) or np.iinfo(np.int32).max)
        self._accepted = frozenset(inspect.signature(module.forward).parameters)
        self.steps = Steps(self)

    @torch.inference_mode()
    def forward(
        self, ids: np.ndarray, mask: torch.Tensor | None, cache: Any = None, last_only: bool = False
    ) -> np.ndarray:
        """Logits, float32 [B, T, V] or [B, 1, V], of `ids` int64 [B, T]; `mask` bool [B, S] over cached and new ids."""
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        if mask is not None:
            options["attention_mask"] = mask.long()
            if "position_ids" in self._accepted:
                # Most of Transformers' models count padding when nobody tells them.
                options["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if last_only and "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 1
        logits = self.module(torch.from_numpy(ids).to(self.device), **options).logits
        return as_numpy(logits[:, -1:] if last_only else logits)

    def _logits(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        mask = None if attention_mask is None else torch.from_numpy(attention_mask).to(self.device)
        return self.forward(ids, mask)

    @torch.inference_mode()
    def _hidden_states(self, ids: np.ndarray) -> list[np.ndarray]:
        taken: list[torch.Tensor] = []

        def before(_: nn.Module, arguments: tuple, options: dict) -> None:
            taken.append(arguments[0] if arguments else options["hidden_states"])

        def after(_: nn.Module, arguments: tuple, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)

        blocks = decoder_blocks(self.module, self.num_layers)
        hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(after) for block in blocks]
        try:
            self.module.base_model(torch.from_numpy(ids).to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [as_numpy(state) for state in taken]

    @torch.inference_mode()
    def _router_logits(self, ids: np.ndarray) -> list[np.ndarray]:
        tokens = torch.from_numpy(ids).to(self.device)
        output = self.module.base_model(tokens, use_cache=False, output_router_logits=True)
        return [as_numpy(logits).reshape(*ids.shape, -1) for logits in getattr(output, "router_logits", None) or ()]

    def _decode_state(
        self, batch_size: int, left_padding: np.ndarray | None, max_length: int | None
    ) -> TorchDecodeState:
        if not keeps_keys_and_values(self.module.config.get_text_config()):
            raise InputError(
                f"expected a model whose layers remember keys and values; found {self.architecture}, "
                "some of whose keep another state; use framework mlx to generate"
            )
        padding = np.zeros(batch_size, np.int64) if left_padding is None else left_padding
        return TorchDecodeState(self, padding, max_length)

    def load_decode_state(self, path: Path) -> TorchDecodeState:
        return TorchDecodeState.load(self, path)


def as_numpy(values: torch.Tensor) -> np.ndarray:
    """float32 on the CPU; float64 stays, or a run in float64 could not tell rounding noise of float32."""
    return (values if values.dtype == torch.float64 else values.float()).cpu().numpy()


def decoder_blocks(module: nn.Module, layers: int) -> nn.ModuleList:
    """The list of the decoder's blocks, whatever the architecture calls it."""
    for candidate in module.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) == layers:
            return candidate
    raise InputError(
        f"expected a list of {layers} blocks in {type(module).__name__}; found none, so no hidden states can be told"
    )
