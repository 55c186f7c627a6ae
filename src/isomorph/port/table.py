"""The literal tables of an architecture's `weights.py`, read into exact names.

Every architecture has canonical names (one layout's, usually the Transformers port's). A layout's table says, for each
of its own tensor names, which canonical ones it holds and by which named transform:

    "embed.weight": "model.embed.weight"                                        the same values
    "blocks.{i}.mlp.up.kernel": ("model.blocks.{i}.mlp.up.weight", "transpose")  transformed
    "lm_head.weight": (("lm_head", "lm_head_gain.w_g"), "fold_gain")            several canonical tensors in one
    "*rotary*": (None, "computed from the config")                              deliberately dropped, with the reason

`{i}` runs over indices; `*` matches anything and is for dropped names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

Target = str | tuple[str | tuple[str, ...] | None, str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One form of an architecture's checkpoints.

    `rows` is the literal table; `container` how the weights are stored (`pt`, `mlx` or `flax` safetensors, by the
    header's format; `torch` or `nanochat`, an original file; `orbax`, a folder); `config` the config values the layout
    implies; `keys` what convert puts into config.json for stock libraries; `files` what it copies from the
    architecture's folder beside the weights; `generation` what generation_config.json says besides token ids, where the
    source has none; `loads` where a folder of this layout loads: library -> how, or why not; `packed` how a module's
    packed weights are stored: `mlx` words, `mxfp4` blocks as published, or None: not at all; `never_floats` are
    patterns of weights that it stores in no other way.
    """

    name: str
    rows: Mapping[str, Target]
    container: str
    description: str
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    loads: Mapping[str, str] = field(default_factory=dict)
    packed: str | None = None
    never_floats: tuple[str, ...] = ()

    def stores_floats(self, name: str) -> bool:
        """Whether the tensor called `name` may be stored unpacked."""
        return not any(fnmatchcase(name, pattern) for pattern in self.never_floats)


@dataclass(frozen=True)
class Row:
    """One row for exact names: the layout's tensor `name` holds the `canonical` ones through `transform`."""

    name: str
    canonical: tuple[str, ...]
    transform: str


class TableError(ValueError):
    """A mistake in a table itself: the porter's, not the user's."""


def expand(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Row]:
    """The layout's rows for exactly the canonical tensors in `shapes`, by the layout's own name.

    Raises TableError unless every canonical tensor is filled exactly once and no name has two rows.
    """
    rows: dict[str, Row] = {}
    filled: dict[str, str] = {}
    for pattern, target in layout.rows.items():
        canonical, transform = parse(target)
        if canonical is None:
            continue
        for index in _indices(canonical[0], shapes):
            row = Row(_fill(pattern, index), tuple(_fill(name, index) for name in canonical), transform)
            if row.name in rows:
                raise TableError(f"layout {layout.name}: two patterns match {row.name!r}")
            rows[row.name] = row
            for name in row.canonical:
                if name in filled:
                    raise TableError(f"layout {layout.name}: {filled[name]!r} and {row.name!r} both fill {name!r}")
                if name not in shapes:
                    raise TableError(f"layout {layout.name}: {row.name!r} fills {name!r}, which the architecture lacks")
                filled[name] = row.name
    if unfilled := [name for name in shapes if name not in filled]:
        raise TableError(f"layout {layout.name}: nothing fills {', '.join(unfilled)}")
    if contested := [name for name in rows if dropped(layout, name)]:
        raise TableError(f"layout {layout.name}: a pattern maps and another drops {', '.join(contested)}")
    return rows


def dropped(layout: Layout, name: str) -> str | None:
    """Why the layout deliberately drops a tensor called `name`; None when it does not."""
    for pattern, target in layout.rows.items():
        canonical, reason = parse(target)
        if canonical is None and fnmatchcase(name, pattern):
            return reason
    return None


def recognized(layout: Layout, names: Mapping[str, Any]) -> int:
    """How many of `names` some row of the layout could mean, whatever the config."""
    patterns = [pattern for pattern, target in layout.rows.items() if parse(target)[0] is not None]
    matcher = re.compile("|".join(re.escape(pattern).replace(r"\{i\}", r"\d+") for pattern in patterns))
    return sum(bool(matcher.fullmatch(name)) for name in names)


def parse(target: Target) -> tuple[tuple[str, ...] | None, str]:
    """A row's right side as (canonical names, transform), or (None, reason)."""
    if isinstance(target, str):
        return (target,), "identity"
    names, transform = target
    return ((names,) if isinstance(names, str) else names), transform


def _indices(pattern: str, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """The values of `{i}` for which `pattern` is one of this config's canonical names; one empty value without `{i}`.

    A config may lack what its architecture has, such as a head of its own.
    """
    if "{i}" not in pattern:
        yield from [""] if pattern in shapes else []
        return
    matcher = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    yield from (match[1] for name in shapes if (match := matcher.fullmatch(name)))


def _fill(pattern: str, index: str) -> str:
    return pattern.replace("{i}", index)
