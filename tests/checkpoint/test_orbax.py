"""Orbax checkpoints are written one tensor at a time, and `--force` knows which folders they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_gelu_gpt
from isomorph import InputError
from isomorph.checkpoint import check_target, open_checkpoint
from isomorph.convert import convert

pytest.importorskip("orbax.checkpoint")

COUNT, TENSOR_BYTES = 24, 16 << 20

#: What stands in memory when a tensor is read, first for a stream of tensors, then for tensors that are held.
PROBE = """
import sys
from pathlib import Path
import numpy as np
from isomorph.checkpoint.orbax_folder import write_orbax
from isomorph.checkpoint.tensor import Tensor

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folder, count, nbytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
held = None
seen = []

def read(index):
    value = np.full(nbytes // 4, index, np.float32)
    if held is not None:
        held.append(value)
    seen.append(anonymous())
    return value

tensors = [Tensor(f"a{i}.kernel", (nbytes // 4,), "float32", lambda i=i: read(i)) for i in range(count)]
write_orbax(folder / "0", tensors)
streamed = max(seen) - seen[0]
seen, held = [], []
write_orbax(folder / "1", tensors)
print(streamed, max(seen) - seen[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is in Linux's /proc")
def test_a_few_tensors_at_most_are_in_memory(tmp_path: Path) -> None:
    arguments = [str(tmp_path), str(COUNT), str(TENSOR_BYTES)]
    run = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    streamed, held = map(int, run.stdout.split())
    assert streamed < 8 * TENSOR_BYTES  # in flight: the value, compression, the file's buffers
    assert held > (COUNT - 8) * TENSOR_BYTES  # negative control
    tensors = open_checkpoint(tmp_path / "0" / "model", config={"model_type": "gelu_gpt"}).tensors
    assert {name: tensor.read()[0] for name, tensor in tensors.items()} == {f"a{i}.kernel": i for i in range(COUNT)}


def test_force_replaces_a_converted_folder_and_no_training_run(tmp_path: Path) -> None:
    source = tiny_gelu_gpt.write_checkpoint(tmp_path / "source", tiny_gelu_gpt.tiny_config(), seed=1)
    target = tmp_path / "target"
    convert(source, target, layout="orbax")
    with pytest.raises(InputError, match="force"):
        convert(source, target, layout="orbax")
    convert(source, target, layout="orbax", force=True)
    expected = open_checkpoint(source).tensors["model.wte.weight"].read()
    np.testing.assert_array_equal(open_checkpoint(target).tensors["wte.embedding"].read(), expected)
    (target / "0" / "optimizer").mkdir()  # what training keeps beside the weights
    with pytest.raises(InputError, match="folder 0"):
        check_target(target, force=True)


def test_what_an_interrupted_write_left_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_gelu_gpt.write_checkpoint(tmp_path / "source", tiny_gelu_gpt.tiny_config(), seed=1)
    monkeypatch.setattr("isomorph.checkpoint.writer.install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", layout="orbax")
    monkeypatch.undo()
    convert(source, tmp_path / "target", layout="orbax")
    assert open_checkpoint(tmp_path / "target").kind == "orbax"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
