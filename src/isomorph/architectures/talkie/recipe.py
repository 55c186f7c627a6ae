"""What each of Talkie's matrices is, in the words recipes use for any architecture."""

from __future__ import annotations

#: Module name -> role; gains are not matrices and have none.
ROLES = {
    "embed": "embed",
    "attn_query": "q",
    "attn_key": "k",
    "attn_value": "v",
    "attn_resid": "o",
    "mlp_gate": "gate",
    "mlp_linear": "up",
    "mlp_resid": "down",
    "lm_head": "head",
}


def role(path: str) -> str | None:
    """The role of the module or tensor at `path`, in any layout; None when it is not a matrix with one."""
    return next((ROLES[part] for part in reversed(path.split(".")) if part in ROLES), None)
