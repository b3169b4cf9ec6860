"""Keyword arguments as the settings of a command: `optim_lr=0.3` is `--optim.lr 0.3`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from corinfomax.cli.arguments import DataOptions
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime.records import Options, WeightsOptions

PATHS = ("root", "cache", "skip")
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The settings of a call by their group, with the flags that were named."""

    images: DataOptions
    options: Options
    network: WeightsOptions
    recipe: Recipe
    typed: frozenset[str]


def read(function: str, keywords: Mapping[str, Any], *groups: str) -> Settings:
    """The keyword arguments of a function, each a setting of one of the `groups` of `Settings`.

    TypeError for a keyword that none of them has, ValueError for a value that it cannot take.
    """
    defaults: dict[str, Any] = {"images": DataOptions(), "options": Options(), "network": WeightsOptions()}
    defaults["recipe"] = RECIPES["cpu-small"].recipe
    flags = {name: fields.flags(defaults[name]).keys() - {"device"} for name in groups}  # an argument of its own
    known = {flag.replace(".", "_").replace("-", "_"): (name, flag) for name in groups for flag in flags[name]}

    changes: dict[str, dict[str, Any]] = {name: {} for name in defaults}
    for keyword, value in keywords.items():
        if keyword not in known:
            close = difflib.get_close_matches(keyword, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{function}() has no setting {keyword!r}{hint}")
        group, flag = known[keyword]
        changes[group][flag] = Path(value).expanduser() if flag in PATHS and value is not None else value
    return Settings(
        images=_replaced(defaults["images"], changes["images"]),
        options=_replaced(defaults["options"], changes["options"]),
        network=_replaced(defaults["network"], changes["network"]),
        recipe=fields.changed(defaults["recipe"], changes["recipe"]),
        typed=frozenset(flag for group in changes.values() for flag in group),
    )


def _replaced(options: T, changes: Mapping[str, Any]) -> T:
    return replace(options, **{flag.replace("-", "_"): value for flag, value in changes.items()})  # type: ignore[type-var]
