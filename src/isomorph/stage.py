"""Lets `isomorph.verify` be both the function and the package that holds it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class Stage(ModuleType):
    """A module that, when called, calls the function of its own name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*arguments, **options)


def callable_module(name: str) -> None:
    """Make module `name` callable: `callable_module(__name__)` on the last line of `verify/__init__.py`, say.

    Importing a submodule binds it on its parent, so a function and a folder of one name cannot both be attributes of
    `isomorph`; a module that can be called is both.
    """
    sys.modules[name].__class__ = Stage
