"""One side of a comparison: a source that can be loaded in any dtype, or a model somebody has loaded already."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isomorph.checkpoint import Checkpoint, open_checkpoint
from isomorph.errors import InputError
from isomorph.frameworks.model import Model
from isomorph.verify.tolerance import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from isomorph.architectures.base import Architecture

#: Frameworks with complete float64 arithmetic.
FLOAT64_FRAMEWORKS = ("torch",)
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Side:
    """Where a model comes from. `model` is set when the caller passed a loaded one, which is then compared as it is."""

    checkpoint: Checkpoint | None
    framework: str
    trust_remote_code: bool = False
    model: Model | None = None

    @classmethod
    def of(cls, given: Any, framework: str | None, trust_remote_code: bool) -> Side:
        """From a `Model`, a folder, an original file or a Hub id; `framework` None means what the files are for."""
        if isinstance(given, Model):
            checkpoint = open_checkpoint(given.source) if given.source else None
            return cls(checkpoint, given.framework, trust_remote_code, given)
        checkpoint = open_checkpoint(given)
        return cls(checkpoint, framework or _native_framework(checkpoint), trust_remote_code)

    @property
    def quantization(self) -> dict[str, Any] | None:
        return self.checkpoint.quantization if self.checkpoint else None

    @property
    def stored_dtype(self) -> str | None:
        """The dtype most of the weights are stored in; that of scales when they are quantized."""
        sizes: dict[str, int] = {}
        for tensor in self.checkpoint.tensors.values() if self.checkpoint else ():
            if tensor.dtype in UNIT_ROUNDOFF:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        return max(sizes, key=lambda name: sizes[name], default=None)

    def available(self, dtype: str) -> str | None:
        """None when the side can be run in `dtype`, else the reason why not."""
        if self.model is not None and self.model.dtype == dtype:
            return None
        if self.checkpoint is None:
            return "the model was built in memory and cannot be loaded in another dtype"
        if dtype == "float64" and self.framework not in FLOAT64_FRAMEWORKS:
            return f"{self.framework} has no complete float64 arithmetic"
        import psutil

        needed = int(1.2 * parameters(self.checkpoint) * _BYTES[dtype])
        free = psutil.virtual_memory().available
        if needed > free:
            return f"{dtype} weights need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
        return None

    def load(self, dtype: str | None) -> Model:
        """The model computing in `dtype` (None: as stored, or as it was passed)."""
        if self.model is not None and dtype in (None, self.model.dtype):
            return self.model
        if self.checkpoint is None:
            raise InputError(f"expected a model computing in {dtype}; found one in {self.framework} without files")
        from isomorph.load import load

        # A model that was loaded with other settings than its config.json's keeps them in another dtype.
        own = getattr(self.model.config, "to_dict", None) if self.model is not None else None
        return load(
            self.checkpoint.path,
            framework=self.framework,
            dtype=dtype,
            config=own() if own and _architecture(self.checkpoint) is not None else None,
            trust_remote_code=self.trust_remote_code,
        )

    def describe(self, computed: list[str]) -> dict[str, Any]:
        """Source, framework, layout, hashes, and the dtypes declared in config.json, stored in files and `computed`."""
        document: dict[str, Any] = {"source": None, "framework": self.framework, "computed_dtypes": computed}
        if self.checkpoint is None:
            return document
        config = self.checkpoint.config or {}
        architecture = _architecture(self.checkpoint)
        return document | {
            "source": str(self.checkpoint.path),
            "architecture": architecture.model_type if architecture else config.get("model_type"),
            "layout": architecture.detect(self.checkpoint) if architecture else None,
            "declared_dtype": config.get("dtype", config.get("torch_dtype")),
            "stored_dtype": self.stored_dtype,
            "quantization": _defaults(self.quantization),
            "tensors": len(self.checkpoint.tensors),
            "parameters": parameters(self.checkpoint),
            "config_sha256": _digest(config),
            "weights_header_sha256": _digest(
                [(t.name, t.dtype, list(t.shape)) for t in self.checkpoint.tensors.values()]
            ),
        }


def _native_framework(checkpoint: Checkpoint) -> str:
    architecture = _architecture(checkpoint)
    if architecture is not None:
        layout = architecture.detect(checkpoint)
        return next((name for name in ("mlx", "flax") if layout.startswith(name)), "torch")
    mlx = checkpoint.metadata.get("format") == "mlx" or checkpoint.quantization is not None
    return "mlx" if mlx else "torch"


def _architecture(checkpoint: Checkpoint) -> Architecture | None:
    from isomorph import architectures

    return architectures.find(checkpoint)


def parameters(checkpoint: Checkpoint) -> int:
    """Number of weights; packed codes count as the weights they hold, scales and biases not at all."""
    quantization = checkpoint.quantization or {}
    total = 0
    for name, tensor in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases") and f"{module}.weight" in checkpoint.tensors:
            continue
        own = quantization.get(module)
        bits = (own if isinstance(own, dict) else quantization).get("bits", 32)
        total += tensor.size * 32 // bits if tensor.dtype == "uint32" else tensor.size
    return total


def _defaults(quantization: dict[str, Any] | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    return {key: value for key, value in quantization.items() if not isinstance(value, (dict, bool))}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
