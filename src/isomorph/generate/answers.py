"""The two ways to ask: all at once (`generate`, also for batches) and piece by piece (`stream`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from isomorph.errors import InputError
from isomorph.frameworks.model import Model
from isomorph.generate.channels import ChannelText, has_channels
from isomorph.generate.engine import Generation, Row, decode, new_state, room
from isomorph.generate.options import Options
from isomorph.generate.prompts import read_prompts
from isomorph.generate.sampling import samplers
from isomorph.generate.stopping import stop_rules
from isomorph.generate.text import AnswerText


def generate(model: Model, prompt: Any, **options: Any) -> Generation | list[Generation]:
    """Continue `prompt`: text, ids [T] or messages -> Generation; ids [B, T] or a list of prompts -> a list of them.

    Options, with their defaults:

    - `max_tokens=256`: the most new tokens; fewer where the context (`model.max_positions`) ends first.
    - `temperature=0.0` (greedy), `top_p=1.0`, `top_k=0`, `min_p=0.0`, `repetition_penalty=1.0`: see `sampling`.
    - `seed=None`: with a seed the same prompt gives the same tokens, in any framework, alone or in a batch.
    - `stop=None`: a string or strings that end the text, themselves left out. Tokens that end it: see `stop_rules`.
    - `max_kv_size=None`: a bound on prompt and answer together, hence on the decode state; the answer ends there with
      finish_reason `length`, and a prompt that leaves no room is refused.
    - `show_analysis=False`: of an answer in channels (gpt-oss) stream what the model thinks, too.
    - `chat_template=None`: values for the chat template of messages, such as `{"reasoning_effort": "high"}`.

    Rows of a batch may differ in length; each gets what it would get alone. Raises InputError.
    """
    chosen = Options.of(options)
    prompts, batched = read_prompts(model, prompt, chosen.chat_template)
    rows = make_rows(model, prompts, chosen)
    for _ in decode(rows, new_state(model, rows)):
        pass
    results = [row.result() for row in rows]
    return results if batched else results[0]


def stream(model: Model, prompt: Any, **options: Any) -> TextStream:
    """Like `generate` for one prompt, but an iterator over pieces of text; its `result` is the Generation at the end.

    A piece never ends in half a character, nor in what may be the beginning of a stop string or a chat marker.
    """
    chosen = Options.of(options)
    prompts, batched = read_prompts(model, prompt, chosen.chat_template)
    if batched:
        raise InputError("expected one prompt to stream; found a list; use generate for a batch")
    if model.tokenizer is None:
        raise InputError("expected a tokenizer to stream text; the model has none; use generate, whose result has ids")
    (row,) = make_rows(model, prompts, chosen)
    return TextStream(row, decode([row], new_state(model, [row])))


def make_rows(model: Model, prompts: Sequence[np.ndarray], options: Options) -> list[Row]:
    """Rows ready for `decode`. Raises InputError for options that this model cannot meet."""
    rules = stop_rules(model, options)
    return [
        Row(
            prompt=prompt,
            sampler=sampler,
            rules=rules,
            max_tokens=room(model, len(prompt), options),
            answer=_answer_text(model.tokenizer, rules.strings, options),
        )
        for prompt, sampler in zip(prompts, samplers(options, prompts, model.vocab_size))
    ]


def _answer_text(tokenizer: Any, stops: Sequence[str], options: Options) -> AnswerText | ChannelText | None:
    if tokenizer is None:
        return None
    if has_channels(tokenizer):
        return ChannelText(tokenizer, stops, options.show_analysis)
    return AnswerText(tokenizer, stops)


class TextStream(Iterator[str]):
    """Pieces of one answer as they become certain; `result` is the Generation once they have all come."""

    def __init__(self, row: Row, steps: Iterator[None], done: Callable[[Generation], None] | None = None) -> None:
        self._row = row
        self._steps = steps
        self._done = done
        self._interrupted = False
        self.result: Generation | None = None

    def __next__(self) -> str:
        while self.result is None:
            if self._interrupted:
                self._row.finish("interrupted")
            else:
                next(self._steps)
            piece = self._row.take_text()
            if self._row.finish_reason is not None:
                self.result = self._row.result()
                if self._done is not None:
                    self._done(self.result)
            if piece:
                return piece
        raise StopIteration

    def interrupt(self) -> None:
        """Let the answer end after the token that is being made; may be called from a signal handler."""
        self._interrupted = True
