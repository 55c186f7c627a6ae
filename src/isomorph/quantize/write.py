"""Writing a quantized model folder: the conversion's plan with its matrices quantized in the stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from isomorph import __version__, architectures
from isomorph.architectures.base import Architecture
from isomorph.checkpoint.container import MAX_SHARD_BYTES, safetensors_files
from isomorph.checkpoint.mlx_quantized import CONFIG_KEYS, QuantizedModule, quantized_modules
from isomorph.checkpoint.source import Checkpoint, open_checkpoint
from isomorph.checkpoint.target import check_target
from isomorph.checkpoint.tensor import Tensor
from isomorph.checkpoint.writer import file_identity, json_bytes, write_folder
from isomorph.convert import CAST_DTYPES, check_dtype, own_plan, stock_plan, tokenizer_files
from isomorph.convert import Plan as ConversionPlan
from isomorph.errors import InputError, did_you_mean
from isomorph.port import stock
from isomorph.port.transforms import TRANSFORMS
from isomorph.quantize.arrays import quantize_array
from isomorph.quantize.experts import as_mlx_lm_holds_them
from isomorph.quantize.grid import grid_of, grid_of_packed
from isomorph.quantize.packed import Loss
from isomorph.quantize.plan import Decision, Plan, make_plan
from isomorph.quantize.recipe import Recipe, RecipeFunction, read_recipe, set_rule
from isomorph.quantize.roles import stock_role
from isomorph.quantize.settings import Settings
from isomorph.quantize.stock import default_recipe, is_bare
from isomorph.quantize.stream import QuantizedStream

#: Ways to choose the codes. Modes (affine, mxfp4, ...) say how they are stored.
METHODS = ("affine",)


@dataclass(frozen=True)
class Module:
    """One matrix of the plan; `bits` None means that it stays as it is, for the `reason` given.

    `grid` is the mode of what its weights lie on already; `exact` says that they are stored without any error.
    """

    path: str
    role: str | None
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    mode: str | None
    nbytes: int
    reason: str
    grid: str | None = None
    exact: bool = False


@dataclass(frozen=True)
class QuantizationLoss:
    """Root mean squared error over root mean squared weight, per matrix: mean, maximum and where that is.

    Measured on a sample of each matrix while it was quantized; matrices an interrupted run had finished are not in it.
    """

    matrices: int
    mean_relative_rms: float
    max_relative_rms: float
    worst: str


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote, or would write. `payload_bytes` are all tensors, headers and JSON aside.

    `others` maps what is no matrix, by name with `*` for the blocks, to its dtype.
    """

    source: Path
    path: Path
    architecture: str
    source_layout: str
    layout: str
    dtype: str
    recipe: str
    bits: int
    group_size: int
    mode: str
    parameters: int
    payload_bytes: int
    bits_per_weight: float
    plan: list[Module]
    others: dict[str, str] = field(default_factory=dict)
    requantized: bool = False
    loss: QuantizationLoss | None = None
    files: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def skipped(self) -> dict[str, str]:
        """Module path -> why it is not quantized."""
        return {module.path: module.reason for module in self.plan if module.bits is None}


def quantize(
    source: str | Path,
    target: str | Path,
    bits: int | None = None,
    group_size: int | None = None,
    method: str = "affine",
    recipe: str | Path | Mapping[str, Any] | RecipeFunction | Recipe | None = None,
    *,
    mode: str | None = None,
    overrides: Sequence[str] = (),
    layout: str | None = None,
    dtype: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    requantize: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    dry_run: bool = False,
) -> Quantized:
    """Write the model at `source` (folder, original file or Hub id) as an MLX-quantized folder `target`.

    `bits` (2, 3, 4, 5, 6, 8; default 4) and `group_size` (32, 64, 128; default 64) hold for what `recipe` does not
    name: a built-in (`isomorph list recipes`), a TOML file, a dictionary, or a function `(path, role, shape) -> bits |
    dict | False`; see `isomorph.quantize.recipe`. `overrides` are `PATTERN=BITS` and have the last word. `mode` is
    affine, mxfp4, mxfp8 or nvfp4. `layout` is one of the architecture's MLX layouts: for Talkie `mlx-folded` (default;
    the head is quantized as well) or `mlx-lm`, which gives stock mlx-lm's own result. Weights are first cast to
    `dtype`, or to config.json's `torch_dtype`, as mlx-lm does.

    Weights stream through in blocks; an interrupted call, repeated, goes on where it stopped, and the target appears
    only when it is complete. What lies on a grid already, packed or as floats, is stored exactly where the settings can
    hold it, and refused where they cannot; `requantize` rounds it. `dry_run` reads headers only (weights too for a
    recipe that looks for grids) and works on a folder that holds only a config.json. Raises InputError.
    """
    if method not in METHODS:
        raise InputError(f"expected a method of {', '.join(METHODS)}; found {method!r}{did_you_mean(method, METHODS)}")
    check_dtype(dtype)
    rules = tuple(set_rule(text) for text in overrides)
    named = None if recipe is None else read_recipe(recipe)
    checkpoint = open_checkpoint(source, config=config)
    model_type = str((checkpoint.config or {}).get("model_type"))
    chosen = replace(named or default_recipe(model_type), overrides=rules)
    default = Settings.of(
        chosen.bits if bits is None else bits,
        chosen.group_size if group_size is None else group_size,
        mode or chosen.mode or "affine",
    )
    destination = check_target(target, force or dry_run, [checkpoint.path])
    architecture = architectures.find(checkpoint)
    base, role_of, packed = _base(checkpoint, architecture, layout, dtype or _stated_dtype(checkpoint))
    looks = chosen.exact or not (dry_run or requantize)
    grids = partial(_grid, packed=packed, looks=looks and checkpoint.kind != "config")
    bare = partial(is_bare, model_type)
    plan = make_plan(base.tensors, chosen, default, role_of, bare, packed, grids, requantize)
    rounded_again = [decision for decision in plan.decisions if decision.grid and not decision.exact]
    if rounded_again and not (requantize or dry_run):
        raise _refusal(rounded_again[0])
    entry = plan.quantization()
    configuration = {**base.config, **dict.fromkeys(CONFIG_KEYS, entry)}
    streams, tensors = _streams(plan)
    weights = safetensors_files(tensors, {"format": "mlx"}, max_shard_bytes)
    result = partial(
        Quantized,
        source=checkpoint.path,
        path=destination,
        architecture=str(configuration["model_type"]),
        source_layout=base.source_layout,
        layout=base.layout,
        dtype=base.config["dtype"],
        recipe=chosen.name,
        **default.to_dict(),
        parameters=plan.parameters,
        payload_bytes=plan.payload_bytes,
        bits_per_weight=plan.bits_per_weight,
        plan=_modules(plan),
        others={re.sub(r"\.\d+\.", ".*.", tensor.name): tensor.dtype for tensor in plan.rest},
        requantized=bool(rounded_again),
    )
    if dry_run:
        return result(files=[file.name for file in weights] + list(base.files), dry_run=True)
    checkpoint.require_weights()
    files = {**base.files, "config.json": json_bytes(configuration)}
    for stream in streams:
        for transform in TRANSFORMS.values():
            # What gives an exact weight back is of no use beside a quantized one.
            files.pop(str(transform.sidecar_name(stream.source.name)), None)
    files |= tokenizer_files(checkpoint, architecture, base)
    inputs = {"isomorph": __version__, "sources": file_identity(checkpoint.files), "config": configuration}
    write_folder(destination, weights, files, inputs=inputs, description=f"quantizing {destination.name}")
    return result(files=sorted(file.name for file in destination.iterdir()), loss=_loss(streams))


def _grid(tensor: Tensor, packed: Mapping[str, QuantizedModule], looks: bool) -> Settings | None:
    """What a matrix lies on already; floats are only read when the caller `looks`."""
    module = packed.get(tensor.name)
    if module is not None:
        return grid_of_packed(module.settings, module.blocks() if looks else ())
    return grid_of(tensor) if looks else None


def _refusal(decision: Decision) -> InputError:
    """Why one matrix is not rounded from one grid to another, with what that would lose on its first rows."""
    assert decision.grid is not None and decision.settings is not None
    loss = Loss()
    quantize_array(next(iter(decision.tensor.blocks())), decision.settings, loss)
    return InputError(
        f"expected settings that hold {decision.path}, {decision.grid} already, without error; found "
        f"{decision.settings}, which loses {loss.relative_rms:.2%} (relative RMS on its first rows); "
        "take --recipe lossless, start from the original, or add --requantize"
    )


def _stated_dtype(checkpoint: Checkpoint) -> str | None:
    stated = (checkpoint.config or {}).get("torch_dtype")
    return stated if stated in CAST_DTYPES else None


def _base(
    checkpoint: Checkpoint, architecture: Architecture | None, layout: str | None, dtype: str | None
) -> tuple[ConversionPlan, Callable[[str], str | None], dict[str, QuantizedModule]]:
    """The target's plan with all weights as floats, what tells roles, and the packed modules behind some of them."""
    if architecture is not None:
        plan = own_plan(checkpoint, architecture, "mlx", layout or architecture.native["mlx"], dtype, False)
        tensors, packed = _as_floats(plan.tensors, plan.config.get("quantization"), dtype or plan.config["dtype"])
        return replace(plan, tensors=tensors), architecture.role, packed
    if not checkpoint.tensors:
        checkpoint = stock.declared(checkpoint)
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not _computed(name, checkpoint)}
    shared = checkpoint.metadata.get("format", "pt") == "pt"
    held = as_mlx_lm_holds_them(stored, checkpoint.config or {}) if shared else stored
    tensors, packed = _as_floats(list(held.values()), checkpoint.quantization, dtype)
    config = {key: value for key, value in (checkpoint.config or {}).items() if key not in CONFIG_KEYS}
    floats = replace(checkpoint, config=config, tensors={tensor.name: tensor for tensor in tensors})
    plan = stock_plan(floats, "mlx", layout, dtype, True)
    if held.keys() != stored.keys():
        plan = replace(plan, layout="mlx-lm")
    return plan, stock_role, packed


def _as_floats(
    tensors: Sequence[Tensor], quantization: Mapping[str, Any] | None, dtype: str | None
) -> tuple[list[Tensor], dict[str, QuantizedModule]]:
    """`tensors` with packed modules as lazy floats, and those modules by their weight's name.

    Codes with powers of two have no dtype of their own: they become `dtype`, unless its range is too small for them.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    modules = quantized_modules(by_name, quantization)
    packed = {module.weight.name: module for module in modules.values()}
    companions = {part.name for module in modules.values() for part in (module.scales, module.biases) if part}
    wide = "bfloat16" if dtype in (None, "float16") else dtype
    floats = [
        packed[name].dequantized(None if packed[name].settings.affine else wide) if name in packed else tensor
        for name, tensor in by_name.items()
        if name not in companions
    ]
    return floats, packed


def _computed(name: str, checkpoint: Checkpoint) -> bool:
    """What mlx-lm leaves out when it loads: buffers computed from the config, and a head that is the embedding."""
    if "rotary_emb.inv_freq" in name:
        return True
    return name == "lm_head.weight" and bool((checkpoint.config or {}).get("tie_word_embeddings"))


def _streams(plan: Plan) -> tuple[list[QuantizedStream], list[Tensor]]:
    """Each matrix to pack as a stream, and all tensors in the order they are written.

    Whole cache lines go first and odd sizes last, so that packed words lie aligned in the file.
    """
    streams = []
    groups = [[tensor] for tensor in plan.rest]
    for decision in plan.decisions:
        packed = decision.packed
        if decision.settings is None:
            groups.append([decision.tensor])
        elif packed is not None and packed.settings == decision.settings:
            groups.append(packed.parts())
        else:
            streams.append(QuantizedStream(decision))
            groups.append(streams[-1].parts())
    groups.sort(key=lambda group: next((i for i, unit in enumerate((64, 8, 4)) if _divides(unit, group)), 3))
    return streams, [tensor for group in groups for tensor in group]


def _divides(unit: int, group: Sequence[Tensor]) -> bool:
    return all(tensor.nbytes % unit == 0 for tensor in group)


def _modules(plan: Plan) -> list[Module]:
    return [
        Module(
            path=decision.path,
            role=decision.role,
            shape=decision.tensor.shape,
            bits=decision.settings.bits if decision.settings else None,
            group_size=decision.settings.group_size if decision.settings else None,
            mode=decision.settings.mode if decision.settings else None,
            nbytes=decision.nbytes,
            reason=decision.reason,
            grid=decision.grid.mode if decision.grid else None,
            exact=decision.exact,
        )
        for decision in plan.decisions
    ]


def _loss(streams: Sequence[QuantizedStream]) -> QuantizationLoss | None:
    measured = {stream.decision.path: stream.loss.relative_rms for stream in streams if stream.loss is not None}
    if not measured:
        return None
    worst = max(measured, key=lambda path: measured[path])
    return QuantizationLoss(len(measured), sum(measured.values()) / len(measured), measured[worst], worst)
