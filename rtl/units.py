"""The hardware units by name, each built from parsed formats."""

from collections.abc import Sequence

from amaranth.lib import data, wiring

from golden.errors import InputError
from golden.notation import QuantFormat
from rtl.float_decoder import FloatDecoder
from rtl.hif_to_float import HifToFloat
from rtl.layouts import BFLOAT16, FLOAT32
from rtl.lut_decoder import LutDecoder
from rtl.modes import Modes
from rtl.sparse_decoder import SparseDecoder
from rtl.sparse_merge import SparseMerge

__all__ = ["FLOAT_LAYOUTS", "UNITS", "build_unit", "configuration_name"]

UNITS = ("lut_decoder", "hif_to_float", "float_decoder", "sparse_merge", "sparse_decoder")
"""Units that can be exported."""

FLOAT_LAYOUTS: dict[str, data.StructLayout] = {"float32": FLOAT32, "bfloat16": BFLOAT16}
"""Output formats of the units that end in floating point."""


def build_unit(
    unit: str, formats: QuantFormat | Sequence[QuantFormat], *, lanes: int, output: str = "float32"
) -> wiring.Component:
    """Make one configuration of a unit.

    Parameters
    ----------
    unit : str
        One of :data:`UNITS`.
    formats : QuantFormat or sequence of QuantFormat
        What the hardware decodes; of several formats each tensor chooses one.
    lanes : int
        Weights per beat.
    output : str
        Key of :data:`FLOAT_LAYOUTS`; ``lut_decoder`` ignores it.

    Raises
    ------
    InputError
        If there is no such unit or output, or the hardware cannot take the formats or lane count.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: units are {', '.join(UNITS)}")
    if output not in FLOAT_LAYOUTS:
        raise InputError(f"unknown output {output!r}: outputs are {', '.join(FLOAT_LAYOUTS)}")
    chosen = _as_tuple(formats)
    try:
        modes = Modes(chosen)
        if unit == "lut_decoder":
            return LutDecoder(lanes=lanes, modes=modes)
        if unit == "hif_to_float":
            return HifToFloat(lanes=lanes, modes=modes, float_layout=FLOAT_LAYOUTS[output])
        if unit == "sparse_merge":
            return SparseMerge(lanes=lanes, float_layout=FLOAT_LAYOUTS[output])
        unit_class = FloatDecoder if unit == "float_decoder" else SparseDecoder
        return unit_class(lanes=lanes, modes=modes, float_layout=FLOAT_LAYOUTS[output])
    except ValueError as error:
        names = ", ".join(fmt.name for fmt in chosen)
        raise InputError(f"{unit} for {names}: {error}") from None


def configuration_name(
    unit: str, formats: QuantFormat | Sequence[QuantFormat], *, lanes: int, output: str = "float32"
) -> str:
    """Module and file name of a configuration: every parameter that shapes the hardware.

    Codebook names do not: LUT contents are loaded at run time. Before the scale ``r`` marks a row
    scale and ``m`` a metabit.
    """
    chosen = _as_tuple(formats)
    parts = [unit, str(lanes)]
    if unit != "sparse_merge":  # which works on floats of any origin
        hif = sorted({fmt.hif.name.lower() for fmt in chosen if fmt.codebooks})
        parts.extend([*hif, *(_format_part(fmt) for fmt in chosen)])
    if unit != "lut_decoder":
        parts.append(output)
    return "_".join(parts)


def _format_part(fmt: QuantFormat) -> str:
    element = fmt.atom.name.lower() if fmt.atom else f"lut{fmt.index_bits}"
    marks = "r" * fmt.row_scale + "m" * fmt.word.metabit_bits
    return f"{element}g{fmt.block_size}{marks}{fmt.word.scale.name.lower()}"


def _as_tuple(formats: QuantFormat | Sequence[QuantFormat]) -> tuple[QuantFormat, ...]:
    return (formats,) if isinstance(formats, QuantFormat) else tuple(formats)
