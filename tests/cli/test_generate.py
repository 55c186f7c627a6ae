"""The verbs `generate` and `chat` on a tiny model with a tokenizer."""

from __future__ import annotations

import inspect
import io
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from isomorph.architectures.talkie import tokenizer as talkie
from isomorph.cli import run
from isomorph.cli.options import Loading
from isomorph.load import load
from isomorph.train.vocabulary import save_vocabulary
from tiny import tiny_config, write_checkpoint

RANKS = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"\n\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An instruct model; `raw` beside it is the same without tokenizer."""
    base = tmp_path_factory.mktemp("models")
    config = tiny_config(vocab_size=len(RANKS) + 5, num_hidden_layers=1, max_position_embeddings=64)
    write_checkpoint(base / "raw", config)
    model = write_checkpoint(base / "model", config)
    vocabulary = base / "vocab.txt"
    save_vocabulary(RANKS, vocabulary)
    talkie.write(vocabulary, model, len(RANKS) + 5)
    return model


def test_everything_that_load_takes_is_an_option():
    given = {option.name for option in fields(Loading)}
    assert given == set(inspect.signature(load).parameters) - {"source"}


def test_a_config_and_the_rounding_of_tables(folder, tmp_path, capsys):
    arguments = ["generate", str(folder), "--prompt", "the the", "--max-tokens", "2", "--json"]
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 6}))
    assert run([*arguments, "--rope-table-dtype", "float32"]) == 0
    assert run([*arguments, "--rope-table-dtype", "float8"]) == 2
    assert "'float32' (accurate)" in capsys.readouterr().err
    assert run([*arguments, "--config", str(tmp_path / "config.json")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["finish_reason"], document["generation_tokens"]) == ("length", 1)  # five of six are the prompt's


def test_generate_streams_text_and_reports_speed(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", "the the", "--max-tokens", "8"]
    assert run([*arguments, "--verbose"]) == 0
    shown = capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert shown.out == document["text"] + "\n"
    # Two tokens, and the three markers of the template.
    assert document["prompt_tokens"] == 5
    assert "tokens/s" in shown.err and f"({document['finish_reason']})" in shown.err


def test_a_prompt_from_stdin_with_and_without_the_template(folder, capsys, monkeypatch):
    counts = []
    for options in ([], ["--raw"], ["--chat", "--system", "Be."]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the\n"))
        assert run(["generate", str(folder), "--max-tokens", "2", "--json", *options]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    # `the` is one token; the template adds a marker before, one after and the assistant's; the system turn has five.
    assert counts == [4, 1, 9]


def test_ids_without_a_tokenizer(folder, capsys):
    assert run(["generate", str(folder.parent / "raw"), "--ids", "1,2,3", "--max-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.split()) == 4


def test_a_seed_repeats_a_sampled_answer(folder, capsys):
    arguments = ["generate", str(folder), "--prompt", "a", "--temperature", "1", "--max-tokens", "9", "--json"]
    found = []
    for seed in ("1", "1", "2"):
        assert run([*arguments, "--seed", seed, "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"]) == 0
        found.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL", "--prompt", ""], "empty prompt"),
        (["generate", "MODEL", "--ids", "1,999"], "token ids in 0..264; found 999"),
        (["generate", "MODEL", "--ids", ",".join(["1"] * 70)], "at most 64 tokens"),
        (["generate", "MODEL", "--prompt", "a" * 80, "--raw"], "at most 64 tokens"),
        (["generate", "MODEL", "--prompt", "a", "--ids", "1"], "one prompt"),
        (["generate", "MODEL", "--prompt", "a", "--raw", "--system", "b"], "--system with a chat prompt only"),
        (["generate", "MODEL", "--prompt", "a", "--top-p", "2"], "expected top_p"),
        (["generate", "MODEL", "--prompt", "a", "--max-tokens", "0"], "expected max_tokens"),
        (["generate", "MODEL", "--prompt", "a", "--max-kv-size", "2"], "max_kv_size"),
        (["generate", "MODEL", "--prompt", "a", "--framework", "keras"], "framework"),
        (["generate", "MODEL", "--prompt", "a", "--tokenizer", "nowhere"], "found nothing at"),
        (["generate", "RAW", "--prompt", "a"], "no tokenizer"),
        (["generate", "RAW", "--ids", "1", "--stop", "x"], "no tokenizer"),
        (["chat", "RAW"], "no tokenizer"),
        (["chat", "MODEL", "--system", "a" * 80], "fewer than 64 tokens"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(folder, capsys, arguments, message):
    places = {"MODEL": str(folder), "RAW": str(folder.parent / "raw")}
    assert run([places.get(argument, argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_chat_answers_lines(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n/reset\nthe\n" + "a" * 80 + "\n/exit\nnever\n"))
    assert run(["chat", str(folder), "--max-tokens", "5", "--verbose"]) == 0
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert first == second
    assert "(the conversation starts anew)" in shown.err and "expected a message that fits the context" in shown.err
    assert shown.err.count("tokens/s") == 2 * 2
