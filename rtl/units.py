"""The hardware units by name, each built from a parsed format."""

from typing import Any

from amaranth.lib import data, wiring

from golden.errors import InputError
from golden.notation import QuantFormat
from rtl.float_decoder import FloatDecoder
from rtl.hif_to_float import HifToFloat
from rtl.layouts import BFLOAT16, FLOAT32
from rtl.lut_decoder import LutDecoder

__all__ = ["FLOAT_LAYOUTS", "UNITS", "build_unit", "configuration_name"]

UNITS = ("lut_decoder", "hif_to_float", "float_decoder")
"""Units that can be exported."""

FLOAT_LAYOUTS: dict[str, data.StructLayout] = {"float32": FLOAT32, "bfloat16": BFLOAT16}
"""Output formats of the units that end in floating point."""


def build_unit(
    unit: str, fmt: QuantFormat, *, lanes: int, output: str = "float32"
) -> wiring.Component:
    """Make one configuration of a unit.

    Parameters
    ----------
    unit : str
        One of :data:`UNITS`.
    fmt : QuantFormat
        A codebook format; it gives index width, block size, LUT entry format and scale word.
    lanes : int
        Weights per beat.
    output : str
        Key of :data:`FLOAT_LAYOUTS`; ``lut_decoder`` ignores it.

    Raises
    ------
    InputError
        If there is no such unit or output, or the hardware cannot take the format or lane count.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: units are {', '.join(UNITS)}")
    if output not in FLOAT_LAYOUTS:
        raise InputError(f"unknown output {output!r}: outputs are {', '.join(FLOAT_LAYOUTS)}")
    if not fmt.codebooks:
        raise InputError(f"{fmt.name} has no lookup table; the decoder takes codebook formats")
    if fmt.row_scale:
        raise InputError(f"{fmt.name}: the decoder has no row scales yet")
    common: dict[str, Any] = {
        "lanes": lanes,
        "block_size": fmt.block_size,
        "hif": fmt.hif,
        "word": fmt.word,
    }
    floating: dict[str, Any] = {"float_layout": FLOAT_LAYOUTS[output]}
    try:
        if unit == "lut_decoder":
            return LutDecoder(index_bits=fmt.index_bits, **common)
        if unit == "hif_to_float":
            return HifToFloat(**common, **floating)
        return FloatDecoder(index_bits=fmt.index_bits, **common, **floating)
    except ValueError as error:
        raise InputError(f"{unit} for {fmt.name}: {error}") from None


def configuration_name(unit: str, fmt: QuantFormat, *, lanes: int, output: str = "float32") -> str:
    """Module and file name of a configuration: every parameter that shapes the hardware.

    Codebook names do not: LUT contents are loaded at run time. ``m`` before the scale marks a
    metabit.
    """
    metabit = "m" if fmt.word.metabit_bits else ""
    parts = [unit, f"{lanes}x{fmt.index_bits}", f"g{fmt.block_size}", fmt.hif.name.lower()]
    parts.append(metabit + fmt.word.scale.name.lower())
    if unit != "lut_decoder":
        parts.append(output)
    return "_".join(parts)
