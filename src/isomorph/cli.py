"""The command line: one short section a verb, each importing what it runs only when it runs.

Results go to stdout, tables and progress to stderr. With `--json` the last stdout line is one JSON document.
Exit code 0: done or passed. 1: a verdict that failed. 2: bad input or usage, said in one line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isomorph.errors import InputError

app = typer.Typer(
    name="isomorph",
    help="Port a language model to another framework, prove that it is the same model, quantize it, run it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing target folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the repository ships.")]
Framework = Annotated[str, typer.Option(help="torch, mlx or flax.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A config.json that overrides keys of its own.")]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: float32, bfloat16 or float16; default as stored.")]


def print_json(document: Any) -> None:
    """One line of JSON on stdout; NaN and infinities, which JSON lacks, become null."""
    from isomorph.records import to_json

    sys.stdout.write(json.dumps(to_json(document), allow_nan=False) + "\n")


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


def show(title: str, rows: dict[str, str]) -> None:
    """A table of two columns for people, on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)


# --- list ------------------------------------------------------------------------------------------------------------


@app.command("list")
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


# --- inspect ---------------------------------------------------------------------------------------------------------


@app.command("inspect")
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


# --- convert ---------------------------------------------------------------------------------------------------------


@app.command("convert")
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


# --- quantize --------------------------------------------------------------------------------------------------------


@app.command("quantize")
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
    requantize: Annotated[bool, typer.Option("--requantize", help="Accept a source that is quantized.")] = False,
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


# --- verify ----------------------------------------------------------------------------------------------------------


@app.command("verify")
def verify_command(
    reference: str,
    candidate: str,
    reference_framework: Framework = "torch",
    candidate_framework: Annotated[str | None, typer.Option(help="Default: the one its files are for.")] = None,
    reference_dtype: Annotated[str | None, typer.Option(help="Which run of the reference figures are against.")] = None,
    candidate_dtype: Dtype = None,
    text: Annotated[Path | None, typer.Option(help="A text file to compare on; default: the shipped excerpt.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare.")] = 512,
    greedy_tokens: Annotated[int, typer.Option(help="Tokens to generate greedily.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the ids for a model without tokenizer.")] = 0,
    report: Annotated[Path | None, typer.Option(help="A folder for report.md, report.json and plots.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Prove that two models are the same, measured against the reference's own rounding noise."""
    from isomorph.progress import progress
    from isomorph.verify import verify
    from isomorph.verify.terminal import print_certificate

    with progress("verify", None, "runs") as advance:
        certificate = verify(
            reference,
            candidate,
            reference_framework,
            candidate_framework,
            reference_dtype,
            candidate_dtype,
            text=None if text is None else read_text(text),
            tokens=tokens,
            greedy_tokens=greedy_tokens,
            seed=seed,
            report=report,
            trust_remote_code=trust_remote_code,
            say=lambda what: advance(1, what),
        )
    print_certificate(certificate)
    if report is not None:
        say(f"report: {report / 'report.md'}")
    if as_json:
        print_json(certificate.to_json())
    if not certificate:
        raise typer.Exit(1)


# --- evaluate --------------------------------------------------------------------------------------------------------


evaluate_app = typer.Typer(
    name="evaluate",
    help="Perplexity, divergence from a reference, and what a long greedy run does.",
    rich_markup_mode=None,
)
app.add_typer(evaluate_app)

Text = Annotated[Path | None, typer.Option("--text", help="A text file; default: the held-out excerpt shipped.")]
Protocol = Annotated[str, typer.Option(help="One of `isomorph list protocols`.")]
Window = Annotated[int | None, typer.Option(help="Tokens seen at a time; cut to the context.")]
Stride = Annotated[int | None, typer.Option(help="Tokens from one window to the next.")]
Limit = Annotated[int | None, typer.Option(help="Score only so many tokens of the text.")]


@evaluate_app.command("perplexity")
def evaluate_perplexity(
    model: str,
    framework: Framework = "torch",
    dtype: Dtype = None,
    text: Text = None,
    protocol: Protocol = "windowed",
    window: Window = None,
    stride: Stride = None,
    limit: Limit = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a text with its interval, and bits per byte."""
    from isomorph import evaluate, load
    from isomorph.progress import progress

    loaded = load(model, framework=framework, dtype=dtype, trust_remote_code=trust_remote_code)
    with progress("perplexity", limit, "tokens") as advance:
        record = evaluate.perplexity(loaded, read_text(text), protocol, window, stride, limit, advance)
    print_record(record, as_json)


@evaluate_app.command("divergence")
def evaluate_divergence(
    model: str,
    reference: Annotated[str, typer.Option(help="The model to diverge from.")],
    framework: Framework = "torch",
    reference_framework: Framework = "torch",
    dtype: Dtype = None,
    reference_dtype: Dtype = None,
    text: Text = None,
    protocol: Protocol = "windowed",
    window: Window = None,
    stride: Stride = None,
    limit: Limit = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """KL from a reference, and how often the most likely token is the same."""
    from isomorph import evaluate, load
    from isomorph.progress import progress

    theirs = load(reference, reference_framework, reference_dtype, trust_remote_code=trust_remote_code)
    ours = load(model, framework, dtype, trust_remote_code=trust_remote_code)
    with progress("divergence", limit, "tokens") as advance:
        record = evaluate.divergence(theirs, ours, read_text(text), protocol, window, stride, limit, advance)
    print_record(record, as_json)


@evaluate_app.command("degeneration")
def evaluate_degeneration(
    model: str,
    prompt: Annotated[str, typer.Option(help="What to continue greedily.")],
    framework: Framework = "torch",
    dtype: Dtype = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 512,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """A long greedy run: does it end, does it loop?"""
    from isomorph import evaluate, load
    from isomorph.progress import progress

    loaded = load(model, framework=framework, dtype=dtype, trust_remote_code=trust_remote_code)
    with progress("degeneration", max_tokens, "tokens") as advance:
        record = evaluate.degeneration(loaded, prompt, max_tokens, advance)
    print_record(record, as_json)


def print_record(record: Any, as_json: bool) -> None:
    """The results as a table on stderr; with `as_json` the whole record on stdout."""
    results = {key: value for key, value in record.results.items() if key != "token_ids"}
    rows = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in results.items()}
    show(record.kind, {**rows, "fingerprint": str(record.fingerprint)} if record.fingerprint else rows)
    if as_json:
        print_json(record.to_json())


def read_text(path: Path | None) -> str:
    """The file's text, or the held-out excerpt that is shipped. Raises InputError."""
    if path is None:
        from isomorph import pocket

        return pocket.heldout_text()
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"expected a text file at {path}; found that {reason}; give another --text") from None


# --- bench -----------------------------------------------------------------------------------------------------------


@app.command("bench")
def bench_command(
    model: str,
    framework: Framework = "torch",
    dtype: Dtype = None,
    numerics: Annotated[str, typer.Option(help="exact, or fast: int8 activations in quantized products.")] = "exact",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Measured repetitions.")] = 5,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tokens a second of prefill and decode, against the memory's own speed."""
    from isomorph import evaluate, load
    from isomorph.progress import progress

    loaded = load(model, framework=framework, dtype=dtype, numerics=numerics, trust_remote_code=trust_remote_code)
    with progress("bench", max(repetitions, 0) + 1, "runs") as advance:
        result = evaluate.throughput(loaded, prompt, tokens, repetitions, batch, advance)
    first, spread = result.time_to_first_token_seconds, result.time_to_first_token_seconds_sd
    rows = {
        "prefill": f"{result.prefill_tokens_per_second:.1f} ± {result.prefill_tokens_per_second_sd:.1f} tokens/s",
        "decode": f"{result.decode_tokens_per_second:.1f} ± {result.decode_tokens_per_second_sd:.1f} tokens/s",
        "first token": f"{first:.3f} ± {spread:.3f} s",
        "read per token": f"{result.bytes_read_per_token / 1e9:.3f} GB",
        "read bandwidth": f"{result.read_bandwidth_bytes_per_second / 1e9:.1f} GB/s, "
        f"{result.read_bandwidth_fraction:.0%} of it used",
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
        "hardware": f"{result.environment['cpu']}, {result.threads} threads, {result.instruction_set or 'no kernels'}",
        "commit": result.commit or "not a checkout",
    }
    show("bench", rows)
    if as_json:
        print_json(result)


# --- generate --------------------------------------------------------------------------------------------------------

Analysis = Annotated[bool, typer.Option("--analysis", help="Of gpt-oss: show what it thinks, too.")]
Reasoning = Annotated[str | None, typer.Option(help="Of gpt-oss: low, medium or high; any value of its template.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="The most new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes tokens that were there less likely.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same tokens.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer at this text; may be repeated.")]
MaxKvSize = Annotated[int | None, typer.Option(help="The most tokens that prompt and answer may take together.")]
System = Annotated[str | None, typer.Option(help="System message.")]
TokenizerPath = Annotated[Path | None, typer.Option("--tokenizer", help="Folder, tokenizer.json or vocab.txt.")]
Device = Annotated[str | None, typer.Option(help="The framework's name of a device, such as cuda or gpu:0.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Tokens per second and time to first token, on stderr.")]


@app.command()
def generate(
    source: str,
    prompt: Annotated[str | None, typer.Option(help="The text to continue or answer; default: stdin.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of a text: 1,2,3.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="With the chat template or without; default: with, if any.")
    ] = None,
    system: System = None,
    framework: Framework = "torch",
    dtype: Dtype = None,
    device: Device = None,
    tokenizer: TokenizerPath = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    max_kv_size: MaxKvSize = None,
    analysis: Analysis = False,
    reasoning: Reasoning = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Answer or continue one prompt, streaming the text to stdout."""
    from isomorph.generate import Options
    from isomorph.generate.terminal import answer, as_prompt, read_prompt, speeds
    from isomorph.load import load

    given = read_prompt(prompt, ids)
    options = Options(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
        max_kv_size=max_kv_size,
        show_analysis=analysis,
        chat_template=None if reasoning is None else {"reasoning_effort": reasoning},
    )
    model = load(source, framework, dtype, device, tokenizer, trust_remote_code=trust_remote_code)
    result = answer(model, as_prompt(model, given, system, chat), show=not as_json, **vars(options))
    if verbose:
        say(speeds(result))
    if as_json:
        print_json(result)


# --- chat ------------------------------------------------------------------------------------------------------------


@app.command()
def chat(
    source: str,
    system: System = None,
    framework: Framework = "torch",
    dtype: Dtype = None,
    device: Device = None,
    tokenizer: TokenizerPath = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    max_kv_size: MaxKvSize = None,
    analysis: Analysis = False,
    reasoning: Reasoning = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model: turns with history, /reset, /exit; Ctrl-C stops an answer."""
    from isomorph.generate import Conversation, Options
    from isomorph.generate.terminal import chat_loop
    from isomorph.load import load

    options = Options(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
        max_kv_size=max_kv_size,
        show_analysis=analysis,
        chat_template=None if reasoning is None else {"reasoning_effort": reasoning},
    )
    model = load(source, framework, dtype, device, tokenizer, trust_remote_code=trust_remote_code)
    conversation = Conversation(model, system, **vars(options))
    chat_loop(conversation, verbose)


# --- train -----------------------------------------------------------------------------------------------------------


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Folder of the run; repeat the command to go on where it stopped.")],
    data: Annotated[list[Path] | None, typer.Option(help="A text, or a folder of .txt files; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A Hub dataset to stream instead, e.g. allenai/c4.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Which of its configurations, e.g. en.")] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "train",
    column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    preset: Annotated[str | None, typer.Option(help="pocket: a 4.6M-parameter Talkie and how to train it.")] = None,
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


# --- demo ------------------------------------------------------------------------------------------------------------


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for models, reports and plots.")] = Path("demo-report"),
    as_json: Json = False,
) -> None:
    """Port, verify, quantize and run a small trained model: everything in a few minutes, offline."""
    from isomorph.demo import demo, print_demo

    result = demo(out)
    print_demo(result)
    if as_json:
        print_json(result.to_json())
    if not result:
        raise typer.Exit(1)


# --- errors and exit codes -------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from isomorph import __version__

        typer.echo(f"isomorph {__version__}")
        raise typer.Exit()


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    from typer.main import get_command

    command = get_command(app)
    try:
        result = command.main(args=arguments, prog_name="isomorph", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except InputError as error:
        say(f"isomorph: {error}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("isomorph: interrupted; run the same command again to go on where it stopped")
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Usage errors come as the parser's own exceptions, which know how to say themselves.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = " ".join(str(message()).split()).rstrip(".")
        verb = [name for name in arguments[:1] if name in getattr(command, "commands", ())]
        say(f"isomorph: {text or 'no verb given'}; see `{' '.join(['isomorph', *verb, '--help'])}`")
        return 2


def main() -> None:
    """Entry point of the command `isomorph`."""
    # A model folder is data on this machine: no call home, and no warnings of libraries about each other.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(sys.argv[1:]))
