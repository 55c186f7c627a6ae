"""A folded head computes the same in every framework and dtype: what is stored is the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from tiny import tiny_config, write_checkpoint

IDS = np.arange(40)[None] * 7 % 90


@pytest.mark.parametrize("layout", ["transformers-folded", "mlx-folded"])
def test_in_float32(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_config(dtype="bfloat16", torch_dtype="bfloat16"))
    isomorph.convert(source, tmp_path / "folded", layout=layout)
    reference = isomorph.load(tmp_path / "folded", dtype="float32").logits(IDS)
    for framework in ("mlx", "flax"):
        assert_logits_close(
            isomorph.load(tmp_path / "folded", framework=framework, dtype="float32").logits(IDS), reference
        )
    # Not the unfolded weights, which float32 tells apart from their fold rounded to bfloat16.
    with pytest.raises(AssertionError):
        assert_logits_close(isomorph.load(source, dtype="float32").logits(IDS), reference)
