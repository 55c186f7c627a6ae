"""Tensor by tensor: did the stored weights survive the port, or only as much of them as the bits allow?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.verify.certificate import FAIL, PASS, Check
from isomorph.verify.side import Side

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint, Tensor

#: Names spelt out in a failing check; the rest are counted.
NAMES_SHOWN = 3


@dataclass
class WeightComparison:
    """Counts of tensors by what became of them, and the names of those that are wrong.

    `rounded_by_design` says that the candidate holds the reference's weights in a lower precision, so that in float32
    the two are different functions although nothing is wrong: rounded tensors, or a product of tensors that is stored
    rounded on one side only (a folded head).
    """

    identical: int = 0
    rounded: int = 0
    quantized: int = 0
    wrong: list[str] = field(default_factory=list)
    worst_quantized: tuple[float, float, str] = (0.0, 1.0, "")
    rounded_by_design: bool = False

    @property
    def lossless(self) -> bool:
        """Every tensor has the reference's values, packed or not."""
        return bool(self.identical or self.quantized) and not (
            self.wrong or self.rounded or self.worst_quantized[0] != 0
        )

    def checks(self) -> list[Check]:
        """One verdict on stored tensors, and one on quantized ones where there are any."""
        total = self.identical + self.rounded + self.quantized + len(self.wrong)
        kinds = {"bit-identical": self.identical, "rounded once": self.rounded, "quantized": self.quantized}
        measured = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        shown = ", ".join(self.wrong[:NAMES_SHOWN]) + (", ..." if len(self.wrong) > NAMES_SHOWN else "")
        checks = [
            Check(
                "weights",
                FAIL if self.wrong or not total else PASS,
                f"{measured} of {total}" if total else "none compared",
                "all",
                "the reference's tensors in the candidate's layout and dtype",
                f"{len(self.wrong)} differ: {shown}" if self.wrong else "",
            )
        ]
        if self.quantized:
            error, limit, name = self.worst_quantized
            reason = "sqrt(group_size / 2) / (2^bits - 1): half a step of a min-max grid"
            checks.append(Check.at_most("weights: relative error of quantization", error, limit, reason, name))
        return checks


def compare_weights(reference: Side, candidate: Side) -> WeightComparison | None:
    """Map the reference's tensors to the candidate's layout and compare; None where the two are not files of ours.

    One tensor of each side is in memory at a time.
    """
    from isomorph import architectures
    from isomorph.port import mapped, read

    theirs, ours = reference.checkpoint, candidate.checkpoint
    if theirs is None or ours is None or not theirs.tensors or not ours.tensors:
        return None
    architecture = architectures.find(ours)
    if architecture is None or architectures.find(theirs) is not architecture:
        return None
    # Its own layout, or one of the same modules that can say them in floats.
    own, stored = architecture.detect(ours), read(ours, architecture, dequantize=ours.quantization is None)
    fitting = [name for name, entry in architecture.layouts.items() if not entry.never_floats and stored.keeps(entry)]
    layout = own if own in fitting else fitting[0]
    expected = mapped(theirs, architecture, layout)
    result = WeightComparison()
    for wanted, found in zip(expected, mapped(ours, architecture, layout), strict=True):
        _compare(result, wanted, found, _settings(ours, found.name))
    low = {tensor.dtype for tensor in ours.tensors.values()} != {"float32"}
    folded_on_one_side = architecture.layouts[layout].config != architecture.layouts[architecture.detect(theirs)].config
    result.rounded_by_design = not result.wrong and (result.rounded > 0 or (low and folded_on_one_side))
    return result


def relative_error_limit(bits: int, group_size: int) -> float:
    """The largest relative RMS error of rounding to a min-max grid, sqrt(group_size / 2) / (2^bits - 1), at most 1.

    The step is range / (2^bits - 1), an error at most half of it, and a group's energy at least range^2 / 2. Beyond 1
    a tensor of zeros would do as well.
    """
    return min(1.0, float(np.sqrt(group_size / 2)) / (2**bits - 1))


def _compare(result: WeightComparison, wanted: Tensor, found: Tensor, settings: dict[str, Any] | None) -> None:
    if wanted.name != found.name or wanted.shape != found.shape:
        result.wrong.append(found.name)
        return
    expected, value = np.asarray(wanted.read()), np.asarray(found.read())
    if settings is not None:
        result.quantized += 1
        exact = expected.astype(np.float64)
        norm = float(np.linalg.norm(exact))
        error = float(np.linalg.norm(value.astype(np.float64) - exact)) / norm if norm else 0.0
        limit = relative_error_limit(settings["bits"], settings["group_size"])
        worst, allowed, _ = result.worst_quantized
        if not error / limit <= worst / allowed:
            result.worst_quantized = (error, limit, found.name)
    elif _same_bits(expected, value):
        result.identical += 1
    elif expected.dtype != value.dtype and _same_bits(expected.astype(value.dtype), value):
        result.rounded += 1
    else:
        result.wrong.append(found.name)


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    # NaN equals NaN here: bits are compared. Equal values in a wider dtype also count as the same.
    if left.dtype == right.dtype:
        return left.tobytes() == right.tobytes()
    return bool(np.array_equal(left.astype(np.float64), right.astype(np.float64)))


def _settings(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """Bits and group size of tensor `name`, or None when it is not quantized."""
    module = name.rpartition(".")[0]
    if checkpoint.quantization is None or f"{module}.scales" not in checkpoint.tensors:
        return None
    own = checkpoint.quantization.get(module)
    return {**checkpoint.quantization, **own} if isinstance(own, dict) else checkpoint.quantization
