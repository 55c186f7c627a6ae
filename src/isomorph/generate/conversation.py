"""A conversation: the history of turns, and the decode state carried from one answer to the next."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import numpy as np

from isomorph.errors import InputError
from isomorph.frameworks.model import DecodeState, Model
from isomorph.generate.answers import TextStream, make_rows
from isomorph.generate.engine import Generation, decode
from isomorph.generate.options import Options
from isomorph.generate.prompts import encode_messages, has_chat_template

Message = dict[str, str]

#: Share of the context that is kept free for an answer; older turns make way for it.
ANSWER_SHARE = 0.25

#: A state is made for at least this many tokens, so that a few turns fit before a larger one is needed.
SMALLEST_STATE = 1024


class Conversation:
    """Turns with one model. `say` answers, `messages` is the history without the system message, `reset` forgets it.

    `options` are those of `generate`. Only tokens that the decode state does not hold yet are fed. When the context is
    full the oldest turns are dropped, never the system message: `dropped` says how many at the last `say`.
    """

    def __init__(self, model: Model, system: str | None = None, **options: Any) -> None:
        self.model = model
        self.options = Options.of(options)
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []
        self.dropped = 0
        self._state: DecodeState | None = None
        self._held: list[int] = []
        self._capacity = 0
        if model.tokenizer is not None and not has_chat_template(model):
            raise InputError("expected a model to chat with; its tokenizer has no chat template; use generate instead")
        # Refuses options that the model cannot meet before anyone has typed anything.
        empty: list[Message] = [{"role": "user", "content": ""}]
        make_rows(model, [encode_messages(model, [*self.system, *empty], self.options.chat_template)], self.options)

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.messages = []

    def say(self, text: str) -> TextStream:
        """Answer `text` piece by piece. The turn joins the history when its stream has come to an end.

        Raises InputError when the message alone does not fit the context.
        """
        messages, prompt = self._fitted([*self.messages, {"role": "user", "content": text}])
        (row,) = make_rows(self.model, [prompt], self.options)
        state, held = self._prepared(prompt, row.max_tokens)
        # A feed that is cut short leaves a state unusable, so it is kept only when the stream has come to its end.
        self._state = None

        def done(result: Generation) -> None:
            self.messages = [*messages, {"role": "assistant", "content": result.text}]
            self._state = state
            self._held = [*prompt.tolist(), *result.token_ids][: int(state.lengths[0])]

        return TextStream(row, decode([row], state, held), done)

    def _limit(self) -> int:
        return self.options.limit(self.model.max_positions)

    def _fitted(self, messages: list[Message]) -> tuple[list[Message], np.ndarray]:
        """The latest turns that leave room for an answer, and their ids."""
        wanted = min(self.options.max_tokens, int(self._limit() * ANSWER_SHARE))
        self.dropped = 0
        while True:
            prompt = encode_messages(self.model, [*self.system, *messages], self.options.chat_template)
            if len(prompt) + max(1, wanted) <= self._limit():
                return messages, prompt
            later = [index for index, message in enumerate(messages) if index and message["role"] == "user"]
            if not later:
                break
            self.dropped += 1
            messages = messages[later[0] :]
        if len(prompt) < self._limit():
            return messages, prompt
        raise InputError(
            f"expected a message that fits the context of {self._limit()} tokens; found {len(prompt)} with the system "
            "message; say it in fewer words"
        )

    def _prepared(self, prompt: np.ndarray, max_tokens: int) -> tuple[DecodeState, int]:
        """A decode state that holds the beginning of `prompt`, and how many of its tokens."""
        needed = len(prompt) + max_tokens
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._held, prompt.tolist())))
        # The last token is always fed, since its logits are what the answer starts from.
        same = min(same, len(prompt) - 1)
        if self._state is not None and same and needed <= self._capacity:
            try:
                self._state.trim(len(self._held) - same)
                return self._state, same
            except InputError:
                # Some states (a sliding window that has wrapped) cannot go back; the prompt is read anew.
                pass
        self._capacity = min(self._limit(), max(SMALLEST_STATE, 2 * needed))
        return self.model.decode_state(1, max_length=self._capacity), 0
