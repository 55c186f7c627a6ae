"""A Flax NNX model as one flat dictionary of parameters, packed weights among them, named by their dotted paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from isomorph.kernels.flax import Packed

PARAMETERS = nnx.Any(nnx.Param, Packed)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, jax.Array]]:
    """`model` -> its structure and its parameters, e.g. `model.blocks.0.attn.attn_query.kernel` [in, out]."""
    graph, state = nnx.split(model, PARAMETERS)
    return graph, {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef, parameters: Mapping[str, jax.Array]) -> Any:
    """The model again, holding `parameters`."""
    paths = {name: tuple(int(part) if part.isdigit() else part for part in name.split(".")) for name in parameters}
    flat = [(paths[name], value) for name, value in parameters.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def partition_specs(model: nnx.Module) -> dict[str, jax.sharding.PartitionSpec]:
    """Which mesh axes split each parameter, as the model's file annotates them."""
    specs = nnx.get_partition_spec(nnx.state(model, PARAMETERS))
    return {".".join(map(str, path)): spec.get_value() for path, spec in nnx.to_flat_state(specs)}
