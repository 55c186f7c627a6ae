"""Tokens a second of a training step, next to nanochat's own step in PyTorch, at equal shape and batch.

    python benchmarks/train.py NANOCHAT [--depth 4] [--vocab-size 4096] [--seq-len 512] [--batch 4] [--rounds 7]
                               [--optimizer adamw | own] [--eager] [--record FILE]

NANOCHAT is a checkout of github.com/karpathy/nanochat. Its step is forward, backward and update, compiled as its
training script does (`--eager`: as it is), in float32, what it takes on a CPU; `own` is its Muon with AdamW. Each
trains in a process of its own and they take turns, so that neither is measured in quieter times than the other.
Medians; the last line is one JSON document. With `--record` the seconds of each round are added to FILE, and medians
are of all rounds of the same shape in it: a quiet minute here and there does. What is compiled once is not again.
On Linux, rounds in which others took a tenth of a processor or more do not count, and are run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from neighbours import DISTURBED, TRIES, others

WARM_UP = 2

#: What makes two rounds comparable.
SHAPE = ("depth", "vocab_size", "seq_len", "batch", "optimizer", "eager")


def nanochat_step(options: argparse.Namespace) -> Callable[[], None]:
    """One step of nanochat's model; its head is a matrix of its own, ours is tied: a product of the same size."""
    if options.eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # others wait for work, and take time
    sys.path.insert(0, options.nanochat)
    import torch
    from nanochat.gpt import GPT, GPTConfig

    heads = options.depth
    config = GPTConfig(options.seq_len, options.vocab_size, options.depth, heads, heads, 64 * options.depth)
    model = GPT(config)
    model.init_weights()
    optimizer = (
        model.setup_optimizer()
        if options.optimizer == "own"
        else torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    )
    run = model if options.eager else torch.compile(model, dynamic=False)
    ids = torch.randint(0, options.vocab_size, (options.batch, options.seq_len + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        loss = run(inputs, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        loss.item()

    return step


def isomorph_step(options: argparse.Namespace) -> Callable[[], None]:
    """One step of `isomorph train --depth`: the trainer's own, clipping and smoothed loss included."""
    import numpy as np
    from flax import nnx

    from isomorph import architectures
    from isomorph.frameworks.nnx_parameters import split
    from isomorph.train import memory
    from isomorph.train.optimizer import adamw
    from isomorph.train.presets import recipe
    from isomorph.train.trainer import initial_state, make_step, native_operations

    memory.keep()
    shapes = recipe("gelu_gpt", options.depth, {"vocab_size": options.vocab_size}, {"sequence_length": options.seq_len})
    architecture = architectures.get("gelu_gpt")
    assert architecture is not None
    config = architecture.config_class.from_dict(shapes.config)  # type: ignore[attr-defined]
    model = architecture.module("modeling_flax").Model
    graph, parameters = split(model(config, rngs=nnx.Rngs(0), **native_operations(model)))
    optimizer = adamw(lambda step: 1e-3, 0.9, 0.95, 0.1, 1.0)
    state = initial_state(parameters, optimizer)
    run = make_step(graph, optimizer, 1)
    shape = options.batch, options.seq_len + 1
    ids = np.random.default_rng(0).integers(0, options.vocab_size, shape, dtype=np.int32)
    counted = np.ones((options.batch, options.seq_len), bool)

    def step() -> None:
        nonlocal state
        state, loss, _ = run(state, ids, counted)
        float(loss)

    return step


STEPS = {"nanochat": nanochat_step, "isomorph": isomorph_step}


def work(options: argparse.Namespace) -> None:
    """A step for every line read, answered with its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    step = STEPS[options.worker](options)
    for _ in range(WARM_UP):
        step()
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanochat")
    for name, value in (("depth", 4), ("vocab-size", 4096), ("seq-len", 512), ("batch", 4), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--optimizer", choices=("adamw", "own"), default="adamw")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--worker", choices=tuple(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    shape = {key: getattr(options, key) for key in SHAPE}
    rounds = []
    if options.record and options.record.is_file():
        known = map(json.loads, options.record.read_text().splitlines())
        rounds = [line["seconds"] for line in known if line["shape"] == shape]
    for seconds in measure(options.rounds):
        rounds.append(seconds)
        if options.record:
            with options.record.open("a") as record:
                record.write(json.dumps({"shape": shape, "seconds": seconds}) + "\n")
    tokens = options.batch * options.seq_len
    rates = {name: tokens / statistics.median(seconds[name] for seconds in rounds) for name in STEPS}
    ratio = statistics.median(seconds["nanochat"] / seconds["isomorph"] for seconds in rounds)
    for name, rate in rates.items():
        print(f"{name:10} {rate:10,.0f} tokens/s", file=sys.stderr)
    result = {"tokens_per_second": rates, "ratio": ratio, **shape, "rounds": len(rounds)}
    print(json.dumps({**result, "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}))


def measure(rounds: int) -> Iterator[dict[str, float]]:
    """Seconds of a step of each, round by round."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "isomorph-benchmark")}
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", name],
            env={**cache, **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in STEPS
    }
    try:
        for name, worker in workers.items():
            if worker.stdout is None or worker.stdout.readline() != "ready\n":
                sys.exit(f"{name} did not start")
        for _ in range(TRIES * rounds):
            before, start = others(workers.values()), time.perf_counter()
            seconds = {}
            for name, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                seconds[name] = float(worker.stdout.readline())
            if others(workers.values()) - before < DISTURBED * (time.perf_counter() - start):
                yield seconds
                rounds -= 1
            if not rounds:
                return
        sys.exit("expected a quiet machine; found others at work in most rounds; run it again")
    finally:
        for worker in workers.values():
            worker.kill()


if __name__ == "__main__":
    main()
