"""Quantizing holds a few blocks and the scales of one matrix, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.test_memory import LINUX, MIDDLING, PROBE, PUBLISHED, sparse_checkpoint

#: The same probe, with `quantize` in place of `convert`.
QUANTIZE = PROBE.replace("isomorph.convert import convert", "isomorph.quantize.write import quantize").replace(
    "convert(source, target, layout=layout, dtype=dtype or None)", "quantize(source, target, bits=int(layout))"
)
assert PROBE.count("convert") == 3 and "convert" not in QUANTIZE

#: Blocks in flight on every core, with their codes and temporaries, and the scales and biases of one matrix.
BOUND_BYTES = 80e6


def peak_anonymous_bytes(source: Path, target: Path, bits: int, hold: bool = False) -> tuple[int, int]:
    """(before, peak) of anonymous memory while quantizing, in a fresh process."""
    arguments = [str(source), str(target), str(bits), "", "hold" if hold else ""]
    result = subprocess.run([sys.executable, "-c", QUANTIZE, *arguments], capture_output=True, text=True, check=True)
    before, peak = result.stdout.split()
    return int(before), int(peak)


@LINUX
def test_the_peak_is_a_few_blocks(tmp_path):
    model = sparse_checkpoint(tmp_path / "source", **MIDDLING)
    before, peak = peak_anonymous_bytes(model, tmp_path / "target", 8)
    assert (tmp_path / "target" / "model.safetensors").stat().st_size > 100e6
    assert peak - before < BOUND_BYTES
    # The negative control: holding the tensors shows.
    before, peak = peak_anonymous_bytes(model, tmp_path / "other", 8, hold=True)
    assert peak - before > 2 * BOUND_BYTES


@LINUX
@pytest.mark.full
def test_eight_gigabytes(tmp_path):
    """The published widths: at most 1 GB, whatever the number of blocks."""
    model = sparse_checkpoint(tmp_path / "source", **PUBLISHED, num_hidden_layers=11)
    _, peak = peak_anonymous_bytes(model, tmp_path / "target", 4)
    assert sum(path.stat().st_size for path in (tmp_path / "target").iterdir()) > 2.2e9
    assert peak < 1e9
