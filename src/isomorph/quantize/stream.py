"""One matrix of a stream, quantized as it is written: its packed words first, then the scales and biases they left."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from isomorph.checkpoint.tensor import Tensor
from isomorph.errors import InputError
from isomorph.quantize.arrays import quantize_array
from isomorph.quantize.packed import Loss, Packed
from isomorph.quantize.settings import Settings


class QuantizedStream:
    """The lazy tensors `path.weight`, `path.scales` and, in affine mode, `path.biases` of one matrix.

    Read in this order they read and quantize the matrix once; a later part read alone quantizes it again. `loss` is
    known once the matrix was read.
    """

    def __init__(self, path: str, source: Tensor, settings: Settings) -> None:
        self.path, self.source, self.settings = path, source, settings
        self.loss: Loss | None = None
        self._companions: dict[str, np.ndarray] = {}

    def parts(self) -> list[Tensor]:
        """The tensors to write, in the order to read them in."""
        stored = self.settings.parts(self.source.shape, self.source.dtype)
        return [self._part(name, shape, dtype) for name, (shape, dtype) in stored.items()]

    def _part(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        def stream() -> Iterator[np.ndarray]:
            return self._words() if name == "weight" else self._companion(name)

        return Tensor(f"{self.path}.{name}", shape, dtype, lambda: np.concatenate(list(stream())), stream)

    def _words(self) -> Iterator[np.ndarray]:
        loss, found = Loss(), []
        for block in self.source.blocks():
            packed = self._packed(block, loss)
            found.append(packed[1:])
            yield packed.weight
        self.loss = loss
        scales, biases = zip(*found)
        self._companions = {"scales": np.concatenate(scales)}
        if self.settings.affine:
            self._companions["biases"] = np.concatenate(biases)

    def _packed(self, block: np.ndarray, loss: Loss) -> Packed:
        try:
            packed = quantize_array(block, self.settings, loss)
        except ValueError:
            raise InputError(
                f"expected finite weights to quantize; found NaN or infinity in {self.source.name!r}; repair the source"
            ) from None
        if self.settings.affine and not np.isfinite(packed.scales).all():
            raise InputError(
                f"expected groups whose range {self.source.dtype} can hold; found one in {self.source.name!r} that "
                "overflows; repair the source or keep this matrix"
            )
        return packed

    def _companion(self, name: str) -> Iterator[np.ndarray]:
        if name not in self._companions:
            for _ in self._words():
                pass
        yield self._companions.pop(name)
