"""What is known of a hardware unit, and the options that shape one."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amaranth.lib import data, wiring

from golden.activations import (
    DEFAULT_ACTIVATION_FORMAT,
    ActivationFormat,
    parse_activation_format,
)
from golden.errors import InputError
from golden.float_input import SOURCES
from golden.notation import QuantFormat
from rtl.identity import format_part
from rtl.layouts import BFLOAT16, FLOAT32
from rtl.lookup import DEFAULT_LOOKUP, LOOKUPS
from rtl.modes import Modes
from rtl.products import DEFAULT_MULTIPLIER

__all__ = ["CODES", "FLOAT_LAYOUTS", "ONE_BEAT", "Options", "Unit", "shortened"]

FLOAT_LAYOUTS: dict[str, data.StructLayout] = {"float32": FLOAT32, "bfloat16": BFLOAT16}
"""Output formats of the units that end in floating point."""

CODES = "codes"
"""Output of units that can end before floating point: HIF codes and scales."""

ONE_BEAT = "one beat per clock"
"""Throughput of most units."""


def _default_activations() -> ActivationFormat:
    fmt = parse_activation_format(DEFAULT_ACTIVATION_FORMAT)
    assert fmt is not None
    return fmt


@dataclass(frozen=True)
class Options:
    """Everything that can shape a unit, with defaults; each unit takes some of it.

    Parameters
    ----------
    formats : tuple of QuantFormat
        What the hardware decodes or multiplies; of several formats each tensor chooses one.
        ``float_to_hif`` takes their format of LUT entries.
    lanes : int
        Weights per beat.
    output : str
        One of :func:`outputs_of`.
    source : str
        Key of :data:`golden.float_input.SOURCES`.
    shift : int, optional
        Power of two that :class:`rtl.float_to_hif.FloatToHif` multiplies by; without it the default
        of its formats.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.
    rows, columns : int
        Rows of weights and columns of activations.
    activations : ActivationFormat
    multiplier : str
        One of :data:`rtl.products.MULTIPLIERS`.
    slots : int
        Most input channels of a tile that have corrections.
    """

    formats: tuple[QuantFormat, ...]
    lanes: int = 64
    output: str = "float32"
    source: str = "BF16"
    shift: int | None = None
    lookup: str = DEFAULT_LOOKUP
    rows: int = 16
    columns: int = 16
    activations: ActivationFormat = field(default_factory=_default_activations)
    multiplier: str = DEFAULT_MULTIPLIER
    slots: int = 64

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)


@dataclass(frozen=True, eq=False)
class Unit:
    """What everybody has to know about one hardware unit.

    Parameters
    ----------
    name : str
        On the command line, and first part of the name of its module.
    component : type of wiring.Component
    takes : tuple of str
        Options of the command line that shape it, in the order in which they are explained:
        ``format`` and ``hif`` are :attr:`Options.formats`, the others fields of that name. They
        make the name of its module, too.
    streams : mapping of str to str
        Kind of payload of each stream, as :data:`sop.hdl.datasheet_text.FIELDS` has them; none for
        a unit with buses.
    latency : int, optional
        Clocks from a beat in to the same beat out while nothing stalls; the benches assert it.
        None if it is not fixed.
    rounding : int
        Clocks more if ``bfloat16`` comes out.
    throughput : str
    outputs : tuple of str
        Outputs to choose from; empty where there is only one.
    compares_lookups : bool
        It is the lookup and little else, so structures of the lookup are compared in it.
    arguments : callable, optional
        Arguments of the component; without it those of the options that it takes.
    module_name : callable, optional
        Name of its module; without it one of the options that it takes.
    parts : callable, optional
        Parts whose resources are counted apart: regular expressions of the names of their
        registers, as :func:`sop.hdl.netlist_parts.cells_by_part` takes them.
    """

    name: str
    component: type[wiring.Component]
    takes: tuple[str, ...]
    streams: Mapping[str, str]
    latency: int | None
    rounding: int = 0
    throughput: str = ONE_BEAT
    outputs: tuple[str, ...] = ()
    compares_lookups: bool = False
    arguments: Callable[[Options], dict[str, Any]] | None = None
    module_name: Callable[[Options], str] | None = None
    parts: Callable[[Options], dict[str, str]] | None = None

    def clocks(self, output: str = "float32") -> int:
        """Latency with an output of :attr:`outputs`, of a unit that has one."""
        assert self.latency is not None, f"{self.name} has no fixed latency"
        return self.latency + (self.rounding if output == "bfloat16" else 0)

    def build(self, options: Options) -> wiring.Component:
        """The component.

        Raises
        ------
        InputError
            If there is no such output, source or lookup, or the hardware cannot take the options.
        """
        outputs = self.outputs or (*FLOAT_LAYOUTS, CODES)
        if options.output not in outputs:
            raise InputError(f"unknown output {options.output!r}: outputs are {', '.join(outputs)}")
        if options.source not in SOURCES:
            raise InputError(f"unknown source {options.source!r}: sources are {', '.join(SOURCES)}")
        if options.lookup not in LOOKUPS:
            raise InputError(
                f"unknown lookup {options.lookup!r}: structures are {', '.join(LOOKUPS)}"
            )
        try:
            return self.component(**(self.arguments or self._arguments)(options))
        except ValueError as error:
            names = ", ".join(fmt.name for fmt in options.formats)
            if "activations" in self.takes:
                names += f" and {options.activations.name}"
            raise InputError(f"{self.name} for {names}: {error}") from None

    def module(self, options: Options) -> str:
        """Name of the module: every option that the unit takes."""
        if self.module_name is not None:
            return self.module_name(options)
        parts = [self.name, str(options.lanes)]
        if "source" in self.takes:
            parts.append(options.source.lower())
        if "format" in self.takes:
            entries = sorted({fmt.hif.name.lower() for fmt in options.formats if fmt.codebooks})
            parts += [*entries, *map(format_part, options.formats)]
        elif "hif" in self.takes:
            parts.append(options.modes.hif.name.lower())
        if "source" in self.takes and options.shift is not None:
            parts.append(f"{'n' * (options.shift < 0)}{abs(options.shift)}")
        if "output" in self.takes:
            parts.append(options.output)
        if "lookup" in self.takes and options.lookup != DEFAULT_LOOKUP:
            parts.append(options.lookup)
        return shortened(parts, options.formats)

    def _arguments(self, options: Options) -> dict[str, Any]:
        known: dict[str, Callable[[], dict[str, Any]]] = {
            "lanes": lambda: {"lanes": options.lanes},
            "format": lambda: {"modes": options.modes},
            # Formats bring that of their LUT entries.
            "hif": lambda: {} if "format" in self.takes else {"hif": options.modes.hif},
            "output": lambda: {"float_layout": FLOAT_LAYOUTS.get(options.output)},
            "source": lambda: {"source": SOURCES[options.source], "shift": options.shift},
            "lookup": lambda: {"lookup": options.lookup},
        }
        return {name: value for option in self.takes for name, value in known[option]().items()}


# Of a module: file systems and tools limit names, and files and submodules add to it.
_LONGEST_NAME = 64


def shortened(parts: list[str], formats: tuple[QuantFormat, ...]) -> str:
    """The parts as a name; if it is too long, with number and hash in place of the formats.

    The description beside the Verilog spells them out.
    """
    name = "_".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    spelled = [format_part(fmt) for fmt in formats]
    place = parts.index(spelled[0])
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    others = [part for part in parts[place:] if part not in spelled]
    return "_".join([*parts[:place], f"{len(formats)}formats", digest, *others])
