"""Writing a model folder: a stream of blocks, atomic, and resumable after Ctrl-C, a kill or a power cut.

The folder is built beside the target. A journal there holds the plan's fingerprint and, for each tensor finished, its
CRC-32; a later run of the same plan checks those tensors against the journal and goes on behind the last good one.
Nothing in the result depends on whether it was interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import IO, Any

import numpy as np

from isomorph.checkpoint.ahead import ahead
from isomorph.checkpoint.checksum import crc32
from isomorph.checkpoint.container import Container, index_of
from isomorph.checkpoint.source import INDEX
from isomorph.checkpoint.target import check_free_space, install, partial_folder, size, sync
from isomorph.checkpoint.tensor import BLOCK_BYTES, NUMPY_DTYPES, Tensor
from isomorph.errors import InputError
from isomorph.progress import Advance, progress

JOURNAL = ".journal"

#: A file beside the weights: its bytes, a file to copy, or a function that writes it at the path it is given.
Content = bytes | Path | Callable[[Path], None]


def write_folder(
    target: Path,
    weights: Sequence[Container],
    files: Mapping[str, Content],
    *,
    inputs: Any,
    description: str = "writing",
) -> None:
    """Write `weights`, then `files`, then the index, into a new folder `target` (as `check_target` returned it).

    `inputs` is JSON that says everything the values depend on (source files, options): what is there of an earlier
    run is reused only when it is the same. A tensor's blocks are read once and never kept. Raises InputError when the
    disk is full; then, as after any error, nothing is left behind. After Ctrl-C the unfinished folder stays, hidden.
    """
    for name in (*(file.name for file in weights), *files):
        if not name or Path(name).name != name or name == ".." or "\\" in name:
            raise ValueError(f"expected plain file names, found {name!r}")
    total = sum(file.nbytes for file in weights)
    if len(weights) > 1:
        files = {**files, INDEX: index_of(weights)}
    partial, replaces = partial_folder(target), target.exists()
    with _disk_errors(target, total), _claimed(partial) as journal:
        finished = _resumed(journal, partial, _fingerprint(weights, files, inputs))
        try:
            # What an earlier run wrote takes no new room; the files have holes where it wrote nothing.
            present = sum(512 * path.stat().st_blocks for path in partial.iterdir() if path.name != JOURNAL)
            check_free_space(target, total - present)
            with progress(description, total, unit="bytes") as advance:
                for file in weights:
                    _write_container(partial / file.name, file, journal, finished, advance)
            for name, content in files.items():
                _write_content(partial / name, content)
            sync(partial)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        os.unlink(partial / JOURNAL)
        install(partial, target, replaces)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def file_identity(paths: Sequence[Path]) -> list[list[Any]]:
    """What tells whether files are still the same: absolute path, size in bytes, time of change in nanoseconds."""
    facts = [(str(path.resolve()), path.stat()) for path in paths]
    return [[path, status.st_size, status.st_mtime_ns] for path, status in facts]


def _fingerprint(weights: Sequence[Container], files: Mapping[str, Content], inputs: Any) -> str:
    plan = {
        "inputs": inputs,
        "weights": [
            [file.name, file.nbytes, [[t.name, t.dtype, list(t.shape), at] for at, t in file.slots]] for file in weights
        ],
        "files": list(files),
    }
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


@contextmanager
def _claimed(partial: Path) -> Iterator[IO[str]]:
    """The journal of `partial`, made when missing, locked against another process that writes the same target."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise InputError(f"expected to build in {partial}; found something else there; remove it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"expected a target in a writable folder; found {partial.parent}: {error.strerror}; choose another"
        ) from None
    with (partial / JOURNAL).open("a+", encoding="utf-8") as journal:
        try:
            import fcntl

            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:
            pass  # Not on this system: two writers of one target are then the user's to avoid.
        except OSError:
            raise InputError(f"expected one process to write {partial}; found another at work; wait for it") from None
        yield journal


def _resumed(journal: IO[str], partial: Path, fingerprint: str) -> dict[tuple[str, int], int]:
    """CRC-32 of each finished slot by (file name, offset); none, with a clean folder, when the plan is another."""
    journal.seek(0)
    lines = journal.read().splitlines()
    finished = {}
    if lines and lines[0] == fingerprint:
        for line in lines[1:]:
            try:
                name, offset, checksum = json.loads(line)
                finished[name, offset] = checksum
            except (ValueError, TypeError):
                break  # A torn last line.
    else:
        for entry in partial.iterdir():
            if entry.name != JOURNAL:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    journal.seek(0)
    journal.truncate()
    journal.write("\n".join([fingerprint, *(_line(*key, checksum) for key, checksum in finished.items())]) + "\n")
    journal.flush()
    return finished


def _line(name: str, offset: int, checksum: int) -> str:
    return json.dumps([name, offset, checksum])


def _write_container(
    path: Path, container: Container, journal: IO[str], finished: Mapping[tuple[str, int], int], advance: Advance
) -> None:
    checksums = {}
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(container.nbytes)
        for offset, tensor in container.slots:
            checksum = finished.get((container.name, offset))
            if checksum is not None and checksum == _checksum(file, offset, tensor.nbytes):
                checksums[offset] = checksum
                advance(tensor.nbytes)
        missing = [(offset, tensor) for offset, tensor in container.slots if offset not in checksums]
        # Tensors behind one another, each with None at its end: what comes next is made while the last is written.
        made = chain.from_iterable(chain(tensor.blocks(), [None]) for _, tensor in missing)
        with ThreadPoolExecutor(1) as disk, closing(ahead(made)) as stream:
            flushed = disk.submit(os.fsync, file.fileno())
            for offset, tensor in missing:
                if flushed.done():  # The disk takes its time beside the processor's, not after it.
                    flushed.result()
                    flushed = disk.submit(os.fsync, file.fileno())
                file.seek(offset)
                coming = replace(tensor, stream=lambda: takewhile(lambda block: block is not None, stream))
                checksums[offset] = _write_tensor(file, coming, advance)
                file.flush()
                journal.write(_line(container.name, offset, checksums[offset]) + "\n")
                journal.flush()
        for offset, data in container.literals([checksums[offset] for offset, _ in container.slots]):
            file.seek(offset)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: IO[bytes], tensor: Tensor, advance: Advance) -> int:
    """Write the tensor's bytes and return their CRC-32; a tensor that is not what it claimed is a fault of the code."""
    checksum = written = 0
    for block in tensor.blocks():
        if block.dtype != NUMPY_DTYPES[tensor.dtype]:
            raise TypeError(f"{tensor.name!r} was announced as {tensor.dtype} and came as {block.dtype}")
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        for start in range(0, len(data), BLOCK_BYTES):
            piece = data[start : start + BLOCK_BYTES]
            file.write(piece.data)
            checksum = crc32(piece, checksum)
            written += len(piece)
            advance(len(piece))
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name!r} was announced with {tensor.nbytes} bytes and came with {written}")
    return checksum


def _checksum(file: IO[bytes], offset: int, nbytes: int) -> int:
    file.seek(offset)
    checksum = 0
    while nbytes and (piece := file.read(min(nbytes, BLOCK_BYTES))):
        checksum = crc32(np.frombuffer(piece, np.uint8), checksum)
        nbytes -= len(piece)
    return checksum


def _write_content(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    elif isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    sync(path)


@contextmanager
def _disk_errors(target: Path, total: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"expected {size(total)} of room for {target}; found the disk full; free some space and run it again"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO):
            raise InputError(f"expected to write {target}; found: {error.strerror}; choose another target") from None
        raise
