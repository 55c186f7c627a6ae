"""A quantization as lines for people."""

from __future__ import annotations

from collections import defaultdict

from isomorph.checkpoint.target import size
from isomorph.quantize.write import Module, Quantized

#: Names spelt out on one line; the rest are counted.
NAMES_SHOWN = 3


def lines(result: Quantized) -> list[str]:
    """What was (or would be) written, how each kind of matrix is stored, and why some are not quantized."""
    verb = "would write" if result.dry_run else "wrote"
    text = [
        f"{verb} {result.path}: layout {result.layout}, recipe {result.recipe}, {result.parameters:,} parameters, "
        f"{size(result.payload_bytes)} ({result.payload_bytes} bytes), {result.bits_per_weight:.3f} bits per weight"
    ]
    alike: dict[str, list[Module]] = defaultdict(list)
    for module in result.plan:
        alike[_how(module)].append(module)
    for how, modules in alike.items():
        total = size(sum(module.nbytes for module in modules))
        text.append(f"  {how}: {len(modules)} matrices, {total} ({_which(modules)})")
    if result.others:
        kinds = ", ".join(f"{name} {dtype}" for name, dtype in result.others.items())
        text.append(f"  as they are: {kinds}")
    if result.dry_run and result.requantized:
        text.append(
            "  some lies on a grid that these settings cannot hold: add --requantize, or take --recipe lossless"
        )
    if result.loss is not None:
        loss = result.loss
        against = "the quantized source" if result.requantized else "the source"
        text.append(
            f"  relative RMS error against {against}: mean {loss.mean_relative_rms:.4f} over {loss.matrices} matrices, "
            f"largest {loss.max_relative_rms:.4f} ({loss.worst})"
        )
    return text


def _how(module: Module) -> str:
    if module.bits is None:
        return f"not quantized, {module.reason}"
    how = f"{module.bits}-bit {module.mode}, groups of {module.group_size}"
    return f"{how}, exactly what they were ({module.grid})" if module.exact else how


def _which(modules: list[Module]) -> str:
    """Roles when all have one, names otherwise."""
    roles = list(dict.fromkeys(module.role for module in modules))
    if len(modules) > NAMES_SHOWN and None not in roles:
        return ", ".join(str(role) for role in roles)
    shown = ", ".join(module.path for module in modules[:NAMES_SHOWN])
    return shown + (f" and {len(modules) - NAMES_SHOWN} more" if len(modules) > NAMES_SHOWN else "")
