"""How fast weights are quantized, in memory and as a whole process, side by side with MLX, interleaved.

    python benchmarks/quantize.py [--rows 11008] [--columns 4096] [--repetitions 7] [--dtype bfloat16]
    python benchmarks/quantize.py --process [FOLDER] [--repetitions 3] [--record FILE]

In memory: isomorph's C++, its numpy and `mx.quantize`, in GB of input a second; results are checked to be equal. With
`--process`: `isomorph quantize` and `mlx_lm.convert -q` of a bfloat16 checkpoint, from start to exit, page cache warm,
both with their bytecode cached. FOLDER must have a tokenizer; without it a random model of 0.94 billion weights is
made. A run during which others took a tenth of a processor or more is run again; with `--record` the pairs are added to
FILE, and all in it count. The last line is one JSON document; ratios are medians of interleaved pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from neighbours import undisturbed

from isomorph.kernels.extension import find_extension
from isomorph.quantize import arrays, native, portable
from isomorph.quantize.settings import Settings
from isomorph.quantize.threads import core_count

CASES = [Settings(bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [Settings.of(mode=m) for m in ("mxfp4", "mxfp8", "nvfp4")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--process", type=Path, nargs="?", const="", metavar="FOLDER")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.process is None:
        result = in_memory(options.rows, options.columns, options.dtype, options.repetitions or 7)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            source = options.process if options.process.name else random_checkpoint(Path(scratch) / "source")
            result = whole_process(source, Path(scratch), options.repetitions or 3, options.record)
    backend = find_extension().backend() if native.available() else "none"
    processor = platform.processor() or platform.machine()
    print(json.dumps({"machine": {"cores": core_count(), "processor": processor, "kernels": backend}, **result}))


def in_memory(rows: int, columns: int, dtype: str, repetitions: int) -> dict[str, Any]:
    """GB/s of each way to quantize one matrix, by settings."""
    import mlx.core as mx

    weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32) * 0.02
    weight = weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    bits = mx.array(weight.view(np.uint16)) if dtype == "bfloat16" else mx.array(weight)
    theirs = bits.view(mx.bfloat16) if dtype == "bfloat16" else bits

    def ours(codec: Any, settings: Settings) -> np.ndarray:
        arrays._codec = lambda: codec
        return arrays.quantize_array(weight, settings).weight

    def mlx(settings: Settings) -> np.ndarray:
        parts = mx.quantize(theirs, settings.group_size, settings.bits, mode=settings.mode)
        mx.eval(parts)
        return np.array(parts[0])

    ways: dict[str, Callable[[Settings], np.ndarray]] = {"mlx": mlx, "numpy": lambda s: ours(portable, s)}
    if native.available():
        ways["c++"] = lambda s: ours(native, s)
    results = []
    for settings in CASES:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repetitions):
            words = {}
            for name, way in ways.items():
                start = time.perf_counter()
                words[name] = way(settings)
                seconds[name].append(time.perf_counter() - start)
            assert all(np.array_equal(found, words["mlx"]) for found in words.values()), settings
        speeds = {name: weight.nbytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
        ratios = {name: ratio(seconds["mlx"], times) for name, times in seconds.items() if name != "mlx"}
        results.append({**settings.to_dict(), "gigabytes_per_second": speeds, "ratios_to_mlx": ratios})
        shown = "   ".join(f"{name} {speed:5.2f} GB/s" for name, speed in speeds.items())
        print(f"{settings.mode} {settings.bits}-bit, groups of {settings.group_size:<4} {shown}   {ratios}")
    return {"shape": list(weight.shape), "dtype": dtype, "mlx": mx.__version__, "rows": results}


def whole_process(source: Path, scratch: Path, repetitions: int, record: Path | None) -> dict[str, Any]:
    """Seconds, GB/s of input and peak memory of both commands, 4 bits in groups of 64."""
    weights = sorted(source.glob("*.safetensors"))
    nbytes = sum(path.stat().st_size for path in weights)
    timed(own_command(source, scratch / "target"))  # Weights into the page cache, modules to bytecode.
    pairs = [] if record is None or not record.is_file() else list(map(json.loads, record.read_text().splitlines()))
    for _ in range(repetitions):
        pairs.append(pair := one_pair(source, scratch / "target"))
        if record is not None:
            with record.open("a") as file:
                file.write(json.dumps(pair) + "\n")
    seconds = {name: [pair[name][0] for pair in pairs] for name in ("isomorph", "mlx_lm")}
    rows = {
        name: {
            "seconds": times,
            "gigabytes_per_second": nbytes / statistics.median(times) / 1e9,
            "peak_anonymous_bytes": max(pair[name][1] for pair in pairs),
        }
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f} s"
        peak = f"{row['peak_anonymous_bytes'] / 1e6:.0f} MB of anonymous memory"
        print(f"{name:10} {row['gigabytes_per_second']:5.2f} GB/s   {spread}   {peak}")
    faster = ratio(seconds["mlx_lm"], seconds["isomorph"])
    print(f"isomorph is {faster:.1f} times as fast in the median of {len(pairs)} pairs")
    return {"source_bytes": nbytes, "processes": rows, "ratio": faster}


def one_pair(source: Path, target: Path) -> dict[str, tuple[float, int]]:
    """Seconds and peak memory of each command."""
    stock = f"mlx_lm.convert --hf-path {source} --mlx-path {target} -q --q-bits 4 --q-group-size 64".split()

    def once(command: list[str]) -> tuple[float, int]:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        return timed(command)

    commands = {"isomorph": own_command(source, target), "mlx_lm": stock}
    return {name: undisturbed(partial(once, command)) for name, command in commands.items()}


def own_command(source: Path, target: Path) -> list[str]:
    return f"isomorph quantize {source} {target} --bits 4 --group-size 64".split()


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds from start to exit of a program beside Python's own, and the most anonymous memory seen, in bytes (0
    where there is no /proc)."""
    command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    environment, peaks = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}, [0]
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=errors, stderr=errors, env=environment) as process,
    ):

        def watch() -> None:
            status = Path(f"/proc/{process.pid}/status")
            while process.returncode is None and status.exists():
                lines = status.read_text().splitlines()
                peaks.extend(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        took = time.perf_counter() - start
        watcher.join()
        errors.seek(0)
        assert process.returncode == 0, errors.read().decode()
    return took, max(peaks) * 1024


def ratio(slower: list[float], faster: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slower, faster)), 2)


def random_checkpoint(folder: Path) -> Path:
    """The random Llama of random_model.py in bfloat16, with a tokenizer, which mlx-lm wants to see."""
    from tokenizers import Tokenizer, models

    script = Path(__file__).with_name("random_model.py")
    subprocess.run([sys.executable, str(script), str(folder), "--bits", "16"], check=True)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


if __name__ == "__main__":
    main()
