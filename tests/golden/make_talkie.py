"""Talkie in plain numpy and float64, and the small expected outputs made with it.

Written from the description of the architecture alone, sharing no code with the models it judges. Usage:

    python tests/golden/make_talkie.py      # writes tests/golden/talkie/*.npz

The weights are those of `tests/tiny.py` for the seed of each case, so only ids and outputs are stored.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import tiny_config, tiny_tensors

FOLDER = Path(__file__).resolve().parent / "talkie"

#: Case -> config overrides, seed of weights and ids, scale of the embedding.
CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "faithful": ({}, 1, 1.0),
    "accurate": ({"rope_table_dtype": "float32"}, 1, 1.0),
    # Mean squares of about 1e-7 stand beside an eps of 1.2e-7: another eps changes every logit.
    "small": ({"num_hidden_layers": 2}, 2, 3e-4),
}
ROWS, PROMPT, CONTINUATION = 2, 32, 16


def norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def tables(config: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, K/2]: angles in float32 as published, values rounded to the table's dtype."""
    exponents = np.arange(0, config["head_dim"], 2, dtype=np.float32) / np.float32(config["head_dim"])
    powers = (config["rope_theta"] ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    angles = (np.arange(length, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[config["rope_table_dtype"]]
    rounded = (
        values.astype(np.float32).astype(dtype).astype(np.float64) for values in (np.cos(angles), np.sin(angles))
    )
    return next(rounded), next(rounded)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [B, T, H, K] turned by minus the angle: first half with second half."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def forward(
    config: dict[str, Any], tensors: dict[str, np.ndarray], ids: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [B, T, V] and un-normed hidden states, L + 1 of [B, T, D], in float64."""
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads, width, eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
    rows, length = ids.shape
    cos, sin = tables(config, length)
    future = np.triu(np.ones((length, length), bool), 1)
    x = embedded = norm(weights["model.embed.weight"][ids], eps)
    states = [x]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.blocks.{layer}."
        y = norm(x, eps)
        query, key, value = (
            (y @ weights[f"{at}attn.attn_{name}.weight"].T).reshape(rows, length, heads, width)
            for name in ("query", "key", "value")
        )
        query = norm(rotate(query, cos, sin), eps) * weights[f"{at}attn.head_gain.head_g"][:, None]
        key = norm(rotate(key, cos, sin), eps)
        scores = np.einsum("bthk,bshk->bhts", query, key) / np.sqrt(width)
        scores[:, :, future] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bhts,bshk->bthk", scores, value).reshape(rows, length, heads * width)
        x = x + weights[f"{at}attn_gain.a_g"] * (mixed @ weights[f"{at}attn.attn_resid.weight"].T)
        y = norm(x, eps)
        gate = y @ weights[f"{at}mlp.mlp_gate.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (y @ weights[f"{at}mlp.mlp_linear.weight"].T)
        x = x + weights[f"{at}mlp_gain.a_g"] * (inner @ weights[f"{at}mlp.mlp_resid.weight"].T)
        x = x + weights[f"{at}embed_skip.a_g"] * embedded
        states.append(x)
    return norm(x, eps) @ (weights["lm_head"] * weights["lm_head_gain.w_g"]).T, states


def fingerprint(tensors: dict[str, np.ndarray]) -> str:
    """sha256 over all values, so that stale expectations are told from wrong models."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Config, tensors and prompt ids [ROWS, PROMPT] of one case."""
    overrides, seed, scale = CASES[name]
    config = tiny_config(**overrides)
    ids = np.random.default_rng(1000 + seed).integers(0, config["vocab_size"], (ROWS, PROMPT))
    return config, tiny_tensors(config, seed, scale), ids


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        config, tensors, ids = case(name)
        logits, states = forward(config, tensors, ids)
        sequence, margin = ids, np.inf
        for _ in range(CONTINUATION):
            last = forward(config, tensors, sequence)[0][:, -1]
            best = np.sort(last, axis=-1)
            margin = min(margin, float((best[:, -1] - best[:, -2]).min()))
            sequence = np.concatenate([sequence, last.argmax(axis=-1)[:, None]], axis=1)
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            input_ids=ids,
            logits=logits.astype(np.float32),
            hidden_states=np.stack(states).astype(np.float32),
            greedy=sequence[:, PROMPT:],
            weights_sha256=fingerprint(tensors),
        )
        print(f"{name}: max |logit| {np.abs(logits).max():.2f}, smallest greedy margin {margin:.4f}")


if __name__ == "__main__":
    main()
