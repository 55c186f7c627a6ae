"""Layers as wide as the published ones, 32 experts each: converted and quantized in memory of one expert's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.test_memory import LINUX, PROBE, write_holes
from isomorph import architectures, port
from isomorph.architectures.gpt_oss.config import GptOssConfig
from isomorph.checkpoint import open_checkpoint
from isomorph.checkpoint.container import safetensors_files
from isomorph.checkpoint.mxfp4 import published

CALL = "convert(source, target, layout=layout, dtype=dtype or None)"
CALLS = {
    "convert": "convert(source, target)",
    "lossless": "quantize(source, target, recipe='lossless')",
    "exact": "quantize(source, target, 6, 32)",
    "rounded": "quantize(source, target, 6, 32, requantize=True)",
}

#: An expert's matrix, [5760, 2880] at most, as codes of a byte with temporaries, and scales and biases of 32.
BOUND_BYTES = 250e6


def sparse_layers(folder: Path) -> Path:
    """Two layers in the published layout whose weights are holes in the file."""
    config = GptOssConfig(num_hidden_layers=2, vocab_size=4096)
    folder.mkdir()
    quantization = {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | quantization))
    architecture = architectures.get("gpt_oss")
    assert architecture is not None
    promised = port.declared(open_checkpoint(folder), architecture, config).tensors.values()
    for container in safetensors_files(list(published(promised)), {}, 10**12):
        write_holes(folder / container.name, container)
    return folder


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("call", CALLS)
def test_real_layers_in_bounded_memory(call: str, tmp_path: Path) -> None:
    source = sparse_layers(tmp_path / "source")
    assert sum(path.stat().st_size for path in source.iterdir()) > 0.9e9
    assert CALL in PROBE
    probe = PROBE.replace(CALL, CALLS[call]).replace(
        "from isomorph.convert import convert", "from isomorph.convert import convert; from isomorph import quantize"
    )
    arguments = [str(source), str(tmp_path / "target"), "", "", ""]
    done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    print(call, (peak - before) / 1e6)
    assert peak - before < BOUND_BYTES
