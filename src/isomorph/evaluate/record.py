"""The one schema of every measurement: what was measured, on which model and data, by which protocol, where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isomorph.records import to_json
from isomorph.verify.environment import environment

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model


@dataclass(frozen=True)
class Record:
    """One result of `evaluate`.

    `kind` is perplexity, divergence or degeneration; `results` holds the numbers, units in their names; `fingerprint`
    is equal for two records whose tokens and windows were the same.
    """

    kind: str
    model: dict[str, Any]
    protocol: dict[str, Any]
    data: dict[str, Any]
    results: dict[str, Any]
    fingerprint: str | None = None
    reference: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=environment)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return to_json(self)


def described(model: Model) -> dict[str, Any]:
    """Source, framework, architecture and compute dtype of a model."""
    return {
        "source": str(model.source) if model.source else None,
        "framework": model.framework,
        "architecture": model.architecture,
        "dtype": model.dtype,
        "context": model.max_positions,
    }
