"""Fields of JSON that anybody may have written: each is checked, and messages say where it stands.

``where`` is what a message starts with: the file, and the place in it.
"""

import json
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from golden.errors import InputError

__all__ = [
    "count_field",
    "json_list",
    "json_object",
    "number_field",
    "optional",
    "read_json",
    "shown",
    "text_field",
    "unique",
]

_SHOWN = 80  # characters of a value from the file that a message quotes
_LARGEST = 1e300

_Value = TypeVar("_Value")


def read_json(path: Path) -> object:
    """Value of a JSON file.

    Raises
    ------
    InputError
        If it is not JSON; NaN and infinity are not.
    OSError
        If it cannot be read.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def shown(value: object) -> str:
    """A value for a message: ASCII, on one line and short."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def json_object(value: object, where: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object, not {shown(value)}")
    return value


def json_list(value: object, where: str, *, least: int = 0) -> list[Any]:
    """The value, which must be a list of at least so many elements."""
    if not isinstance(value, list) or len(value) < least:
        elements = f" of at least {least} element{'s' * (least > 1)}" if least else ""
        raise InputError(f"{where}: must be a list{elements}, not {shown(value)}")
    return value


def text_field(table: Mapping[str, Any], key: str, where: str) -> str:
    """A text that is not empty."""
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field {key!r}: must be a text, not {shown(value)}")
    return value


def count_field(table: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    """An integer from `least` up, below 2**63."""
    value = table.get(key)
    if type(value) is not int or not least <= value < 1 << 63:
        problem = f"must be an integer from {least} up, not {shown(value)}"
        raise InputError(f"{where}: field {key!r}: {problem}")
    return value


def number_field(
    table: Mapping[str, Any], key: str, where: str, most: float = _LARGEST, least: float = 0.0
) -> float:
    """A finite number in [least, most]."""
    value = table.get(key)
    if value is None:
        raise InputError(f"{where}: field {key!r} is missing")
    if type(value) not in (int, float) or not least <= value <= most or not isfinite(value):
        problem = f"must be a number from {least:g} to {most:g}, not {shown(value)}"
        raise InputError(f"{where}: field {key!r}: {problem}")
    return float(value)


def optional(
    field: Callable[..., _Value], table: Mapping[str, Any], key: str, where: str, *limits: float
) -> _Value | None:
    """What one of the functions above gives, or None where the field is null or missing."""
    return None if table.get(key) is None else field(table, key, where, *limits)


def unique(name: str, known: Mapping[str, object], where: str) -> str:
    """The value of a field ``name``, which must not be known yet."""
    if name in known:
        raise InputError(f"{where}: field 'name': {shown(name)} is given twice")
    return name
