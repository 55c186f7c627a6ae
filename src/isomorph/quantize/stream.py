"""One matrix of a stream, packed as it is written: its words first, then the scales and biases they left."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor
from isomorph.errors import InputError
from isomorph.quantize.arrays import quantize_array
from isomorph.quantize.grid import on_grid, regridded
from isomorph.quantize.packed import Loss, Packed
from isomorph.quantize.plan import Decision
from isomorph.quantize.settings import Settings


class QuantizedStream:
    """The lazy tensors `path.weight`, `path.scales` and, in affine mode, `path.biases` of one matrix.

    Read in this order they read and pack the matrix once; a later part read alone packs it again. An exact decision
    moves codes, or finds the ones that float weights lie on; the others are rounded, with the `loss` that is known once
    the matrix was read.
    """

    def __init__(self, decision: Decision) -> None:
        assert decision.settings is not None
        self.decision, self.source, self.settings = decision, decision.tensor, decision.settings
        self.loss: Loss | None = None
        self._companions: dict[str, np.ndarray] = {}

    def parts(self) -> list[Tensor]:
        """The tensors to write, in the order to read them in."""
        stored = self.settings.parts(self.source.shape, self.source.dtype)
        return [self._part(name, shape, dtype) for name, (shape, dtype) in stored.items()]

    def _part(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        def stream() -> Iterator[np.ndarray]:
            return self._words() if name == "weight" else self._companion(name)

        return Tensor(f"{self.decision.path}.{name}", shape, dtype, lambda: np.concatenate(list(stream())), stream)

    def _words(self) -> Iterator[np.ndarray]:
        loss, found = Loss(), []
        for packed in self._exact() if self.decision.exact else self._rounded(loss):
            found.append(packed[1:])
            yield packed.weight
        self.loss = None if self.decision.exact else loss
        scales, biases = zip(*found)
        self._companions = {"scales": np.concatenate(scales)}
        if self.settings.affine:
            self._companions["biases"] = np.concatenate(biases)

    def _exact(self) -> Iterator[Packed]:
        for packed, settings in self._on_own_grid():
            found = regridded(packed, settings, self.settings)
            assert found is not None, f"{self.source.name} is not on the grid it was found on"
            if not self.settings.affine or found is packed:
                yield found
                continue
            assert found.biases is not None
            dtype = NUMPY_DTYPES[self.source.dtype]
            scales, biases = found.scales.astype(dtype), found.biases.astype(dtype)
            if (scales != found.scales).any() or (biases != found.biases).any():
                raise InputError(
                    f"expected scales that {self.source.dtype} can hold; found others in {self.source.name!r}; "
                    "add --dtype bfloat16"
                )
            yield Packed(found.weight, scales, biases)

    def _on_own_grid(self) -> Iterator[tuple[Packed, Settings]]:
        """The source's weights as codes, and what they are."""
        grid, module = self.decision.grid, self.decision.packed
        if module is not None:
            yield from ((packed, module.settings) for packed in module.blocks())
            return
        assert grid is not None
        for block in self.source.blocks():
            packed = on_grid(block, grid)
            assert packed is not None, f"{self.source.name} is not on the grid it was found on"
            yield packed, grid

    def _rounded(self, loss: Loss) -> Iterator[Packed]:
        for block in self.source.blocks():
            try:
                packed = quantize_array(block, self.settings, loss)
            except ValueError:
                raise InputError(
                    f"expected finite weights to quantize; found NaN or infinity in {self.source.name!r}; "
                    "repair the source"
                ) from None
            if self.settings.affine and not np.isfinite(packed.scales.astype(np.float32)).all():
                raise InputError(
                    f"expected groups whose range {self.source.dtype} can hold; found one in {self.source.name!r} that "
                    "overflows; repair the source or keep this matrix"
                )
            yield packed

    def _companion(self, name: str) -> Iterator[np.ndarray]:
        if name not in self._companions:
            for _ in self._words():
                pass
        yield self._companions.pop(name)
