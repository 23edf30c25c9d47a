"""The hardware units, a record each, and what is built from a record and parsed formats."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from amaranth.lib import wiring

from golden.errors import InputError
from golden.notation import QuantFormat
from rtl.float_decoder import FloatDecoder
from rtl.float_to_hif import FloatToHif
from rtl.hif_to_float import HifToFloat
from rtl.lut_decoder import LutDecoder
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sparse_decoder import SparseDecoder
from rtl.sparse_merge import SparseMerge
from rtl.tile_units import LUT_TILE, MATMUL_TILE, SOP_TILE, TILE_EPILOGUE
from rtl.unit_record import CODES, FLOAT_LAYOUTS, Options, Unit
from rtl.verilog import to_verilog

__all__ = [
    "CODES",
    "FLOAT_DECODER",
    "FLOAT_LAYOUTS",
    "FLOAT_TO_HIF",
    "HIF_TO_FLOAT",
    "LUT_DECODER",
    "LUT_TILE",
    "MATMUL_TILE",
    "SOP_DECODER_AXI",
    "SOP_TILE",
    "SPARSE_DECODER",
    "SPARSE_MERGE",
    "TILE_EPILOGUE",
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

_MERGED = "one beat per clock; a beat with several corrections takes a clock for each"

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
UNITS: dict[str, Unit] = {
    unit.name: unit
    for unit in (
        LUT_DECODER, HIF_TO_FLOAT, FLOAT_TO_HIF, FLOAT_DECODER, SPARSE_MERGE, SPARSE_DECODER,
        SOP_DECODER_AXI, SOP_TILE, LUT_TILE, TILE_EPILOGUE, MATMUL_TILE,
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
