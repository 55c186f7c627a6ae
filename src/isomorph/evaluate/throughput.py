"""How fast a model runs here: prefill, decode, time to first token, against what the memory can deliver."""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.evaluate.record import described
from isomorph.verify.environment import environment

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

#: Bytes read once to measure the bandwidth: far beyond any cache.
PROBE_BYTES = 512 << 20

#: Tables of which a token takes one row, by the last part of their path.
TABLES = re.compile(r"(embed\w*|wte|wpe)$")


@dataclass(frozen=True)
class Throughput:
    """Means over repetitions with their standard deviations; tokens a second count all rows of the batch.

    `bytes_read_per_token`: the weights that a step reads (one row of an embedding, the chosen experts), shared by the
    rows of the batch, and the keys and values of one row half way through the answer. `read_bandwidth_fraction` is the
    rate at which decoding reads them over the bandwidth measured between repetitions. `peak_memory_bytes` counts mapped
    weights. `decode_step` is `recorded` where steps run without Python, else why not; None in other frameworks.
    `commit` is isomorph's own, None where it is not a checkout.
    """

    model: dict[str, Any]
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    prefill_tokens_per_second: float
    prefill_tokens_per_second_sd: float
    decode_tokens_per_second: float
    decode_tokens_per_second_sd: float
    time_to_first_token_seconds: float
    time_to_first_token_seconds_sd: float
    bytes_read_per_token: int
    read_bandwidth_bytes_per_second: float
    read_bandwidth_fraction: float
    peak_memory_bytes: int
    instruction_set: str | None
    decode_step: str | None
    threads: int
    commit: str | None
    environment: dict[str, Any] = field(default_factory=environment)


def throughput(
    model: Model,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repetitions: int = 5,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Throughput:
    """Time prefill of `prompt_tokens` random ids and `new_tokens` greedy steps after it, `repetitions` times.

    One unmeasured repetition warms up; `progress(1)` is called after each. Raises InputError when the model's context
    is too short.
    """
    for name, value in (
        ("prompt", prompt_tokens),
        ("tokens", new_tokens),
        ("repetitions", repetitions),
        ("batch", batch_size),
    ):
        if value < 1:
            raise InputError(f"expected at least one as {name}; found {value}; ask for more")
    if prompt_tokens + new_tokens > model.max_positions:
        raise InputError(
            f"expected at most {model.max_positions} tokens of prompt and answer; found {prompt_tokens + new_tokens}; "
            "ask for fewer"
        )
    runs, bandwidth, peak = [], [], 0
    for repetition in range(repetitions + 1):
        run = measure(model, prompt_tokens, new_tokens, batch_size)
        # The probe's own memory is not the model's, and all repetitions need the same.
        peak = peak or peak_memory()
        probe = read_bandwidth()
        if repetition:  # the first warms up
            runs.append(run)
            bandwidth.append(probe)
        if progress is not None:
            progress(1)
    prefill, decode, first = zip(*runs)
    read = bytes_per_token(model, batch_size, prompt_tokens + new_tokens // 2)
    speed, rate = statistics.mean(decode), statistics.median(bandwidth)
    instruction_set, threads = kernels(model)
    return Throughput(
        model=described(model),
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        prefill_tokens_per_second=statistics.mean(prefill),
        prefill_tokens_per_second_sd=_deviation(prefill),
        decode_tokens_per_second=speed,
        decode_tokens_per_second_sd=_deviation(decode),
        time_to_first_token_seconds=statistics.mean(first),
        time_to_first_token_seconds_sd=_deviation(first),
        bytes_read_per_token=read,
        read_bandwidth_bytes_per_second=rate,
        read_bandwidth_fraction=speed * read / rate,
        peak_memory_bytes=peak,
        instruction_set=instruction_set,
        decode_step=steps.describe(batch_size) if (steps := getattr(model, "steps", None)) else None,
        threads=threads,
        commit=commit(),
    )


def measure(model: Model, prompt_tokens: int, new_tokens: int, batch_size: int = 1) -> tuple[float, float, float]:
    """Prefill and decode tokens a second and seconds to the first token, of one run."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, prompt_tokens))
    state = model.decode_state(batch_size, max_length=prompt_tokens + new_tokens)
    start = time.perf_counter()
    logits = state.feed(ids, last_only=True)
    filled = time.perf_counter()
    token = logits[:, -1].argmax(-1)[:, None]
    chosen = time.perf_counter()
    for _ in range(new_tokens):
        token = state.feed(token, last_only=True)[:, -1].argmax(-1)[:, None]
    done = time.perf_counter()
    return batch_size * prompt_tokens / (filled - start), batch_size * new_tokens / (done - chosen), chosen - start


def read_bandwidth() -> float:
    """Bytes a second at which all threads together read memory that no cache holds, measured now."""
    from isomorph.kernels.extension import find_extension

    block = _probe_block()
    extension = find_extension()
    if extension is not None:
        return extension.read_bandwidth(block.ctypes.data, block.nbytes) * 1e9
    # numpy's sum keeps up with one core's share of the memory and lets go of Python's lock.
    count = os.cpu_count() or 1
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(np.sum, np.array_split(block[: 1 << 16], count)))  # starts the threads
        start = time.perf_counter()
        list(pool.map(np.sum, np.array_split(block, count)))
        return block.nbytes / (time.perf_counter() - start)


def bytes_per_token(model: Model, batch_size: int, held: int) -> int:
    """Bytes that decoding reads for each token: weights over `batch_size` rows, and the cache of `held` tokens."""
    return bytes_per_step(model, batch_size) // batch_size + cache_bytes(model, held)


def bytes_per_step(model: Model, batch_size: int = 1) -> int:
    """Bytes of weights that one decode step reads; of experts at most those that its rows can choose."""
    arrays = stored_arrays(model)
    chosen = batch_size * int(getattr(text_config(model), "num_experts_per_tok", None) or 1)
    # A table that the head shares is read whole.
    tied = not any(re.search(r"lm_head|embed_out", path) for path, _, _ in arrays)
    total = 0
    for path, shape, size in arrays:
        if (
            len(shape) == 2
            and TABLES.search(path)
            and not (tied and path.endswith(("embed", "embed_tokens", "embed_in", "wte")))
        ):
            total += batch_size * size // shape[0]
        elif len(shape) == 3 and re.search("expert|switch", path):
            total += size * min(chosen, shape[0]) // shape[0]
        else:
            total += size
    return total


def stored_arrays(model: Any) -> list[tuple[str, tuple[int, ...], int]]:
    """Path of its module, shape and bytes of every distinct array that a model has loaded."""
    found: dict[int, tuple[str, tuple[int, ...], int]] = {}

    def add(key: int, name: str, array: Any) -> None:
        found.setdefault(key, (name.rpartition(".")[0], tuple(array.shape), int(array.nbytes)))

    if model.framework == "torch":
        for name, tensor in model.module.named_parameters():
            add(tensor.data_ptr(), name, tensor)
        for name, tensor in model.module.named_buffers():
            if name.rpartition(".")[2] in ("weight", "scales", "biases", "bias"):
                add(tensor.data_ptr(), name, tensor)
    elif model.framework == "mlx":
        from mlx.utils import tree_flatten

        leaves: Any = tree_flatten(model.module.parameters())
        for name, array in leaves:
            add(id(array), name, array)
    else:
        for name, array in model.parameters.items():
            add(id(array), name, array)
    return list(found.values())


def cache_bytes(model: Model, held: int) -> int:
    """Bytes of the keys and values that one row reads when it holds `held` tokens."""
    config = text_config(model)
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    width: Any = getattr(config, "head_dim", None)
    if width is None:
        width = getattr(config, "hidden_size", 0) // max(1, getattr(config, "num_attention_heads", 1))
    window = getattr(config, "sliding_window", None) or held
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * model.num_layers
    tokens = sum(min(held, window) if kind == "sliding_attention" else held for kind in kinds)
    return 2 * heads * width * tokens * {"float32": 4, "float64": 8}.get(model.dtype, 2)


def text_config(model: Any) -> Any:
    """The config that has the decoder's sizes, whatever the framework keeps."""
    config: Any = model.module.config if model.framework == "torch" else getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def kernels(model: Model) -> tuple[str | None, int]:
    """The instruction set of our kernels where they run the model, and the threads in use."""
    from isomorph.kernels.extension import find_extension

    if model.framework != "torch":
        return None, os.cpu_count() or 1
    import torch

    extension = find_extension()
    return (extension.backend(), extension.thread_count()) if extension else (None, torch.get_num_threads())


def peak_memory() -> int:
    """Most bytes of memory that this process has had so far."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def commit() -> str | None:
    """The commit of the checkout that isomorph runs from, with + where files differ."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


@cache
def _probe_block() -> np.ndarray:
    return np.ones(PROBE_BYTES // 8, np.int64)


def _deviation(values: tuple[float, ...]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
