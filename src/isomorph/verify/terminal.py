"""The certificate as tables in a terminal, on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isomorph.verify.certificate import Certificate
from isomorph.verify.report import number, percent, summary

STYLES = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "warn": "[yellow]warn[/]", "skip": "[dim]skip[/]"}


def print_certificate(certificate: Certificate) -> None:
    """Checks, hidden states of the first level, figures of the logits, and the verdict last."""
    console = Console(stderr=True)
    checks = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "measured", "limit"):
        checks.add_column(column)
    for check in certificate.checks:
        measured = escape(number(check.measured))
        detail = f"\n[dim]{escape(check.detail)}[/]" if check.detail and check.status != "pass" else ""
        checks.add_row(STYLES[check.status], escape(check.name) + detail, measured, escape(number(check.limit)))
    console.print(checks)
    for level in certificate.levels:
        layers = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        exact = f"error against {level.exact_dtype}" if level.exact_dtype else "error"
        for column in (f"hidden state, {level.dtype}", "largest difference", exact, "noise floor", "ratio"):
            layers.add_column(column, justify="left" if column.startswith("hidden") else "right")
        for tap in level.layers:
            ratio = f"[bold red]{tap.ratio:.2f}[/]" if tap.diverged else f"{tap.ratio:.2f}"
            floor = number(tap.floor) if level.exact_dtype else ""
            layers.add_row(tap.name, number(tap.max_abs), number(tap.error), floor, ratio)
        console.print()
        console.print(layers)
    console.print()
    if certificate.logits:
        figures = certificate.logits
        console.print(
            f"logits, candidate in {figures['candidate_dtype']} against reference in {figures['reference_dtype']}: "
            f"max {number(figures['max_abs'])}, mean {number(figures['mean_abs'])}, "
            f"top-1 {percent(figures['top1_agreement'])}, top-10 {percent(figures['top10_agreement'])}, "
            f"KL {number(figures['kl_nats_per_token'])} nats per token over {figures['tokens']} tokens",
            highlight=False,
        )
    if certificate:
        console.print(f"[bold green]passed[/]: {escape(summary(certificate))}", highlight=False)
    else:
        where = certificate.first_divergence
        found = f" First divergence: {where}." if where else ""
        console.print(f"[bold red]failed[/]: {escape(summary(certificate) + found)}", highlight=False)
