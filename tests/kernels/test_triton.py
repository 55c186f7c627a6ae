"""The Triton kernels without a GPU: in Triton's interpreter against float64, and compiled for one all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it is for Linux)")

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> None:
    """Python in a process of its own: how Triton runs kernels is settled when it is imported."""
    root = str(HERE.parent)
    known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, **environment}
    done = subprocess.run([sys.executable, *command], env={**os.environ, **known}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_interpreted_kernels_are_exact():
    checks = str(HERE / "triton_checks.py")
    run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", checks, TRITON_INTERPRET="1")


def test_kernels_compile_for_hopper(tmp_path):
    run(str(HERE / "triton_compile.py"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
