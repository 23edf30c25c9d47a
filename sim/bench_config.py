"""Configurations of benches; needs no simulator."""

import json
import os
from dataclasses import dataclass
from typing import Any, TypeVar

from golden.float_input import SOURCES, checked_shift
from golden.formats import HIF_FORMATS, FloatFormat, HifFormat
from golden.notation import QuantFormat, parse_format
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import Modes
from rtl.units import FLOAT_TO_HIF, configuration_name

__all__ = ["BenchConfig", "Config", "ConverterConfig", "parse_formats"]

_VARIABLE = "SOP_BENCH"

Self = TypeVar("Self", bound="Config")


def parse_formats(names: str, hif_name: str) -> tuple[QuantFormat, ...]:
    """Formats separated by spaces, and the name of their format of LUT entries, as formats.

    Raises
    ------
    InputError
        If a format is none.
    """
    hif = HIF_FORMATS[hif_name]
    return tuple(parse_format(name, hif) for name in names.split())


class Config:
    """What all configurations have: a unit is built from :attr:`formats` and :attr:`options`.

    Fields are numbers and texts, so that a configuration is passed to its bench as JSON.

    Attributes
    ----------
    seed : int
        Seed of the traffic.
    """

    seed: int

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """Formats that the unit is built for."""
        raise NotImplementedError  # each configuration spells them in fields of its own

    @property
    def options(self) -> dict[str, Any]:
        """Other fields of :class:`rtl.units.Options`."""
        raise NotImplementedError  # each unit takes others

    def as_json(self) -> str:
        """All fields."""
        return json.dumps(vars(self))

    def as_environment(self) -> dict[str, str]:
        """Environment of the simulation."""
        return {_VARIABLE: self.as_json()}

    @classmethod
    def from_environment(cls: type[Self]) -> Self:
        """Configuration of the running simulation."""
        return cls(**json.loads(os.environ[_VARIABLE]))


@dataclass(frozen=True)
class BenchConfig(Config):
    """One configuration of a unit and of its traffic.

    Parameters
    ----------
    format_name, hif_name : str
        Quantization formats, separated by spaces, and format of LUT entries.
    lanes : int
    output : str
        ``"float32"`` or ``"bfloat16"``.
    stalls : str
        One of :data:`sim.stalls.STALL_MODES`.
    seed : int
        Seed of the traffic and of the stalls.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.
    """

    format_name: str
    hif_name: str = "HIF7"
    lanes: int = 16
    output: str = "float32"
    stalls: str = "none"
    seed: int = 1
    lookup: str = DEFAULT_LOOKUP

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """The parsed formats."""
        return parse_formats(self.format_name, self.hif_name)

    @property
    def options(self) -> dict[str, Any]:
        """Lanes, output and lookup."""
        return {"lanes": self.lanes, "output": self.output, "lookup": self.lookup}

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)


@dataclass(frozen=True)
class ConverterConfig(Config):
    """One configuration of :class:`rtl.float_to_hif.FloatToHif` and of its traffic.

    Parameters
    ----------
    source_name, hif_name : str
        Keys of :data:`golden.float_input.SOURCES` and of :data:`golden.formats.HIF_FORMATS`.
    lanes : int
    shift : int, optional
        The default of the formats if not given.
    stalls : str
        One of :data:`sim.stalls.STALL_MODES`.
    seed : int
        Seed of the traffic and of the stalls.
    """

    source_name: str
    hif_name: str = "HIF7"
    lanes: int = 16
    shift: int | None = None
    stalls: str = "none"
    seed: int = 1

    @property
    def source(self) -> FloatFormat:
        """Format of the input."""
        return SOURCES[self.source_name]

    @property
    def hif(self) -> HifFormat:
        """Format of the output."""
        return HIF_FORMATS[self.hif_name]

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """A format with these LUT entries; nothing else of it counts."""
        return (parse_format("NF4sUE4M4", self.hif),)

    @property
    def options(self) -> dict[str, Any]:
        """Lanes, source and shift."""
        shift = checked_shift(self.source, self.hif, self.shift)
        return {"lanes": self.lanes, "source": self.source_name, "shift": shift}

    @property
    def name(self) -> str:
        """Module name."""
        return configuration_name(FLOAT_TO_HIF.name, self.formats, **self.options)
