"""What each of gpt-oss' matrices is, in the words recipes use for any architecture."""

from __future__ import annotations

#: Module name -> role, for what is not inside an expert.
ROLES = {
    "embed_tokens": "embed",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "router": "router",
    "lm_head": "head",
}


def role(path: str) -> str | None:
    """The role of the module or tensor at `path`, in any layout; None when it is not a matrix with one."""
    parts = path.split(".")
    if "experts" in parts:
        return "expert"
    return next((ROLES[part] for part in reversed(parts) if part in ROLES), None)
