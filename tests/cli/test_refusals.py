"""Mistakes of a first hour: one line, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from isomorph.cli import run
from tiny import tiny_config, write_checkpoint


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert "see `isomorph --help`" in refused(capsys, "nope")
    assert "see `isomorph inspect --help`" in refused(capsys, "inspect")
    assert "see `isomorph evaluate --help`" in refused(capsys, "evaluate")
    assert "empty name" in refused(capsys, "inspect", "")
    assert run([]) == 0
    assert "quantize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run it again"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/there/run"), 2, "/there/run; found: Read-only file system"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "its files; found: No space left"),
    ],
    ids=str,
)
def test_what_comes_from_outside_is_told_in_one_line(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(what: str) -> None:
        raise error

    monkeypatch.setattr("isomorph.catalogue.catalogue", failing)
    assert run(["list"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and told in captured.err and captured.err.count("\n") == 1
    monkeypatch.undo()
    assert run(["list"]) == 0


def test_damage_beside_the_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, target = write_checkpoint(tmp_path / "source"), tmp_path / "target"
    (source / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused(capsys, "convert", str(source), str(target))
    (source / "tokenizer.json").unlink()
    (source / "config.json").write_text(json.dumps(tiny_config(quantization="yes")))
    assert "'quantization'" in refused(capsys, "convert", str(source), str(target))
    (source / "config.json").write_text(json.dumps(tiny_config()))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert run(["convert", str(source), str(target)]) == 0  # the control: repaired, it converts


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder here in which nobody may write")
def test_a_target_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    assert "writable folder" in refused(capsys, "convert", str(source), "/proc/isomorph-target")
    assert "found ''" in refused(capsys, "convert", str(source), "")


def test_a_report_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, report = str(write_checkpoint(tmp_path / "source")), tmp_path / "report"
    report.write_text("mine")
    assert "expected a folder" in refused(capsys, "verify", source, source, "--report", str(report))
    assert report.read_text() == "mine"
