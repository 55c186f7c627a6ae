"""Recipes: every form gives the same choices, mistakes are named, and sizes are right to the byte without weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from isomorph.architectures.talkie.recipe import role as talkie_role
from isomorph.catalogue import catalogue
from isomorph.cli import run
from isomorph.errors import InputError
from isomorph.quantize.named import RECIPES
from isomorph.quantize.recipe import in_spread, read_recipe, set_rule
from isomorph.quantize.roles import ROLES, block_of, stock_role
from isomorph.quantize.settings import Settings
from isomorph.quantize.stock import OWN_RULES, ROUTER_AT_EIGHT_BITS, default_recipe
from isomorph.quantize.write import quantize

#: The published Talkie 13B (facts of its config.json): 40 blocks of 7 matrices, an embedding and a head.
TALKIE_13B = {
    "model_type": "talkie",
    "vocab_size": 65540,
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
BLOCK_WEIGHTS = 4 * 5120 * 5120 + 3 * 5120 * 13696
TABLE_WEIGHTS = 65540 * 5120
#: head_g [40], three a_g [1] a block, all bfloat16.
GAIN_BYTES = 40 * (40 + 3) * 2


@pytest.fixture
def talkie(tmp_path):
    """A folder that holds the published config and nothing else."""
    (tmp_path / "talkie").mkdir()
    (tmp_path / "talkie" / "config.json").write_text(json.dumps(TALKIE_13B))
    return tmp_path / "talkie"


def stored(weights: int, bits: int, group_size: int) -> int:
    """Bytes of codes and of a bfloat16 scale and bias a group."""
    return weights * bits // 8 + weights // group_size * 4


@pytest.mark.parametrize(
    ("options", "payload", "bits_per_weight", "gigabytes"),
    [
        ({"bits": 8}, stored(40 * BLOCK_WEIGHTS + 2 * TABLE_WEIGHTS, 8, 64), 8.5, 14.11),
        ({"recipe": "q6"}, stored(40 * BLOCK_WEIGHTS + 2 * TABLE_WEIGHTS, 6, 64), 6.5, 10.79),
        ({}, stored(40 * BLOCK_WEIGHTS + 2 * TABLE_WEIGHTS, 4, 64), 4.5, 7.47),
        ({"group_size": 32}, stored(40 * BLOCK_WEIGHTS + 2 * TABLE_WEIGHTS, 4, 32), 5.0, 8.30),
        (
            {"recipe": "q4-mixed"},
            stored(37 * BLOCK_WEIGHTS, 4, 64) + stored(3 * BLOCK_WEIGHTS + TABLE_WEIGHTS, 8, 64) + 2 * TABLE_WEIGHTS,
            5.176,
            8.59,
        ),
        (
            {"layout": "mlx-lm"},
            # The head stays a bare bfloat16 matrix, beside its gain.
            stored(40 * BLOCK_WEIGHTS + TABLE_WEIGHTS, 4, 64) + 2 * TABLE_WEIGHTS + 2,
            4.79,
            7.95,
        ),
    ],
)
def test_sizes_of_the_published_variants(talkie, tmp_path, options, payload, bits_per_weight, gigabytes):
    result = quantize(talkie, tmp_path / "target", dry_run=True, **options)
    assert result.payload_bytes == payload + GAIN_BYTES
    assert result.bits_per_weight == pytest.approx(bits_per_weight, abs=1e-3)
    assert round(result.payload_bytes / 1e9, 2) == gigabytes
    assert result.parameters - 13_280_257_720 == (1 if options.get("layout") == "mlx-lm" else 0)
    assert not (tmp_path / "target").exists()


def test_every_skipped_matrix_has_a_reason(talkie, tmp_path):
    result = quantize(
        talkie, tmp_path / "target", layout="mlx-lm", overrides=["embed=keep", "blocks.-1.*=8"][:1], dry_run=True
    )
    assert result.skipped == {
        "model.embed": "the recipe keeps it",
        "lm_head": "a bare parameter, not a module's weight",
    }
    small = {**TALKIE_13B, "hidden_size": 5120 + 32}
    (talkie / "config.json").write_text(json.dumps(small))
    result = quantize(talkie, tmp_path / "target", dry_run=True)
    assert "5152 columns do not divide into groups of 64" in result.skipped.values()
    # Only what reads 5120 attention columns or 13696 inner ones is left.
    assert {module.role for module in result.plan if module.bits} == {"o", "down"}


RECIPE = """
description = "an example"
bits = 4

[[rule]]
roles = ["head", "v"]
bits = 8

[[rule]]
blocks = "0, 2-3, -1"
match = "mlp.*"
bits = 6
group_size = 32

[[rule]]
roles = "embed"
keep = true
"""


def choice(path: str, role: str | None, shape: tuple[int, ...]):
    """The same as RECIPE, as a function, for ten blocks."""
    if role == "embed":
        return False
    if ".mlp." in path and block_of(path) in (0, 2, 3, 9):
        return {"bits": 6, "group_size": 32}
    return 8 if role in ("head", "v") else True


def test_toml_and_function_agree(talkie, tmp_path):
    (talkie / "config.json").write_text(json.dumps({**TALKIE_13B, "num_hidden_layers": 10}))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    from_file = quantize(talkie, tmp_path / "a", recipe=tmp_path / "recipe.toml", dry_run=True)
    from_function = quantize(talkie, tmp_path / "a", recipe=choice, dry_run=True)
    assert from_file.plan == from_function.plan
    found = {module.path: (module.bits, module.group_size) for module in from_file.plan}
    assert found["model.blocks.9.mlp.mlp_resid"] == (6, 32)
    assert found["model.blocks.8.mlp.mlp_resid"] == (4, 64)
    assert found["model.blocks.3.attn.attn_value"] == (8, 64)
    assert found["model.embed"] == (None, None) and found["lm_head"] == (8, 64)
    # And as a dictionary, with --set having the last word.
    from_dict = quantize(
        talkie,
        tmp_path / "a",
        recipe={"head": 8, "embed": False, "o": {"mode": "mxfp4"}},
        overrides=["head=3"],
        dry_run=True,
    )
    found = {module.path: (module.bits, module.mode) for module in from_dict.plan}
    assert found["lm_head"] == (3, "affine") and found["model.blocks.4.attn.attn_resid"] == (4, "mxfp4")


def test_overrides_apply_to_functions_too(talkie, tmp_path):
    result = quantize(
        talkie, tmp_path / "a", recipe=lambda path, role, shape: 3, overrides=["blocks.14.*=8"], dry_run=True
    )
    assert {module.bits for module in result.plan if ".14." in module.path} == {8}
    assert {module.bits for module in result.plan if ".14." not in module.path} == {3}


def test_the_documented_recipe(talkie, tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "quantize.md"
    document = page.read_text()
    (tmp_path / "page.toml").write_text(re.search(r"```toml\n(.*?)```", document, re.DOTALL)[1])
    result = quantize(talkie, tmp_path / "target", recipe=tmp_path / "page.toml", dry_run=True)
    found = {module.path: (module.bits, module.group_size) for module in result.plan}
    assert found["model.embed"] == (None, None) and found["lm_head"] == (8, 64)
    assert found["model.blocks.14.mlp.mlp_gate"] == (8, 32)
    six = [path for path, settings in found.items() if settings == (6, 64)]
    assert [block_of(path) for path in six if path.endswith("attn_value")] == [0, 1, 38, 39]
    assert len(six) == 8
    # And the table of sizes is what the code computes.
    for options, payload in re.findall(r"\| `(--[^`]*)` \| ([\d,]+) \|", document):
        arguments = ["quantize", str(talkie), str(tmp_path / "target"), *options.split(), "--dry-run", "--json"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert run(arguments) == 0
        assert json.loads(out.getvalue())["payload_bytes"] == int(payload.replace(",", ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bit = 4", "did you mean 'bits'?"),
        ("bits = 7", "expected bits of 2, 3, 4, 5, 6, 8"),
        ("[[rule]]\nroles = ['haed']\nbits = 8", "did you mean 'head'?"),
        ("[[rule]]\nroles = ['head']", "expected either bits, group_size or mode, or keep = true"),
        ("[[rule]]\nkeep = true\nbits = 8", "expected either bits"),
        ("[[rule]]\nblocks = 'all'\nbits = 8", "expected blocks such as"),
        ("[[rule]]\nbits = 8\nlayers = 3", "expected keys of roles, blocks"),
        ("rule = 3", "expected rules as [[rule]] tables"),
        ("bits = ", "expected a recipe in TOML"),
    ],
)
def test_mistakes_in_a_recipe_file(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_recipe(path)


def test_mistakes_elsewhere(talkie, tmp_path):
    for options, message in (
        ({"recipe": "q44"}, "did you mean 'q4'?"),
        ({"overrides": ["head"]}, "expected --set 'PATTERN=BITS'"),
        ({"overrides": ["head=fast"]}, "expected --set 'PATTERN=BITS'"),
        ({"overrides": ["bloks.14.*=8"]}, "matches none of 282"),
        ({"overrides": ["head=7"]}, "expected bits of 2, 3, 4, 5, 6, 8"),
        ({"recipe": lambda path, role, shape: "four"}, "expected bits, a dictionary, True or False; found 'four'"),
        ({"recipe": 4}, "expected a recipe's name, a TOML file, a dictionary or a function; found 4"),
        ({"method": "gptp"}, "expected a method of affine"),
        ({"mode": "mxfp4", "bits": 8}, "expected bits of 4 for mode mxfp4"),
        ({"bits": 0}, "expected bits of 2, 3, 4, 5, 6, 8 for mode affine; found 0"),
        ({"recipe": {"head": 0}}, "found 0"),
        ({"layout": "flax"}, "expected a layout for mlx"),
        ({"recipe": {"*": False}}, "expected matrices to quantize"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            quantize(talkie, tmp_path / "target", dry_run=True, **options)


def test_a_rule_for_a_name_that_nothing_has_is_told(talkie, tmp_path, caplog):
    for recipe, told in (({"bloks.14.*": 8}, 1), ({"blocks.14.*": 8}, 0), ("mixed_3_6", 0)):
        caplog.clear()
        quantize(talkie, tmp_path / "target", dry_run=True, recipe=recipe)
        assert [record.getMessage() for record in caplog.records].count(
            "recipe dictionary: no matrix is named bloks.14.*"
        ) == told


def test_changes_keep_what_they_do_not_name():
    assert Settings(4, 32).changed({"bits": 8}) == Settings(8, 32)
    assert Settings(4, 32).changed({"group_size": 128}) == Settings(4, 128)
    # mxfp4 has no 8 bits: mlx-lm reads such an entry as affine, with affine's group size.
    assert Settings(4, 32, "mxfp4").changed({"bits": 8}) == Settings(8, 64)
    assert set_rule("blocks.14.*=6/32").choice == {"bits": 6, "group_size": 32}
    assert set_rule("head=8").roles == ("head",) and set_rule("lm_head=8").match == ("lm_head",)


@pytest.mark.parametrize(
    ("path", "role", "block"),
    [
        ("model.embed_tokens", "embed", None),
        ("model.layers.3.self_attn.q_proj", "q", 3),
        ("model.layers.3.self_attn.o_proj", "o", 3),
        ("model.layers.11.mlp.up_proj", "up", 11),
        ("model.layers.11.mlp.gate_proj", "gate", 11),
        ("model.layers.11.mlp.gate", "router", 11),
        ("model.layers.0.mlp.router", "router", 0),
        ("model.layers.0.block_sparse_moe.gate", "router", 0),
        ("model.layers.0.mlp.switch_mlp.down_proj", "expert", 0),
        ("model.layers.0.mlp.experts.5.down_proj", "expert", 0),
        ("model.layers.0.mlp.shared_expert.down_proj", "down", 0),
        ("lm_head", "head", None),
        ("model.layers.0.something_else", None, 0),
    ],
)
def test_roles_of_stock_models(path, role, block):
    assert stock_role(path) == role and block_of(path) == block


def test_roles_are_one_vocabulary():
    from isomorph.architectures import gelu_gpt, gpt_oss, talkie

    for architecture in (gelu_gpt, gpt_oss, talkie):
        assert set(architecture.recipe.ROLES.values()) <= set(ROLES)
    assert gelu_gpt.ARCHITECTURE.role("model.value_embeds.11.weight") == "value_embed"
    assert gelu_gpt.ARCHITECTURE.role("value_embeds.11.embedding") in ROLES
    assert gelu_gpt.ARCHITECTURE.role("model.wte") == "embed" and gelu_gpt.ARCHITECTURE.role("model.lm_head") == "head"
    assert gelu_gpt.ARCHITECTURE.role("model.blocks.1.attn.ve_gate.weight") is None
    assert talkie_role("model.blocks.7.attn.attn_resid.weight") == "o"
    assert talkie_role("blocks.7.mlp.mlp_linear.kernel") == "up"
    assert talkie_role("model.blocks.7.attn_gain.a_g") is None and talkie_role("lm_head_gain.w_g") is None


def test_built_in_recipes_are_listed():
    assert [row["name"] for row in catalogue("recipes")] == list(RECIPES)
    assert all(row["description"] for row in catalogue("recipes"))


@pytest.mark.parametrize("layers", [2, 3, 8, 11, 32, 40])
@pytest.mark.parametrize("name", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_mixed_recipes_choose_as_mlx_lm_does(name, layers):
    convert = pytest.importorskip("mlx_lm.convert")
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    paths = [
        "model.embed_tokens",
        *(f"model.layers.{i}.{part}" for i in range(layers) for part in projections),
        "lm_head",
    ]

    class Skeleton:
        """As much of an mlx-lm model as its recipe builder looks at."""

        def named_modules(self):
            return [(path, None) for path in paths]

    skeleton = Skeleton()
    skeleton.layers = [None] * layers
    predicate = convert.mixed_quant_predicate_builder(name, skeleton, 64)
    for path in paths:
        expected = predicate(path, None)
        assert RECIPES[name].choose(path, stock_role(path), (64, 64), Settings(4, 64), layers).to_dict() == expected, (
            path
        )


def test_models_that_keep_their_routers_at_eight_bits_are_mlx_lms():
    """The table against the source text of the installed mlx-lm, where each model states its own predicate."""
    models = Path(pytest.importorskip("mlx_lm.models").__path__[0])
    stated = {
        path.stem
        for path in models.glob("*.py")
        if (body := re.search(r"def quant_predicate\(self.*?\n        return predicate\n", path.read_text(), re.DOTALL))
        and re.search(r"(gate|router|gate_proj|layer|proj)\".*\n?.*\{\"group_size\": 64, \"bits\": 8\}", body[0])
    }
    known = ROUTER_AT_EIGHT_BITS | set(OWN_RULES)
    assert {"qwen3_moe", "gpt_oss", "minimax"} <= stated
    assert stated <= known, stated - known
    assert default_recipe("llama").rules == () and default_recipe("mixtral").rules == ()
    settings = default_recipe("gpt_oss").choose("model.layers.3.mlp.router", "router", (32, 64), Settings(4, 32), 4)
    assert settings == Settings(8, 64)


def test_spread_is_not_all_blocks():
    assert [block for block in range(16) if in_spread(block, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]


def test_sizes_of_a_stock_model_from_its_config(tmp_path):
    """Names and shapes come from Transformers; a tied head is the embedding and is counted once."""
    pytest.importorskip("torch")
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16"}
    weights = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512)
    for tied in (False, True):
        (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        result = quantize(tmp_path, tmp_path / "target", bits=6, dry_run=True)
        tables = (1 if tied else 2) * 1000 * 256
        assert result.payload_bytes == stored(weights + tables, 6, 64) + 5 * 256 * 2
        assert result.parameters == weights + tables + 5 * 256


def test_bits_a_weight_counts_everything(talkie, tmp_path):
    result = quantize(talkie, tmp_path / "target", bits=3, dry_run=True)
    assert sum(module.nbytes for module in result.plan) + GAIN_BYTES == result.payload_bytes
    assert sum(math.prod(module.shape) for module in result.plan) + 40 * 43 == result.parameters
    assert replace(result, plan=[]).skipped == {}


@pytest.mark.parametrize(
    ("overrides", "size_bytes"),
    [
        ([], 183_043_876),
        (["value_embed=3"], 164_169_508),
        (["value_embed=keep"], 400_099_108),
        (["embed=4"], 146_868_004),
    ],
)
def test_value_embeddings_have_a_role_of_their_own(tmp_path, overrides, size_bytes):
    """The published GELU-GPT by q4-mixed, which keeps the token embedding: 58 % of it are value embeddings."""
    (tmp_path / "config.json").write_text('{"model_type": "gelu_gpt"}')
    options = {"recipe": "q4-mixed", "dtype": "bfloat16", "overrides": overrides, "dry_run": True}
    assert quantize(tmp_path, tmp_path / "target", **options).payload_bytes == size_bytes
