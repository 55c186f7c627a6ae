"""Architectures that stock libraries have: do Transformers and mlx-lm read the same folder?"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from isomorph.checkpoint.source import Checkpoint
from isomorph.errors import InputError
from isomorph.port.declared import declared_dtype, promised
from isomorph.quantize.experts import REARRANGED, STACKED

logger = logging.getLogger(__name__)

FORMATS = {"transformers": "pt", "mlx": "mlx"}

#: model_types whose weights mlx-lm (0.32) adds to or multiplies: the names are Transformers', the numbers are not.
CHANGED = frozenset(["falcon_h1", "qwen3_5", "qwen3_5_moe", "qwen3_next", "step3p5"])


def shared_layout(checkpoint: Checkpoint, to: str) -> str:
    """The safetensors format (`pt` or `mlx`) under which a plain copy of the checkpoint loads in `to`.

    mlx-lm renames a Transformers checkpoint as it loads it, so such a copy stays one; the other way round there is no
    such help, and only a folder that Transformers can name in full is a copy. Raises InputError otherwise.
    """
    own = checkpoint.metadata.get("format", "pt")
    model_type = str((checkpoint.config or {}).get("model_type"))
    if checkpoint.packing is not None and checkpoint.quantization is not None:
        # mlx-lm stacks and turns floats only, so where it would do that the quantizer does.
        if to == "mlx" and mlx_lm_has(model_type) and model_type not in STACKED | REARRANGED | CHANGED:
            return "mlx"
        raise InputError(
            f"expected weights that {to} can hold as {checkpoint.packing} has them; found a {model_type}; "
            "run isomorph quantize --recipe lossless for MLX, or add --dequantize"
        )
    if own == FORMATS[to]:
        return own
    if checkpoint.quantization is not None or "quantization_config" in (checkpoint.config or {}):
        raise InputError(
            f"expected unquantized weights to copy for {to}; found a quantized {model_type}; convert its source"
        )
    if to == "mlx":
        # Where mlx-lm is not installed, Transformers' word must do.
        if not (mlx_lm_has(model_type) if find_spec("mlx_lm") else transformers_has(model_type)):
            raise InputError(
                f"expected an architecture that mlx-lm or isomorph has; found {model_type!r}; port it first"
            )
        return own
    difference = _difference(checkpoint)
    if difference is not None or model_type in CHANGED:
        raise InputError(
            f"expected the tensors of Transformers' {model_type}; found that {checkpoint.path} "
            f"{difference or 'has what mlx-lm made of them'}; start from the Transformers checkpoint"
        )
    return "pt"


def mlx_lm_has(model_type: str) -> bool:
    """Whether the installed mlx-lm has a model of that type; by its files, as importing it takes seconds."""
    folder = _folder("mlx_lm")
    if folder is None:
        return False

    def there(name: str | None) -> bool:
        return name is not None and name.isidentifier() and (folder / "models" / f"{name}.py").is_file()

    return there(model_type) or there(_renamed_by_mlx_lm(folder / "utils.py").get(model_type))


def _renamed_by_mlx_lm(utils: Path) -> dict[str, str]:
    """`MODEL_REMAPPING` of mlx_lm.utils: model types that share another one's model."""
    for node in ast.parse(utils.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            return ast.literal_eval(node.value)
    return {}


def transformers_has(model_type: str) -> bool:
    """Whether the installed Transformers has a model of that type; by its files, as importing it takes seconds."""
    folder = _folder("transformers")
    if folder is None:
        return False
    tables = (folder / "models" / "auto" / f"{name}.py" for name in ("auto_mappings", "configuration_auto"))
    entry = re.compile(rf'"{re.escape(model_type)}"[,:=]\s*"\w+Config"')
    return any(entry.search(table.read_text(encoding="utf-8")) for table in tables if table.is_file())


def _folder(package: str) -> Path | None:
    """Where an installed package lies; None when it is not installed."""
    found = find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent


def skeleton(config: Mapping[str, Any]) -> Any:
    """Transformers' causal language model of a parsed config.json, without memory for its weights.

    Raises InputError when Transformers has no such model or torch is missing.
    """
    values = dict(config)
    model_type = str(values.pop("model_type", None))
    if not transformers_has(model_type):
        raise InputError(
            f"expected an architecture that isomorph or Transformers has; found {model_type!r}; port it first"
        )
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    except ModuleNotFoundError as error:
        raise InputError(f"this needs the package {error.name!r}; run: pip install 'isomorph[torch]'") from None
    except Exception as error:  # over impossible values Transformers raises nearly everything there is
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"expected an architecture that Transformers has; found {model_type!r}: {detail}; correct config.json"
        ) from None


def declared(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, which holds no weights, with the tensors that Transformers' model of its config has."""
    model = skeleton(checkpoint.config or {})
    dtype = declared_dtype(checkpoint.config or {}) or "float32"
    if "quantization" in (checkpoint.config or {}) or "quantization_config" in (checkpoint.config or {}):
        logger.warning("%s is quantized, its weights are not here: sizes are those of %s", checkpoint.path.name, dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    return replace(checkpoint, tensors={n: promised(n, shape, dtype, checkpoint) for n, shape in shapes.items()})


def _difference(checkpoint: Checkpoint) -> str | None:
    """What the checkpoint lacks, or has beside or unlike Transformers' model of its config; None when they agree."""
    model = skeleton(checkpoint.config or {})
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for name in sorted(wanted.keys() - found.keys() - tied):
        return f"lacks {name!r}"
    for name in sorted(found.keys() - wanted.keys()):
        return f"has {name!r}"
    for name in sorted(name for name, shape in found.items() if shape != wanted[name]):
        return f"has {name!r} of shape {list(found[name])}, not {list(wanted[name])}"
    return None
