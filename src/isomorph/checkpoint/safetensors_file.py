"""Reading one safetensors file: a strictly checked header, then memory-mapped views.

Format: 8 bytes little-endian header length, JSON header `name -> {dtype, shape, data_offsets}`, data without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor
from isomorph.errors import InputError

#: The format's code -> dtype name.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
CODES = {name: code for code, name in DTYPES.items()}

MAP_NORESERVE = 0x4000  # Linux; Python 3.13 has it in mmap

#: Longest header the format allows, in bytes.
MAX_HEADER_BYTES = 100_000_000

REPAIR = "download or convert it again"


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked file: its tensors in the order of their data, and the header's metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafetensorsFile:
    """Check `path` and return its lazily read tensors. Raises InputError for every way a file can be damaged."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise _damaged(path, "at least 8 bytes", f"{file_bytes}")
            if header_bytes > MAX_HEADER_BYTES:
                raise _damaged(path, f"a header of at most {MAX_HEADER_BYTES} bytes", f"{header_bytes}")
            if 8 + header_bytes > file_bytes:
                raise _damaged(path, f"a header of {header_bytes} bytes", f"a file of {file_bytes}")
            raw = file.read(header_bytes)
    except OSError as error:
        raise InputError(f"expected a readable safetensors file; found {path}: {error.strerror}; {REPAIR}") from None
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ of strings", "something else")
    data = _Data(path, 8 + header_bytes)
    entries = sorted(
        (_entry(path, name, entry) for name, entry in header.items()), key=lambda entry: (entry.begin, entry.end)
    )
    end = 0
    for entry in entries:
        if entry.begin != end:
            what = "overlap" if entry.begin < end else "leave a gap"
            raise _damaged(path, f"tensor data of {entry.name!r} to begin at byte {end}", f"{entry.begin}: they {what}")
        end = entry.end
    if 8 + header_bytes + end != file_bytes:
        what = "the file is cut short" if 8 + header_bytes + end > file_bytes else "there are bytes after the data"
        raise _damaged(path, f"{8 + header_bytes + end} bytes", f"{file_bytes}: {what}")
    tensors = {entry.name: Tensor(entry.name, entry.shape, entry.dtype, data.reader(entry)) for entry in entries}
    return SafetensorsFile(path, tensors, metadata)


def header_of(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and header of a file that holds `tensors` in this order, padded to 8 bytes."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        document[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Data:
    """The data part of a file, mapped when first read."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset = path, offset
        self.bytes: np.ndarray | None = None

    def reader(self, entry: _Entry) -> Any:
        def read() -> np.ndarray:
            if self.bytes is None:
                try:
                    self.bytes = _mapped(self.path)
                except (OSError, ValueError) as error:
                    raise InputError(f"expected {self.path} to stay readable; found: {error}; {REPAIR}") from None
            start = self.offset
            view = self.bytes[start + entry.begin : start + entry.end]
            if view.nbytes != entry.end - entry.begin:
                raise _damaged(self.path, f"{entry.end - entry.begin} bytes of {entry.name!r}", f"{view.nbytes}")
            return np.asarray(view).view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

        return read


def _mapped(path: Path) -> np.ndarray:
    """The file's bytes, mapped: pages are the page cache's own until somebody writes to them, then private copies.

    Arrays say that they are read-only, but torch knows no read-only memory: writing to it would end the process.
    """
    # Linux would count private pages against its memory, which a checkpoint may exceed.
    flags = mmap.MAP_PRIVATE | (MAP_NORESERVE if sys.platform == "linux" else 0)
    with path.open("rb") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE), np.uint8)
    array.flags.writeable = False
    return array


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise _damaged(path, "each name once in the header", f"{key!r} twice")
            seen[key] = value
        return seen

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise _damaged(path, "a JSON header", "bytes that are not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "a JSON object as header", f"a {type(header).__name__}")
    return header


def _entry(path: Path, name: str, entry: Any) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"dtype, shape and data_offsets of {name!r}", "something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"expected a dtype of {', '.join(DTYPES)}; found {dtype!r} of {name!r} in {path}; {REPAIR}")
    whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not whole or not all(type(value) is int and 0 <= value < 2**63 for value in [*shape, *offsets]):
        raise _damaged(path, f"non-negative integers as shape and data_offsets of {name!r}", f"{shape} and {offsets}")
    begin, end = offsets
    wanted = math.prod(shape) * NUMPY_DTYPES[DTYPES[dtype]].itemsize
    if end - begin != wanted:
        raise _damaged(path, f"{wanted} bytes for {name!r} {dtype} {shape}", f"{end - begin}")
    return _Entry(name, DTYPES[dtype], tuple(shape), begin, end)


def _damaged(path: Path, expected: str, found: str) -> InputError:
    return InputError(f"damaged safetensors file {path}: expected {expected}; found {found}; {REPAIR}")
