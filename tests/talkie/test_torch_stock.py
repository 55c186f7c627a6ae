"""What `convert` writes for Transformers loads in stock Transformers, where there is no isomorph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import isomorph
from conftest import assert_logits_close
from tiny import tiny_config, write_checkpoint

#: Run with -I: neither the working directory nor PYTHONPATH is on the path, and isomorph cannot be imported.
SCRIPT = """
import json, sys
sys.modules["isomorph"] = None
import numpy as np, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, output = sys.argv[1:]
ids = torch.from_numpy(np.load(f"{folder}/ids.npy"))
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
with torch.no_grad():
    np.savez(
        output,
        logits=model(ids).logits.float(),
        tokens=model.generate(ids, max_new_tokens=8, do_sample=False),
    )
model.save_pretrained(f"{output}.saved")
print(json.dumps({
    "missing": sorted(report["missing_keys"]),
    "unexpected": sorted(report["unexpected_keys"]),
    "dtype": str(model.dtype),
    "module": type(model).__module__,
    "base": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
    "tables": AutoConfig.from_pretrained(folder, trust_remote_code=True).rope_table_dtype,
}))
"""


@pytest.mark.parametrize(("layout", "dtype"), [("transformers", "bfloat16"), ("transformers-folded", "float32")])
def test_converted_folder_loads_in_stock_transformers(tmp_path: Path, layout: str, dtype: str) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_config(dtype=dtype, torch_dtype=dtype), seed=9)
    target = tmp_path / "target"
    isomorph.convert(source, target, to="transformers", layout=layout)
    model = isomorph.load(target)
    ids = np.random.default_rng(9).integers(0, 96, (2, 20))
    np.save(target / "ids.npy", ids)
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(target), str(tmp_path / "found.npz")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {
        "missing": [],
        "unexpected": [],
        "dtype": f"torch.{dtype}",
        "module": report["module"],
        "base": "TalkieModel",
        "tables": "bfloat16",
    }
    assert report["module"].startswith("transformers_modules.")
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["logits"], model.logits(ids))
    state, step, tokens = model.decode_state(2), ids, ids
    for _ in range(8):
        step = state.feed(step, last_only=True)[:, -1].argmax(axis=-1)[:, None]
        tokens = np.concatenate([tokens, step], axis=1)
    np.testing.assert_array_equal(found["tokens"], tokens)
    # What stock Transformers saves again is still a folder of ours.
    np.testing.assert_array_equal(isomorph.load(tmp_path / "found.npz.saved").logits(ids), model.logits(ids))
    if dtype == "float32":
        assert_logits_close(found["logits"], isomorph.load(source).logits(ids))
