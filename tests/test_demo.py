"""The demo: one port in the quick suite, all of them in the long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import isomorph.demo
from isomorph.demo import STEPS, demo
from isomorph.errors import InputError

FILES = {"report.md", "report.json", "layers.png", "agreement.png", "models"}


def test_one_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isomorph.demo, "TOKENS", 96)
    monkeypatch.setattr(isomorph.demo, "GREEDY_TOKENS", 8)
    monkeypatch.setattr(isomorph.demo, "ANSWER_TOKENS", 4)
    result = demo(tmp_path / "out", STEPS[:2])
    assert result
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"mlx"}
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [variant["name"] for variant in document["variants"]] == ["torch", "mlx"]
    assert document["variants"][1]["logits"]["top1_agreement"] > 0.9
    assert "[mlx](mlx/report.md)" in (tmp_path / "out" / "report.md").read_text()


def test_nothing_checked_is_no_success(tmp_path: Path):
    assert not isomorph.demo.Demo(tmp_path, "", [])


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="found other files"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.full
def test_the_whole_demo(tmp_path: Path):
    result = demo(tmp_path / "out")
    assert result
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {step.name for step in STEPS[1:]}
    answers = {variant.name: variant.answer for variant in result.variants}
    assert all(answers.values())
