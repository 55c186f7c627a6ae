"""gpt-oss in plain numpy and float64, and the small expected outputs made with it.

Written from the description of the architecture alone, sharing no code with the models it judges. Usage:

    python tests/golden/make_gpt_oss.py      # writes tests/golden/gpt_oss/*.npz

The weights are those of `tests/tiny_gpt_oss.py` for the seed of each case, so only ids and outputs are stored.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.make_talkie import fingerprint
from tiny_gpt_oss import tiny_config, tiny_tensors, unpacked

FOLDER = Path(__file__).resolve().parent / "gpt_oss"

#: Case -> config overrides, seed of weights and ids.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "odd": ({}, 1),
    # YaRN's ramp truncated to whole channels, another gate, and all layers of one kind.
    "variant": (
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_scaling": {**tiny_config()["rope_scaling"], "truncate": True},
            "swiglu_limit": 2.0,
            "swiglu_alpha": 1.3,
        },
        2,
    ),
}
ROWS, PROMPT, CONTINUATION = 2, 48, 16


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def yarn(config: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, K/2] of YaRN (arXiv:2309.00071, section 3.4), scaled; angles in float32 as published."""
    scaling, width, base = config["rope_scaling"], config["head_dim"], config["rope_theta"]
    original = scaling["original_max_position_embeddings"]
    ends = [
        width * math.log(original / (2 * math.pi * scaling[beta])) / (2 * math.log(base))
        for beta in ("beta_fast", "beta_slow")
    ]
    if scaling["truncate"]:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    pairs = np.arange(width // 2)
    plain = base ** (-2 * pairs / width)
    share = np.clip((pairs - max(ends[0], 0)) / (min(ends[1], width - 1) - max(ends[0], 0)), 0, 1)
    frequencies = (plain * (1 - share) + plain / scaling["factor"] * share).astype(np.float32)
    angles = (np.arange(length, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    scale = 0.1 * math.log(scaling["factor"]) + 1
    return np.cos(angles) * scale, np.sin(angles) * scale


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [B, T, H, K]: first half with second half."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(
    config: dict[str, Any], weights: dict[str, np.ndarray], at: str, x: np.ndarray, window: int
) -> np.ndarray:
    rows, length, _ = x.shape
    width, groups = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
    query, key, value = (
        (x @ weights[f"{at}.{name}_proj.weight"].T + weights[f"{at}.{name}_proj.bias"]).reshape(rows, length, -1, width)
        for name in "qkv"
    )
    cos, sin = yarn(config, length)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin).repeat(groups, axis=2)
    scores = np.einsum("bthk,bshk->bhts", query, key) / np.sqrt(width)
    back = np.arange(length)[:, None] - np.arange(length)
    scores[:, :, (back < 0) | (back >= window)] = -np.inf
    sinks = np.broadcast_to(weights[f"{at}.sinks"][None, :, None, None], (*scores.shape[:3], 1))
    shares = softmax(np.concatenate([scores, sinks], axis=-1))[..., :-1]
    mixed = np.einsum("bhts,bshk->bthk", shares, value.repeat(groups, axis=2)).reshape(rows, length, -1)
    return mixed @ weights[f"{at}.o_proj.weight"].T + weights[f"{at}.o_proj.bias"]


def experts(config: dict[str, Any], weights: dict[str, np.ndarray], at: str, x: np.ndarray) -> tuple[np.ndarray, float]:
    """x [N, D] -> [N, D], and the smallest distance between a chosen and a rejected expert."""
    logits = x @ weights[f"{at}.router.weight"].T + weights[f"{at}.router.bias"]
    count, limit, alpha = config["num_experts_per_tok"], config["swiglu_limit"], config.get("swiglu_alpha", 1.702)
    order = np.argsort(-logits, axis=-1)
    ranked = np.take_along_axis(logits, order, axis=-1)
    shares = softmax(ranked[:, :count])
    out = np.zeros_like(x)
    for token, chosen in enumerate(order[:, :count]):
        for expert, share in zip(chosen, shares[token]):
            both = weights[f"{at}.experts.gate_up_proj"][expert] @ x[token]
            both = both + weights[f"{at}.experts.gate_up_proj_bias"][expert]
            gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
            inner = (up + 1) * gate / (1 + np.exp(-alpha * gate))
            down = weights[f"{at}.experts.down_proj"][expert] @ inner + weights[f"{at}.experts.down_proj_bias"][expert]
            out[token] += share * down
    return out, float((ranked[:, count - 1] - ranked[:, count]).min())


def forward(
    config: dict[str, Any], tensors: dict[str, np.ndarray], ids: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Logits [B, T, V], un-normed hidden states (L + 1 of [B, T, D]) and the smallest router gap, in float64."""
    weights = {n: v.astype(np.float64) for n, v in tensors.items() if not n.endswith(("_blocks", "_scales"))}
    for name in tensors:
        if name.endswith("_blocks"):
            path = name.removesuffix("_blocks")
            weights[path] = unpacked(tensors[name], tensors[f"{path}_scales"])
    eps, gap = config["rms_norm_eps"], np.inf
    x = weights["model.embed_tokens.weight"][ids]
    states = [x]
    for layer, kind in enumerate(config["layer_types"]):
        at = f"model.layers.{layer}"
        window = config["sliding_window"] if kind == "sliding_attention" else ids.shape[1]
        y = norm(x, weights[f"{at}.input_layernorm.weight"], eps)
        x = x + attention(config, weights, f"{at}.self_attn", y, window)
        y = norm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        out, margin = experts(config, weights, f"{at}.mlp", y.reshape(-1, y.shape[-1]))
        x, gap = x + out.reshape(x.shape), min(gap, margin)
        states.append(x)
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T, states, gap


def case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray, int]:
    """Config, tensors, prompt ids [ROWS, PROMPT] and seed of one case."""
    overrides, seed = CASES[name]
    config = tiny_config(**overrides)
    ids = np.random.default_rng(1000 + seed).integers(0, config["vocab_size"], (ROWS, PROMPT))
    return config, tiny_tensors(config, seed), ids, seed


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        config, tensors, ids, _ = case(name)
        logits, states, gap = forward(config, tensors, ids)
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
        print(
            f"{name}: max |logit| {np.abs(logits).max():.2f}, smallest greedy margin {margin:.4f}, router gap {gap:.5f}"
        )


if __name__ == "__main__":
    main()
