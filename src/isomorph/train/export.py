"""From trained parameters to a model folder: bfloat16 in the Transformers layout, with its card and its record.

Parameters trained through MXFP4 rounding are stored in that format, which changes none of them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.flax import save_file

from isomorph.architectures.base import Architecture
from isomorph.convert import convert
from isomorph.frameworks.nnx_parameters import split
from isomorph.quantize.recipe import Recipe, Rule
from isomorph.quantize.write import quantize
from isomorph.train.card import model_card
from isomorph.train.metrics import plot, read_metrics
from isomorph.train.stream import Source

#: What was rounded in training is packed as it lies; nothing else is.
ROUNDED = Recipe("rounded in training", rules=(Rule(False),), exact=True)

#: Lines of the record that the folder carries; the whole of it stays with the run.
RECORD_LINES = 400


def export(
    architecture: Architecture,
    config: Any,
    parameters: Mapping[str, jax.Array],
    make_model: Callable[..., nnx.Module],
    out: Path,
    files: Sequence[Path],
    held_out: Sequence[Path],
    evaluate: Callable[[nnx.GraphDef, dict[str, jax.Array]], dict[str, float]] | None,
    seeds: Sequence[Mapping[str, float]],
    source: Source | None = None,
) -> dict[str, float]:
    """Write `out/model` and return what was measured on it: all held-out text, with the weights rounded as shipped."""
    rounded = {name: value.astype(jnp.bfloat16) for name, value in parameters.items()}
    measured: dict[str, float] = {}
    if evaluate is not None:
        graph, _ = split(nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0))))
        measured = evaluate(graph, {name: value.astype(jnp.float32) for name, value in rounded.items()})
    flax = out / "flax"
    flax.mkdir(exist_ok=True)
    save_file(rounded, flax / "model.safetensors", metadata={"format": "flax"})
    (flax / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    tokenizer = [out / "vocab.txt"] if (out / "vocab.txt").is_file() else sorted((out / "tokenizer").iterdir())
    for file in tokenizer:
        (flax / file.name).write_bytes(file.read_bytes())
    target = out / "model"
    settings = json.loads((out / "settings.json").read_text())
    trained = flax
    if settings["text"].get("mxfp4") is not None:  # a run begun by an earlier version has no such key
        trained = out / "packed"
        quantize(flax, trained, recipe=ROUNDED, force=True)
    convert(trained, target, to="transformers", force=True)
    if tokenizer[0].name == "vocab.txt":
        (target / "vocab.txt").write_bytes(tokenizer[0].read_bytes())
    records = [*read_metrics(out / "text" / "metrics.jsonl"), *read_metrics(out / "chat" / "metrics.jsonl")]
    kept = thinned(records, RECORD_LINES)
    if measured:
        kept.append({"stage": "export", "step": 0, "dtype": "bfloat16", **measured})
    (target / "training_record.jsonl").write_text(
        "".join(json.dumps(rounded_numbers(record)) + "\n" for record in kept)
    )
    plot(records, target / "training_loss.png")
    books = manifest(files, held_out)
    if books:
        with (target / "data.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(books[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(books)
    count = sum(value.size for value in parameters.values())
    (target / "README.md").write_text(model_card(settings, records, measured, books, count, seeds, source))
    return measured


def thinned(records: Sequence[dict[str, Any]], lines: int) -> list[dict[str, Any]]:
    """Every measurement on held-out text, and evenly spaced ones of the others."""
    others = [record for record in records if "loss" in record]
    stride = max(1, len(others) // lines)
    chosen = {id(record) for record in others[::stride]}
    return [record for record in records if "loss" not in record or id(record) in chosen]


def rounded_numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Floats with six significant digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}


def manifest(files: Sequence[Path], held_out: Sequence[Path]) -> list[dict[str, str]]:
    """One row a text: its use, bytes, sha256, and what a `manifest.csv` in its folder or the one above says of it."""
    rows = []
    for file in (*files, *held_out):
        known = _listed(file.parent).get(file.name) or _listed(file.parent.parent).get(
            f"{file.parent.name}/{file.name}"
        )
        content = file.read_bytes()
        facts = {"bytes": str(len(content)), "sha256": sha256(content).hexdigest()}
        use = "held out" if file in held_out else "training"
        rows.append({**(known or {}), "file": file.name, "use": use, **facts})
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def _listed(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of a folder's `manifest.csv`, by their column `file`."""
    path = folder / "manifest.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {row["file"]: row for row in csv.DictReader(stream) if "file" in row}
