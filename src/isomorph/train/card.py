"""The card of a trained model, its numbers read out of the training record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isomorph.train.stream import Source

TEMPLATE = """\
---
language: en
pipeline_tag: text-generation
tags: [{architecture}, isomorph]
---
# {architecture}, {parameters:.1f} million parameters

Trained from nothing by `isomorph train` (JAX) on {data}. {form}.

| | |
|---|---|
{shape}

| stage | steps | tokens | peak learning rate | last smoothed loss, nats per token | tokens per second |
|---|---|---|---|---|---|
{stages}
{held_out}{seeds}
`training_record.jsonl` holds the course of the training, thinned; `training_loss.png` shows it.

![loss](training_loss.png)
"""

#: How weights that were trained through rounding are stored.
PACKED = """bfloat16, experts in MXFP4 in the
layout `published`: all of the training saw them rounded so, and gradients passed straight through"""

HELD_OUT = """
On {tokens} held-out tokens ({size} bytes of text never trained on), with the weights as they are here:
**{bits_per_byte:.3f} bits per byte**, {nats:.3f} nats per token, in windows of {window} tokens without overlap.
"""

SEEDS = """
| seed | steps | tokens | last smoothed loss | held-out bits per byte |
|---|---|---|---|---|
{rows}

{spread}
"""


def seeds_table(seeds: Sequence[Mapping[str, float]]) -> str:
    """A row a seed, and mean and spread of those that trained equally long; empty for one seed."""
    if len(seeds) < 2:
        return ""
    rows = "\n".join(
        f"| {row['seed']} | {row['step']:,} | {row['tokens']:,} | {row['smoothed_loss']:.3f} "
        f"| {row.get('held_out_bits_per_byte', float('nan')):.3f} |"
        for row in seeds
    )
    lines = []
    for step in sorted({row["step"] for row in seeds}):
        equal = [row for row in seeds if row["step"] == step]
        if len(equal) > 1:
            figures = [
                f"{name} {mean(values):.4f} ± {stdev(values):.4f}"
                for name, key in (("loss", "smoothed_loss"), ("held-out bits per byte", "held_out_bits_per_byte"))
                if len(values := [row[key] for row in equal if key in row]) > 1
            ]
            lines.append(f"{len(equal)} seeds after {step:,} steps, mean ± standard deviation: {', '.join(figures)}.")
    return SEEDS.format(rows=rows, spread="\n".join(lines))


def model_card(
    settings: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    measured: Mapping[str, float],
    books: Sequence[Mapping[str, str]],
    parameters: int,
    seeds: Sequence[Mapping[str, float]],
    source: Source | None = None,
) -> str:
    """Markdown. `settings` are the run's, `records` its metrics, `measured` the held-out figures (may be empty)."""
    stages = []
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record for record in records if record["stage"] == stage and "loss" in record]
        speed = median(record["tokens_per_second"] for record in own)
        stages.append(
            f"| {stage} | {own[-1]['step']:,} | {own[-1]['tokens']:,} | {settings[stage]['learning_rate']:g} "
            f"| {own[-1]['smoothed_loss']:.3f} | {speed:,.0f} |"
        )
    held_out = ""
    if measured:
        held_out = HELD_OUT.format(
            tokens=f"{measured['held_out_tokens']:,}",
            size=f"{measured['held_out_bytes']:,}",
            bits_per_byte=measured["held_out_bits_per_byte"],
            nats=measured["held_out_nats_per_token"],
            window=settings["text"]["sequence_length"],
        )
    books = [book for book in books if book["use"] == "training"]
    if source is not None:
        data = f"the column `{source.column}` of the dataset `{source.name}`, split `{source.split}`"
    else:
        megabytes = sum(int(book["bytes"]) for book in books) / 1e6
        count = "one text" if len(books) == 1 else f"{len(books)} texts"
        data = f"{count}, {megabytes:.1f} MB; `data.csv` says where each\ncomes from and its sha256"
    return TEMPLATE.format(
        architecture=settings["architecture"],
        parameters=parameters / 1e6,
        data=data,
        form=PACKED if settings["text"].get("mxfp4") else "bfloat16, layout `transformers`",
        seeds=seeds_table(seeds),
        shape="\n".join(f"| {key} | {value} |" for key, value in settings["config"].items()),
        stages="\n".join(stages),
        held_out=held_out,
    )
