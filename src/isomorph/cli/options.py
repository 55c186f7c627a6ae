"""Options that several verbs share, one by one and in groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from isomorph.errors import InputError

if TYPE_CHECKING:
    from isomorph.frameworks.model import Model

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing target folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the repository ships.")]
Framework = Annotated[str, typer.Option(help="torch, mlx or flax; mlx-lm: stock.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A config.json that overrides keys of its own.")]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: float32, bfloat16 or float16; default as stored.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: the options of `isomorph.load`."""

    framework: Framework = "torch"
    dtype: Dtype = None
    device: Annotated[str | None, typer.Option(help="The framework's name of a device, such as cuda or gpu:0.")] = None
    tokenizer: Annotated[Path | None, typer.Option(help="Folder, tokenizer.json or vocab.txt.")] = None
    config: ConfigFile = None
    numerics: Annotated[str, typer.Option(help="exact, or fast: int8 activations in quantized products.")] = "exact"
    rope_table_dtype: Annotated[str | None, typer.Option(help="Rounding of cos and sin; default: the model's.")] = None
    trust_remote_code: Trust = False

    def load(self, source: str, **others: Any) -> Model:
        """The model at `source`; `others` take the place of what was given. Raises InputError."""
        from isomorph.load import load

        return load(source, **vars(replace(self, **others)))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with each parameter that is a dataclass spread out: an option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        kind = groups.get(parameter.name)
        if kind is None:
            given = [(parameter.name, hints[parameter.name], parameter.default)]
        else:
            own = get_type_hints(kind, include_extras=True)
            given = [(field.name, own[field.name], field.default) for field in fields(kind)]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)
            for name, hint, default in given
        ]

    @functools.wraps(command)
    def spread(**given: Any) -> None:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **made)

    spread.__dict__["__signature__"] = inspect.Signature(parameters)
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


def read_text(path: Path | None) -> str:
    """The file's text, or the held-out excerpt that is shipped. Raises InputError."""
    if path is None:
        from isomorph import pocket

        return pocket.heldout_text()
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"expected a text file at {path}; found that {reason}; give another --text") from None
