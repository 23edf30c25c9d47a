"""Products of two elements as exact integers, and the structures that a multiplier can have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from amaranth.hdl import Mux, Value

from golden.formats import FloatFormat, HifFormat, IntFormat, NumberFormat
from rtl.parts.factor import code_factor

__all__ = ["DEFAULT_MULTIPLIER", "MULTIPLIERS", "Multiplier", "largest_integer"]


def _largest_significand(fmt: NumberFormat) -> int:
    if isinstance(fmt, HifFormat):
        return 1 << fmt.significand_bits - 1
    if isinstance(fmt, IntFormat):
        return (1 << fmt.bits - 1) - 1
    assert isinstance(fmt, FloatFormat)
    return (2 << fmt.mantissa_bits) - 1


def _highest_shift(fmt: NumberFormat) -> int:
    if isinstance(fmt, HifFormat):
        return fmt.shifts - 1
    # Exponent fields 0 and 1 mean the same; the highest may hold reserved codes, which count too.
    return (1 << fmt.exponent_bits) - 2 if isinstance(fmt, FloatFormat) else 0


def largest_integer(fmt: NumberFormat) -> int:
    """Largest magnitude of an element in units of its format, for any code."""
    return _largest_significand(fmt) << _highest_shift(fmt)


def _sign_and_magnitude(code: Value, fmt: NumberFormat) -> tuple[dict[str, Value], Value]:
    """Sign, significand, shift where the format has one; and whether the code is reserved."""
    factor = code_factor(code, fmt)
    fields = {"sign": factor.sign, "magnitude": factor.significand}
    if isinstance(fmt, FloatFormat):  # whose exponents count from 1
        fields["shift"] = (factor.exponent - 1)[: len(factor.exponent)]
    elif isinstance(fmt, HifFormat):
        fields["shift"] = factor.exponent
    return fields, factor.reserved


def _signed(code: Value, fmt: NumberFormat) -> tuple[dict[str, Value], Value]:
    """The same with a significand in two's complement."""
    fields, reserved = _sign_and_magnitude(code, fmt)
    sign, magnitude = fields.pop("sign"), fields.pop("magnitude")
    if isinstance(fmt, HifFormat):  # which is stored like that
        significand = code[: fmt.significand_bits]
    else:
        significand = Mux(sign, -magnitude, magnitude)[: len(magnitude) + 1]
    return {"significand": significand.as_signed(), **fields}, reserved


def _shifted(code: Value, fmt: NumberFormat) -> tuple[dict[str, Value], Value]:
    """The whole integer, in two's complement."""
    fields, reserved = _signed(code, fmt)
    integer = fields["significand"]
    if "shift" in fields:
        width = len(integer) + _highest_shift(fmt)
        integer = (integer << fields["shift"])[:width].as_signed()
    return {"integer": integer}, reserved


def _moved(product: Value, *operands: Mapping[str, Value]) -> Value:
    """A product of significands moved up by the sum of the shifts."""
    shifts = [operand["shift"] for operand in operands if "shift" in operand]
    return product << sum(shifts[1:], start=shifts[0]) if shifts else product


def _significands_first(weight: Mapping[str, Value], activation: Mapping[str, Value]) -> Value:
    return _moved(weight["significand"] * activation["significand"], weight, activation)


def _wide(weight: Mapping[str, Value], activation: Mapping[str, Value]) -> Value:
    return weight["integer"] * activation["integer"]


def _magnitudes(weight: Mapping[str, Value], activation: Mapping[str, Value]) -> Value:
    product = _moved(weight["magnitude"] * activation["magnitude"], weight, activation)
    return Mux(weight["sign"] ^ activation["sign"], -product, product)


@dataclass(frozen=True)
class Multiplier:
    """One structure: what is kept of an operand, and how two of them are multiplied.

    Parameters
    ----------
    operand : callable
        Takes a code and its format; gives the fields to keep, by name, and whether the code is
        reserved. It is needed once for each row and column of a tile.
    product : callable
        Takes the fields of a weight and of an activation; gives their product, signed. It is needed
        for each row and column together.
    """

    operand: Callable[[Value, NumberFormat], tuple[dict[str, Value], Value]]
    product: Callable[[Mapping[str, Value], Mapping[str, Value]], Value]


MULTIPLIERS = {
    "shift_product": Multiplier(_signed, _significands_first),
    "shift_operands": Multiplier(_shifted, _wide),
    "sign_magnitude": Multiplier(_sign_and_magnitude, _magnitudes),
}
"""Structures, which differ in cost only.

``shift_product`` multiplies significands and moves the product by both shifts; ``shift_operands``
moves each operand before, so that a wider multiplier needs no shift; ``sign_magnitude`` is the
first with a sign beside the magnitude.
"""

# Of HIF7 or HIF8T with INT8, and of INT8 with itself, the smallest in gates; of others nearly so.
DEFAULT_MULTIPLIER = "sign_magnitude"
