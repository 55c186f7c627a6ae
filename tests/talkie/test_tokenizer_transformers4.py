"""What we write is read by transformers 4, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import venv

import pytest

from isomorph.architectures.talkie import tokenizer as talkie
from isomorph.train.vocabulary import learn_vocabulary, save_vocabulary

TEXTS = [
    "It's the DOCTOR'S; they're sure.",
    "12345 naïve 日本語 👩‍👧\r\n\n  x",
    "<|user|>the end<|end|><|assistant|>",
    "",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the end"}]

SCRIPT = """
import json, sys, transformers
from transformers import AutoTokenizer
texts, messages = json.loads(sys.stdin.read())
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert transformers.__version__.startswith("4."), transformers.__version__
print(json.dumps({
    "ids": [tokenizer.encode(text) for text in texts],
    "ordinary": [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts],
    "text": [tokenizer.decode(tokenizer.encode(text)) for text in texts],
    "chat": tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    "eos": tokenizer.eos_token_id,
}))
"""


@pytest.mark.full
def test_transformers_4_reads_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    tokens = learn_vocabulary(TEXTS * 3, 300)
    vocabulary = tmp_path / "vocab.txt"
    save_vocabulary(tokens, vocabulary)
    folder = tmp_path / "folder"
    folder.mkdir()
    talkie.write(vocabulary, folder, len(tokens) + 5)
    here = AutoTokenizer.from_pretrained(folder)

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "transformers>=4.57,<5", "jinja2"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("transformers 4 cannot be installed here")
    run = subprocess.run(
        [python, "-c", SCRIPT, folder], input=json.dumps([TEXTS, MESSAGES]), capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {
        "ids": [here.encode(text) for text in TEXTS],
        "ordinary": [here(text, split_special_tokens=True)["input_ids"] for text in TEXTS],
        "text": TEXTS,
        "chat": here.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False),
        "eos": len(tokens) + 1,
    }
