"""Conversations: what is fed again, what is forgotten, what survives an interruption."""

from __future__ import annotations

import numpy as np
import pytest

from fake_model import FakeModel, FakeState, hashed_rule, small_tokenizer
from isomorph.errors import InputError
from isomorph.generate import Conversation, encode_messages, generate

VOCABULARY = 275
END = 271


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def talker(tokenizer, max_positions: int = 2000) -> FakeModel:
    """Says letters that depend on everything before, and ends its turn at the fourth."""
    hashed = hashed_rule(VOCABULARY)

    def rule(tokens: list[int]) -> np.ndarray:
        logits = hashed(tokens).copy()
        logits[:97] = logits[123:] = -50
        since = len(tokens) - 1 - max(at for at, token in enumerate(tokens) if token >= END or at == 0)
        logits[END] = 50 if since == 4 else -50
        return logits

    return FakeModel(rule, VOCABULARY, max_positions, tokenizer)


def fresh_answer(model: FakeModel, system: str | None, turns: list[dict[str, str]], **options) -> str:
    """The same answer without a conversation: everything in one prompt."""
    instruction = [] if system is None else [{"role": "system", "content": system}]
    return generate(model, [*instruction, *turns], **options).text


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.3}])
def test_answers_are_those_of_the_whole_history(tokenizer, options):
    model = talker(tokenizer)
    conversation = Conversation(model, "Be brief.", **options)
    history: list[dict[str, str]] = []
    for text in ("the first", "then another", "é"):
        answer = "".join(conversation.say(text))
        history.append({"role": "user", "content": text})
        assert answer == fresh_answer(model, "Be brief.", history, **options) and len(answer) == 4
        history.append({"role": "assistant", "content": answer})
        assert conversation.messages == history
    # Negative control: the history matters.
    assert answer != fresh_answer(model, "Be brief.", history[-2:-1], **options)
    conversation.reset()
    assert "".join(conversation.say("the first")) == history[1]["content"]


def test_only_new_tokens_are_fed(tokenizer):
    model = talker(tokenizer)
    conversation = Conversation(model)
    first = encode_messages(model, [{"role": "user", "content": "one"}])
    list(conversation.say("one"))
    assert model.fed == [(1, len(first)), *[(1, 1)] * 4]
    model.fed.clear()
    list(conversation.say("two"))
    whole = encode_messages(model, conversation.messages[:-1])
    # Everything up to the last letter is held; `<|end|>` was drawn but never fed.
    assert model.fed[0] == (1, len(whole) - len(first) - 4)
    assert len(model.states) == 1


def test_an_answer_that_is_tokenized_otherwise_in_the_history_is_fed_again(tokenizer):
    """The model spells `the` letter by letter; in the next prompt it is one token."""
    script = [*b"the", END]

    def rule(tokens: list[int]) -> np.ndarray:
        since = len(tokens) - 1 - max(at for at, token in enumerate(tokens) if token >= END)
        return np.eye(VOCABULARY, dtype=np.float32)[script[min(since, 3)]]

    model = FakeModel(rule, VOCABULARY, tokenizer=tokenizer)
    conversation = Conversation(model)
    assert ["".join(conversation.say(text)) for text in ("a", "b")] == ["the", "the"]
    held = model.states[-1].rows[0]
    expected = encode_messages(model, conversation.messages[:-1]).tolist()
    assert held == [*expected, *b"the"] and len(model.states) == 1


def test_a_state_that_cannot_go_back_is_made_anew(tokenizer, monkeypatch):
    model = talker(tokenizer)
    monkeypatch.setattr(FakeState, "trimmable", False)
    conversation = Conversation(model)
    list(conversation.say("one"))
    conversation.reset()
    assert "".join(conversation.say("other")) == fresh_answer(model, None, [{"role": "user", "content": "other"}])


def test_a_state_grows_with_the_conversation(tokenizer):
    model = talker(tokenizer, max_positions=20_000)
    conversation = Conversation(model, max_tokens=50)
    for text in ("one", "two " * 800, "three"):
        answer = "".join(conversation.say(text))
    assert answer == fresh_answer(model, None, conversation.messages[:-1])
    used = [state.max_length for state in model.states if len(state.rows[0]) > 60]
    assert used[0] > 1024 and len(used) <= 2


def test_the_oldest_turns_make_way_and_the_system_message_stays(tokenizer):
    model = talker(tokenizer, max_positions=90)
    conversation = Conversation(model, "Sys.", max_tokens=20)
    dropped = []
    for number in range(6):
        answer = "".join(conversation.say(f"this is message {number}"))
        dropped.append(conversation.dropped)
        assert answer == fresh_answer(model, "Sys.", conversation.messages[:-1], max_tokens=20)
    assert dropped == [0, 0, 1, 1, 1, 1]
    assert conversation.messages[0] == {"role": "user", "content": "this is message 4"}
    with pytest.raises(InputError, match="context of 90 tokens; found 2"):
        conversation.say("long " * 50)
    assert conversation.messages[-1]["content"] == answer


def test_max_kv_size_bounds_the_conversation(tokenizer):
    model = talker(tokenizer)
    conversation = Conversation(model, max_tokens=20, max_kv_size=80)
    for number in range(6):
        list(conversation.say(f"this is message {number}"))
    assert conversation.dropped == 1 and max(max(state.lengths) for state in model.states) <= 80


def test_an_interrupted_answer_is_kept_as_far_as_it_came(tokenizer):
    model = talker(tokenizer)
    conversation = Conversation(model)
    pieces = conversation.say("one")
    seen = next(pieces)
    pieces.interrupt()
    seen += "".join(pieces)
    assert conversation.messages[-1] == {"role": "assistant", "content": seen} and len(seen) == 1
    answer = "".join(conversation.say("two"))
    assert len(model.states) == 1
    assert answer == fresh_answer(model, None, conversation.messages[:-1])


def test_a_step_that_is_cut_short_costs_the_turn_and_the_state(tokenizer, monkeypatch):
    model = talker(tokenizer)
    conversation = Conversation(model)
    list(conversation.say("one"))
    pieces = conversation.say("two")
    next(pieces)
    with monkeypatch.context() as patch:
        patch.setattr(FakeState, "feed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    assert [message["content"] for message in conversation.messages][0::2] == ["one"]
    answer = "".join(conversation.say("three"))
    assert len(model.states) == 2
    assert answer == fresh_answer(model, None, conversation.messages[:-1])


def test_models_that_cannot_chat_are_refused_at_once(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        Conversation(FakeModel(hashed_rule(271), 271, tokenizer=small_tokenizer("base")))
    with pytest.raises(InputError, match="no tokenizer"):
        Conversation(FakeModel(hashed_rule(VOCABULARY), VOCABULARY))
    with pytest.raises(InputError, match="expected top_p"):
        Conversation(talker(tokenizer), top_p=3.0)
    with pytest.raises(InputError, match="fewer than 4 tokens"):
        Conversation(talker(tokenizer), "A system message", max_kv_size=4)
