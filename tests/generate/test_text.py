"""Text that streams: whole characters, nothing of a stop string, and in the end the same text as at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fake_model import small_tokenizer
from isomorph.generate.text import AnswerText, IncrementalDecoder, StopStrings

MARKERS = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def decoded(tokenizer, tokens: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token) for token in tokens), decoder.finish()]


def test_a_character_comes_when_its_last_byte_is_there(tokenizer):
    tokens = list("é€👍!".encode())
    assert decoded(tokenizer, tokens) == ["", "é", "", "", "€", "", "", "", "👍", "!", ""]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 274), max_size=40))
def test_pieces_join_to_the_decoded_text(tokenizer, tokens):
    """Any tokens, bytes that are no UTF-8 included; and no piece but the last shows a half character."""
    pieces = decoded(tokenizer, tokens)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces) == whole


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_of_a_text_has_a_replacement_character(tokenizer, text):
    assume("<|" not in text)  # a mark that is spelt out is read as one
    pieces = decoded(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def cut(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    filter = StopStrings(stops)
    kept = "".join(filter.push(piece) for piece in pieces)
    return kept + filter.finish(), filter.stopped


@pytest.mark.parametrize(
    ("stops", "text", "kept"),
    [
        (("end",), "the end of it", "the "),
        (("END",), "the end of it", "the end of it"),
        (("aab",), "aaab!", "a"),
        (("abc", "b"), "abc", "a"),
        (("bc", "abc"), "xabc", "x"),
        (("\n\n",), "one\ntwo\n\nthree", "one\ntwo"),
        (("stop",), "sto", "sto"),
        ((), "text", "text"),
    ],
)
def test_stop_strings_however_the_text_is_cut(stops, text, kept):
    for pieces in ([text], list(text), [text[:2], text[2:]], [text[:-1], text[-1:]]):
        assert cut(stops, pieces) == (kept, kept != text)


@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=10),
)
def test_stop_strings_give_the_same_text_however_it_is_cut(stops, pieces):
    text = "".join(pieces)
    kept, stopped = cut(tuple(stops), pieces)
    assert (kept, stopped) == cut(tuple(stops), [text]) == cut(tuple(stops), list(text))
    assert not any(stop in kept for stop in stops) and text.startswith(kept)
    assert stopped == any(stop in text for stop in stops)


def test_nothing_of_a_stop_string_is_shown_before_it_is_whole():
    filter = StopStrings(("<|end|>",))
    assert [filter.push(piece) for piece in "a <|en<|end|>b"] == ["a", " ", *[""] * 4, "<|en", *[""] * 7]
    assert filter.stopped and filter.push("more") == "" and filter.finish() == ""


def test_published_marker_truncation(shared, tokenizer):
    cases = json.loads((shared / "golden" / "talkie" / "text" / "text.json").read_text())["stop"]
    for case in cases:
        assert cut(MARKERS, [case["text"]]) == (case["kept"], case["stopped"])
        assert cut(MARKERS, list(case["text"])) == (case["kept"], case["stopped"])
        answer = AnswerText(tokenizer, MARKERS)
        # Spelled out in plain tokens, as a model leaks it.
        for token in tokenizer.encode(case["text"], split_special_tokens=True):
            answer.push(token)
        answer.finish()
        assert (answer.text, answer.stopped) == (case["kept"], case["stopped"])
