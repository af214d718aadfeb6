"""Checks the options of a recipe against the signature of the function that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from dtrain.errors import UsageError

Value = TypeVar("Value")


def choose(table: Mapping[str, Value], name: object, *, what: str) -> Value:
    """The entry of that name; UsageError lists the names there are."""
    if not isinstance(name, str) or name not in table:
        raise UsageError(f"{what} {name!r} is unknown: choose one of {', '.join(table)}")
    return table[name]


def checked(
    function: Callable[..., object],
    given: Mapping[str, object],
    *,
    where: str,
    beside: Callable[..., object] | None = None,
) -> dict[str, object]:
    """`given` as keyword arguments of `function`, text from a command line turned into the default's type.

    A function's options are its keyword-only parameters that have an int or str default; whole numbers must
    be at least 1. A function with `**others` receives what it does not name unchecked, to check it elsewhere.

    `beside` is the function that passed these on; an error lists its options too.

    Raises UsageError that names the option and, where it is unknown, those that `where` has.
    """
    defaults = options_of(function)
    parameters = inspect.signature(function).parameters.values()
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in defaults and not passes_on:
            known = ", ".join([*(options_of(beside) if beside else ()), *defaults]) or "none"
            raise UsageError(f"{where} has no option {name!r}; it has: {known}")
    return {
        name: _like(defaults[name], value, f"{where}: {name}={value!r}") if name in defaults else value
        for name, value in given.items()
    }


def options_of(function: Callable[..., object]) -> dict[str, int | str]:
    """The options of a function that makes something for a recipe, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, (int, str))}


def _like(default: object, value: object, what: str) -> object:
    if isinstance(default, str):
        return str(value)
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UsageError(f"{what}: must be a whole number of at least 1")
    return number
