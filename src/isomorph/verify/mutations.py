"""Named faults of a port, made on purpose: the negative controls that `verify` must catch.

Each is written into a checkpoint (weights or config.json), so that the same fault runs in every framework. Two of them
are below the rounding noise of bfloat16 and can be proven in float32 only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isomorph import architectures
from isomorph.checkpoint import Tensor, check_target, file_identity, open_checkpoint, safetensors_files, write_folder
from isomorph.errors import InputError, did_you_mean
from isomorph.port import mapped
from isomorph.tokenizer import copy_tokenizer

Tensors = dict[str, Tensor]
Config = dict[str, Any]

#: The layout mutations are written in; its names are the canonical ones.
LAYOUT = "transformers"


@dataclass(frozen=True)
class Mutation:
    """A fault: `weights(tensors, config)` and `settings(config)` return changed copies.

    `shows_in` is the lowest precision in which it stands out of rounding noise at ordinary activations.
    """

    name: str
    description: str
    weights: Callable[[Tensors, Config], Tensors] = lambda tensors, config: tensors
    settings: Callable[[Config], Config] = lambda config: config
    shows_in: str = "bfloat16"


def filled(pattern: str, value: float) -> Callable[[Tensors, Config], Tensors]:
    """Every tensor whose name matches becomes constant."""

    def apply(tensors: Tensors, config: Config) -> Tensors:
        return _changed(tensors, pattern, lambda array: np.full_like(array, value))

    return apply


def swapped(first: str, second: str) -> Callable[[Tensors, Config], Tensors]:
    """Tensors whose names differ only by `first` and `second` change places."""

    def apply(tensors: Tensors, config: Config) -> Tensors:
        result = dict(tensors)
        for name, tensor in tensors.items():
            other = name.replace(first, second)
            if first in name and other in tensors:
                result[name], result[other] = tensors[other].renamed(name), tensor.renamed(other)
        return result

    return apply


def per_head(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors, Config], Tensors]:
    """`change` acts on query and key rows arranged as [heads, head_dim, hidden]."""

    def apply(tensors: Tensors, config: Config) -> Tensors:
        shape = (config["num_attention_heads"], config["head_dim"], -1)
        pattern = r"attn_(query|key)\.weight$"
        return _changed(tensors, pattern, lambda array: change(array.reshape(shape)).reshape(array.shape))

    return apply


def one_value(pattern: str, value: float) -> Callable[[Tensors, Config], Tensors]:
    """The first element of the first matching tensor becomes `value`."""

    def apply(tensors: Tensors, config: Config) -> Tensors:
        def change(array: np.ndarray) -> np.ndarray:
            array = array.copy()
            array.flat[0] = value
            return array

        name = next(name for name in tensors if re.search(pattern, name))
        return _changed(tensors, f"^{re.escape(name)}$", change)

    return apply


def setting(**values: Any) -> Callable[[Config], Config]:
    """Keys of config.json with other values."""
    return lambda config: {**config, **values}


def _flip(heads: np.ndarray) -> np.ndarray:
    # Negating the second halves of queries and keys turns rotation by -theta into rotation by +theta.
    half = heads.shape[1] // 2
    return np.concatenate([heads[:, :half], -heads[:, half:]], axis=1)


def _interleave(heads: np.ndarray) -> np.ndarray:
    half = heads.shape[1] // 2
    return np.stack([heads[:, :half], heads[:, half:]], axis=2).reshape(heads.shape)


def _other_tables(config: Config) -> Config:
    other = {"bfloat16": "float32", "float32": "bfloat16"}
    return {**config, "rope_table_dtype": other[config["rope_table_dtype"]]}


MUTATIONS = {
    mutation.name: mutation
    for mutation in (
        Mutation("head-gain-dropped", "query heads keep gain 1", filled(r"head_gain\.head_g$", 1)),
        Mutation("attention-gain-dropped", "attention enters with gain 1", filled(r"attn_gain\.a_g$", 1)),
        Mutation("mlp-gain-dropped", "the MLP enters with gain 1", filled(r"mlp_gain\.a_g$", 1)),
        Mutation("output-gain-dropped", "the head keeps gain 1", filled(r"lm_head_gain\.w_g$", 1)),
        Mutation("skip-dropped", "the embedding is not added to each block's output", filled(r"embed_skip\.a_g$", 0)),
        Mutation("rotation-flipped", "positions turn by +theta", per_head(_flip)),
        Mutation("rotation-interleaved", "pairs of neighbours turn instead of halves", per_head(_interleave)),
        Mutation(
            "query-key-swapped", "query and key of the first block", swapped("0.attn.attn_query", "0.attn.attn_key")
        ),
        Mutation("gate-swapped", "gate and linear input of every MLP", swapped("mlp.mlp_gate", "mlp.mlp_linear")),
        Mutation("blocks-swapped", "the first two blocks", swapped("blocks.0.", "blocks.1.")),
        Mutation(
            "theta-default",
            "rope theta is 10000, as when the config's key is not read",
            settings=setting(rope_theta=1e4),
        ),
        Mutation("nan-weight", "one weight is not a number", one_value(r"mlp_resid\.weight$", float("nan"))),
        Mutation("eps-1e-5", "norms add 1e-5", settings=setting(rms_norm_eps=1e-5), shows_in="float32"),
        Mutation(
            "rope-tables", "cos and sin rounded as they should not be", settings=_other_tables, shows_in="float32"
        ),
    )
}


def mutate(source: str | Path, target: str | Path, name: str) -> Path:
    """Write the model at `source` with the fault `name` into a new folder `target`, in the transformers layout.

    Raises InputError for an unknown name, a model that is not one of ours, or a target that exists.
    """
    if name not in MUTATIONS:
        known = ", ".join(MUTATIONS)
        raise InputError(f"expected a mutation of {known}; found {name!r}{did_you_mean(name, MUTATIONS)}")
    checkpoint = open_checkpoint(source)
    folder = check_target(target, False, [checkpoint.path])
    architecture = architectures.find(checkpoint)
    if architecture is None:
        raise InputError(f"expected an architecture of isomorph's own to mutate; found {checkpoint.path}")
    parsed = architectures.configuration(architecture, checkpoint, LAYOUT)
    config = parsed.to_dict()
    tensors = {tensor.name: tensor for tensor in mapped(checkpoint, architecture, LAYOUT)}
    mutation = MUTATIONS[name]
    weights = safetensors_files(list(mutation.weights(tensors, config).values()), {"format": "pt"})
    write_folder(
        folder,
        weights,
        {"config.json": json.dumps(mutation.settings(config), indent=2).encode()},
        inputs=[name, file_identity(checkpoint.files)],
    )
    copy_tokenizer(checkpoint.path, folder, architecture, parsed)
    return folder


def _changed(tensors: Tensors, pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Tensors:
    found = re.compile(pattern)

    def changed(tensor: Tensor) -> Tensor:
        # Whole tensors, not blocks of rows: a change may need to see all of them.
        return Tensor(tensor.name, tensor.shape, tensor.dtype, read=lambda: change(np.asarray(tensor.read())))

    result = {name: changed(tensor) if found.search(name) else tensor for name, tensor in tensors.items()}
    if not any(found.search(name) for name in tensors):
        raise InputError(f"expected a tensor that matches {pattern}; found none in this model; choose another mutation")
    return result
