"""What convert writes for MLX, in stock mlx-lm and in a process that cannot import isomorph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_with_mlx_lm

import isomorph
from isomorph.architectures.talkie import modeling_mlx
from isomorph.frameworks.model import Model
from isomorph.verify.tolerance import allowed_logit_difference
from speaking import VOCABULARY, with_tokenizer, without_isomorph
from tiny import tiny_config, tiny_tensors, write_checkpoint

#: Prompts of unequal length, one of them a single token.
PROMPTS = [
    "the cat",
    "in the beginning there was another one",
    "x",
    "on and on it goes, and nobody knows where it ends",
]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model (once with each kind of tables) as source and in both MLX layouts."""
    base = tmp_path_factory.mktemp(f"tables-{request.param}")
    source = with_tokenizer(base / "source", rope_table_dtype=request.param)
    isomorph.convert(source, base / "mlx-lm", to="mlx")
    isomorph.convert(source, base / "mlx-folded", layout="mlx-folded")
    return {name: base / name for name in ("source", "mlx-lm", "mlx-folded")}


STOCK = """
import json
import mlx.core as mx
from mlx_lm import batch_generate, generate, load, stream_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

def run(folder, trust):
    model, tokenizer = load(folder, trust_remote_code=trust)
    prompts = [tokenizer.encode(text) for text in texts]
    single = [[step.token for step in stream_generate(model, tokenizer, prompt, max_tokens=24)] for prompt in prompts]
    batch = batch_generate(model, tokenizer, prompts, max_tokens=24, return_token_ids=True).token_ids
    # The cache of a longer prompt, saved, loaded and trimmed to a shared beginning, then continued.
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prompts[1] + [3, 1, 4]]), cache=cache))
    save_prompt_cache(scratch, cache)
    cache = load_prompt_cache(scratch)
    assert trim_prompt_cache(cache, 4) == 4
    steps = stream_generate(model, tokenizer, prompts[1][-1:], max_tokens=24, prompt_cache=cache)
    return {
        "module": type(model).__module__,
        "logits": model(mx.array([prompts[1]])).tolist(),
        "single": single,
        "batch": batch,
        "continued": [step.token for step in steps],
        "text": generate(model, tokenizer, prompts[0], max_tokens=24),
        "stops": sorted(tokenizer.eos_token_ids),
    }

texts, scratch = json.loads(sys.argv[1]), sys.argv[2]
print(json.dumps({folder: run(folder, trust == "trust") for folder, trust in json.loads(sys.argv[3])}))
"""


def greedy(model: Model, prompt: list[int], tokens: int) -> list[int]:
    state, fed, chosen = model.decode_state(), prompt, []
    for _ in range(tokens):
        chosen.append(int(state.feed(np.array([fed]), last_only=True)[0, -1].argmax()))
        fed = chosen[-1:]
    return chosen


def until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    return tokens[: next((index for index, token in enumerate(tokens) if token in stops), len(tokens))]


def test_folders_run_in_stock_mlx_lm_without_isomorph(folders: dict[str, Path], tmp_path: Path) -> None:
    native, shipped = str(folders["mlx-lm"]), str(folders["mlx-folded"])
    jobs = [(native, "no"), (shipped, "trust")]
    said = without_isomorph(STOCK, json.dumps(PROMPTS), tmp_path / "cache.safetensors", json.dumps(jobs))
    assert said[native]["module"] == "mlx_lm.models.talkie" and said[shipped]["module"] == "custom_model"
    model = isomorph.load(folders["source"], framework="mlx")
    # mlx-lm's own file has float32 tables, whatever the config says: that is the model it can express.
    accurate = isomorph.load(folders["source"], framework="mlx", rope_table_dtype="float32")
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    for answer, expected in ((said[native], accurate), (said[shipped], model)):
        reference = expected.logits(prompts[1])
        assert np.abs(np.array(answer["logits"], np.float32) - reference).max() <= allowed_logit_difference(reference)
        stops = answer["stops"]
        assert stops == [VOCABULARY - 5, VOCABULARY - 4]
        for prompt, single, batch in zip(prompts, answer["single"], answer["batch"]):
            ours = greedy(expected, prompt, 24)
            assert until_stop(single, stops) == until_stop(batch, stops) == until_stop(ours, stops)
        assert answer["continued"] == answer["single"][1]
        assert answer["text"]
    if model.config.rope_table_dtype == "bfloat16":
        reference = model.logits(prompts[1])
        assert np.abs(said[native]["logits"] - reference).max() > allowed_logit_difference(reference)


def test_model_file_runs_only_when_trusted(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_with_mlx_lm(folders["mlx-folded"])
    assert (folders["mlx-folded"] / "modeling_mlx.py").read_text() == Path(modeling_mlx.__file__).read_text()
    # isomorph has this file itself and runs nothing from the folder.
    (folders["mlx-folded"] / "modeling_mlx.py").write_text("raise SystemExit('foreign code ran')")
    isomorph.load(folders["mlx-folded"], framework="mlx")
    shutil.copy(modeling_mlx.__file__, folders["mlx-folded"])


def test_both_heads_load_and_a_second_sanitize_changes_nothing() -> None:
    config = tiny_config(dtype="bfloat16")
    weights = {name: mx.array(value) for name, value in tiny_tensors(config).items()}
    model = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(config))
    folded = model.sanitize(weights)
    assert "lm_head" in weights and "lm_head" not in folded and "lm_head_gain.w_g" not in folded
    head, gain = weights["lm_head"].astype(mx.float32), weights["lm_head_gain.w_g"].astype(mx.float32)
    assert mx.array_equal(folded["lm_head.weight"], (head * gain).astype(mx.bfloat16))
    assert model.sanitize(folded) == folded
    model.load_weights(list(folded.items()), strict=True)
    # Half a head is no head: strict loading has to see it.
    for name in ("lm_head", "lm_head_gain.w_g"):
        with pytest.raises(ValueError, match="lm_head"):
            model.load_weights(list(model.sanitize({k: v for k, v in weights.items() if k != name}).items()))


@pytest.mark.parametrize("layout", ["original", "transformers", "transformers-folded", "mlx-lm", "mlx-folded", "flax"])
def test_every_layout_computes_what_it_computes_in_torch(layout: str, tmp_path: Path) -> None:
    """In float32 from bfloat16 weights: a bare head is folded without rounding, a folded one keeps its rounding."""
    source = write_checkpoint(tmp_path / "source", tiny_config(dtype="bfloat16", torch_dtype="bfloat16"), seed=8)
    isomorph.convert(source, tmp_path / layout, layout=layout)
    ids = np.random.default_rng(8).integers(0, 96, (1, 40))
    bare = isomorph.load(source, framework="torch", dtype="float32").logits(ids)
    reference = isomorph.load(tmp_path / layout, framework="torch", dtype="float32").logits(ids)
    model = isomorph.load(tmp_path / layout, framework="mlx", dtype="float32")
    allowed = allowed_logit_difference(reference)
    assert np.abs(model.logits(ids) - reference).max() <= allowed
    assert (np.abs(model.logits(ids) - bare).max() > 100 * allowed) == layout.endswith("folded")
    assert isomorph.load(tmp_path / layout, framework="mlx").dtype == "bfloat16"


@pytest.mark.parametrize("change, complaint", [
    ({"rope_table_dtype": "float16"}, "rope_table_dtype"),
    ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
    ({"head_dim": 7}, "head_dim"),
])  # fmt: skip
def test_config_values_it_does_not_have_are_refused(change: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        modeling_mlx.ModelArgs.from_dict(tiny_config() | change)


def test_rope_settings_of_transformers_5_count() -> None:
    plain = {key: value for key, value in tiny_config().items() if key != "rope_theta"}
    args = modeling_mlx.ModelArgs.from_dict(
        plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "num_key_value_heads": 4}
    )
    assert args.rope_theta == 7.0


@pytest.mark.parametrize("layout", ["mlx-lm", "mlx-folded"])
@pytest.mark.parametrize("bits, group_size", [(8, 32), (4, 32), (3, 64)])
def test_what_mlx_lm_quantizes_loads_here(
    folders: dict[str, Path], layout: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    target = tmp_path / "quantized"
    mlx_lm.convert(
        str(folders[layout]),
        mlx_path=str(target),
        quantize=True,
        q_bits=bits,
        q_group_size=group_size,
        trust_remote_code=layout == "mlx-folded",
    )
    model = isomorph.load(target, framework="mlx")
    assert model.dtype == "float32"
    block = model.module.model.blocks[0]
    assert (block.attn.attn_query.bits, block.attn.attn_query.group_size) == (bits, group_size)
    assert hasattr(model.module.lm_head, "bits") == (layout == "mlx-folded")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 30))
    logits = model.logits(ids)
    # Whoever quantized it, the numbers are those of the dequantized weights in another framework.
    isomorph.convert(target, tmp_path / "floats", to="transformers", dequantize=True)
    reference = isomorph.load(tmp_path / "floats", framework="torch", dtype="float32").logits(ids)
    assert np.abs(logits - reference).max() <= allowed_logit_difference(reference)
    original = isomorph.load(folders["source"], framework="mlx").logits(ids)
    assert np.abs(logits - original).max() > allowed_logit_difference(original)
    if layout == "mlx-folded":
        stock, _ = load_with_mlx_lm(target, trust_remote_code=True)
        assert np.array_equal(np.array(stock(mx.array(ids))), logits)


def test_bfloat16_products_of_packed_weights_are_not_the_default_on_a_cpu(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "quantized"
    mlx_lm.convert(
        str(folders["mlx-folded"]),
        mlx_path=str(target),
        quantize=True,
        q_bits=8,
        q_group_size=32,
        dtype="bfloat16",
        trust_remote_code=True,
    )
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, 30))
    with caplog.at_level("INFO", logger="isomorph"):
        model = isomorph.load(target, framework="mlx", device="cpu")
    assert model.dtype == "float32" and "float32" in caplog.text
    assert model.module.model.blocks[0].attn.attn_query.scales.dtype == mx.float32
    # The same codes and scales as plain float32 matrices.
    plain = modeling_mlx.Model(modeling_mlx.ModelArgs.from_dict(json.loads((target / "config.json").read_text())))
    weights = dict(tree_flatten(model.module.parameters()))
    for path, layer in model.module.named_modules():
        if hasattr(layer, "bits"):
            packed = (weights.pop(f"{path}.{part}") for part in ("weight", "scales", "biases"))
            weights[f"{path}.weight"] = mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits)
    plain.load_weights(list(weights.items()), strict=True)
    reference = np.array(plain(mx.array(ids)))
    exact = model.logits(ids)
    asked = isomorph.load(target, framework="mlx", device="cpu", dtype="bfloat16")
    assert asked.dtype == "bfloat16"
    scale = np.sqrt(np.mean(reference**2))
    errors = [np.sqrt(np.mean((logits - reference) ** 2)) / scale for logits in (exact, asked.logits(ids))]
    assert errors[0] < 1e-5 and errors[1] > 1e-2
