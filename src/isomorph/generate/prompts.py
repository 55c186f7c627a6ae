"""From what a caller may give as a prompt to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

Messages = Sequence[Mapping[str, str]]


def read_prompts(
    model: Model, prompt: Any, chat_template: Mapping[str, Any] | None = None
) -> tuple[list[np.ndarray], bool]:
    """`prompt` as rows of ids, int64 [T] each, and whether it was a batch.

    One prompt: str, ids [T], or messages (`{"role": ..., "content": ...}`). A batch: ids [B, T], or a list of prompts
    of any kind. `chat_template` holds further values for the template that writes messages. Raises InputError for
    anything else, an empty prompt, ids outside the vocabulary or too many of them.
    """
    if isinstance(prompt, (str, bytes, Mapping)) or not isinstance(prompt, Sequence):
        return _read_one_or_array(model, prompt, chat_template)
    if len(prompt) and not any(_is_prompt(item) for item in prompt):
        return [_read(model, prompt, chat_template)], False
    if not len(prompt):
        raise InputError("expected at least one token; found an empty prompt; give a prompt")
    if not all(_is_prompt(item) for item in prompt):
        raise InputError(f"expected a prompt or a list of prompts of one kind; found {_describe(prompt)}")
    return [_read(model, item, chat_template) for item in prompt], True


def encode(model: Model, text: str, add_special_tokens: bool = True) -> np.ndarray:
    """Ids of a text, int64 [T]; special tokens in it are read as such. Raises InputError without a tokenizer."""
    if model.tokenizer is None:
        raise InputError(
            "expected token ids, because the model has no tokenizer; found text; pass ids or give tokenizer= to load"
        )
    # A lone surrogate is no character: it becomes U+FFFD, as in tiktoken.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return np.asarray(model.tokenizer.encode(text, add_special_tokens=add_special_tokens), dtype=np.int64)


def has_chat_template(model: Model) -> bool:
    """Whether the tokenizer can write messages as a prompt."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def encode_messages(model: Model, messages: Messages, chat_template: Mapping[str, Any] | None = None) -> np.ndarray:
    """Ids of a conversation in the tokenizer's chat template, up to where the answer begins.

    `chat_template` holds further values for the template, such as `reasoning_effort` or `tools`.
    """
    for message in messages:
        # A message that calls tools may say nothing.
        said = ("role",) if isinstance(message, Mapping) and message.get("tool_calls") else ("role", "content")
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in said):
            raise InputError(f"expected messages with a role and a content, both text; found {message!r}"[:300])
    if model.tokenizer is None:
        raise InputError(
            "expected token ids, because the model has no tokenizer; found messages; give tokenizer= to load"
        )
    if not has_chat_template(model):
        raise InputError("expected text or ids, because the tokenizer has no chat template; found messages; pass text")
    try:
        text = model.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **(chat_template or {})
        )
    except Exception as error:
        # Templates refuse what they cannot say (two user turns in a row, a system turn) by raising in jinja.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise InputError(f"expected messages that the chat template takes; it says: {error}") from None
    return encode(model, text, add_special_tokens=False)


def _read(model: Model, prompt: Any, chat_template: Mapping[str, Any] | None) -> np.ndarray:
    """One prompt."""
    rows, batched = _read_one_or_array(model, prompt, chat_template)
    if batched:
        raise InputError("expected each prompt of a list to be text, ids [T] or messages; found a nested list")
    return rows[0]


def _read_one_or_array(
    model: Model, prompt: Any, chat_template: Mapping[str, Any] | None
) -> tuple[list[np.ndarray], bool]:
    if isinstance(prompt, str):
        return [_checked(model, encode(model, prompt))], False
    if isinstance(prompt, Sequence) and len(prompt) and all(isinstance(item, Mapping) for item in prompt):
        return [_checked(model, encode_messages(model, prompt, chat_template))], False
    if isinstance(prompt, (bytes, Mapping)) or prompt is None:
        raise InputError(f"expected a prompt as text, ids or a list of messages; found {_describe(prompt)}")
    try:
        ids = np.asarray(prompt)
    except (ValueError, TypeError):
        raise InputError(f"expected a prompt as text, ids or a list of messages; found {_describe(prompt)}") from None
    if ids.ndim == 0:
        raise InputError(f"expected a prompt as text, ids or a list of messages; found {_describe(prompt)}")
    checked = _checked(model, ids, both=True)
    return list(checked), ids.ndim == 2


def _checked(model: Model, ids: np.ndarray, both: bool = False) -> np.ndarray:
    """Ids within the vocabulary and the context, int64: [T], or [B, T] when `both`."""
    checked = model.checked_ids(ids)
    return checked if both else checked[0]


def _is_prompt(item: Any) -> bool:
    """Whether an element of a list is a prompt itself rather than one id or one message."""
    if isinstance(item, str):
        return True
    return not isinstance(item, Mapping) and (isinstance(item, Sequence) or getattr(item, "ndim", 0) > 0)


def _describe(prompt: Any) -> str:
    if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)):
        kinds = sorted({type(item).__name__ for item in prompt})
        return f"a list of {', '.join(kinds)}" if kinds else "an empty list"
    return type(prompt).__name__
