"""The extension's CRC-32 is zlib's."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from isomorph.checkpoint import checksum
from isomorph.kernels.extension import find_extension

DATA = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 192, 1000, 4999])
@pytest.mark.parametrize("value", [0, 1, 0x12345678, 0xFFFFFFFF])
def test_any_length_and_beginning(length: int, value: int) -> None:
    for start in (0, 1):
        part = DATA[start : start + length]
        assert checksum.crc32(part, value) == zlib.crc32(part.tobytes(), value)


def test_parts_give_the_whole() -> None:
    value = 0
    for part in np.array_split(DATA, 7):
        value = checksum.crc32(part, value)
    assert value == zlib.crc32(DATA.tobytes())


def test_every_byte_counts() -> None:
    whole = checksum.crc32(DATA)
    for place in range(0, len(DATA), 7):
        changed = DATA.copy()
        changed[place] ^= 1
        assert checksum.crc32(changed) != whole


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "find_extension", lambda: None)
    assert checksum.crc32(DATA) == zlib.crc32(DATA.tobytes())


def test_only_whole_runs_are_folded() -> None:
    extension = find_extension()
    if extension is None:
        pytest.skip("the extension is not built")
    with pytest.raises(ValueError, match="multiple of 64"):
        extension.fold_crc32(DATA.ctypes.data, 65, 0)
