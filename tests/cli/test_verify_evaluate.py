"""`isomorph verify`, `isomorph evaluate`: exit codes, the last line of stdout, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isomorph.cli import run
from isomorph.verify.mutations import mutate
from tiny import write_checkpoint

SMALL = ["--tokens", "64", "--greedy-tokens", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "model")


def test_verify_passes_with_exit_code_0_and_json_last(model: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["verify", str(model), str(model), "--candidate-framework", "mlx", "--json", *SMALL]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document["passed"] is True and document["first_divergence"] is None
    assert document["noise_ratio"] < 2 and document["logits"]["top1_agreement"] == 1
    assert len(captured.out.splitlines()) == 1 and "passed" in captured.err


def test_verify_fails_with_exit_code_1(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = mutate(model, tmp_path / "wrong", "skip-dropped")
    arguments = ["verify", str(model), str(wrong), "--json", "--report", str(tmp_path / "report"), *SMALL]
    assert run(arguments) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["passed"] is False and document["first_divergence"] == "block 0"
    assert "FAILED" in (tmp_path / "report" / "report.md").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "MODEL", "/nowhere/at/all"], "/nowhere/at/all"),
        (["verify", "MODEL", "MODEL", "--candidate-framework", "mxl"], "did you mean 'mlx'"),
        (["verify", "MODEL", "MODEL", "--text", "/nowhere.txt"], "expected a text file"),
        (["verify", "MODEL", "MODEL", "--tokens", "1"], "at least 2 tokens"),
        (["verify", "MODEL", "MODEL", "--greedy-tokens", "-3"], "at least one token"),
        (["evaluate", "perplexity", "MODEL"], "no tokenizer"),
        (["evaluate", "degeneration", "MODEL", "--prompt", "words"], "no tokenizer"),
        (["evaluate", "perplexity", "MODEL", "--protocol", "windowd"], "did you mean 'windowed'"),
        (["evaluate", "perplexity", "MODEL", "--limit", "-1"], "at least 2 tokens"),
        (["evaluate", "perplexity", "/nowhere", "--text", "/nowhere.txt"], "expected a text file"),
        (["evaluate", "divergence", "MODEL"], "see `isomorph evaluate divergence --help`"),
        (["evaluate", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert run([str(model) if argument == "MODEL" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error


def test_evaluate_on_the_pocket_model(capsys: pytest.CaptureFixture[str]):
    from isomorph import pocket

    source = str(pocket.path())
    assert run(["evaluate", "perplexity", source, "--limit", "600", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["kind"] == "perplexity" and record["results"]["tokens_scored"] == 598
    assert 1 < record["results"]["bits_per_byte"] < 3
    assert run(["evaluate", "degeneration", source, "--prompt", "It was", "--max-tokens", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["tokens"] <= 8
