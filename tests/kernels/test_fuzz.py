"""Random products, steps and packings under AddressSanitizer and UBSan: shapes, strides, alignments, formats.

The quick tests compile a sample of the formats (`-DSAMPLE=ON`), the full ones all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "isomorph" / "kernels" / "csrc"


def build(folder: Path, *options: str) -> Path:
    """The fuzzer, compiled once and again when its sources have changed."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("needs cmake and a C++ compiler")
    for command in (
        ["cmake", "-S", SOURCES, "-B", folder, *options],
        ["cmake", "--build", folder, "-j2", "-t", "fuzz"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "fuzz"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


FAULTS = {"wrong": "expected", "overrun": "heap-buffer-overflow"}


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0 and "products right" in done.stdout, done.stdout[-500:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def sample() -> Path:
    return build(ROOT / "build" / "sanitized-sample", "-DSANITIZE=ON", "-DSAMPLE=ON")


def test_a_sample_is_clean(sample):
    assert_clean(run(sample, 4, os.getpid()))


@pytest.mark.parametrize("part", ["products", "step", "dense"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(sample, fault, part):
    done = run(sample, 20, 1, fault, part)
    assert done.returncode != 0 and FAULTS[fault] in done.stdout + done.stderr


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build(ROOT / "build" / "sanitized", "-DSANITIZE=ON")


@pytest.mark.full
@pytest.mark.parametrize("part", ["products", "step", "dense", "codec"])
@pytest.mark.parametrize("seed", range(2))
def test_everything_is_clean(sanitized, seed, part):
    assert_clean(run(sanitized, 40, seed, "none", part))


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_packing_are_found(sanitized, fault):
    done = run(sanitized, 20, 1, fault, "codec")
    assert done.returncode != 0 and FAULTS[fault] in done.stdout + done.stderr


@pytest.mark.full
def test_neon_compiles_and_runs(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    processor = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"
    fuzz = build(tmp_path, *processor, f"-DCMAKE_CXX_COMPILER={compiler}")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("compiled, not run: needs qemu-aarch64 (Debian: qemu-user)")
    done = run(emulator, "-L", "/usr/aarch64-linux-gnu", fuzz, 30, 1)
    assert_clean(done)
    assert "neon" in done.stdout
