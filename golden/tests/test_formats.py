"""Scalar number formats against their formula, published tables and independent packages."""

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import pytest
from gfloat.types import Domain, FormatInfo

from golden.errors import InputError
from golden.formats import (
    ATOMS,
    BF16,
    E2M3,
    E4M3,
    FP32,
    HIF7,
    HIF8,
    HIF8T,
    HIF_FORMATS,
    INT4,
    INT8,
    UE8M0,
    Decoded,
    FloatFormat,
    HifFormat,
    Kind,
    NumberFormat,
    Specials,
    scale_format,
)
from golden.tests.some_formats import ALL, SCALE_NAMES, each_format

FLOATS = {name: fmt for name, fmt in ALL.items() if isinstance(fmt, FloatFormat)}
# 65536 codes: walked with a stride that is coprime to every field width.
STRIDE = {"BF16": 37}


each_float = pytest.mark.parametrize("fmt", FLOATS.values(), ids=FLOATS.keys())
each_hif = pytest.mark.parametrize("fmt", HIF_FORMATS.values(), ids=HIF_FORMATS.keys())


def codes_of(fmt: NumberFormat) -> range:
    return range(0, 1 << fmt.width, STRIDE.get(fmt.name, 1))


def has_value(decoded: Decoded) -> bool:
    return decoded.kind not in (Kind.NAN, Kind.RESERVED)


@cache
def values_of(fmt: NumberFormat) -> list[Fraction]:
    """Ascending distinct values, from decoding every code."""
    decoded = [fmt.decode(code) for code in range(1 << fmt.width)]
    return sorted({d.value for d in decoded if has_value(d)})


# Width, bias, largest value, smallest positive value. The first four rows: OCP MX 1.0 tables 3 to 5
# (E2M3, E3M2, E2M1) and OCP OFP8 1.0 table 1 (E4M3). BF16 as published by Google, UE8M0 as E8M0 of
# OCP MX but for its codes 0 and 255. The rest by hand from 2**(2**e - 1 - bias) * (2 - 2**-m) and
# 2**(1 - bias - m).
PUBLISHED: dict[str, tuple[int, int, Fraction | float, Fraction | float]] = {
    "E2M1": (4, 1, 6.0, 0.5),
    "E2M3": (6, 1, 7.5, 0.125),
    "E3M2": (6, 3, 28.0, 0.0625),
    "E4M3": (8, 7, 448.0, 2**-9),
    "E3M4": (8, 3, 31.0, 2**-6),
    "E4M5": (10, 7, 504.0, 2**-11),
    "E5M6": (12, 15, 130048.0, 2**-20),
    "UE4M4": (8, 7, 496.0, 2**-10),
    "UE4M3": (7, 7, 480.0, 2**-9),
    "UE5M3": (8, 15, 122880.0, 2**-17),
    "UE5M5": (10, 15, 129024.0, 2**-19),
    "UE5M7": (12, 15, 130560.0, 2**-21),
    "S1E5M5": (11, 15, 129024.0, 2**-19),
    "S1E4M3": (8, 7, 480.0, 2**-9),
    "S1E2M4": (7, 1, 7.75, 2**-4),
    "UE8M0": (8, 127, Fraction(2) ** 128, Fraction(2) ** -126),
    "BF16": (16, 127, (2 - 2**-7) * 2.0**127, 2.0**-133),
}


@each_float
def test_float_format_has_its_published_width_bias_and_range(fmt: FloatFormat) -> None:
    width, bias, largest, smallest = PUBLISHED[fmt.name]
    assert (fmt.width, fmt.bias) == (width, bias)
    assert fmt.max_value == largest
    assert fmt.min_value == (-Fraction(largest) if fmt.signed else 0)
    assert min(value for value in fmt.canonical if value > 0) == smallest


@each_float
def test_last_places_at_both_ends(fmt: FloatFormat) -> None:
    top, below = sorted(fmt.canonical)[-1], sorted(fmt.canonical)[-2]
    if fmt.mantissa_bits:
        assert top - below == Fraction(2) ** fmt.max_exponent
        assert min(v for v in fmt.canonical if v > 0) == Fraction(2) ** fmt.min_exponent
    else:
        assert top == Fraction(2) ** fmt.max_exponent
        assert min(v for v in fmt.canonical if v > 0) == Fraction(2) ** fmt.min_exponent


@each_float
def test_decode_is_the_textbook_formula_on_the_bit_string(fmt: FloatFormat) -> None:
    """IEEE 754 section 3.4 with hidden bit, applied to the code written as text."""
    for code in codes_of(fmt):
        text = format(code, f"0{fmt.width}b")
        sign, text = (text[0], text[1:]) if fmt.signed else ("0", text)
        exponent, mantissa = text[: fmt.exponent_bits], text[fmt.exponent_bits :]
        decoded = fmt.decode(code)
        assert decoded.sign == int(sign)
        if fmt is E4M3 and text == "1111111":
            assert decoded.kind is Kind.NAN
            continue
        if fmt is BF16 and "0" not in exponent:
            assert decoded.kind is Kind.RESERVED
            continue
        fraction = Fraction(int(mantissa or "0", 2), 2 ** len(mantissa))
        hidden, power = (1, int(exponent, 2)) if "1" in exponent else (0, 1)
        value = (-1) ** int(sign) * (hidden + fraction) * Fraction(2) ** (power - fmt.bias)
        assert decoded.value == value, f"code {code:#x}"
        wanted_kind = Kind.NORMAL if hidden else Kind.SUBNORMAL if fraction else Kind.ZERO
        assert decoded.kind is wanted_kind
        # The significand is the stored integer with the hidden bit, not a reduced fraction.
        assert decoded.significand == (hidden << len(mantissa)) + int(mantissa or "0", 2)


@each_format
def test_code_of_a_decoded_value_is_canonical(fmt: NumberFormat) -> None:
    lowest: dict[Fraction, int] = {}
    for code in reversed(range(1 << fmt.width)):
        decoded = fmt.decode(code)
        if has_value(decoded):
            lowest[decoded.value] = code
    for code in codes_of(fmt):
        decoded = fmt.decode(code)
        if has_value(decoded):
            assert fmt.encode(decoded.value) == lowest[decoded.value], f"code {code:#x}"
    assert fmt.canonical == lowest
    assert list(fmt.canonical) == sorted(lowest)


@each_format
def test_ends_and_count_of_values(fmt: NumberFormat) -> None:
    values = values_of(fmt)
    assert (fmt.min_value, fmt.max_value) == (values[0], values[-1])
    assert fmt.distinct_values == len(values)


@each_format
def test_ties_go_to_the_even_neighbour_and_all_else_to_the_nearer(fmt: NumberFormat) -> None:
    values = values_of(fmt)
    for low, high in list(pairwise(values))[:: STRIDE.get(fmt.name, 1)]:
        low_code, high_code = fmt.encode(low), fmt.encode(high)
        # The tie rule is only a rule if exactly one neighbour has a zero lowest bit.
        assert low_code % 2 != high_code % 2, f"between {low} and {high}"
        middle = (low + high) / 2
        nudge = (high - low) / 2**60
        assert fmt.encode(middle) == (low_code if low_code % 2 == 0 else high_code)
        assert fmt.encode(middle - nudge) == low_code
        assert fmt.encode(middle + nudge) == high_code


@each_format
def test_values_beyond_the_ends_saturate(fmt: NumberFormat) -> None:
    highest, lowest = fmt.encode(fmt.max_value), fmt.encode(fmt.min_value)
    for beyond in (fmt.max_value + Fraction(1, 3), 2 * fmt.max_value, 1e300, math.inf):
        assert fmt.encode(beyond) == highest
    for beyond in (fmt.min_value - Fraction(1, 3), 2 * fmt.min_value - 1, -1e300, -math.inf):
        assert fmt.encode(beyond) == lowest
    assert fmt.decode(highest).value == fmt.max_value
    assert fmt.decode(lowest).value == fmt.min_value


@each_format
def test_nan_has_no_code(fmt: NumberFormat) -> None:
    with pytest.raises(InputError, match=f"NaN has no code in {fmt.name}"):
        fmt.encode(math.nan)


@each_format
def test_fields_cover_the_code_from_the_lowest_bit(fmt: NumberFormat) -> None:
    offset = 0
    for name, width in fmt.fields:
        assert fmt.field_offset(name) == offset
        offset += width
    assert offset == fmt.width


def test_field_names_and_widths() -> None:
    assert E2M3.fields == (("mantissa", 3), ("exponent", 2), ("sign", 1))
    assert scale_format("UE4M4").fields == (("mantissa", 4), ("exponent", 4))
    assert HIF7.fields == (("significand", 5), ("shift", 2))
    assert HIF8.fields == (("significand", 5), ("shift", 3))
    assert HIF8T.fields == (("significand", 6), ("shift", 2))
    assert INT8.fields == (("integer", 8),)
    assert E2M3.field_offset("sign") == 5


ML_DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
}


def ml_dtypes_values(fmt: NumberFormat) -> list[float]:
    """Every code of a format as ml_dtypes reads it."""
    codes = np.arange(1 << fmt.width, dtype=np.uint16 if fmt.width > 8 else np.uint8)
    with np.errstate(invalid="ignore"):  # bfloat16's signalling NaNs
        return [float(value) for value in codes.view(ML_DTYPES[fmt.name]).astype(np.float64)]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_decode_equals_ml_dtypes(name: str) -> None:
    fmt = ALL[name]
    values = ml_dtypes_values(fmt)
    for code in codes_of(fmt):
        decoded = fmt.decode(code)
        if has_value(decoded):
            assert decoded.value == values[code], f"code {code:#x}"
            assert math.copysign(1.0, values[code]) == (-1.0) ** decoded.sign
        else:
            assert not np.isfinite(values[code]), f"code {code:#x}"


def test_ue8m0_decode_equals_ml_dtypes_where_both_have_powers_of_two() -> None:
    """Code 0 is zero here and 2**-127 there; code 255 is 2**128 here and NaN there."""
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    for code in range(1, 255):
        assert UE8M0.decode(code).value == values[code]
    assert UE8M0.decode(0) == Decoded(0, 0, -126, Kind.ZERO)
    assert UE8M0.decode(255).value == 2**128


def test_int4_decode_equals_ml_dtypes_but_for_the_reserved_code() -> None:
    values = np.arange(16, dtype=np.uint8).astype(ml_dtypes.int4).astype(np.int64)
    for code in range(16):
        if code == 8:
            assert values[code] == -8
            assert INT4.decode(code).kind is Kind.RESERVED
        else:
            assert INT4.decode(code).value == values[code]


def test_int8_is_symmetric_twos_complement() -> None:
    for code in range(256):
        if code == 0x80:
            assert INT8.decode(code).kind is Kind.RESERVED
        else:
            assert INT8.decode(code).value == int(np.uint8(code).view(np.int8))
    assert INT8.min_value == -127
    assert INT8.max_value == 127
    assert INT4.canonical[Fraction(-7)] == 0b1001


@pytest.mark.parametrize("name", ["E2M1", "E2M3", "E3M2", "E4M3"])
@pytest.mark.parametrize("seed", [11])
def test_encode_equals_ml_dtypes_inside_the_range(name: str, seed: int) -> None:
    """Up to the largest value: ml_dtypes turns E4M3 overflow into NaN, this project saturates.

    E4M3 is compared up to just below 464, where both still round down to 448.
    """
    fmt = ALL[name]
    limit = 463.9 if name == "E4M3" else float(fmt.max_value)
    rng = np.random.default_rng(seed)
    values = np.concatenate(
        [
            rng.uniform(-limit, limit, 2000),
            rng.uniform(-limit, limit, 2000) * 2.0 ** rng.integers(-12, 0, 2000),
        ]
    ).astype(np.float32)
    wanted = values.astype(ML_DTYPES[name]).astype(np.float64)
    for value, expected in zip(values.tolist(), wanted.tolist(), strict=True):
        assert fmt.decode(fmt.encode(value)).value == expected, f"{value}, seed {seed}"


def gfloat_info(fmt: FloatFormat) -> FormatInfo:
    """The same format for gfloat, from sign and field widths only."""
    return FormatInfo(
        fmt.name,
        int(fmt.signed) + fmt.exponent_bits + fmt.mantissa_bits,
        fmt.mantissa_bits + 1,
        bias=2 ** (fmt.exponent_bits - 1) - 1,
        is_signed=fmt.signed,
        domain=Domain.Finite,
        has_nz=fmt.signed,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


GFLOAT_NAMES = (
    "E2M1", "E2M3", "E3M4", "E4M5", "E5M6",
    "UE4M4", "UE4M3", "UE5M3", "UE5M5", "UE5M7", "S1E5M5", "S1E4M3", "S1E2M4",
)  # fmt: skip


@pytest.mark.parametrize("name", GFLOAT_NAMES)
def test_decode_equals_gfloat(name: str) -> None:
    fmt = FLOATS[name]
    info = gfloat_info(fmt)
    for code in range(1 << fmt.width):
        assert fmt.decode(code).value == gfloat.decode_float(info, code).fval, f"code {code:#x}"


@pytest.mark.parametrize("name", GFLOAT_NAMES)
@pytest.mark.parametrize("seed", [12])
def test_encode_equals_gfloat(name: str, seed: int) -> None:
    fmt = FLOATS[name]
    info = gfloat_info(fmt)
    rng = np.random.default_rng(seed)
    values = [float(v) for v in fmt.canonical]
    picked = rng.integers(0, len(values) - 1, 400)
    middles = [(values[i] + values[i + 1]) / 2 for i in picked]
    limit = float(fmt.max_value)
    spread = (
        rng.uniform(-1.2 if fmt.signed else 0, 1.2, 600) * limit * 2.0 ** rng.uniform(-15, 0, 600)
    )
    for value in [*middles, *spread.tolist()]:
        wanted = gfloat.round_float(info, value, sat=True)
        assert fmt.decode(fmt.encode(value)).value == wanted, f"{value}, seed {seed}"


@pytest.mark.parametrize(
    ("fmt", "significand_bits", "shifts", "count", "lowest", "highest"),
    [(HIF7, 5, 4, 80, -128, 120), (HIF8, 5, 5, 96, -256, 240), (HIF8T, 6, 4, 160, -256, 248)],
    ids=["HIF7", "HIF8", "HIF8T"],
)
def test_hif_is_a_twos_complement_significand_times_a_power_of_two(
    fmt: HifFormat, significand_bits: int, shifts: int, count: int, lowest: int, highest: int
) -> None:
    """Counts and ranges are the paper's (80, 96, 160 values)."""
    half = 2 ** (significand_bits - 1)
    values = {m * 2**e for m in range(-half, half) for e in range(shifts)}
    assert set(fmt.canonical) == values
    assert fmt.distinct_values == len(values) == count
    assert (min(values), max(values)) == (lowest, highest)
    assert fmt.min_value == lowest
    assert fmt.max_value == highest
    assert fmt.full_scale == -lowest
    for m in range(-half, half):
        for e in range(shifts):
            code = e << significand_bits | m & (2 * half - 1)
            decoded = fmt.decode(code)
            assert decoded == Decoded(int(m < 0), abs(m), e, Kind.NORMAL if m else Kind.ZERO)
            assert fmt.significand(code) == m


@each_hif
def test_canonical_hif_code_has_the_smallest_shift(fmt: HifFormat) -> None:
    half = 2 ** (fmt.significand_bits - 1)
    for value, code in fmt.canonical.items():
        shift = next(
            e for e in range(fmt.shifts) if value % 2**e == 0 and -half <= value / 2**e < half
        )
        assert code >> fmt.significand_bits == shift
        assert fmt.significand(code) * 2**shift == value


@each_hif
def test_hif_ties_go_to_the_even_significand(fmt: HifFormat) -> None:
    values = sorted(fmt.canonical)
    for low, high in pairwise(values):
        chosen = fmt.encode((low + high) / 2)
        assert fmt.significand(chosen) % 2 == 0


def test_hif7_holds_every_e2m3_value_times_eight() -> None:
    assert {value * 8 for value in E2M3.canonical} <= set(HIF7.canonical)


def test_reserved_hif8_shifts_have_no_value() -> None:
    for code in range(5 << 5, 8 << 5):
        decoded = HIF8.decode(code)
        assert decoded.kind is Kind.RESERVED
        with pytest.raises(InputError, match="a reserved code has no value"):
            _ = decoded.value
    assert HIF8.decode((5 << 5) - 1).kind is Kind.NORMAL


def test_e4m3_nan_has_no_value() -> None:
    for code in (0x7F, 0xFF):
        with pytest.raises(InputError, match="a nan code has no value"):
            _ = E4M3.decode(code).value


def test_atoms_are_named_by_their_key_and_only_e4m3_has_a_nan() -> None:
    assert list(ATOMS) == [
        "E2M1", "E2M3", "E3M2", "E4M3", "E3M4", "E4M5", "E5M6", "INT4", "INT8",
        "HIF7", "HIF8", "HIF8T",
    ]  # fmt: skip
    for name, fmt in ATOMS.items():
        assert fmt.name == name
        kinds = [fmt.decode(code).kind for code in range(1 << fmt.width)]
        assert kinds.count(Kind.NAN) == (2 if name == "E4M3" else 0)


@pytest.mark.parametrize("name", SCALE_NAMES)
def test_scale_format_by_name(name: str) -> None:
    fmt = scale_format(name)
    assert fmt.name == name
    assert fmt.signed == (not name.startswith("U"))
    assert fmt.decode(0).value == 0
    assert fmt.specials is (Specials.TOP_EXPONENT if name == "BF16" else Specials.NONE)
    assert fmt == scale_format(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("E4M4", "unknown scale format 'E4M4'"),
        ("UE4", "unknown scale format 'UE4'"),
        ("S2E4M3", "unknown scale format"),
        ("UE4M4 ", "unknown scale format"),
        ("xUE4M4", "unknown scale format"),
        ("FP16", "expected UE<e>M<m>, S1E<e>M<m> or BF16"),
        ("UE1M4", "exponent of 1 bits, must be 2 to 8"),
        ("UE9M0", "exponent of 9 bits, must be 2 to 8"),
        ("UE4M8", "mantissa of 8 bits, at most 7"),
        ("UE8M1", "8-bit exponents exist only as UE8M0 and BF16"),
        ("S1E8M0", "8-bit exponents exist only as UE8M0 and BF16"),
    ],
)
def test_impossible_scale_formats(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scale_format(name)


@pytest.mark.parametrize("name", ["UE04M4", "UE4M04", "S1E05M5"])
def test_a_scale_format_has_one_spelling(name: str) -> None:
    """Equal formats compare equal by name, so a second spelling would be a second format."""
    with pytest.raises(InputError, match=name):
        scale_format(name)


def test_widest_and_narrowest_scale_fields_are_accepted() -> None:
    assert scale_format("UE2M7").width == 9
    assert scale_format("S1E7M0").width == 8


@pytest.mark.parametrize(("fmt", "dtype"), [(FP32, np.float32), (BF16, ml_dtypes.bfloat16)])
def test_wide_floats_are_those_of_numpy(fmt: FloatFormat, dtype: Any) -> None:
    """Fields, ends of the range and the exact value of a code, against a second definition."""
    finfo: Any = ml_dtypes.finfo  # not annotated
    facts, width = finfo(dtype), fmt.width
    assert (width, fmt.mantissa_bits, fmt.exponent_bits) == (facts.bits, facts.nmant, facts.nexp)
    limit = Fraction(2) ** (fmt.bias + 1)
    assert fmt.decode(fmt.exponent_mask - 1).value == Fraction(float(facts.max)) < limit
    assert fmt.decode(1).value == Fraction(2) ** fmt.min_exponent
    codes = np.random.default_rng(31).integers(1 << width, size=2000).astype(f"u{width // 8}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = codes.view(dtype).astype(np.float64)
    finite = np.isfinite(values)
    assert np.array_equal(fmt.has_top_exponent(codes), ~finite)
    for code, value in zip(codes[finite].tolist(), values[finite].tolist(), strict=True):
        assert fmt.decode(code).value == Fraction(value)
    exponents = np.frexp(np.abs(values[finite]))[1] - 1 + fmt.bias
    expected = np.where(values[finite] == 0, 0, np.maximum(exponents, 0))
    assert np.array_equal(fmt.exponent_field(codes[finite]), expected)
