"""Conversion holds one tensor at most: its peak of anonymous memory, measured in a process of its own.

Mapped file pages are not counted (`RssAnon`): the system drops them when it needs the room.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isomorph import architectures
from isomorph.checkpoint.container import Container, safetensors_files, torch_container
from isomorph.checkpoint.tensor import Tensor
from isomorph.convert import convert
from tiny import tiny_config

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is in Linux's /proc")

LAYOUTS = ("original", "transformers", "transformers-folded", "mlx-lm", "mlx-folded", "flax")

PROBE = """
import sys, threading, time
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

from isomorph.convert import convert
source, target, layout, dtype, hold = sys.argv[1:]
if source.endswith(".pt") or list(Path(source).glob("*.pt")):
    import torch  # What the library itself takes is not the stream's.
base = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
if hold == "hold":
    from isomorph.checkpoint import open_checkpoint
    held = [tensor.read().copy() for tensor in open_checkpoint(source).tensors.values()]
else:
    convert(source, target, layout=layout, dtype=dtype or None)
done.set()
watcher.join()
print(base, max(peak, anonymous()))
"""


def unread() -> np.ndarray:
    raise AssertionError("only the header is written")


def sparse_checkpoint(folder: Path, layout: str = "transformers", **overrides: object) -> Path:
    """A Talkie whose weights are holes in the file: any size, at the price of a header. Returns what to convert."""
    values = tiny_config(dtype="bfloat16", torch_dtype="bfloat16", **overrides)
    architecture = architectures.get("talkie")
    assert architecture is not None
    shapes = architecture.parameters(architecture.config_class.from_dict(values))
    names = {name: name if layout == "transformers" else name.removeprefix("model.") for name in shapes}
    tensors = [Tensor(names[name], shape, "bfloat16", unread) for name, shape in shapes.items()]
    folder.mkdir()
    original = layout == "original"
    containers = [torch_container("model.pt", tensors)] if original else safetensors_files(tensors, {}, 10**12)
    (folder / "config.json").write_text(json.dumps(values))
    for container in containers:
        write_holes(folder / container.name, container)
    return folder / "model.pt" if original else folder


def write_holes(path: Path, container: Container) -> None:
    with path.open("wb") as file:
        file.truncate(container.nbytes)
        for offset, data in container.literals([0] * len(container.slots)):
            file.seek(offset)
            file.write(data)


def peak_anonymous_bytes(
    source: Path, target: Path, layout: str, dtype: str = "", hold: bool = False
) -> tuple[int, int]:
    """(before, peak) of anonymous memory while converting, in a fresh process."""
    arguments = [str(source), str(target), layout, dtype, "hold" if hold else ""]
    result = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    before, peak = result.stdout.split()
    return int(before), int(peak)


#: 218 MB of weights, a head of 67 MB: holding more than a few blocks shows.
MIDDLING = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 128,
}
#: Blocks in flight, in several dtypes at once, whatever the size of the model.
BOUND_BYTES = 120e6

PUBLISHED = {
    "vocab_size": 65540,
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_attention_heads": 40,
    "head_dim": 128,
}


@LINUX
@pytest.mark.parametrize(
    ("source", "target", "dtype"),
    [("transformers", "mlx-folded", ""), ("original", "flax", ""), ("original", "transformers-folded", "float32")],
)
def test_the_peak_is_a_few_blocks(tmp_path: Path, source: str, target: str, dtype: str) -> None:
    model = sparse_checkpoint(tmp_path / "source", source, **MIDDLING)
    before, peak = peak_anonymous_bytes(model, tmp_path / "target", target, dtype)
    assert peak - before < BOUND_BYTES


@LINUX
def test_holding_every_tensor_is_noticed(tmp_path: Path) -> None:
    model = sparse_checkpoint(tmp_path / "source", **MIDDLING)
    before, peak = peak_anonymous_bytes(model, tmp_path / "target", "mlx-lm", hold=True)
    assert peak - before > 1.5 * BOUND_BYTES


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("source", LAYOUTS)
def test_the_peak_of_every_pair(tmp_path: Path, source: str) -> None:
    model = sparse_checkpoint(tmp_path / "sparse", **MIDDLING)
    convert(model, tmp_path / "source", layout=source)
    for target in LAYOUTS:
        # Casting up is the harder case: blocks of both dtypes at once.
        before, peak = peak_anonymous_bytes(tmp_path / "source", tmp_path / "target", target, "float32")
        assert peak - before < BOUND_BYTES, target
        shutil.rmtree(tmp_path / "target")


@LINUX
@pytest.mark.full
@pytest.mark.parametrize(
    ("source", "target", "layers", "dtype"),
    [
        ("transformers", "mlx-folded", 11, ""),
        ("original", "flax", 11, ""),
        ("original", "transformers-folded", 5, "float32"),
    ],
)
def test_eight_gigabytes(tmp_path: Path, source: str, target: str, layers: int, dtype: str) -> None:
    """The published widths, 8 GB written, under 1.5 GB of anonymous memory all in all."""
    model = sparse_checkpoint(tmp_path / "source", source, **PUBLISHED, num_hidden_layers=layers)
    _, peak = peak_anonymous_bytes(model, tmp_path / "target", target, dtype)
    written = sum(path.stat().st_size for path in (tmp_path / "target").iterdir())
    shutil.rmtree(tmp_path / "target")
    assert written > 8e9
    assert peak < 1.5e9
