"""Weight tables: literal rows become exact names, and a table that is not one-to-one is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorph.architectures import registered
from isomorph.checkpoint import from_array
from isomorph.port import Layout, TableError, expand, shapes_in
from isomorph.port.table import dropped, parse, recognized
from isomorph.port.transforms import TRANSFORMS

SHAPES = {"a": (2, 3), "block.0.w": (4, 2), "block.1.w": (4, 2), "gain": (1,)}


def layout(**rows: Any) -> Layout:
    return Layout("test", {name.replace("__", "."): target for name, target in rows.items()}, "pt", "a test")


def test_patterns_run_over_the_indices_there_are() -> None:
    rows = expand(Layout("t", {"x": "a", "l.{i}": ("block.{i}.w", "transpose"), "g": "gain"}, "pt", ""), SHAPES)
    assert list(rows) == ["x", "l.0", "l.1", "g"]
    assert rows["l.1"].canonical == ("block.1.w",)
    assert rows["l.1"].transform == "transpose"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": "a", "g": "gain"}, "nothing fills block.0.w, block.1.w"),
        ({"x": "a", "y": "a", "l.{i}": "block.{i}.w", "g": "gain"}, "both fill 'a'"),
        ({"x": "a", "l.{i}": "block.{i}.w", "l.0": "gain"}, "two patterns match 'l.0'"),
        ({"x": "a", "l.{i}": "block.{i}.w", "g": (("gain", "other"), "fold_gain")}, "'other', which"),
        ({"x": "a", "l.{i}": "block.{i}.w", "g": "gain", "*1": (None, "why")}, "another drops l.1"),
    ],
)
def test_tables_that_are_not_one_to_one_are_refused(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        expand(Layout("t", rows, "pt", ""), SHAPES)


def test_dropping_gives_the_reason() -> None:
    table = Layout("t", {"x": "a", "*rotary*": (None, "computed")}, "pt", "")
    assert dropped(table, "blocks.0.rotary.inv_freq") == "computed"
    assert dropped(table, "x") is None


def test_recognized_counts_names_whatever_the_config() -> None:
    table = Layout("t", {"x.w": "a", "l.{i}.w": "block.{i}.w"}, "pt", "")
    assert recognized(table, dict.fromkeys(["x.w", "l.77.w", "l.w", "xaw", "l.0.w.b"])) == 2


@pytest.mark.parametrize("architecture", registered().values(), ids=lambda a: a.model_type)
def test_every_shipped_table_is_one_to_one(architecture: Any) -> None:
    shapes = architecture.parameters(architecture.config_class())
    for own in architecture.layouts.values():
        assert set().union(*(row.canonical for row in expand(own, shapes).values())) == set(shapes)
        assert all(parse(target)[1] for target in own.rows.values())
        assert own.loads
    assert set(architecture.defaults.values()) <= set(architecture.layouts)
    assert set(architecture.native.values()) <= set(architecture.layouts)


def test_a_layouts_shapes_are_what_its_transforms_make() -> None:
    table = Layout("t", {"x": ("a", "transpose"), "l.{i}": "block.{i}.w", "g": "gain"}, "pt", "")
    assert shapes_in(table, SHAPES) == {"x": (3, 2), "l.0": (4, 2), "l.1": (4, 2), "g": (1,)}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(TRANSFORMS)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_transform_has_its_inverse(name: str, shape: tuple[int, ...], seed: int) -> None:
    """Layout -> canonical -> layout without a sidecar; the sidecar's half is in test_fold.py."""
    transform = TRANSFORMS[name]
    if name.startswith("interleave"):
        shape = (3, *(2 * size for size in shape))  # stacks, halved along one axis or the other
    value = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    parts = transform.to_canonical(from_array("stored", value), ["one", "two"], None)
    back = transform.from_canonical("stored", parts)
    assert back.name == "stored"
    assert transform.shape([part.shape for part in parts]) == value.shape == back.shape
    assert np.ascontiguousarray(back.read()).tobytes() == value.tobytes()
    again = transform.to_canonical(back, ["one", "two"], None)
    for part, other in zip(parts, again, strict=True):
        assert part.name == other.name
        assert np.array_equal(part.read(), other.read())
