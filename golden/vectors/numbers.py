"""Vectors of number formats and codebooks: every code's value, and the code of every hard input."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import BLOCK_SIZES, FIXED_CODEBOOKS, fixed_levels, fixed_lut
from golden.convert import decode_array, encode_array
from golden.formats import (
    HIF_FORMATS,
    Decoded,
    FloatFormat,
    HifFormat,
    Kind,
    NumberFormat,
)
from golden.vectors.files import VectorFile, hex_lines, json_text, word_fields

__all__ = ["codebook_file", "encode_file", "has_value", "number_file"]

# Wider formats have their full tables in the exhaustive set only: BF16 alone is 5 MB.
_MAX_QUICK_WIDTH = 12


@lru_cache(maxsize=64)
def has_value(fmt: NumberFormat) -> NDArray[np.bool_]:
    """Say of every code whether it has a value (is neither NaN nor reserved); read-only."""
    kinds = [fmt.decode(code).kind for code in range(1 << fmt.width)]
    usable = np.array([kind not in (Kind.NAN, Kind.RESERVED) for kind in kinds])
    usable.setflags(write=False)
    return usable


def _covered_codes(fmt: NumberFormat, exhaustive: bool) -> list[int]:
    """Every code; of a wide format in a quick set the lowest, middle and highest binades."""
    codes = range(1 << fmt.width)
    if exhaustive or fmt.width <= _MAX_QUICK_WIDTH or not isinstance(fmt, FloatFormat):
        return list(codes)
    top = (1 << fmt.exponent_bits) - 1
    binades = {0, 1, 2, fmt.bias - 1, fmt.bias, fmt.bias + 1, top - 2, top - 1, top}
    return [code for code in codes if code >> fmt.mantissa_bits & top in binades]


def _definition(fmt: NumberFormat) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": fmt.name, "bits": fmt.width}
    if isinstance(fmt, FloatFormat):
        facts |= {
            "family": "float",
            "signed": fmt.signed,
            "exponent_bits": fmt.exponent_bits,
            "mantissa_bits": fmt.mantissa_bits,
            "bias": fmt.bias,
            "specials": fmt.specials.name.lower(),
        }
    elif isinstance(fmt, HifFormat):
        facts |= {
            "family": "hif",
            "significand_bits": fmt.significand_bits,
            "shifts": fmt.shifts,
        }
    else:
        facts["family"] = "integer"
    facts["fields"] = [
        {"name": name, "offset": fmt.field_offset(name), "width": width}
        for name, width in fmt.fields
    ]
    return facts


def _float32_of(decoded: Decoded) -> str | None:
    """Bit pattern of the exact value in float32, or None where float32 does not hold it."""
    if decoded.kind is Kind.ZERO:
        return "80000000" if decoded.sign else "00000000"
    value = np.float64(float(decoded.value))
    if value != 0 and abs(value) > np.finfo(np.float32).max:
        return None  # only 2**128 of UE8M0
    narrow = value.astype(np.float32)
    return f"{int(narrow.view(np.uint32)):08x}" if narrow == value else None


def _number_row(fmt: NumberFormat, code: int) -> list[Any]:
    decoded = fmt.decode(code)
    kind = decoded.kind.value
    if decoded.kind in (Kind.NAN, Kind.RESERVED):
        return [code, kind, None, None, None, None, None]
    canonical = fmt.canonical[decoded.value]
    value = [decoded.sign, decoded.significand, decoded.exponent]
    return [code, kind, *value, canonical, _float32_of(decoded)]


def number_file(fmt: NumberFormat, *, exhaustive: bool) -> VectorFile:
    """Definition of a number format, and the exact value of each code.

    Parameters
    ----------
    fmt : NumberFormat
    exhaustive : bool
        Every code also of formats wider than 12 bits.
    """
    codes = _covered_codes(fmt, exhaustive)
    rows = [_number_row(fmt, code) for code in codes]
    complete = len(codes) == 1 << fmt.width
    columns = ["code", "kind", "sign", "significand", "exponent", "canonical", "float32"]
    document = {**_definition(fmt), "complete": complete, "columns": columns, "rows": rows}
    return VectorFile(json_text(document), len(rows), {"complete": complete})


def _float32_only(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Those of the values that float32 holds exactly."""
    inside = values[np.abs(values) <= np.finfo(np.float32).max]
    narrow = inside.astype(np.float32)
    return narrow[narrow == inside]


def _with_neighbours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values and the float32 numbers right below and above each."""
    up, down = np.float32(np.inf), np.float32(-np.inf)
    return np.concatenate([values, np.nextafter(values, up), np.nextafter(values, down)])


def _hard_inputs(fmt: NumberFormat, exhaustive: bool) -> NDArray[np.uint32]:
    """Bit patterns of the float32 inputs on which encoders go wrong, ascending, each once."""
    covered = np.array(_covered_codes(fmt, exhaustive))
    values = decode_array(covered[has_value(fmt)[covered]], fmt)
    all_values = np.array([float(value) for value in fmt.canonical])
    below = np.isin(all_values[:-1], values)
    midpoints = ((all_values[:-1] + all_values[1:]) / 2)[below]
    ends = all_values[[0, -1]]
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    normal = np.finfo(np.float32).tiny
    special = np.array([0.0, smallest, normal, largest, np.inf], dtype=np.float32)
    inputs = [
        _float32_only(values),
        _with_neighbours(_float32_only(midpoints)),
        _with_neighbours(_float32_only(ends)),
        _float32_only(2 * ends),
        special,
        -special,
    ]
    return np.unique(np.concatenate(inputs).view(np.uint32))


def encode_file(fmt: NumberFormat, *, exhaustive: bool) -> VectorFile:
    """Codes of float32 inputs: values, midpoints and their neighbours, both ends, specials.

    Parameters
    ----------
    fmt : NumberFormat
    exhaustive : bool
        Every midpoint also of formats wider than 12 bits.
    """
    bits = _hard_inputs(fmt, exhaustive)
    codes = encode_array(bits.view(np.float32), fmt)
    code_width = 4 * -(-fmt.width // 4)
    facts = {"format": fmt.name, "word": word_fields(("float32", 32), ("code", code_width))}
    return VectorFile(hex_lines([(bits, 32), (codes, code_width)]), len(bits), facts)


def codebook_file() -> VectorFile:
    """Fixed codebooks for every block size on every HIF format: real levels, codes, integers."""
    codebooks = []
    for name in FIXED_CODEBOOKS:
        for block_size in BLOCK_SIZES:
            for hif in HIF_FORMATS.values():
                lut = fixed_lut(name, block_size, hif)
                codebooks.append(
                    {
                        "name": name,
                        "block_size": block_size,
                        "hif": hif.name,
                        "levels": [
                            level + 0.0 for level in fixed_levels(name, block_size)
                        ],  # no -0
                        "codes": list(lut.codes),
                        "values": lut.values.tolist(),
                    }
                )
    document = {"codebooks": codebooks}
    return VectorFile(json_text(document), len(codebooks))
