"""gpt-oss in torch: every packed layout runs packed, as it lies in its file, and equals the unpacked weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import isomorph
from conftest import assert_logits_close
from isomorph.checkpoint import open_checkpoint
from isomorph.kernels.modules import QuantizedExperts
from tiny_gpt_oss import tiny_config, write_checkpoint

CONFIG = tiny_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("packed"), CONFIG, seed=7)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 24))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray) -> np.ndarray:
    """Logits of Transformers' own experts over the same values."""
    folder = write_checkpoint(tmp_path_factory.mktemp("floats"), CONFIG, seed=7, packed=False)
    return isomorph.load(folder, dtype="float32").logits(ids)


@pytest.mark.parametrize("layout", ["published", "mlx-lm", "mlx-fused"])
def test_packed_layouts_run_packed(
    packed: Path, ids: np.ndarray, unpacked: np.ndarray, tmp_path: Path, layout: str
) -> None:
    isomorph.convert(packed, tmp_path / "model", layout=layout)
    model = isomorph.load(tmp_path / "model", dtype="float32")
    assert_logits_close(model.logits(ids), unpacked)

    experts = [part for part in model.module.modules() if isinstance(part, QuantizedExperts)]
    assert len(experts) == 2
    # gate and up are one product where the file has them in one matrix: nothing is copied to make it two.
    assert {len(part.gate_up) for part in experts} == {2 if layout == "mlx-lm" else 1}
    held = sum(b.nbytes for part in experts for b in part.buffers() if not b.is_floating_point())
    tensors = open_checkpoint(tmp_path / "model").tensors.values()
    assert held == sum(tensor.nbytes for tensor in tensors if tensor.dtype in ("uint32", "uint8"))
    assert not any(parameter.ndim > 2 for parameter in model.module.parameters())

    # One scale of one expert off, and the comparison fails.
    down = experts[1].down_proj
    down.scales = down.scales.clone()
    down.scales[3, 5] += 1
    with pytest.raises(AssertionError):
        assert_logits_close(model.logits(ids), unpacked)


def test_experts_packed_in_part_become_the_models_own(packed: Path, ids: np.ndarray, tmp_path: Path) -> None:
    isomorph.convert(packed, tmp_path / "floats", to="mlx", dequantize=True, dtype="float32")
    recipe = lambda path, role, shape: {"bits": 8} if path.endswith(("gate_proj", "up_proj")) else False
    isomorph.quantize(tmp_path / "floats", tmp_path / "part", group_size=32, recipe=recipe)
    model = isomorph.load(tmp_path / "part", dtype="float32")
    assert not any(isinstance(part, QuantizedExperts) for part in model.module.modules())
    reference = isomorph.load(tmp_path / "part", framework="mlx", dtype="float32").logits(ids)
    assert_logits_close(model.logits(ids), reference)


def test_the_step_is_recorded_and_equals_the_full_pass(packed: Path, ids: np.ndarray) -> None:
    model = isomorph.load(packed, dtype="float32")
    state = model.decode_state(2)
    steps = [state.feed(ids[:, :8]), *(state.feed(ids[:, at : at + 1]) for at in range(8, ids.shape[1]))]
    assert model.steps.recorded(2)
    assert_logits_close(np.concatenate(steps, axis=1), model.logits(ids))


def test_a_recorded_router_rounds_as_the_module(packed: Path) -> None:
    """bfloat16: the product is kept in float32 until the bias is added; rounding it before would show."""
    from isomorph.frameworks.torch_lower import Program
    from isomorph.frameworks.torch_step import Node
    from isomorph.kernels import native

    extension = native.extension()
    if extension is None or not extension.has_wide():
        pytest.skip("without AVX-512's products a router stays torch's")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 64).bfloat16(), torch.randn(8, 64).bfloat16(), torch.randn(8).bfloat16()
    node = Node(torch.ops.aten.addmm.default, (bias, x, weight.T), {}, torch.empty(1, 8, dtype=torch.bfloat16))
    program = Program()
    program.add(node)
    assert not any(callable(part) for part in program._parts)
    for part in program._parts:
        part.run([], [], [], [], 0, 0)
    product = x.double() @ weight.double().T
    once = (product + bias).bfloat16()
    assert not torch.equal(product.bfloat16() + bias, once)
    assert torch.equal(node.result, once)
