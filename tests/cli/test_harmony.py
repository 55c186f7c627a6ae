"""`generate` and `chat` of a model that answers in harmony's channels, with the ids of gpt-oss."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fake_model import FakeModel
from generate.test_channels import TEMPLATE
from isomorph.cli import run
from isomorph.cli.options import Loading

#: openai/gpt-oss-20b, tokenizer.json.
IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
VOCABULARY = 201088

THOUGHT = "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant"
ANSWER = f"{THOUGHT}<|channel|>final<|message|>Good day!<|return|>never"
CALL = f"{THOUGHT}<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{{}}<|call|>never"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Single bytes, and harmony's marks at their places."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {index: name for name, index in IDS.items()}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = min(names)
    filled = {letter: index for index, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=filled | {f"{index}!": index for index in range(256, first)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = (names.get(index, f"<|reserved_{index}|>") for index in range(first, max(names) + 1))
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>", chat_template=TEMPLATE)
    assert {name: found.convert_tokens_to_ids(name) for name in IDS} == IDS
    return found


@pytest.fixture
def says(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeModel]:
    """Let every command load a model that says the given text after whatever a user said last."""

    def load(script: str) -> FakeModel:
        start, user, assistant, words = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in ("<|start|>", "<|start|>user", "<|start|>assistant", script)
        )

        def rule(tokens: list[int]) -> np.ndarray:
            begins = [at for at, token in enumerate(tokens) if [token] == start]
            asked = [at for at in begins if tokens[at : at + len(user)] == user]
            prompts = [
                at for at in begins if asked and at > asked[-1] and tokens[at : at + len(assistant)] == assistant
            ]
            place = len(tokens) - prompts[0] - len(assistant) if prompts else -1
            logits = np.zeros(VOCABULARY, np.float32)
            logits[words[place] if 0 <= place < len(words) else 0] = 9.0
            return logits

        model = FakeModel(rule, VOCABULARY, 1000, tokenizer)
        model.architecture = "gpt_oss"
        monkeypatch.setattr(Loading, "load", lambda self, source: model)
        return model

    return load


def generated(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run(["generate", "gpt-oss-20b", "--prompt", "hello", *options]) == 0
    return capsys.readouterr().out


def test_the_final_channel_is_the_answer(says: Any, capsys: pytest.CaptureFixture[str]) -> None:
    says(ANSWER)
    assert generated(capsys) == "Good day!\n"
    assert generated(capsys, "--analysis") == "[analysis]\nThey greet.\n\nGood day!\n"
    found = json.loads(generated(capsys, "--json"))
    assert (found["text"], found["finish_reason"], found["token_ids"][-1]) == ("Good day!", "stop", 200002)
    assert [(one["channel"], one["text"]) for one in found["messages"]] == [
        ("analysis", "They greet."),
        ("final", "Good day!"),
    ]


def test_a_tool_call_ends_the_answer(says: Any, capsys: pytest.CaptureFixture[str]) -> None:
    says(CALL)
    assert generated(capsys) == "\n"
    assert "[commentary to=functions.clock" in generated(capsys, "--analysis")
    found = json.loads(generated(capsys, "--json"))
    assert (found["text"], found["finish_reason"], found["token_ids"][-1]) == ("", "stop", 200012)
    assert found["messages"][-1] == {"channel": "commentary", "recipient": "functions.clock", "text": "{}"}


@pytest.mark.parametrize(("mark", "more"), [("return", 0), ("call", 0), ("endoftext", 0), ("end", 5), ("start", 5)])
def test_the_stop_set(mark: str, more: int, says: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """{200002, 200012, 199999}; what separates messages, the control, ends nothing."""
    says(f"<|channel|>final<|message|>x<|{mark}|>yyyyy<|return|>")
    ids = json.loads(generated(capsys, "--json", "--chat"))["token_ids"]
    assert ids[-1] == (200002 if more else IDS[f"<|{mark}|>"])
    assert ids.count(IDS[f"<|{mark}|>"]) == 1 and len(ids) == 9 + more + bool(more)


def test_reasoning_effort_reaches_the_template(says: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = says(ANSWER)
    for options, effort in (((), "medium"), (("--reasoning", "high"), "high")):
        generated(capsys, *options)
        (row,) = model.states[-1].rows
        assert f"Reasoning: {effort}<|end|>" in tokenizer.decode(row)


@pytest.mark.parametrize("options", [(), ("--analysis",)])
def test_chat_keeps_no_thoughts(
    options: tuple[str, ...],
    says: Any,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = says(ANSWER)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    assert run(["chat", "gpt-oss-20b", *options]) == 0
    turn = "[analysis]\nThey greet.\n\nGood day!\n" if options else "Good day!\n"
    assert capsys.readouterr().out == 2 * turn
    (row,) = model.states[-1].rows
    before, _, after = tokenizer.decode(row).partition("<|start|>user<|message|>again")
    assert "final<|message|>Good day!<|end|>" in before and "analysis" not in before and "analysis" in after
