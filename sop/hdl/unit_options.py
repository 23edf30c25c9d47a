"""Options of commands that shape hardware units: which units take them, and what they stand for."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from golden.activations import (
    DEFAULT_ACTIVATION_FORMAT,
    ActivationFormat,
    parse_activation_format,
)
from golden.errors import InputError
from golden.float_input import SOURCES
from rtl.products import DEFAULT_MULTIPLIER, MULTIPLIERS
from rtl.units import Options, unit_record

__all__ = [
    "FloatSourceOption",
    "MultiplierOption",
    "SlotsOption",
    "TileActivationsOption",
    "activations_option",
    "checked_options",
]

FloatSourceOption = Annotated[
    str | None,
    typer.Option(help=f"Floats to convert: {', '.join(SOURCES)}.", show_default=Options.source),
]
TileActivationsOption = Annotated[
    str | None,
    typer.Option(
        help="Format of the activations of a tile, such as INT8^32sBF16.",
        show_default=DEFAULT_ACTIVATION_FORMAT,
    ),
]
MultiplierOption = Annotated[
    str | None,
    typer.Option(
        help=f"Multipliers of a tile: {', '.join(MULTIPLIERS)}.", show_default=DEFAULT_MULTIPLIER
    ),
]

SlotsOption = Annotated[
    int | None,
    typer.Option(
        help="Most input channels of a tile that have corrections, a power of two.",
        show_default=str(Options.slots),
    ),
]


def checked_options(units: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that were given, ``activations`` parsed.

    Parameters
    ----------
    units : sequence of str
        What the command works on.
    given : mapping of str to Any
        Values by option, named as in :attr:`rtl.units.Unit.takes`; None where it was left out.

    Raises
    ------
    InputError
        If there is no such unit, an option was given that none of them takes, or activations are
        left in float.
    """
    present = {name: value for name, value in given.items() if value is not None}
    records = [unit_record(unit) for unit in units]
    for name in present:
        if not any(name in record.takes for record in records):
            takes = [f"{unit.name}: {_spelled(unit.takes)}" for unit in records]
            raise InputError(f"--{name} is for other units; {'; '.join(takes)}")
    if "activations" in present:
        present["activations"] = activations_option(present["activations"])
    return present


def _spelled(options: Sequence[str]) -> str:
    return ", ".join(f"--{option}" for option in options)


def activations_option(name: str) -> ActivationFormat:
    """Format of ``--activations``; raises InputError if it is none, or leaves them in float."""
    fmt = parse_activation_format(name)
    if fmt is None:
        raise InputError(f"--activations {name}: a tile multiplies quantized ones")
    return fmt
