"""One level of comparison: candidate and reference in one dtype, both against the reference one precision up."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from isomorph.evaluate.metrics import compare_logits, rms, top_margin
from isomorph.verify.capture import Capture
from isomorph.verify.certificate import FAIL, PASS, WARN, Check, Level, Tap
from isomorph.verify.noise import measure_noise
from isomorph.verify.routing import compare_routing, routing_check
from isomorph.verify.tolerance import (
    CLEAR_REASON,
    CLEAR_TOP1,
    MAX_NOISE_RATIO,
    NOISE_REASON,
    RULE_REASON,
    allowed_logit_difference,
)

#: Positions are reported in so many stretches, so that an error that grows with the position shows.
SEGMENTS = 8


def compare(candidate: Capture, reference: Capture, exact: Capture | None, width: int, judge: str) -> Level:
    """Compare runs over the same rows of `width` tokens; `exact` is the reference one precision up, or None.

    `judge` names the reference: `reference`, or `own weights`, the candidate's files in another framework.

    Raises ValueError when the runs have different shapes or nothing was captured.
    """
    to_reference = compare_logits(reference.logits, candidate.logits)
    to_exact = compare_logits(exact.logits, candidate.logits) if exact else None
    floor = compare_logits(exact.logits, reference.logits) if exact else None
    ratio = None
    if exact is not None:
        summed = candidate.hidden[-1].shape[-1]
        ratio = measure_noise(candidate.logits, reference.logits, exact.logits, candidate.dtype, summed).ratio
    clear_top1 = clear_share = None
    if floor is not None:
        clear = top_margin(reference.logits) > floor.max_abs
        same = reference.logits.argmax(-1) == candidate.logits.argmax(-1)
        clear_share = float(clear.mean())
        clear_top1 = float(same[clear].mean()) if clear.any() else None
    layers = _taps(candidate, reference, exact)
    return Level(
        dtype=candidate.dtype,
        judge=judge,
        exact_dtype=exact.dtype if exact else None,
        logits=to_reference,
        candidate_to_exact=to_exact,
        reference_to_exact=floor,
        noise_ratio=ratio,
        clear_top1=clear_top1,
        clear_share=clear_share,
        layers=layers,
        segments=_segments(candidate, reference, exact, width),
        histogram=_histogram(candidate, reference, exact),
        experts_per_token=candidate.experts_per_token,
        routing=compare_routing(candidate, reference, exact),
        first_wrong_position=_first_wrong_position(candidate, reference, layers, width),
    )


def logit_checks(level: Level) -> list[Check]:
    """The verdicts of one level: finite, the numeric rule in float32, the noise floor, agreement of the most likely."""
    logits, dtype = level.logits, level.dtype
    finite = np.isfinite(logits.max_abs)
    checks = [Check(f"finite, {dtype}", PASS if finite else FAIL, "all finite" if finite else "NaN or infinite logits")]
    if dtype == "float32" or level.noise_ratio is None:
        limit = allowed_logit_difference(logits.reference_max_abs_logit, dtype)
        reason = RULE_REASON if dtype == "float32" else f"{RULE_REASON}, times {dtype}'s unit roundoff over float32's"
        checks.append(Check.at_most(f"logits, {dtype}: largest difference", logits.max_abs, limit, reason))
    else:
        checks.append(Check.at_most(f"logits, {dtype}: noise ratio", level.noise_ratio, MAX_NOISE_RATIO, NOISE_REASON))
    if dtype != "float32" and level.candidate_to_exact is not None:
        # The candidate may disagree with the exact run as often as the reference itself does, give or take two
        # standard errors of the difference of two such counts.
        own = level.reference_to_exact.top1_agreement
        error = (2 * max(own * (1 - own), 1 / logits.tokens) / logits.tokens) ** 0.5
        checks.append(
            Check.at_least(
                f"top-1, {dtype}: agrees with {level.exact_dtype}",
                level.candidate_to_exact.top1_agreement,
                own - 2 * error,
                f"the reference's own {dtype} agrees {own:.2%}, less two standard errors of the difference",
            )
        )
    if dtype != "float32" and level.clear_top1 is not None:
        name = f"top-1, {dtype}: where the margin exceeds the noise"
        detail = f"{level.clear_share:.1%} of positions"
        checks.append(Check.at_least(name, level.clear_top1, CLEAR_TOP1, CLEAR_REASON, detail))
    worst = max(level.layers, key=lambda tap: tap.ratio if tap.ratio == tap.ratio else np.inf, default=None)
    if worst is not None:
        wrong = level.first_divergence
        # In float32 the numeric rule decides: a slower kind of sum, beyond the floor but within the rule, is no fault.
        faulty = any(tap.diverged and (dtype != "float32" or not tap.max_abs <= tap.rule) for tap in level.layers)
        checks.append(
            Check(
                f"layers, {dtype}: {'noise ratio' if level.exact_dtype else 'share of the limit'}",
                FAIL if faulty else WARN if wrong else PASS,
                worst.ratio,
                MAX_NOISE_RATIO if level.exact_dtype else 1.0,
                NOISE_REASON if level.exact_dtype else RULE_REASON,
                f"first beyond its limit: {wrong}{_from_position(level)}" if wrong else f"largest at {worst.name}",
            )
        )
    if level.experts_per_token:
        checks.append(routing_check(level.routing, dtype))
    return checks


def _from_position(level: Level) -> str:
    """What the first wrong position says: at position 0 a token meets only itself, and no rotation."""
    first = level.first_wrong_position
    if first is None:
        return ""
    if first == 0:
        return ", at every position: norms, matrices, activations, or weights"
    return f", from position {first} on: what positions and tokens before it bring in (rope, windows, masks)"


def _first_wrong_position(candidate: Capture, reference: Capture, layers: list[Tap], width: int) -> int | None:
    """The first position of a row at which the first diverging hidden state is beyond the numeric rule."""
    index = next((index for index, tap in enumerate(layers) if tap.diverged), None)
    if index is None:
        return None
    difference = np.abs(candidate.hidden[index].astype(np.float64) - reference.hidden[index]).max(axis=-1)
    wrong = np.flatnonzero(~(difference <= layers[index].rule)) % width
    return int(wrong.min()) if wrong.size else None


def _taps(candidate: Capture, reference: Capture, exact: Capture | None) -> list[Tap]:
    if len(candidate.hidden) != len(reference.hidden):
        raise ValueError(f"expected {len(reference.hidden)} hidden states, found {len(candidate.hidden)}")
    taps = []
    for index, (ours, theirs) in enumerate(zip(candidate.hidden, reference.hidden)):
        if ours.shape != theirs.shape:
            raise ValueError(f"expected hidden state {index} of shape {theirs.shape}, found {ours.shape}")
        difference = ours.astype(np.float64) - theirs
        size, rule = rms(theirs), allowed_logit_difference(theirs, candidate.dtype)
        if exact is not None:
            noise = measure_noise(ours, theirs, exact.hidden[index], candidate.dtype, summed=ours.shape[-1])
            error, floor, ratio, limit = noise.error, noise.floor, noise.ratio, MAX_NOISE_RATIO
        else:
            # Without an exact run there is only the numeric rule, which a hidden state obeys like logits do.
            error, floor = rms(difference), 0.0
            ratio, limit = float(np.abs(difference).max()) / rule, 1.0
        norm = rms(ours) * size
        cosine = float(np.mean(ours.astype(np.float64) * theirs) / norm) if norm else 1.0
        taps.append(
            Tap(
                name="embedding" if index == 0 else f"block {index - 1}",
                max_abs=float(np.abs(difference).max()),
                relative_rms=rms(difference) / size if size else rms(difference),
                cosine=cosine,
                error=error,
                floor=floor,
                size=size,
                ratio=ratio,
                limit=limit,
                rule=rule,
                diverged=not ratio <= limit,
            )
        )
    return taps


def _segments(candidate: Capture, reference: Capture, exact: Capture | None, width: int) -> list[dict[str, float]]:
    """Top-1 agreement by position in the row: candidate with reference, and both with the exact run."""
    position = np.arange(len(candidate.logits)) % width
    ours, theirs = candidate.logits.argmax(-1), reference.logits.argmax(-1)
    best = exact.logits.argmax(-1) if exact is not None else None
    edges = np.linspace(0, width, min(SEGMENTS, width) + 1).astype(int)
    rows = []
    for low, high in pairwise(edges):
        here = (position >= low) & (position < high)
        row: dict[str, float] = {"from": int(low), "to": int(high), "tokens": int(here.sum())}
        row["top1_agreement"] = float((ours == theirs)[here].mean())
        if best is not None:
            row["candidate_to_exact"] = float((ours == best)[here].mean())
            row["reference_to_exact"] = float((theirs == best)[here].mean())
        rows.append(row)
    return rows


def _histogram(candidate: Capture, reference: Capture, exact: Capture | None) -> dict[str, list[float]]:
    """Counts of |logit difference| in logarithmic bins, for the candidate and for the reference's own noise."""
    base = exact.logits if exact is not None else reference.logits
    runs = {"candidate": np.abs(candidate.logits - base)}
    if exact is not None:
        runs["reference"] = np.abs(reference.logits - base)
    largest = max(float(values.max()) for values in runs.values())
    if not np.isfinite(largest) or largest == 0:
        return {}
    edges = np.logspace(np.log10(largest) - 5, np.log10(largest), 51)
    counts = {name: np.histogram(np.clip(values, edges[0], None), edges)[0] for name, values in runs.items()}
    return {"edges": edges.tolist(), **{name: values.tolist() for name, values in counts.items()}}
