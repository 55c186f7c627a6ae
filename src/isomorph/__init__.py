"""isomorph ports a language model to another framework, proves that it is the same model, and runs it.

The pipeline, one folder a stage, data flowing one way:

    read (checkpoint) -> map (port) -> build (architectures, frameworks) -> verify -> quantize -> evaluate
    -> run (generate) -> publish

    import isomorph

    model = isomorph.load("talkie-1930-13b-it", framework="torch")
    model.generate("What is a steam engine?").text
    isomorph.convert("talkie-1930-13b-it", "talkie-mlx", to="mlx")
    assert isomorph.verify("talkie-1930-13b-it", "talkie-mlx", candidate_framework="mlx")

Importing the package imports no framework; each function imports what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isomorph import evaluate as evaluate
    from isomorph.convert import convert as convert
    from isomorph.errors import InputError as InputError
    from isomorph.generate import Generation as Generation
    from isomorph.inspect import inspect as inspect
    from isomorph.load import load as load
    from isomorph.quantize import quantize as quantize
    from isomorph.verify import Certificate as Certificate
    from isomorph.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "load": "isomorph.load",
    "pocket": "isomorph.pocket",
    "convert": "isomorph.convert",
    "inspect": "isomorph.inspect",
    "quantize": "isomorph.quantize",
    "verify": "isomorph.verify",
    "evaluate": "isomorph.evaluate",
    "Certificate": "isomorph.verify",
    "Generation": "isomorph.generate",
    "InputError": "isomorph.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'isomorph' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    # A stage whose module bears the function's name is callable itself (see `stage`), so both meanings agree.
    return home if _HOMES[name] == f"isomorph.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
