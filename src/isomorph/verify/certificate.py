"""What `verify` returns: named checks, each with what was measured, what was allowed and why so much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from isomorph.records import to_json

PASS, FAIL, WARN, SKIP = "pass", "fail", "warn", "skip"


@dataclass(frozen=True)
class Check:
    """One question with its answer.

    `status` is pass, fail, warn (worth reading, does not decide) or skip (could not be asked; `detail` says why).
    `limit_reason` says where `limit` comes from.
    """

    name: str
    status: str
    measured: float | int | str | None = None
    limit: float | int | str | None = None
    limit_reason: str = ""
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, measured: float, limit: float, reason: str, detail: str = "") -> Check:
        """Passes when `measured <= limit`; not a number never does."""
        return cls(name, PASS if measured <= limit else FAIL, measured, limit, reason, detail)

    @classmethod
    def at_least(cls, name: str, measured: float, limit: float, reason: str, detail: str = "") -> Check:
        """Passes when `measured >= limit`; not a number never does."""
        return cls(name, PASS if measured >= limit else FAIL, measured, limit, reason, detail)


@dataclass(frozen=True)
class Tap:
    """One hidden state compared: RMS errors against the exact run, their ratio, and the candidate's plain distance.

    `error` and `floor` are the candidate's and the reference's RMS error, `size` the RMS of the values themselves.
    `diverged` says that the ratio is beyond `limit`; `rule` is what the numeric rule allows of `max_abs`.
    Without an exact run `error` is the distance to the reference and `ratio` the share of the numeric rule's limit.
    """

    name: str
    max_abs: float
    relative_rms: float
    cosine: float
    error: float
    floor: float
    size: float
    ratio: float
    limit: float
    rule: float
    diverged: bool


@dataclass
class Level:
    """Candidate against its judge, both computing in `dtype`, and what the judge computed one precision up.

    `judge` is `reference`, or `own weights`: the candidate's files in another framework.
    `logits` are candidate against reference in the same dtype; `candidate_to_exact` and `reference_to_exact` measure
    both against the exact run (None where there is none). `clear_top1` is the agreement of the most likely token where
    its margin exceeds the largest error of a logit of the reference, at the share `clear_share` of positions. `routing`
    has an entry for each layer with experts. `first_wrong_position`, in a row, is that of the first diverging state.
    """

    dtype: str
    judge: str
    exact_dtype: str | None
    logits: Any
    candidate_to_exact: Any
    reference_to_exact: Any
    noise_ratio: float | None
    clear_top1: float | None = None
    clear_share: float | None = None
    layers: list[Tap] = field(default_factory=list)
    segments: list[dict[str, float]] = field(default_factory=list)
    histogram: dict[str, list[float]] = field(default_factory=dict)
    experts_per_token: int = 0
    routing: list[Any] = field(default_factory=list)
    first_wrong_position: int | None = None

    @property
    def floor(self) -> Any:
        """The reference's own error against the exact run, or None."""
        return self.reference_to_exact

    @property
    def first_divergence(self) -> str | None:
        """Name of the first hidden state beyond its limit."""
        return next((tap.name for tap in self.layers if tap.diverged), None)


@dataclass(repr=False)
class Certificate:
    """The verdict. Truthy when it passes: no check failed and at least one comparison of logits was made."""

    reference: dict[str, Any]
    candidate: dict[str, Any]
    prompt: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    logits: dict[str, Any] = field(default_factory=dict)
    greedy: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        statuses = {check.status for check in self.checks}
        compared = any(check.status == PASS and check.name.startswith("logits") for check in self.checks)
        return compared and FAIL not in statuses

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        failed = "; ".join(f"{check.name}: {check.measured} {check.detail}".strip() for check in self.failures)
        return f"<Certificate: passed, {len(self.checks)} checks>" if self else f"<Certificate: failed: {failed}>"

    @property
    def noise_ratio(self) -> float | None:
        """Error of the candidate's logits over the reference's own, in the dtype the candidate runs in."""
        return self.levels[0].noise_ratio if self.levels else None

    @property
    def first_divergence(self) -> str | None:
        """Of a failed comparison: the first hidden state beyond its limit, at the finest precision; else `logits`."""
        if self.passed:
            return None
        for level in reversed(self.levels):
            if level.first_divergence:
                return level.first_divergence
        wrong = any(check.status == FAIL and check.name.startswith("logits") for check in self.checks)
        return "logits" if wrong else None

    @property
    def routing(self) -> dict[str, Any] | None:
        """Of a mixture of experts, at the finest precision: share of tokens sent alike, and margins; else None."""
        level = next((level for level in reversed(self.levels) if level.routing), None)
        if level is None:
            return None
        layers = level.routing
        return {
            "dtype": level.dtype,
            "agreement": sum(layer.agreement for layer in layers) / len(layers),
            "smallest_margin": min(layer.smallest_margin for layer in layers),
            "median_margin": min(layer.median_margin for layer in layers),
            "widest_flip": max(layer.widest_flip for layer in layers),
        }

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAIL]

    @property
    def warnings(self) -> list[Check]:
        return [check for check in self.checks if check.status == WARN]

    def to_json(self) -> dict[str, Any]:
        """The document of `verify --json`; numbers that are not finite become null."""
        verdict = {
            "passed": self.passed,
            "logits": self.logits,
            "noise_ratio": self.noise_ratio,
            "first_divergence": self.first_divergence,
            "routing": self.routing,
        }
        rest = {name: value for name, value in vars(self).items() if name not in verdict}
        return to_json({**verdict, **rest})
