"""`isomorph.inspect`: what a checkpoint is, where it loads and whether it runs here, from its headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isomorph import architectures, port
from isomorph.checkpoint.mlx_quantized import quantized_modules
from isomorph.checkpoint.source import Checkpoint, open_checkpoint
from isomorph.checkpoint.target import size
from isomorph.checkpoint.tensor import FLOATING, NUMPY_DTYPES, Tensor, from_array
from isomorph.errors import InputError
from isomorph.frameworks import FRAMEWORKS
from isomorph.port import stock
from isomorph.quantize.packed import Packed
from isomorph.quantize.settings import Settings
from isomorph.stage import callable_module

#: Rows of a matrix that show what grid it lies on, and how much is read of columns: each weight is a page of the file.
SAMPLED_ROWS, SAMPLED_DEPTH = 8, 256


@dataclass(frozen=True)
class Quantization:
    """How MLX-quantized weights are stored: modules by their settings, e.g. `4-bit group 64 affine` -> 7."""

    modules: dict[str, int]
    unquantized: list[str]


@dataclass(frozen=True)
class Memory:
    """What a context of `tokens` takes: weights and KV cache, in bytes, against what this machine has free."""

    tokens: int
    weights_bytes: int
    kv_cache_bytes: int
    available_bytes: int
    fits: bool
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `loads` maps each library to how a folder loads there, or why it does not.

    `grids` names what matrices lie on that are stored as something wider, going by the first rows of each; `*` stands
    for the blocks.
    """

    path: Path
    architecture: str
    layout: str
    description: str
    kind: str
    loads: dict[str, str]
    declared_dtype: str | None
    stored_dtypes: dict[str, int]
    tensors: int
    parameters: int
    payload_bytes: int
    bits_per_weight: float
    max_positions: int | None
    memory: Memory | None
    quantization: Quantization | None = None
    grids: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def inspect(
    source: str | Path, context: int | None = None, *, config: Mapping[str, Any] | str | Path | None = None
) -> Inspection:
    """Inspect a folder (config.json alone suffices), an original file or a Hub id, by headers and a few rows.

    `context` is the number of tokens the memory estimate is for (default: the longest the config allows). Raises
    InputError for what `load` would refuse: damaged files, tensors that do not fit the config.
    """
    if context is not None and context < 1:
        raise InputError(f"expected a context of at least 1 token; found {context}")
    checkpoint = open_checkpoint(source, config=config)
    architecture = architectures.find(checkpoint)
    promised = not checkpoint.tensors
    if architecture is not None:
        parsed = architectures.configuration(architecture, checkpoint)
        if promised:
            checkpoint = port.declared(checkpoint, architecture, parsed)
        reading = port.read(checkpoint, architecture, config=parsed, dequantize=False)
        layout, dropped = reading.layout, reading.dropped
        parameters = sum(math.prod(shape) for shape in port.shapes_in(layout, reading.shapes).values())
        values, name, description = parsed.to_dict(), layout.name, layout.description
        loads = _loads(checkpoint, layout)
    else:
        if promised:
            checkpoint = stock.declared(checkpoint)
        values, dropped, parameters = dict(checkpoint.config or {}), {}, _unpacked_parameters(checkpoint)
        name = {"pt": "transformers", "mlx": "mlx-lm"}.get(checkpoint.metadata.get("format", "pt"), checkpoint.kind)
        description = "as its library names it"
        if checkpoint.packing is not None:
            description += f"; {checkpoint.packing} weights, seen and counted as what MLX stores"
        loads = _stock_loads(checkpoint, str(values.get("model_type")))
    payload = sum(tensor.nbytes for tensor in checkpoint.tensors.values() if tensor.name not in dropped)
    stored: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        stored[tensor.dtype] += tensor.nbytes
    longest = values.get("max_position_embeddings")
    return Inspection(
        path=checkpoint.path,
        architecture=str(values.get("model_type")),
        layout=name,
        description=description,
        kind="config" if promised else checkpoint.kind,
        loads=loads,
        declared_dtype=port.declared_dtype(checkpoint.config or {}),
        stored_dtypes=dict(stored.most_common()),
        tensors=len(checkpoint.tensors),
        parameters=parameters,
        payload_bytes=payload,
        bits_per_weight=8 * payload / max(1, parameters),
        max_positions=longest,
        memory=_memory(values, payload, _float_dtype(stored), context, longest),
        quantization=_quantization(checkpoint),
        # What another tool packed is on its own grid, and computed a whole matrix at a time.
        grids=_grids(checkpoint) if checkpoint.kind == "safetensors" and checkpoint.packing is None else {},
        dropped=dict(dropped),
        config=values,
    )


def summary(found: Inspection) -> dict[str, str]:
    """The findings as lines for people."""
    rows = {
        "model": f"{found.architecture}: {found.path}",
        "layout": f"{found.layout} ({found.description})",
        **{f"loads in {library}": how for library, how in found.loads.items()},
        "dtype": f"declared {found.declared_dtype or 'nowhere'}; stored "
        + ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in found.stored_dtypes.items()),
        "weights": f"{found.tensors} tensors, {found.parameters:,} parameters, {size(found.payload_bytes)}, "
        f"{found.bits_per_weight:.2f} bits per weight"
        + (" (from config.json alone)" if found.kind == "config" else ""),
    }
    if found.quantization is not None:
        rows["quantized"] = ", ".join(f"{count} modules {how}" for how, count in found.quantization.modules.items())
        if found.quantization.unquantized:
            rows["not quantized"] = ", ".join(dict.fromkeys(map(_without_block, found.quantization.unquantized)))
    if found.grids:
        alike = {grid: [name for name, own in found.grids.items() if own == grid] for grid in found.grids.values()}
        rows["lies on a grid"] = "; ".join(f"{grid}: {', '.join(sorted(names))}" for grid, names in alike.items())
    for name, reason in found.dropped.items():
        rows[f"left out {name}"] = reason
    if found.memory is not None:
        rows["runs here"] = (
            f"{'yes' if found.memory.fits else 'no'}, {found.memory.reason}: {found.memory.tokens} tokens take "
            f"{size(found.memory.weights_bytes)} of weights and {size(found.memory.kv_cache_bytes)} of KV cache; "
            f"{size(found.memory.available_bytes)} are free"
        )
    return rows


def _loads(checkpoint: Checkpoint, layout: port.Layout) -> dict[str, str]:
    """Library -> how this folder loads there, or why not."""
    loads = {"isomorph": ", ".join(FRAMEWORKS)}
    config = checkpoint.config or {}
    for library, how in layout.loads.items():
        code = "model_file" if library == "mlx-lm" else "auto_map"
        # The layout relies on code that ships with the folder: is it there?
        missing = [name for name in _code_files(config.get(code)) if not (checkpoint.folder / name).is_file()]
        if code in layout.keys and code not in config:
            how = f"no: config.json names no code for it ({code}); convert it again"
        elif code in layout.keys and missing and checkpoint.kind != "config":
            how = f"no: config.json names {missing[0]}, which is not there; convert it again"
        elif checkpoint.kind == "safetensors" and checkpoint.config is None:
            how = "no: there is no config.json; convert it again"
        loads[library] = how
    return loads


def _code_files(value: Any) -> list[str]:
    """Files that config.json's `model_file`, or `auto_map` (`module.Class`, or `owner/name--module.Class`), names."""
    if isinstance(value, str):
        return [value]
    classes = value.values() if isinstance(value, Mapping) else ()
    return sorted({f"{name.partition('.')[0]}.py" for name in classes if isinstance(name, str) and "--" not in name})


def _stock_loads(checkpoint: Checkpoint, model_type: str) -> dict[str, str]:
    config = checkpoint.config or {}
    loads = {"isomorph": "no"}
    if checkpoint.metadata.get("format") == "mlx":
        loads["transformers"] = "no: mlx-lm's own names"
    elif stock.transformers_has(model_type):
        loads["transformers"] = "natively"
    else:
        loads["transformers"] = "with trust_remote_code=True" if "auto_map" in config else f"no: no {model_type!r}"
    if stock.mlx_lm_has(model_type):
        loads["mlx-lm"] = "natively"
    else:
        loads["mlx-lm"] = "with trust_remote_code" if "model_file" in config else f"no: no {model_type!r}"
    if checkpoint.packing is not None:
        loads["transformers"] = f"with what it wants for {checkpoint.packing}"
        return loads | {"isomorph": "torch", "mlx-lm": "no: run isomorph quantize --recipe lossless first"}
    through = {"transformers": "torch", "mlx-lm": "mlx"}
    loads["isomorph"] = ", ".join(through[key] for key in through if not loads[key].startswith("no")) or "no"
    return loads


def _unpacked_parameters(checkpoint: Checkpoint) -> int:
    """Weights of a model whose architecture we have no table for; packed codes count as what they stand for."""
    tensors, total = checkpoint.tensors, 0
    modules = quantized_modules(tensors, checkpoint.quantization)
    for name, tensor in tensors.items():
        if name.removesuffix("_scales") + "_blocks" in tensors:
            continue  # gpt-oss' MXFP4: two codes a byte in X_blocks, an exponent for each 32 of them in X_scales.
        if name.removesuffix("_blocks") + "_scales" in tensors:
            total += 2 * tensor.size
            continue
        module, _, part = name.rpartition(".")
        if module in modules and part in ("scales", "biases"):
            continue
        total += math.prod(modules[module].shape) if module in modules and part == "weight" else tensor.size
    return total


def _quantization(checkpoint: Checkpoint) -> Quantization | None:
    if checkpoint.quantization is None:
        return None
    modules = quantized_modules(checkpoint.tensors, checkpoint.quantization)
    stored = Counter(f"{s.bits}-bit group {s.group_size} {s.mode}" for s in (m.settings for m in modules.values()))
    unquantized = [
        name
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) > 1 and name.rpartition(".")[0] not in modules and not name.endswith("bias")
    ]
    return Quantization(dict(stored.most_common()), unquantized)


def _grids(checkpoint: Checkpoint) -> dict[str, str]:
    """Module -> the cheaper grid that its first rows lie on, where there is one."""
    from isomorph.quantize.grid import MXFP4, grid_of_packed

    found: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        matrix = tensor.dtype in FLOATING[1:] and len(tensor.shape) > 1 and 0 not in tensor.shape
        if matrix and not name.endswith((".scales", ".biases", "bias")):
            grid = _sampled_grid(tensor)
            found |= {_without_block(name.removesuffix(".weight")): str(grid)} if grid is not None else {}
    for path, module in quantized_modules(checkpoint.tensors, checkpoint.quantization).items():
        parts = (part.read()[:1] for part in (module.weight, module.scales, module.biases) if part is not None)
        if module.settings.affine and grid_of_packed(module.settings, [Packed(*parts)]) == MXFP4:
            found[_without_block(path)] = str(MXFP4)
    return found


def _sampled_grid(tensor: Tensor) -> Settings | None:
    """The cheapest grid of a few rows, or of a few columns where the layout stores the matrix turned around."""
    from isomorph.quantize.grid import GRIDS, grid_of

    value = tensor.read()
    matrix = value.reshape(-1, *value.shape[-2:])[0]
    samples = (matrix[:SAMPLED_ROWS], matrix[:SAMPLED_DEPTH, :SAMPLED_ROWS].T)
    found = {grid_of(from_array(tensor.name, np.ascontiguousarray(sample))) for sample in samples}
    return next((grid for grid in GRIDS if grid in found), None)


def _without_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _float_dtype(stored: Mapping[str, int]) -> str:
    """The dtype a model of these weights computes in."""
    floats = {dtype: nbytes for dtype, nbytes in stored.items() if dtype in FLOATING}
    return max(floats, key=lambda dtype: floats[dtype], default="float32")


def _memory(
    config: Mapping[str, Any], weights: int, dtype: str, context: int | None, longest: int | None
) -> Memory | None:
    """None when the config does not say what a KV cache takes."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    tokens = context or longest
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(tokens, int)):
        return None
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
    key_value_heads = config.get("num_key_value_heads") or heads
    cache = 2 * layers * key_value_heads * head_dim * tokens * NUMPY_DTYPES[dtype].itemsize
    available = available_bytes()
    if longest is not None and tokens > longest:
        return Memory(tokens, weights, cache, available, False, f"longer than max_position_embeddings ({longest})")
    fits = weights + cache <= available
    return Memory(tokens, weights, cache, available, fits, "fits" if fits else "not enough memory")


def available_bytes() -> int:
    """Memory this process may still take: what the system has free, within the limits of its container."""
    import psutil

    available = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # No such limit: "max", or another system.
    return max(0, available)


callable_module(__name__)
