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
    the file, or None when it is not needed.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    to_canonical: Callable[[Tensor, Sequence[str], Path | None], list[Tensor]]
    from_canonical: Callable[[str, Sequence[Tensor]], Tensor]
    sidecar_name: Callable[[str], str | None] = lambda name: None
    sidecar: Callable[[Sequence[Tensor]], Callable[[Path], None] | None] = lambda tensors: None


def _renamed(tensor: Tensor, names: Sequence[str], folder: Path | None) -> list[Tensor]:
    return [tensor.renamed(names[0])]


def _transposed(tensor: Tensor, name: str) -> Tensor:
    # A transposed view of a mapped tensor costs nothing; the writer copies it run by run.
    return Tensor(name, tensor.shape[::-1], tensor.dtype, lambda: np.transpose(tensor.read()))


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(
        shape=lambda shapes: shapes[0],
        to_canonical=_renamed,
        from_canonical=lambda name, tensors: tensors[0].renamed(name),
    ),
    "transpose": Transform(
        shape=lambda shapes: shapes[0][::-1],
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
