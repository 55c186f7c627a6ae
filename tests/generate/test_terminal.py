"""The chat loop at a real terminal (a pty), and what the verbs read and print."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_model import FakeModel, scripted_rule, small_tokenizer
from isomorph.errors import InputError
from isomorph.generate.terminal import answer, as_prompt, read_prompt, speeds

TESTS = Path(__file__).resolve().parents[1]

#: Answers `abab...` slowly and without end to a message that ends in `slow`, says `a` and hangs after one that ends in
#: `stuck`, and answers `ok` to any other.
SCRIPT = """
import fcntl, signal, sys, termios, time
if sys.stdin.isatty():
    # Whoever runs the tests in the background may have passed on that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Keys such as Ctrl-C reach the session whose controlling terminal this is.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import numpy as np
from fake_model import FakeModel, small_tokenizer
from isomorph.generate import Conversation
from isomorph.generate.terminal import chat_loop

tokenizer = small_tokenizer()
END = tokenizer.convert_tokens_to_ids("<|end|>")

def rule(tokens):
    start = max(at for at, token in enumerate(tokens) if token > END)
    prompt, said = bytes(token for token in tokens[:start] if token < 256), len(tokens) - 1 - start
    endless = prompt.endswith((b"slow", b"stuck"))
    if endless and said:
        print("hanging" if prompt.endswith(b"stuck") else "", end="", flush=True)
        time.sleep(0.02 if prompt.endswith(b"slow") else 60)
    return np.eye(275, dtype=np.float32)[97 + said % 2 if endless else [111, 107, END][min(said, 2)]]

model = FakeModel(rule, 275, 100_000, tokenizer)
chat_loop(Conversation(model, None, max_tokens=90_000), verbose="--verbose" in sys.argv)
print("left", len(model.states))
"""


class Terminal:
    """A program at a pty: send it lines and keys, wait for what it shows."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def appears(self, text: str, seconds: float) -> bool:
        """Whether `text` is shown within `seconds`."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return False
            try:
                self.shown += os.read(self.master, 4096).decode()
            except OSError:
                raise AssertionError(f"the program ended before {text!r}; shown: {self.shown!r}") from None
        return True

    def wait_for(self, text: str, seconds: float = 240) -> str:
        """What was shown up to and including `text`, which is then forgotten."""
        assert self.appears(text, seconds), f"{text!r} did not come; shown: {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def press(self, key: str, until: str) -> None:
        """Press `key` until `until` is shown: readline misses a signal between its prompt and its `select`."""
        for _ in range(60):
            self.send(key)
            if self.appears(until, seconds=2):
                return
        raise AssertionError(f"{until!r} did not come; shown: {self.shown!r}")

    def close(self) -> int:
        code = self.process.wait(timeout=120)
        os.close(self.master)
        return code


@pytest.fixture
def terminal():
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_turns_commands_and_leaving(terminal):
    program = terminal("--verbose")
    program.wait_for("> ")
    program.send("hello\n")
    assert "\nok\r\n" in program.wait_for("(prompt 8 tokens at").replace("\r\r", "\r")
    program.wait_for("> ")
    program.send("/reset\n")
    program.wait_for("(the conversation starts anew)")
    program.wait_for("> ")
    program.send("/nonsense\n")
    program.wait_for("(unknown command; /reset forgets")
    program.wait_for("> ")
    program.send("\n")
    program.wait_for("> ")
    program.send("/exit\n")
    program.wait_for("left 1")
    assert program.close() == 0


def test_control_c_stops_the_answer_and_not_the_program(terminal):
    program = terminal()
    program.wait_for("> ")
    program.send("make it slow\n")
    program.wait_for("abab")
    program.send("\x03")
    program.wait_for("(stopped)")
    program.wait_for("> ")
    # At the prompt it changes nothing either.
    program.press("\x03", until="/exit (or Ctrl-D) leaves")
    program.wait_for("> ")
    program.send("hello\n")
    program.wait_for("ok")
    program.wait_for("> ")
    program.send("\x04")
    # One decode state: the interrupted one was good enough to go on with.
    program.wait_for("left 1")
    assert program.close() == 0


def test_a_second_control_c_stops_at_once(terminal):
    program = terminal()
    program.wait_for("> ")
    program.send("stuck\n")
    program.wait_for("hanging")
    program.send("\x03")
    # The first only asks: the step that hangs goes on until the second.
    assert not program.appears("stopped", seconds=1)
    program.send("\x03")
    program.wait_for("(stopped; this turn is forgotten)")
    program.wait_for("> ")
    program.send("hello\n")
    program.wait_for("ok")
    program.wait_for("> ")
    program.send("/exit\n")
    program.wait_for("left 2")
    assert program.close() == 0


def test_lines_from_a_pipe_are_answered_without_prompts():
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=b"one\n\xff\xfe\ntwo\n", capture_output=True, env=environment, timeout=120
    )
    assert (run.stdout, run.stderr, run.returncode) == (b"ok\nok\nok\nleft 1\n", b"", 0)


def test_where_a_prompt_comes_from(monkeypatch):
    assert read_prompt("text", None) == "text"
    assert read_prompt(None, "1, 2,3") == read_prompt(None, "[1 2 3]") == [1, 2, 3]
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a\npipe\n"))
    assert read_prompt(None, None) == "from a\npipe"
    for text, ids, message in (("a", "1", "one prompt"), (None, "1,x", "whole numbers"), (None, "", "whole numbers")):
        with pytest.raises(InputError, match=message):
            read_prompt(text, ids)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(InputError, match="expected a prompt; found none"):
        read_prompt(None, None)


def test_which_prompts_take_the_chat_template():
    instruct = FakeModel(scripted_rule([], 0, 275), 275, tokenizer=small_tokenizer())
    base = FakeModel(scripted_rule([], 0, 271), 271, tokenizer=small_tokenizer("base"))
    user = {"role": "user", "content": "hi"}
    assert as_prompt(instruct, "hi", None, None) == [user]
    assert as_prompt(instruct, "hi", "Sys", None) == [{"role": "system", "content": "Sys"}, user]
    assert as_prompt(instruct, "hi", None, False) == as_prompt(base, "hi", None, None) == "hi"
    assert as_prompt(instruct, [1, 2], None, None) == [1, 2]
    for arguments in ((base, "hi", "Sys", None), (instruct, "hi", "Sys", False), (instruct, [1], "Sys", None)):
        with pytest.raises(InputError, match="--system with a chat prompt only"):
            as_prompt(*arguments)
    with pytest.raises(InputError, match="a text for --chat"):
        as_prompt(instruct, [1], None, True)
    with pytest.raises(InputError, match="empty prompt"):
        as_prompt(instruct, "", None, None)


def test_an_answer_is_shown_as_text_or_as_ids(capsys):
    model = FakeModel(scripted_rule([104, 105], 1, 275), 275, tokenizer=small_tokenizer())
    result = answer(model, [1], show=True, max_tokens=2)
    assert capsys.readouterr().out == "hi\n" and result.text == "hi"
    model.tokenizer = None
    answer(model, [1], show=True, max_tokens=2)
    assert capsys.readouterr().out == "104 105\n"
    answer(model, [1], show=False, max_tokens=2)
    assert capsys.readouterr().out == ""
    assert "prompt 1 tokens at" in speeds(result) and "answer 2 tokens at" in speeds(result)
