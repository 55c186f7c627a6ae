"""Records side by side: one row a model, of numbers that compare and of no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isomorph.errors import InputError

#: Column -> (kind of record, its result, the result that is its standard error).
COLUMNS = {
    "perplexity": ("perplexity", "perplexity", None),
    "nats per token": ("perplexity", "nll_nats_per_token", "standard_error_nats_per_token"),
    "bits per byte": ("perplexity", "bits_per_byte", None),
    "KL, nats per token": ("divergence", "kl_nats_per_token", "kl.standard_error"),
    "top-1 agreement": ("divergence", "top1_agreement", None),
}


def table(records: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> str:
    """Perplexity and divergence `records` (as JSON) as a Markdown table; `names` maps a model's source to a row's name.

    Raises InputError for records of other tokens or windows than the first one's (another text, tokenizer, protocol or
    context), of divergences from another reference, or of nothing that a table shows: such numbers do not compare.
    """
    for record in records:
        if missing := sorted({"kind", "model", "protocol", "results", "fingerprint"} - record.keys()):
            raise InputError(f"expected records as evaluate --json prints them; found one without {', '.join(missing)}")
    shown = [record for record in records if record["kind"] in {kind for kind, *_ in COLUMNS.values()}]
    if not shown:
        raise InputError("expected records of perplexity or divergence; found none; give what evaluate --json printed")
    _comparable(shown)
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in shown:
        rows.setdefault(str(record["model"]["source"]), {})[record["kind"]] = record
    kinds = {kind for row in rows.values() for kind in row}
    columns = [name for name, (kind, *_) in COLUMNS.items() if kind in kinds]
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for source, row in rows.items():
        lines.append(f"| {(names or {}).get(source, source)} | {' | '.join(_cell(row, name) for name in columns)} |")
    return "\n".join(lines)


def _comparable(records: Sequence[Mapping[str, Any]]) -> None:
    first = records[0]
    for record in records[1:]:
        if record["fingerprint"] != first["fingerprint"]:
            found = " and ".join(_scored(one) for one in (first, record))
            raise InputError(f"expected records of the same tokens and windows; found {found}; measure them alike")
    references = {str(record["reference"]["source"]) for record in records if record["kind"] == "divergence"}
    if len(references) > 1:
        raise InputError(f"expected divergences from one reference; found {' and '.join(sorted(references))}")


def _scored(record: Mapping[str, Any]) -> str:
    protocol = record["protocol"]
    return f"{protocol['name']} with windows of {protocol['window']} (fingerprint {record['fingerprint']})"


def _cell(row: Mapping[str, Mapping[str, Any]], column: str) -> str:
    kind, result, error = COLUMNS[column]
    if kind not in row:
        return ""
    value = _at(row[kind]["results"], result)
    if column == "perplexity":
        low, high = row[kind]["results"]["perplexity_interval_95"]
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    if column == "top-1 agreement":
        return f"{value:.2%}"
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.5f} ± {_at(row[kind]['results'], error):.5f}"


def _at(results: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    value: Any = results
    for part in path.split("."):
        value = value[part]
    return value
