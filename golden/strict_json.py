"""JSON from files that nobody vouches for: read strictly, within bounds, with short messages.

Other than :func:`json.loads` takes by itself, a key stands once, numbers are finite and integers
have at most 20 digits; how much is parsed and how deep it may be is bounded, so that no file makes
a reader slow. The writers of this project write nothing that these readers refuse.
"""

import json
import reprlib
from collections.abc import Mapping
from math import isfinite
from typing import Any, NoReturn

from golden.errors import InputError

__all__ = [
    "canonical_json",
    "check_json",
    "check_marks",
    "integers",
    "json_object",
    "object_with",
    "parse_json",
    "shown",
]

_MAX_DEPTH = 16  # of values that users give, such as a configuration
_MAX_MARKS = 4_000_000  # of , [ and {: bounds the values, so that parsing takes about a second
_MAX_DIGITS = 20  # of an integer: 64 bits and a sign


def canonical_json(value: object) -> str:
    """ASCII text with keys sorted and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def check_json(value: object, depth: int = 1) -> None:
    """Refuse what cannot be written, or what :func:`parse_json` would not take back.

    Parameters
    ----------
    value : object
        Mappings with string keys, lists, tuples, strings, numbers, booleans, None.
    depth : int
        Level at which the value stands; 16 are allowed.

    Raises
    ------
    InputError
        For anything else in it, numbers that are not finite, integers of more than 20 digits.
    """
    if depth > _MAX_DEPTH:
        raise InputError(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"key {key!r} is not a string")
            check_json(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_json(item, depth + 1)
    elif isinstance(value, float):
        if not isfinite(value):
            raise InputError(f"{value} is not a finite number")
    elif isinstance(value, int):
        if len(str(value)) > _MAX_DIGITS:
            raise InputError(f"an integer has more than {_MAX_DIGITS} digits")
    elif value is not None and not isinstance(value, str):
        raise InputError(f"a value of type {type(value).__name__} is not JSON")


def check_marks(text: str, what: str = "JSON") -> None:
    """Refuse text of so many values that parsing it would take more than about a second.

    Raises
    ------
    InputError
        The message begins with ``what``.
    """
    if sum(map(text.count, ",[{")) > _MAX_MARKS:
        raise InputError(f"{what} of more than {_MAX_MARKS} commas and brackets")


def parse_json(text: str) -> Any:
    """Value of a JSON text.

    Raises
    ------
    InputError
        If it is not JSON, a key stands twice in an object, a number is NaN or infinite, an integer
        has more than 20 digits, or it is too long or too deep.
    """
    check_marks(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_short_integer,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise InputError("JSON is nested too deep") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise InputError(f"duplicate key {shown(key)}")
        table[key] = value
    return table


def _short_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise InputError(f"an integer has more than {_MAX_DIGITS} digits")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise InputError(f"{text} is not JSON")


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
_SHORT.maxlevel = 2


def shown(value: object) -> str:
    """Representation of a value from a file: one line, short, however large or deep it is."""
    return _SHORT.repr(value)


def json_object(value: object) -> dict[str, Any]:
    """``value``, if it is a JSON object; an InputError otherwise."""
    if not isinstance(value, dict):
        raise InputError(f"must be an object, not {shown(value)}")
    return value


def object_with(value: object, required: frozenset[str]) -> dict[str, Any]:
    """``value``, if it is a JSON object with exactly these keys; an InputError otherwise."""
    table = json_object(value)
    for key in sorted(required - table.keys()):
        raise InputError(f"key {key!r} is missing")
    for key in sorted(table.keys() - required):
        raise InputError(f"unknown key {shown(key)}")
    return table


def integers(value: object, smallest: int) -> tuple[int, ...]:
    """``value``, if it is a JSON list of integers of at least ``smallest``; else an InputError."""
    if not isinstance(value, list) or any(type(n) is not int or n < smallest for n in value):
        raise InputError(f"must be a list of integers from {smallest} up, not {shown(value)}")
    return tuple(value)
