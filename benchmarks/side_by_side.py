"""The same model in several engines, interleaved in one run, as ratios: decode and prefill tokens a second.

Usage: python benchmarks/side_by_side.py QUANTIZED... [--plain BFLOAT16_FOLDER] [--mlx]
           [--llama-bench BINARY --gguf FILE...] [--engines PATTERN...] [--rounds 5] [--prompt 512] [--tokens 16]
           [--batch 1] [--results FILE.jsonl]

`benchmarks/random_model.py` writes folders and GGUF files to compare. Each round runs every engine once, with as many
threads as torch has, so that a slow spell of the machine meets all of them; medians over rounds are printed, and the
read bandwidth measured in the same rounds. What others disturbed is measured again (on Linux, when they took a tenth of
a processor). With --results each measurement is appended to a file at once and all in it are summed up, so that short
runs (--rounds 1, --engines) accumulate; --rounds 0 only sums up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from neighbours import undisturbed

import isomorph
from isomorph.evaluate.throughput import bytes_per_token, commit, measure, read_bandwidth

#: (batch, prompt, tokens) -> prefill and decode tokens a second.
Engine = Callable[[int, int, int], tuple[float, float]]


def through_contract(folder: Path, numerics: str = "exact") -> tuple[Engine, Any]:
    model = isomorph.load(folder, dtype="bfloat16", numerics=numerics)

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        return measure(model, prompt, tokens, batch)[:2]

    return run, model


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
        start = time.perf_counter()
        mx.eval(model(mx.zeros((batch, 1), mx.int32), cache=cache))  # one step is enough: it takes seconds
        return float("nan"), batch / (time.perf_counter() - start)

    return run


def llama_bench(binary: Path, gguf: Path) -> Engine:
    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        command = [binary, "-m", gguf, "-p", prompt, "-n", tokens, "-r", 1, "-t", torch.get_num_threads(), "-o", "json"]
        done = subprocess.run(list(map(str, command)), capture_output=True, check=True, text=True)
        speed = {bool(row["n_gen"]): row["avg_ts"] for row in json.loads(done.stdout)}
        return speed[False], speed[True]

    return run


def build(options: argparse.Namespace) -> dict[str, tuple[Engine, Any]]:
    """Engines by name, with the model of isomorph behind them; only those asked for are loaded."""
    makers: dict[str, Callable[[], tuple[Engine, Any]]] = {}
    for folder in options.quantized:
        for numerics in ("exact", "fast"):
            makers[f"isomorph {folder.name} {numerics}"] = lambda f=folder, n=numerics: through_contract(f, n)
        if options.mlx:
            makers[f"mlx-lm {folder.name}"] = lambda f=folder: (mlx_lm(f), None)
    if options.plain:
        makers["isomorph bfloat16"] = lambda: through_contract(options.plain)
        makers["transformers bfloat16"] = lambda: (stock_transformers(options.plain), None)
    for gguf in options.gguf or ():
        makers[f"llama.cpp {gguf.stem}"] = lambda g=gguf: (llama_bench(options.llama_bench, g), None)
    wanted = [name for name in makers if any(fnmatch(name, pattern) for pattern in options.engines)]
    return {name: makers[name]() for name in wanted}


def play(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row an engine and round."""
    engines = build(options) if options.rounds else {}
    for name, (run, _) in engines.items():
        if not name.startswith("llama.cpp"):  # a process of its own has nothing to warm but the page cache
            run(options.batch, 16, 3)
    for _ in range(options.rounds):
        bandwidth = read_bandwidth()
        for name, (run, model) in engines.items():
            prefill, decode = undisturbed(partial(run, options.batch, options.prompt, options.tokens))
            held = options.prompt + options.tokens // 2
            yield {
                "engine": name,
                "batch": options.batch,
                "prompt": options.prompt,
                "prefill": prefill,
                "decode": decode,
                "bandwidth": bandwidth,
                "read": None if model is None else bytes_per_token(model, options.batch, held),
                "commit": commit(),
            }


def summary(rows: list[dict[str, Any]], base: str = "transformers bfloat16") -> list[str]:
    """A line of medians an engine and batch; ratios are to `base`, or to the first engine."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["engine"], row["batch"]), []).append(row)

    def median(key: tuple[str, int], field: str) -> float:
        return statistics.median(row[field] for row in groups[key])

    rate = statistics.median(row["bandwidth"] for row in rows)
    lines = ["| engine | batch | rounds | prefill tokens/s | ratio | decode tokens/s | ratio | of read bandwidth |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for key, group in groups.items():
        reference = (base, 1) if (base, 1) in groups else next(iter(groups))
        prefill, decode = median(key, "prefill"), median(key, "decode")
        share = f"{decode * group[0]['read'] / rate:.0%}" if group[0]["read"] else ""
        ratios = prefill / median(reference, "prefill"), decode / median(reference, "decode")
        lines.append(
            f"| {key[0]} | {key[1]} | {len(group)} | {prefill:.1f} | {ratios[0]:.2f} | {decode:.2f} | {ratios[1]:.2f} "
            f"| {share} |"
        )
    note = f"read bandwidth {rate / 1e9:.1f} GB/s; {torch.get_num_threads()} threads; ratios to {reference[0]}"
    return [*lines, "", note]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", type=Path, nargs="+")
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="*")
    parser.add_argument("--engines", nargs="*", default=["*"], help="only engines whose names match")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    rows = []
    for row in play(options):
        rows.append(row)
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if options.results:
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
