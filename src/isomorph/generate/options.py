"""The options of `generate`, checked before anything is loaded or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from isomorph.errors import InputError, did_you_mean
from isomorph.generate.sampling import Sampling, is_integer


@dataclass(frozen=True)
class Options(Sampling):
    """How tokens are drawn (see `Sampling`), and where the answer ends.

    `max_tokens` is the most new tokens. `stop` is a string or strings that end the text. `max_kv_size` is the most
    tokens that prompt and answer may take together. `show_analysis` streams every channel of an answer that has
    channels; `chat_template` holds values for the chat template, such as `reasoning_effort`. Raises InputError for a
    value that cannot be.
    """

    max_tokens: int = 256
    stop: str | Sequence[str] | None = None
    max_kv_size: int | None = None
    show_analysis: bool = False
    chat_template: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "max_kv_size"):
            value = getattr(self, name)
            if (value is not None or name == "max_tokens") and not (is_integer(value) and value >= 1):
                raise InputError(f"expected {name} to be a whole number from 1; found {value!r}")
        if self.chat_template is not None and not isinstance(self.chat_template, Mapping):
            raise InputError(f"expected chat_template to map names to values; found {self.chat_template!r}")
        strings = self.stop_strings if isinstance(self.stop, str | Sequence | None) else [self.stop]
        for string in strings:
            if not isinstance(string, str) or not string:
                raise InputError(f"expected stop to be a string or a list of strings, none empty; found {string!r}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> Options:
        """The options of a call; one that does not exist is refused by name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"expected an option of {', '.join(known)}; found {name!r}{did_you_mean(name, known)}")
        return cls(**options)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self, max_positions: int) -> int:
        """The most tokens of prompt and answer together, for a model that takes `max_positions`."""
        return min(max_positions, self.max_kv_size or max_positions)
