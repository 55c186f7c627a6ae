"""`isomorph convert`, `inspect` and `list` as typed: exit codes, one line of error, JSON on the last line of stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from isomorph.cli import run
from tiny import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def test_convert_prints_what_it_wrote(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(model), str(tmp_path / "t"), "--to", "flax"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "layout flax from transformers, 36 tensors" in captured.err
    assert run(["convert", str(model), str(tmp_path / "u"), "--layout", "mlx-folded", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["layout"] == "mlx-folded"
    assert document["parameters"] == 80_661
    assert {"payload_bytes", "bits_per_weight", "tensors", "files", "path"} <= document.keys()


def test_dry_run_and_inspect_on_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "talkie", "torch_dtype": "bfloat16"}')
    for command in (["convert", str(tmp_path), str(tmp_path / "t"), "--dry-run"], ["inspect", str(tmp_path)]):
        assert run([*command, "--json"]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["parameters"] == 13_280_257_721
        assert document["payload_bytes"] == 26_560_515_442
        assert document["bits_per_weight"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_inspect_prints_a_table_on_stderr(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--context", "64"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in ("layout", "loads in mlx-lm", "runs here", "64 tokens"):
        assert word in captured.err


@pytest.mark.parametrize("what", ["architectures", "layouts"])
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(rows) == len(lines) > 0
    assert all(line.startswith(row["name"]) for line, row in zip(lines, rows))


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "{model}", "{model}"],
        ["convert", "{model}", "{model}", "--force"],
        ["convert", "{missing}", "{target}"],
        ["convert", "{model}", "{target}", "--to", "pytorch"],
        ["convert", "{model}", "{target}", "--layout", "mlx"],
        ["convert", "{model}", "{target}", "--dtype", "int8"],
        ["convert", "{model}", "{target}", "--config", "{missing}"],
        ["convert", "{model}"],
        ["convert", "{model}", "{target}", "--nonsense"],
        ["inspect", "{missing}"],
        ["inspect", "{model}", "--context", "0"],
        ["inspect", "{model}", "--context", "many"],
        ["list", "models"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, model: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"model": model, "missing": tmp_path / "missing", "target": tmp_path / "t"}
    assert run([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("isomorph: ")
    assert not (tmp_path / "t").exists()


def test_a_bare_file_says_what_was_assumed(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("torch")
    assert run(["convert", str(model), str(tmp_path / "o"), "--to", "original"]) == 0
    (tmp_path / "o" / "config.json").unlink()
    command = [sys.executable, "-m", "isomorph", "inspect", str(tmp_path / "o" / "model.pt"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "published defaults assumed: max_position_embeddings=2048, rope_theta=1000000.0" in result.stderr
    assert json.loads(result.stdout)["layout"] == "original"
