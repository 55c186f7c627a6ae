"""Modules over packed weights: what a model does with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from isomorph.kernels import native
from isomorph.kernels.modules import QuantizedEmbedding, QuantizedExpertLinear, QuantizedExperts, QuantizedLinear
from isomorph.quantize.settings import Settings
from kernels.packed import activations, make, relative_error


def linear(seed=0, shape=(40, 128), bits=4, bias=None, fast=False):
    case = make(seed, shape, Settings(bits, 64))
    return QuantizedLinear(*case.packed, case.settings, bias=bias, fast=fast), case


def test_casting_leaves_the_format_alone():
    module, case = linear()
    model = nn.Sequential(module, nn.LayerNorm(40)).to(torch.float32).half()
    assert model[1].weight.dtype == torch.float16
    assert module.scales.dtype == torch.bfloat16
    assert torch.equal(module.scales, case.scales)
    x = activations(1, 2, 128, "float32")
    assert relative_error(module(x), x, case.values) <= 1e-6


def test_buffers_move_and_a_tied_head_moves_with_its_embedding():
    case = make(2, (30, 64), Settings(8, 64))
    embedding = QuantizedEmbedding(*case.packed, case.settings)
    model = nn.ModuleList([embedding, embedding.as_linear(), linear()[0]]).to("meta", torch.float16)
    assert all(buffer.is_meta for buffer in model.buffers())
    assert [part.scales.dtype for part in model] == [torch.bfloat16] * 3
    assert model[0].weight is model[1].weight
    assert model[2](torch.empty(2, 3, 128, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 40)
    copied = copy.deepcopy(model)
    assert copied[0].weight is copied[1].weight is not model[0].weight


def test_copies_have_buffers_of_their_own():
    module, case = linear()
    x = activations(1, 2, 128, "float32")
    module(x)
    twin = copy.deepcopy(module)
    module.weight.zero_()
    assert relative_error(twin(x), x, case.values) <= 1e-6
    assert relative_error(module(x), x, case.values) > 1e-6


def test_bias_and_leading_dimensions():
    bias = torch.arange(40.0)
    module, case = linear(bias=bias)
    x = activations(1, 6, 128, "float32").view(2, 3, 128)
    y = module(x)
    assert y.shape == (2, 3, 40)
    assert relative_error((y - bias).view(6, 40), x.view(6, 128), case.values) <= 2e-5
    assert torch.equal(module(x.transpose(0, 1)), y.transpose(0, 1))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_compiled_without_graph_breaks(rows):
    model = nn.Sequential(linear(0, (64, 128))[0], nn.SiLU(), linear(1, (32, 64))[0])
    x = activations(1, rows, 128, "float32")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), rtol=1e-6, atol=1e-6)


def test_operators_pass_torch_opcheck():
    case = make(0, (40, 128), Settings(4, 64))
    x = activations(1, 3, 128, "float32")
    torch.library.opcheck(torch.ops.isomorph.quantized_linear.default, (x, *case.arguments, False))
    ids = torch.tensor([1, 2, 39])
    torch.library.opcheck(
        torch.ops.isomorph.dequantize_rows.default, (*case.packed, ids, *case.arguments[3:], torch.float32)
    )


def test_embedding_and_its_tied_head():
    case = make(2, (30, 64), Settings(8, 64))
    embedding = QuantizedEmbedding(*case.packed, case.settings, dtype=torch.bfloat16, scale=8.0)
    ids = torch.tensor([[0, 29, 3]])
    expected = torch.from_numpy(case.values[ids.numpy()]).float().bfloat16() * torch.tensor(8.0).bfloat16()
    assert torch.equal(embedding(ids), expected)
    head = embedding.as_linear()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    x = activations(0, 2, 64, "float32")
    assert relative_error(head(x), x, case.values) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(tokens):
    shapes = {"gate": (4, 96, 64), "up": (4, 96, 64), "down": (4, 64, 96)}
    cases = {name: make(seed, shape, Settings(4, 32)) for seed, (name, shape) in enumerate(shapes.items())}
    gate, up, down = (QuantizedExpertLinear(*case.packed, case.settings) for case in cases.values())
    experts = QuantizedExperts([gate, up], down, lambda gate, up: torch.nn.functional.silu(gate) * up)
    x = activations(3, tokens, 64, "float32")
    weights, index = torch.softmax(activations(4, tokens, 4, "float32"), -1).topk(2)
    expected = torch.zeros(tokens, 64, dtype=torch.float64)
    for token in range(tokens):
        for weight, expert in zip(weights[token], index[token]):
            gate, up, down = (torch.from_numpy(case.values[expert]) for case in cases.values())
            row = x[token].double()
            expected[token] += weight * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    assert torch.allclose(experts(x, index, weights).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(experts(x, index.flip(1), weights).double(), expected, rtol=1e-5, atol=1e-5)


def test_thread_count_follows_torch():
    if native.extension() is None:
        pytest.skip("the C++ extension is not built (no compiler)")
    assert native.extension().thread_count() >= 1
    case = make(0, (300, 4096), Settings(4, 64))
    x = activations(1, 1, 4096, "bfloat16")
    handle = native.packed_handle(*case.packed, case.settings)
    before = native.extension().thread_count()
    results = []
    for threads in (1, 2, 5):
        native.extension().set_thread_count(threads)
        results.append(native.multiply(handle, x, 300, False))
    native.extension().set_thread_count(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
