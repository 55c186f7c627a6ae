"""What is taken from each model while it is in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from isomorph.verify.capture import Capture, capture
from isomorph.verify.greedy import PROMPT_TOKENS, GreedyTokens, greedy_tokens
from isomorph.verify.parity import ServingPair, batched_pairs, cached_pair
from isomorph.verify.prompts import Prompt

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model


@dataclass
class Run:
    """One model in one dtype: its forward passes, what serving gives instead, its greedy tokens."""

    capture: Capture
    serving: list[ServingPair] = field(default_factory=list)
    greedy: GreedyTokens | None = None


@dataclass
class Runs:
    """Every run of a verification, by role (`candidate`, `reference`, `own weights`) and dtype."""

    prompt: Prompt
    greedy_tokens: int
    say: Callable[[str], None]
    taken: dict[tuple[str, str], Run] = field(default_factory=dict)

    def take(self, role: str, model: Model, serve: bool = False, greedy: bool = True) -> None:
        """Run `model` over the prompt; with `serve` also cached and batched, with `greedy` also token by token."""
        gc.collect()  # the model before this one
        self.say(f"{role}: {model.framework}, {model.dtype}")
        rows, width = self.prompt.rows, self.prompt.rows.shape[1]
        run = Run(capture(model, rows))
        start = min(PROMPT_TOKENS, max(1, width // 2))
        count = min(self.greedy_tokens, model.max_positions - start)
        # One size of decode state for all, because compiled frameworks make a program for each.
        room = max(width, start + count)
        if serve:
            run.serving = [cached_pair(model, rows[0], run.capture.logits[:width], room)]
            run.serving += batched_pairs(model, self.prompt.stream, width)
        if greedy:
            run.greedy = greedy_tokens(model, self.prompt.stream[:start], count, room)
        self.taken[role, model.dtype] = run

    def get(self, role: str, dtype: str | None) -> Run | None:
        """The run of `role` in `dtype`, or None."""
        return self.taken.get((role, dtype or ""))

    def any(self, role: str, dtype: str) -> Run:
        """The run of `role` in `dtype`, else its first run. Raises LookupError when there is none."""
        run = self.get(role, dtype) or next((run for (name, _), run in self.taken.items() if name == role), None)
        if run is None:
            raise LookupError(f"{role} was not run")
        return run
