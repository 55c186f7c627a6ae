"""What stock mlx-lm makes of folders, in a process of its own: mlx and torch would both take the cores.

Usage: python mlx_convert.py JOBS.json: a list of {source, target, bits, group_size, mode, recipe}. Beside each target,
`target.safetensors` has its quantized matrices as mlx dequantizes them, float32.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import convert, utils


def eight_bits_in_block_one(path, module):
    """Overrides a module: block 1 in 8 bits, the embedding as it is, the rest like the defaults."""
    if "embed" in path or "wte" in path:
        return False
    return {"bits": 8, "group_size": 32} if ".1." in path else True


def dequantized(folder):
    config = json.loads((folder / "config.json").read_text())["quantization"]
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= mx.load(str(file))
    values = {}
    for name in tensors:
        path = name.removesuffix(".scales")
        if path == name:
            continue
        own = config.get(path)
        settings = own if isinstance(own, dict) else config
        settings = {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}
        parts = (tensors[f"{path}.{part}"] for part in ("weight", "scales"))
        values[path] = mx.dequantize(*parts, tensors.get(f"{path}.biases"), **settings).astype(mx.float32)
    return values


def gpt_oss(source, target):
    """mlx-lm's own gpt-oss over random weights, experts in MXFP4: converting an unquantized one it cannot."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.gpt_oss import Model, ModelArgs

    config = json.loads((source / "config.json").read_text())
    model = Model(ModelArgs.from_dict(config))
    mx.random.seed(0)
    model.load_weights(
        [(name, 0.15 * mx.random.normal(value.shape)) for name, value in tree_flatten(model.parameters())]
    )
    experts = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    config["quantization"] = {"group_size": 32, "bits": 8, "mode": "affine"}

    def settings(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        if ".experts." in path:
            config["quantization"][path] = experts
        return experts if ".experts." in path else True

    nn.quantize(model, 32, 8, class_predicate=settings)
    target.mkdir()
    utils.save_model(target, model)
    utils.save_config(config, config_path=target / "config.json")


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        source, target = Path(job["source"]), Path(job["target"])
        if json.loads((source / "config.json").read_text())["model_type"] == "gpt_oss":
            gpt_oss(source, target)
        else:
            recipe = eight_bits_in_block_one if job["recipe"] == "overrides" else job["recipe"]
            convert(
                str(source),
                str(target),
                quantize=True,
                q_bits=job["bits"],
                q_group_size=job["group_size"],
                q_mode=job["mode"],
                dtype="float32",
                quant_predicate=recipe,
            )
        mx.save_safetensors(str(target) + ".safetensors", dequantized(target))
