"""Families of other packages, checked when they are loaded: a fault of theirs is one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, cast

from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module, Row
from mmconvert.errors import MMConvertError, RequestError

# What a family's functions must return; a table's parts are looked at besides.
RETURNS: dict[str, type] = {
    "dims": dict,
    "modules": tuple,
    "text_config": Mapping,
    "traits": frozenset,
    "shape_traits": frozenset,
    "lists": dict,
}


def third_party():  # noqa: ANN201 - the type EntryPoint would cost the import it avoids
    """The registered families of installed packages, by converter name; none is imported."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="mmconvert.families")}


def load_plugin(converter: str, entry: Any) -> Family:  # noqa: ANN401 - see third_party
    """The family of an entry point, whose functions can fail with one error only.

    Raises:
        RequestError: it cannot be imported, is no family, or its table cannot be made.
    """
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:  # a stranger's module may do anything
        raise _failed(converter, f"importing {entry.value}", error) from error
    if not isinstance(found, Family):
        raise RequestError(f"the entry point {converter} is {found!r:.200}", "a converters.Family")
    family = replace(
        found, **{name: _guarded(converter, name, getattr(found, name)) for name in RETURNS}
    )
    try:
        if not all(isinstance(kind, str) for kind in cast("Iterable[object]", family.model_types)):
            raise TypeError(f"model_types is {family.model_types!r:.200}")
        from mmconvert.converters.checks import check_family  # only packages' own families need it

        check_family(family)
    except MMConvertError:
        raise
    except Exception as error:
        raise _failed(converter, "its fields", error) from error
    return family


def _guarded(converter: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a family; whatever goes wrong in it is named."""

    @wraps(function)
    def called(*args: object) -> object:
        try:
            made = function(*args)
            if not isinstance(made, RETURNS[name]):
                raise TypeError(f"it returns {made!r:.200}")
            if name == "modules":
                _check_table(made)  # pyright: ignore[reportArgumentType] - a tuple
        except MMConvertError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(converter, name, error) from error
        return made

    return called


def _check_table(modules: Iterable[object]) -> None:
    """Raises TypeError for what is no table at all; names and sizes are checked by the plan."""
    for module in modules:
        if not isinstance(module, Module):
            raise TypeError(f"a module is {module!r:.200}")
        for row in cast("Iterable[object]", module.all_rows()):
            if not isinstance(row, Row) or not isinstance(cast("object", row.mm), str):
                raise TypeError(f"a row of {module.key!r:.80} is {row!r:.200}")


def _failed(converter: str, where: str, error: BaseException) -> RequestError:
    reason = " ".join(str(error).split())[:200]
    return RequestError(
        f"{converter}, a family of another package, fails in {where}: "
        f"{type(error).__name__}{': ' if reason else ''}{reason}",
        "a family as CONTRIBUTING.md describes it",
        "tell its authors, or uninstall that package; --debug shows where it fails",
    )
