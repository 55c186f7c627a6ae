"""Accounting: every tensor consumed or dropped with a reason, every mistake named, all of them at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from isomorph import InputError, architectures
from isomorph.architectures import configuration, find
from isomorph.checkpoint import Checkpoint, open_checkpoint
from isomorph.port import declared, mapped, read
from tiny import tiny_config, tiny_tensors, write_checkpoint


def checkpoint_of(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**config)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def map_all(checkpoint: Checkpoint, layout: str = "transformers", **options: Any) -> dict[str, np.ndarray]:
    architecture = find(checkpoint)
    assert architecture is not None
    return {tensor.name: tensor.read() for tensor in mapped(checkpoint, architecture, layout, **options)}


def test_buffers_are_dropped_with_the_reason(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    buffers = {"model.rotary.inv_freq": np.ones(8, np.float32), "model.cos": np.ones(3, np.float32)}
    checkpoint = checkpoint_of(tmp_path, {**tensors, **buffers})
    assert map_all(checkpoint).keys() == tensors.keys()
    talkie = architectures.get("talkie")
    assert talkie is not None
    dropped = read(checkpoint, talkie).dropped
    assert dropped.keys() == buffers.keys()
    assert all("computed from the config" in reason for reason in dropped.values())


def test_all_mistakes_are_named_together(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    tensors["model.blocks.0.attn.attn_qeury.weight"] = tensors.pop("model.blocks.0.attn.attn_query.weight")
    tensors["model.blocks.1.mlp.mlp_gate.weight"] = np.ones((3, 3), np.float32)
    tensors["model.blocks.2.embed_skip.a_g"] = np.ones(1, np.int32)
    tensors["surplus"] = np.ones(1, np.float32)
    del tensors["lm_head_gain.w_g"]
    with pytest.raises(InputError) as caught:
        map_all(checkpoint_of(tmp_path, tensors))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "unexpected 'model.blocks.0.attn.attn_qeury.weight' (did you mean 'model.blocks.0.attn.attn_query.weight'?)",
        "'model.blocks.1.mlp.mlp_gate.weight' has shape [3, 3], the config asks for [80, 48]",
        "'model.blocks.2.embed_skip.a_g' has dtype int32",
        "unexpected 'surplus'",
        "missing 'model.blocks.0.attn.attn_query.weight'",
        "missing 'lm_head_gain.w_g'",
    ):
        assert part in message, message


def test_a_long_list_of_mistakes_is_counted(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, tiny_tensors(tiny_config()), num_hidden_layers=5)
    with pytest.raises(InputError, match=r"missing 'model\.blocks\.3.*; and 14 more"):
        map_all(checkpoint)


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_beyond_the_config_are_unexpected(tmp_path: Path, layers: int) -> None:
    checkpoint = checkpoint_of(tmp_path, tiny_tensors(tiny_config()), num_hidden_layers=layers)
    with pytest.raises(InputError, match=rf"unexpected 'model\.blocks\.{layers}"):
        map_all(checkpoint)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"])
def test_every_size_in_the_config_is_checked(tmp_path: Path, key: str) -> None:
    checkpoint = checkpoint_of(tmp_path, tiny_tensors(tiny_config()), **{key: 2 * tiny_config()[key]})
    with pytest.raises(InputError, match="the config asks for"):
        map_all(checkpoint)


def test_dtypes_are_kept_or_cast(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tiny_config(dtype="bfloat16")))
    for layout in ("transformers", "mlx-folded", "flax"):
        assert {str(value.dtype) for value in map_all(checkpoint, layout).values()} == {"bfloat16"}
        cast = map_all(checkpoint, layout, dtype="float32")
        assert {str(value.dtype) for value in cast.values()} == {"float32"}
    # Cast first, fold then: the same function as the unfolded model in that dtype.
    exact = {name: value.astype(np.float32) for name, value in map_all(checkpoint).items()}
    assert np.array_equal(
        cast_folded := map_all(checkpoint, "mlx-folded", dtype="float32")["lm_head.weight"],
        exact["lm_head"] * exact["lm_head_gain.w_g"],
    )
    late = map_all(checkpoint, "mlx-folded")["lm_head.weight"].astype(np.float32)
    assert not np.array_equal(cast_folded, late)


def test_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    source = map_all(checkpoint)
    for dtype in ("bfloat16", "float16"):
        for name, value in map_all(checkpoint, dtype=dtype).items():
            expected = torch.from_numpy(source[name].copy()).to(getattr(torch, dtype))
            assert np.array_equal(value.astype(np.float32), expected.float().numpy())


def test_unknown_layouts_are_refused_with_a_hint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    with pytest.raises(InputError, match="did you mean 'mlx-folded'"):
        map_all(checkpoint, "mlx-foldde")


def test_without_weights_there_is_nothing_to_map(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(InputError, match="only a config"):
        map_all(open_checkpoint(tmp_path))


@pytest.mark.parametrize("layout", ["transformers", "transformers-folded", "mlx-lm", "mlx-folded"])
def test_a_config_promises_exactly_what_the_weights_are(tmp_path: Path, layout: str) -> None:
    from isomorph import convert

    folder = convert(write_checkpoint(tmp_path / "source"), tmp_path / layout, layout=layout).path
    whole = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    bare = open_checkpoint(folder)
    talkie = find(bare)
    assert talkie is not None
    promised = declared(bare, talkie, configuration(talkie, bare))
    facts = {(t.name, t.shape, t.dtype) for t in whole.tensors.values()}
    assert {(t.name, t.shape, t.dtype) for t in promised.tensors.values()} == facts
    with pytest.raises(InputError, match="only a config"):
        promised.tensors["model.embed.weight"].read()


def test_a_bare_checkpoint_is_inferred_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    tensors = tiny_tensors(tiny_config())
    state = {name.removeprefix("model."): torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"model_state_dict": state}, tmp_path / "x.ckpt")
    checkpoint = open_checkpoint(tmp_path / "x.ckpt", config={"rope_theta": 1000.0, "max_position_embeddings": 256})
    talkie = find(checkpoint)
    assert talkie is not None
    with caplog.at_level(logging.WARNING, "isomorph"):
        config = configuration(talkie, checkpoint)
    assert config == talkie.config_class.from_dict(tiny_config())
    assert "num_attention_heads=4" in caplog.text
    assert "rope_table_dtype=bfloat16" in caplog.text
    assert "rope_theta" not in caplog.text  # It was given, so it is not assumed.
    assert all(np.array_equal(value, tensors[name]) for name, value in map_all(checkpoint).items())


@pytest.mark.parametrize("layout", ["original", "transformers", "transformers-folded", "mlx-folded", "flax"])
def test_every_layout_tells_its_shapes(tmp_path: Path, layout: str) -> None:
    from isomorph import convert

    folder = convert(write_checkpoint(tmp_path / "source"), tmp_path / layout, layout=layout).path
    (folder / "config.json").unlink()
    checkpoint = open_checkpoint(folder)
    talkie = find(checkpoint)
    assert talkie is not None
    inferred, assumed = talkie.infer_config(checkpoint.tensors)
    wanted = tiny_config()
    assert all(value == wanted[key] for key, value in inferred.items())
    assert len(assumed) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.attn.head_gain.head_g", None),
        ("embed.weight", np.ones(3, np.float32)),
        ("blocks.0.attn.attn_query.weight", np.ones((63, 48), np.float32)),
    ],
)
def test_tensors_that_say_too_little_are_refused(tmp_path: Path, name: str, value: np.ndarray | None) -> None:
    torch = pytest.importorskip("torch")
    state = {key.removeprefix("model."): array for key, array in tiny_tensors(tiny_config()).items()}
    del state[name]
    if value is not None:
        state[name] = value
    torch.save({key: torch.from_numpy(array) for key, array in state.items()}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    talkie = find(checkpoint)
    assert talkie is not None
    with pytest.raises(InputError, match=r"pass config="):
        configuration(talkie, checkpoint)


def test_unfamiliar_files_without_config_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="tensor names of talkie"):
        find(open_checkpoint(tmp_path / "x.pt"))


@pytest.mark.parametrize("key", ["rope_thetas", "sliding_window"])
def test_unknown_config_keys_are_refused_by_name(tmp_path: Path, key: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tiny_config(**{key: 1})))
    with pytest.raises(InputError, match=f"unknown config keys.*{key}"):
        map_all(checkpoint)
