"""Tiny models that have a tokenizer, and processes that cannot import isomorph."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_gelu_gpt
from tiny import tiny_config, write_checkpoint

#: 256 bytes and a few pairs; the five special tokens take the last ids.
PAIRS = (b"th", b"he", b"in", b"er", b"re", b"on", b"at", b"nd", b"is", b"it")
TOKENS = [*(bytes([byte]) for byte in range(256)), *PAIRS]
VOCABULARY = len(TOKENS) + 5

#: What such a process starts with.
BLOCKED = "import sys\nsys.modules['isomorph'] = None\n"


def with_tokenizer(folder: Path, **overrides: Any) -> Path:
    """A tiny instruct Talkie with its vocabulary, in the `transformers` layout."""
    config = tiny_config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, **overrides)
    write_checkpoint(folder, config)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(TOKENS))
    (folder / "vocab.txt").write_text("".join(lines))
    return folder


def gelu_gpt_with_tokenizer(folder: Path, **overrides: Any) -> Path:
    """A tiny GELU-GPT of 257 tokens, in the published layout: the bytes, and one that ends a text.

    Its head is its own: with a tied one, random weights say the last token again and again.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = tiny_gelu_gpt.tiny_config(**{"vocab_size": 257, "n_embd": 64, "tie_embeddings": False, **overrides})
    tiny_gelu_gpt.write_checkpoint(folder, config)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: rank for rank, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|bos|>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    wrapped.save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    """Nothing is downloaded, and one thread is enough."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def without_isomorph(script: str, *arguments: str | Path) -> Any:
    """Run `script` where importing isomorph fails and nothing is downloaded; its last line is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + script, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
