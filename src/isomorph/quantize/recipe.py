"""Recipes: what each matrix of a model gets, by role, by block, by name, or by asking a function.

A recipe is a default and an ordered list of rules; the last rule that matches a matrix decides. As a TOML file:

    bits = 4                      # of what no rule names; bits, group_size and mode are all optional
    group_size = 64

    [[rule]]
    roles = ["head", "v"]         # of embed value_embed q k v o gate up down head router expert
    bits = 8

    [[rule]]
    blocks = "0, 14, 37-38, -1"   # numbers and ranges, from the end when negative; or "spread" (see `in_spread`)
    match = "*.mlp.*"             # a pattern for the module's path or any end of it; conditions must all hold
    bits = 6
    group_size = 32

    [[rule]]
    roles = "embed"
    keep = true                   # not quantized

With `exact = true` beside the defaults, what lies on a grid already (see `isomorph.quantize.grid`) gets its cheapest
exact form instead of what the rules say.

As a dictionary: `{"head": 8, "blocks.14.*": {"bits": 6, "group_size": 32}, "embed": False}`, keys being roles or
patterns. As a function: `(path, role, shape) -> bits | dict | False`, or True (or None) for the default.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from isomorph.errors import InputError, did_you_mean
from isomorph.quantize.roles import ROLES, block_of
from isomorph.quantize.settings import MODES, Settings

Choice = int | Mapping[str, Any] | bool | None
RecipeFunction = Callable[[str, str | None, tuple[int, ...]], Choice]

#: How a choice of blocks is written.
_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")

_RULE_KEYS = ("roles", "blocks", "match", "bits", "group_size", "mode", "keep")
_RECIPE_KEYS = ("name", "description", "bits", "group_size", "mode", "exact", "rule")


@dataclass(frozen=True)
class Rule:
    """A choice for the matrices for which all given conditions hold."""

    choice: Choice
    roles: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    blocks: str = ""

    def applies(self, path: str, role: str | None, block_count: int) -> bool:
        if self.roles and role not in self.roles:
            return False
        if self.match and not any(_matches(path, pattern) for pattern in self.match):
            return False
        return not self.blocks or in_blocks(self.blocks, block_of(path), block_count)


@dataclass(frozen=True)
class Recipe:
    """Defaults (None: the caller's), rules, or a function in their place, and overrides, which have the last word.

    `exact` lets what lies on a grid stay on it, whatever the rules say. `explicit` writes the settings of every module
    into config.json, also those that are the default.
    """

    name: str = ""
    description: str = ""
    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    rules: tuple[Rule, ...] = ()
    function: RecipeFunction | None = None
    overrides: tuple[Rule, ...] = ()
    exact: bool = False
    explicit: bool = False

    def choose(
        self,
        path: str,
        role: str | None,
        shape: tuple[int, ...],
        default: Settings,
        block_count: int,
        grid: Settings | None = None,
    ) -> Settings | None:
        """The settings of one matrix, None when it is kept as it is; `grid` is what it lies on already.

        Raises InputError for an impossible choice.
        """
        choice = _last(self.rules, path, role, block_count, True)
        if self.function is not None:
            choice = self.function(path, role, shape)
        if self.exact and grid is not None:
            choice = grid.to_dict()
        choice = _last(self.overrides, path, role, block_count, choice)
        try:
            return settings_of(choice, default)
        except InputError as error:
            raise InputError(f"recipe {self.name or 'given'}, {path}: {error}") from None


def settings_of(choice: Choice, default: Settings) -> Settings | None:
    """What a choice means: bits, a dictionary of settings, True or None for the default, False for keep."""
    if choice is None or choice is True:
        return default
    if choice is False:
        return None
    if isinstance(choice, Mapping):
        return default.changed(choice)
    if isinstance(choice, int):
        return default.changed({"bits": choice})
    raise InputError(f"expected bits, a dictionary, True or False; found {choice!r}")


def in_spread(block: int, block_count: int) -> bool:
    """mlx-lm's choice of blocks that get more bits: the first and last eighth, and every third between."""
    eighth = block_count // 8
    return block < eighth or block >= 7 * block_count // 8 or (block - eighth) % 3 == 2


def in_blocks(choice: str, block: int | None, block_count: int) -> bool:
    """Whether `block` is among the blocks a rule names."""
    if block is None:
        return False
    if choice == "spread":
        return in_spread(block, block_count)
    for part in choice.split(","):
        first, last = _bounds(part.strip(), block_count)
        if first <= block <= last:
            return True
    return False


def read_recipe(given: str | Path | Mapping[str, Any] | RecipeFunction | Recipe) -> Recipe:
    """A recipe from a built-in name, a TOML file, a dictionary or a function. Raises InputError."""
    from isomorph.quantize.named import RECIPES

    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        return Recipe("dictionary", rules=tuple(named_rule(key, choice) for key, choice in given.items()))
    if callable(given):
        return Recipe("function", function=given)
    if str(given) in RECIPES:
        return RECIPES[str(given)]
    if not isinstance(given, str | Path):
        raise InputError(f"expected a recipe's name, a TOML file, a dictionary or a function; found {given!r}")
    path = Path(given).expanduser()
    if path.suffix == ".toml" and not path.is_file():
        raise InputError(f"expected a recipe in the file {path}; found no such file; correct the path")
    if path.suffix != ".toml":
        raise InputError(
            f"expected a recipe of {', '.join(RECIPES)} or a .toml file; found {str(given)!r}"
            f"{did_you_mean(str(given), RECIPES)}"
        )
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"expected a recipe in TOML in {path}; found: {error}; correct the file") from None
    try:
        return _recipe(document, path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def set_rule(text: str) -> Rule:
    """The rule that `--set 'PATTERN=BITS'` means: BITS may be `8`, `6/32` (group size 32), a mode or `keep`."""
    pattern, equals, value = text.rpartition("=")
    number = re.fullmatch(r"(\d+)(?:/(\d+))?", value.strip())
    choice: Choice
    if number:
        choice = {"bits": int(number[1])} | ({"group_size": int(number[2])} if number[2] else {})
    elif value.strip() in MODES:
        choice = {"mode": value.strip()}
    elif value.strip() == "keep":
        choice = False
    else:
        equals = ""
    if not equals or not pattern.strip():
        raise InputError(
            f"expected --set 'PATTERN=BITS' with bits such as 8, 6/32 (bits/group size), {', '.join(MODES)} or keep; "
            f"found {text!r}"
        )
    return named_rule(pattern.strip(), choice)


def named_rule(key: str, choice: Choice) -> Rule:
    """A rule for a role, where `key` is one, or else for a pattern of module paths."""
    return Rule(choice, roles=(key,)) if key in ROLES else Rule(choice, match=(key,))


def _recipe(document: Mapping[str, Any], name: str) -> Recipe:
    _refuse_unknown(document, _RECIPE_KEYS, "recipe")
    rules = document.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise InputError("expected rules as [[rule]] tables; found something else")
    bits, group_size, mode = (document.get(key) for key in ("bits", "group_size", "mode"))
    Settings.of(bits, group_size, mode or "affine")
    if type(exact := document.get("exact", False)) is not bool:
        raise InputError(f"expected exact as true or false; found {exact!r}")
    return Recipe(
        str(document.get("name", name)),
        str(document.get("description", "")),
        bits,
        group_size,
        mode,
        tuple(_rule(rule, number) for number, rule in enumerate(rules, 1)),
        exact=exact,
    )


def _rule(table: Mapping[str, Any], number: int) -> Rule:
    where = f"rule {number}"
    _refuse_unknown(table, _RULE_KEYS, where)
    roles, match = _strings(table, "roles", where), _strings(table, "match", where)
    for role in roles:
        if role not in ROLES:
            hint = did_you_mean(role, ROLES)
            raise InputError(f"{where}: expected roles of {', '.join(ROLES)}; found {role!r}{hint}")
    blocks = table.get("blocks", "")
    blocks = ", ".join(map(str, blocks)) if isinstance(blocks, list) else str(blocks)
    if blocks and blocks != "spread":
        for part in blocks.split(","):
            if not _RANGE.fullmatch(part.strip()):
                raise InputError(f"{where}: expected blocks such as '0, 14, 37-38, -1' or 'spread'; found {blocks!r}")
    settings = {key: table[key] for key in ("bits", "group_size", "mode") if key in table}
    keep = table.get("keep", False)
    if type(keep) is not bool or keep == bool(settings):
        raise InputError(f"{where}: expected either bits, group_size or mode, or keep = true; found {dict(table)}")
    if not keep:
        Settings.of(settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine"))
    return Rule(False if keep else settings, roles, match, blocks)


def _strings(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise InputError(f"{where}: expected {key} as a string or a list of strings; found {value!r}")
    return tuple(values)


def _refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise InputError(f"{where}: expected keys of {', '.join(known)}; found {key!r}{did_you_mean(key, known)}")


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _last(rules: tuple[Rule, ...], path: str, role: str | None, block_count: int, otherwise: Choice) -> Choice:
    fitting = [rule.choice for rule in rules if rule.applies(path, role, block_count)]
    return fitting[-1] if fitting else otherwise


def _bounds(part: str, block_count: int) -> tuple[int, int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise InputError(f"expected blocks such as '0, 14, 37-38, -1' or 'spread'; found {part!r}")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    return first % block_count if first < 0 else first, last % block_count if last < 0 else last
