"""Opening a checkpoint: a folder, an original torch file or a Hub id becomes named tensors and a config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isomorph.checkpoint.hub import fetch, is_hub_id
from isomorph.checkpoint.mxfp4 import packed_view
from isomorph.checkpoint.orbax_folder import ITEM, find_item, read_orbax
from isomorph.checkpoint.packings import mlx_view
from isomorph.checkpoint.safetensors_file import REPAIR, read_safetensors
from isomorph.checkpoint.tensor import Tensor
from isomorph.checkpoint.torch_file import SUFFIXES, open_torch
from isomorph.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: nanochat's checkpoints: one a training step, each with its `meta_STEP.json`.
NANOCHAT = re.compile(r"model_(\d+)\.pt")

#: `pocket:talkie` names a model that comes with the package.
POCKET = "pocket:"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    `path` is the folder, or the original file; `tensors` are lazy and in the order of their data; `config` is
    config.json with the caller's `overrides` applied, or None when there is no config.json; `metadata` is the
    safetensors header's; `kind` is `safetensors`, `torch`, `orbax`, or `config` for a folder without weights; `files`
    are the weight files. What other metadata say of the model (nanochat's, a training run's) is among `overrides`.
    `packing` names the format (`awq`, ...) of a folder that another tool quantized; `tensors` and `config` show it as
    MLX stores the same weights.
    """

    path: Path
    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    kind: str
    files: tuple[Path, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    packing: str | None = None

    @property
    def folder(self) -> Path:
        """Where the tokenizer and the other files beside the weights are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def quantization(self) -> dict[str, Any] | None:
        """MLX's `quantization` entry of config.json: defaults, and settings a module path; None when not quantized.

        The same stands under `quantization_config`, where other formats, which name a `quant_method`, have theirs.
        """
        config = self.config or {}
        value = config.get("quantization", config.get("quantization_config"))
        return value if isinstance(value, dict) and "quant_method" not in value else None

    def require_weights(self) -> None:
        """Raises InputError for a folder that holds only a config."""
        if self.kind == "config" or not self.tensors:
            raise InputError(f"expected weights in {self.path}; found only a config; download or convert the weights")


def open_checkpoint(
    source: str | Path | Checkpoint, *, config: Mapping[str, Any] | str | Path | None = None
) -> Checkpoint:
    """Open `source`: a folder, an original .pt/.pth/.ckpt file, `pocket:NAME` or a Hub id. No tensor is read yet.

    `config` (a mapping, or the path of a config.json) overrides keys of the folder's config.json, or completes what
    is inferred for a bare original file. Raises InputError.
    """
    if isinstance(source, Checkpoint):
        return source
    try:
        return _open(_locate(source), _overrides(config))
    except OSError as error:
        raise InputError(
            f"expected a readable checkpoint; found {source}: {error.strerror}; correct the path"
        ) from None


def _open(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    # A config.json beside an original file is its own: convert writes one there.
    own = (path.parent if path.is_file() else path) / "config.json"
    values = {**read_json(own), **overrides} if own.is_file() else None
    packed = (values or {}).get("quantization")
    if packed is not None and not isinstance(packed, dict):
        raise InputError(f"expected an object at 'quantization' in {own}; found {packed!r}; correct config.json")
    if path.is_file():
        return _torch_checkpoint(path, path, values, overrides)
    if (path / SINGLE).is_file():
        return _safetensors_checkpoint(path, [path / SINGLE], None, values, overrides)
    if (path / INDEX).is_file():
        index = _index(path)
        shards = [path / shard for shard in dict.fromkeys(index.values())]
        return _safetensors_checkpoint(path, shards, index, values, overrides)
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1:
        raise InputError(f"expected {INDEX} beside {len(found)} safetensors files in {path}; found none; {REPAIR}")
    if found:
        return _safetensors_checkpoint(path, found, None, values, overrides)
    item = find_item(path)
    if item is not None:
        return _orbax_checkpoint(path, item, values, overrides)
    originals = sorted(entry for entry in path.iterdir() if entry.suffix in SUFFIXES and entry.is_file())
    # Beside each of nanochat's steps lies its optimizer's state.
    steps = [entry for entry in originals if NANOCHAT.fullmatch(entry.name)]
    if steps:
        originals = [max(steps, key=lambda entry: int(entry.stem.partition("_")[2]))]
    if len(originals) > 1:
        names = ", ".join(entry.name for entry in originals[:4])
        raise InputError(f"expected one original checkpoint in {path}; found {names}; pass the file itself")
    if originals:
        return _torch_checkpoint(path, originals[0], values, overrides)
    if values is None:
        raise InputError(
            f"expected a model folder (config.json with safetensors, or one .pt/.pth/.ckpt); found neither in {path}"
        )
    return Checkpoint(path, values, {}, {}, "config", overrides=overrides)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError when it is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        detail = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise InputError(f"expected JSON in {path}; found that {detail}; correct the file") from None
    if not isinstance(document, dict):
        raise InputError(f"expected a JSON object in {path}; found a {type(document).__name__}; correct the file")
    return document


def _overrides(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config).expanduser()
    return read_json(path / "config.json" if path.is_dir() else path)


def _locate(source: str | Path) -> Path:
    if isinstance(source, str) and source.startswith(POCKET):
        from isomorph import pocket

        return pocket.path(source.removeprefix(POCKET))
    if not isinstance(source, str | Path):
        raise InputError(f"expected a path or a Hub id; found {source!r}")
    if "\0" in str(source):
        raise InputError(f"expected a path or a Hub id; found {str(source)!r}, which no path can be")
    if not str(source):
        raise InputError("expected a folder, an original .pt/.pth/.ckpt file or a Hub id; found an empty name")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".safetensors" or path.name in ("config.json", INDEX):
            return path.parent
        if path.suffix not in SUFFIXES:
            raise InputError(f"expected a folder or a file of {', '.join(SUFFIXES)}; found {path}; pass its folder")
        return path
    if isinstance(source, str) and is_hub_id(source):
        return fetch(source)
    raise InputError(f"expected a folder, an original .pt/.pth/.ckpt file or a Hub id; found no {str(source)!r}")


def _torch_checkpoint(path: Path, file: Path, config: dict[str, Any] | None, overrides: dict[str, Any]) -> Checkpoint:
    tensors, stated = open_torch(file)
    meta = file.with_name(f"meta_{file.stem.partition('_')[2]}.json")
    if NANOCHAT.fullmatch(file.name) and meta.is_file():
        # One that states no windows is older than they are (nanochat's checkpoint_manager.py).
        stated = {"window_pattern": "L", **_inner(meta, "model_config")}
    return Checkpoint(path, config, tensors, {}, "torch", (file,), {**stated, **overrides})


def _orbax_checkpoint(path: Path, item: Path, config: dict[str, Any] | None, overrides: dict[str, Any]) -> Checkpoint:
    """Of `item` in a run, a step or by itself; the run's config.json has the model's under `model`."""
    places = [folder / "config.json" for folder in (item, item.parent, item.parent.parent)]
    own = next((place for place in places if place.is_file()), None)
    if own is not None:
        values = read_json(own)
        nested = values.pop(ITEM, None)
        if isinstance(nested, dict) and "model_type" not in values:
            config, overrides = None, {**nested, **overrides}
        else:
            config = {**values, **overrides}
    files = tuple(entry for entry in sorted(item.rglob("*")) if entry.is_file())
    return Checkpoint(path, config, read_orbax(item), {}, "orbax", files, overrides)


def _inner(path: Path, key: str) -> dict[str, Any]:
    """The JSON object at `key` of the one in `path`."""
    value = read_json(path).get(key)
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object at {key!r} in {path}; found {value!r}; correct the file")
    return value


def _safetensors_checkpoint(
    path: Path,
    files: list[Path],
    index: dict[str, str] | None,
    config: dict[str, Any] | None,
    overrides: dict[str, Any],
) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        content = read_safetensors(file)
        metadata |= content.metadata
        if index is not None:
            _check_index(file, content.tensors, index)
        tensors |= content.tensors
    tensors, config = packed_view(tensors, config)
    tensors, config, packing = mlx_view(tensors, config)
    return Checkpoint(path, config, tensors, metadata, "safetensors", tuple(files), overrides, packing)


def _index(folder: Path) -> dict[str, str]:
    """`weight_map` of the index: tensor name -> file name, every file inside `folder`."""
    path = folder / INDEX
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise InputError(f"expected a weight_map of tensor name -> file name in {path}; found none; {REPAIR}")
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or not shard.endswith(".safetensors"):
            raise InputError(f"expected safetensors files of the same folder in {path}; found {shard!r}; {REPAIR}")
        if not (folder / shard).is_file():
            raise InputError(f"expected the file {shard}, which {path} names; found none; {REPAIR}")
    return index


def _check_index(file: Path, tensors: Mapping[str, Tensor], index: Mapping[str, str]) -> None:
    claimed = {name for name, shard in index.items() if shard == file.name}
    missing, extra = sorted(claimed - set(tensors)), sorted(set(tensors) - claimed)
    if missing or extra:
        name, problem = (missing[0], "lacks") if missing else (extra[0], "holds, unknown to the index,")
        more = len(missing) + len(extra) - 1
        raise InputError(
            f"expected {file} to hold exactly what {INDEX} says; found that it {problem} {name!r}"
            f"{f' and {more} more' if more else ''}; {REPAIR}"
        )
