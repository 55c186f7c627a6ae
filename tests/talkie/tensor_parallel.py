"""One rank of the tensor-parallel check; `torchrun --nproc-per-node 2 tensor_parallel.py FOLDER OUTPUT` runs it."""

from __future__ import annotations

import sys

import numpy as np
import torch

from isomorph.architectures.talkie.modeling_torch import TalkieForCausalLM


def main(folder: str, output: str) -> None:
    model = TalkieForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    ids = torch.from_numpy(np.load(f"{folder}/ids.npy"))
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    attention = model.model.blocks[0].attn
    local = [getattr(attention.attn_query.weight, "to_local", lambda: attention.attn_query.weight)().shape[0]]
    # A training step: the gains see only this rank's heads, their gradients must cover all.
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradient = attention.head_gain.head_g.grad
    rank = torch.distributed.get_rank()
    np.savez(f"{output}.{rank}.npz", logits=logits, tokens=tokens, local=local, head_gain_gradient=gradient)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
