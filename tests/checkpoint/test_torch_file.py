"""Original torch files: every form is read, no code is run, and what we write is what torch reads."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isomorph import InputError
from isomorph.checkpoint import from_array, open_checkpoint, torch_container, write_folder
from isomorph.checkpoint.torch_file import read_torch

torch = pytest.importorskip("torch")

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)}


def saved(path: Path, document: Any, **options: Any) -> Path:
    torch.save(document, path, **options)
    return path


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"model_state_dict": w, "step": 3}])
@pytest.mark.parametrize("rename", ["{}", "_orig_mod.{}", "b._orig_mod.{}"])
def test_every_form_is_read(tmp_path: Path, wrap: Any, rename: str) -> None:
    state = {rename.format(name): value for name, value in WEIGHTS.items()}
    found = read_torch(saved(tmp_path / "x.pt", wrap(state)))
    expected = {rename.format(name).replace("_orig_mod.", ""): value for name, value in WEIGHTS.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == tuple(value.shape)
        assert found[name].dtype == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].read().astype(np.float32), value.float().numpy())


def test_what_is_not_a_tensor_is_ignored_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "isomorph"):
        found = read_torch(saved(tmp_path / "x.pt", {"model": {**WEIGHTS, "step": 3, "name": "x"}}))
    assert found.keys() == WEIGHTS.keys()
    assert "'step' is a int" in caplog.text
    assert "'name' is a str" in caplog.text


def test_legacy_files_and_shared_or_strided_tensors(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    state = {"a": matrix, "transposed": matrix.T, "row": matrix[1]}
    for name, options in (("new.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        found = read_torch(saved(tmp_path / name, state, **options))
        for key, value in state.items():
            np.testing.assert_array_equal(found[key].read(), value.numpy())


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    trap = tmp_path / "trap"
    path = saved(tmp_path / "x.pt", {"a": Payload(str(trap))}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="asks to run code") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    # The control: this file does run code when it is unpickled without care.
    torch.load(path, weights_only=False)
    assert trap.is_dir()


def test_a_bare_pickle_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": Payload(str(tmp_path / "trap"))}))
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "trap").exists()


def damaged_files() -> dict[str, bytes]:
    import io

    buffer = io.BytesIO()
    torch.save({"model": WEIGHTS}, buffer)
    whole = buffer.getvalue()
    return {
        "empty": b"",
        "text": b"not a checkpoint",
        "zeros": bytes(1000),
        "truncated": whole[: len(whole) // 2],
        "no directory": whole[:-22],
        "another zip": another_zip(),
    }


def another_zip() -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.pt").write_bytes(damaged_files()[name])
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    assert "x.pt" in str(caught.value)


def test_changed_bytes_are_refused_in_one_line_or_read(tmp_path: Path) -> None:
    import random

    path = saved(tmp_path / "x.pt", {"model": WEIGHTS})
    whole, dice = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(dice.choice([1, 3])):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            for tensor in read_torch(path).values():
                tensor.read()
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, 2], "a list"),
        (torch.ones(2), "a Tensor"),
        ({}, "found none"),
        ({"model": {}}, "found none"),
        ({"step": 1}, "found none"),
        ({"a": torch.ones(2), "_orig_mod.a": torch.ones(2)}, "twice"),
        ({"a": torch.ones(2).to_sparse()}, "dense"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "plain dtypes"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_torch(saved(tmp_path / "x.pt", document))


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    values = {
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0, 4), np.float16),
        "cube": np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        "wide": np.arange(40_000, dtype=np.float32).reshape(200, 200),
        "odd": np.arange(3, dtype=np.uint8),
        "x" * 300: np.array([True, False]),
    }
    container = torch_container("model.pt", [from_array(name, value) for name, value in values.items()])
    write_folder(tmp_path / "model", [container], {}, inputs=None)
    path = tmp_path / "model" / "model.pt"
    document = torch.load(path, weights_only=True, mmap=mmap)
    assert list(document) == ["model_state_dict"]
    state = document["model_state_dict"]
    assert list(state) == list(values)
    for name, value in values.items():
        assert state[name].is_contiguous()
        np.testing.assert_array_equal(state[name].numpy(), value)
    # As a zip it is sound as well: every checksum is right and every value aligned.
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for offset, _ in container.slots:
        assert offset % 64 == 0


def test_a_dtype_that_torch_files_lack_is_refused() -> None:
    with pytest.raises(InputError, match="uint32"):
        torch_container("model.pt", [from_array("a", np.ones(2, np.uint32))])
