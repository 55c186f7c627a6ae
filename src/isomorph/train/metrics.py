"""The training record: one JSON line a measurement, bits per byte on held-out text, and a plot of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.train.data import read_text

if TYPE_CHECKING:
    import jax
    import tiktoken
    from flax import nnx


class MetricsLog:
    """Appends JSON lines to a file; lines of steps after `first`, which a resumed run repeats, are dropped."""

    def __init__(self, path: Path, stage: str, first: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] <= first]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)
        self.stage = stage
        self.stream = path.open("a", buffering=1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def write(self, step: int, record: dict[str, Any]) -> None:
        self.stream.write(json.dumps({"stage": self.stage, "step": step, **record}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a log; the last line may be cut off by a kill and is then left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def held_out_evaluation(
    files: Sequence[Path], encoding: tiktoken.Encoding, length: int, rows: int | None = None, batch_size: int = 8
) -> Callable[[nnx.GraphDef, dict[str, jax.Array]], dict[str, float]]:
    """A measurement of bits per UTF-8 byte: each text is cut into windows of `length` targets without overlap.

    The first token of a window is predicted from its predecessor alone, so the number is an upper bound of what longer
    contexts give. `rows` evenly spaced windows stand for all of them; None takes them all.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from isomorph.frameworks.nnx_parameters import merge

    size = np.array([len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)])
    cut: list[np.ndarray] = []
    for file in files:
        tokens = np.array(encoding.encode_ordinary(read_text(file)), np.int32)
        cut += [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    if not cut:
        raise InputError(f"expected a held-out text of more than {length} tokens; found none; give a longer one")
    ids = np.stack(cut)
    if rows is not None and rows < len(ids):
        ids = ids[np.linspace(0, len(ids) - 1, rows).round().astype(int)]
    bytes_total = int(size[ids[:, 1:]].sum())

    def evaluate(graph: nnx.GraphDef, parameters: dict[str, jax.Array]) -> dict[str, float]:
        @jax.jit
        def nats(parameters: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
            logits = merge(graph, parameters)(ids[:, :-1]).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).sum(axis=1)

        total = 0.0
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            # The last part is filled up with its own rows, so that one compiled shape serves all of them.
            total += float(nats(parameters, np.resize(part, (batch_size, length + 1)))[: len(part)].sum())
        return {
            "held_out_bits_per_byte": total / math.log(2) / bytes_total,
            "held_out_nats_per_token": total / (len(ids) * length),
            "held_out_bytes": bytes_total,
            "held_out_tokens": len(ids) * length,
        }

    return evaluate


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss and the held-out bits per byte over the steps, as a small PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    offset = 0
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record for record in records if record["stage"] == stage]
        left.plot(*_curve(own, "smoothed_loss", offset), linewidth=1, label=f"{stage}: smoothed loss")
        right.plot(*_curve(own, "held_out_bits_per_byte", offset), ".--", linewidth=0.8, label=f"{stage}: held-out")
        offset += max(record["step"] for record in own)
    left.set(xlabel="step", ylabel="nats per token")
    right.set_ylabel("bits per byte")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=80)


def _curve(records: Sequence[dict[str, Any]], key: str, offset: int) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have `key`."""
    points = [record for record in records if key in record]
    return [offset + record["step"] for record in points], [record[key] for record in points]
