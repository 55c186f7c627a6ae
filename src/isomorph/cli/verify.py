"""`isomorph verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isomorph.cli.options import Dtype, Framework, Json, Trust, read_text
from isomorph.cli.output import print_json, say


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
