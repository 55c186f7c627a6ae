"""The plan: which tensors of a model are quantized, how, and what the result takes in bytes. No weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.errors import InputError
from isomorph.quantize.recipe import Recipe
from isomorph.quantize.roles import block_of
from isomorph.quantize.settings import Settings

RoleOf = Callable[[str], str | None]

BARE = "a bare parameter, not a module's weight"


@dataclass(frozen=True)
class Decision:
    """What one matrix gets: `settings`, or None and the `reason` it stays as it is; `kept` when a recipe said so."""

    path: str
    role: str | None
    tensor: Tensor
    settings: Settings | None
    reason: str = ""
    kept: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored for it."""
        if self.settings is None:
            return self.tensor.nbytes
        return self.settings.nbytes(self.tensor.shape, self.tensor.dtype)


@dataclass(frozen=True)
class Plan:
    """Decisions for every matrix, in the model's order; `rest` are the tensors that are never quantized."""

    default: Settings
    decisions: list[Decision]
    rest: list[Tensor]
    explicit: bool

    @property
    def parameters(self) -> int:
        """Number of weights, counted as the source has them."""
        return sum(decision.tensor.size for decision in self.decisions) + sum(tensor.size for tensor in self.rest)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors; headers and JSON aside."""
        return sum(decision.nbytes for decision in self.decisions) + sum(tensor.nbytes for tensor in self.rest)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.payload_bytes / max(1, self.parameters)

    def quantization(self) -> dict[str, Any]:
        """config.json's `quantization`: the defaults, and by module path what differs from them."""
        entry = self.default.to_dict()
        for decision in self.decisions:
            if decision.settings is not None and (self.explicit or decision.settings != self.default):
                entry[decision.path] = decision.settings.to_dict()
            elif decision.kept:
                entry[decision.path] = False
        return entry


def make_plan(
    tensors: Iterable[Tensor],
    recipe: Recipe,
    default: Settings,
    role_of: RoleOf,
    is_bare: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """Decide for each of `tensors`, named as the target has them. Raises InputError when the recipe cannot be kept to.

    A module's `X.weight` of two dimensions (three for stacked experts) is a matrix; norms and bare parameters are not.
    `is_bare` tells which names end like a module's weight and are parameters.
    """
    tensors = list(tensors)
    matrices = [tensor for tensor in tensors if _is_matrix(tensor, role_of) and not is_bare(tensor.name)]
    paths = {tensor.name: tensor.name.removesuffix(".weight") for tensor in matrices}
    block_count = 1 + max((block for path in paths.values() if (block := block_of(path)) is not None), default=-1)
    decisions, rest = [], []
    for tensor in tensors:
        if tensor.name in paths:
            decisions.append(_decide(paths[tensor.name], tensor, recipe, default, block_count, role_of))
        elif len(tensor.shape) > 1 and tensor.dtype in FLOATING:
            reason = BARE if is_bare(tensor.name) else _why_not(tensor)
            role = role_of(tensor.name.removesuffix(".weight"))
            decisions.append(Decision(tensor.name, role, tensor, None, reason))
        else:
            rest.append(tensor)
    _check_overrides(recipe, decisions, block_count)
    if not any(decision.settings for decision in decisions):
        raise InputError(
            f"expected matrices to quantize; found {decisions[0].path}: {decisions[0].reason}"
            if decisions
            else "expected matrices to quantize; found none"
        )
    return Plan(default, decisions, rest, recipe.explicit)


def _decide(
    path: str, tensor: Tensor, recipe: Recipe, default: Settings, block_count: int, role_of: RoleOf
) -> Decision:
    role = role_of(path)
    settings = recipe.choose(path, role, tensor.shape, default, block_count)
    if settings is None:
        return Decision(path, role, tensor, None, "the recipe keeps it", kept=True)
    if not settings.fits(tensor.shape[-1]):
        reason = f"{tensor.shape[-1]} columns do not divide into groups of {settings.group_size}"
        return Decision(path, role, tensor, None, reason)
    return Decision(path, role, tensor, settings)


def _is_matrix(tensor: Tensor, role_of: RoleOf) -> bool:
    if not tensor.name.endswith(".weight") or tensor.dtype not in FLOATING[1:] or 0 in tensor.shape:
        return False
    if len(tensor.shape) == 3:
        return role_of(tensor.name.removesuffix(".weight")) == "expert"
    return len(tensor.shape) == 2 and not _is_norm(tensor.name)


def _is_norm(name: str) -> bool:
    return "norm" in name.split(".")[-2].lower()


def _why_not(tensor: Tensor) -> str:
    if not tensor.name.endswith(".weight"):
        return BARE
    if math.prod(tensor.shape) == 0:
        return "empty"
    if tensor.dtype not in FLOATING[1:]:
        return f"{tensor.dtype}, which MLX does not quantize; add --dtype"
    return "a norm" if _is_norm(tensor.name) else f"{len(tensor.shape)} dimensions"


def _check_overrides(recipe: Recipe, decisions: list[Decision], block_count: int) -> None:
    """An override that names nothing is a slip of the pen."""
    for rule in recipe.overrides:
        if not any(rule.applies(decision.path, decision.role, block_count) for decision in decisions):
            example = decisions[0].path if decisions else "none"
            raise InputError(
                f"expected a role or a pattern that matches a module; found {(rule.roles + rule.match)[0]!r}, which "
                f"matches none of {len(decisions)} such as {example!r}; see the plan with --dry-run"
            )
