"""GELU-GPT's layouts: every one to every other and back bit for bit; configs and checkpoints that are refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isomorph import InputError, convert
from isomorph.architectures.gelu_gpt.config import FLOAT32_EPS, GeluGPTConfig
from isomorph.architectures.gelu_gpt.tokenizer import read_vocabulary
from isomorph.architectures.gelu_gpt.weights import LAYOUTS
from isomorph.checkpoint import open_checkpoint
from isomorph.inspect import inspect
from tiny_gelu_gpt import tiny_config, tiny_tensors, write_checkpoint

UNTIED = {"tie_embeddings": False, "mlp": "relu2", "rms_norm_eps": FLOAT32_EPS, "rope_table_dtype": "bfloat16"}


def test_the_published_model_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gelu_gpt"}')
    assert inspect(tmp_path).parameters == 261_096_338


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("overrides", [{}, UNTIED], ids=["tied", "untied"])
def test_there_and_back_bit_for_bit(layout: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    if layout == "orbax":
        pytest.importorskip("orbax.checkpoint")
    config = tiny_config(**overrides)
    convert(write_checkpoint(tmp_path / "source", config), tmp_path / "there", layout=layout)
    convert(tmp_path / "there", tmp_path / "back", to="transformers")
    found, wanted = load_file(tmp_path / "back" / "model.safetensors"), tiny_tensors(config)
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in config} == config


def test_a_training_run_in_orbax(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    config = tiny_config()
    convert(write_checkpoint(tmp_path / "source", config), tmp_path / "flax", to="flax")
    tree: dict[str, Any] = {}
    for name, value in load_file(tmp_path / "flax" / "model.safetensors").items():
        place = tree
        for part in name.split("."):
            place = place.setdefault(part, {})
        place["value"] = value  # the level that NNX adds
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree)))
    keys = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    model = {key: config[key] for key in keys} | {"tie_embeddings": True, "use_scan": False}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": model, "training": {"seed": 0}}))
    for source in (tmp_path / "run", tmp_path / "run" / "7"):
        convert(source, tmp_path / "back", to="transformers", force=True)
        found = load_file(tmp_path / "back" / "model.safetensors")
        assert all(found[name].tobytes() == value.tobytes() for name, value in tiny_tensors(config).items())
        back = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (back["mlp"], back["rms_norm_eps"], back["sequence_len"]) == ("gelu", 1e-6, 256)
    (tmp_path / "run" / "7" / "model" / "_METADATA").write_text("{}")
    with pytest.raises(InputError, match="Orbax"):
        open_checkpoint(tmp_path / "run")


def test_a_converted_pt_with_its_config(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = tiny_config()
    state = {name.removeprefix("model."): torch.from_numpy(value) for name, value in tiny_tensors(config).items()}
    keys = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "mlp")
    torch.save({"config": {key: config[key] for key in keys}, "state_dict": state}, tmp_path / "gelu.pt")
    found = inspect(tmp_path / "gelu.pt")
    assert (found.layout, found.config["vocab_size"], found.config["sequence_len"]) == ("export", 120, 256)


def test_nanochats_older_folder_without_windows(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    convert(write_checkpoint(tmp_path / "source", tiny_config(**UNTIED)), tmp_path / "nano", to="original")
    assert inspect(tmp_path / "nano").config["window_pattern"] == tiny_config()["window_pattern"]
    (tmp_path / "nano" / "config.json").unlink()
    meta = tmp_path / "nano" / "meta_000000.json"
    stated = json.loads(meta.read_text())
    del stated["model_config"]["window_pattern"]
    meta.write_text(json.dumps(stated))
    assert inspect(tmp_path / "nano").config["window_pattern"] == "L"


def test_eps_that_no_config_states(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It lives in the code: the published repository brings its own, with 1e-6; without, it is nanochat's."""
    folder = write_checkpoint(tmp_path / "model")
    config = {key: value for key, value in tiny_config().items() if key != "rms_norm_eps"}
    published = {"auto_map": {"AutoModelForCausalLM": "modeling_gelu_gpt.GeluGPTForCausalLM"}}
    for extra, eps in [({}, FLOAT32_EPS), (published, 1e-6), ({"rms_norm_eps": 1e-5}, 1e-5)]:
        caplog.clear()
        (folder / "config.json").write_text(json.dumps(config | extra))
        assert inspect(folder).config["rms_norm_eps"] == eps
        assert ("rms_norm_eps" in caplog.text) == (extra == {})


def test_rope_tables_in_a_checkpoint_are_checked(tmp_path: Path) -> None:
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "model", config)
    for base, sound in ((100_000.0, True), (10_000.0, False)):
        angles = np.arange(2560)[:, None] * base ** (-np.arange(0, 12, 2) / 12)
        tables = {"model.rope_cos": np.cos(angles), "model.rope_sin": np.sin(angles)}
        extra = {name: value.astype(np.float32)[None, :, None] for name, value in tables.items()}
        save_file(tiny_tensors(config) | extra, folder / "model.safetensors", metadata={"format": "pt"})
        if sound:
            assert set(inspect(folder).dropped) == set(extra)
        else:
            with pytest.raises(InputError, match="rope_base"):
                inspect(folder)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"final_logit_softcapping": 15.0, "intermediate_size": 192}, "earlier nanochat"),
        ({"model_type": "nanochat"}, "window_pattern"),
        ({"mlp": "silu"}, "mlp"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"max_position_embeddings": 300}, "max_position_embeddings"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_mixed_configs_are_refused_by_name(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(tiny_config(**values)))
    with pytest.raises(InputError, match=named) as caught:
        inspect(folder)
    assert "\n" not in str(caught.value)


def test_an_earlier_nanochat_is_refused_by_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"transformer.wte.weight": torch.zeros(64, 48), "transformer.h.0.attn.c_q.weight": torch.zeros(48, 48)}
    torch.save(state, tmp_path / "model_000010.pt")
    (tmp_path / "meta_000010.json").write_text('{"model_config": {"sequence_len": 256}}')
    with pytest.raises(InputError, match="earlier"):
        inspect(tmp_path)


def test_the_config_reads_what_it_writes() -> None:
    config = GeluGPTConfig(n_layer=5, n_kv_head=4, vocab_size=100)
    assert GeluGPTConfig.from_dict(config.to_dict()) == config
    assert config.windows == (256, 256, 256, 1024, 1024)
    assert [layer for layer in range(5) if config.has_value_embedding(layer)] == [0, 2, 4]
    assert config.padded_vocab_size == 128


def test_a_pickled_tokenizer_runs_no_code(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    split = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s+(?!\S)|\s+"
    specials = {"<|bos|>": 258, "<|assistant_end|>": 259}
    encoding = tiktoken.Encoding("rustbpe", pat_str=split, mergeable_ranks=ranks, special_tokens=specials)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))

    from isomorph.architectures.gelu_gpt import tokenizer

    own = tokenizer.load(tmp_path / "tokenizer.pkl", 320)
    text = "the théâtre, 12345 of  漢字 it's\n\n"
    assert own(text)["input_ids"] == encoding.encode_ordinary(text)
    assert own.bos_token_id == 258
    with pytest.raises(InputError, match="vocab_size"):
        tokenizer.load(tmp_path / "tokenizer.pkl", 200)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match="run code"):
        read_vocabulary(tmp_path / "tokenizer.pkl")
