"""What a code of a number format multiplies with: sign, significand and exponent."""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Mux, Value

from golden.formats import FloatFormat, HifFormat, IntFormat, NumberFormat, Specials
from rtl.parts import float_fields

__all__ = ["Factor", "code_factor"]


@dataclass(frozen=True)
class Factor:
    """One factor of the product: ``(-1)**sign * significand * 2**exponent``, and its reserved flag.

    ``exponent`` is not negative; what it lacks is the constant ``offset``.
    """

    sign: Value
    significand: Value
    exponent: Value
    reserved: Value
    offset: int

    def times(self, other: "Factor") -> "Factor":
        """Product of two factors."""
        return Factor(
            self.sign ^ other.sign,
            self.significand * other.significand,
            self.exponent + other.exponent,
            self.reserved | other.reserved,
            self.offset + other.offset,
        )


def _float_factor(code: Value, fmt: FloatFormat) -> Factor:
    mantissa = code[: fmt.mantissa_bits]
    field = code[fmt.mantissa_bits : fmt.mantissa_bits + fmt.exponent_bits]
    reserved: Value = Const(0, 1)
    if fmt.specials is Specials.TOP_EXPONENT:
        reserved = field.all()
    elif fmt.specials is Specials.NAN_ALL_ONES:
        reserved = field.all() & mantissa.all()
    sign = code[-1] if fmt.signed else Const(0, 1)
    return Factor(
        sign,
        float_fields.significand(mantissa, field),
        float_fields.place(field),
        reserved,
        fmt.min_exponent - 1,
    )


def _hif_factor(code: Value, fmt: HifFormat) -> Factor:
    significand = code[: fmt.significand_bits].as_signed()
    negative = significand < 0
    shift, reserved = code[fmt.significand_bits :], Const(0, 1)
    if fmt.shifts < 1 << len(shift):
        reserved = shift >= fmt.shifts
        shift = Mux(reserved, fmt.shifts - 1, shift)
    # The magnitude of the lowest significand, 2**(bits - 1), fits that many bits unsigned.
    magnitude = Mux(negative, -significand, significand)[: fmt.significand_bits]
    return Factor(negative, magnitude, shift, reserved, 0)


def _integer_factor(code: Value, fmt: IntFormat) -> Factor:
    negative = code[-1]
    magnitude = Mux(negative, -code.as_signed(), code)[: fmt.bits - 1]
    return Factor(negative, magnitude, Const(0, 1), negative & ~code[:-1].any(), 0)


def code_factor(code: Value, fmt: NumberFormat) -> Factor:
    """Parts of a code; what lies above the format's width is ignored."""
    code = Cat(code, Const(0, fmt.width))[: fmt.width]
    if isinstance(fmt, HifFormat):
        return _hif_factor(code, fmt)
    if isinstance(fmt, IntFormat):
        return _integer_factor(code, fmt)
    assert isinstance(fmt, FloatFormat)
    return _float_factor(code, fmt)
