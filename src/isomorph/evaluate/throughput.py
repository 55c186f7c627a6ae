"""How fast a model runs here: prefill, decode, time to first token, against what the memory can deliver."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.evaluate.record import described
from isomorph.verify.environment import environment

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

#: Bytes read once to measure the bandwidth: far beyond any cache.
PROBE_BYTES = 512 << 20


@dataclass(frozen=True)
class Throughput:
    """Means over repetitions with their standard deviations; tokens a second count all rows of the batch.

    `bytes_read_per_token` are the weights one decode step reads (a row of an untied embedding, the chosen experts);
    `read_bandwidth_fraction` is the rate at which decoding reads them over the bandwidth measured between repetitions.
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
    bytes_read_per_token: int | None
    read_bandwidth_bytes_per_second: float
    read_bandwidth_fraction: float | None
    peak_memory_bytes: int
    kernels: str | None
    threads: int | None
    environment: dict[str, Any] = field(default_factory=environment)


def throughput(
    model: Model, prompt_tokens: int = 512, new_tokens: int = 64, repetitions: int = 5, batch_size: int = 1
) -> Throughput:
    """Time prefill of `prompt_tokens` random ids and `new_tokens` greedy steps after it, `repetitions` times.

    One unmeasured repetition warms up. Raises InputError when the model's context is too short.
    """
    for name, value in (
        ("prompt", prompt_tokens),
        ("tokens", new_tokens),
        ("repetitions", repetitions),
        ("batch", batch_size),
    ):
        if value < 1:
            raise InputError(f"expected at least one as {name}; found {value}")
    if prompt_tokens + new_tokens > model.max_positions:
        raise InputError(
            f"expected at most {model.max_positions} tokens of prompt and answer; found {prompt_tokens + new_tokens}; "
            "ask for fewer"
        )
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, prompt_tokens))
    prefill, decode, first, bandwidth = [], [], [], []
    for repetition in range(repetitions + 1):
        state = model.decode_state(batch_size, max_length=prompt_tokens + new_tokens)
        start = time.perf_counter()
        logits = state.feed(ids, last_only=True)
        filled = time.perf_counter()
        token = logits[:, -1].argmax(-1)[:, None]
        chosen = time.perf_counter()
        for _ in range(new_tokens):
            token = state.feed(token, last_only=True)[:, -1].argmax(-1)[:, None]
        done = time.perf_counter()
        probe = read_bandwidth()
        if repetition:  # the first warms up
            prefill.append(batch_size * prompt_tokens / (filled - start))
            decode.append(batch_size * new_tokens / (done - chosen))
            first.append(chosen - start)
            bandwidth.append(probe)
    step_bytes = bytes_per_step(model)
    speed, rate = statistics.mean(decode), statistics.median(bandwidth)
    kernels, threads = _kernels(model)
    return Throughput(
        model=described(model),
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        prefill_tokens_per_second=statistics.mean(prefill),
        prefill_tokens_per_second_sd=_sd(prefill),
        decode_tokens_per_second=speed,
        decode_tokens_per_second_sd=_sd(decode),
        time_to_first_token_seconds=statistics.median(first),
        bytes_read_per_token=step_bytes,
        read_bandwidth_bytes_per_second=rate,
        read_bandwidth_fraction=None if step_bytes is None else speed / batch_size * step_bytes / rate,
        # Linux counts in KiB, macOS in bytes.
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        kernels=kernels,
        threads=threads,
    )


def read_bandwidth() -> float:
    """Bytes a second at which all threads together read memory that no cache holds, measured now."""
    block = _probe_block()
    extension = _extension()
    if extension is not None:
        return extension.read_bandwidth(block.ctypes.data, block.nbytes) * 1e9
    start = time.perf_counter()
    block.sum()
    return block.nbytes / (time.perf_counter() - start)


def bytes_per_step(model: Model) -> int | None:
    """Bytes of weights that one decode step of one row reads; None outside torch."""
    module = getattr(model, "module", None)
    if model.framework != "torch" or module is None:
        return None
    config = module.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    seen: set[int] = set()
    total = 0
    # Embeddings last: a table that is also the head's is read whole.
    parts = sorted(module.named_modules(), key=lambda item: "Embedding" in type(item[1]).__name__)
    for _, part in parts:
        tensors = [
            *part.parameters(recurse=False),
            *(part._buffers[name] for name in ("weight", "scales", "biases") if part._buffers.get(name) is not None),
        ]
        for tensor in tensors:
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            if "Embedding" in type(part).__name__:
                total += tensor.nbytes // tensor.shape[0]
            elif chosen and tensor.ndim == 3 and "Expert" in type(part).__name__:
                total += tensor.nbytes * min(chosen, tensor.shape[0]) // tensor.shape[0]
            else:
                total += tensor.nbytes
    return total


_PROBE: list[np.ndarray] = []


def _probe_block() -> np.ndarray:
    if not _PROBE:
        _PROBE.append(np.ones(PROBE_BYTES // 8, np.int64))
    return _PROBE[0]


def _extension() -> Any:
    try:
        from isomorph.kernels import native
    except ModuleNotFoundError:  # torch is not installed
        return None
    return native.extension()


def _kernels(model: Model) -> tuple[str | None, int | None]:
    extension = _extension() if model.framework == "torch" else None
    return (extension.backend(), extension.thread_count()) if extension else (None, None)


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
