"""`isomorph train` from texts to a model folder that every framework loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import isomorph
from isomorph.cli import run as command
from isomorph.train import train
from isomorph.train.export import manifest, thinned
from isomorph.train.metrics import read_metrics
from isomorph.train.run import with_fresh_rows

from .conftest import SHAPE


def arguments(books: Path, out: Path, *more: str) -> list[str]:
    shape = [part for key, value in SHAPE.items() if key != "vocab_size" for part in ("--set", f"{key}={value}")]
    sizes = ["--vocab-size", str(SHAPE["vocab_size"]), "--seq-len", "32", "--batch-size", "4", "--warmup-steps", "4"]
    texts = ["--data", str(books), "--held-out", str(books / "held_out")]
    chat = ["--chat-data", str(books / "questions" / "catechism.txt"), "--chat-steps", "6"]
    rate = ["--learning-rate", "0.01", "--steps", "20"]
    return ["train", "--out", str(out), *shape, *sizes, *texts, *chat, *rate, "--json", *more]


@pytest.fixture(scope="module")
def trained(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert command(arguments(books, out)) == 0
    return out


def test_the_result_is_one_json_document(trained: Path, books: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second call has nothing left to train, and says the same."""
    before = (trained / "text" / "metrics.jsonl").read_text()
    assert command(arguments(books, trained)) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (trained / "text" / "metrics.jsonl").read_text() == before
    assert result["path"] == str(trained / "model")
    assert result["text_steps"] == 20
    assert result["chat_steps"] == 6
    assert 0 < result["held_out_bits_per_byte"] < 8
    assert result["size_bytes"] == (trained / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_the_folder_loads_and_speaks(trained: Path, framework: str) -> None:
    model = isomorph.load(trained / "model", framework=framework)
    assert model.vocab_size == SHAPE["vocab_size"]
    ids = model.tokenizer.encode("The engine")
    state = model.decode_state()
    assert np.isfinite(state.feed(np.array([ids]))).all()


def test_the_measured_bits_per_byte_are_those_of_the_folder(trained: Path, books: Path) -> None:
    """Once more from the exported weights, in another framework, with arithmetic of its own."""
    model = isomorph.load(trained / "model", framework="torch", dtype="float32")
    tokens = model.tokenizer.encode((books / "held_out" / "three.txt").read_text())
    nats, bytes_total = 0.0, 0
    for start in range(0, len(tokens) - 32, 32):
        window = tokens[start : start + 33]
        logits = model.logits(window[:-1])[0].astype(np.float64)
        log_sums = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats += float((log_sums - logits[np.arange(32), window[1:]]).sum())
        # By characters: the text is ASCII and é, which takes two bytes in two tokens or one.
        bytes_total += len(b"".join(token_bytes(model, token) for token in window[1:]))
    record = json.loads((trained / "model" / "training_record.jsonl").read_text().splitlines()[-1])
    assert record["stage"] == "export"
    assert record["held_out_bytes"] == bytes_total
    assert record["held_out_bits_per_byte"] == pytest.approx(nats / np.log(2) / bytes_total, rel=1e-4)
    assert f"**{record['held_out_bits_per_byte']:.3f} bits per byte**" in (trained / "model" / "README.md").read_text()


def token_bytes(model: isomorph.frameworks.model.Model, token: int) -> bytes:
    from isomorph.architectures.talkie.tokenizer import byte_characters

    of = {character: value for value, character in enumerate(byte_characters())}
    return bytes(of[character] for character in model.tokenizer.convert_ids_to_tokens(token))


def test_the_folder_carries_its_origin(trained: Path, books: Path) -> None:
    rows = (trained / "model" / "data.csv").read_text().splitlines()
    assert rows[0] == "file,use,bytes,sha256"
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["one.txt", "training"],
        ["two.txt", "training"],
        ["three.txt", "held out"],
    ]
    assert (trained / "model" / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    stages = {record["stage"] for record in read_metrics(trained / "model" / "training_record.jsonl")}
    assert stages == {"text", "chat", "export"}


def test_a_run_keeps_its_settings(trained: Path, books: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(arguments(books, trained, "--seed", "5")) == 2
    error = capfd.readouterr().err
    assert "text.seed" in error
    assert "another --out" in error
    assert "Traceback" not in error


BAD = {
    "preset": (["--preset", "pockte"], "did you mean 'pocket'"),
    "shape": (["--set", "hiden_size=3"], "hiden_size"),
    "set": (["--set", "hidden_size"], "KEY=VALUE"),
    "architecture": (["--architecture", "talky"], "did you mean 'talkie'"),
    "window": (["--seq-len", "65"], "at most 64"),
    "data": (["--data", "/nowhere"], "nothing at /nowhere"),
    "questions": (["--chat-data", "/nowhere"], "nothing at /nowhere"),
    "vocabulary": (["--tokenizer", "/nowhere"], "/nowhere"),
    "devices": (["--model-parallel", "3"], "model_parallel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more, expected = BAD[case]
    assert command(arguments(books, tmp_path / "out", *more)) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shapes_and_steps_are_asked_for(tmp_path: Path, books: Path) -> None:
    with pytest.raises(isomorph.InputError, match="vocab_size"):
        train(tmp_path, [books])
    with pytest.raises(isomorph.InputError, match="steps"):
        train(tmp_path, [books], config=SHAPE)


def test_fresh_rows_replace_those_of_every_matrix_of_the_vocabulary() -> None:
    before = {"embedding": np.ones((6, 3)), "kernel": np.ones((3, 6)), "gain": np.ones(1)}
    after = with_fresh_rows(before, vocab_size=6, rows=[4, 5], seed=0)  # type: ignore[arg-type]
    assert (after["embedding"][:4] == 1).all()
    assert 0 < np.abs(after["embedding"][4:]).max() < 0.1
    assert (after["kernel"] == 1).all()
    assert (after["gain"] == 1).all()


def test_manifest_takes_what_a_manifest_beside_the_texts_says(tmp_path: Path) -> None:
    (tmp_path / "held_out").mkdir()
    for name in ("a.txt", "held_out/b.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "manifest.csv").write_text("file,title\na.txt,Emma\nheld_out/b.txt,Persuasion\n")
    first, second = manifest([tmp_path / "a.txt"], [tmp_path / "held_out" / "b.txt"])
    assert (first["title"], first["use"], first["bytes"]) == ("Emma", "training", "4")
    assert (second["title"], second["use"]) == ("Persuasion", "held out")


def test_thinning_keeps_what_was_held_out() -> None:
    records = [{"step": step, "loss": 1.0} for step in range(100)] + [{"step": 100, "held_out_bits_per_byte": 2.0}]
    kept = thinned(records, 10)
    assert len(kept) == 11
    assert kept[-1]["held_out_bits_per_byte"] == 2.0
