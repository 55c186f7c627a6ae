"""One rank of the tensor-parallel check; `torchrun --nproc-per-node 2 tensor_parallel.py FOLDER OUTPUT` runs it."""

from __future__ import annotations

import sys

import numpy as np
import torch

from isomorph.architectures.gelu_gpt.modeling_torch import GeluGPTForCausalLM


def main(folder: str, output: str) -> None:
    model = GeluGPTForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    ids = torch.from_numpy(np.load(f"{folder}/ids.npy"))
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    query = model.model.blocks[0].attn.c_q.weight
    local = [getattr(query, "to_local", lambda: query)().shape[0]]
    # A training step: a rank sees only its heads of the values, the gradients of their embeddings must cover all.
    model(ids, labels=ids).loss.backward()
    gradients = {name: model.get_parameter(f"model.{name}").grad for name in ("value_embeds.0.weight", "x0_lambdas")}
    rank = torch.distributed.get_rank()
    np.savez(f"{output}.{rank}.npz", logits=logits, tokens=tokens, local=local, **gradients)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
