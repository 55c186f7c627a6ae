"""The training record: one JSON line a measurement, bits per byte on held-out text, and a plot of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from isomorph.errors import InputError
from isomorph.train.data import Documents, read_text, whole

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from isomorph.train.vocabulary import Vocabulary


class MetricsLog:
    """Appends JSON lines to a file; lines of steps after `first`, which a resumed run repeats, are dropped.

    Of several processes only the first one writes.
    """

    def __init__(self, path: Path, stage: str, first: int) -> None:
        import jax

        self.stage = stage
        if jax.process_index() > 0:
            self.stream: TextIO = StringIO()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] <= first]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)
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
    files: Sequence[Path],
    vocabulary: Vocabulary,
    length: int,
    documents: Documents = whole,
    rows: int | None = None,
    batch_size: int = 8,
) -> Callable[[nnx.GraphDef, dict[str, jax.Array]], dict[str, float]]:
    """A measurement of bits per UTF-8 byte: each text is cut into windows of `length` targets without overlap.

    The first token of a window is predicted from its predecessor alone, so the number is an upper bound of what longer
    contexts give. `rows` evenly spaced windows stand for all of them; None takes them all.
    """
    import jax

    from isomorph.frameworks.nnx_parameters import merge
    from isomorph.train.loss import summed_loss

    cut: list[np.ndarray] = []
    for file in files:
        for text in documents(read_text(file)):
            tokens = np.array(vocabulary.encode(text), np.int32)
            cut += [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    if not cut:
        raise InputError(f"expected a held-out text of more than {length} tokens; found none; give a longer one")
    ids = np.stack(cut)
    if rows is not None and rows < len(ids):
        ids = ids[np.linspace(0, len(ids) - 1, rows).round().astype(int)]
    bytes_total = int(vocabulary.size_bytes[ids[:, 1:]].sum())

    @partial(jax.jit, static_argnums=0)
    def nats(graph: nnx.GraphDef, parameters: dict[str, jax.Array], ids: jax.Array, counted: jax.Array) -> jax.Array:
        return summed_loss(merge(graph, parameters), ids, counted)

    def evaluate(graph: nnx.GraphDef, parameters: dict[str, jax.Array]) -> dict[str, float]:
        total = 0.0
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            # The last part is filled up with rows that do not count, so that one compiled shape serves all of them.
            counted = np.arange(batch_size)[:, None] < np.full(length, len(part))
            total += float(nats(graph, parameters, np.resize(part, (batch_size, length + 1)), counted))
        return {
            "held_out_bits_per_byte": total / math.log(2) / bytes_total,
            "held_out_nats_per_token": total / (len(ids) * length),
            "held_out_bytes": bytes_total,
            "held_out_tokens": len(ids) * length,
        }

    return evaluate


def last_losses(folder: Path, seed: int) -> dict[str, float]:
    """The last smoothed loss, and the last figures on held-out text, that a seed's `metrics.jsonl` has."""
    found: dict[str, float] = {"seed": seed}
    for record in read_metrics(folder / "metrics.jsonl"):
        kept = ("step", "tokens", "smoothed_loss", "held_out_bits_per_byte", "held_out_nats_per_token")
        found |= {key: record[key] for key in kept if key in record}
    return found


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss, raw (pale) and smoothed, and the held-out bits per byte over the steps, as a small PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    offset = 0
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record for record in records if record["stage"] == stage]
        (line,) = left.plot(*_curve(own, "smoothed_loss", offset), linewidth=1.2, label=f"{stage}: smoothed loss")
        left.plot(*_curve(own, "loss", offset), linewidth=0.4, alpha=0.35, color=line.get_color(), zorder=1)
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
