"""gpt-oss for MLX: mlx-lm's own model (0.32) with its faults repaired; complete in itself, so a folder can ship it.

What mlx-lm's `gpt_oss` gets wrong, each with the effect on a tiny random model's logits (of size 5):
- YaRN's `truncate: false` is ignored: the ramp's ends are rounded to whole channels (0.02 to 0.4);
- a config in Transformers 5's style (`rope_parameters`) silently loses YaRN (4 to 5);
- `swiglu_alpha` and `swiglu_limit` are ignored; without `layer_types` an odd number of layers loses the last one;
- experts stored as [expert, in, out], Transformers' own parameters, do not load.

mlx-lm loads this through `"model_file": "modeling_mlx.py"` in config.json and `trust_remote_code=True`.
Shapes: B batch, T tokens, K head_dim.
"""

# No `from __future__ import annotations`: mlx-lm runs a model_file outside sys.modules, where a dataclass could not
# resolve its annotations.
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gpt_oss

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass
class ModelArgs(gpt_oss.ModelArgs):
    """mlx-lm's arguments and those it does not read; defaults are those of the published models."""

    rope_parameters: Any = None
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def __post_init__(self) -> None:
        rope = dict(self.rope_parameters or self.rope_scaling or {})
        self.rope_theta = rope.pop("rope_theta", self.rope_theta)
        kind = rope.get("rope_type") or rope.get("type") or "yarn"
        if kind != "yarn":
            raise ValueError(f"gpt_oss has yarn positions, found rope_type {kind!r}")
        # What the published config says, where one says nothing at all; Transformers' default for a missing key.
        default = {} if rope else {"truncate": False}
        self.rope_scaling = {"rope_type": "yarn", "factor": 32.0, "truncate": True, **default, **rope}
        if not self.layer_types:
            self.layer_types = [FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers)]
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name {self.num_hidden_layers} layers, found {len(self.layer_types)}")


class YarnRoPE(nn.Module):
    """YaRN (arXiv:2309.00071): channels between the two correction dimensions are interpolated in part."""

    def __init__(self, dims: int, base: float, scaling: dict) -> None:
        super().__init__()
        self.dims = dims
        factor = scaling["factor"]
        original = scaling.get("original_max_position_embeddings") or 4096

        def correction(rotations: float) -> float:
            return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = correction(scaling.get("beta_fast") or 32)
        high = correction(scaling.get("beta_slow") or 1)
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001  # as Transformers: a ramp of no length divides by zero
        periods = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
        # Interpolated channels turn `factor` times slower.
        self._periods = 1 / ((1 / (factor * periods)) * ramp + (1 / periods) * (1 - ramp))
        self._attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """x [B, H, T, K]; `offset` is the position of the first token, one number or one a row."""
        turned = mx.fast.rope(
            x.astype(mx.float32), self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )
        return (turned * self._attention_factor).astype(x.dtype)


class SwigluOAI(nn.Module):
    """(clip(up) + 1) * gate * sigmoid(alpha * gate), gate clipped from above; not compiled: that needs a compiler."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self._alpha, self._limit = alpha, limit

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        gate = mx.minimum(gate, self._limit)
        x = mx.clip(x, -self._limit, self._limit)
        return (x + 1.0) * (gate * mx.sigmoid(self._alpha * gate))


class Model(gpt_oss.Model):
    def __init__(self, args: ModelArgs) -> None:
        # Both kinds of layers have an index for their masks; a model with one kind alone never uses the other's.
        types = args.layer_types
        args.layer_types = [*types, *({SLIDING, FULL} - set(types))]
        super().__init__(args)
        args.layer_types = self.model.layer_types = types
        self.model.swa_idx = types.index(SLIDING) if SLIDING in types else 0
        self.model.ga_idx = types.index(FULL) if FULL in types else 0
        for layer in self.model.layers:
            layer.self_attn.rope = YarnRoPE(args.head_dim, args.rope_theta, args.rope_scaling)
            layer.mlp.experts.activation = SwigluOAI(args.swiglu_alpha, args.swiglu_limit)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Published blocks, Transformers' [expert, in, out], fused or split MLX weights -> split MLX weights."""
        turned = {}
        for name, value in weights.items():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):  # [expert, in, out]
                turned[f"{name}_swapped.weight"] = value.swapaxes(-1, -2)
            else:
                turned[name] = value
        split = {}
        for name, value in super().sanitize(turned).items():
            split[name.replace("_swapped", "")] = value
        return split
