"""The models that the conformance tests run: one parameter an architecture and framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_gelu_gpt
import tiny_gpt_oss
from isomorph.frameworks.model import Model
from tiny import tiny_config, write_checkpoint

#: From this position on, `Case.shift_positions` makes a model count one too many.
SHIFTED_FROM = 12


@dataclass(frozen=True)
class Case:
    """`write(folder)` makes the checkpoint; `shift_positions(monkeypatch)` breaks the framework's positions."""

    architecture: str
    framework: str
    write: Callable[[Path], Path]
    shift_positions: Callable[[pytest.MonkeyPatch], None]

    def __str__(self) -> str:
        return f"{self.architecture}-{self.framework}"


def write_talkie(folder: Path) -> Path:
    return write_checkpoint(folder, tiny_config(max_position_embeddings=64), seed=3)


def write_gelu_gpt(folder: Path) -> Path:
    return tiny_gelu_gpt.write_checkpoint(folder, tiny_gelu_gpt.tiny_config(sequence_len=6), seed=3)


def write_gpt_oss(folder: Path) -> Path:
    layers: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = tiny_gpt_oss.tiny_config(sliding_window=8, max_position_embeddings=64, **layers)
    return tiny_gpt_oss.write_checkpoint(folder, config, seed=3)


def shift_gpt_oss(framework: str) -> Callable[[pytest.MonkeyPatch], None]:
    def shift(monkeypatch: pytest.MonkeyPatch) -> None:
        if framework == "torch":
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding as owner

            rope = owner.forward
            shifted: Any = lambda self, x, positions: rope(self, x, positions + (positions >= SHIFTED_FROM))
            monkeypatch.setattr(owner, "forward", shifted)
        elif framework == "mlx":
            owner = model_file("gpt_oss", "mlx").YarnRoPE
            call = owner.__call__
            shifted = lambda self, x, offset=0: call(self, x, offset + (offset >= SHIFTED_FROM))
            monkeypatch.setattr(owner, "__call__", shifted)
        else:
            import jax

            owner = model_file("gpt_oss", "flax").GptOssModel
            tables = owner.rope
            shifted = lambda self, positions: tables(self, positions + (positions >= SHIFTED_FROM))
            monkeypatch.setattr(owner, "rope", shifted)
            jax.clear_caches()

    return shift


def model_file(architecture: str, framework: str) -> Any:
    return importlib.import_module(f"isomorph.architectures.{architecture}.modeling_{framework}")


def write_gemma(folder: Path) -> Path:
    from frameworks.random_models import random_folder

    return random_folder("gemma3_text", folder, max_position_embeddings=64)


def shift_gemma(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    rope = Gemma3RotaryEmbedding.forward
    shifted = lambda self, x, positions, *rest: rope(self, x, positions + (positions >= SHIFTED_FROM), *rest)
    monkeypatch.setattr(Gemma3RotaryEmbedding, "forward", shifted)


def shift_torch(architecture: str) -> Callable[[pytest.MonkeyPatch], None]:
    def shift(monkeypatch: pytest.MonkeyPatch) -> None:
        module = model_file(architecture, "torch")
        tables = module.rope_tables
        shifted = lambda positions, config: tables(positions + (positions >= SHIFTED_FROM), config)
        monkeypatch.setattr(module, "rope_tables", shifted)

    return shift


def shift_mlx(architecture: str, trunk: str) -> Callable[[pytest.MonkeyPatch], None]:
    def shift(monkeypatch: pytest.MonkeyPatch) -> None:
        model_class = getattr(model_file(architecture, "mlx"), trunk)
        rope = model_class.rope
        shifted = lambda model, tokens, offset: rope(model, tokens, offset + (offset >= SHIFTED_FROM))
        monkeypatch.setattr(model_class, "rope", shifted)

    return shift


def shift_flax(architecture: str) -> Callable[[pytest.MonkeyPatch], None]:
    def shift(monkeypatch: pytest.MonkeyPatch) -> None:
        import jax
        import numpy as np

        module = model_file(architecture, "flax")
        tables = module.rope_tables

        def shifted(positions: int, *rest: Any) -> Any:
            index = np.arange(positions)
            index = np.minimum(index + (index >= SHIFTED_FROM), positions - 1)
            return tuple(table[index] for table in tables(positions, *rest))

        monkeypatch.setattr(module, "rope_tables", shifted)
        jax.clear_caches()

    return shift


CASES = (
    Case("talkie", "torch", write_talkie, shift_torch("talkie")),
    Case("talkie", "mlx", write_talkie, shift_mlx("talkie", "TalkieModel")),
    Case("talkie", "flax", write_talkie, shift_flax("talkie")),
    Case("gelu_gpt", "torch", write_gelu_gpt, shift_torch("gelu_gpt")),
    Case("gelu_gpt", "mlx", write_gelu_gpt, shift_mlx("gelu_gpt", "GeluGPTModel")),
    Case("gelu_gpt", "flax", write_gelu_gpt, shift_flax("gelu_gpt")),
    *(Case("gpt_oss", framework, write_gpt_oss, shift_gpt_oss(framework)) for framework in ("torch", "mlx", "flax")),
    Case("gemma3_text", "torch", write_gemma, shift_gemma),  # Transformers' own, with windows of 8
)


@pytest.fixture(scope="session", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    pytest.importorskip(f"isomorph.frameworks.{request.param.framework}", exc_type=ImportError)
    return request.param


@pytest.fixture(scope="session")
def model(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Model:
    import isomorph

    return isomorph.load(case.write(tmp_path_factory.mktemp(str(case))), framework=case.framework, dtype="float32")


@pytest.fixture(autouse=True)
def short_rollback(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a window has left behind is gone within these short prompts too."""
    if case.framework == "torch":
        from isomorph.frameworks import torch_cache

        monkeypatch.setattr(torch_cache, "ROLLBACK", 2)
