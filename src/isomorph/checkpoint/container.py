"""Weight files whose layout is known before any tensor is read: every value has its place, headers come last.

That makes writing a stream (one run of rows in memory), lets it go on after a kill, and gives equal bytes either way.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from isomorph.checkpoint.safetensors_file import CODES, header_of
from isomorph.checkpoint.tensor import Tensor
from isomorph.errors import InputError

#: Shards as large as the libraries' own, in bytes (huggingface_hub and mlx-lm: 5 GB).
MAX_SHARD_BYTES = 5_000_000_000

#: Stored value of each tensor in a torch file begins at a multiple of this, as torch does it.
TORCH_ALIGNMENT = 64

#: dtype name -> torch's storage class.
TORCH_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True)
class Container:
    """One weight file to be written: `slots` are (offset, tensor); `literals(checksums)` yields (offset, bytes) for
    everything else, once the CRC-32 of each slot is known. `nbytes` is the size of the finished file."""

    name: str
    slots: Sequence[tuple[int, Tensor]]
    literals: Callable[[Sequence[int]], Iterator[tuple[int, bytes]]]
    nbytes: int


def safetensors_files(
    tensors: Iterable[Tensor], metadata: Mapping[str, str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Container]:
    """`tensors`, in order, as model.safetensors or as shards of at most `max_shard_bytes` (or one larger tensor)."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if tensor.dtype not in CODES:
            raise InputError(f"expected dtypes that safetensors stores; found {tensor.dtype} of {tensor.name!r}")
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return [_safetensors_file("model.safetensors", shards[0], metadata)]
    return [
        _safetensors_file(f"model-{number:05}-of-{len(shards):05}.safetensors", shard, metadata)
        for number, shard in enumerate(shards, 1)
    ]


def index_of(files: Sequence[Container]) -> bytes:
    """`model.safetensors.index.json` of the shards."""
    tensors = [tensor for file in files for _, tensor in file.slots]
    document = {
        "metadata": {
            "total_size": sum(tensor.nbytes for tensor in tensors),
            "total_parameters": sum(tensor.size for tensor in tensors),
        },
        "weight_map": dict(sorted((tensor.name, file.name) for file in files for _, tensor in file.slots)),
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def _safetensors_file(name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Container:
    header = header_of(tensors, metadata)
    ends = list(accumulate((tensor.nbytes for tensor in tensors), initial=len(header)))
    return Container(name, list(zip(ends, tensors)), lambda checksums: iter([(0, header)]), ends[-1])


def torch_container(name: str, tensors: Iterable[Tensor], key: str | None = "model_state_dict") -> Container:
    """`tensors` as `torch.save({key: ...}, name)` would write them: a zip of a pickle and raw values.

    Without a `key` the tensors' own dictionary is the document.
    """
    tensors = list(tensors)
    entries: list[tuple[str, bytes | Tensor]] = [("data.pkl", _pickle(tensors, key)), ("byteorder", b"little")]
    entries += [(f"data/{key}", tensor) for key, tensor in enumerate(tensors)]
    entries.append(("version", b"3\n"))
    return _zip_file(name, [(f"archive/{entry}", content) for entry, content in entries])


def _pickle(tensors: Sequence[Tensor], outer: str | None) -> bytes:
    """The pickle, protocol 2, of `{outer: {name: tensor}}` with tensors as torch pickles them."""
    parts = [b"\x80\x02", b"" if outer is None else b"}" + _text(outer), b"}("]
    for key, tensor in enumerate(tensors):
        if tensor.dtype not in TORCH_STORAGES:
            raise InputError(f"expected dtypes that a torch file stores; found {tensor.dtype} of {tensor.name!r}")
        strides = list(accumulate(reversed(tensor.shape[1:]), lambda a, b: a * b, initial=1))[::-1]
        storage = f"ctorch\n{TORCH_STORAGES[tensor.dtype]}\n".encode()
        parts += [
            _text(tensor.name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            *(_text("storage"), storage, _text(str(key)), _text("cpu"), _integer(tensor.size), b"tQ"),
            _integer(0),
            *(b"(", *map(_integer, tensor.shape), b"t"),
            *(b"(", *map(_integer, strides if tensor.shape else []), b"t"),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u." if outer is None else b"us."])


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _zip_file(name: str, entries: Sequence[tuple[str, bytes | Tensor]]) -> Container:
    """A zip of stored entries with 64-bit sizes, every value aligned."""
    slots: list[tuple[int, Tensor]] = []
    places: list[tuple[str, int, int, int, bytes | Tensor]] = []
    end = 0
    for path, content in entries:
        # 30 fixed bytes, the path, 20 of 64-bit sizes and 4 that announce the padding.
        padding = -(end + 30 + len(path) + 20 + 4) % TORCH_ALIGNMENT
        start = end + 30 + len(path) + 20 + 4 + padding
        size = len(content) if isinstance(content, bytes) else content.nbytes
        places.append((path, end, padding, size, content))
        if isinstance(content, Tensor):
            slots.append((start, content))
        end = start + size

    def literals(checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        remaining = iter(checksums)
        directory = b""
        for path, begin, padding, size, content in places:
            checksum = zlib.crc32(content) if isinstance(content, bytes) else next(remaining)
            local = _local_header(path, checksum, size, padding)
            yield begin, local + (content if isinstance(content, bytes) else b"")
            directory += _directory_entry(path, checksum, size, begin)
        yield end, directory + _end_of_directory(len(places), len(directory), end)

    tail = sum(46 + len(path) + 28 for path, *_ in places) + 56 + 20 + 22
    return Container(name, slots, literals, end + tail)


#: Zip's fixed fields: version 4.5 (64-bit sizes), no flags, stored, 1 January 1980.
_FIXED = struct.pack("<HHHHH", 45, 0, 0, 0, 0x21)
_ELSEWHERE = 0xFFFFFFFF


def _local_header(path: str, checksum: int, size: int, padding: int) -> bytes:
    extra = struct.pack("<HHQQ", 1, 16, size, size) + struct.pack("<2sH", b"FB", padding) + bytes(padding)
    sizes = struct.pack("<IIIHH", checksum, _ELSEWHERE, _ELSEWHERE, len(path), len(extra))
    return b"PK\x03\x04" + _FIXED + sizes + path.encode() + extra


def _directory_entry(path: str, checksum: int, size: int, begin: int) -> bytes:
    extra = struct.pack("<HHQQQ", 1, 24, size, size, begin)
    sizes = struct.pack("<IIIHH", checksum, _ELSEWHERE, _ELSEWHERE, len(path), len(extra))
    place = struct.pack("<HHHII", 0, 0, 0, 0, _ELSEWHERE)
    return b"PK\x01\x02" + struct.pack("<H", 45) + _FIXED + sizes + place + path.encode() + extra


def _end_of_directory(count: int, size: int, begin: int) -> bytes:
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, begin)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, begin + size, 1)
    short = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, _ELSEWHERE, _ELSEWHERE, 0)
    return wide + locator + short
