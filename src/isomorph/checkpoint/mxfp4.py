"""The published MXFP4 form of expert weights, seen as what MLX stores: the same bits under other names and shapes.

`X_blocks` uint8 [..., rows, groups, 16] holds two E2M1 codes a byte, the even column's in the low nibble; `X_scales`
uint8 [..., rows, groups] one E8M0 exponent for each group of 32 (OCP Microscaling Formats 1.0; openai/gpt-oss).
MLX's `X.weight` uint32 [..., rows, columns / 8] is the same stream of nibbles in words of four bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from isomorph.checkpoint.tensor import Tensor
from isomorph.errors import InputError
from isomorph.quantize.settings import Settings

BLOCKS, SCALES = "_blocks", "_scales"
MXFP4 = Settings(4, 32, "mxfp4")

#: Bytes of one group's codes.
GROUP_BYTES = 16


def packed_view(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`tensors` with each `X_blocks`, `X_scales` as MLX's `X.weight`, `X.scales`, and the config that says so.

    Nothing is read, and tensors of any other form stay what they are. Raises InputError for parts that do not fit.
    """
    pairs = {
        path: (tensor, scales)
        for name, tensor in tensors.items()
        if name.endswith(BLOCKS) and (scales := tensors.get((path := name.removesuffix(BLOCKS)) + SCALES)) is not None
    }
    if not pairs:
        return dict(tensors), None if config is None else dict(config)
    view: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (path := name.removesuffix(BLOCKS)) != name and path in pairs:
            blocks, scales = pairs[path]
            _check(path, blocks, scales)
            view[f"{path}.weight"] = _words(f"{path}.weight", blocks)
            view[f"{path}.scales"] = scales.renamed(f"{path}.scales")
        elif name.removesuffix(SCALES) == name or name.removesuffix(SCALES) not in pairs:
            view[name] = tensor
    if config is None:
        return view, None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return view, {**plain, "quantization": MXFP4.to_dict()}


def published(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The inverse: MLX's `X.weight`, followed by its `X.scales`, as `X_blocks` and `X_scales`; the rest as it is."""
    words: Tensor | None = None
    for tensor in tensors:
        if tensor.dtype == "uint32":
            words = tensor
        elif words is not None:
            path = tensor.name.removesuffix(".scales")
            assert words.name == f"{path}.weight", f"{words.name} without its scales"
            yield _blocks(path + BLOCKS, words, tensor.shape)
            yield tensor.renamed(path + SCALES)
            words = None
        else:
            yield tensor


def _words(name: str, blocks: Tensor) -> Tensor:
    shape = (*blocks.shape[:-2], blocks.shape[-2] * GROUP_BYTES // 4)
    # A view of mapped pages, never a copy.
    return Tensor(name, shape, "uint32", lambda: np.ascontiguousarray(blocks.read()).view(np.uint32).reshape(shape))


def _blocks(name: str, words: Tensor, groups: tuple[int, ...]) -> Tensor:
    def as_bytes(value: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(value).view(np.uint8).reshape(len(value), *groups[1:], GROUP_BYTES)

    return Tensor(
        name,
        (*groups, GROUP_BYTES),
        "uint8",
        read=lambda: as_bytes(words.read()),
        stream=lambda: (as_bytes(block) for block in words.blocks()),
    )


def _check(path: str, blocks: Tensor, scales: Tensor) -> None:
    for tensor in (blocks, scales):
        if tensor.dtype != "uint8":
            raise InputError(f"expected {tensor.name} as uint8; found {tensor.dtype}; download or convert it again")
    if len(blocks.shape) < 3 or blocks.shape[-1] != GROUP_BYTES or blocks.shape[:-1] != scales.shape:
        raise InputError(
            f"expected {path}{BLOCKS} [..., rows, groups, {GROUP_BYTES}] beside {path}{SCALES} [..., rows, groups]; "
            f"found {list(blocks.shape)} and {list(scales.shape)}; download or convert it again"
        )
