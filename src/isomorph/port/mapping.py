"""From one layout's tensors to another's: exactly-once accounting, then lazy transforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isomorph.architectures.base import Architecture
from isomorph.checkpoint.source import Checkpoint
from isomorph.checkpoint.tensor import Tensor
from isomorph.errors import InputError, did_you_mean
from isomorph.port.table import Layout, Row, dropped, expand
from isomorph.port.transforms import TRANSFORMS

#: Mistakes spelt out in one error; the rest are counted.
MISTAKES_SHOWN = 8

#: What MLX stores beside a packed `X.weight`.
COMPANIONS = ("scales", "biases")


@dataclass(frozen=True)
class Reading:
    """A checkpoint fitted to a layout: each row with its tensor, and what was dropped and why."""

    layout: Layout
    tensors: dict[str, Tensor]
    rows: dict[str, Row]
    dropped: dict[str, str]


def mapped(
    checkpoint: Checkpoint,
    architecture: Architecture,
    target_layout: str,
    *,
    config: Any = None,
    dtype: str | None = None,
    dequantize: bool = True,
) -> Iterator[Tensor]:
    """The checkpoint's tensors in the names and shapes of `target_layout`, lazily, in the table's order.

    `config` is the architecture's parsed config (default: the checkpoint's own). `dtype` casts floating tensors.
    An MLX-quantized checkpoint is dequantized, unless `dequantize` is False: then packed triples keep their values,
    which needs a target that stores those modules untransformed. Raises InputError that names all that does not fit.
    """
    from isomorph import architectures

    if not checkpoint.tensors:
        raise InputError(f"expected weights in {checkpoint.path}; found only a config; download or convert the weights")
    if target_layout not in architecture.layouts:
        known = ", ".join(architecture.layouts)
        raise InputError(
            f"expected a layout of {known}; found {target_layout!r}{did_you_mean(target_layout, architecture.layouts)}"
        )
    config = config or architectures.configuration(architecture, checkpoint)
    packed: dict[str, list[Tensor]] = {}
    tensors = checkpoint.tensors
    if checkpoint.quantization is not None:
        if dequantize:
            from isomorph.checkpoint.mlx_quantized import dequantized

            tensors = dequantized(tensors, checkpoint.quantization)
        else:
            tensors, packed = _unpacked(tensors)
    shapes = architecture.parameters(config)
    layout = architecture.layouts[architecture.detect(checkpoint)]
    source = fitted(tensors, layout, shapes, packed, str(checkpoint.path))
    yield from _translated(source, architecture.layouts[target_layout], shapes, packed, dtype, checkpoint)


def fitted(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, Any],
    source: str,
) -> Reading:
    """`tensors` accounted for: each consumed or dropped with a reason, each row filled, shapes as in the config.

    `packed` names modules whose weight is quantized codes, of another shape. Raises one InputError for all mistakes.
    """
    rows = expand(layout, shapes)
    missing = [name for name in rows if name not in tensors]
    mistakes, leaving = [], {}
    for name, tensor in tensors.items():
        row = rows.get(name)
        if row is None:
            reason = dropped(layout, name)
            if reason is not None:
                leaving[name] = reason
            else:
                mistakes.append(f"unexpected {name!r}{did_you_mean(name, missing)}")
        elif name not in packed:
            wanted = TRANSFORMS[row.transform].shape([shapes[target] for target in row.canonical])
            if tensor.shape != wanted:
                mistakes.append(f"{name!r} has shape {list(tensor.shape)}, the config asks for {list(wanted)}")
    mistakes += [f"missing {name!r}" for name in missing]
    if mistakes:
        shown = "; ".join(mistakes[:MISTAKES_SHOWN])
        more = f"; and {len(mistakes) - MISTAKES_SHOWN} more" if len(mistakes) > MISTAKES_SHOWN else ""
        raise InputError(
            f"expected {source} to hold the {len(rows)} tensors of layout {layout.name}; found {shown}{more}; "
            "correct config.json or the weights"
        )
    return Reading(layout, dict(tensors), rows, leaving)


def _translated(
    source: Reading,
    target: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, list[Tensor]],
    dtype: str | None,
    checkpoint: Checkpoint,
) -> Iterator[Tensor]:
    """Rows of `target`, each from the source rows that hold the same canonical tensors."""
    same = {(row.canonical, row.transform): row for row in source.rows.values()}
    canonical: dict[str, Tensor] = {}

    def canonical_tensor(name: str) -> Tensor:
        if name not in canonical:
            row = next(row for row in source.rows.values() if name in row.canonical)
            if row.name in packed:
                raise InputError(
                    f"expected unquantized weights for layout {target.name}; found {row.name!r} quantized; "
                    "add --dequantize"
                )
            parts = TRANSFORMS[row.transform].to_canonical(source.tensors[row.name], row.canonical, checkpoint.folder)
            canonical.update((part.name, _cast(part, dtype)) for part in parts)
        return canonical[name]

    for row in expand(target, shapes).values():
        twin = same.get((row.canonical, row.transform))
        tensor = source.tensors[twin.name] if twin is not None else None
        if twin is not None and tensor is not None and (twin.name in packed or _cast(tensor, dtype) is tensor):
            # Stored alike on both sides: no transform, so the same bits.
            yield tensor.renamed(row.name)
            module = row.name.removesuffix("weight")
            yield from (part.renamed(module + part.name.rpartition(".")[2]) for part in packed.get(twin.name, []))
        else:
            parts = [canonical_tensor(name) for name in row.canonical]
            yield TRANSFORMS[row.transform].from_canonical(row.name, parts)


def _cast(tensor: Tensor, dtype: str | None) -> Tensor:
    return tensor if dtype is None else tensor.cast(dtype)


def _unpacked(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Tensors without the companions of packed weights, and those companions by the weight's name."""
    packed = {
        name: [tensors[key] for part in COMPANIONS if (key := f"{name.removesuffix('weight')}{part}") in tensors]
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype == "uint32"
    }
    taken = {part.name for parts in packed.values() for part in parts}
    return {name: tensor for name, tensor in tensors.items() if name not in taken}, packed
