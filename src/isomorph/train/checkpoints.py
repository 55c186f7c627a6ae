"""Checkpoints of a run: Orbax steps whose item `model` is the NNX tree, as any reader of Flax checkpoints finds it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from isomorph.checkpoint.orbax_folder import ITEM

#: The item beside the model: optimizer, step and the like.
REST = "training"

#: Steps that are kept.
KEPT = 2


class Checkpoints:
    """The steps in one folder, of states `{"parameters": {dotted name: array}, ...}`; `isomorph.load` reads them."""

    def __init__(self, manager: ocp.CheckpointManager) -> None:
        self.manager = manager

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write `state`; when this returns it is complete."""
        model, rest = _items(state)
        save = ocp.args.StandardSave
        self.manager.save(step, args=ocp.args.Composite(**{ITEM: save(model), REST: save(rest)}))

    def latest(self, state: dict[str, Any]) -> dict[str, Any]:
        """The last state saved, laid out over devices as `state` is; `state` itself when there is none."""
        step = self.manager.latest_step()
        if step is None:
            return state
        model, rest = _items(state)
        restore = ocp.args.StandardRestore
        found = self.manager.restore(step, args=ocp.args.Composite(**{ITEM: restore(model), REST: restore(rest)}))
        paths = {name: name.split(".") for name in state["parameters"]}
        return {"parameters": {name: _leaf(found[ITEM], path) for name, path in paths.items()}, **found[REST]}


@contextmanager
def open_checkpoints(folder: Path, config: Mapping[str, Any]) -> Iterator[Checkpoints]:
    """The checkpoints in `folder`, made when missing; config.json beside them is the model's `config`, which
    other readers of Orbax runs look for under `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (folder / "config.json").write_text(json.dumps({**config, ITEM: config}, indent=2) + "\n")
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
        yield Checkpoints(manager)


def _items(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters as a nested tree, and everything else."""
    tree: dict[str, Any] = {}
    for name, value in state["parameters"].items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return tree, {key: value for key, value in state.items() if key != "parameters"}


def _leaf(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree
