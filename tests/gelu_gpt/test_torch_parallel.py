"""`base_model_tp_plan`: two processes on gloo give what one gives, value embeddings and gates included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import assert_logits_close
from isomorph.architectures.gelu_gpt.modeling_torch import GeluGPTForCausalLM
from tiny_gelu_gpt import tiny_config, write_checkpoint

pytestmark = pytest.mark.full

#: Of parameters that every rank has whole.
GRADIENTS = ("value_embeds.0.weight", "x0_lambdas")

WORKER = Path(__file__).with_name("tensor_parallel.py")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """The checkpoint, and what each of two ranks found: two query heads and one of keys and values in each."""
    pytest.importorskip("accelerate")
    folder = write_checkpoint(tmp_path_factory.mktemp("tp"), tiny_config(tie_embeddings=request.param), seed=8)
    np.save(folder / "ids.npy", np.random.default_rng(8).integers(0, 120, (2, 150)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), str(folder / "rank")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, [dict(np.load(folder / f"rank.{rank}.npz")) for rank in range(2)]


def test_two_ranks_equal_one_process(ranks: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    folder, found = ranks
    model = GeluGPTForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    for rank in found:
        assert rank["local"].tolist() == [24], "each rank must hold half of the 48 query rows"
        assert_logits_close(rank["logits"], logits.numpy())
        np.testing.assert_array_equal(rank["tokens"], tokens.numpy())
        for name in GRADIENTS:
            wanted = model.get_parameter(f"model.{name}").grad
            assert wanted is not None
            np.testing.assert_allclose(rank[name], wanted.numpy(), rtol=1e-4, atol=1e-6)


def test_value_embeddings_of_the_wrong_heads_would_show(ranks: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    """The negative control: exchanged halves of the value embeddings, as if each rank took the other's."""
    folder, found = ranks
    model = GeluGPTForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for embedding in model.model.value_embeds.parameters():
            embedding.copy_(embedding.roll(embedding.shape[1] // 2, dims=1))
        logits = model(torch.from_numpy(np.load(folder / "ids.npy"))).logits
    with pytest.raises(AssertionError):
        assert_logits_close(found[0]["logits"], logits.numpy())
