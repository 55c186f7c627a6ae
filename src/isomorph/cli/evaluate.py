"""`isomorph evaluate` and `isomorph bench`: what a model's predictions are worth, and how fast they come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isomorph.cli.options import Dtype, Framework, Json, Loading, read_text
from isomorph.cli.output import print_json, show

if TYPE_CHECKING:
    from isomorph.evaluate import Throughput


@dataclass(frozen=True)
class Scoring:
    """Which tokens are scored, and in what windows."""

    text: Annotated[Path | None, typer.Option(help="A text file; default: the held-out excerpt shipped.")] = None
    protocol: Annotated[str, typer.Option(help="One of `isomorph list protocols`.")] = "windowed"
    window: Annotated[int | None, typer.Option(help="Tokens seen at a time; cut to the context.")] = None
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next.")] = None
    limit: Annotated[int | None, typer.Option(help="Score only so many tokens of the text.")] = None


def perplexity_command(model: str, scoring: Scoring, loading: Loading, as_json: Json = False) -> None:
    """Perplexity of a text with its interval, and bits per byte."""
    from isomorph import evaluate
    from isomorph.progress import progress

    arguments = _arguments(scoring)
    loaded = loading.load(model)
    with progress("perplexity", scoring.limit, "tokens") as advance:
        record = evaluate.perplexity(loaded, advance=advance, **arguments)
    print_record(record, as_json)


def divergence_command(
    model: str,
    reference: Annotated[str, typer.Option(help="The model to diverge from.")],
    reference_framework: Framework = "torch",
    reference_dtype: Dtype = None,
    *,
    scoring: Scoring,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """KL from a reference, and how often the most likely token is the same."""
    from isomorph import evaluate
    from isomorph.progress import progress

    arguments = _arguments(scoring)
    own = {"numerics": "exact", "config": None, "rope_table_dtype": None}
    theirs = loading.load(reference, framework=reference_framework, dtype=reference_dtype, **own)
    ours = loading.load(model)
    with progress("divergence", scoring.limit, "tokens") as advance:
        record = evaluate.divergence(theirs, ours, advance=advance, **arguments)
    print_record(record, as_json)


def degeneration_command(
    model: str,
    prompt: Annotated[str, typer.Option(help="What to continue greedily.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 512,
    *,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """A long greedy run: does it end, does it loop?"""
    from isomorph import evaluate
    from isomorph.progress import progress

    loaded = loading.load(model)
    with progress("degeneration", max_tokens, "tokens") as advance:
        record = evaluate.degeneration(loaded, prompt, max_tokens, advance)
    print_record(record, as_json)


def table_command(
    records: Annotated[list[Path], typer.Argument(help="Files of what perplexity or divergence --json printed.")],
) -> None:
    """Records as a Markdown table; those that do not compare are refused."""
    from isomorph import evaluate
    from isomorph.checkpoint.source import read_json

    typer.echo(evaluate.table([read_json(path) for path in records]))


def _arguments(scoring: Scoring) -> dict[str, Any]:
    """As `evaluate` takes them; mistakes show before a model is loaded."""
    from isomorph.evaluate.protocols import protocol_named

    protocol_named(scoring.protocol, scoring.window, scoring.stride, scoring.limit)
    return {**vars(scoring), "text": read_text(scoring.text)}


def print_record(record: Any, as_json: bool) -> None:
    """The results as a table on stderr; with `as_json` the whole record on stdout."""
    results = {key: value for key, value in record.results.items() if key != "token_ids"}
    rows = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in results.items()}
    show(record.kind, {**rows, "fingerprint": str(record.fingerprint)} if record.fingerprint else rows)
    if as_json:
        print_json(record.to_json())


def bench_command(
    model: str,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt; may be repeated. 512.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Measured repetitions.")] = 5,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    *,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Tokens a second of prefill and decode, against the memory's own speed, by length of the prompt."""
    from isomorph import evaluate
    from isomorph.progress import progress

    loaded, lengths = loading.load(model), prompt or [512]
    with progress("bench", len(lengths) * (max(repetitions, 0) + 1), "runs") as advance:
        results = [evaluate.throughput(loaded, length, tokens, repetitions, batch, advance) for length in lengths]
    for result in results:
        show(f"bench: prompt of {result.prompt_tokens}, answer of {result.new_tokens}", _speeds(result))
    if as_json:
        print_json(results[0] if len(results) == 1 else {"runs": results})


def _speeds(result: Throughput) -> dict[str, str]:
    first, spread = result.time_to_first_token_seconds, result.time_to_first_token_seconds_sd
    step = {"decode step": result.decode_step} if result.decode_step else {}
    return {
        "prefill": f"{result.prefill_tokens_per_second:.1f} ± {result.prefill_tokens_per_second_sd:.1f} tokens/s",
        "decode": f"{result.decode_tokens_per_second:.1f} ± {result.decode_tokens_per_second_sd:.1f} tokens/s",
        "first token": f"{first:.3f} ± {spread:.3f} s",
        "read per token": f"{result.bytes_read_per_token / 1e9:.3f} GB",
        "read bandwidth": f"{result.read_bandwidth_bytes_per_second / 1e9:.1f} GB/s, "
        f"{result.read_bandwidth_fraction:.0%} of it used",
        **step,
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
        "hardware": f"{result.environment['cpu']}, {result.threads} threads, {result.instruction_set or 'no kernels'}",
        "commit": result.commit or "not a checkout",
    }
