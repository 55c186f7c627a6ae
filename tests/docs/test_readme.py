"""README says what the code does: its blocks are generated, its tree is the tree, its code runs."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import isomorph

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_generated_blocks_are_current() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert generate["generated"](README) == README, "run: python docs/generate.py"


def test_tree_names_every_folder() -> None:
    tree = re.search(r"```\nsrc/isomorph/\n(.*?)```", README, re.DOTALL)
    assert tree
    named = set(re.findall(r"^  (\w+)/ ", tree[1], re.MULTILINE))
    folders = {path.parent.name for path in (ROOT / "src" / "isomorph").glob("*/__init__.py")}
    assert named == folders


def test_package_docstring_names_the_stages() -> None:
    stages = re.findall(r"\((\w+)(?:, (\w+))?\)", isomorph.__doc__ or "")
    folders = {path.parent.name for path in (ROOT / "src" / "isomorph").glob("*/__init__.py")}
    assert {name for pair in stages for name in pair if name} <= folders


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", python_blocks())
def test_python_runs(code: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_commands_run(tmp_path: Path) -> None:
    commands = re.findall(r"^    (isomorph .*)$", README, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = [sys.executable, "-m", *shlex.split(command)]
        result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stderr[-2000:]}"
