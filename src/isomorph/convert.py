"""`isomorph.convert`: a model folder in the layout another framework wants, tensor by tensor."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from isomorph import __version__, architectures, port
from isomorph.architectures.base import Architecture
from isomorph.checkpoint.container import MAX_SHARD_BYTES
from isomorph.checkpoint.forms import FORMS, READERS
from isomorph.checkpoint.mlx_quantized import CONFIG_KEYS as QUANTIZATION_KEYS
from isomorph.checkpoint.mlx_quantized import unquantized
from isomorph.checkpoint.source import INDEX, Checkpoint, open_checkpoint
from isomorph.checkpoint.target import check_target
from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.checkpoint.writer import Content, file_identity, json_bytes, write_folder
from isomorph.errors import InputError, did_you_mean
from isomorph.port.stock import shared_layout
from isomorph.stage import callable_module
from isomorph.tokenizer import copy_tokenizer

CAST_DTYPES = ("bfloat16", "float16", "float32")

#: config.json keys that generation_config.json repeats.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

#: config.json keys that speak of a layout, which the new one states anew.
LAYOUT_KEYS = ("auto_map", "model_file", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote, or would write: `parameters` counts weights, `payload_bytes` what they take on disk."""

    source: Path
    path: Path
    architecture: str
    source_layout: str
    layout: str
    dtype: str
    tensors: int
    parameters: int
    payload_bytes: int
    bits_per_weight: float
    files: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything to write, nothing read yet; `files` stand beside the weights and config.json."""

    source_layout: str
    layout: str
    tensors: list[Tensor]
    container: str
    parameters: int
    config: dict[str, Any]
    parsed: Any = None
    files: Mapping[str, Content] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    dequantize: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Write the model at `source` (folder, original file or Hub id) as a folder `target` for `to`.

    `to` is `mlx` (the default), `transformers`, `flax` or `original`; `layout` names one of the architecture's layouts
    instead (`isomorph list layouts`). `dtype` casts floating tensors, rounding to nearest even; without it every
    tensor keeps its bits, and converting back gives the same bits. `dequantize` turns MLX-quantized weights into
    floats. One tensor at most is in memory. An interrupted call, repeated, goes on where it stopped (Orbax
    begins anew); the target appears only when it is complete. `dry_run` reads headers only and writes nothing. Raises
    InputError.
    """
    if to is not None and to not in READERS:
        raise InputError(f"expected to= {', '.join(READERS)}; found {to!r}{did_you_mean(to, READERS)}")
    check_dtype(dtype)
    checkpoint = open_checkpoint(source, config=config)
    destination = check_target(target, force or dry_run, [checkpoint.path])
    architecture = architectures.find(checkpoint)
    if checkpoint.quantization is not None and not dequantize and dtype is not None:
        raise InputError("expected no dtype for a quantized model, whose codes have none; leave it out or dequantize")
    if architecture is None:
        plan = stock_plan(checkpoint, to or "mlx", layout, dtype, dequantize)
    else:
        plan = own_plan(checkpoint, architecture, to, layout, dtype, dequantize)
    stored = FORMS[plan.container].store(plan.tensors, plan.config, max_shard_bytes)
    beside = {**plan.files, **stored.files, "config.json": json_bytes({**plan.config, **stored.config})}
    payload = sum(tensor.nbytes for tensor in plan.tensors)
    result = partial(
        Conversion,
        source=checkpoint.path,
        path=destination,
        architecture=architecture.model_type if architecture else str(checkpoint.config["model_type"]),  # type: ignore[index]
        source_layout=plan.source_layout,
        layout=plan.layout,
        dtype=plan.config["dtype"],
        tensors=len(plan.tensors),
        parameters=plan.parameters,
        payload_bytes=payload,
        bits_per_weight=8 * payload / max(1, plan.parameters),
        dropped=dict(plan.dropped),
    )
    if dry_run:
        index = [INDEX] if len(stored.weights) > 1 else []
        return result(files=[*(file.name for file in stored.weights), *beside, *index], dry_run=True)
    checkpoint.require_weights()
    files = {**beside, **tokenizer_files(checkpoint, architecture, plan)}
    inputs = {
        "isomorph": __version__,
        "sources": file_identity(checkpoint.files),
        "config": plan.config,
        "layouts": [plan.source_layout, plan.layout],
    }
    write_folder(destination, stored.weights, files, inputs=inputs, description=f"writing {destination.name}")
    return result(files=sorted(entry.name for entry in destination.iterdir()))


def check_dtype(dtype: str | None) -> None:
    """Raises InputError unless weights can be cast to `dtype`; None leaves them as they are."""
    if dtype is not None and dtype not in CAST_DTYPES:
        raise InputError(f"expected dtype {', '.join(CAST_DTYPES)}; found {dtype!r}{did_you_mean(dtype, CAST_DTYPES)}")


def own_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    to: str | None,
    layout_name: str | None,
    dtype: str | None,
    dequantize: bool,
) -> Plan:
    """The plan for an architecture of our own, through its weight tables."""
    target = _target_layout(architecture, checkpoint, to, layout_name, dequantize)
    parsed = architectures.configuration(architecture, checkpoint, target.name)
    if not checkpoint.tensors:
        checkpoint = port.declared(checkpoint, architecture, parsed)
    reading = port.read(checkpoint, architecture, config=parsed, dtype=dtype, dequantize=dequantize)
    tensors = list(reading.into(target, dtype))
    files: dict[str, Content] = {name: _beside(architecture, name) for name in target.files}
    if checkpoint.kind != "config":
        files |= reading.sidecars(target, dtype)
    kept = {key: value for key, value in (checkpoint.config or {}).items() if key not in LAYOUT_KEYS}
    kept = {key: value for key, value in kept.items() if key not in QUANTIZATION_KEYS}
    quantization = _quantization(checkpoint, reading, target)
    config = kept | dict(parsed.to_dict()) | quantization | dict(target.keys) | _dtype_keys(tensors)
    if target.generation:
        ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
        files["generation_config.json"] = json_bytes({**target.generation, **ids})
    parameters = sum(math.prod(shape) for shape in port.shapes_in(target, reading.shapes).values())
    return Plan(
        reading.layout.name, target.name, tensors, target.container, parameters, config, parsed, files, reading.dropped
    )


def _quantization(checkpoint: Checkpoint, reading: port.Reading, target: port.Layout) -> dict[str, Any]:
    """config.json's entries about packed weights, under the module names of `target`."""
    if target.packed != "mlx" or not reading.packed:
        return {}
    entry = checkpoint.quantization if target.name == reading.layout.name else reading.quantization(target)
    return dict.fromkeys(QUANTIZATION_KEYS, entry)


def _target_layout(
    architecture: Architecture, checkpoint: Checkpoint, to: str | None, name: str | None, dequantize: bool
) -> port.Layout:
    if name is not None:
        layout = port.layout_of(architecture, name)
        if to is not None and FORMS[layout.container].reader != to:
            fitting = [other.name for other in architecture.layouts.values() if FORMS[other.container].reader == to]
            raise InputError(f"expected a layout for {to}: {' or '.join(fitting)}; found {name!r}; change one of them")
        return layout
    own = architecture.layouts[architecture.detect(checkpoint)]
    default = architecture.layouts[architecture.defaults[to or "mlx"]]
    if checkpoint.quantization is None or dequantize:
        return default
    if FORMS[own.container].reader == (to or "mlx"):
        return own
    # Packed weights go where they can stay packed.
    stored_alike = (entry for entry in architecture.layouts.values() if entry.container == default.container)
    return next((entry for entry in stored_alike if entry.packed is not None), default)


def stock_plan(checkpoint: Checkpoint, to: str, layout: str | None, dtype: str | None, dequantize: bool) -> Plan:
    """The plan for an architecture that stock libraries have: a copy, where source and target share their names."""
    if layout is not None or to not in ("mlx", "transformers"):
        what = f"layout {layout!r}" if layout is not None else f"to={to!r}"
        raise InputError(
            f"expected an architecture of {', '.join(architectures.registered())} for {what}; "
            f"found {(checkpoint.config or {}).get('model_type')!r}, of which isomorph only makes copies"
        )
    if not checkpoint.tensors:  # not even those that a config promises
        checkpoint.require_weights()
    if dequantize:
        checkpoint = unquantized(checkpoint, dtype)
    container = shared_layout(checkpoint, to)
    tensors = [_cast(tensor, dtype) for tensor in checkpoint.tensors.values()]
    kept = {key: value for key, value in (checkpoint.config or {}).items() if key not in ("dtype", "torch_dtype")}
    config = kept | _dtype_keys(tensors)
    if checkpoint.packing is not None and checkpoint.quantization is not None:
        config |= dict.fromkeys(QUANTIZATION_KEYS, checkpoint.quantization)
    code: dict[str, Content] = {path.name: path for path in sorted(checkpoint.folder.glob("*.py"))}
    name = {"pt": "transformers", "mlx": "mlx-lm"}[container]
    return Plan(name, name, tensors, container, sum(t.size for t in tensors), config, None, code)


def _cast(tensor: Tensor, dtype: str | None) -> Tensor:
    return tensor.cast(dtype) if dtype is not None and tensor.dtype in FLOATING else tensor


def _dtype_keys(tensors: Iterable[Tensor]) -> dict[str, str]:
    """`dtype` and `torch_dtype` (older readers know only that): of the most bytes stored as floats."""
    stored: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATING:
            stored[tensor.dtype] += tensor.nbytes
    name = max(stored, key=lambda dtype: stored[dtype], default="float32")
    return {"dtype": name, "torch_dtype": name}


def _beside(architecture: Architecture, name: str) -> Path:
    return Path(str(architectures.__file__)).parent / architecture.folder / name


def tokenizer_files(checkpoint: Checkpoint, architecture: Architecture | None, plan: Plan) -> dict[str, Content]:
    """The source's tokenizer in the form the target takes."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        original = FORMS[plan.container].reader == "original"
        names = copy_tokenizer(checkpoint.path, place, architecture, plan.parsed, original=original)
        return {name: (place / name).read_bytes() for name in names}


callable_module(__name__)
