"""Talkie's tokenizer against tiktoken itself: the same ids for every string we can think of."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isomorph.architectures.talkie import tokenizer as talkie
from isomorph.errors import InputError
from isomorph.train.vocabulary import learn_vocabulary

TEXT = """It's the DOCTOR'S; they're sure I'd come and we'll see. He'd 've gone in 1925, 10s. 6d. -- naïve façade!
The steam engine    and the motor car; the the then there therefore. “Quoted” £5 … 日本語 текст Привет 👩‍👧 e\u0301
def f(x):\n    return x  # //path/to/file\r\n\r\n\tHTTPServer camelCase snake_case 12345 67890 0000 <|end|><|user|>
"""

#: Strings that have tripped tokenizers: every class of the split, its borders, and what looks like a special token.
NASTY = [
    "",
    " ",
    "\x00",
    "a\x00b \x00\x00",
    "   leading and trailing   ",
    "\n\n\n",
    "\r\n\r\n \r\n",
    " \n \t \n  x",
    "a\u00a0\u2003\u3000b\u200bc\u2028d\u2029e\x85f",
    " " * 300,
    "\n" * 300,
    "a" * 1500,
    "ab" * 700,
    "0" * 1001,
    "1234567 12 123 ٣٤٥٦ ⅷ²³",
    "it's IT'S It'S i'T'S 's'S 'll'LL 'Ll 'ſ ’s don''t",
    "İıŞşﬁﬃ ǅungla ʰʲ ªº",
    "e\u0301\u0301\u0301 \u0301start A\u030a \u20dd",
    "한국어 ภาษาไทย हिन्दी العَرَبِيَّة ゟ゠ァ",
    "👩‍👩‍👧‍👦🏳️‍🌈🇬🇧 👍🏽 ©️ 0️⃣",
    "\U0001f9ff\U000e0067\U0010ffff\ufffd\ufeff\u200f\u202e",
    "<|endoftext|><|end|> <|user|>hi<|assistant|> <|system|>",
    "<|end|", "<|end|>>", "<<|end|>", "|>|<|",
    "///\n//\r\n ...\n!!!/ ?\n",
    "\x7f\x80\x9f\xad",
    "ßSSſs K\u212a µμ",
]  # fmt: skip


def vocabulary_of(tokens: list[bytes]) -> dict[bytes, int]:
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A small vocabulary learned from TEXT, with tokens that its own bytes never join to as well.

    Tokens that cross a border of the split show a piece cut elsewhere.
    """
    learned = learn_vocabulary([TEXT] * 3, 420)
    unreachable = [b"return x", b"\xc3\xc3\xc3", "日本".encode(), b"qzj", b" \n \n"]
    crossing = [b"'S", b"T'S", b"R'S", b"'l", b"l's", b"00", b"0000", b"1925", b"\n\n", b"\n ", b"e\xcc", b"e\xcc\x81"]
    return vocabulary_of(list(dict.fromkeys([*learned, *unreachable, *crossing])))


@pytest.fixture(scope="module")
def pair(ranks):
    """tiktoken's encoding and ours, for an instruct model right behind the ranks."""
    specials = talkie.special_tokens(len(ranks) + 5, "instruct")
    return reference(ranks, specials), talkie.fast_tokenizer(ranks, specials)


def reference(ranks, specials) -> tiktoken.Encoding:
    return tiktoken.Encoding("talkie", pat_str=talkie.SPLIT, mergeable_ranks=ranks, special_tokens=specials)


def differs(encoding: tiktoken.Encoding, tokenizer, text: str) -> bool:
    """Whether ids differ, as plain text or with special tokens parsed."""
    tokenizer.encode_special_tokens = True
    plain = tokenizer.encode(text).ids
    tokenizer.encode_special_tokens = False
    parsed = tokenizer.encode(text).ids
    return plain != encoding.encode_ordinary(text) or parsed != encoding.encode(text, allowed_special="all")


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    alphabets = ["aA'sStT rReE\n", "the ndi", "日本語текст ", "0123456789 ", " \t\r\n\u00a0/!x", "éèe\u0301ÀßſK'lL"]
    return ["".join(generator.choices(generator.choice(alphabets), k=generator.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_strings(pair, text):
    assert not differs(*pair, text)


@settings(max_examples=1500, deadline=None)
@given(st.text())
@example("İ'S")
def test_any_text(pair, text):
    assert not differs(*pair, text)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from([*NASTY[:22], "the", " the", "'s", "'LL", "1", "é", "\u0301", "\n", " ", "<|", "|>"])))
def test_any_joining_of_nasty_pieces(pair, pieces):
    assert not differs(*pair, "".join(pieces))


def test_text_comes_back(pair):
    _, tokenizer = pair
    for text in [TEXT, *NASTY]:
        tokenizer.encode_special_tokens = True
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.sets(st.text("ab é", min_size=2, max_size=6).map(str.encode), max_size=30),
    raw=st.sets(st.lists(st.sampled_from([97, 98, 0xC3, 0xA9]), min_size=2, max_size=3).map(bytes), max_size=8),
    texts=st.lists(st.text("ab é", min_size=1, max_size=40), min_size=5, max_size=20),
    seed=st.integers(0, 2**32),
)
def test_any_vocabulary_in_any_order(tokens, raw, texts, seed):
    """Ranks that no training would give: one pair a token still does what tiktoken does."""
    entries = [*(bytes([byte]) for byte in range(256)), *sorted(tokens | raw)]
    random.Random(seed).shuffle(entries)
    ranks = vocabulary_of(entries)
    specials = talkie.special_tokens(len(ranks) + 5, "instruct")
    encoding, tokenizer = reference(ranks, specials), talkie.fast_tokenizer(ranks, specials)
    assert not any(differs(encoding, tokenizer, text) for text in texts)


def test_every_wrong_construction_is_caught(pair, ranks, monkeypatch):
    """Negative control: merges out of order, one merge missing, whole pieces not looked up, another split."""
    encoding, right = pair
    texts = [TEXT, *NASTY, *random_texts(300)]
    assert not any(differs(encoding, right, text) for text in texts)
    specials = talkie.special_tokens(len(ranks) + 5, "instruct")
    pairs = talkie.merges(ranks)

    def caught(**changes) -> bool:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(talkie, name, value)
            wrong = talkie.fast_tokenizer(ranks, specials, split=talkie.SPLIT)
        return any(differs(encoding, wrong, text) for text in texts)

    assert caught(merges=lambda ranks: pairs[::-1])
    assert caught(merges=lambda ranks: [*pairs[40:60], *pairs[:40], *pairs[60:]])
    assert caught(merges=lambda ranks: [*pairs[:9], *pairs[10:]])
    assert caught(SPLIT=talkie.SPLIT.replace(r"\p{N}{1,3}", r"\p{N}+"))
    assert caught(SPLIT=talkie.SPLIT.replace("(?i:", "(?:"))
    content = json.loads(right.to_str())
    content["model"]["ignore_merges"] = False
    from tokenizers import Tokenizer

    assert any(differs(encoding, Tokenizer.from_str(json.dumps(content)), text) for text in texts)


@pytest.mark.full
def test_every_character_is_split_alike():
    """The two regular expression engines agree on the class of every code point, in all its neighbourhoods."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(talkie.SPLIT), behavior="isolated")
    places = ["a{}A", "A{}a", "1{}1", " {} ", "a'{}", "!{}!", "\n{}\n", "a{}'{}re", "{0}{0}{0}"]
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    wrong = []
    for start in range(0, len(points), 1000):
        texts = [place.format(chr(p), chr(p)) for p in points[start : start + 1000] for place in places]
        # With every part of every text in the vocabulary, tiktoken's tokens are the pieces of its split.
        parts = {t[i:j].encode() for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1)}
        ranks = vocabulary_of([*(bytes([b]) for b in range(256)), *sorted(part for part in parts if len(part) > 1)])
        encoding = reference(ranks, {})
        for text in texts:
            pieces = encoding.decode_tokens_bytes(encoding.encode_ordinary(text))
            if [piece.encode() for piece, _ in split.pre_tokenize_str(text)] != pieces:
                wrong.append(text)
    assert not wrong


def write_vocabulary(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


@pytest.fixture
def vocabulary(ranks, tmp_path) -> Path:
    return write_vocabulary(tmp_path / "vocab.txt", ranks)


@pytest.mark.parametrize("flavour", ["base", "instruct"])
def test_written_folder_loads_in_transformers(vocabulary, ranks, pair, tmp_path, flavour):
    from transformers import AutoTokenizer

    folder = tmp_path / "folder"
    folder.mkdir()
    size = len(ranks) + len(talkie.SPECIAL_TOKENS[flavour])
    files = talkie.write(vocabulary, folder, size, model_max_length=2048)
    assert sorted(files) == sorted(entry.name for entry in folder.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoding = reference(ranks, talkie.special_tokens(size, flavour))
    for text in [TEXT, *NASTY]:
        assert tokenizer.encode(text) == encoding.encode(text, allowed_special="all")
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == encoding.encode_ordinary(text)
    assert tokenizer.model_max_length == 2048 and not tokenizer.clean_up_tokenization_spaces
    ends = ["<|endoftext|>"] if flavour == "base" else ["<|endoftext|>", "<|end|>"]
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == tokenizer.convert_tokens_to_ids(ends) and tokenizer.eos_token == ends[-1]
    assert bool(tokenizer.chat_template) == (flavour == "instruct")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_vocabulary_comes_back(vocabulary, ranks, tmp_path):
    talkie.write(vocabulary, tmp_path, len(ranks) + 5)
    talkie.write_vocabulary(tmp_path / "tokenizer.json", tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == vocabulary.read_bytes()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"expected a byte-level BPE tokenizer\.json"):
        talkie.write_vocabulary(tmp_path / "tokenizer.json", tmp_path / "again.txt")


def test_flavours(vocabulary, ranks):
    size = len(ranks)
    assert talkie.special_tokens(65536, "base") == {"<|endoftext|>": 65535}
    assert list(talkie.special_tokens(65540, "instruct").values()) == [65535, 65536, 65537, 65538, 65539]
    assert talkie.special_tokens(4096, "instruct")["<|endoftext|>"] == 4091
    assert talkie.flavour_of(ranks, size + 1) == "base" and talkie.flavour_of(ranks, size + 5) == "instruct"
    assert talkie.flavour_of(ranks, 65536) == "base" and talkie.flavour_of(ranks, 65540) == "instruct"
    with pytest.raises(InputError, match=f"model vocabulary of {size + 1} .base. or {size + 5} .instruct."):
        talkie.flavour_of(ranks, size + 3)
    assert talkie.load(vocabulary, size + 5, flavour="base").eos_token_id == size + 4
    with pytest.raises(InputError, match="base or instruct; found 'chat'"):
        talkie.load(vocabulary, size + 5, flavour="chat")
    with pytest.raises(InputError, match="ranks end below the special tokens"):
        talkie.load(vocabulary, size - 10, flavour="base")


def test_ranks_from_the_limit_on_are_ignored(ranks, tmp_path):
    """The authors' loader takes ranks below 65,535 only, whatever else the file holds."""
    path = write_vocabulary(tmp_path / "vocab.txt", ranks | {b"too late": 65535, b"later": 70000})
    assert talkie.read_vocabulary(path) == ranks


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "\n".join(text.splitlines()[:140]), "single bytes as tokens"),
        (lambda text: text[:-4], "base64 token and its rank on line"),
        (lambda text: text + "not base64! 9000\n", "base64 token and its rank on line"),
        (lambda text: text + "AA== 9000\n", "a new token and a rank from 0"),
        (lambda text: text + "YWJhYmFiYWI= -4\n", "a new token and a rank from 0"),
        (lambda text: text + "YWJhYmFiYWI= 7\n", "every rank once"),
        (lambda text: "", "single bytes as tokens"),
    ],
)
def test_damaged_vocabularies_are_refused(vocabulary, damage, message):
    vocabulary.write_text(damage(vocabulary.read_text()))
    with pytest.raises(InputError, match=message) as refusal:
        talkie.read_vocabulary(vocabulary)
    assert "\n" not in str(refusal.value)


def test_missing_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a tiktoken vocabulary"):
        talkie.read_vocabulary(tmp_path / "vocab.txt")


@pytest.mark.parametrize(("name", "size"), [("base", 65536), ("it", 65540)])
def test_published_ids(shared, tmp_path, name, size):
    golden = shared / "golden" / "talkie" / "text"
    expected = json.loads((golden / "text.json").read_text())
    tokenizer = talkie.load(golden / "vocab.txt", size)
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in expected["special_tokens"][name]} == (
        expected["special_tokens"][name]
    )
    for case in expected["encode"]:
        assert tokenizer.encode(case["text"]) == case[f"{name}_all_special"]
        assert tokenizer(case["text"], split_special_tokens=True)["input_ids"] == case[f"{name}_ordinary"]


def test_published_chat_template(shared):
    golden = shared / "golden" / "talkie" / "text"
    expected = json.loads((golden / "text.json").read_text())
    tokenizer = talkie.load(golden / "vocab.txt", 65540)
    cases = [(case["messages"], case["text"]) for case in expected["chat"]]
    cases += [([{"role": "user", "content": case["prompt"]}], case["text"]) for case in expected["prompt"]]
    for messages, text in cases:
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text.removesuffix("<|assistant|>")
