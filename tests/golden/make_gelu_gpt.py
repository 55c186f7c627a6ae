"""GELU-GPT in plain numpy and float64, and the small expected outputs made with it.

Written from the description of the architecture alone, sharing no code with the models it judges. Usage:

    python tests/golden/make_gelu_gpt.py      # writes tests/golden/gelu_gpt/*.npz

The weights are those of `tests/tiny_gelu_gpt.py` for the seed of each case, so only ids and outputs are stored.
`forward` takes the name of one mistake to make: each is a negative control of the tests that compare with it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.make_talkie import fingerprint
from tiny_gelu_gpt import tiny_config, tiny_tensors

FOLDER = Path(__file__).resolve().parent / "gelu_gpt"

#: nanochat's own choices.
NANOCHAT = {"mlp": "relu2", "tie_embeddings": False, "rms_norm_eps": 1.1920928955078125e-07}

#: Case -> config overrides, seed of weights and ids, scale of the embedding.
CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "gqa-odd-padded": ({}, 1, 1.0),
    "nanochat": ({**NANOCHAT, "n_layer": 4, "n_kv_head": 1, "rope_table_dtype": "bfloat16"}, 2, 1.0),
    "deep": ({"n_layer": 6, "n_kv_head": 4, "window_pattern": "SL", "vocab_size": 128}, 3, 1.0),
    # Mean squares of about 1e-6 stand beside the eps: another one changes every logit.
    "small": ({"n_layer": 2, "tie_embeddings": False}, 4, 1e-3),
}
ROWS, PROMPT, CONTINUATION = 2, 200, 16

MISTAKES = (
    "window one shorter",
    "window one longer",
    "last layer short",
    "no smear",
    "smear from smeared",
    "no backout",
    "backout a block early",
    "no x0",
    "no resid",
    "value embeddings even",
    "value gate 2",
    "erf gelu",
    "scale q only",
    "rope by plus theta",
    "interleaved rope",
    "no soft cap",
    "rope base 10000",
    "eps",
)


def norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray, mistake: str) -> np.ndarray:
    if mistake == "erf gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def tables(config: dict[str, Any], length: int, mistake: str) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [T, K/2]: angles in float32, values rounded to the table's dtype."""
    head_dim = config["n_embd"] // config["n_head"]
    base = 10000.0 if mistake == "rope base 10000" else config["rope_base"]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / (base ** exponents.astype(np.float64)).astype(np.float32)
    angles = (np.arange(length, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[config["rope_table_dtype"]]
    cos, sin = (
        values.astype(np.float32).astype(dtype).astype(np.float64) for values in (np.cos(angles), np.sin(angles))
    )
    return cos, -sin if mistake == "rope by plus theta" else sin


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, mistake: str) -> np.ndarray:
    """x [B, T, H, K] turned by minus the angle: first half with second half."""
    half = x.shape[-1] // 2
    cos, sin = cos[None, :, None], sin[None, :, None]
    if mistake == "interleaved rope":
        a, b = x[..., ::2], x[..., 1::2]
    else:
        a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def forward(
    config: dict[str, Any], tensors: dict[str, np.ndarray], ids: np.ndarray, mistake: str = ""
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [B, T, V] and hidden states (block 0's input, then each block's output; L + 1 of [B, T, D]), float64."""
    weights = {name.removeprefix("model."): value.astype(np.float64) for name, value in tensors.items()}
    layers, heads, key_heads = config["n_layer"], config["n_head"], config["n_kv_head"]
    width, eps = config["n_embd"] // heads, config["rms_norm_eps"] * (2 if mistake == "eps" else 1)
    rows, length = ids.shape
    cos, sin = tables(config, length, mistake)
    behind = np.arange(length)[:, None] - np.arange(length)[None]

    short = math.ceil(config["sequence_len"] / 4 / 128) * 128
    pattern = config["window_pattern"]
    windows = [{"S": short, "L": config["sequence_len"]}[pattern[i % len(pattern)]] for i in range(layers)]
    windows[-1] = short if mistake == "last layer short" else config["sequence_len"]
    windows = [w + {"window one shorter": -1, "window one longer": 1}.get(mistake, 0) for w in windows]

    x = norm(weights["wte.weight"][ids], eps)
    before = np.zeros_like(x[:, 0])
    smeared = []
    for t in range(length):
        gate = weights["smear_lambda"] * sigmoid(x[:, t, :24] @ weights["smear_gate.weight"].T)
        smeared.append(x[:, t] + (0 if mistake == "no smear" else gate * before))
        before = smeared[-1] if mistake == "smear from smeared" else x[:, t]
    x = x0 = np.stack(smeared, axis=1)

    states, middle = [], x
    for layer in range(layers):
        at = f"blocks.{layer}."
        resid = 1.0 if mistake == "no resid" else weights["resid_lambdas"][layer]
        x = resid * x + (0 if mistake == "no x0" else weights["x0_lambdas"][layer]) * x0
        states = states or [x]
        y = norm(x, eps)
        query, key, value = (
            (y @ weights[f"{at}attn.c_{name}.weight"].T).reshape(rows, length, -1, width) for name in "qkv"
        )
        if f"value_embeds.{layer}.weight" in weights and mistake != "value embeddings even":
            gate = (2 if mistake == "value gate 2" else 3) * sigmoid(
                y[..., :12] @ weights[f"{at}attn.ve_gate.weight"].T
            )
            embedded = weights[f"value_embeds.{layer}.weight"][ids].reshape(rows, length, key_heads, width)
            value = value + gate[..., None] * embedded
        query, key = (norm(rotate(part, cos, sin, mistake), eps) for part in (query, key))
        query, key = 1.2 * query, key * (1.0 if mistake == "scale q only" else 1.2)
        key, value = (np.repeat(part, heads // key_heads, axis=2) for part in (key, value))
        scores = np.einsum("bthk,bshk->bhts", query, key) / np.sqrt(width)
        scores[:, :, (behind < 0) | (behind > windows[layer])] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bhts,bshk->bthk", scores, value).reshape(rows, length, heads * width)
        x = x + mixed @ weights[f"{at}attn.c_proj.weight"].T
        inner = norm(x, eps) @ weights[f"{at}mlp.c_fc.weight"].T
        inner = gelu(inner, mistake) if config["mlp"] == "gelu" else np.square(np.maximum(inner, 0))
        x = x + inner @ weights[f"{at}mlp.c_proj.weight"].T
        states.append(x)
        if layer == layers // 2 - (mistake == "backout a block early"):
            middle = x
    x = norm(x - (0 if mistake == "no backout" else weights["backout_lambda"]) * middle, eps)
    head = weights["wte.weight" if config["tie_embeddings"] else "lm_head.weight"]
    logits = (x @ head.T)[..., : config["vocab_size"]]
    return logits if mistake == "no soft cap" else 15 * np.tanh(logits / 15), states


def case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Config, tensors and prompt ids [ROWS, PROMPT] of one case."""
    overrides, seed, scale = CASES[name]
    config = tiny_config(**overrides)
    ids = np.random.default_rng(1000 + seed).integers(0, config["vocab_size"], (ROWS, PROMPT))
    return config, tiny_tensors(config, seed, scale), ids


def loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy in nats of `logits` [B, T, V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return float(-np.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean())


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
        # Every layer's output at the positions where windows begin to bite says as much as all of them.
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            input_ids=ids,
            logits=logits[:, ::8].astype(np.float32),
            hidden_states=np.stack(states)[:, :, ::32].astype(np.float32),
            loss=loss(logits[:, :-1], ids[:, 1:]),
            greedy=sequence[:, PROMPT:],
            weights_sha256=fingerprint(tensors),
        )
        print(f"{name}: max |logit| {np.abs(logits).max():.2f}, smallest greedy margin {margin:.4f}")


if __name__ == "__main__":
    main()
