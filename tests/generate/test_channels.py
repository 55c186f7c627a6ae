"""Answers in channels: what is shown, what is kept, and that headers and thoughts never leak into the text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fake_model import FakeModel, scripted_rule
from isomorph.errors import InputError
from isomorph.generate import Conversation, encode, encode_messages, generate, stop_rules, stream
from isomorph.generate.channels import ChannelMessage, ChannelText

MARKS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>"]

TEMPLATE = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>"
    "{% for tool in tools or [] %}<|start|>developer<|message|>{{ tool.function.name }}<|end|>{% endfor %}"
    "{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "<|start|>assistant<|channel|>commentary to=functions.{{ call.function.name }}<|message|>"
    "{{ call.function.arguments }}<|call|>{% endfor %}"
    "{% if message.content %}<|start|>{{ message.role }}{% if message.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}<|start|>assistant"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Single bytes and the marks of harmony."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>", chat_template=TEMPLATE)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def pushed(tokenizer: Any, text: str, stops: tuple[str, ...] = (), **options: Any) -> tuple[str, ChannelText]:
    answer = ChannelText(tokenizer, stops, **options)
    shown = "".join(answer.push(token) for token in ids(tokenizer, text))
    return shown + answer.finish(), answer


WHOLE = (
    "<|channel|>analysis<|message|>They greet. — I greet.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.clock<|message|>{}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Good day, é!"
)


def test_only_the_final_channel_is_text(tokenizer: Any) -> None:
    shown, answer = pushed(tokenizer, WHOLE)
    assert shown == answer.text == "Good day, é!"
    assert answer.messages == (
        ChannelMessage("analysis", None, "They greet. — I greet."),
        ChannelMessage("commentary", "functions.clock", "{}"),
        ChannelMessage("final", None, "Good day, é!"),
    )


def test_thoughts_are_shown_when_asked_for(tokenizer: Any) -> None:
    shown, answer = pushed(tokenizer, WHOLE, show_analysis=True)
    assert shown == ("[analysis]\nThey greet. — I greet.\n\n[commentary to=functions.clock]\n{}\n\nGood day, é!")
    assert answer.text == "Good day, é!"


def test_an_answer_without_headers_is_all_text(tokenizer: Any) -> None:
    shown, answer = pushed(tokenizer, "plain text")
    assert shown == answer.text == "plain text"
    assert answer.messages == (ChannelMessage("final", None, "plain text"),)


@pytest.mark.parametrize("cut", range(0, len(WHOLE), 7))
def test_wherever_an_answer_ends_no_thought_leaks(tokenizer: Any, cut: int) -> None:
    answer = ChannelText(tokenizer, ())
    tokens = ids(tokenizer, WHOLE)[:cut]
    shown = "".join(answer.push(token) for token in tokens) + answer.finish()
    assert shown == answer.text and "Good day, é!".startswith(shown.rstrip("�"))


def test_stop_strings_count_in_the_final_channel_only(tokenizer: Any) -> None:
    shown, answer = pushed(tokenizer, WHOLE, stops=("greet", "day", "<|end|>"))
    assert (shown, answer.stopped) == ("Good ", True)


def model_that_says(tokenizer: Any, answer: str, messages: list[dict[str, str]], **values: Any) -> FakeModel:
    model = FakeModel(lambda tokens: np.zeros(1), len(tokenizer), 1000, tokenizer)
    model.architecture = "gpt_oss"
    prompt = encode_messages(model, messages, values or None)
    model.rule = scripted_rule(ids(tokenizer, answer), len(prompt), len(tokenizer))
    return model


def test_generate_and_stream(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    model = model_that_says(tokenizer, WHOLE + "<|return|>", messages)
    result = generate(model, messages)
    assert (result.text, result.finish_reason) == ("Good day, é!", "stop")
    assert [message.channel for message in result.messages] == ["analysis", "commentary", "final"]
    assert "".join(stream(model, messages)) == "Good day, é!"
    assert "".join(stream(model, messages, show_analysis=True)).startswith("[analysis]\nThey")


def test_template_values_reach_the_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    model = model_that_says(tokenizer, "ok<|return|>", messages, reasoning_effort="high")
    assert generate(model, messages, chat_template={"reasoning_effort": "high"}).text == "ok"
    assert generate(model, messages, max_tokens=3).text != "ok"  # another prompt, so another place in the script
    with pytest.raises(InputError, match="expected chat_template to map"):
        generate(model, messages, chat_template="high")


def test_history_keeps_no_thoughts(tokenizer: Any) -> None:
    model = model_that_says(tokenizer, WHOLE + "<|return|>", [{"role": "user", "content": "hello"}])
    conversation = Conversation(model, None, max_tokens=200)
    assert "".join(conversation.say("hello")) == "Good day, é!"
    assert conversation.messages[-1] == {"role": "assistant", "content": "Good day, é!"}
    prompt = tokenizer.decode(encode_messages(model, conversation.messages))
    assert "analysis" not in prompt and "Good day" in prompt


def test_plain_prompts_are_continued_as_text(tokenizer: Any) -> None:
    model = FakeModel(scripted_rule(ids(tokenizer, " end<|return|>"), 3, len(tokenizer)), len(tokenizer), 99, tokenizer)
    assert len(encode(model, "the")) == 3
    assert generate(model, "the").text == " end"


CALL = (
    "<|channel|>analysis<|message|>I look.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.clock<|message|>{}"
)
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def test_a_call_of_a_tool_ends_the_answer_and_its_result_continues_it(tokenizer: Any) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "what time is it?"}]
    model = model_that_says(tokenizer, CALL + "<|call|>more", messages, tools=TOOLS)
    result = generate(model, messages, chat_template={"tools": TOOLS})
    assert (result.text, result.finish_reason) == ("", "stop")
    assert result.messages[-1] == ChannelMessage("commentary", "functions.clock", "{}")
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    prompt = tokenizer.decode(encode_messages(model, messages, {"tools": TOOLS}))
    assert "to=functions.clock<|message|>{}<|call|><|start|>tool<|message|>noon<|end|>" in prompt
    with pytest.raises(InputError, match="a role and a content"):
        encode_messages(model, [{"role": "assistant"}])


def test_what_ends_an_answer(tokenizer: Any) -> None:
    """gpt-oss' stop set by name (200002, 200012, 199999 there); `<|end|>` (200007) never, whatever a file says."""
    model = FakeModel(lambda tokens: np.zeros(1), len(tokenizer), 99, tokenizer)
    model.architecture = "gpt_oss"
    known = tokenizer.get_added_vocab()
    ends = {known[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")}
    assert stop_rules(model).ids == ends
    model.config = SimpleNamespace(eos_token_id=[known["<|end|>"], known["<|return|>"]])
    assert stop_rules(model).ids == ends
