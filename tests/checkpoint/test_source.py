"""What counts as a checkpoint, and what each damaged or misleading folder is told."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from isomorph import InputError
from isomorph.checkpoint import Checkpoint, from_array, open_checkpoint, safetensors_files, write_folder
from isomorph.checkpoint.hub import is_hub_id
from tiny import tiny_config, write_checkpoint

VALUES = {f"t{i}": np.full(3, i, np.float32) for i in range(4)}


def sharded(folder: Path) -> Path:
    files = safetensors_files([from_array(n, v) for n, v in VALUES.items()], {"format": "pt"}, 24)
    write_folder(folder, files, {"config.json": b'{"model_type": "x"}'}, inputs=None)
    return folder


def edit_index(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_single_and_sharded_folders(tmp_path: Path) -> None:
    single = open_checkpoint(write_checkpoint(tmp_path / "single"))
    assert (single.kind, single.metadata, len(single.files)) == ("safetensors", {"format": "pt"}, 1)
    assert single.config is not None
    assert single.config["model_type"] == "talkie"
    several = open_checkpoint(str(sharded(tmp_path / "sharded")))
    assert len(several.files) == 2
    for name, value in VALUES.items():
        np.testing.assert_array_equal(several.tensors[name].read(), value)
    # A file of the folder means the folder, and an opened checkpoint itself.
    assert open_checkpoint(tmp_path / "single" / "model.safetensors").path == tmp_path / "single"
    assert open_checkpoint(tmp_path / "single" / "config.json").path == tmp_path / "single"
    assert open_checkpoint(single) is single


def test_a_config_alone_is_a_checkpoint_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.tensors, checkpoint.files) == ("config", {}, ())


def test_overrides_come_from_a_mapping_or_a_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    assert config_of(open_checkpoint(tmp_path / "m", config={"rope_theta": 7.0}))["rope_theta"] == 7.0
    (tmp_path / "other.json").write_text('{"rope_theta": 8.0}')
    assert config_of(open_checkpoint(tmp_path / "m", config=tmp_path / "other.json"))["rope_theta"] == 8.0
    assert config_of(open_checkpoint(tmp_path / "m", config=str(tmp_path / "m")))["rope_theta"] == 1000.0
    with pytest.raises(InputError, match="JSON"):
        open_checkpoint(tmp_path / "m", config=tmp_path / "missing.json")


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.config is not None
    return checkpoint.config


def test_an_original_file_goes_by_the_config_beside_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").config is None
    assert open_checkpoint(tmp_path / "x.pt", config={"rope_theta": 7.0}).overrides == {"rope_theta": 7.0}
    (tmp_path / "config.json").write_text('{"model_type": "talkie", "rope_theta": 5.0}')
    for source in (tmp_path / "x.pt", tmp_path):
        assert config_of(open_checkpoint(source))["rope_theta"] == 5.0
        assert config_of(open_checkpoint(source, config={"rope_theta": 7.0}))["rope_theta"] == 7.0


INDEX_FAULTS = {
    "file outside the folder": (lambda m: m.update(t0="../model-00001-of-00002.safetensors"), "same folder"),
    "absolute path": (lambda m: m.update(t0="/etc/passwd.safetensors"), "same folder"),
    "backslashes": (lambda m: m.update(t0="..\\x.safetensors"), "same folder"),
    "dots": (lambda m: m.update(t0=".."), "same folder"),
    "another kind of file": (lambda m: m.update(t0="config.json"), "same folder"),
    "missing file": (lambda m: m.update(t0="model-00003-of-00003.safetensors"), "model-00003"),
    "tensor that the shard lacks": (lambda m: m.update(t9="model-00001-of-00002.safetensors"), "lacks 't9'"),
    "tensor in the other shard": (lambda m: m.update(t0=m["t3"]), "'t0'"),
    "tensor left out": (lambda m: m.pop("t1"), "unknown to the index, 't1'"),
    "number for a name": (lambda m: m.update(t0=3), "weight_map"),
    "empty map": (lambda m: m.clear(), "weight_map"),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    change, message = INDEX_FAULTS[name]
    folder = sharded(tmp_path / "m")
    edit_index(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_shard_reached_through_the_index_is_never_outside(tmp_path: Path) -> None:
    """The control of the traversal cases: the file they point at is there and sound."""
    folder = sharded(tmp_path / "m")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    edit_index(folder, INDEX_FAULTS["file outside the folder"][0])
    with pytest.raises(InputError, match="same folder"):
        open_checkpoint(folder)


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 5, [1]])
def test_what_is_no_path_at_all(source: Any) -> None:
    with pytest.raises(InputError, match="expected a path or a Hub id; found"):
        open_checkpoint(source)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"x")
    (tmp_path / "b.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.pt, b\.ckpt"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"\.pt, \.pth, \.ckpt"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "name", ["missing", "./missing/x", "/missing/x", "../x/y", "a/b/c", "a//b", "a/b.pt", "a/..b", "a b/c", "-x/y"]
)
def test_names_that_are_neither_path_nor_hub_id(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
    with pytest.raises(InputError, match="found no"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a--b/c", "a/b..c"])
def test_names_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(InputError) as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_a_hub_id_out_of_reach_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="hf download someone/model") as caught:
        open_checkpoint("someone/model")
    assert "\n" not in str(caught.value)


def test_a_cached_hub_id_is_opened_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        if len(asked) == 2:
            save_file(VALUES, tmp_path / "unused.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    write_checkpoint(tmp_path)
    assert open_checkpoint("someone/model").path == tmp_path
    assert len(asked) == 1
    # Without safetensors the original files are fetched as well.
    (tmp_path / "model.safetensors").unlink()
    assert open_checkpoint("someone/model").kind == "config"
    assert any("*.ckpt" in patterns for _, patterns in asked[1:])


def test_the_documented_example_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/checkpoints.md", "exec"), {})


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "hf auth login"),
        ("RepositoryNotFoundError", "check the spelling"),
        ("HfHubHTTPError", "hf download someone/model"),
        ("ConnectError", "pass a local folder"),
        ("OSError", "hf download someone/model"),
    ],
)
def test_every_answer_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: str, advice: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    # The HTTP library is the Hub client's own choice: httpx, or its successor.
    httpx = import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
    error: Exception
    if kind == "ConnectError":
        error = httpx.ConnectError("no route\nto host")
    else:
        error = OSError("disk") if kind == "OSError" else getattr(errors, kind)("no\nway", response=response)

    def snapshot_download(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=advice) as caught:
        open_checkpoint("someone/model")
    assert "\n" not in str(caught.value)


def test_a_fault_of_our_own_is_not_taken_for_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_checkpoint("someone/model")
