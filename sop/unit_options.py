"""Options of commands that shape hardware units: which units take them, and what they stand for."""

from collections.abc import Mapping, Sequence
from typing import Any

from golden.activations import ActivationFormat, parse_activation_format
from golden.errors import InputError
from rtl.units import unit_record

__all__ = ["activations_option", "checked_options"]


def checked_options(units: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that were given.

    Parameters
    ----------
    units : sequence of str
        What the command works on.
    given : mapping of str to Any
        Values by option, named as in :attr:`rtl.units.Unit.takes`; None where it was left out.

    Raises
    ------
    InputError
        If there is no such unit, or an option was given that none of them takes.
    """
    present = {name: value for name, value in given.items() if value is not None}
    records = [unit_record(unit) for unit in units]
    for name in present:
        if not any(name in record.takes for record in records):
            takes = [f"{unit.name}: {_spelled(unit.takes)}" for unit in records]
            raise InputError(f"--{name} is for other units; {'; '.join(takes)}")
    return present


def _spelled(options: Sequence[str]) -> str:
    return ", ".join(f"--{option}" for option in options)


def activations_option(name: str) -> ActivationFormat:
    """Format of ``--activations``; raises InputError if it is none, or leaves them in float."""
    fmt = parse_activation_format(name)
    if fmt is None:
        raise InputError(f"--activations {name}: a tile multiplies quantized ones")
    return fmt
