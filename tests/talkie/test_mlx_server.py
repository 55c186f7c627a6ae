"""The real `mlx_lm.server` on a folder that convert wrote: eight people at once get what each would get alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import isomorph
from speaking import BLOCKED, environment, with_tokenizer

#: Questions of eight lengths; two share a beginning, so that the server reuses a cache.
QUESTIONS = (
    "the cat",
    "the cat sat on the mat and said nothing at all",
    "x",
    "in the beginning there was",
    "on and on it goes, and nobody knows where it ends or why it does",
    "8",
    "once upon a time",
    "what is the capital of the other place, and who lives there?",
)
START_SECONDS = 120


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server on loopback, in a process without isomorph; gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = BLOCKED + "from mlx_lm.server import main\nmain()"
    options = ["--model", str(folder), "--port", str(port), "--trust-remote-code", "--log-level", "ERROR"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *options], env=environment(), stdout=output, stderr=output
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(address: str, question: str, **options: Any) -> tuple[str, str]:
    """The greedy answer to one question, and why it ended."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 40, "temperature": 0.0, **options}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choice = json.load(response)["choices"][0]
    return choice["message"].get("content", ""), choice["finish_reason"]


def together(address: str) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(len(QUESTIONS)) as people:
        return list(people.map(lambda question: ask(address, question), QUESTIONS))


def alone(address: str) -> list[tuple[str, str]]:
    # A request with a seed never joins a batch.
    return [ask(address, question, seed=0) for question in QUESTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("served")
    isomorph.convert(with_tokenizer(base / "source"), base / "served", layout="mlx-folded")
    return base / "served"


def test_eight_requests_at_once_get_the_answers_of_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    with server(folder, tmp_path / "log") as address:
        cold = together(address)
        expected = alone(address)
        assert cold == expected
        assert together(address) == expected  # now with what the prompt cache remembers
    assert len(set(expected)) == len(QUESTIONS) and all(answer for answer, _ in expected)


def test_rows_that_share_an_offset_would_be_seen(folder: Path, tmp_path: Path) -> None:
    """The control: with the longest row's offset for all, the same questions get other answers in a batch only."""
    file = folder / "modeling_mlx.py"
    right = file.read_text()
    wrong = right.replace("offset = offset + 0", "offset = int(mx.max(offset))")
    assert wrong != right
    file.write_text(wrong)
    try:
        with server(folder, tmp_path / "log") as address:
            expected = alone(address)
            assert together(address) != expected
            assert alone(address) == expected
    finally:
        file.write_text(right)
