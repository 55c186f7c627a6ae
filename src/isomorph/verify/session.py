"""The course of one verification: which model runs in which dtype, one in memory at a time, and who judges whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from isomorph.errors import InputError
from isomorph.evaluate.metrics import compare_logits
from isomorph.frameworks.model import Model
from isomorph.verify.capture import Capture
from isomorph.verify.certificate import FAIL, SKIP, WARN, Certificate, Check, Level
from isomorph.verify.compare import compare, logit_checks
from isomorph.verify.environment import environment
from isomorph.verify.greedy import greedy_check, long_run_check, run_shape
from isomorph.verify.parity import serving_checks
from isomorph.verify.prompts import SHORT, Prompt, make_prompt
from isomorph.verify.quantized import backend_check, on_mlx_cpu
from isomorph.verify.runs import Runs
from isomorph.verify.side import Side
from isomorph.verify.tolerance import ONE_UP
from isomorph.verify.weights import compare_weights


@dataclass
class Session:
    """A verification under way.

    Each level of it has a judge, which the candidate must equal in arithmetic: the reference; where the candidate's
    weights differ from the reference's by design (quantized with a loss, rounded), those very weights in the
    reference's framework (torch for quantized ones). Whether the weights are right is then a check of its own.
    """

    reference: Side
    candidate: Side
    tokens: int
    greedy_tokens: int
    seed: int
    say: Callable[[str], None]
    checks: list[Check] = field(default_factory=list)

    @property
    def quantized(self) -> bool:
        return self.candidate.quantization is not None

    def verify(self, text: Any, reference_dtype: str | None, candidate_dtype: str | None) -> Certificate:
        """Run everything, then judge it."""
        model = self.candidate.load(candidate_dtype)
        prompt = make_prompt(model, text, self.tokens, self.seed)
        self._warn_if_short(prompt, model)
        runs = Runs(prompt, self.greedy_tokens, self.say)
        stop, shape, served = _stop_ids(model), _shape(model), model.dtype
        runs.take("candidate", model, serve=True)
        del model
        self.say("weights")
        weights = compare_weights(self.reference, self.candidate)
        if weights is not None:
            self.checks += weights.checks()

        # Faults below the noise of a low precision show in float32, on the very weights the candidate holds.
        lossy = self.quantized and not (weights is not None and weights.lossless)
        judges = {served: "own weights" if lossy else "reference"}
        if served != "float32" and self._can_run(self.candidate, "float32", "comparison in float32"):
            runs.take("candidate", self.candidate.load("float32"), serve=True)
            by_design = lossy or (weights is not None and weights.rounded_by_design)
            judges["float32"] = "own weights" if by_design else "reference"
        for role, side in (("reference", self.reference), ("own weights", self._own_weights())):
            judged = [dtype for dtype, judge in judges.items() if judge == role]
            for dtype, greedy in self._dtypes(side, role, judged, reference_dtype).items():
                model = side.load(dtype)
                if _shape(model) != shape:
                    self.checks.append(_misshapen(_shape(model), shape))
                    return self._certificate(runs, [], {})
                runs.take(role, model, greedy=greedy)
                del model

        levels = [_level(runs, dtype, judge) for dtype, judge in judges.items()]
        if len(levels) > 1 and self.quantized and on_mlx_cpu(self.candidate.framework):
            self.checks.append(backend_check(levels.pop(0)))
        for level in levels:
            self._judge(level, runs)
        computed = levels[0].dtype
        logits = _figures(runs.any("reference", reference_dtype or computed), runs.any("candidate", computed))
        return self._certificate(runs, levels, logits, self._long_run(runs, computed, stop))

    def _own_weights(self) -> Side:
        """The candidate's files in another framework: what it must equal in arithmetic, whatever its weights are."""
        framework = "torch" if self.quantized else self.reference.framework
        return replace(self.candidate, framework=framework, model=None)

    def _dtypes(self, side: Side, role: str, judged: list[str], also: str | None) -> dict[str, bool]:
        """Dtypes in which a side runs to judge those dtypes, each once, and whether its greedy tokens are wanted."""
        wanted: dict[str, bool] = {}
        for dtype in judged:
            reason = side.available(dtype)
            if reason is not None and side.model is None:
                raise InputError(f"expected {role} that can run in {dtype}; found that {reason}")
            wanted[dtype if reason is None or side.model is None else side.model.dtype] = True
        for dtype in judged:
            finer = ONE_UP.get(dtype)
            if finer and self._can_run(side, finer, f"noise floor of {dtype}"):
                wanted.setdefault(finer, False)
        if role == "reference" and (also or not wanted):
            # A quantized candidate is set beside the reference in figures, not judged by it.
            figures = also or ("float32" if side.available("float32") is None else side.stored_dtype)
            if figures and self._can_run(side, figures, f"reference in {figures}"):
                wanted[figures] = True
        return wanted

    def _can_run(self, side: Side, dtype: str, what: str) -> bool:
        reason = side.available(dtype)
        if reason is not None:
            self.checks.append(Check(what, SKIP, detail=reason))
        return reason is None

    def _judge(self, level: Level, runs: Runs) -> None:
        self.checks += logit_checks(level)
        candidate, judge, floor = runs.any("candidate", level.dtype), runs.get(level.judge, level.dtype), level.floor
        self.checks += serving_checks(candidate.serving, level.dtype, floor.rms if floor else None)
        if judge is not None and judge.greedy is not None and candidate.greedy is not None:
            noise = floor.max_abs if floor else level.logits.max_abs
            self.checks.append(greedy_check(judge.greedy, candidate.greedy, level.dtype, noise))

    def _long_run(self, runs: Runs, dtype: str, stop: set[int]) -> dict[str, Any]:
        theirs, ours = runs.any("reference", dtype).greedy, runs.any("candidate", dtype).greedy
        if theirs is None or ours is None:
            return {}
        reference, candidate = run_shape(theirs.token_ids, stop), run_shape(ours.token_ids, stop)
        self.checks.append(long_run_check(reference, candidate))
        return {"reference": asdict(reference), "candidate": asdict(candidate), "token_ids": ours.token_ids}

    def _warn_if_short(self, prompt: Prompt, model: Model) -> None:
        width, expected = prompt.rows.shape[1], min(SHORT, model.max_positions)
        if width < expected:
            reason = "short prompts hide faults of rope and of windows"
            self.checks.append(Check("prompt length", WARN, width, expected, reason))

    def _certificate(
        self, runs: Runs, levels: list[Level], logits: dict[str, Any], greedy: dict[str, Any] | None = None
    ) -> Certificate:
        computed = {role: [dtype for name, dtype in runs.taken if name == role] for role, _ in runs.taken}
        prompt = runs.prompt
        return Certificate(
            reference=self.reference.describe(computed.get("reference", [])),
            candidate=self.candidate.describe(computed["candidate"]),
            prompt={
                "origin": prompt.origin,
                "tokens": prompt.rows.size,
                "rows": prompt.rows.shape[0],
                "row_tokens": prompt.rows.shape[1],
                "seed": prompt.seed,
            },
            checks=self.checks,
            levels=levels,
            logits=logits,
            greedy=greedy or {},
            environment=environment(),
        )


def _level(runs: Runs, dtype: str, judge: str) -> Level:
    candidate, reference = runs.any("candidate", dtype).capture, runs.any(judge, dtype).capture
    finer = runs.get(judge, ONE_UP.get(dtype))
    # A reference that runs in the finer dtype only shows no noise of its own.
    exact = finer.capture if finer is not None and finer.capture is not reference else None
    return compare(candidate, reference, exact, runs.prompt.rows.shape[1], judge)


def _figures(reference: Any, candidate: Any) -> dict[str, Any]:
    """The `logits` entry of the certificate: candidate against reference, each in the dtype named."""
    ours: Capture = candidate.capture
    theirs: Capture = reference.capture
    compared = compare_logits(theirs.logits, ours.logits)
    return {
        **asdict(compared),
        "kl_nats_per_token": compared.kl_nats_per_token,
        "reference_dtype": theirs.dtype,
        "candidate_dtype": ours.dtype,
    }


def _shape(model: Model) -> tuple[int, int]:
    return model.vocab_size, model.num_layers


def _misshapen(reference: tuple[int, int], candidate: tuple[int, int]) -> Check:
    names = ("vocabulary", "layers")
    found = ", ".join(f"{name} {value}" for name, value in zip(names, candidate))
    expected = ", ".join(f"{name} {value}" for name, value in zip(names, reference))
    return Check("logits: same shape", FAIL, found, expected, "the reference's")


def _stop_ids(model: Model) -> set[int]:
    from isomorph.generate import stop_rules

    return set(stop_rules(model).ids)
