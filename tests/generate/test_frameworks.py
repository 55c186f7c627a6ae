"""The same tokens from every framework: published greedy ones, sampled ones, batches, conversations."""

from __future__ import annotations

import numpy as np
import pytest

import isomorph
from fake_model import small_tokenizer
from isomorph.frameworks import FRAMEWORKS
from isomorph.generate import Conversation, generate
from tiny import tiny_config, write_checkpoint

#: The first reaches the end of the context (96) before the second.
PROMPTS = [[*range(20, 110)], [*range(110, 190)]]
SAMPLED = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "top_k": 60, "repetition_penalty": 1.1, "seed": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(vocab_size=275, num_hidden_layers=2, max_position_embeddings=96)
    return write_checkpoint(tmp_path_factory.mktemp("model"), config, seed=4)


@pytest.fixture(scope="module")
def sampled(folder):
    """What numpy draws from torch's logits; the other frameworks must draw the same."""
    return [row.token_ids for row in isomorph.load(folder, framework="torch").generate(PROMPTS, **SAMPLED)]


@pytest.fixture(scope="module", params=FRAMEWORKS)
def model(request, folder):
    pytest.importorskip({"mlx": "mlx.core"}.get(request.param, request.param))
    return isomorph.load(folder, framework=request.param, tokenizer=small_tokenizer())


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("source", ["hf", "original.pt"])
def test_published_greedy_tokens(shared, framework, source):
    golden = shared / "golden" / "talkie" / "public"
    expected = np.load(golden / "expected.npz")
    for table, key in (("bfloat16", "greedy"), ("float32", "greedy_fp32_rope")):
        if source != "hf" and table == "float32":
            continue
        options = {"config": golden / "hf" / "config.json"} if source != "hf" else {}
        model = isomorph.load(golden / source, framework=framework, rope_table_dtype=table, **options)
        found = model.generate(expected["input_ids"], max_tokens=32)
        assert [row.token_ids for row in found] == expected[key].tolist()
        assert {row.finish_reason for row in found} == {"length"}


def test_a_seed_gives_the_same_tokens_in_every_framework(model, sampled):
    assert [row.token_ids for row in model.generate(PROMPTS, **SAMPLED)] == sampled
    assert [row.token_ids for row in model.generate(PROMPTS, **SAMPLED | {"seed": 9})] != sampled


@pytest.mark.parametrize("options", [{"max_tokens": 50}, SAMPLED])
def test_ragged_rows_get_what_they_get_alone_to_the_end_of_the_context(model, options):
    found = generate(model, PROMPTS, **options)
    assert [row.token_ids for row in found] == [generate(model, prompt, **options).token_ids for prompt in PROMPTS]
    assert all(row.prompt_tokens + row.generation_tokens <= model.max_positions for row in found)


def test_a_conversation_on_one_state_says_what_the_whole_history_says(model):
    conversation = Conversation(model, max_tokens=8)
    for text in ("one", "and two"):
        answer = "".join(conversation.say(text))
        assert answer == generate(model, conversation.messages[:-1], max_tokens=8).text
    # The state goes back to where the two conversations part.
    first = conversation.messages[1]["content"]
    conversation.reset()
    assert "".join(conversation.say("one")) == first
