"""GELU-GPT as a citizen of Transformers: caches with smear's layer, masks, attention implementations, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

import isomorph
from conftest import assert_logits_close
from isomorph.architectures.gelu_gpt.modeling_torch import GeluGPTConfig
from tiny_gelu_gpt import tiny_config, write_checkpoint

LENGTH = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return isomorph.load(write_checkpoint(tmp_path_factory.mktemp("gelu_gpt"), tiny_config(), seed=6)).module  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ids() -> Any:
    return torch.from_numpy(np.random.default_rng(8).integers(0, 120, (2, LENGTH)))


@pytest.fixture(scope="module")
def expected(model: Any, ids: Any) -> np.ndarray:
    return logits(model, ids)


def logits(model: Any, ids: Any, **options: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(ids, **options).logits.numpy()


def cache_of(kind: str, model: Any) -> Cache:
    caches = {
        "made for the config": lambda: DynamicCache(config=model.config),
        "plain": DynamicCache,
        "static": lambda: StaticCache(model.config, max_cache_len=LENGTH + 8),
    }
    return caches[kind]()


def fed(model: Any, cache: Cache, ids: Any, sizes: list[int]) -> np.ndarray:
    parts = [logits(model, part, past_key_values=cache) for part in ids.split(sizes, dim=1)]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("kind", ["made for the config", "plain", "static"])
@pytest.mark.parametrize("sizes", [[150, *[1] * 50], [1, 130, 9, 60], [LENGTH]], ids=["decode", "chunks", "prefill"])
def test_cached_is_uncached(model: Any, ids: Any, expected: np.ndarray, kind: str, sizes: list[int]) -> None:
    assert_logits_close(fed(model, cache_of(kind, model), ids, sizes), expected)


def test_a_cache_keeps_windows_only(model: Any, ids: Any) -> None:
    cache = DynamicCache(config=model.config)
    fed(model, cache, ids.repeat(1, 2), [LENGTH, LENGTH])
    # Short layers look back 128 tokens, the long one 256; the last is smear's.
    assert [layer.keys.shape[2] for layer in cache.layers] == [128, 128, 256, 128]


def test_rows_are_selected_repeated_and_reordered(model: Any, ids: Any, expected: np.ndarray) -> None:
    cache = DynamicCache(config=model.config)
    fed(model, cache, ids[:, :150], [150])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_logits_close(logits(model, ids[:, 150:], past_key_values=cache), expected[:, 150:])


@pytest.mark.parametrize("length", [60, 180])
def test_a_rollback_forgets_smear_too(model: Any, ids: Any, expected: np.ndarray, length: int) -> None:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    fed(model, cache, ids[:, : length - 3], [length - 3])
    cache.crop(0)
    logits(model, ids[:, 20:26], past_key_values=cache)  # six guesses, none of them right
    cache.crop(-6)
    assert_logits_close(logits(model, ids[:, length - 3 :], past_key_values=cache), expected[:, length - 3 :])


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_is_nothing(model: Any, ids: Any, expected: np.ndarray, side: str) -> None:
    # Windows count slots, as in all of Transformers: between tokens padding is nothing within a window only.
    at, prompt, end = {"left": (0, 150, LENGTH), "inside": (70, 90, 115), "right": (90, 90, 115)}[side]
    padded = torch.cat([ids[:, :at], torch.full((2, 5), 17), ids[:, at:prompt]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, at : at + 5] = 0
    cache = DynamicCache(config=model.config)
    first = logits(model, padded, attention_mask=mask, past_key_values=cache)
    assert_logits_close(first[mask.bool().numpy()].reshape(2, prompt, -1), expected[:, :prompt])
    # A mask over the new tokens alone: the cache remembers where padding was.
    again = torch.ones(2, end - prompt, dtype=torch.long)
    rest = logits(model, ids[:, prompt:end], attention_mask=again, past_key_values=cache)
    assert_logits_close(rest, expected[:, prompt:end])


def test_packed_sequences_do_not_see_each_other(model: Any, ids: Any, expected: np.ndarray) -> None:
    packed = torch.cat([ids[:1, :90], ids[1:]], dim=1)
    positions = torch.cat([torch.arange(90), torch.arange(LENGTH)])[None]
    found = logits(model, packed, position_ids=positions, use_cache=False)
    assert_logits_close(found, np.concatenate([expected[:1, :90], expected[1:]], axis=1))
    with pytest.raises(AssertionError):  # negative control: one sequence after all
        assert_logits_close(logits(model, packed, use_cache=False)[:, 90:], expected[1:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.full)])
def test_attention_implementations(model: Any, ids: Any, expected: np.ndarray, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    try:
        with torch.inference_mode():
            found = model(ids, output_attentions=True, output_hidden_states=True)
        assert_logits_close(logits(model, ids), expected)
    finally:
        model.set_attn_implementation("sdpa")
    assert_logits_close(found.logits.numpy(), expected)
    assert len(found.hidden_states) == 4
    assert [tuple(rows.shape) for rows in found.attentions] == [(2, 4, LENGTH, LENGTH)] * 3
    behind = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    for rows, window in zip(found.attentions, model.config.windows):
        assert ((rows > 0) == ((behind >= 0) & (behind <= window))).all()


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate_with_left_padding(model: Any, ids: Any, implementation: str | None) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": implementation, "disable_compile": True}
    alone = model.generate(ids[:1, :140], **options)[:, 140:]
    padded = torch.stack([ids[0, :140], torch.cat([torch.full((9,), 5), ids[1, :131]])])
    mask = torch.ones_like(padded)
    mask[1, :9] = 0
    both = model.generate(padded, attention_mask=mask, **options)[:, 140:]
    assert torch.equal(both[:1], alone)
    assert torch.equal(both[1:], model.generate(ids[1:, :131], **options)[:, 131:])


def test_beams_and_assisted_decoding(model: Any, ids: Any) -> None:
    options = {"max_new_tokens": 12, "do_sample": False}
    beams = [model.generate(ids[:, :140], num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)
    greedy = model.generate(ids[:1, :140], **options)
    assert torch.equal(model.generate(ids[:1, :140], prompt_lookup_num_tokens=4, **options), greedy)


def test_gradients_with_and_without_checkpointing(model: Any, ids: Any) -> None:
    found = []
    for checkpointing in (False, True):
        copy = type(model)(model.config)
        copy.load_state_dict(model.state_dict())
        copy.train()
        if checkpointing:
            copy.gradient_checkpointing_enable()
        copy(ids[:, :140], labels=ids[:, :140], use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in copy.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


@pytest.mark.full
def test_static_cache_compiles_to_one_graph(tmp_path: Path, ids: Any) -> None:
    """`fullgraph=True` raises at any graph break; the eager backend leaves out only the code generation."""
    torch._dynamo.reset()
    module: Any = isomorph.load(write_checkpoint(tmp_path, tiny_config(n_layer=2), seed=6)).module  # type: ignore[attr-defined]
    cache = StaticCache(module.config, max_cache_len=40)
    parts = [logits(module, ids[:, :20], past_key_values=cache)]
    step: Any = torch.compile(module.forward, fullgraph=True, backend="eager")
    with torch.inference_mode():
        parts += [step(ids[:, at : at + 1], past_key_values=cache).logits.numpy() for at in range(20, 30)]
    assert_logits_close(np.concatenate(parts, axis=1), logits(module, ids[:, :30]))


def test_uncompiled_flex_attention(model: Any, ids: Any, expected: np.ndarray) -> None:
    """The same mask and score functions as compiled, without a minute of compilation."""
    model.set_attn_implementation("flex_attention")
    try:
        with torch.compiler.set_stance("force_eager"):
            assert_logits_close(logits(model, ids), expected)
            assert_logits_close(fed(model, DynamicCache(config=model.config), ids, [150, 1, 49]), expected)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.full
def test_compiled_generation_with_a_static_cache(tmp_path: Path, ids: Any) -> None:
    """`generate` compiles by itself on accelerators only; here it is told to. The window is crossed on the way."""
    model: Any = isomorph.load(write_checkpoint(tmp_path, tiny_config(n_layer=2), seed=6)).module  # type: ignore[attr-defined]
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids[:, :120], **options)
    compiling = CompileConfig(backend="inductor", mode="default", fullgraph=True)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = model.generate(ids[:, :120], cache_implementation="static", compile_config=compiling, **options)
    assert torch.equal(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_stock_transformers_loads_what_convert_writes(model: Any, ids: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write_checkpoint(tmp_path / "source", tiny_config(), seed=6)
    isomorph.convert(source, tmp_path / "model", to="transformers")
    assert (tmp_path / "model" / "generation_config.json").is_file()
    stock, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values())
    np.testing.assert_array_equal(logits(stock, ids), logits(model, ids))
    sampled = stock.generate(ids, do_sample=True, temperature=0.8, top_p=0.9, use_cache=True, max_new_tokens=2)
    assert sampled.shape == (2, LENGTH + 2)
    stock.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))


def test_unsupported_values_are_refused() -> None:
    for values in ({"mlp": "silu"}, {"rope_table_dtype": "float16"}, {"window_pattern": "SX"}):
        with pytest.raises(ValueError, match=next(iter(values))):
            GeluGPTConfig(**values)
