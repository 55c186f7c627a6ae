"""One dial: the published shape at depth 12, and a small model of the same recipe from text to every framework."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isomorph
from isomorph import architectures
from isomorph.cli import run as command
from isomorph.errors import InputError
from isomorph.train.presets import recipe
from isomorph.train.run import model_maker
from isomorph.train.vocabulary import fast_vocabulary

#: A minute of compiling on two cores.
full = pytest.mark.full


def parameters(config: dict) -> int:
    architecture = architectures.get("gelu_gpt")
    assert architecture is not None
    shapes = architecture.parameters(architecture.config_class.from_dict(config))  # type: ignore[attr-defined]
    return sum(math.prod(shape) for shape in shapes.values())


def test_depth_12_is_the_published_model() -> None:
    preset = recipe("gelu_gpt", 12, {}, {})
    shapes = {"n_embd": 768, "n_head": 12, "n_kv_head": 12, "vocab_size": 32768, "sequence_len": 1024, "n_layer": 12}
    assert dict(preset.config) == shapes
    assert parameters(dict(preset.config)) == 261_096_338
    assert preset.text.learning_rate == 0.01
    tokens = preset.text.steps * preset.text.batch_size * preset.text.sequence_length
    assert 0 <= tokens - 20 * 261_096_338 < preset.text.batch_size * preset.text.sequence_length


def test_remat_is_for_models_that_have_it() -> None:
    settings = replace(recipe("gelu_gpt", 12, {}, {}).text, remat=True)
    for name in ("gelu_gpt", "talkie"):
        architecture: Any = architectures.get(name)
        config = architecture.config_class.from_dict({})
        if name == "gelu_gpt":
            maker: Any = model_maker(architecture, config, [settings])
            assert maker.keywords == {"remat": True}
            continue
        with pytest.raises(InputError, match="no remat for talkie"):
            model_maker(architecture, config, [settings])


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_steps_follow_the_parameters(depth: int) -> None:
    preset = recipe("gelu_gpt", depth, {"vocab_size": 640}, {"batch_size": 4, "sequence_length": 256})
    assert preset.config["n_embd"] == 64 * depth
    assert preset.text.steps == math.ceil(20 * parameters(dict(preset.config)) / (4 * 256))
    assert recipe("gelu_gpt", depth, {}, {"steps": 7}).text.steps == 7


def arguments(books: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--depth", "1", "--vocab-size", "300", "--seq-len", "32", "--batch", "4", "--steps", "8"]
    texts = ["--data", str(books), "--held-out", str(books / "held_out")]
    return ["train", "--out", str(out), *sizes, *texts, "--seeds", "3", "--other-seeds", "0.5", "--json", *more]


@pytest.fixture(scope="module")
def trained(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe") / "out"
    assert command(arguments(books, out)) == 0
    return out


@full
def test_seeds_and_their_spread(trained: Path) -> None:
    card = (trained / "model" / "README.md").read_text()
    assert "| 0 | 8 | 1,024 |" in card
    assert "| 2 | 4 | 512 |" in card
    assert "2 seeds after 4 steps, mean ± standard deviation: loss " in card
    losses = [json.loads((trained / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()[0]) for seed in (1, 2)]
    assert losses[0] != losses[1]


@full
def test_the_folder_loads_in_every_framework(trained: Path) -> None:
    models = [isomorph.load(trained / "model", framework=name, dtype="float32") for name in ("torch", "flax")]
    tokenizer = models[0].tokenizer
    ids = tokenizer("The engine condenses the steam.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 299
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The engine condenses the steam."
    logits = [model.logits(np.array([ids])) for model in models]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)


@full
def test_the_learned_tokenizer_knows_its_sizes(trained: Path) -> None:
    vocabulary = fast_vocabulary(trained / "tokenizer", 300)
    text = "naïve — 𝄞 engines"
    assert vocabulary.size_bytes[vocabulary.encode(text)].sum() == len(text.encode())
    assert vocabulary.size_bytes[vocabulary.separator] == 0


def last_record(out: Path) -> dict:
    return json.loads((out / "text" / "metrics.jsonl").read_text().splitlines()[-1])


@full
@pytest.mark.parametrize("spread", ["8 devices", "2 processes"])
def test_devices_and_processes_train_like_one(spread: str, books: Path, tmp_path: Path) -> None:
    sizes = ["--depth", "2", "--vocab-size", "300", "--seq-len", "32", "--batch", "8", "--steps", "6", "--seed", "3"]
    words = [sys.executable, "-m", "isomorph", "train", "--data", str(books), *sizes]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([*words, "--out", str(tmp_path / "one")], env=environment, check=True, timeout=300)
    words += ["--out", str(tmp_path / "many")]
    if spread == "8 devices":
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        subprocess.run([*words, "--fsdp", "2", "--model-parallel", "2"], env=environment, check=True, timeout=300)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2"]
        each = [subprocess.Popen([*words, *meeting, "--process", str(number)], env=environment) for number in range(2)]
        assert [process.wait(300) for process in each] == [0, 0]
    one, many = last_record(tmp_path / "one"), last_record(tmp_path / "many")
    # Sums in another order differ by float32 rounding.
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert many["smoothed_loss"] == pytest.approx(one["smoothed_loss"], rel=1e-5)
    assert (tmp_path / "many" / "model" / "model.safetensors").is_file()


BAD = {
    "depth": (["--depth", "0"], "depth of at least 1"),
    "dial": (["--architecture", "talkie"], "the recipe is gelu_gpt's"),
    "format": (["--format", "wikitxt"], "did you mean 'wikitext'"),
    "text and dataset": (["--dataset", "allenai/c4"], "give one of the two"),
    "seeds": (["--seeds", "0"], "seeds from 1"),
    "fsdp": (["--fsdp", "3"], "fsdp * model_parallel"),
    "small vocabulary": (["--tokenizer", "/nowhere"], "/nowhere"),
    "chat": (["--chat-data", "{books}/one.txt"], "chat template"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, books: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more, expected = BAD[case]
    assert command(arguments(books, tmp_path / "out", *(word.format(books=books) for word in more))) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
