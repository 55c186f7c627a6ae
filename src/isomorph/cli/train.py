"""`isomorph train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isomorph.cli.options import ConfigFile, Json
from isomorph.cli.output import print_json, show
from isomorph.errors import InputError


def train_command(
    out: Annotated[Path, typer.Option(help="Folder of the run; repeat the command to go on where it stopped.")],
    data: Annotated[list[Path] | None, typer.Option(help="A text, or a folder of .txt files; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A Hub dataset to stream instead, e.g. allenai/c4.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Which of its configurations, e.g. en.")] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "train",
    column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    preset: Annotated[str | None, typer.Option(help="pocket or pocket-gpt-oss: a small model, ready made.")] = None,
    depth: Annotated[int | None, typer.Option(help="Layers; all else follows as gelu_gpt's recipe has it.")] = None,
    architecture: Annotated[str | None, typer.Option(help="Default: the preset's; gelu_gpt with --depth.")] = None,
    config: ConfigFile = None,
    shape: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of config.json; repeatable.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Ids, special tokens included.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer folder, tokenizer.json or vocab.txt; default: learn one.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="How texts lie in files: plain or wikitext.")] = "plain",
    held_out: Annotated[list[Path] | None, typer.Option(help="Texts to measure, never trained on.")] = None,
    chat_data: Annotated[
        list[Path] | None, typer.Option(help="Books of questions and answers: a second stage.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps on text.")] = None,
    chat_steps: Annotated[int | None, typer.Option(help="Optimizer steps on conversations.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "--batch", help="Windows a step.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts a step's batch is computed in.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the warm-up-cosine schedule.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps that lead to the peak.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute dtype: float32 or bfloat16.")] = None,
    remat: Annotated[bool | None, typer.Option("--remat", help="Keep block inputs only, compute again.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between measurements on held-out text.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the order of the data.")] = None,
    seeds: Annotated[int, typer.Option(help="Models to train, for the spread; the first is kept.")] = 1,
    other_seeds: Annotated[float, typer.Option(help="Share of the steps that the others train.")] = 1.0,
    fsdp: Annotated[int, typer.Option(help="Devices that share a matrix's rows.")] = 1,
    model_parallel: Annotated[int, typer.Option(help="Devices that share a matrix's columns.")] = 1,
    peak_flops: Annotated[float | None, typer.Option(help="Of all devices, for MFU; default: measured.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT where several processes meet; auto: the cluster says.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many processes.")] = None,
    process: Annotated[int | None, typer.Option(help="Which one this is, from 0.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small model in JAX: vocabulary, text, conversations, and a folder that loads in every framework."""
    from isomorph.checkpoint.source import read_json
    from isomorph.train import train

    shapes = read_json(config) if config is not None else {}
    for item in shape or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"expected --set KEY=VALUE; found {item!r}")
        try:
            shapes[key] = json.loads(value)
        except json.JSONDecodeError:
            shapes[key] = value
    if vocab_size is not None:
        shapes["vocab_size"] = vocab_size
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "sequence_length": seq_len,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "dtype": dtype,
        "remat": remat,
        "peak_flops": peak_flops,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    result = train(
        out,
        data or [],
        preset=preset,
        architecture=architecture,
        depth=depth,
        config=shapes,
        settings=settings,
        chat_settings={"steps": chat_steps} if chat_steps is not None else None,
        chat_data=chat_data or [],
        held_out=held_out or [],
        form=form,
        dataset=dataset,
        dataset_config=dataset_config,
        split=split,
        column=column,
        vocabulary=tokenizer,
        seeds=seeds,
        other_seeds=other_seeds,
        fsdp=fsdp,
        model_parallel=model_parallel,
        coordinator=coordinator,
        processes=processes,
        process=process,
    )
    if as_json:
        print_json(result)
        return
    bits = result.held_out_bits_per_byte
    show(
        "",
        {
            "model": str(result.path),
            "parameters": f"{result.parameters:,}",
            "held out": f"{bits:.3f} bits per byte" if bits is not None else "not measured",
            **{f"seed {row['seed']}": f"loss {row['smoothed_loss']:.3f} after {row['step']:,}" for row in result.seeds},
        },
    )
