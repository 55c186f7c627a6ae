"""The card of a trained model, its numbers read out of the training record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEMPLATE = """\
---
license: cc0-1.0
language: en
pipeline_tag: text-generation
tags: [{architecture}, isomorph]
---
# {architecture}, {parameters:.1f} million parameters

Trained from nothing by `isomorph train` (JAX) on {book_count} texts, {megabytes:.1f} MB; `data.csv` says where each
comes from and its sha256. bfloat16, layout `transformers`.

| | |
|---|---|
{shape}

| stage | steps | tokens | peak learning rate | last smoothed loss, nats per token | tokens per second |
|---|---|---|---|---|---|
{stages}
{held_out}
`training_record.jsonl` holds the course of the training, thinned; `training_loss.png` shows it.

![loss](training_loss.png)
"""

HELD_OUT = """
On {tokens} held-out tokens ({size} bytes of text never trained on), with the weights as they are here:
**{bits_per_byte:.3f} bits per byte**, {nats:.3f} nats per token, in windows of {window} tokens without overlap.
"""


def model_card(
    settings: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    measured: Mapping[str, float],
    books: Sequence[Mapping[str, str]],
    parameters: int,
    seeds: Sequence[Mapping[str, float]],
) -> str:
    """Markdown. `settings` are the run's, `records` its metrics, `measured` the held-out figures (may be empty)."""
    stages = []
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record for record in records if record["stage"] == stage and "loss" in record]
        speeds = sorted(record["tokens_per_second"] for record in own)
        stages.append(
            f"| {stage} | {own[-1]['step']:,} | {own[-1]['tokens']:,} | {settings[stage]['learning_rate']:g} "
            f"| {own[-1]['smoothed_loss']:.3f} | {speeds[len(speeds) // 2]:,.0f} |"
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
    return TEMPLATE.format(
        architecture=settings["architecture"],
        parameters=parameters / 1e6,
        book_count=len(books),
        megabytes=sum(int(book["bytes"]) for book in books) / 1e6,
        shape="\n".join(f"| {key} | {value} |" for key, value in settings["config"].items()),
        stages="\n".join(stages),
        held_out=held_out,
    )
