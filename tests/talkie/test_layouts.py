"""Talkie's six layouts: counts and sizes of the published model, and bit-exact ways between all pairs."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from isomorph import convert
from isomorph.architectures.talkie import ARCHITECTURE
from isomorph.architectures.talkie.config import TalkieConfig
from isomorph.architectures.talkie.weights import LAYOUTS, parameters
from isomorph.checkpoint import open_checkpoint
from isomorph.port import expand, shapes_in
from tiny import tiny_config, write_checkpoint

DTYPES = ("float32", "bfloat16", "float16")


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = open_checkpoint(folder).tensors.values()
    return {t.name: (t.dtype, t.shape, np.ascontiguousarray(t.read()).tobytes()) for t in found}


def test_counts_of_the_published_model() -> None:
    shapes = parameters(TalkieConfig())
    assert len(shapes) == 443  # lewtun/talkie-1930-13b-it-hf
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == 13_280_257_721
    counts = {name: len(expand(layout, shapes)) for name, layout in LAYOUTS.items()}
    assert counts == {
        "original": 443,
        "transformers": 443,
        "transformers-folded": 442,
        "mlx-lm": 443,
        "mlx-folded": 442,
        "flax": 443,
    }


def test_names_of_the_reference_files(shared: Path) -> None:
    golden = shared / "golden" / "talkie" / "public"
    config = TalkieConfig.from_dict(json.loads((golden / "hf" / "config.json").read_text()))
    for source, layout in ((golden / "hf", "transformers"), (golden / "original.pt", "original")):
        checkpoint = open_checkpoint(source)
        assert ARCHITECTURE.detect(checkpoint) == layout
        found = {tensor.name: tensor.shape for tensor in checkpoint.tensors.values()}
        assert found == shapes_in(LAYOUTS[layout], parameters(config))


@pytest.fixture(scope="module")
def every_layout(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(dtype, layout) -> folder. The head has 97 rows, so that codes do not fill their last byte."""
    folder = tmp_path_factory.mktemp("layouts")
    made = {}
    for dtype in DTYPES:
        config = tiny_config(dtype=dtype, torch_dtype=dtype, vocab_size=97, hidden_size=47, num_hidden_layers=2)
        source = write_checkpoint(folder / dtype, config, seed=3)
        for layout in LAYOUTS:
            made[dtype, layout] = convert(source, folder / f"{dtype}-{layout}", layout=layout).path
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), list(permutations(LAYOUTS, 2)))
def test_there_and_back_gives_the_same_bits(
    tmp_path: Path, every_layout: dict[tuple[str, str], Path], dtype: str, first: str, second: str
) -> None:
    there = convert(every_layout[dtype, first], tmp_path / "there", layout=second)
    assert (there.source_layout, there.layout) == (first, second)
    assert bits(there.path) == bits(every_layout[dtype, second])
    back = convert(there.path, tmp_path / "back", layout=first)
    assert bits(back.path) == bits(every_layout[dtype, first])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_known_for_what_it_is(every_layout: dict[tuple[str, str], Path], layout: str) -> None:
    checkpoint = open_checkpoint(every_layout["float32", layout])
    assert ARCHITECTURE.detect(checkpoint) == layout
    names = {path.name for path in checkpoint.folder.iterdir()}
    assert set(LAYOUTS[layout].files) <= names
    assert ("lm_head_fold.npz" in names) == layout.endswith("folded")
    assert checkpoint.config is not None
    assert checkpoint.config["lm_head_gain_folded"] == layout.endswith("folded")
    assert checkpoint.config["architectures"] == ["TalkieForCausalLM"]
    assert checkpoint.config["dtype"] == checkpoint.config["torch_dtype"] == "float32"


def test_leaving_the_gain_out_is_noticed(every_layout: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """The control of the round trips: without its sidecar a folded folder is another pair of tensors."""
    folder = convert(every_layout["bfloat16", "transformers-folded"], tmp_path / "copy", layout="mlx-folded").path
    (folder / "lm_head_fold.npz").unlink()
    back = bits(convert(folder, tmp_path / "back", layout="transformers").path)
    original = bits(every_layout["bfloat16", "transformers"])
    assert {name for name in original if original[name] != back[name]} == {"lm_head", "lm_head_gain.w_g"}
    # It still is the same function: folded again, the same matrix.
    again = bits(convert(tmp_path / "back", tmp_path / "again", layout="mlx-folded").path)
    assert again == bits(every_layout["bfloat16", "mlx-folded"])


def test_flax_kernels_are_transposed(every_layout: dict[tuple[str, str], Path]) -> None:
    ours = open_checkpoint(every_layout["float32", "transformers"]).tensors
    flax = open_checkpoint(every_layout["float32", "flax"]).tensors
    name = "model.blocks.1.attn.attn_resid"
    assert np.array_equal(flax[f"{name}.kernel"].read(), ours[f"{name}.weight"].read().T)
    assert np.array_equal(flax["model.embed.embedding"].read(), ours["model.embed.weight"].read())
