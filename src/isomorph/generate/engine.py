"""The decoding loop on a decode state: prefill in chunks, then one token a step for every unfinished row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState, Model
from isomorph.generate.channels import ChannelMessage, ChannelText
from isomorph.generate.options import Options
from isomorph.generate.sampling import Sampler
from isomorph.generate.stopping import StopRules
from isomorph.generate.text import AnswerText

#: Tokens of a prompt that are fed at once; bounds the activations of a long prompt.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Generation:
    """An answer and how it came about.

    `token_ids` are the new ones, a stop token included; `text` is theirs without special tokens and cut at a stop
    string ("" when the model has no tokenizer). `finish_reason` is `stop`, or `length` when `max_tokens` or the context
    was used up, or `interrupted`. `messages` are the parts of an answer in channels (gpt-oss), of which `text` is the
    final one. Speeds are tokens per second: of the prompt, as far as it was not held already, until
    the answer's first token; of the answer from there on (None for a single token). Rows of a batch share the clock.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    time_to_first_token_seconds: float
    prompt_tokens_per_second: float
    generation_tokens_per_second: float | None
    messages: tuple[ChannelMessage, ...] = ()


@dataclass
class Row:
    """One sequence on its way."""

    prompt: np.ndarray
    sampler: Sampler
    rules: StopRules
    max_tokens: int
    answer: AnswerText | ChannelText | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    _held: int = 0
    _pieces: list[str] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)

    def start(self, held: int) -> None:
        """Start the clock; `held` tokens of the prompt need not be read."""
        self._held = held
        self._times = [time.perf_counter()]

    def accept(self, logits: np.ndarray) -> None:
        """Draw the next token from logits [V], and finish when it ends the answer."""
        token = self.sampler(logits)
        self.tokens.append(token)
        # The times of the first and of the latest token are all that is reported.
        self._times[2 if len(self.tokens) > 1 else 1 :] = [time.perf_counter()]
        if token in self.rules.ids:
            self.finish("stop")
            return
        if self.answer is not None:
            self._pieces.append(self.answer.push(token))
            if self.answer.stopped:
                self.finish("stop")
                return
        if len(self.tokens) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """No more tokens come: release the text that was held back."""
        if self.finish_reason is not None:
            return
        if self.answer is not None:
            self._pieces.append(self.answer.finish())
            # The last bytes may complete a stop string that a partial character had kept apart.
            reason = "stop" if self.answer.stopped else reason
        self.finish_reason = reason

    def take_text(self) -> str:
        """The text that became certain since the last call."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def result(self) -> Generation:
        """The finished answer."""
        started, *later = self._times
        first, last = (later[0], later[-1]) if later else (time.perf_counter(), 0.0)
        steps = len(self.tokens) - 1
        return Generation(
            text=self.answer.text if self.answer is not None else "",
            token_ids=list(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            prompt_tokens=len(self.prompt),
            generation_tokens=len(self.tokens),
            time_to_first_token_seconds=first - started,
            prompt_tokens_per_second=(len(self.prompt) - self._held) / max(first - started, 1e-9),
            generation_tokens_per_second=steps / max(last - first, 1e-9) if steps > 0 else None,
            messages=self.answer.messages if isinstance(self.answer, ChannelText) else (),
        )


def room(model: Model, prompt_tokens: int, options: Options) -> int:
    """How many tokens an answer may have: `max_tokens`, or fewer where the context or `max_kv_size` ends first.

    Raises InputError when there is no room for any.
    """
    limit = options.limit(model.max_positions)
    if prompt_tokens >= limit:
        source = "max_kv_size" if limit < model.max_positions else "max_position_embeddings"
        raise InputError(
            f"expected a prompt of fewer than {limit} tokens ({source}); found {prompt_tokens}; shorten the prompt"
        )
    return min(options.max_tokens, limit - prompt_tokens)


def new_state(model: Model, rows: Sequence[Row]) -> DecodeState:
    """An empty decode state for `rows`, padded on the left to the longest prompt."""
    lengths = np.array([len(row.prompt) for row in rows], dtype=np.int64)
    padding = lengths.max() - lengths
    most = max(len(row.prompt) + row.max_tokens for row in rows)
    return model.decode_state(len(rows), left_padding=padding if padding.any() else None, max_length=most)


def decode(rows: Sequence[Row], state: DecodeState, held: int = 0) -> Iterator[None]:
    """Decode every row to its end; yields after each feed, when the caller may look, or stop for good.

    `held` tokens of the prompt (of a single row) are in the state already. Rows that finish leave the batch.
    """
    live = list(rows)
    longest = max(len(row.prompt) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.prompt) :] = row.prompt
        row.start(held)
    # All padding must lie in the first feed, and every row needs a real token there.
    first = max(PREFILL_CHUNK, longest - min(len(row.prompt) for row in rows) + 1)
    while held < longest:
        end = min(longest, held + (PREFILL_CHUNK if held else first))
        logits = state.feed(ids[:, held:end], last_only=True)
        held = end
        if held < longest:
            yield
    while True:
        for row, scores in zip(live, logits[:, -1]):
            row.accept(scores)
        yield
        kept = [index for index, row in enumerate(live) if row.finish_reason is None]
        if not kept:
            return
        if len(kept) < len(live):
            state.reorder(kept)
            live = [live[index] for index in kept]
        logits = state.feed(np.array([[row.tokens[-1]] for row in live], dtype=np.int64), last_only=True)
