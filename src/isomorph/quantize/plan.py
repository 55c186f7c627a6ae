"""The plan: which tensors of a model are quantized, how, and what the result takes in bytes. No weight is read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from isomorph.checkpoint.tensor import FLOATING, Tensor
from isomorph.errors import InputError
from isomorph.quantize.grid import INTEGERS, holds
from isomorph.quantize.named import RECIPES
from isomorph.quantize.recipe import Recipe
from isomorph.quantize.roles import block_of
from isomorph.quantize.settings import Settings

if TYPE_CHECKING:
    from isomorph.checkpoint.mlx_quantized import QuantizedModule

logger = logging.getLogger(__name__)

RoleOf = Callable[[str], str | None]

BARE = "a bare parameter, not a module's weight"


@dataclass(frozen=True)
class Decision:
    """What one matrix gets: `settings`, or None and the `reason` it stays as it is; `kept` when a recipe said so.

    `packed` is where it comes from when the source is quantized; `grid` what its weights lie on already, where known;
    `exact` says that it is stored without any error.
    """

    path: str
    role: str | None
    tensor: Tensor
    settings: Settings | None
    reason: str = ""
    kept: bool = False
    packed: QuantizedModule | None = None
    grid: Settings | None = None
    exact: bool = False

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
    packed: Mapping[str, QuantizedModule] | None = None,
    grid_of: Callable[[Tensor], Settings | None] = lambda tensor: None,
    requantize: bool = False,
) -> Plan:
    """Decide for each of `tensors`, named as the target has them. Raises InputError when the recipe cannot be kept to.

    A module's `X.weight` of two dimensions (three for stacked experts) is a matrix; norms and bare parameters are not.
    `is_bare` tells which names end like a module's weight and are parameters. `packed` are the modules of a quantized
    source by their weight's name; `grid_of` tells the grid of a matrix. What the settings can hold exactly is
    stored so; with `requantize` only what stays on its grid.
    """
    tensors = list(tensors)
    matrices = [tensor for tensor in tensors if _is_matrix(tensor, role_of) and not is_bare(tensor.name)]
    paths = {tensor.name: tensor.name.removesuffix(".weight") for tensor in matrices}
    block_count = 1 + max((block for path in paths.values() if (block := block_of(path)) is not None), default=-1)
    decisions, rest = [], []
    for tensor in tensors:
        if tensor.name in paths:
            role = role_of(paths[tensor.name])
            decision = Decision(
                paths[tensor.name],
                role,
                tensor,
                None,
                packed=(packed or {}).get(tensor.name),
                grid=grid_of(tensor),
            )
            decisions.append(_decided(decision, recipe, default, block_count, requantize))
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


def _decided(decision: Decision, recipe: Recipe, default: Settings, block_count: int, requantize: bool) -> Decision:
    """What stays as it is stays packed where the source has it so."""
    tensor, grid = decision.tensor, decision.grid
    module = decision.packed
    own = None if module is None else module.settings
    # Codes that stay exact keep the dtype of their scales, whatever the model is cast to.
    kept = tensor.cast(module.scales.dtype) if module is not None and module.settings.affine else tensor
    settings = recipe.choose(decision.path, decision.role, tensor.shape, default, block_count, grid)
    if settings is None:
        reason = "the recipe keeps it"
        return replace(decision, tensor=kept, settings=own, reason=reason, kept=own is None, exact=True)
    if not settings.fits(tensor.shape[-1]):
        reason = f"{tensor.shape[-1]} columns do not divide into groups of {settings.group_size}"
        return replace(decision, tensor=kept, settings=own, reason=reason, exact=True)
    exact = settings in (own, grid) or (not requantize and grid is not None and holds(grid, settings))
    if exact:
        # Scales times whole numbers need more bits than 16-bit floats have.
        tensor = tensor.cast("float32") if grid in INTEGERS and module is None else kept
    return replace(decision, tensor=tensor, settings=settings, exact=exact)


def _is_matrix(tensor: Tensor, role_of: RoleOf) -> bool:
    if not tensor.name.endswith(".weight") or tensor.dtype not in FLOATING[1:] or 0 in tensor.shape:
        return False
    if len(tensor.shape) == 3:
        return role_of(tensor.name.removesuffix(".weight")) == "expert"
    return len(tensor.shape) == 2 and not _is_norm(tensor.name)


def _is_norm(name: str) -> bool:
    return "norm" in name.split(".")[-2].lower()


def _why_not(tensor: Tensor) -> str:
    if tensor.name.endswith("bias"):
        return "biases"
    if not tensor.name.endswith(".weight"):
        return BARE
    if math.prod(tensor.shape) == 0:
        return "empty"
    if tensor.dtype not in FLOATING[1:]:
        return f"{tensor.dtype}, which MLX does not quantize; add --dtype"
    return "a norm" if _is_norm(tensor.name) else f"{len(tensor.shape)} dimensions"


def _check_overrides(recipe: Recipe, decisions: list[Decision], block_count: int) -> None:
    """An override that names nothing is a slip of the pen; a rule for names may be another architecture's."""
    for rule in recipe.rules if recipe.name not in RECIPES else ():
        if rule.match and not any(rule.applies(decision.path, decision.role, block_count) for decision in decisions):
            logger.warning("recipe %s: no matrix is named %s", recipe.name, " or ".join(rule.match))
    for rule in recipe.overrides:
        if not any(rule.applies(decision.path, decision.role, block_count) for decision in decisions):
            example = decisions[0].path if decisions else "none"
            raise InputError(
                f"expected a role or a pattern that matches a module; found {(rule.roles + rule.match)[0]!r}, which "
                f"matches none of {len(decisions)} such as {example!r}; see the plan with --dry-run"
            )
