"""What stock mlx-lm's models say about their own quantization, so that the default is its `convert -q`, bit for bit."""

from __future__ import annotations

from dataclasses import replace

from isomorph.quantize.named import EIGHT_BITS, RECIPES, ROUTER
from isomorph.quantize.recipe import Recipe, Rule

#: model_types whose mlx-lm model (0.32) keeps its routers at 8 bits, whatever the rest gets.
ROUTER_AT_EIGHT_BITS = frozenset(
    [
        "Klear",
        "afmoe",
        "bailing_hybrid",
        "bailing_moe",
        "bailing_moe_linear",
        "bailing_moe_v3",
        "gemma4",
        "gemma4_text",
        "gpt_oss",
        "granitemoe",
        "granitemoehybrid",
        "jamba",
        "kimi_k3",
        "kimi_linear",
        "laguna",
        "lfm2_moe",
        "mellum",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe",
        "step3p5",
    ]
)

#: model_types whose router, `mlp.gate`, is a parameter of mlx-lm's (0.32) and not a module: it cannot be quantized.
BARE_ROUTERS = frozenset(
    [
        "deepseek",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "joyai_llm_flash",
        "kimi_k2",
        "mimo_v2_flash",
    ]
)

#: Further rules: granite's weights are small enough to underflow the scales of some formats.
OWN_RULES = {
    "granite": (Rule(EIGHT_BITS, roles=("o", "down", "head")),),
    "granitemoe": (Rule(EIGHT_BITS, roles=("o", "head")), Rule(EIGHT_BITS, match=("*mlp.down_proj",))),
    "longcat_flash": (Rule(EIGHT_BITS, match=("*classifier",)),),
}


def is_bare(model_type: str, name: str) -> bool:
    """Whether mlx-lm's model of that type has the tensor as a bare parameter, though its name is that of a weight."""
    return model_type in BARE_ROUTERS and name.endswith(".gate.weight")


def default_recipe(model_type: str) -> Recipe:
    """The recipe where none is given: every matrix alike, but for what mlx-lm's own model of that type asks for."""
    routers = (ROUTER,) if model_type in ROUTER_AT_EIGHT_BITS else ()
    return replace(RECIPES["default"], rules=routers + OWN_RULES.get(model_type, ()))
