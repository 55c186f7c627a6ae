"""Is the candidate the same model as the reference? `verify` answers with a certificate of named, derived verdicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from isomorph.errors import InputError
from isomorph.stage import callable_module
from isomorph.verify.certificate import Certificate, Check

__all__ = ["Certificate", "Check", "verify"]


def verify(
    reference: Any,
    candidate: Any,
    reference_framework: str = "torch",
    candidate_framework: str | None = None,
    reference_dtype: str | None = None,
    candidate_dtype: str | None = None,
    *,
    text: Any = None,
    tokens: int = 512,
    greedy_tokens: int = 256,
    seed: int = 0,
    report: str | Path | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda what: None,
) -> Certificate:
    """Compare `candidate` with `reference`: folders, original files, Hub ids or loaded models.

    The candidate runs in `candidate_dtype` (default: as stored), the reference in the same dtype and one precision up,
    so that errors are measured against the reference's own rounding noise; a candidate of low precision is also
    compared in float32, where small faults show. `reference_dtype` only says which run of the reference the `logits`
    figures are against. `candidate_framework` None means the framework its files are for.

    `text` is a string, ids [T] or [R, W], or None: the held-out excerpt shipped with isomorph, or random ids of `seed`
    for a model without tokenizer. `tokens` are compared, in rows of the model's context, and `greedy_tokens` generated.
    A folder `report` receives report.md, report.json and plots. `say` is told what is being done.

    The certificate is truthy when no check failed and logits were compared. Raises InputError for bad input.
    """
    if report is not None and Path(report).exists() and not Path(report).is_dir():
        raise InputError(f"expected a folder for the report; found the file {report}; choose another name")
    if greedy_tokens < 1:
        raise InputError(f"expected at least one token to generate; found greedy_tokens={greedy_tokens}; leave it out")
    from isomorph.verify.session import Session
    from isomorph.verify.side import Side

    session = Session(
        Side.of(reference, reference_framework, trust_remote_code),
        Side.of(candidate, candidate_framework, trust_remote_code),
        tokens=tokens,
        greedy_tokens=greedy_tokens,
        seed=seed,
        say=say,
    )
    certificate = session.verify(text, reference_dtype, candidate_dtype)
    if report is not None:
        from isomorph.verify.report import write_report

        write_report(certificate, Path(report))
    return certificate


callable_module(__name__)
