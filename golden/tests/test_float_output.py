"""The hardware's HIF-to-float step against exact fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from golden.float_output import element_to_float
from golden.formats import (
    ATOMS,
    BF16,
    HIF7,
    HIF8,
    HIF8T,
    HifFormat,
    Kind,
    scale_format,
)


def exact_value(
    hif: HifFormat, hif_code: int, scale_name: str, scale_code: int, exponent: int
) -> tuple[Fraction, bool]:
    """Exact product and whether a code is reserved, from the definitions in words."""
    scale = scale_format(scale_name)
    shift = hif_code >> hif.significand_bits
    reserved = shift >= hif.shifts
    value = Fraction(hif.significand(hif_code)) * 2 ** min(shift, hif.shifts - 1)
    decoded = scale.decode(scale_code)
    if decoded.kind is Kind.RESERVED:
        mantissa = scale_code & 0x7F
        sign = -1 if scale_code >> 15 else 1
        return value * sign * (128 + mantissa) * 2 ** (255 - 127 - 7 + exponent), True
    return value * decoded.value * Fraction(2) ** exponent, reserved


def expected(value: Fraction, output: str) -> tuple[int, bool, bool]:
    """Bits, overflow and underflow of an exact value."""
    precision = {"float32": 24, "bfloat16": 8}[output]
    if value == 0:
        return 0, False, False
    # The exponent e with 2**e <= |value| < 2**(e + 1).
    e = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** e > abs(value):
        e -= 1
    unit = Fraction(2) ** (e - precision + 1)
    rounded = round(abs(value) / unit) * unit  # Python rounds ties of a Fraction to even
    if rounded >= Fraction(2) ** 128:
        result = np.float32(np.inf)
    elif rounded < Fraction(1, 2**126):
        return 0, False, True
    else:
        result = np.float32(float(rounded))
    bits = int(np.float32(result if value > 0 else -result).view(np.uint32))
    return bits >> (16 if output == "bfloat16" else 0), bool(np.isinf(result)), False


@pytest.mark.parametrize("output", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hif", "scale_name"),
    [(HIF7, "UE4M4"), (HIF8, "S1E5M5"), (HIF8T, "UE5M7"), (HIF7, "UE8M0"), (HIF8, "BF16")],
    ids=lambda value: getattr(value, "name", value),
)
def test_equals_exact_fractions(hif: HifFormat, scale_name: str, output: str) -> None:
    scale, rng = scale_format(scale_name), np.random.default_rng(3)
    count = 3000
    codes = rng.integers(1 << hif.width, size=count, dtype=np.uint8)
    scales = rng.integers(1 << scale.width, size=count, dtype=np.uint16)
    exponents = rng.integers(-128, 128, size=count)
    got = element_to_float(codes, scales, exponents, element=hif, scale=scale, output=output)
    assert got.bits.dtype == (np.uint16 if output == "bfloat16" else np.uint32)
    for i in range(count):
        value, reserved = exact_value(
            hif, int(codes[i]), scale_name, int(scales[i]), int(exponents[i])
        )
        where = f"seed 3, item {i}: {codes[i]:#x} x {scales[i]:#x} x 2**{exponents[i]}"
        bits, overflow, underflow = expected(value, output)
        assert int(got.bits[i]) == bits, where
        flags = bool(got.reserved[i]), bool(got.overflow[i]), bool(got.underflow[i])
        # A reserved HIF shift and a reserved scale exponent may meet; either raises the flag.
        shift_reserved = int(codes[i]) >> hif.significand_bits >= hif.shifts
        assert flags == (reserved or shift_reserved, overflow, underflow), where
    assert got.overflow.any() == (scale_name in ("UE8M0", "BF16", "S1E5M5", "UE5M7", "UE4M4"))
    assert got.underflow.any()


def test_bfloat16_is_float32_rounded() -> None:
    codes, scales = np.meshgrid(np.arange(128, dtype=np.uint8), np.arange(4096, dtype=np.uint16))
    fmt = scale_format("UE5M7")
    wide = element_to_float(codes, scales, -9, element=HIF7, scale=fmt)
    narrow = element_to_float(codes, scales, -9, element=HIF7, scale=fmt, output="bfloat16")
    rounded = wide.bits.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(narrow.bits, rounded)
    assert not narrow.overflow.any()


def test_reserved_codes_are_flagged_and_defined() -> None:
    # HIF8 shift 7 counts as 4; a BF16 exponent of 255 counts as 2**128.
    got = element_to_float(
        np.array([7 << 5 | 3, 3]), np.array([0x3F80, 0x7F80]), 0, element=HIF8, scale=BF16
    )
    assert got.reserved.tolist() == [True, True]
    assert got.bits[0] == np.float32(3 * 16).view(np.uint32)
    assert got.overflow.tolist() == [False, True]


@pytest.mark.parametrize("output", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(ATOMS))
def test_every_code_of_every_element_with_a_row_scale(name: str, output: str) -> None:
    element, scale, rng = ATOMS[name], scale_format("S1E2M4"), np.random.default_rng(5)
    codes = np.arange(1 << element.width, dtype=np.uint16)
    scales = rng.integers(1 << scale.width, size=codes.size, dtype=np.uint16)
    row_scales = rng.integers(1 << 16, size=codes.size, dtype=np.uint16)
    row_scales[:3] = [0, 0x8000, 0x0001]  # +0, -0, the smallest subnormal
    got = element_to_float(
        codes, scales, -2, element=element, scale=scale, row_scales=row_scales, output=output
    )
    for i, code in enumerate(codes.tolist()):
        parts = element.decode(code), scale.decode(int(scales[i])), BF16.decode(int(row_scales[i]))
        reserved = any(part.kind in (Kind.RESERVED, Kind.NAN) for part in parts)
        assert bool(got.reserved[i]) == reserved, (code, parts)
        if not reserved:
            value = parts[0].value * parts[1].value * parts[2].value / 4
            flags = bool(got.overflow[i]), bool(got.underflow[i])
            assert (int(got.bits[i]), *flags) == expected(value, output), (code, parts)


def test_reserved_codes_of_atoms_are_defined() -> None:
    one = np.array([0x3F80])
    nan = element_to_float(np.array([0xFF]), one, 0, element=ATOMS["E4M3"], scale=BF16)
    assert nan.bits.view(np.float32).tolist() == [-480.0]
    integer = element_to_float(np.array([0x80]), one, 0, element=ATOMS["INT8"], scale=BF16)
    assert integer.bits.tolist() == [0]
    assert nan.reserved.all()
    assert integer.reserved.all()
