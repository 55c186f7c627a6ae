"""Stock mlx-lm: the folder as mlx-lm's users have it, also where isomorph brings a model of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from isomorph.frameworks import mlx

if TYPE_CHECKING:
    from isomorph.architectures.base import Architecture
    from isomorph.checkpoint import Checkpoint

FRAMEWORK = "mlx-lm"


def load_model(
    architecture: Architecture | None,
    checkpoint: Checkpoint,
    config: Any,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> mlx.MLXModel:
    """mlx-lm's own model of the folder; one that it ships (`model_file`) only with `trust_remote_code`.

    Options are those of `frameworks.mlx.load_model`. Raises InputError.
    """
    own = {} if trust_remote_code else {"model_file": None}
    stock = replace(checkpoint, overrides={**checkpoint.overrides, **own}, packing=None)
    model = mlx.load_model(None, stock, None, trust_remote_code=trust_remote_code, **options)
    model.framework = FRAMEWORK
    return model
