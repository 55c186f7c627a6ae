"""A weight and its scalar gain as one matrix, and back, bit for bit.

Folding is what the model does at run time: `round(w * g)` in the weight's dtype, with g cast to it first. Rounding
loses w, so a folded folder carries a small file, `<module>_fold.npz`, from which w comes back exactly: the gain, and
for each element how many steps `round(w' / g)` is off. Without that file (published variants) unfolding gives gain 1.

The file: `gain` (raw bits), `gain_dtype`, `weight_dtype`, `codes` (2 bits an element, four to a byte, lowest first:
0 exact, 1 one step up, 2 one step down, 3 see exceptions) and `exceptions` (raw bits, in order). No pickles.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor
from isomorph.errors import InputError

#: Unsigned integers as wide as each dtype a head comes in.
BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}
EXCEPTION = 3
#: Bytes of a block that are worked on at a time: what is computed of them takes several times as many.
PIECE_BYTES = 1 << 20
#: Fixed, so that equal inputs give equal bytes.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def sidecar_name(name: str) -> str:
    """The file beside the weights for the folded tensor `name`: `lm_head.weight` -> `lm_head_fold.npz`."""
    return f"{name.removesuffix('.weight')}_fold.npz"


def folded(name: str, weight: Tensor, gain: Tensor) -> Tensor:
    """`round(weight * gain)` in the weight's dtype: what the model's forward pass multiplies with."""
    return weight.renamed(name).mapped(lambda block: multiply(block, gain.read()))


def unfolded(tensor: Tensor, names: Sequence[str], folder: Path | None) -> list[Tensor]:
    """Weight and gain whose fold is `tensor`: the originals when `folder` has the sidecar, else gain 1."""
    weight_name, gain_name = names
    path = folder / sidecar_name(tensor.name) if folder is not None else None
    if path is None or not path.is_file():
        one = np.ones(1, NUMPY_DTYPES[tensor.dtype])
        return [tensor.renamed(weight_name), Tensor(gain_name, (1,), tensor.dtype, lambda: one)]
    sidecar = read_sidecar(path)
    if sidecar.weight_dtype != tensor.dtype:
        raise InputError(
            f"expected {path} to belong to {tensor.name!r} of {tensor.dtype}; found one for {sidecar.weight_dtype}; "
            f"remove {path.name} to convert with gain 1"
        )

    def stream() -> Iterator[np.ndarray]:
        return sidecar.restored(tensor.blocks())

    return [
        Tensor(weight_name, tensor.shape, tensor.dtype, lambda: _gathered(tensor, stream()), stream),
        Tensor(gain_name, sidecar.gain.shape, str(sidecar.gain.dtype), lambda: sidecar.gain),
    ]


def _gathered(like: Tensor, blocks: Iterator[np.ndarray]) -> np.ndarray:
    whole = np.empty(like.shape, NUMPY_DTYPES[like.dtype])
    row = 0
    for block in blocks:
        whole[row : row + len(block)] = block
        row += len(block)
    return whole


def multiply(block: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """`round(block * gain)`, gain cast to the block's dtype first. A product of half-width floats is exact in fp32."""
    wide = _wide(block.dtype)
    with np.errstate(all="ignore"):
        return (block.astype(wide) * gain.astype(block.dtype).astype(wide)).astype(block.dtype)


def sidecar_writer(weight: Tensor, gain: Tensor) -> Callable[[Path], None] | None:
    """What writes the sidecar; None when unfolding needs none: the gain is 1 in the weight's own dtype."""
    if gain.dtype == weight.dtype and gain.read().astype(np.float64).tolist() == [1.0]:
        return None
    return lambda path: write_sidecar(path, weight, gain)


def write_sidecar(path: Path, weight: Tensor, gain: Tensor) -> None:
    """Write the file that restores `weight` and `gain` from their fold. Holds one block in memory at a time."""
    value = np.ascontiguousarray(gain.read())
    exceptions = 0

    def codes() -> Iterator[np.ndarray]:
        nonlocal exceptions
        pending = np.empty(0, np.uint8)
        for block in _pieces(weight.blocks()):
            code = _codes(block, value)
            exceptions += int(np.count_nonzero(code == EXCEPTION))
            pending = np.concatenate([pending, code])
            whole = len(pending) // 4 * 4
            yield _packed(pending[:whole])
            pending = pending[whole:]
        yield _packed(np.concatenate([pending, np.zeros(-len(pending) % 4, np.uint8)]))

    def excepted() -> Iterator[np.ndarray]:
        for block in _pieces(weight.blocks()) if exceptions else ():
            yield _bits(block)[_codes(block, value) == EXCEPTION]

    with zipfile.ZipFile(path, "w") as archive:
        _write_array(archive, "gain", value.shape, _bits(value).dtype, [_bits(value)])
        for key, name in (("gain_dtype", gain.dtype), ("weight_dtype", weight.dtype)):
            text = np.array(name)
            _write_array(archive, key, (), text.dtype, [text.reshape(1)])
        _write_array(archive, "codes", ((weight.size + 3) // 4,), np.dtype(np.uint8), codes())
        _write_array(archive, "exceptions", (exceptions,), np.dtype(BITS[weight.dtype]), excepted())


@dataclass(frozen=True)
class Sidecar:
    """A `*_fold.npz`: the gain, and the stream of corrections."""

    path: Path
    gain: np.ndarray
    weight_dtype: str

    def restored(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The weight, block by block, from the folded one. Raises InputError when the file is not this weight's."""
        with self._open() as archive:
            codes = _ArrayStream(archive, "codes", self.path)
            exceptions = _ArrayStream(archive, "exceptions", self.path)
            pending = np.empty(0, np.uint8)
            for block in _pieces(blocks):
                packed = codes.take((max(0, block.size - len(pending)) + 3) // 4)
                unpacked = (packed[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1)
                pending = np.concatenate([pending, unpacked])
                code, pending = pending[: block.size], pending[block.size :]
                excepted = exceptions.take(int(np.count_nonzero(code == EXCEPTION)))
                weight = _corrected(_divided(block, self.gain), code, excepted)
                if not np.array_equal(_bits(multiply(weight, self.gain)), _bits(block)):
                    raise self.foreign()
                yield weight
            if codes.left or exceptions.left:
                raise self.foreign()

    def _open(self) -> zipfile.ZipFile:
        with _parsing(self.path):
            return zipfile.ZipFile(self.path)

    def foreign(self) -> InputError:
        return InputError(
            f"expected {self.path} to belong to the weights beside it; found that it does not fit them; "
            f"remove {self.path.name} to convert with gain 1"
        )


def read_sidecar(path: Path) -> Sidecar:
    """Open a `*_fold.npz`. Raises InputError when it is damaged."""
    with _parsing(path), np.load(path, allow_pickle=False) as file:
        gain_dtype, weight_dtype = str(file["gain_dtype"]), str(file["weight_dtype"])
        bits = file["gain"]
        if gain_dtype not in BITS or weight_dtype not in BITS or bits.dtype != BITS[gain_dtype] or bits.shape != (1,):
            raise ValueError("unknown dtypes")
    return Sidecar(path, bits.view(NUMPY_DTYPES[gain_dtype]), weight_dtype)


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turns whatever a parser says of damaged bytes into an InputError: zip, zlib and numpy share no exception."""
    try:
        yield
    except Exception as error:
        detail = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InputError(
            f"expected a sidecar written by convert; found {path}, damaged ({detail[0][:100]}); "
            f"convert again, or remove {path.name} to convert with gain 1"
        ) from None


class _ArrayStream:
    """A one-dimensional .npy inside a zip, read from the front a piece at a time."""

    def __init__(self, archive: zipfile.ZipFile, key: str, path: Path) -> None:
        self.path = path
        with _parsing(path):
            self.file: IO[bytes] = archive.open(f"{key}.npy")
            version = np.lib.format.read_magic(self.file)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.file)
            if len(shape) != 1 or self.dtype.kind != "u":
                raise ValueError(f"{key} of shape {shape} and {self.dtype}")
        self.left = shape[0]

    def take(self, count: int) -> np.ndarray:
        """The next `count` elements."""
        with _parsing(self.path):
            data = self.file.read(count * self.dtype.itemsize)
            if len(data) != count * self.dtype.itemsize:
                raise ValueError("it ends early")
        self.left -= count
        return np.frombuffer(data, self.dtype)


def _write_array(archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], dtype: np.dtype, parts: Any) -> None:
    info = zipfile.ZipInfo(f"{key}.npy", ZIP_DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(info, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).tobytes())


def _pieces(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same rows, fewer at a time."""
    for block in blocks:
        rows = max(1, PIECE_BYTES // max(1, block[:1].nbytes))
        for start in range(0, len(block), rows):
            yield block[start : start + rows]


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)


def _divided(block: np.ndarray, gain: np.ndarray) -> np.ndarray:
    wide = _wide(block.dtype)
    with np.errstate(all="ignore"):
        return (block.astype(wide) / gain.astype(block.dtype).astype(wide)).astype(block.dtype)


def _codes(block: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """2-bit codes, uint8 [block.size]: how `block` differs from what dividing its fold gives."""
    guess = _ordered(_divided(multiply(block, gain), gain))
    actual = _ordered(block)
    codes = np.full(block.size, EXCEPTION, np.uint8)
    codes[actual == guess] = 0
    codes[actual == guess + 1] = 1
    codes[actual == guess - 1] = 2
    # At either end of the integers a step would wrap around.
    ends = np.iinfo(guess.dtype)
    codes[((guess == ends.max) | (guess == ends.min)) & (codes != 0)] = EXCEPTION
    return codes


def _corrected(guess: np.ndarray, codes: np.ndarray, exceptions: np.ndarray) -> np.ndarray:
    ordered = _ordered(guess)
    ordered[codes == 1] += 1
    ordered[codes == 2] -= 1
    unsigned = _unordered(ordered)
    if len(exceptions):
        unsigned[codes == EXCEPTION] = exceptions
    return unsigned.view(guess.dtype).reshape(guess.shape)


def _bits(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block).reshape(-1).view(BITS[str(block.dtype)])


def _ordered(block: np.ndarray) -> np.ndarray:
    """Float bits as integers in the order of the numbers, so that neighbours differ by one."""
    bits = _bits(block)
    top = bits.dtype.type(1) << bits.dtype.type(8 * bits.itemsize - 1)
    return np.where(bits & top, ~bits, bits | top)


def _unordered(ordered: np.ndarray) -> np.ndarray:
    top = ordered.dtype.type(1) << ordered.dtype.type(8 * ordered.itemsize - 1)
    return np.where(ordered & top, ordered ^ top, ~ordered)


def _packed(codes: np.ndarray) -> np.ndarray:
    quads = codes.reshape(-1, 4)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
