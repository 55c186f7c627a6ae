"""Talkie as a Transformers model: caches, masks, positions, outputs, generation, training, saving."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from conftest import assert_logits_close
from isomorph.architectures.talkie import modeling_torch
from isomorph.architectures.talkie.config import TalkieConfig
from isomorph.architectures.talkie.modeling_torch import TalkieForCausalLM
from tiny import tiny_config, tiny_tensors

LENGTH = 24
PADDING = (0, 3, 7)
IMPLEMENTATIONS = ("sdpa", "eager")


def build(implementation: str = "sdpa", dtype: torch.dtype = torch.float32, **overrides: Any) -> TalkieForCausalLM:
    """The tiny model of one seed, in eval mode."""
    values = tiny_config(**overrides)
    config = modeling_torch.TalkieConfig(**values)
    model = TalkieForCausalLM._from_config(config, attn_implementation=implementation)
    tensors = {name: torch.from_numpy(value) for name, value in tiny_tensors(values, seed=4).items()}
    if config.lm_head_gain_folded:
        tensors["lm_head.weight"] = tensors.pop("lm_head") * tensors.pop("lm_head_gain.w_g")
    model.load_state_dict(tensors)
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def model(request: pytest.FixtureRequest) -> TalkieForCausalLM:
    return build(request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(6).integers(0, 96, (3, LENGTH)))


@pytest.fixture(scope="module")
def expected(ids: torch.Tensor) -> torch.Tensor:
    """Logits [3, LENGTH, V] without cache, mask or positions."""
    with torch.no_grad():
        return build()(ids).logits


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    assert_logits_close(actual.detach().numpy(), reference.detach().numpy())


def left_padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' first tokens behind PADDING, and the mask."""
    rows, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, count in enumerate(PADDING):
        rows[row, count:], mask[row, count:] = ids[row, : LENGTH - count], 1
    return rows, mask


def in_chunks(
    model: TalkieForCausalLM, cache: Any, rows: torch.Tensor, mask: torch.Tensor | None, form: str
) -> torch.Tensor:
    """Prefill, one-token decode, multi-token re-feed; the mask as `[B, kv]` or `[B, q]`."""
    parts = []
    for start, end in ((0, 10), (10, 11), (11, LENGTH)):
        part = None if mask is None else mask[:, (0 if form == "kv" else start) : end]
        parts.append(model(rows[:, start:end], attention_mask=part, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


# The configuration


def test_config_has_the_fields_and_defaults_of_the_framework_free_one() -> None:
    config = modeling_torch.TalkieConfig()
    for field in dataclasses.fields(TalkieConfig):
        assert getattr(config, field.name) == field.default, field.name
    assert config.num_key_value_heads == config.num_attention_heads


def test_saved_config_reads_back_in_both(tmp_path: Path) -> None:
    values = tiny_config(rope_theta=4e7, rope_table_dtype="float32", rms_norm_eps=1e-6)
    modeling_torch.TalkieConfig(**values).save_pretrained(tmp_path)
    again = modeling_torch.TalkieConfig.from_pretrained(tmp_path)
    ours = TalkieConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    for config in (again, ours):
        for name in ("rope_theta", "rope_table_dtype", "rms_norm_eps", "head_dim", "vocab_size"):
            assert getattr(config, name) == values[name], name


def test_rope_dictionary_is_taken_or_refused() -> None:
    config = modeling_torch.TalkieConfig(rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert config.rope_theta == 5.0
    with pytest.raises(ValueError, match="yarn"):
        modeling_torch.TalkieConfig(rope_scaling={"type": "yarn", "factor": 4})


@pytest.mark.parametrize(
    "values",
    [{"num_key_value_heads": 2}, {"rope_table_dtype": "float16"}, {"head_dim": 15}, {"tie_word_embeddings": True}],
)
def test_unsupported_config_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        modeling_torch.TalkieConfig(**values)


# Caches, masks, positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_with_a_cache_is_bit_identical(ids: torch.Tensor, dtype: torch.dtype) -> None:
    for implementation in IMPLEMENTATIONS:
        model = build(implementation, dtype)
        torch.testing.assert_close(
            model(ids, use_cache=True).logits, model(ids, use_cache=False).logits, rtol=0.0, atol=0.0
        )


@pytest.mark.parametrize("form", [None, "kv", "q"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_three_mask_regimes(
    model: TalkieForCausalLM, ids: torch.Tensor, expected: torch.Tensor, kind: str, form: str | None
) -> None:
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    mask = None if form is None else torch.ones_like(ids)
    close(in_chunks(model, cache, ids, mask, form or ""), expected)


@pytest.mark.parametrize("form", ["kv", "q"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padded_rows_equal_rows_alone(
    model: TalkieForCausalLM, ids: torch.Tensor, expected: torch.Tensor, kind: str, form: str
) -> None:
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)
    rows, mask = left_padded(ids)
    cached = in_chunks(model, cache, rows, mask, form)
    for logits in (model(rows, attention_mask=mask).logits, cached):
        for row, count in enumerate(PADDING):
            close(logits[row, count:], expected[row, : LENGTH - count])


@pytest.mark.parametrize("form", ["kv", "q"])
def test_right_padded_rows_continue_as_rows_alone(model: TalkieForCausalLM, ids: torch.Tensor, form: str) -> None:
    """Padding at the right of the prompt becomes a hole in the cache."""
    mask = torch.tensor([[1] * (16 - count) + [0] * count for count in PADDING])
    cache = DynamicCache(config=model.config)
    model(ids[:, :16] * mask, attention_mask=mask, past_key_values=cache)
    new = torch.ones_like(ids[:, 16:])
    whole = torch.cat([mask, new], dim=1) if form == "kv" else new
    logits = model(ids[:, 16:], attention_mask=whole, past_key_values=cache).logits
    for row, count in enumerate(PADDING):
        alone = model(torch.cat([ids[row, : 16 - count], ids[row, 16:]])[None]).logits
        close(logits[row], alone[0, 16 - count :])


def test_a_mask_of_new_tokens_follows_a_reordered_cache(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    """Which cached tokens were padding is read off the cache itself, so beam search and cropping cannot lose it."""
    rows, mask = left_padded(ids)
    cache = DynamicCache(config=model.config)
    model(rows[:, :16], attention_mask=mask[:, :16], past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.crop(-2)
    logits = model(ids[:, 20:], attention_mask=torch.ones(3, 4), past_key_values=cache).logits
    for row, source in enumerate((2, 0, 2)):
        alone = model(torch.cat([ids[source, : 14 - PADDING[source]], ids[row, 20:]])[None]).logits
        close(logits[row], alone[0, -4:])


def test_a_mask_of_another_length_is_refused(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="24 new tokens"):
        model(ids, attention_mask=torch.ones(3, 20))


def test_position_ids_are_honoured(model: TalkieForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> None:
    positions = torch.arange(LENGTH)[None]
    # Attention sees differences of positions only, as long as the tables are not rounded.
    accurate = build(rope_table_dtype="float32")
    close(accurate(ids, position_ids=positions + 8).logits, accurate(ids).logits)
    assert (model(ids, position_ids=positions + 8).logits - expected).abs().max() > 1e-3
    gaps = positions + 3 * (positions >= 12)
    with_gap = model(ids, position_ids=gaps, use_cache=False).logits
    close(model(ids, position_ids=gaps, use_cache=True).logits, with_gap)
    assert (with_gap - expected)[:, 12:].abs().max() > 0.1
    close(with_gap[:, :12], expected[:, :12])


def test_positions_that_restart_are_packed_sequences(
    model: TalkieForCausalLM, ids: torch.Tensor, expected: torch.Tensor
) -> None:
    packed = torch.cat([ids[0, :10], ids[1, :14]])[None]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    close(logits[0, :10], expected[0, :10])
    close(logits[0, 10:], expected[1, :14])


def test_past_max_position_embeddings_the_tables_go_on(ids: torch.Tensor, expected: torch.Tensor) -> None:
    close(build(max_position_embeddings=8)(ids).logits, expected)


def test_inputs_embeds_and_logits_to_keep(model: TalkieForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> None:
    close(model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=2).logits, expected[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([3, 0])).logits, expected[:, [3, 0]])
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


# Outputs


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attentions_come_back_whatever_the_implementation(
    ids: torch.Tensor, implementation: str, dtype: torch.dtype
) -> None:
    model = build(implementation, dtype)
    rows, mask = left_padded(ids)
    out = model(rows, attention_mask=mask, output_attentions=True)
    assert len(out.attentions) == 3
    for weights in out.attentions:
        assert weights.shape == (3, 4, LENGTH, LENGTH)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 4, LENGTH), rtol=0.0, atol=2e-6)
        for row, count in enumerate(PADDING):
            assert not weights[row, :, count:, :count].any(), "padding is attended"
            assert not weights[row, :, count:].triu(1)[..., count:].diagonal(offset=1, dim1=1, dim2=2).any()
    assert model.config._attn_implementation == implementation, "the fallback is for one call only"


def test_attentions_with_a_cache_cover_cached_tokens(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    whole = model(ids, output_attentions=True).attentions
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    part = model(ids[:, 20:], past_key_values=cache, output_attentions=True).attentions
    for all_rows, last_rows in zip(whole, part):
        torch.testing.assert_close(last_rows, all_rows[:, :, 20:], rtol=0.0, atol=1e-5)


def test_hidden_states_run_from_embedding_norm_to_final_norm(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    raw: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: raw.append(output)) for block in model.model.blocks]
    out = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    eps = model.config.rms_norm_eps
    wanted = [modeling_torch.rms_norm(model.model.embed(ids), eps), *raw[:-1], modeling_torch.rms_norm(raw[-1], eps)]
    assert len(out.hidden_states) == 4
    for state, reference in zip(out.hidden_states, wanted):
        torch.testing.assert_close(state, reference, rtol=0.0, atol=0.0)


def test_tuples_on_request(model: TalkieForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> None:
    close(model(ids, return_dict=False)[0], expected)


def test_flex_attention_equals_sdpa(ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Uncompiled here: the same mask and score functions, without a minute of compilation."""
    rows, mask = left_padded(ids)
    model = build("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        close(model(ids).logits, expected)
        logits = in_chunks(model, DynamicCache(config=model.config), rows, mask, "kv")
    for row, count in enumerate(PADDING):
        close(logits[row, count:], expected[row, : LENGTH - count])


@pytest.mark.full
def test_compiled_flex_attention_equals_sdpa(ids: torch.Tensor, expected: torch.Tensor) -> None:
    close(build("flex_attention")(ids).logits, expected)


# Generation


def test_greedy_with_and_without_cache(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    assert torch.equal(with_cache, model.generate(ids, cache_implementation="static", disable_compile=True, **options))


def test_batch_generation_equals_one_by_one(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    rows, mask = left_padded(ids)
    together = model.generate(rows, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, count in enumerate(PADDING):
        alone = model.generate(ids[row : row + 1, : LENGTH - count], max_new_tokens=12, do_sample=False)
        assert torch.equal(together[row, LENGTH:], alone[0, LENGTH - count :])


def sequence_log_probability(model: TalkieForCausalLM, sequence: torch.Tensor, start: int) -> float:
    scores = model(sequence[None]).logits[0, start - 1 : -1].log_softmax(dim=-1)
    return float(scores.gather(1, sequence[start:, None]).sum())


def test_beam_search(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 4}
    found = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(found.sequences, model.generate(ids, use_cache=False, **options))
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    for row in range(3):
        reached = sequence_log_probability(model, found.sequences[row], LENGTH)
        assert reached == pytest.approx(8 * float(found.sequences_scores[row]), abs=1e-3)
        assert reached >= sequence_log_probability(model, greedy[row], LENGTH) - 1e-3


def test_assisted_generation(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    """A draft model that is often wrong: its tokens are cropped from the cache again."""
    draft = build(rope_theta=10.0)
    plain = model.generate(ids[:1], max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=24, do_sample=False, assistant_model=draft), plain)
    lookup = model.generate(ids[:1], max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, plain)


# Transformers 5.23 itself cannot generate with flex attention and a static cache.
@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "dynamic"), ("eager", "static"), ("flex_attention", "dynamic")],
)
def test_generation_returns_attentions_and_hidden_states(ids: torch.Tensor, implementation: str, kind: str) -> None:
    static = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    with torch.compiler.set_stance("force_eager"):
        out = build(implementation).generate(
            ids,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_attentions=True,
            output_hidden_states=True,
            **static,
        )
    slots = [LENGTH + 2] * 3 if static else [LENGTH, LENGTH + 1, LENGTH + 2]
    assert [step[0].shape[-1] for step in out.attentions] == slots
    assert all(len(step) == 4 for step in out.hidden_states)
    plain = build().generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_static_cache_compiles_to_one_graph(ids: torch.Tensor, expected: torch.Tensor, backend: str) -> None:
    """`fullgraph=True` raises at any graph break; the eager backend leaves out only the code generation."""
    torch._dynamo.reset()
    model = build()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    prefill = model(ids[:, :20], past_key_values=cache).logits
    step: Callable[..., Any] = torch.compile(model.forward, fullgraph=True, backend=backend)
    steps = [step(ids[:, at : at + 1], past_key_values=cache).logits for at in range(20, LENGTH)]
    close(torch.cat([prefill, *steps], dim=1), expected)


# Parameters, training, saving


@pytest.mark.parametrize("folded", [False, True])
def test_embeddings_can_be_got_set_and_resized(ids: torch.Tensor, expected: torch.Tensor, folded: bool) -> None:
    model = build(lm_head_gain_folded=folded)
    assert model.get_output_embeddings().weight.shape == (96, 48)
    model.resize_token_embeddings(104, mean_resizing=False)
    assert model.config.vocab_size == 104
    assert model.get_input_embeddings().weight.shape == (104, 48)
    names = dict(model.named_parameters())
    assert names["lm_head.weight" if folded else "lm_head"].shape == (104, 48)
    logits = model(ids).logits
    assert logits.shape[-1] == 104
    close(logits[..., :96], expected)


@torch.enable_grad()
def test_loss_and_gradient_checkpointing(ids: torch.Tensor) -> None:
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = build().train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        out = model(ids, labels=ids)
        shifted = out.logits[:, :-1].reshape(-1, 96)
        reference = torch.nn.functional.cross_entropy(shifted, ids[:, 1:].reshape(-1))
        torch.testing.assert_close(out.loss, reference)
        out.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), f"no gradient reaches {name}"
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, msg=name)


def test_labels_of_minus_100_do_not_count(model: TalkieForCausalLM, ids: torch.Tensor) -> None:
    labels = ids.clone()
    labels[:, :20] = -100
    logits = model(ids).logits[:, 19:-1].reshape(-1, 96)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 20:].reshape(-1))
    torch.testing.assert_close(model(ids, labels=labels).loss, wanted)


@pytest.mark.parametrize("folded", [False, True])
def test_save_and_load_keep_every_bit(ids: torch.Tensor, tmp_path: Path, folded: bool) -> None:
    model = build(lm_head_gain_folded=folded, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again, report = TalkieForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0.0, atol=0.0)


def test_a_fresh_model_starts_near_the_uniform_distribution(ids: torch.Tensor) -> None:
    model = TalkieForCausalLM(modeling_torch.TalkieConfig(**tiny_config()))
    loss = float(model(ids, labels=ids).loss)
    assert abs(loss - np.log(96)) < 0.1
    assert float(model.model.blocks[0].attn.head_gain.head_g.sum()) == 4.0


def test_meta_device(ids: torch.Tensor) -> None:
    """vLLM and accelerate build the model without memory: nothing may be computed at construction."""
    with torch.device("meta"):
        model = TalkieForCausalLM(modeling_torch.TalkieConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 13_280_257_721
    assert not list(model.buffers())
