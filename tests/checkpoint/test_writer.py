"""Writing: whole or not at all, resumable after a kill, equal bytes either way, and careful with what is there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isomorph import InputError
from isomorph.checkpoint import Tensor, check_target, from_array, safetensors_files, torch_container, write_folder
from isomorph.checkpoint import writer as writing
from isomorph.checkpoint.target import _replaced_folder, partial_folder, size

COUNT = 6


def tensors(seed: int = 0) -> list[Tensor]:
    random = np.random.default_rng(seed)
    return [from_array(f"t{i}", random.normal(size=(50, 20)).astype(np.float32)) for i in range(COUNT)]


def containers(kind: str, values: list[Tensor]) -> Any:
    # Two tensors a shard.
    return [torch_container("model.pt", values)] if kind == "torch" else safetensors_files(values, {}, 8000)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


INTERRUPTED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_writer as test
from isomorph.checkpoint import writer, write_folder
from pathlib import Path

target, kind, last, how = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
original, calls = writer._write_tensor, []

def write_tensor(file, tensor, advance):
    calls.append(tensor.name)
    if len(calls) > last:
        # In the middle of a tensor, with what is written so far on its way to the disk.
        file.write(tensor.read().tobytes()[:1000])
        file.flush()
        if how == "kill":
            os.kill(os.getpid(), 9)
        raise KeyboardInterrupt
    return original(file, tensor, advance)

writer._write_tensor = write_tensor
try:
    write_folder(target, test.containers(kind, test.tensors()), {"config.json": b"{}"}, inputs="same")
finally:
    print(*calls)
"""


def interrupt(target: Path, kind: str, last: int, how: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(Path(__file__).parent), str(target), kind, str(last), how]
    return subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_an_interrupted_run_goes_on_and_gives_equal_bytes(
    tmp_path: Path, kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "whole", containers(kind, tensors()), {"config.json": b"{}"}, inputs="same")
    target = tmp_path / "cut"
    first = interrupt(target, kind, 3, how)
    assert first.returncode == -(signal.SIGKILL if how == "kill" else signal.SIGINT)
    assert not target.exists()
    # A second run is cut as well: it begins behind what the first one finished.
    assert interrupt(target, kind, 1, "interrupt").stdout.split() == ["t3", "t4"]
    written = []
    original = writing._write_tensor
    monkeypatch.setattr(writing, "_write_tensor", lambda f, t, a: (written.append(t.name), original(f, t, a))[1])
    write_folder(target, containers(kind, tensors()), {"config.json": b"{}"}, inputs="same")
    assert written == ["t4", "t5"]
    assert content(target) == content(tmp_path / "whole")
    assert leftovers(tmp_path) == ["cut", "whole"]


def test_damage_to_finished_parts_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "whole", containers("safetensors", tensors()), {}, inputs="same")
    target = tmp_path / "cut"
    interrupt(target, "safetensors", 4, "kill")
    partial = partial_folder(target)
    shard = sorted(partial.glob("*.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    write_folder(target, containers("safetensors", tensors()), {"config.json": b"{}"}, inputs="same")
    assert content(target).keys() - {"config.json"} == content(tmp_path / "whole").keys()
    assert all(content(target)[name] == data for name, data in content(tmp_path / "whole").items())


def test_a_run_cut_while_it_checks_what_is_there_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "cut"
    interrupt(target, "torch", 4, "kill")
    for checked in range(3):
        original, calls = writing._checksum, []

        def checksum(*arguments: Any, original: Any = original, calls: Any = calls, checked: int = checked) -> int:
            calls.append(arguments)
            if len(calls) > checked:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(writing, "_checksum", checksum)
            with pytest.raises(KeyboardInterrupt):
                write_folder(target, containers("torch", tensors()), {"config.json": b"{}"}, inputs="same")
    assert interrupt(target, "torch", 0, "interrupt").stdout.split() == ["t4"]


@pytest.mark.parametrize("change", ["inputs", "tensors", "journal", "extra"])
def test_nothing_of_another_plan_is_reused(tmp_path: Path, change: str) -> None:
    target = tmp_path / "cut"
    interrupt(target, "safetensors", 4, "kill")
    partial = partial_folder(target)
    values, inputs = tensors(), "same"
    if change == "inputs":
        values, inputs = tensors(1), "other"
    elif change == "tensors":
        values = tensors()[:3]
    elif change == "journal":
        (partial / ".journal").write_text("nonsense\n{")
    else:
        inputs = "other"
        (partial / "folder").mkdir()
        (partial / "notes.txt").write_text("x")
    write_folder(target, containers("safetensors", values), {}, inputs=inputs)
    write_folder(tmp_path / "whole", containers("safetensors", values), {}, inputs=inputs)
    assert content(target) == content(tmp_path / "whole")


def failing(error: BaseException) -> Tensor:
    def stream() -> Iterator[np.ndarray]:
        yield np.zeros((10, 20), np.float32)
        raise error

    return Tensor("t9", (50, 20), "float32", lambda: np.zeros((50, 20), np.float32), stream)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), InputError, "disk full"),
        (OSError(errno.EIO, "Input/output error"), InputError, "Input/output error"),
        (InputError("bad tensor"), InputError, "bad tensor"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_an_error_leaves_nothing_behind(
    tmp_path: Path, error: Exception, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        write_folder(tmp_path / "t", containers("safetensors", [*tensors(), failing(error)]), {}, inputs=None)
    assert leftovers(tmp_path) == []


def test_ctrl_c_leaves_only_the_hidden_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "t", containers("torch", [*tensors(), failing(KeyboardInterrupt())]), {}, inputs=None)
    assert leftovers(tmp_path) == [".t.isomorph-partial"]


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"expected 24\.\d kB free in .*; found 1\.0 kB"):
        write_folder(tmp_path / "t", containers("safetensors", tensors()), {}, inputs=None)
    assert leftovers(tmp_path) == []


FULL_DISK = """
import sys, shutil
from pathlib import Path
import numpy as np
from isomorph import InputError
from isomorph.checkpoint import from_array, safetensors_files, write_folder

place = Path(sys.argv[1])
usage = shutil.disk_usage(place)
if sys.argv[2] == "unforeseen":
    shutil.disk_usage = lambda path: usage._replace(free=10**12)
values = [from_array(f"t{i}", np.ones(100_000, np.float32)) for i in range(4)]
try:
    write_folder(place / "model", safetensors_files(values, {}), {}, inputs=None)
except InputError as error:
    print(error)
print("left:", *place.iterdir())
"""


@pytest.mark.parametrize("case", ["foreseen", "unforeseen"])
def test_a_disk_that_is_really_full(tmp_path: Path, case: str) -> None:
    """A file system of 1 MB of our own, in a namespace that ends with the process."""
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FULL_DISK, case]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    result = subprocess.run(command, capture_output=True, text=True)
    message, left = result.stdout.splitlines()
    assert ("disk full" if case == "unforeseen" else "free in") in message, result
    assert left == "left:"


def test_a_tensor_that_is_not_what_it_claimed_is_a_fault(tmp_path: Path) -> None:
    for claimed in (Tensor("x", (3,), "float32", lambda: np.ones(2, np.float32)),):
        with pytest.raises(ValueError, match="announced"):
            write_folder(tmp_path / "t", safetensors_files([claimed], {}), {}, inputs=None)
    wrong = Tensor("x", (2,), "float32", lambda: np.ones(2, np.int32))
    with pytest.raises(TypeError, match="announced"):
        write_folder(tmp_path / "t", safetensors_files([wrong], {}), {}, inputs=None)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "..", "a\\b", ""])
def test_no_file_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file names"):
        write_folder(tmp_path / "t", containers("safetensors", tensors()), {name: b""}, inputs=None)
    assert leftovers(tmp_path) == []


def test_the_index_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    original = writing._write_content
    monkeypatch.setattr(writing, "_write_content", lambda p, c: (order.append(p.name), original(p, c))[1])
    write_folder(tmp_path / "t", containers("safetensors", tensors()), {"config.json": b"", "a": b""}, inputs=None)
    assert order == ["config.json", "a", "model.safetensors.index.json"]
    # One file needs no index.
    write_folder(tmp_path / "u", safetensors_files(tensors(), {}), {}, inputs=None)
    assert leftovers(tmp_path / "u") == ["model.safetensors"]


def test_two_processes_do_not_write_one_target(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    reached = []

    def stream() -> Iterator[np.ndarray]:
        with pytest.raises(InputError, match="another at work"):
            write_folder(tmp_path / "t", containers("safetensors", tensors()), {}, inputs=None)
        reached.append(True)
        yield np.ones(3, np.float32)

    first = Tensor("x", (3,), "float32", lambda: np.ones(3, np.float32), stream)
    write_folder(tmp_path / "t", safetensors_files([first], {}), {}, inputs=None)
    assert reached
    assert leftovers(tmp_path) == ["t"]


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("old")
    return path


def test_an_existing_target_is_refused_without_force(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (model, tmp_path / "empty", tmp_path / "file", tmp_path / "dangling"):
        with pytest.raises(InputError, match="does not exist"):
            check_target(path, force=False)
    assert check_target(model, force=True) == model
    assert check_target(tmp_path / "empty", force=True) == tmp_path / "empty"


def test_force_replaces_models_only(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    nested = model_folder(tmp_path / "nested")
    (nested / ".git").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(model_folder(tmp_path / "model"))
    for name, message in (("photos", "no model"), ("nested", ".git"), ("file", "not one"), ("link", "not one")):
        with pytest.raises(InputError, match=message):
            check_target(tmp_path / name, force=True)
    with pytest.raises(InputError, match=r"writable folder|which is not one"):
        check_target(tmp_path / "file" / "below", force=True)
    with pytest.raises(InputError, match="give it a name"):
        check_target("/", force=True)


def test_a_target_that_holds_the_source_is_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    for source in (model, model / "model.safetensors"):
        with pytest.raises(InputError, match="apart from the source"):
            check_target(model, force=True, sources=[source])
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(InputError, match="apart from the source"):
        check_target(tmp_path / "link", force=True, sources=[model])
    check_target(tmp_path / "other", force=True, sources=[model])


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = check_target(model_folder(tmp_path / "model"), force=True)
    (target / "stale.json").write_text("x")
    write_folder(target, containers("safetensors", tensors())[:1], {"config.json": b"new"}, inputs=None)
    assert leftovers(tmp_path) == ["model"]
    assert "stale.json" not in leftovers(target)
    assert (target / "config.json").read_bytes() == b"new"


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def stream() -> Iterator[np.ndarray]:
        model_folder(tmp_path / "t")
        yield np.ones(3, np.float32)

    late = Tensor("x", (3,), "float32", lambda: np.ones(3, np.float32), stream)
    with pytest.raises(InputError, match="made meanwhile"):
        write_folder(tmp_path / "t", safetensors_files([late], {}), {"config.json": b"new"}, inputs=None)
    assert (tmp_path / "t" / "config.json").read_text() == "{}"
    assert leftovers(tmp_path / ".t.isomorph-partial") == ["config.json", "model.safetensors"]


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    model_folder(_replaced_folder(target))
    with pytest.raises(InputError, match="does not exist"):
        check_target(target, force=False)
    assert (target / "config.json").is_file()


def test_a_partial_folder_that_is_something_else(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    partial_folder(tmp_path / "t").symlink_to(elsewhere)
    with pytest.raises(InputError, match="something else"):
        write_folder(tmp_path / "t", containers("safetensors", tensors()), {}, inputs=None)
    assert (elsewhere / "precious").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="writable"):
            check_target(tmp_path / "x", force=False)
    finally:
        tmp_path.chmod(0o700)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 26_560_565_098, 5e15)] == ["0 B", "999 B", "1.0 kB", "26.6 GB", "5000.0 TB"]
