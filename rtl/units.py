"""The hardware units, a record each, and what is built from a record and parsed formats."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
from rtl.float_decoder import FloatDecoder
from rtl.float_to_hif import FloatToHif
from rtl.hif_to_float import HifToFloat
from rtl.identity import format_part
from rtl.layouts import BFLOAT16, FLOAT32
from rtl.lookup import DEFAULT_LOOKUP, LOOKUPS
from rtl.lut_decoder import LutDecoder
from rtl.lut_tile import LATENCY as LUT_TILE_LATENCY
from rtl.lut_tile import LutTile
from rtl.modes import Modes
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sop_tile import LATENCY as TILE_LATENCY
from rtl.sop_tile import SopTile
from rtl.sparse_decoder import SparseDecoder
from rtl.sparse_merge import SparseMerge
from rtl.tile_units import TILE_UNIT, tile_name, tile_parameters
from rtl.verilog import to_verilog

__all__ = [
    "CODES",
    "FLOAT_DECODER",
    "FLOAT_LAYOUTS",
    "FLOAT_TO_HIF",
    "HIF_TO_FLOAT",
    "LUT_DECODER",
    "LUT_TILE",
    "SOP_DECODER_AXI",
    "SOP_TILE",
    "SPARSE_DECODER",
    "SPARSE_MERGE",
    "UNITS",
    "Options",
    "Unit",
    "build_unit",
    "configuration_name",
    "latency_of",
    "options_of",
    "outputs_of",
    "record_verilog",
    "unit_record",
    "unit_verilog",
]

FLOAT_LAYOUTS: dict[str, data.StructLayout] = {"float32": FLOAT32, "bfloat16": BFLOAT16}
"""Output formats of the units that end in floating point."""

CODES = "codes"
"""Output of units that can end before floating point: HIF codes and scales."""

_ONE_BEAT = "one beat per clock"
_MERGED = "one beat per clock; a beat with several corrections takes a clock for each"


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
    throughput: str = _ONE_BEAT
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
        return _shortened(parts, options.formats)

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


_ADDER = ("partial_0", "partial_1", "partial_2")  # registers of :mod:`rtl.parts.float_adder`


def _tile_parts(options: Options) -> dict[str, str]:
    # A name of :mod:`rtl.parts` that the tile has, too, ends in a number behind a dollar sign.
    of_adder = [r"partial_\d\$\d+", *_ADDER[options.rows * options.columns :]]
    return {
        "integer products": r"partial_\d+",
        "second register": r"block_\d+_0",
        "scale units": r"unit_\d+_[a-z]+_0|product_\d(\$\d+)?|result(\$\d+)?",
        "accumulators": "|".join(
            [*of_adder, r"normalized(\$\d+)?|\$signal(\$\d+)?|overflow(\$\d+)?|unit_\d+_\d+"]
        ),
    }


def _weights_of_tile(options: Options) -> QuantFormat:
    if len(options.formats) != 1:
        raise InputError(f"takes one format, not {len(options.formats)}")
    return options.formats[0]


def _tile_arguments(options: Options) -> dict[str, Any]:
    return {
        "rows": options.rows,
        "columns": options.columns,
        "multiplier": options.multiplier,
        **tile_parameters(_weights_of_tile(options), options.activations),
    }


def _tile_name(options: Options) -> str:
    return tile_name(
        _weights_of_tile(options), options.activations,
        rows=options.rows, columns=options.columns, multiplier=options.multiplier,
    )  # fmt: skip


def _lut_tile_arguments(options: Options) -> dict[str, Any]:
    return {
        "rows": options.rows,
        "columns": options.columns,
        "modes": options.modes,
        "lookup": options.lookup,
        "activation": options.activations.element,
        "activation_scale": options.activations.scale,
        "multiplier": options.multiplier,
    }


def _lut_tile_name(options: Options) -> str:
    activations = options.activations
    parts = [
        f"lut_tile_{options.rows}x{options.columns}",
        *sorted({fmt.hif.name.lower() for fmt in options.formats if fmt.codebooks}),
        *map(format_part, options.formats),
        f"{activations.element.name}{activations.scale.name}".lower(),
        options.lookup,
        options.multiplier,
    ]
    return _shortened(parts, options.formats)


_DECODED = ("lanes", "format", "hif")
_FLOATS = tuple(FLOAT_LAYOUTS)

LUT_DECODER = Unit(
    "lut_decoder", LutDecoder, (*_DECODED, "lookup"),
    {"i": "index_beat", "i_lut": "lut_write", "o": "hif_beat"},
    latency=1, compares_lookups=True,
)  # fmt: skip
HIF_TO_FLOAT = Unit(
    "hif_to_float", HifToFloat, (*_DECODED, "output"), {"i": "hif_beat", "o": "float_beat"},
    latency=4, outputs=_FLOATS,
)  # fmt: skip
FLOAT_TO_HIF = Unit(
    "float_to_hif", FloatToHif, ("lanes", "hif", "source"),
    {"i": "source_beat", "o": "converted_beat"}, latency=4,
)  # fmt: skip
FLOAT_DECODER = Unit(
    "float_decoder", FloatDecoder, (*_DECODED, "output", "lookup"),
    {"i": "index_beat", "i_lut": "lut_write", "o": "float_beat"},
    latency=1 + 4,  # those before it
    outputs=_FLOATS,
)  # fmt: skip
SPARSE_MERGE = Unit(
    "sparse_merge", SparseMerge, ("lanes", "output"),
    {"i": "dense_beat", "i_entry": "correction", "o": "merged_beat"},
    latency=7, rounding=1, throughput=_MERGED, outputs=_FLOATS,
)  # fmt: skip
SPARSE_DECODER = Unit(
    "sparse_decoder", SparseDecoder, (*_DECODED, "output", "lookup"),
    {"i": "index_beat", "i_lut": "lut_write", "i_entry": "correction", "o": "merged_beat"},
    latency=1 + 4 + 1 + 7,  # with a register before the merger
    rounding=1, throughput=_MERGED, outputs=_FLOATS,
)  # fmt: skip
SOP_DECODER_AXI = Unit(
    "sop_decoder_axi", SopDecoderAxi, (*_DECODED, "output", "lookup"), {},
    latency=None, throughput="one beat per clock; see there", outputs=(*_FLOATS, CODES),
)  # fmt: skip
SOP_TILE = Unit(
    TILE_UNIT, SopTile, ("rows", "columns", "format", "hif", "activations", "multiplier"),
    {"i": "tile_weights", "i_activation": "tile_activations", "o": "tile_outputs"},
    latency=TILE_LATENCY,
    arguments=_tile_arguments, module_name=_tile_name, parts=_tile_parts,
)  # fmt: skip

LUT_TILE = Unit(
    "lut_tile", LutTile,
    ("rows", "columns", "format", "hif", "lookup", "activations", "multiplier"),
    {
        "i": "tile_indices", "i_lut": "lut_write", "i_activation": "tile_activations",
        "o": "tile_outputs",
    },
    latency=LUT_TILE_LATENCY, arguments=_lut_tile_arguments, module_name=_lut_tile_name,
)  # fmt: skip
"""Not among :data:`UNITS`: it cannot be exported yet."""

UNITS: dict[str, Unit] = {
    unit.name: unit
    for unit in (
        LUT_DECODER, HIF_TO_FLOAT, FLOAT_TO_HIF, FLOAT_DECODER, SPARSE_MERGE, SPARSE_DECODER,
        SOP_DECODER_AXI, SOP_TILE,
    )
}  # fmt: skip
"""Units that can be exported, by name."""


def unit_record(name: str) -> Unit:
    """The record of a unit; raises InputError if there is none of that name."""
    if name not in UNITS:
        raise InputError(f"unknown unit {name!r}: units are {', '.join(UNITS)}")
    return UNITS[name]


def latency_of(unit: str, output: str = "float32") -> int:
    """Clocks from a beat in to the same beat out, while nothing stalls.

    Parameters
    ----------
    unit : str
        One of :data:`UNITS` whose latency is fixed.
    output : str
        One of :func:`outputs_of`; ignored by units that have only one.
    """
    return UNITS[unit].clocks(output)


def outputs_of(unit: str) -> tuple[str, ...]:
    """Outputs that make a difference to a unit; none where it has only one."""
    return UNITS[unit].outputs


def build_unit(
    unit: str, formats: QuantFormat | Sequence[QuantFormat], **options: Any
) -> wiring.Component:
    """Make one configuration of a unit.

    Parameters
    ----------
    unit : str
        One of :data:`UNITS`.
    formats : QuantFormat or sequence of QuantFormat
        As :attr:`Options.formats`.
    **options
        Other fields of :class:`Options`; a unit ignores what it does not take.

    Raises
    ------
    InputError
        If there is no such unit, output, source or lookup, or the hardware cannot take the options.
    """
    return unit_record(unit).build(options_of(formats, **options))


def configuration_name(
    unit: str, formats: QuantFormat | Sequence[QuantFormat], **options: Any
) -> str:
    """Module and file name of a configuration: every option that the unit takes.

    Codebook names do not count: LUT contents are loaded at run time. Before the scale ``r`` marks a
    row scale and ``m`` a metabit; ``n`` before a number marks a negative one. The default structure
    of the lookup is not named.

    Parameters
    ----------
    unit, formats, **options
        As :func:`build_unit`.
    """
    return UNITS[unit].module(options_of(formats, **options))


# Of a module: file systems and tools limit names, and files and submodules add to it.
_LONGEST_NAME = 64


def _shortened(parts: list[str], formats: tuple[QuantFormat, ...]) -> str:
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


def options_of(formats: QuantFormat | Sequence[QuantFormat], **options: Any) -> Options:
    """Options as the functions here take them, with defaults for those that are not given."""
    chosen = (formats,) if isinstance(formats, QuantFormat) else tuple(formats)
    return Options(chosen, **options)


def unit_verilog(unit: str, formats: tuple[QuantFormat, ...], **options: Any) -> tuple[str, str]:
    """Module name and Verilog of a configuration, made once per process.

    Parameters
    ----------
    unit, formats, **options
        As :func:`build_unit`.
    """
    return record_verilog(unit_record(unit), options_of(formats, **options))


@lru_cache(maxsize=64)
def record_verilog(unit: Unit, options: Options) -> tuple[str, str]:
    """The same of a record, also of one that is not exported."""
    name = unit.module(options)
    return name, to_verilog(unit.build(options), name)
