"""The certificate as a folder: report.md for people, report.json for programs, three plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isomorph.errors import InputError
from isomorph.verify.certificate import Certificate, Check, Level
from isomorph.verify.plots import plot_agreement, plot_differences, plot_layers

SYMBOLS = {"pass": "✓ pass", "fail": "✗ **fail**", "warn": "! warn", "skip": "– skip"}


def write_report(certificate: Certificate, folder: Path) -> list[Path]:
    """Write report.md, report.json and the plots into `folder` (made when missing). Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        if certificate.levels:
            for name, plot in PLOTS.items():
                plot(certificate.levels, folder / name)
                paths.append(folder / name)
        (folder / "report.json").write_text(json.dumps(certificate.to_json(), indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(certificate), encoding="utf-8")
    except OSError as error:
        raise InputError(f"expected to write a report into {folder}; found {error.strerror}; choose another") from None
    return [folder / "report.md", folder / "report.json", *paths]


PLOTS = {"layers.png": plot_layers, "agreement.png": plot_agreement, "differences.png": plot_differences}


def markdown(certificate: Certificate) -> str:
    """The whole report as GitHub-flavoured Markdown."""
    reference, candidate, prompt = certificate.reference, certificate.candidate, certificate.prompt
    verdict = "passed" if certificate else "FAILED"
    parts = [
        f"# {Path(str(candidate['source'])).name} in {candidate['framework']}: {verdict}",
        f"Compared with {Path(str(reference['source'])).name} in {reference['framework']} over {prompt['tokens']} "
        f"tokens ({prompt['rows']} × {prompt['row_tokens']}; {prompt['origin']}).",
    ]
    if not certificate:
        where = certificate.first_divergence
        parts.append(f"**{summary(certificate)}**" + (f" First divergence: **{where}**." if where else ""))
    parts += ["## Checks", check_table(certificate.checks), "## Models", _models(reference, candidate)]
    if certificate.logits:
        parts += ["## Logits", _logits(certificate)]
    for level in certificate.levels:
        parts += [f"## Hidden states, computing in {level.dtype}", _layers(level)]
        if level.routing:
            parts += [f"## Experts, computing in {level.dtype}", _routing(level)]
    if certificate.levels:
        parts += [
            "![Error of each hidden state of the candidate beside the noise floor of the reference](layers.png)",
            "![Share of positions with the same most likely token, by position](agreement.png)",
            "![Distribution of the errors of the logits](differences.png)",
        ]
    if certificate.greedy:
        parts += ["## A long greedy run", _greedy(certificate.greedy)]
    parts += ["## Made with", _environment(certificate.environment)]
    return "\n\n".join(parts) + "\n"


def summary(certificate: Certificate) -> str:
    """One sentence: how many checks failed, and which."""
    failed = certificate.failures
    if certificate:
        return f"All {sum(check.status == 'pass' for check in certificate.checks)} checks passed."
    names = ", ".join(check.name for check in failed)
    return f"{len(failed)} of {len(certificate.checks)} checks failed: {names}." if failed else "Nothing was compared."


def check_table(checks: list[Check]) -> str:
    """The checks as a Markdown table."""
    rows = [
        (
            SYMBOLS[c.status],
            c.name,
            number(c.measured),
            number(c.limit),
            "; ".join(filter(None, (c.limit_reason, c.detail))),
        )
        for c in checks
    ]
    return table(("", "check", "measured", "limit", "why, or what was found"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def number(value: Any) -> str:
    """Three significant digits, integers and words as they are, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def percent(value: float) -> str:
    return f"{value:.2%}"


def _models(reference: dict[str, Any], candidate: dict[str, Any]) -> str:
    names = {
        "framework": "framework",
        "layout": "layout",
        "declared_dtype": "declared dtype",
        "stored_dtype": "stored dtype",
        "computed_dtypes": "computed in",
        "quantization": "quantization",
        "parameters": "parameters",
        "config_sha256": "config (sha256)",
        "weights_header_sha256": "weights' header (sha256)",
    }

    def cell(side: dict[str, Any], key: str) -> str:
        value = side.get(key)
        if key.endswith("sha256"):
            return str(value)[:12] if value else ""
        if isinstance(value, dict):
            return ", ".join(f"{name} {item}" for name, item in value.items())
        return (
            ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else number(value)
        )

    rows = [(label, cell(reference, key), cell(candidate, key)) for key, label in names.items()]
    return table(("", "reference", "candidate"), rows)


def _logits(certificate: Certificate) -> str:
    figures = certificate.logits
    kl = figures["kl"]
    rows = [
        ("largest difference", number(figures["max_abs"])),
        ("mean, median difference", f"{number(figures['mean_abs'])}, {number(figures['median_abs'])}"),
        ("largest logit", number(figures["reference_max_abs_logit"])),
        ("same most likely token", percent(figures["top1_agreement"])),
        ("ten most likely in common", percent(figures["top10_agreement"])),
        (
            "KL(reference ‖ candidate), nats per token",
            f"{kl['mean']:.3g} ± {kl['standard_error']:.1g} (p99 {kl['p99']:.3g}, max {kl['max']:.3g}, "
            f"{kl['tokens']} tokens)",
        ),
        ("noise ratio", number(certificate.noise_ratio)),
    ]
    header = f"candidate in {figures['candidate_dtype']} against reference in {figures['reference_dtype']}"
    return table((header, ""), rows)


def _layers(level: Level) -> str:
    exact = f"against {level.exact_dtype}" if level.exact_dtype else "against the reference"
    header = (
        "hidden state",
        "largest difference",
        "relative RMS",
        "cosine",
        f"RMS error {exact}",
        "noise floor",
        "ratio",
    )
    rows = [
        (
            f"**{tap.name}**" if tap.diverged else tap.name,
            number(tap.max_abs),
            number(tap.relative_rms),
            f"{tap.cosine:.9f}",
            number(tap.error),
            number(tap.floor) if level.exact_dtype else "",
            f"{tap.ratio:.2f}" + (" ✗" if tap.diverged else ""),
        )
        for tap in level.layers
    ]
    judge = (
        "" if level.judge == "reference" else "Judged by the candidate's own weights in the reference's framework.\n\n"
    )
    return judge + table(header, rows)


def _routing(level: Level) -> str:
    header = ("layer", "same experts", "smallest margin", "median", "largest difference", "widest flip", "allowed")
    rows = [
        (
            str(layer.layer),
            percent(layer.agreement),
            *map(number, (layer.smallest_margin, layer.median_margin, layer.max_abs, layer.widest_flip, layer.allowed)),
        )
        for layer in level.routing
    ]
    return table(header, rows)


def _greedy(greedy: dict[str, Any]) -> str:
    rows = []
    for role in ("reference", "candidate"):
        run = greedy[role]
        loop = run["loop"]
        found = f"from token {loop['start']}, period {loop['period']}" if loop else "none"
        rows.append((role, str(run["tokens"]), "yes" if run["ended"] else "no", found))
    return table(("", "tokens", "came to an end", "first loop"), rows)


def _environment(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{versions}; {environment['cpu']}, {environment['cores']} cores, {environment['system']}."
