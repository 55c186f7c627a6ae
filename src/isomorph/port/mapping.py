"""From one layout's tensors to another's: exactly-once accounting, then lazy transforms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from isomorph.architectures.base import Architecture
from isomorph.checkpoint import mxfp4
from isomorph.checkpoint.mlx_quantized import QuantizedModule, dequantized, is_quantized, quantized_modules
from isomorph.checkpoint.source import Checkpoint
from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.errors import InputError, did_you_mean
from isomorph.port.table import Layout, Row, dropped, expand
from isomorph.port.transforms import TRANSFORMS
from isomorph.quantize.settings import Settings

#: What a packed module stores; `biases` in affine mode only.
PARTS = ("weight", "scales", "biases")

#: Mistakes spelt out in one error; the rest are counted.
MISTAKES_SHOWN = 8


@dataclass(frozen=True)
class Reading:
    """A checkpoint fitted to its layout: each row has its tensor, and what was dropped has its reason.

    `packed` holds, by name, the weights stored as MLX codes with the scales and biases beside them; `folder` is where
    files beside the weights are, None to go by the weights alone.
    """

    layout: Layout
    rows: dict[str, Row]
    tensors: dict[str, Tensor]
    packed: dict[str, QuantizedModule]
    dropped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    folder: Path | None

    def canonical(self, name: str, dtype: str | None = None) -> Tensor:
        """One canonical tensor, cast to `dtype`."""
        row = self._holder[name]
        if row.name in self.packed:
            raise InputError(f"expected unquantized weights; found {row.name!r} quantized; add --dequantize")
        parts = TRANSFORMS[row.transform].to_canonical(self.tensors[row.name], row.canonical, self.folder)
        return _cast(next(part for part in parts if part.name == name), dtype)

    def into(self, layout: Layout, dtype: str | None = None) -> Iterator[Tensor]:
        """The tensors of `layout`, in its table's order; packed modules stay packed where only their rows move."""
        tensors = self._into(layout, dtype)
        yield from mxfp4.published(tensors) if layout.packed == "mxfp4" else tensors

    def _into(self, layout: Layout, dtype: str | None) -> Iterator[Tensor]:
        for row in expand(layout, self.shapes).values():
            if self._is_packed(row):
                yield from self._repacked(layout, row)
            elif not layout.stores_floats(row.name):
                raise InputError(
                    f"expected {layout.packed} weights for {row.name!r} of layout {layout.name}; found floats; "
                    "choose another layout"
                )
            elif (twin := self._twin(row, dtype)) is not None:
                # Stored alike on both sides: no transform, so the same bits.
                yield self.tensors[twin.name].renamed(row.name)
            else:
                parts = [self.canonical(name, dtype) for name in row.canonical]
                yield TRANSFORMS[row.transform].from_canonical(row.name, parts)

    def module(self, name: str) -> QuantizedModule | None:
        """The packed form of the canonical matrix `name`, None where it is not packed. A gain stays folded in."""
        holder = self._holder[name]
        entry, transform = self.packed.get(holder.name), TRANSFORMS[holder.transform]
        if entry is None or (not transform.moves_rows and name != holder.canonical[0]):
            return None
        if len(holder.canonical) == 1 or not transform.moves_rows:
            return entry

        def own(part: Tensor) -> Tensor:
            pieces = transform.to_canonical(part, holder.canonical, self.folder)
            return next(piece for piece in pieces if piece.name == name)

        biases = None if entry.biases is None else own(entry.biases)
        path = name.removesuffix(".weight")
        return replace(entry, path=path, weight=own(entry.weight), scales=own(entry.scales), biases=biases)

    def keeps(self, layout: Layout) -> bool:
        """Whether `layout` stores every packed module as this one does, so that its memory stays mapped."""
        return all(self._alike(row) for row in expand(layout, self.shapes).values() if self._is_packed(row))

    def quantization(self, layout: Layout) -> dict[str, Any] | None:
        """config.json's `quantization` for the packed modules under the names of `layout`; None when there are none.

        The most frequent settings stand for all, and what differs is named.
        """
        rows = (row for row in expand(layout, self.shapes).values() if self._is_packed(row))
        settings = {row.name.removesuffix(".weight"): self._settings(layout, row) for row in rows}
        if not settings:
            return None
        general = Counter(settings.values()).most_common(1)[0][0]
        return general.to_dict() | {path: own.to_dict() for path, own in settings.items() if own != general}

    def _is_packed(self, row: Row) -> bool:
        return any(self._holder[name].name in self.packed for name in row.canonical)

    def _settings(self, layout: Layout, row: Row) -> Settings:
        """How the packed `row` is stored. Raises InputError where `layout` cannot store it so."""
        holders = [self._holder[name] for name in row.canonical]
        settings = {self.packed[holder.name].settings if holder.name in self.packed else None for holder in holders}
        movable = all(TRANSFORMS[each.transform].moves_rows for each in (row, *holders))
        own = settings.pop()
        if settings or own is None or not (movable or self._alike(row)) or layout.packed not in ("mlx", own.mode):
            raise InputError(
                f"expected weights that layout {layout.name} can hold as {row.name!r}; "
                f"found {holders[0].name!r} quantized; add --dequantize"
            )
        return own

    def _repacked(self, layout: Layout, row: Row) -> Iterator[Tensor]:
        """Words, scales and biases of the packed `row`: whole rows of the stored ones, in another order at most."""
        path = row.name.removesuffix("weight")
        for part in PARTS if self._settings(layout, row).affine else PARTS[:-1]:
            if alike := self._alike(row):
                yield getattr(self.packed[alike.name], part).renamed(path + part)
                continue
            pieces = [getattr(self.module(name), part) for name in row.canonical]
            yield TRANSFORMS[row.transform].from_canonical(path + part, pieces)

    def sidecars(self, layout: Layout, dtype: str | None = None) -> dict[str, Path | Callable[[Path], None]]:
        """Files beside the weights of `layout` that its inverse transforms need: a file to copy, or a writer."""
        files: dict[str, Path | Callable[[Path], None]] = {}
        for row in expand(layout, self.shapes).values():
            name = TRANSFORMS[row.transform].sidecar_name(row.name)
            if name is None or self._is_packed(row):
                continue
            twin = self._twin(row, dtype)
            if twin is None:
                writer = TRANSFORMS[row.transform].sidecar([self.canonical(part, dtype) for part in row.canonical])
                if writer is not None:
                    files[name] = writer
            elif self.folder is not None:
                own = self.folder / str(TRANSFORMS[row.transform].sidecar_name(twin.name))
                if own.is_file():
                    files[name] = own
        return files

    def _alike(self, row: Row) -> Row | None:
        """The row of this layout that stores what `row` does in the same way."""
        twin = self._holder[row.canonical[0]]
        return twin if (twin.canonical, twin.transform) == (row.canonical, row.transform) else None

    def _twin(self, row: Row, dtype: str | None) -> Row | None:
        """The row of this layout that stores what `row` does in the same way and, when cast, as the same dtype."""
        twin = self._alike(row)
        return twin if twin is not None and _cast(self.tensors[twin.name], dtype) is self.tensors[twin.name] else None

    @cached_property
    def _holder(self) -> dict[str, Row]:
        return {name: row for row in self.rows.values() for name in row.canonical}


def mapped(
    checkpoint: Checkpoint,
    architecture: Architecture,
    target_layout: str,
    *,
    config: Any = None,
    dtype: str | None = None,
    dequantize: bool = True,
    sidecars: bool = True,
) -> Iterator[Tensor]:
    """The checkpoint's tensors in the names and shapes of `target_layout`, lazily, in the table's order.

    `config` is the architecture's parsed config (default: the checkpoint's own). `dtype` casts floating tensors.
    An MLX-quantized checkpoint is dequantized, unless `dequantize` is False: then packed triples keep their values,
    which needs a target that stores those modules untransformed. Without `sidecars` the files beside the weights are
    left aside: what a rounding transform lost stays lost, so the tensors compute what the stored ones do in any dtype.
    Raises InputError that names all that does not fit.
    """
    layout = layout_of(architecture, target_layout)
    reading = read(checkpoint, architecture, config=config, dtype=dtype, dequantize=dequantize)
    yield from (reading if sidecars else replace(reading, folder=None)).into(layout, dtype)


def layout_of(architecture: Architecture, name: str) -> Layout:
    """The layout called `name`. Raises InputError with did-you-mean."""
    if name not in architecture.layouts:
        known = ", ".join(architecture.layouts)
        raise InputError(f"expected a layout of {known}; found {name!r}{did_you_mean(name, architecture.layouts)}")
    return architecture.layouts[name]


def read(
    checkpoint: Checkpoint,
    architecture: Architecture,
    *,
    config: Any = None,
    dtype: str | None = None,
    dequantize: bool = True,
) -> Reading:
    """Account for every tensor of the checkpoint: consumed or dropped with a reason, each row filled, shapes right.

    `dtype` is what dequantized weights are computed in (default: their scales'). Raises one InputError for all
    mistakes together.
    """
    from isomorph import architectures

    if not checkpoint.tensors:
        checkpoint.require_weights()
    config = config or architectures.configuration(architecture, checkpoint, tell=False)
    layout = architecture.layouts[architecture.detect(checkpoint)]
    shapes = architecture.parameters(config)
    rows = expand(layout, shapes)
    tensors = dict(checkpoint.tensors)
    packed: dict[str, QuantizedModule] = {}
    if checkpoint.quantization is not None or is_quantized(tensors):
        widths = {name.removesuffix(".weight"): shape[-1] for name, shape in shapes_in(layout, shapes).items()}
        if dequantize:
            tensors = dequantized(tensors, checkpoint.quantization, dtype, widths)
        else:
            tensors, packed = _unpacked(tensors, quantized_modules(tensors, checkpoint.quantization, widths))
    mistakes, leaving = _mistakes(layout, shapes, tensors, packed)
    if mistakes:
        shown = "; ".join(mistakes[:MISTAKES_SHOWN])
        more = f"; and {len(mistakes) - MISTAKES_SHOWN} more" if len(mistakes) > MISTAKES_SHOWN else ""
        raise InputError(
            f"expected {checkpoint.path} to hold the {len(rows)} tensors of layout {layout.name}; found {shown}{more}; "
            "correct config.json or the weights"
        )
    architecture.check_dropped(config, {name: tensors[name] for name in leaving})
    return Reading(layout, rows, tensors, packed, leaving, shapes, checkpoint.folder)


def shapes_in(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of `layout`, for the canonical `shapes`."""
    rows = expand(layout, shapes).items()
    return {name: TRANSFORMS[row.transform].shape([shapes[part] for part in row.canonical]) for name, row in rows}


def _mistakes(
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, QuantizedModule],
) -> tuple[list[str], dict[str, str]]:
    """What does not fit, one mistake a line, and the reasons of what is dropped."""
    expected = shapes_in(layout, shapes)
    missing = [name for name in expected if name not in tensors]
    mistakes: list[str] = []
    leaving: dict[str, str] = {}
    for name, tensor in tensors.items():
        wanted = expected.get(name)
        if wanted is None:
            reason = dropped(layout, name)
            if reason is None:
                # Looking for close names takes time, so only for mistakes that are shown.
                hint = did_you_mean(name, missing) if len(mistakes) < MISTAKES_SHOWN else ""
                mistakes.append(f"unexpected {name!r}{hint}")
            else:
                leaving[name] = reason
            continue
        # Packed codes have fewer columns; their rows still count.
        known = slice(-1) if name in packed else slice(None)
        if tensor.shape[known] != wanted[known]:
            mistakes.append(f"{name!r} has shape {list(tensor.shape)}, the config asks for {list(wanted)}")
        elif name not in packed and tensor.dtype not in FLOATING:
            mistakes.append(f"{name!r} has dtype {tensor.dtype}, not one of {', '.join(FLOATING)}")
    return mistakes + [f"missing {name!r}" for name in missing], leaving


def _cast(tensor: Tensor, dtype: str | None) -> Tensor:
    return tensor if dtype is None else tensor.cast(dtype)


def _unpacked(
    tensors: Mapping[str, Tensor], modules: Mapping[str, QuantizedModule]
) -> tuple[dict[str, Tensor], dict[str, QuantizedModule]]:
    """Tensors without the companions of packed weights, and the modules by their weight's name."""
    companions = {part.name for module in modules.values() for part in (module.scales, module.biases) if part}
    packed = {module.weight.name: module for module in modules.values()}
    return {name: tensor for name, tensor in tensors.items() if name not in companions}, packed
