"""The named transforms of weight tables. Each has an inverse, so a table is read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isomorph.checkpoint.tensor import Tensor
from isomorph.port import fold

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How one tensor of a layout holds one or more canonical tensors.

    `shape(canonical shapes)` is the layout tensor's shape. `to_canonical(tensor, names, folder)` takes it apart
    (`folder` is where a file beside the weights may hold what the tensor alone cannot say);
    `from_canonical(name, tensors)` is the inverse. Both are lazy. Where that tensor alone cannot say what it was made
    of, `sidecar_name(tensor name)` names the file beside it that does, and `sidecar(canonical tensors)` is what writes
    the file, or None when it is not needed. `moves_rows` says that whole rows change places at most, so that packed
    codes, scales and biases go through it like weights.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    to_canonical: Callable[[Tensor, Sequence[str], Path | None], list[Tensor]]
    from_canonical: Callable[[str, Sequence[Tensor]], Tensor]
    sidecar_name: Callable[[str], str | None] = lambda name: None
    sidecar: Callable[[Sequence[Tensor]], Callable[[Path], None] | None] = lambda tensors: None
    moves_rows: bool = False


def _renamed(tensor: Tensor, names: Sequence[str], folder: Path | None) -> list[Tensor]:
    return [tensor.renamed(names[0])]


def _transposed(tensor: Tensor, name: str) -> Tensor:
    # A transposed view of a mapped tensor costs nothing; the writer copies it run by run.
    return Tensor(name, _swapped(tensor.shape), tensor.dtype, lambda: np.swapaxes(tensor.read(), -1, -2))


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])


def _interleaved(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Stacked tensors [E, R, ...] as one [E, 2R, ...]: rows of the first and of the second in turn."""
    first, second = tensors

    def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.stack([one, other], axis=2).reshape(len(one), -1, *one.shape[2:])

    return Tensor(
        name,
        (first.shape[0], 2 * first.shape[1], *first.shape[2:]),
        first.dtype,
        read=lambda: joined(first.read(), second.read()),
        stream=lambda: (joined(*blocks) for blocks in zip(first.blocks(), second.blocks(), strict=True)),
    )


def _alternate_rows(tensor: Tensor, names: Sequence[str], folder: Path | None) -> list[Tensor]:
    def rows(name: str, start: int) -> Tensor:
        shape = (tensor.shape[0], tensor.shape[1] // 2, *tensor.shape[2:])
        return Tensor(
            name,
            shape,
            tensor.dtype,
            read=lambda: tensor.read()[:, start::2],
            stream=lambda: (block[:, start::2] for block in tensor.blocks()),
        )

    return [rows(name, start) for start, name in enumerate(names)]


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(
        shape=lambda shapes: shapes[0],
        to_canonical=_renamed,
        from_canonical=lambda name, tensors: tensors[0].renamed(name),
        moves_rows=True,
    ),
    "interleave": Transform(
        shape=lambda shapes: (shapes[0][0], 2 * shapes[0][1], *shapes[0][2:]),
        to_canonical=_alternate_rows,
        from_canonical=_interleaved,
        moves_rows=True,
    ),
    "interleave_transposed": Transform(
        shape=lambda shapes: (shapes[0][0], shapes[0][2], 2 * shapes[0][1]),
        to_canonical=lambda tensor, names, folder: _alternate_rows(_transposed(tensor, tensor.name), names, folder),
        from_canonical=lambda name, tensors: _transposed(_interleaved(name, tensors), name),
    ),
    "transpose": Transform(
        shape=lambda shapes: _swapped(shapes[0]),
        to_canonical=lambda tensor, names, folder: [_transposed(tensor, names[0])],
        from_canonical=lambda name, tensors: _transposed(tensors[0], name),
    ),
    "fold_gain": Transform(
        shape=lambda shapes: shapes[0],
        to_canonical=fold.unfolded,
        from_canonical=lambda name, tensors: fold.folded(name, *tensors),
        sidecar_name=fold.sidecar_name,
        sidecar=lambda tensors: fold.sidecar_writer(*tensors),
    ),
}
