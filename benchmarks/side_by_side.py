"""The same model in several engines, interleaved in one run, as ratios: decode and prefill tokens a second.

Usage: python benchmarks/side_by_side.py QUANTIZED [--plain BFLOAT16_FOLDER] [--rounds 5] [--prompt 512] [--tokens 16]
                                         [--mlx] [--llama-bench BINARY --gguf FILE] [--batch 1]

`benchmarks/random_model.py` writes folders to compare. Each round runs every engine once, so that a slow spell of the
machine meets all of them; medians over rounds are printed, and the read bandwidth measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import isomorph
from isomorph.evaluate.throughput import bytes_per_step, read_bandwidth
from isomorph.frameworks.model import Model

Engine = Callable[[int, int, int], tuple[float, float]]


def through_contract(model: Model) -> Engine:
    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt))
        state = model.decode_state(batch, max_length=prompt + tokens)
        start = time.perf_counter()
        token = state.feed(ids, last_only=True)[:, -1].argmax(-1)[:, None]
        filled = time.perf_counter()
        for _ in range(tokens):
            token = state.feed(token, last_only=True)[:, -1].argmax(-1)[:, None]
        return batch * prompt / (filled - start), batch * tokens / (time.perf_counter() - filled)

    return run


def stock_transformers(folder: Path) -> Engine:
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        ids = torch.randint(0, model.config.vocab_size, (batch, prompt))
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        filled = time.perf_counter()
        for _ in range(tokens):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        return batch * prompt / (filled - start), batch * tokens / (time.perf_counter() - filled)

    return run


def mlx_lm(folder: Path) -> Engine:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        cache = make_prompt_cache(model)
        token = mx.zeros((batch, 1), mx.int32)
        start = time.perf_counter()
        mx.eval(model(token, cache=cache))  # one step is enough: it takes seconds
        return float("nan"), batch / (time.perf_counter() - start)

    return run


def llama_bench(binary: Path, gguf: Path) -> Engine:
    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        command = [binary, "-m", gguf, "-p", prompt, "-n", tokens, "-r", 1, "-t", torch.get_num_threads(), "-o", "json"]
        rows = json.loads(subprocess.run(list(map(str, command)), capture_output=True, check=True, text=True).stdout)
        speed = {bool(row["n_gen"]): row["avg_ts"] for row in rows}
        return speed[False], speed[True]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    models = {
        f"isomorph {numerics}": isomorph.load(options.quantized, dtype="bfloat16", numerics=numerics)
        for numerics in ("exact", "fast")
    }
    if options.plain:
        models["isomorph bfloat16"] = isomorph.load(options.plain, dtype="bfloat16")
    engines = {name: through_contract(model) for name, model in models.items()}
    if options.plain:
        engines["transformers bfloat16"] = stock_transformers(options.plain)
    if options.mlx:
        engines["mlx-lm"] = mlx_lm(options.quantized)
    if options.llama_bench:
        engines["llama.cpp"] = llama_bench(options.llama_bench, options.gguf)
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    decode: dict[str, list[float]] = {name: [] for name in engines}
    bandwidth: list[float] = []
    for turn in range(options.rounds + 1):
        for name, run in engines.items():
            speeds = run(options.batch, options.prompt, options.tokens)
            if turn:  # the first round warms up
                prefill[name].append(speeds[0])
                decode[name].append(speeds[1])
        if turn:
            bandwidth.append(read_bandwidth())
    rate = statistics.median(bandwidth)
    base = "transformers bfloat16" if "transformers bfloat16" in engines else next(iter(engines))
    print(f"read bandwidth {rate / 1e9:.1f} GB/s; ratios to {base}; medians of {options.rounds} interleaved rounds")
    for name in engines:
        fast, slow = statistics.median(prefill[name]), statistics.median(decode[name])
        line = f"{name:22} prefill {fast:8.1f} tok/s ({fast / statistics.median(prefill[base]):5.2f}x)"
        line += f"  decode {slow:7.2f} tok/s ({slow / statistics.median(decode[base]):6.2f}x)"
        if name in models:
            read = bytes_per_step(models[name])
            assert read is not None
            line += f"  {slow / options.batch * read / rate:5.0%} of read bandwidth"
        print(line)


if __name__ == "__main__":
    main()
