"""Serving parity: what a server does (cache, chunks, batches with padding) against the plain full forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from isomorph.evaluate.metrics import rms
from isomorph.verify.certificate import Check
from isomorph.verify.tolerance import MAX_NOISE_RATIO, NOISE_REASON, RULE_REASON, allowed_logit_difference

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

#: Single decode steps taken in each comparison.
STEPS = 16
#: Longest row of a batch: beyond the sliding windows in use (128), and no more, for a batch costs its multiple.
BATCH_TOKENS = 144


@dataclass(frozen=True)
class ServingPair:
    """The same positions computed in two ways by one model: `served [N, V]` and `full [N, V]`."""

    name: str
    served: np.ndarray
    full: np.ndarray


def cached_pair(model: Model, ids: np.ndarray, full: np.ndarray, max_length: int | None = None) -> ServingPair:
    """Prefill, a second chunk, then single steps, against `full [T, V]`, the logits of `ids [T]`.

    `max_length` is the room of the decode state, at least T.
    """
    length = len(ids)
    steps = min(STEPS, length // 2)
    prefill = max(1, (length - steps) * 2 // 3)
    middle = length - steps
    state = model.decode_state(1, max_length=max_length or length)
    parts = [state.feed(ids[None, :prefill])[0]]
    if middle > prefill:
        parts.append(state.feed(ids[None, prefill:middle])[0])
    parts += [state.feed(ids[None, i : i + 1])[0] for i in range(middle, length)]
    return ServingPair("cached = uncached", np.concatenate(parts), full[:length])


def ragged_rows(stream: np.ndarray, width: int) -> list[np.ndarray]:
    """Three rows of different contents, of 7/8, 8/8 and 6/8 of `width` tokens, BATCH_TOKENS at most."""
    lengths = [max(2, min(width, BATCH_TOKENS) * part // 8) for part in (7, 8, 6)]
    starts = [(len(stream) - length) * i // 2 for i, length in enumerate(lengths)]
    return [stream[start : start + length] for start, length in zip(starts, lengths)]


def batched_pairs(model: Model, stream: np.ndarray, width: int) -> list[ServingPair]:
    """A left-padded ragged batch, in one pass and through the decode state, against each row by itself."""
    rows = ragged_rows(stream, width)
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for row, values in enumerate(rows):
        padded[row, longest - len(values) :], mask[row, longest - len(values) :] = values, 1
    single = np.concatenate([model.logits(row[None])[0] for row in rows])
    together = model.logits(padded, mask)
    one_pass = np.concatenate([together[row, longest - n :] for row, n in enumerate(lengths)])

    # Every row keeps a token for the prefill, so that all take single steps, each at a position of its own.
    steps = min(STEPS, min(lengths) - 1)
    cut = longest - steps
    state = model.decode_state(len(rows), left_padding=[longest - n for n in lengths], max_length=longest)
    pieces = [state.feed(padded[:, :cut]), *(state.feed(padded[:, i : i + 1]) for i in range(cut, longest))]
    whole = np.concatenate(pieces, axis=1)
    decoded = np.concatenate([whole[row, longest - n :] for row, n in enumerate(lengths)])
    return [
        ServingPair("batch = single", one_pass, single),
        ServingPair("batch decode = single", decoded, single),
    ]


def serving_checks(pairs: list[ServingPair], dtype: str, floor: float | None) -> list[Check]:
    """Served logits may differ from full ones by the numeric rule in float32, else as two noisy runs differ.

    `floor` is the RMS error of the reference's logits in `dtype`: each of the two runs may have MAX_NOISE_RATIO times
    that, their difference sqrt(2) of it. Without a floor the numeric rule is scaled to the dtype.
    """
    checks = []
    for pair in pairs:
        difference = pair.served.astype(np.float64) - pair.full
        name = f"{pair.name}, {dtype}"
        if dtype != "float32" and floor is not None:
            limit, reason = 2**0.5 * MAX_NOISE_RATIO * floor, f"RMS; two runs, each {NOISE_REASON}"
            measured = rms(difference)
        else:
            limit, reason = allowed_logit_difference(pair.full, dtype), RULE_REASON
            measured = float(np.abs(difference).max()) if difference.size else float("nan")
        checks.append(Check.at_most(name, measured, limit, reason))
    return checks
