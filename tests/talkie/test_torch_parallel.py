"""`base_model_tp_plan`: two processes on gloo give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import assert_logits_close
from isomorph.architectures.talkie.modeling_torch import TalkieForCausalLM
from tiny import tiny_config, write_checkpoint

WORKER = Path(__file__).with_name("tensor_parallel.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """The checkpoint, and what each of two ranks found."""
    pytest.importorskip("accelerate")
    folder = write_checkpoint(tmp_path_factory.mktemp("tp"), tiny_config(), seed=8)
    np.save(folder / "ids.npy", np.random.default_rng(8).integers(0, 96, (2, 16)))
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
    model = TalkieForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    loss = model(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    gradient = model.model.blocks[0].attn.head_gain.head_g.grad
    assert gradient is not None
    for rank in found:
        assert rank["local"].tolist() == [32], "each rank must hold half of the 64 query rows"
        assert_logits_close(rank["logits"], logits.numpy())
        np.testing.assert_array_equal(rank["tokens"], tokens.numpy())
        np.testing.assert_allclose(rank["head_gain_gradient"], gradient.numpy(), rtol=1e-4, atol=1e-6)


def test_gains_of_the_wrong_heads_would_show(ranks: tuple[Path, list[dict[str, np.ndarray]]]) -> None:
    """The negative control: exchanged halves of the head gains, as if each rank took the other's."""
    folder, found = ranks
    model = TalkieForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for block in model.model.blocks:
            block.attn.head_gain.head_g.copy_(block.attn.head_gain.head_g.roll(2))
        logits = model(torch.from_numpy(np.load(folder / "ids.npy"))).logits
    with pytest.raises(AssertionError):
        assert_logits_close(found[0]["logits"], logits.numpy())
