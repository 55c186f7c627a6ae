"""What each of GELU-GPT's matrices is, in the words recipes use for any architecture."""

from __future__ import annotations

#: The end of a module's path -> role. Gates of a few channels and lambdas are not matrices and have none.
ROLES = {
    "wte": "embed",
    "attn.c_q": "q",
    "attn.c_k": "k",
    "attn.c_v": "v",
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "lm_head": "head",
}


def role(path: str) -> str | None:
    """The role of the module or tensor at `path`, in any layout; None when it is not a matrix with one."""
    parts = path.removesuffix(".weight").removesuffix(".kernel").removesuffix(".embedding").split(".")
    if "value_embeds" in parts:
        return "value_embed"
    return ROLES.get(".".join(parts[-2:])) or ROLES.get(parts[-1])
