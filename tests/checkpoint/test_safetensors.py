"""Reading safetensors: agreement with the library on good files, one line of refusal for each way to be bad."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isomorph import InputError
from isomorph.checkpoint import NUMPY_DTYPES, from_array, safetensors_files, write_folder
from isomorph.checkpoint.safetensors_file import CODES, MAX_HEADER_BYTES, read_safetensors


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    names = draw(st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), unique=True))
    found = {}
    for name in names:
        dtype = NUMPY_DTYPES[draw(st.sampled_from(sorted(CODES)))]
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        content = draw(st.binary(min_size=size, max_size=size))
        found[name] = np.frombuffer(content, np.uint8).view(dtype).reshape(shape)
    return found


@settings(max_examples=60, deadline=None)
@given(values=tensors(), shard_bytes=st.sampled_from([1, 40, 10**9]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, values: dict, shard_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("round") / "model"
    files = safetensors_files([from_array(n, v) for n, v in values.items()], {"format": "pt"}, shard_bytes)
    write_folder(folder, files, {}, inputs=None)
    found = {}
    for file in files:
        content = read_safetensors(folder / file.name)
        assert content.metadata == {"format": "pt"}
        found |= content.tensors
        with safe_open(folder / file.name, "np") as library:
            assert set(library.keys()) == set(content.tensors)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].shape == value.shape
        assert found[name].read().dtype == value.dtype
        assert found[name].read().tobytes() == value.tobytes()
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(values)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
        assert index["metadata"]["total_parameters"] == sum(value.size for value in values.values())


def test_the_librarys_files_are_read_without_a_copy(tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, ml_dtypes.bfloat16)}
    save_file(values, tmp_path / "x.safetensors")
    content = read_safetensors(tmp_path / "x.safetensors")
    for name, value in values.items():
        array = content.tensors[name].read()
        np.testing.assert_array_equal(array, value)
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_writing_to_a_mapped_tensor_harms_neither_process_nor_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    before = path.read_bytes()
    array = read_safetensors(path).tensors["a"].read()
    ctypes.memset(array.ctypes.data, 0, array.nbytes)  # as torch does in place
    assert not array.any()
    assert path.read_bytes() == before


BAD_HEADERS = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "leave a gap"),
    "gap at the front": ({"a": entry(4, 8)}, 8, "leave a gap"),
    "beyond the end": ({"a": entry(0, 80)}, 8, "cut short"),
    "bytes after the data": ({"a": entry(0, 8)}, 12, "after the data"),
    "backwards": ({"a": entry(8, 0, [2])}, 8, "8 bytes"),
    "size unlike shape": ({"a": entry(0, 8, [3])}, 8, "12 bytes"),
    "negative shape": ({"a": entry(0, 8, [-2])}, 8, "non-negative"),
    "fractional shape": ({"a": entry(0, 8, [2.0])}, 8, "non-negative"),  # type: ignore[list-item]
    "boolean shape": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "non-negative"),
    "shape that overflows": ({"a": entry(0, 8, [2**62, 2**62, 4])}, 8, "bytes for"),
    "negative offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "non-negative"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, 8, "non-negative"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F33")}, 8, "F33"),
    "dtype that is not text": ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, "dtype"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
    "extra key": ({"a": {**entry(0, 8), "device": "cpu"}}, 8, "something else"),
    "entry that is a list": ({"a": [0, 8]}, 8, "something else"),
    "header that is a list": ([1, 2], 0, "a list"),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
    "metadata that is text": ({"__metadata__": "pt"}, 0, "__metadata__"),
    "not JSON": (b"{'a': 1}", 0, "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", 0, "not JSON"),
    "deeply nested": (b"[" * 100_000, 0, "not JSON"),
    "the same name twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 1 + b'"a":1}', 0, "twice"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    header, size, message = BAD_HEADERS[name]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(InputError, match=message) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_header_lengths_that_lie(tmp_path: Path) -> None:
    for length, message in ((MAX_HEADER_BYTES + 1, "at most"), (1000, "a file of"), (2**63, "at most")):
        with pytest.raises(InputError, match=message):
            read_safetensors(raw_file(tmp_path / "x.safetensors", {}, length=length))
    for size in (0, 7):
        (tmp_path / "x.safetensors").write_bytes(bytes(size))
        with pytest.raises(InputError, match="at least 8 bytes"):
            read_safetensors(tmp_path / "x.safetensors")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    read_safetensors(tmp_path / "x.safetensors")
    for length in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_safetensors(tmp_path / "x.safetensors")


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_changed_header_byte_is_refused_or_read_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flip.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)}, path)
    content = bytearray(path.read_bytes())
    content[position % (8 + int.from_bytes(content[:8], "little"))] = byte
    path.write_bytes(content)
    try:
        ours = read_safetensors(path)
    except InputError:
        return
    # What we accept, the library accepts, and reads the same.
    with safe_open(path, "np") as library:
        assert set(library.keys()) == set(ours.tensors)
        for name, tensor in ours.tensors.items():
            assert library.get_tensor(name).tobytes() == tensor.read().tobytes()


def test_the_library_refuses_what_we_refuse(tmp_path: Path) -> None:
    """A control on the attacks themselves: nearly all are faults by the format, not by our taste."""
    stricter = {"extra key", "the same name twice", "header that is a list", "boolean shape"}
    for name, (header, size, _) in BAD_HEADERS.items():
        path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
        if name not in stricter:
            with pytest.raises((SafetensorError, UnicodeDecodeError)), safe_open(path, "np"):
                pass


def test_a_file_that_vanishes_or_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    tensor = read_safetensors(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="expected 24 bytes"):
        tensor.read()
    path.unlink()
    tensor = read_safetensors_after(path)
    with pytest.raises(InputError, match="stay readable"):
        tensor.read()


def read_safetensors_after(path: Path) -> Any:
    save_file({"a": np.arange(6, dtype=np.float32)}, path)
    tensor = read_safetensors(path).tensors["a"]
    path.unlink()
    return tensor


def test_data_that_begins_at_an_odd_byte(tmp_path: Path) -> None:
    """Our writer and the library's pad the header to 8 bytes; others need not."""
    value = np.arange(5, dtype=np.float32)
    for padding in range(8):
        header = json.dumps({"a": entry(0, 20)}).encode() + b" " * padding
        path = raw_file(tmp_path / "x.safetensors", header, value.tobytes())
        np.testing.assert_array_equal(read_safetensors(path).tensors["a"].read(), value)
