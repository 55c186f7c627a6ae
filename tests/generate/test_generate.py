"""The engine on a model that is a Python function: what is fed, what is drawn, where it ends."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fake_model import FakeModel, hashed_rule, scripted_rule, small_tokenizer
from isomorph.errors import InputError
from isomorph.generate import Options, generate, stop_rules, stream

VOCABULARY = 275
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def model() -> FakeModel:
    """Without tokenizer, so that nothing but the length ends an answer."""
    return FakeModel(hashed_rule(VOCABULARY), VOCABULARY)


def scripted(tokenizer, answer: list[int], prompt_tokens: int = 2, **options) -> FakeModel:
    return FakeModel(scripted_rule(answer, prompt_tokens, VOCABULARY), VOCABULARY, tokenizer=tokenizer, **options)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, split_special_tokens=True)


def follow(model: FakeModel, prompt: list[int], tokens: int) -> list[int]:
    """Greedy decoding by full forward passes, the slow way."""
    row = list(prompt)
    for _ in range(tokens):
        row.append(int(model.logits([row])[0, -1].argmax()))
    return row[len(prompt) :]


def test_greedy_tokens_are_those_of_full_passes(model):
    result = generate(model, [5, 6, 7], max_tokens=20)
    assert result.token_ids == follow(model, [5, 6, 7], 20)
    assert (result.finish_reason, result.prompt_tokens, result.generation_tokens) == ("length", 3, 20)
    assert result.text == ""
    assert result.time_to_first_token_seconds > 0 and result.generation_tokens_per_second > 0
    assert generate(model, [5], max_tokens=1).generation_tokens_per_second is None


def test_only_the_prompt_and_then_single_tokens_are_fed(model):
    generate(model, [5, 6, 7], max_tokens=4)
    assert model.fed == [(1, 3), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_rows_of_a_batch_get_what_they_get_alone(model, options):
    prompts = [[1, 2, 3, 4, 5], [9], [7, 8], [1, 2, 3, 4, 6]]
    together = generate(model, prompts, max_tokens=12, **options)
    alone = [generate(model, prompt, max_tokens=12, **options) for prompt in prompts]
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]
    # Negative control: a row whose padding were read as tokens would go elsewhere.
    assert generate(model, [0, 0, 0, 0, 9], max_tokens=12, **options).token_ids != alone[1].token_ids


def test_copies_of_a_prompt_are_sampled_independently(model):
    one, two = generate(model, [[1, 2], [1, 2]], max_tokens=12, **SAMPLED)
    assert one.token_ids == generate(model, [1, 2], max_tokens=12, **SAMPLED).token_ids != two.token_ids


def test_finished_rows_leave_the_batch(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    # A row ends as many tokens after the prompt as its first token says.
    model = FakeModel(
        lambda tokens: np.eye(VOCABULARY, dtype=np.float32)[end if len(tokens) - 2 >= tokens[0] else 65],
        VOCABULARY,
        tokenizer=tokenizer,
    )
    results = generate(model, [[3, 1], [0, 1], [1, 1]], max_tokens=9)
    assert [row.token_ids for row in results] == [[65, 65, 65, end], [end], [65, end]]
    assert [row.text for row in results] == ["AAA", "", "A"]
    assert model.fed == [(3, 2), (2, 1), (1, 1), (1, 1)]


def test_a_long_prompt_is_fed_in_chunks():
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY, max_positions=2000)
    prompt = (np.arange(1300) % 250).tolist()
    result = generate(model, prompt, max_tokens=2)
    assert model.fed[:3] == [(1, 512), (1, 512), (1, 276)]
    # Ragged: the first feed takes all the padding and a real token of every row.
    both = generate(model, [prompt, [4, 5]], max_tokens=2)
    assert both[0].token_ids == result.token_ids
    assert both[1].token_ids == generate(model, [4, 5], max_tokens=2).token_ids


def test_every_kind_of_prompt(tokenizer):
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY, tokenizer=tokenizer)
    ids = tokenizer.encode("the end")
    same = [
        generate(model, prompt, max_tokens=5).token_ids
        for prompt in ("the end", ids, tuple(ids), np.array(ids), np.array(ids, np.uint16))
    ]
    assert all(tokens == same[0] for tokens in same)
    batches = [["the end", "the end"], [ids, ids], np.array([ids, ids]), [ids, "the end"], (np.array(ids), ids)]
    assert all([row.token_ids for row in generate(model, batch, max_tokens=5)] == [same[0]] * 2 for batch in batches)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the"}]
    asked = tokenizer.encode("<|system|>Be brief.<|end|><|user|>the<|end|><|assistant|>")
    assert generate(model, messages, max_tokens=5).token_ids == generate(model, asked, max_tokens=5).token_ids
    (one,) = generate(model, [messages], max_tokens=5)
    assert one.prompt_tokens == len(asked)
    # A lone surrogate is read as U+FFFD, as tiktoken reads it.
    assert generate(model, "a\ud800", max_tokens=1).prompt_tokens == len(tokenizer.encode("a\ufffd"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty prompt"),
        ([], "empty prompt"),
        ([[]], "empty prompt"),
        (np.zeros((0,), int), "empty prompt"),
        ([1, 275], "token ids in 0..274; found 275"),
        ([-1], "token ids in 0..274; found -1"),
        ([1.5, 2.0], "integer ids"),
        ([True, False], "integer ids"),
        ([1, "a"], "prompts of one kind"),
        ([[1], [[2]]], "nested list"),
        (None, "expected a prompt"),
        (7, "expected a prompt"),
        (b"bytes", "expected a prompt"),
        ({"role": "user", "content": "hi"}, "expected a prompt"),
        ([{"role": "user"}], "a role and a content"),
        ([{"role": "user", "content": 3}], "a role and a content"),
        ([1] * 201, "at most 200 tokens"),
        ([1] * 200, "fewer than 200 tokens"),
    ],
)
def test_impossible_prompts_are_refused_in_one_line(tokenizer, prompt, message):
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY, tokenizer=tokenizer)
    with pytest.raises(InputError, match=message) as refusal:
        generate(model, prompt)
    assert "\n" not in str(refusal.value) and not model.fed


def test_text_needs_a_tokenizer_and_messages_a_template(model):
    for prompt in ("text", [{"role": "user", "content": "hi"}]):
        with pytest.raises(InputError, match="no tokenizer"):
            generate(model, prompt)
    with pytest.raises(InputError, match="no tokenizer"):
        generate(model, [1], stop="x")
    with pytest.raises(InputError, match="expected a tokenizer to stream"):
        stream(model, [1])
    base = FakeModel(hashed_rule(271), 271, tokenizer=small_tokenizer("base"))
    with pytest.raises(InputError, match="no chat template"):
        generate(base, [{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="one prompt to stream"):
        stream(base, ["a", "b"])


def test_an_answer_ends_with_the_context():
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY, max_positions=16)
    result = generate(model, [1] * 10, max_tokens=100)
    assert (len(result.token_ids), result.finish_reason) == (6, "length")
    ragged = generate(model, [[1] * 10, [2]], max_tokens=100)
    assert [len(row.token_ids) for row in ragged] == [6, 15]
    assert ragged[1].token_ids == generate(model, [2], max_tokens=100).token_ids


def test_max_kv_size_bounds_prompt_and_answer(model):
    result = generate(model, [1] * 10, max_tokens=100, max_kv_size=24)
    assert result.token_ids == generate(model, [1] * 10, max_tokens=14).token_ids
    assert result.finish_reason == "length" and model.states[0].max_length == 24
    assert max(model.states[0].lengths) < 24
    with pytest.raises(InputError, match=r"fewer than 10 tokens \(max_kv_size\)"):
        generate(model, [1] * 10, max_kv_size=10)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": 2.5}, {"max_kv_size": -1}, {"stop": [""]}])
def test_impossible_options_are_refused(tokenizer, options):
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY, tokenizer=tokenizer)
    with pytest.raises(InputError, match=f"expected {next(iter(options))}"):
        generate(model, [1], **options)


def test_unknown_options_are_refused_by_name(model):
    for ask in (generate, stream):
        with pytest.raises(InputError, match=r"found 'temperture' .did you mean 'temperature'"):
            ask(model, [1], temperture=1.0)


@pytest.mark.parametrize("marker", ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
def test_special_tokens_end_an_answer_and_are_not_shown(tokenizer, marker):
    token = tokenizer.convert_tokens_to_ids(marker)
    model = scripted(tokenizer, [*plain(tokenizer, "yes "), token, 66])
    result = generate(model, [1, 2])
    assert (result.text, result.finish_reason, result.token_ids[-1]) == ("yes ", "stop", token)
    assert "".join(stream(model, [1, 2])) == "yes "


def test_a_marker_spelled_out_ends_an_answer(tokenizer):
    model = scripted(tokenizer, plain(tokenizer, "x<|en<|assistant|>y"))
    pieces = stream(model, [1, 2])
    assert "".join(pieces) == "x<|en" and pieces.result.finish_reason == "stop"
    assert generate(model, [1, 2]).text == "x<|en"
    near = scripted(tokenizer, plain(tokenizer, "near <|us"))
    assert generate(near, [1, 2], max_tokens=len(plain(tokenizer, "near <|us"))).text == "near <|us"


def test_stop_strings_cut_the_text_across_tokens(tokenizer):
    text = "one two\n\nthree the end"
    model = scripted(tokenizer, plain(tokenizer, text))
    for stop, kept in (("\n\n", "one two"), (["e e", "wo\n"], "one t"), ("thr", "one two\n\n")):
        result = generate(model, [1, 2], stop=stop, max_tokens=40)
        assert (result.text, result.finish_reason) == (kept, "stop")
        # The tokens are kept up to the one that completed the stop string.
        assert tokenizer.decode(result.token_ids).startswith(kept) and len(result.token_ids) < len(
            plain(tokenizer, text)
        )
        assert "".join(stream(model, [1, 2], stop=stop, max_tokens=40)) == kept


def test_streamed_pieces_are_whole_characters(tokenizer):
    model = scripted(tokenizer, [*"naïve 👍 café".encode()])
    pieces = stream(model, [1, 2], max_tokens=17)
    found = list(pieces)
    assert "".join(found) == "naïve 👍 café" == pieces.result.text == generate(model, [1, 2], max_tokens=17).text
    assert "👍" in found and not any("\ufffd" in piece for piece in found)


def test_a_stream_can_be_interrupted(tokenizer):
    model = scripted(tokenizer, [65] * 100)
    pieces = stream(model, [1, 2], max_tokens=100)
    taken = [next(pieces), next(pieces)]
    pieces.interrupt()
    taken += list(pieces)
    assert pieces.result.finish_reason == "interrupted" and "".join(taken) == pieces.result.text == "AA"


def test_a_stream_can_be_interrupted_while_the_prompt_is_read(tokenizer):
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY, 2000, tokenizer)
    pieces = stream(model, [65] * 1200)
    model.rule = lambda tokens: pieces.interrupt() or np.zeros(VOCABULARY, np.float32)
    assert list(pieces) == [] and model.fed == [(1, 512)]
    assert pieces.result.finish_reason == "interrupted" and pieces.result.token_ids == []


def test_stop_ids_are_the_union_of_what_the_files_say(tokenizer, tmp_path):
    model = FakeModel(hashed_rule(VOCABULARY), VOCABULARY)
    assert stop_rules(model).ids == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9, 9000]}))
    model.source = tmp_path
    assert stop_rules(model).ids == {7, 8, 9}
    model.tokenizer = tokenizer
    rules = stop_rules(model, Options(stop="halt"))
    assert rules.ids == {7, 8, 9, 270, 271, 272, 273, 274}
    assert rules.strings == ("halt", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    model.architecture = "llama"
    assert stop_rules(model).ids == {7, 8, 9, 271} and not stop_rules(model).strings
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON in"):
        stop_rules(model)
