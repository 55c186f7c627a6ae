"""The built-in recipes."""

from __future__ import annotations

from isomorph.quantize.recipe import Recipe, Rule

EIGHT_BITS = {"bits": 8, "group_size": 64, "mode": "affine"}

#: Routers choose between experts, which is discrete: most of mlx-lm's models keep theirs at 8 bits.
ROUTER = Rule(EIGHT_BITS, roles=("router",))


def _mixed(name: str, low: int, high: int) -> Recipe:
    """mlx-lm's recipe of that name, by role: `high` for head, values and down projections of some blocks."""
    high_bits = {"bits": high}
    return Recipe(
        name,
        f"mlx-lm's: {low}-bit; head {high}-bit, so are v and down in the first and last eighth and every third block",
        rules=(
            Rule({"bits": low}),
            Rule(high_bits, roles=("v",), blocks="spread"),
            Rule(high_bits, roles=("down",), blocks="spread"),
            Rule(high_bits, match=("*down_proj",), blocks="spread"),
            Rule(high_bits, roles=("head",)),
        ),
        explicit=True,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("default", "every matrix alike, by --bits and --group-size; as stock mlx-lm does it"),
        Recipe("q8", "8-bit", bits=8, rules=(ROUTER,)),
        Recipe("q6", "6-bit; routers 8-bit", bits=6, rules=(ROUTER,)),
        Recipe("q4", "4-bit; routers 8-bit", bits=4, rules=(ROUTER,)),
        Recipe(
            "q4-mixed",
            "the published Talkie 13B variant: 4-bit; head and blocks 14, 37, 38 8-bit; embedding as it is",
            bits=4,
            rules=(
                ROUTER,
                Rule({"bits": 8}, blocks="14, 37-38"),
                Rule({"bits": 8}, roles=("head",)),
                Rule(False, roles=("embed",)),
            ),
        ),
        Recipe(
            "lossless",
            "what lies on a grid stays on it, exactly and as cheaply as can be; the rest and routers 8-bit",
            bits=8,
            rules=(ROUTER,),
            exact=True,
        ),
        _mixed("mixed_2_6", 2, 6),
        _mixed("mixed_3_4", 3, 4),
        _mixed("mixed_3_6", 3, 6),
        _mixed("mixed_4_6", 4, 6),
    )
}
