"""A real `mlx_lm.server` in a process of its own, and a person who asks it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speaking import BLOCKED, environment

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
    choice = answer(address, question, **options)["choices"][0]
    return choice["message"].get("content", ""), choice["finish_reason"]


def answer(address: str, question: str, **options: Any) -> dict[str, Any]:
    """All that the server says to one question."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 40, "temperature": 0.0, **options}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
