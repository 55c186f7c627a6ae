"""The one interpreter of an architecture's `weights.py` tables."""

from isomorph.port.mapping import mapped
from isomorph.port.table import Layout, Row, TableError, expand

__all__ = ["Layout", "Row", "TableError", "expand", "mapped"]
