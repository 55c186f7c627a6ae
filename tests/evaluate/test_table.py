"""Records side by side: figures as they are, and refusals of what does not compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import isomorph
from isomorph.cli import run
from isomorph.errors import InputError
from isomorph.evaluate import divergence, perplexity, table
from numpy_model import NumpyModel

IDS = [(7 * place) % 31 for place in range(200)]


def named(name: str) -> NumpyModel:
    model = NumpyModel()
    model.source = Path(name)
    return model


def test_one_row_a_model() -> None:
    one, other = named("one"), named("other")
    records = [perplexity(model, IDS, "gpt-oss", window=16).to_json() for model in (one, other)]
    records += [divergence(one, model, IDS, "gpt-oss", window=16).to_json() for model in (one, other)]
    text = table(records, {"other": "a better name"}).splitlines()
    assert text[0].startswith("| model | perplexity | nats per token |") and len(text) == 4
    assert text[2].startswith("| one |") and text[3].startswith("| a better name |")
    loss = records[0]["results"]
    assert f"{loss['nll_nats_per_token']:.5f} ± {loss['standard_error_nats_per_token']:.5f}" in text[2]
    assert text[2].endswith("| 100.00% |")


@pytest.mark.parametrize(
    ("protocol", "window", "ids"), [("mlx-lm", 16, IDS), ("gpt-oss", 32, IDS), ("gpt-oss", 16, IDS[1:])], ids=str
)
def test_what_does_not_compare_is_refused(protocol: str, window: int, ids: list[int], tmp_path: Path) -> None:
    """Another protocol, other windows, another text."""
    records = [perplexity(named("one"), IDS, "gpt-oss", window=16).to_json()]
    records.append(perplexity(named("other"), ids, protocol, window=window).to_json())
    with pytest.raises(InputError, match=f"gpt-oss with windows of 16 .* and {protocol} with windows of {window}"):
        table(records)
    for number, record in enumerate(records):
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    assert run(["evaluate", "table", str(tmp_path / "0.json")]) == 0
    assert run(["evaluate", "table", str(tmp_path / "0.json"), str(tmp_path / "1.json")]) == 2


def test_other_references_and_other_kinds_are_refused() -> None:
    one, other = named("one"), named("other")
    records = [divergence(reference, other, IDS, window=16).to_json() for reference in (one, other)]
    with pytest.raises(InputError, match="one reference; found one and other"):
        table(records)
    with pytest.raises(InputError, match="found none"):
        table([isomorph.evaluate.degeneration(one, [1, 2], 4).to_json()])
    with pytest.raises(InputError, match="found one without fingerprint, model"):
        table([{"kind": "perplexity", "results": {}}])
