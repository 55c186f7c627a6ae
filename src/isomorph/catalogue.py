"""What `isomorph list` lists: rows of names and what they mean."""

from __future__ import annotations

from collections.abc import Callable

from isomorph.errors import InputError, did_you_mean

Row = dict[str, str]


def architectures() -> list[Row]:
    """Architectures of isomorph's own; those of Transformers and mlx-lm load as well."""
    from isomorph.architectures import registered

    return [
        {"name": name, "frameworks": ", ".join(own.native), "layouts": ", ".join(own.layouts)}
        for name, own in registered().items()
    ]


def layouts() -> list[Row]:
    """Layouts of each architecture, with what `convert --to` writes them."""
    from isomorph.architectures import registered

    return [
        {
            "name": layout.name,
            "architecture": own.model_type,
            "to": ", ".join(target for target, default in own.defaults.items() if default == layout.name),
            "description": layout.description,
        }
        for own in registered().values()
        for layout in own.layouts.values()
    ]


def recipes() -> list[Row]:
    """Built-in quantization recipes."""
    from isomorph.quantize.named import RECIPES

    return [{"name": recipe.name, "description": recipe.description} for recipe in RECIPES.values()]


def protocols() -> list[Row]:
    """Evaluation protocols."""
    from isomorph.evaluate import PROTOCOLS

    return [{"name": protocol.name, "description": protocol.description} for protocol in PROTOCOLS.values()]


LISTS: dict[str, Callable[[], list[Row]]] = {
    "architectures": architectures,
    "layouts": layouts,
    "protocols": protocols,
    "recipes": recipes,
}


def catalogue(what: str) -> list[Row]:
    """The rows of one list. Raises InputError for an unknown one."""
    if what not in LISTS:
        raise InputError(f"expected one of {', '.join(LISTS)} to list; found {what!r}{did_you_mean(what, LISTS)}")
    return LISTS[what]()
