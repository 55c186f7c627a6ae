"""gpt-oss at its real layer shapes, random weights: converted published -> mlx -> published, then decoded on the CPU.

Usage: python benchmarks/gpt_oss.py FOLDER [--layers 3] [--vocabulary 4096]

FOLDER/published is written when it is missing: 0.42 GB of MXFP4 a layer, 32 experts of 2880 x 2880. Each conversion is
a process of its own, whose peak of anonymous memory is printed (mapped files do not count); the result is compared with
the source byte by byte. Then `isomorph bench` in its own process. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from isomorph.architectures.gpt_oss.config import GptOssConfig
from isomorph.architectures.gpt_oss.weights import parameters
from isomorph.checkpoint import open_checkpoint
from quantize import timed


def write_published(folder: Path, config: GptOssConfig) -> None:
    """A random checkpoint in the published layout, one file a layer, so that one layer is in memory at a time."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    files: dict[str, str] = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    def floats(shape: tuple[int, ...]) -> np.ndarray:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return (random.standard_normal(shape, np.float32) * scale).astype(ml_dtypes.bfloat16)

    outer: dict[str, np.ndarray] = {}
    for name, shape in parameters(config).items():
        if ".layers." not in name:
            outer[name] = np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1 else floats(shape)
    save("model-outer.safetensors", outer)
    for layer in range(config.num_hidden_layers):
        at, experts = f"model.layers.{layer}.", f"model.layers.{layer}.mlp.experts"
        tensors = {
            name: np.ones(shape, ml_dtypes.bfloat16) if name.endswith("norm.weight") else floats(shape)
            for name, shape in parameters(config).items()
            if name.startswith(at) and ".experts." not in name
        }
        count, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        for part, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            shape = (count, rows, columns // 32)
            blocks = np.frombuffer(random.bytes(16 * int(np.prod(shape))), np.uint8)
            tensors[f"{experts}.{part}_blocks"] = blocks.reshape(*shape, 16)
            tensors[f"{experts}.{part}_scales"] = random.integers(117, 120, shape, np.uint8)
            tensors[f"{experts}.{part}_bias"] = floats((count, rows))
        save(f"model-{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    values = config.to_dict() | {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(values, indent=2))


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    first, second = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    return first.keys() == second.keys() and all(
        np.array_equal(tensor.read().view(np.uint8), second[name].read().view(np.uint8))
        for name, tensor in first.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    published = options.folder / "published"
    if not published.exists():
        write_published(published, GptOssConfig(num_hidden_layers=options.layers, vocab_size=options.vocabulary))
    isomorph = [sys.executable, "-m", "isomorph"]
    steps = {"mlx": ("published", "--to", "mlx"), "back": ("mlx", "--to", "transformers")}
    peaks = {}
    for target, (source, *to) in steps.items():
        shutil.rmtree(options.folder / target, ignore_errors=True)
        seconds, peak = timed([*isomorph, "convert", str(options.folder / source), str(options.folder / target), *to])
        peaks[target] = peak
        print(f"{source} -> {target}: {seconds:.1f} s, {peak / 1e6:.0f} MB of anonymous memory", file=sys.stderr)
    identical = same_bytes(published, options.folder / "back")
    command = [*isomorph, "bench", str(published), "--prompt", "128", "--tokens", "64", "--repetitions", "3", "--json"]
    bench = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(json.dumps({"identical": identical, "peak_bytes": peaks, "bench": json.loads(bench.stdout.splitlines()[-1])}))


if __name__ == "__main__":
    main()
