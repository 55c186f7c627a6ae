"""What both models read: held-out text through the tokenizer, or random ids where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError
from isomorph.evaluate.protocols import encode, protocol_named

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

#: Default number of tokens. Short prompts hide faults of rope and windows (DESIGN, proof policy).
TOKENS = 512
#: Fewer tokens than this in a row are warned of.
SHORT = 64


@dataclass(frozen=True)
class Prompt:
    """Token rows `[R, W]`, int64, and where they come from."""

    rows: np.ndarray
    origin: str
    seed: int | None = None

    @property
    def stream(self) -> np.ndarray:
        """All tokens one after another."""
        return self.rows.ravel()


def make_prompt(model: Model, text: Any = None, tokens: int = TOKENS, seed: int = 0) -> Prompt:
    """Rows of at most the model's context, `tokens` tokens in all (rounded down to whole rows).

    `text` is a string (needs the model's tokenizer), ids [T] or [R, W], or None for the held-out text that is shipped,
    or for seeded random ids when the model has no tokenizer. Raises InputError for an empty or too short text.
    """
    if tokens < 2:
        raise InputError(f"expected at least 2 tokens to compare; found tokens={tokens}; leave it at its default")
    if text is not None and not isinstance(text, str):
        return _from_ids(model, text)
    if model.tokenizer is None:
        if text is not None:
            raise InputError("expected ids, because the model has no tokenizer; found text; pass token ids instead")
        width = min(tokens, model.max_positions)
        rows = np.random.default_rng(seed).integers(0, model.vocab_size, size=(tokens // width, width))
        return Prompt(rows.astype(np.int64), f"random ids, seed {seed}", seed)
    origin = "given text"
    if text is None:
        from isomorph import pocket

        text, origin = pocket.heldout_text(), "held-out excerpt shipped with isomorph"
    ids = encode(protocol_named("windowed"), model.tokenizer, text).ids[:tokens]
    if ids.size < 2:
        raise InputError(f"expected a text of at least 2 tokens; found {ids.size}; give a longer text")
    width = min(ids.size, model.max_positions)
    return Prompt(ids[: ids.size // width * width].reshape(-1, width), origin)


def _from_ids(model: Model, ids: Any) -> Prompt:
    array = np.atleast_2d(np.asarray(ids))
    if array.ndim == 2 and array.shape[0] == 1 and array.shape[1] > model.max_positions:
        width = model.max_positions
        array = array[:, : array.shape[1] // width * width].reshape(-1, width)
    return Prompt(model.checked_ids(array), "given ids")
