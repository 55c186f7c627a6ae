"""An Orbax checkpoint, the folder `<run>/<step>/model` that JAX training writes: read lazily, without JAX's devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor
from isomorph.errors import InputError

#: The part of a step that holds the parameters; others hold optimizer and data states.
ITEM = "model"

#: What an item's folder says of itself.
METADATA = "_METADATA"

#: The level that NNX may add around each value.
VALUE = ".value"


def find_item(path: Path) -> Path | None:
    """The parameters' folder, for a run (its latest step), a step or the folder itself; None when there is none."""
    steps = [entry for entry in path.iterdir() if entry.name.isdecimal() and (entry / ITEM / METADATA).is_file()]
    latest = max(steps, key=lambda entry: int(entry.name), default=path)
    return next((folder for folder in (latest / ITEM, path) if (folder / METADATA).is_file()), None)


def is_bare_step(folder: Path) -> bool:
    """Whether `folder` is a step with parameters and nothing else, as `write_orbax` makes it; training keeps more."""
    items = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return folder.name.isdecimal() and items == [ITEM] and (folder / ITEM / METADATA).is_file()


def read_orbax(item: Path) -> dict[str, Tensor]:
    """Lazily read tensors of an item's folder, by their dotted paths. Raises InputError when it is damaged."""
    try:
        import tensorstore
    except ModuleNotFoundError:
        raise InputError(
            f"reading {item} needs the package 'tensorstore', which is not installed; run: pip install 'isomorph[flax]'"
        ) from None
    try:
        settings = json.loads((item / METADATA).read_text())
        driver = "zarr3" if settings.get("use_zarr3") else "zarr"
        store: dict[str, Any] = {"driver": "file", "path": f"{item.resolve()}/"}
        if settings.get("use_ocdbt", True):
            store = {"driver": "ocdbt", "base": store}
        names = [
            ".".join(str(part["key"]) for part in entry["key_metadata"])
            for entry in settings["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")
        ]
        tensors: dict[str, Tensor] = {}
        arrays = {name: _opened(tensorstore, driver, store, name) for name in names}
        for name, future in arrays.items():
            tensor = _tensor(item, name.removesuffix(VALUE), future.result())
            tensors[tensor.name] = tensor
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"expected an Orbax checkpoint in {item}; found it damaged ({detail[:120]}); copy it again"
        ) from None
    return tensors


def _opened(tensorstore: Any, driver: str, store: dict[str, Any], name: str) -> Any:
    place = {**store, "path": f"{store.get('path', '')}{name}/"}
    return tensorstore.open({"driver": driver, "kvstore": place}, open=True, read=True)


def _tensor(item: Path, name: str, array: Any) -> Tensor:
    dtype = array.dtype.numpy_dtype.name
    if dtype not in NUMPY_DTYPES:
        raise InputError(f"expected plain dtypes in {item}; found {dtype} of {name!r}")

    def read() -> np.ndarray:
        try:
            return np.asarray(array.read().result())
        except (OSError, ValueError) as error:
            raise InputError(f"expected {item} to hold {name!r}; found: {str(error)[:120]!r}; copy it again") from None

    return Tensor(name, tuple(array.shape), dtype, read)


def write_orbax(step: Path, tensors: Iterable[Tensor]) -> None:
    """Write `tensors` as the item of the step folder `step`, for `CheckpointManager(step.parent)` to restore.

    One tensor at a time is in memory.
    """
    try:
        import jax
        import orbax.checkpoint as ocp
    except ModuleNotFoundError:
        raise InputError(
            "writing Orbax needs the package 'orbax-checkpoint', which is not installed; "
            "run: pip install 'isomorph[flax]'"
        ) from None

    class OneByOne(ocp.type_handlers.NumpyHandler):
        """Reads each tensor when its turn has come, and has it on disk before the next."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            for tensor, *rest in zip(values, infos, args):
                value = np.ascontiguousarray(tensor.read())
                for written in await super().serialize([value], *([part] for part in rest)):
                    written.result()
            return []

    tree: dict[str, Any] = {}
    for tensor in tensors:
        *path, leaf = tensor.name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = tensor
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # without one Orbax warns
        (Tensor, OneByOne(deepcopy_host_arrays=False)),
    )
    shutil.rmtree(step, ignore_errors=True)  # what an interrupted run left
    with ocp.CheckpointManager(
        step.parent.resolve(),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={ITEM: ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
    ) as manager:
        manager.save(int(step.name), args=ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(tree)}))
