"""Verbs about a model's files: `list`, `inspect`, `convert`, `quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from isomorph.cli.options import ConfigFile, DryRun, Force, Json
from isomorph.cli.output import print_json, say, show


def list_command(
    what: Annotated[str, typer.Argument(help="architectures, layouts, protocols or recipes.")] = "architectures",
    as_json: Json = False,
) -> None:
    """List what isomorph has: architectures, layouts, protocols, recipes."""
    from isomorph.catalogue import catalogue

    rows = catalogue(what)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        typer.echo("  ".join(value for value in row.values() if value))


def inspect_command(
    source: str,
    context: Annotated[
        int | None, typer.Option(help="Tokens that should fit in memory; default: all it takes.")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Say what a model is, where it loads and with which flags, its dtypes and sizes, and whether it runs here."""
    from isomorph.inspect import inspect, summary

    result = inspect(source, context, config=config)
    if as_json:
        print_json(result)
        return
    show("", summary(result))


def convert_command(
    source: str,
    target: str,
    to: Annotated[str | None, typer.Option(help="mlx (default), transformers, flax or original.")] = None,
    layout: Annotated[str | None, typer.Option(help="One of `isomorph list layouts` instead of --to's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Cast to bfloat16, float16 or float32; default: same bits.")] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Turn quantized weights into floats.")] = False,
    config: ConfigFile = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a model in the layout that another framework wants; repeat an interrupted one to go on."""
    from isomorph.checkpoint.target import size
    from isomorph.convert import convert

    result = convert(
        source, target, to, dtype, layout, config=config, dequantize=dequantize, force=force, dry_run=dry_run
    )
    if as_json:
        print_json(result)
        return
    for name, reason in result.dropped.items():
        say(f"left out {name}: {reason}")
    verb = "would write" if dry_run else "wrote"
    say(
        f"{verb} {result.path}: layout {result.layout} from {result.source_layout}, {result.tensors} tensors, "
        f"{result.parameters:,} parameters in {result.dtype}, {size(result.payload_bytes)}, "
        f"{result.bits_per_weight:.2f} bits per weight; files: {', '.join(result.files)}"
    )


def quantize_command(
    source: str,
    target: str,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4, 5, 6 or 8; default 4, or the recipe's.")] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128; default 64, or the mode's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="One of `isomorph list recipes`, or a .toml file.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="'PATTERN=BITS' for a role or modules: 'blocks.14.*=8', 'head=6/32', 'embed=keep'."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="affine (default), mxfp4, mxfp8 or nvfp4.")] = None,
    method: Annotated[str, typer.Option(help="How codes are chosen: affine, to the nearest.")] = "affine",
    layout: Annotated[str | None, typer.Option(help="One of the architecture's MLX layouts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Cast first to bfloat16, float16 or float32.")] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Round what lies on a grid already.")] = False,
    config: ConfigFile = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a model with quantized weights in MLX's format; repeat an interrupted run to go on."""
    from isomorph.quantize.report import lines
    from isomorph.quantize.write import quantize

    result = quantize(
        source,
        target,
        bits,
        group_size,
        method,
        recipe,
        mode=mode,
        overrides=overrides or (),
        layout=layout,
        dtype=dtype,
        config=config,
        requantize=requantize,
        force=force,
        dry_run=dry_run,
    )
    for line in lines(result):
        say(line)
    if as_json:
        print_json(result)
