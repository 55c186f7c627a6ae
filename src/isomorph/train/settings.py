"""How to train, checked."""

from __future__ import annotations

from dataclasses import dataclass

from isomorph.errors import InputError


@dataclass(frozen=True)
class Settings:
    """How to train. `learning_rate` is the peak; `warmup_steps` lead to it, a cosine leads away from it.

    `peak_flops` is what all devices can do a second, for MFU; None measures it. `accumulate` parts of a batch are
    computed one after the other; with `remat` the backward pass computes the inside of blocks again. Parameters whose
    name matches the pattern `mxfp4` are seen by the model rounded to that format.
    """

    steps: int
    batch_size: int = 8
    sequence_length: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    accumulate: int = 1
    dtype: str = "float32"
    remat: bool = False
    mxfp4: str | None = None
    peak_flops: float | None = None
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 250
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        counts = "steps batch_size sequence_length accumulate log_every evaluate_every checkpoint_every"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1; found {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"expected batch_size to be a multiple of accumulate; found {self.batch_size} and {self.accumulate}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"expected dtype float32 or bfloat16; found {self.dtype!r}")
