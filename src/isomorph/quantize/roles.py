"""Roles: what a matrix does, whatever its architecture calls it, so that one recipe serves them all."""

from __future__ import annotations

import re

#: Role -> what it is.
ROLES = {
    "embed": "token embedding",
    "value_embed": "a token's own values, in some of the blocks",
    "q": "attention query",
    "k": "attention key",
    "v": "attention value",
    "o": "attention output",
    "gate": "gate of the MLP",
    "up": "up projection of the MLP",
    "down": "down projection of the MLP",
    "head": "output head",
    "router": "choice of experts",
    "expert": "any matrix of an expert",
}

#: Names that Transformers' and mlx-lm's models give a module (its last path component), by role.
_NAMES = {
    "embed": "embed_tokens wte tok_embeddings word_embeddings embed_in embed",
    "q": "q_proj wq query q_a_proj q_b_proj",
    "k": "k_proj wk key",
    "v": "v_proj wv value v_a_proj v_b_proj",
    "o": "o_proj wo out_proj dense",
    "gate": "gate_proj w1",
    "up": "up_proj w3 c_fc fc_in fc1 dense_h_to_4h",
    "down": "down_proj w2 fc_out fc2 dense_4h_to_h",
    "head": "lm_head output embed_out",
    "router": "router shared_expert_gate",
}
_BY_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}

#: A router behind a name that other modules share: `mlp.gate`, `block_sparse_moe.gate`, `router.proj`, `mlp.gate.proj`.
_ROUTER = re.compile(r"(^|\.)((mlp|block_sparse_moe|feed_forward|moe)\.gate(\.(gate_)?proj|\.wg)?|router\.\w+)$")
_EXPERT = re.compile(r"(^|\.)(experts|switch_mlp|switch_glu)\.")
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def stock_role(path: str) -> str | None:
    """The role of a module path of Transformers' or mlx-lm's models; None when its name says nothing known."""
    if _ROUTER.search(path):
        return "router"
    if _EXPERT.search(path):
        return "expert"
    if path.endswith(".c_proj"):
        return "down" if ".mlp." in path else "o"
    return _BY_NAME.get(path.rpartition(".")[2])


def block_of(path: str) -> int | None:
    """The index of the block a module is in: the first number in its path."""
    match = _BLOCK.search(path)
    return int(match[1]) if match else None
