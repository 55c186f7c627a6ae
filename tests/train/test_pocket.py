"""The shipped pocket Talkie is what its card says: trained in every part, small, readable, able to end an answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

import isomorph
from isomorph import pocket
from isomorph.checkpoint import open_checkpoint
from isomorph.errors import InputError
from isomorph.frameworks.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return isomorph.load(pocket.path(), framework="flax", dtype="float32")


def test_unknown_names_are_refused() -> None:
    assert "talkie" in pocket.names()
    with pytest.raises(InputError, match="did you mean 'talkie'"):
        pocket.path("talky")


def test_size() -> None:
    assert sum(file.stat().st_size for file in pocket.path().iterdir()) <= 10_000_000
    assert 150_000 < len(pocket.heldout_text().encode()) < 250_000


def test_gelu_gpt_is_what_its_card_says() -> None:
    """Small, trained in every part, better than chance by far; scrambled tokens, the control, are far from it."""
    folder = pocket.path("gelu_gpt")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    card = (folder / "README.md").read_text()
    assert "CC BY-SA" in card
    assert "2 seeds after 800 steps, mean ± standard deviation" in card
    tensors = {name: tensor.read().astype(np.float32) for name, tensor in open_checkpoint(folder).tensors.items()}
    assert sum(tensor.size for tensor in tensors.values()) == 655_414
    assert f"{sum(tensor.size for tensor in tensors.values()) / 1e6:.1f} million parameters" in card
    initial = {"model.smear_lambda": 0.0, "model.backout_lambda": 0.2}
    assert all((np.abs(tensors[name] - start) > 1e-2).all() for name, start in initial.items())
    model = isomorph.load("pocket:gelu_gpt", framework="flax", dtype="float32")
    text = " The ship was launched in 1912 and sold to the navy . It was used in the war until 1945 ."
    ids = np.array([model.tokenizer.encode(text)])
    assert ids[0, 0] == model.tokenizer.bos_token_id

    def nats(ids: np.ndarray) -> float:
        logits = model.logits(ids[:, :-1]).astype(np.float64)
        log_sums = np.log(np.exp(logits).sum(-1))
        return float((log_sums - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]).mean())

    assert nats(ids) < 3.5
    assert nats(np.random.default_rng(0).permuted(ids, axis=1)) > 5


def test_every_gain_and_skip_is_trained() -> None:
    checkpoint = open_checkpoint(pocket.path())
    layers = checkpoint.config["num_hidden_layers"]  # type: ignore[index]
    initial = {"head_g": 1.0, "attn_gain.a_g": (2 * layers) ** -0.5, "mlp_gain.a_g": (2 * layers) ** -0.5}
    initial |= {"embed_skip.a_g": 0.0, "w_g": 1.0}
    seen = 0
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == "bfloat16"
        for gain, start in initial.items():
            if name.endswith(gain):
                seen += 1
                assert (np.abs(tensor.read().astype(np.float32) - start) > 1e-3).any(), name
    assert seen == 4 * layers + 1


def test_held_out_bits_per_byte(model: Model) -> None:
    """2.2 or less on a sample of text it never saw; scrambled tokens, the control, are far from it."""
    tokens = np.array(model.tokenizer.encode(pocket.heldout_text())[: 8 * 512 + 1])
    rows = np.stack([tokens[start : start + 513] for start in range(0, 8 * 512, 512)])
    bytes_total = sum(len(model.tokenizer.decode(row[1:]).encode()) for row in rows)

    def bits(rows: np.ndarray) -> float:
        logits = model.logits(rows[:, :-1]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -float(np.take_along_axis(log_probabilities, rows[:, 1:, None], -1).sum()) / np.log(2) / bytes_total

    assert bits(rows) < 2.2
    assert bits(np.random.default_rng(0).permuted(rows, axis=1)) > 3


def test_the_card_says_what_the_record_says() -> None:
    lines = (pocket.path() / "training_record.jsonl").read_text().splitlines()
    final = json.loads(lines[-1])
    assert final["stage"] == "export"
    assert final["held_out_bits_per_byte"] < 2.2
    card = (pocket.path() / "README.md").read_text()
    assert f"**{final['held_out_bits_per_byte']:.3f} bits per byte**" in card
    assert f"{final['held_out_tokens']:,}" in card


def test_it_continues_and_it_answers(model: Model) -> None:
    tokenizer = model.tokenizer
    story = model.generate("It was a dark and stormy night, and the old house", max_tokens=60)
    words = story.text.split()
    assert len(words) > 25
    assert len({word.lower() for word in words}) > 12
    answer = model.generate([{"role": "user", "content": "What is a vacuum?"}], max_tokens=256)
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
