"""bench: what is counted as read, and a result in every framework."""

from __future__ import annotations

import json

import numpy as np
import pytest

import isomorph
from isomorph.cli import run
from isomorph.errors import InputError
from isomorph.evaluate import throughput
from isomorph.evaluate.throughput import bytes_per_step, bytes_per_token, cache_bytes, read_bandwidth
from tiny import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "model")


def test_bytes_of_a_step_are_the_files_but_for_the_embedding(folder):
    model = isomorph.load(folder, dtype="float32")
    sizes = {name: tensor.nbytes for name, tensor in model.module.named_parameters()}
    table = model.module.get_input_embeddings().weight
    (embedding,) = (name for name, tensor in model.module.named_parameters() if tensor is table)
    rows = table.shape[0]
    expected = sum(sizes.values()) - sizes[embedding] + sizes[embedding] // rows
    assert bytes_per_step(model) == expected
    assert bytes_per_step(model) < sum(sizes.values())
    # Rows of a batch share the weights, not their caches.
    kept = cache_bytes(model, 10)
    assert kept == 2 * 10 * 4 * model.num_layers * model.config.num_attention_heads * model.config.head_dim
    assert bytes_per_token(model, 1, 10) == expected + kept
    assert bytes_per_token(model, 2, 10) - kept == (expected + sizes[embedding] // rows) // 2


@pytest.mark.parametrize("framework", ["torch", "mlx", "flax"])
def test_every_framework_has_a_result(framework, folder):
    model = isomorph.load(folder, framework=framework, dtype="float32")
    calls: list[int] = []
    result = throughput(model, 8, 3, 2, progress=calls.append)
    assert calls == [1, 1, 1]
    assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0
    assert result.time_to_first_token_seconds >= 8 / result.prefill_tokens_per_second * 0.5
    assert result.bytes_read_per_token == bytes_per_token(model, 1, 9)
    rate = result.decode_tokens_per_second * result.bytes_read_per_token
    assert np.isclose(result.read_bandwidth_fraction, rate / result.read_bandwidth_bytes_per_second)


def test_bandwidth_without_the_extension_is_in_the_same_range(monkeypatch):
    fast = read_bandwidth()
    monkeypatch.setattr("isomorph.kernels.extension.find_extension", lambda: None)
    assert 0.1 < read_bandwidth() / fast < 10


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"repetitions": 0}, {"batch_size": -1}, {"prompt_tokens": 10**9}])
def test_impossible_runs_are_refused(wrong, folder):
    with pytest.raises(InputError) as error:
        throughput(isomorph.load(folder), **wrong)
    assert "expected" in str(error.value) and "found" in str(error.value) and "\n" not in str(error.value)


def test_command_line(folder, capsys):
    arguments = [str(folder), "--prompt", "8", "--tokens", "2", "--repetitions", "2", "--batch", "2"]
    assert run(["bench", *arguments, "--numerics", "fast", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("decode", "prefill"):
        assert document[f"{name}_tokens_per_second"] > 0 and document[f"{name}_tokens_per_second_sd"] >= 0
    assert document["bytes_read_per_token"] > 0 and document["read_bandwidth_fraction"] > 0
    assert document["environment"]["cpu"] and document["threads"] >= 1 and document["peak_memory_bytes"] > 0
    assert run(["bench", *arguments, "--prompt", "12", "--repetitions", "1", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [one["prompt_tokens"] for one in runs] == [8, 12] and all(one["new_tokens"] == 2 for one in runs)
    assert run(["bench", *arguments, "--tokens", "0"]) == 2
    assert run(["bench", *arguments, "--numerics", "quick"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
