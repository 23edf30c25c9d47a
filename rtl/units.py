"""The hardware units by name, each built from parsed formats."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from amaranth.lib import data, wiring

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
from rtl.modes import Modes
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sparse_decoder import SparseDecoder
from rtl.sparse_merge import SparseMerge
from rtl.verilog import to_verilog

__all__ = [
    "CODES",
    "FLOAT_LAYOUTS",
    "LOOKUP_UNITS",
    "UNITS",
    "build_unit",
    "configuration_name",
    "latency_of",
    "outputs_of",
    "unit_verilog",
]

UNITS = (
    "lut_decoder",
    "hif_to_float",
    "float_to_hif",
    "float_decoder",
    "sparse_merge",
    "sparse_decoder",
    "sop_decoder_axi",
)
"""Units that can be exported."""

FLOAT_LAYOUTS: dict[str, data.StructLayout] = {"float32": FLOAT32, "bfloat16": BFLOAT16}
"""Output formats of the units that end in floating point."""

CODES = "codes"
"""Output of units that can end before floating point: HIF codes and scales."""

_CODE_UNITS = ("lut_decoder", "float_to_hif")  # which have no other output

LOOKUP_UNITS = ("lut_decoder", "float_decoder", "sparse_decoder", "sop_decoder_axi")
"""Units that hold LUTs."""


def outputs_of(unit: str) -> tuple[str, ...]:
    """Outputs that make a difference to a unit; none where it has only one."""
    if unit in _CODE_UNITS:
        return ()
    return (*FLOAT_LAYOUTS, CODES) if unit == "sop_decoder_axi" else tuple(FLOAT_LAYOUTS)


# Clocks from input to output while nothing stalls; the benches assert them.
_LATENCIES = {
    "lut_decoder": 1, "hif_to_float": 4, "float_to_hif": 4, "sparse_merge": 7, "register_slice": 1,
}  # fmt: skip
_PARTS = {
    "float_decoder": ("lut_decoder", "hif_to_float"),
    "sparse_decoder": ("lut_decoder", "hif_to_float", "register_slice", "sparse_merge"),
}


def latency_of(unit: str, output: str = "float32") -> int:
    """Clocks from a beat in to the same beat out, while nothing stalls.

    Parameters
    ----------
    unit : str
        One of :data:`UNITS` but ``sop_decoder_axi``, which has no fixed latency.
    output : str
        One of :func:`outputs_of`; ignored by units that have only one.
    """
    parts = _PARTS.get(unit, (unit,))
    rounds = parts[-1] == "sparse_merge" and output == "bfloat16"  # in a clock of its own
    return sum(_LATENCIES[part] for part in parts) + rounds


def build_unit(
    unit: str,
    formats: QuantFormat | Sequence[QuantFormat],
    *,
    lanes: int,
    output: str = "float32",
    source: str = "BF16",
    lookup: str = DEFAULT_LOOKUP,
) -> wiring.Component:
    """Make one configuration of a unit.

    Parameters
    ----------
    unit : str
        One of :data:`UNITS`.
    formats : QuantFormat or sequence of QuantFormat
        What the hardware decodes; of several formats each tensor chooses one. ``float_to_hif``
        takes their format of LUT entries, ``sparse_merge`` nothing.
    lanes : int
        Weights per beat.
    output : str
        One of :func:`outputs_of`; units that have only one ignore it.
    source : str
        Key of :data:`golden.float_input.SOURCES`, for ``float_to_hif``.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`; units without LUTs ignore it.

    Raises
    ------
    InputError
        If there is no such unit, output, source or lookup, or the hardware cannot take the formats
        or the number of lanes.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: units are {', '.join(UNITS)}")
    outputs = outputs_of(unit) or (*FLOAT_LAYOUTS, CODES)
    if output not in outputs:
        raise InputError(f"unknown output {output!r}: outputs are {', '.join(outputs)}")
    if source not in SOURCES:
        raise InputError(f"unknown source {source!r}: sources are {', '.join(SOURCES)}")
    if lookup not in LOOKUPS:
        raise InputError(f"unknown lookup {lookup!r}: structures are {', '.join(LOOKUPS)}")
    chosen = _as_tuple(formats)
    try:
        modes = Modes(chosen)
        if unit == "lut_decoder":
            return LutDecoder(lanes=lanes, modes=modes, lookup=lookup)
        if unit == "float_to_hif":
            return FloatToHif(lanes=lanes, source=SOURCES[source], hif=modes.hif)
        if unit == "sop_decoder_axi":
            layout = FLOAT_LAYOUTS.get(output)
            return SopDecoderAxi(lanes=lanes, modes=modes, float_layout=layout, lookup=lookup)
        if unit == "hif_to_float":
            return HifToFloat(lanes=lanes, modes=modes, float_layout=FLOAT_LAYOUTS[output])
        if unit == "sparse_merge":
            return SparseMerge(lanes=lanes, float_layout=FLOAT_LAYOUTS[output])
        unit_class = FloatDecoder if unit == "float_decoder" else SparseDecoder
        return unit_class(
            lanes=lanes, modes=modes, float_layout=FLOAT_LAYOUTS[output], lookup=lookup
        )
    except ValueError as error:
        names = ", ".join(fmt.name for fmt in chosen)
        raise InputError(f"{unit} for {names}: {error}") from None


def configuration_name(
    unit: str,
    formats: QuantFormat | Sequence[QuantFormat],
    *,
    lanes: int,
    output: str = "float32",
    source: str = "BF16",
    lookup: str = DEFAULT_LOOKUP,
) -> str:
    """Module and file name of a configuration: every parameter that shapes the hardware.

    Codebook names do not: LUT contents are loaded at run time. Before the scale ``r`` marks a row
    scale and ``m`` a metabit. The default structure of the lookup is not named.
    """
    chosen = _as_tuple(formats)
    parts = [unit, str(lanes)]
    if unit == "float_to_hif":
        return "_".join([*parts, source.lower(), Modes(chosen).hif.name.lower()])
    if unit != "sparse_merge":  # which works on floats of any origin
        hif = sorted({fmt.hif.name.lower() for fmt in chosen if fmt.codebooks})
        parts.extend([*hif, *(format_part(fmt) for fmt in chosen)])
    if outputs_of(unit):
        parts.append(output)
    if unit in LOOKUP_UNITS and lookup != DEFAULT_LOOKUP:
        parts.append(lookup)
    return _shortened(parts, chosen)


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


def _as_tuple(formats: QuantFormat | Sequence[QuantFormat]) -> tuple[QuantFormat, ...]:
    return (formats,) if isinstance(formats, QuantFormat) else tuple(formats)


@lru_cache(maxsize=64)
def unit_verilog(
    unit: str,
    formats: tuple[QuantFormat, ...],
    *,
    lanes: int,
    output: str,
    lookup: str = DEFAULT_LOOKUP,
) -> tuple[str, str]:
    """Module name and Verilog of a configuration, made once per process.

    Parameters
    ----------
    unit, formats, lanes, output, lookup
        As :func:`build_unit`.
    """
    name = configuration_name(unit, formats, lanes=lanes, output=output, lookup=lookup)
    component = build_unit(unit, formats, lanes=lanes, output=output, lookup=lookup)
    return name, to_verilog(component, name)
