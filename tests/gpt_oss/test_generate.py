"""gpt-oss generates within the room it is given, in every framework; stock mlx-lm ignores `max_kv_size` for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import isomorph
from isomorph.errors import InputError
from tiny_gpt_oss import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return write_checkpoint(tmp_path_factory.mktemp("packed"), tiny_config(sliding_window=8, **layers), seed=2)


@pytest.mark.parametrize("framework", ["torch", "mlx", "flax"])
def test_max_kv_size_bounds_prompt_and_answer(folder: Path, framework: str) -> None:
    model = isomorph.load(folder, framework=framework, dtype="float32")
    prompt = np.random.default_rng(0).integers(0, 128, 20)
    result = model.generate(prompt, max_tokens=100, max_kv_size=32)
    assert (len(result.token_ids), result.finish_reason) == (12, "length")
    # The same tokens as with room to spare, not those of a context that was cut.
    free = model.generate(prompt, max_tokens=14)
    assert free.token_ids[:12] == result.token_ids and len(free.token_ids) == 14
    with pytest.raises(InputError, match="max_kv_size"):
        model.generate(prompt, max_kv_size=20)
