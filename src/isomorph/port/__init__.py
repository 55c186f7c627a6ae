"""The one interpreter of an architecture's `weights.py` tables."""

from isomorph.port.declared import declared, declared_dtype
from isomorph.port.mapping import Reading, layout_of, mapped, read, shapes_in
from isomorph.port.table import Layout, Row, TableError, expand

__all__ = [
    "Layout",
    "Reading",
    "Row",
    "TableError",
    "declared",
    "declared_dtype",
    "expand",
    "layout_of",
    "mapped",
    "read",
    "shapes_in",
]
