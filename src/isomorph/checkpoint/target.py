"""The folder a result goes to: checked before work begins, built beside it, put in place with one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from isomorph.checkpoint.orbax_folder import is_bare_step
from isomorph.errors import InputError

#: A folder that holds one of these, and no folder but Orbax steps of weights, is a model's: `--force` may replace it.
MODEL_FILES = ("config.json", "*.safetensors", "*.pt", "*.pth", "*.ckpt")


def partial_folder(target: Path) -> Path:
    """Where `target` is built: hidden, beside it, so that the last step is a rename on one file system."""
    return target.with_name(f".{target.name}.isomorph-partial")


def _replaced_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.isomorph-replaced")


def check_target(target: str | Path, force: bool, sources: Iterable[Path] = ()) -> Path:
    """The absolute target path, when it may be written. Raises InputError when it exists, or holds a source."""
    path = Path(os.path.abspath(Path(target).expanduser()))
    if not str(target) or path.name == "":
        raise InputError(f"expected a folder to write; found {str(target)!r}; give it a name")
    if _replaced_folder(path).is_dir() and not path.exists():
        # An earlier --force was cut between its two renames: the old folder comes back first.
        os.rename(_replaced_folder(path), path)
    for source in sources:
        if source.resolve().is_relative_to(path.resolve()):
            raise InputError(f"expected a target apart from the source; found {target}, which holds {source.name}")
    if not os.path.lexists(path):
        ancestor = next(parent for parent in path.parents if os.path.lexists(parent))
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
            raise InputError(f"expected a target in a writable folder; found {ancestor}; choose another target")
        return path
    if not force:
        raise InputError(f"expected a target that does not exist; found {target}; choose another or add --force")
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"expected a folder to replace; found {target}, which is not one; choose another target")
    entries = list(path.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not is_bare_step(entry)]
    if entries and (folders or not any(entry.match(pattern) for entry in entries for pattern in MODEL_FILES)):
        what = f"the folder {folders[0].name} in it" if folders else "no model in it"
        raise InputError(f"expected a model folder to replace; found {target} with {what}; remove it yourself if meant")
    return path


def check_free_space(target: Path, nbytes: int) -> None:
    """Raises InputError unless the target's file system has room for `nbytes` more."""
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise InputError(
            f"expected {size(nbytes)} free in {folder}; found {size(free)}; free some space or choose another target"
        )


def install(partial: Path, target: Path, replace: bool) -> None:
    """Make the finished `partial` folder the `target`; `replace` says that what is there was checked and may go."""
    if not os.path.lexists(target):
        os.rename(partial, target)
    elif not replace:
        raise InputError(f"expected no {target}; found that it was made meanwhile; the finished folder is {partial}")
    else:
        replaced = _replaced_folder(target)
        os.rename(target, replaced)
        os.rename(partial, target)
        shutil.rmtree(replaced)
    sync(target.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(nbytes: float) -> str:
    """Bytes for people: `26.6 GB` (powers of 1000, as disks and model cards have them)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
