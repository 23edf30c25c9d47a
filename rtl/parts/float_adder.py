"""Addition of two float32 in five clocks."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data

from rtl.layouts import FLOAT32
from rtl.parts import float_fields
from rtl.parts.float_fields import SIGNIFICAND, TOP_EXPONENT
from rtl.parts.leading_zeros import leading_zeros
from rtl.parts.pipeline import register, stepped
from rtl.parts.rounding import nearest_even
from rtl.parts.shifting import shift_down

__all__ = ["LATENCY", "add_floats"]

LATENCY = 5
"""Clocks with ``advance`` from the operands to their sum."""

EXTRA = 3  # guard, round and sticky bit: enough for correct rounding of a sum
WIDTH = SIGNIFICAND + EXTRA

# Operands by magnitude. `exponent` is the field of the larger one, at least 1: field 0 has the
# exponent of field 1. `distance` is how far the smaller one has to move down.
_ORDERED = data.StructLayout(
    {
        "sign": 1, "exponent": 8, "infinite": 1, "subtract": 1,
        "large": SIGNIFICAND, "small": SIGNIFICAND, "distance": 8,
    }
)  # fmt: skip
_ALIGNED = data.StructLayout(
    {
        "sign": 1, "exponent": 8, "infinite": 1, "subtract": 1,
        "large": SIGNIFICAND, "small": WIDTH,
    }
)  # fmt: skip
# The sum has room for a carry. The highest bit of `probe` ends up on top: the sum's own, or that
# of as many places as the exponent can go down.
_SUM = data.StructLayout(
    {"sign": 1, "exponent": 8, "infinite": 1, "sum": WIDTH + 1, "probe": WIDTH + 1}
)
# `value` starts with the hidden bit, which only a subnormal number lacks.
_NORMALIZED = data.StructLayout(
    {"sign": 1, "exponent": 8, "infinite": 1, "value": WIDTH + 1, "shift": 5}
)


def _order(m: Module, first: Value, second: Value) -> Value:
    """Step 1: the operands by magnitude, ``_ORDERED``."""

    def exponent(value: Value) -> Value:
        return float_fields.place(value.exponent)

    def significand(value: Value) -> Value:
        return float_fields.significand(value.mantissa, value.exponent)

    swap = Signal()
    m.d.comb += swap.eq(second.as_value()[:31] > first.as_value()[:31])
    ahead, behind = Signal(8), Signal(8)
    m.d.comb += [
        ahead.eq(exponent(first) - exponent(second)),
        behind.eq(exponent(second) - exponent(first)),
    ]
    result = Signal(_ORDERED)
    m.d.comb += [
        # Of two infinities the first one is the larger, so it stays whatever its sign.
        result.sign.eq(Mux(swap, second.sign, first.sign)),
        result.exponent.eq(Mux(swap, exponent(second), exponent(first))),
        result.infinite.eq(first.exponent.all() | second.exponent.all()),
        result.subtract.eq(first.sign ^ second.sign),
        result.large.eq(Mux(swap, significand(second), significand(first))),
        result.small.eq(Mux(swap, significand(first), significand(second))),
        result.distance.eq(Mux(swap, behind, ahead)),
    ]
    return result


def _align(m: Module, ordered: Value) -> Value:
    """Step 2: move the smaller significand down; what falls out is collected in its last bit."""
    extended = Cat(Const(0, EXTRA), ordered.small)
    # Moved by 32 or more, it is so little that it changes no sum, whichever way that is rounded.
    value, sticky, far = shift_down(m, extended, Const(0, 1), ordered.distance)
    result = Signal(_ALIGNED)
    m.d.comb += [
        *(
            result[name].eq(ordered[name])
            for name in ("sign", "exponent", "infinite", "subtract", "large")
        ),
        result.small.eq(Mux(far, 0, Cat(value[0] | sticky, value[1:]))),
    ]
    return result


def _add(m: Module, aligned: Value) -> Value:
    """Step 3: the sum of the significands."""
    large = Cat(Const(0, EXTRA), aligned.large)
    result = Signal(_SUM)
    # An exponent field of 1 allows one place, from the carry to the hidden bit.
    marker = Cat(aligned.exponent == WIDTH - bit for bit in range(WIDTH))
    m.d.comb += [
        *(result[name].eq(aligned[name]) for name in ("sign", "exponent", "infinite")),
        result.sum.eq(Mux(aligned.subtract, large - aligned.small, large + aligned.small)),
        result.probe.eq(result.sum | marker),
    ]
    return result


def _normalize(m: Module, total: Value) -> Value:
    """Step 4: move the sum up until its top bit is set or the exponent can go no lower."""
    _, zeros = leading_zeros(total.probe)
    value = total.sum
    for bit in reversed(range(5)):
        step = 1 << bit
        shifted = Signal(WIDTH + 1, name=f"shifted_{step}")
        m.d.comb += shifted.eq(Mux(zeros[bit], value << step, value))
        value = shifted
    result = Signal(_NORMALIZED)
    m.d.comb += [
        *(result[name].eq(total[name]) for name in ("sign", "exponent", "infinite")),
        result.value.eq(value),
        result.shift.eq(zeros),
    ]
    return result


def _round(m: Module, normalized: Value) -> tuple[Value, Value]:
    """Step 5: round and pack; gives a ``FLOAT32`` and the overflow flag."""
    value = normalized.value
    rounded = Signal(SIGNIFICAND + 1)
    kept, up = nearest_even(value, EXTRA + 1)
    m.d.comb += rounded.eq(kept + up)
    # Both outcomes are worked out beside the addition, whose carry then chooses.
    fields, too_large = [], []
    for carry in range(2):
        exponent = Signal(9, name=f"exponent_{carry}")
        # The carry is one place above the hidden bit.
        m.d.comb += exponent.eq(normalized.exponent + (1 + carry) - normalized.shift)
        fields.append(exponent[:8])
        too_large.append(value[-1] & (exponent >= TOP_EXPONENT))
    carry = rounded[SIGNIFICAND]
    overflow = Signal()
    result = Signal(FLOAT32)
    m.d.comb += [
        overflow.eq(Mux(carry, too_large[1], too_large[0]) | normalized.infinite),
        # A sum of zero is +0; infinities may have cancelled each other's significands.
        result.sign.eq(normalized.sign & (value.any() | normalized.infinite)),
        result.exponent.eq(Mux(carry, fields[1], fields[0])),
        result.mantissa.eq(Mux(overflow, 0, rounded[: SIGNIFICAND - 1])),
    ]
    with m.If(~value[-1]):
        # Rounding a subnormal up to the smallest normal sets the hidden bit, and so the exponent.
        m.d.comb += result.exponent.eq(rounded[SIGNIFICAND - 1])
    with m.If(overflow):
        m.d.comb += result.exponent.eq(TOP_EXPONENT)
    return result, overflow


def add_floats(m: Module, first: Value, second: Value, advance: Value) -> tuple[Value, Value]:
    """Add two float32, rounded to nearest, ties to even, subnormals kept.

    IEEE 754-2019, 5.4.1, but for two things: an infinite ``first`` stays, whatever is added to it,
    and NaN is not known. A sum of zero is +0, even of -0 and -0.

    Latency :data:`LATENCY` clocks with ``advance``, throughput 1 sum per clock. Nothing moves
    without ``advance``. No register has a reset: the user knows which sums are meant.

    Parameters
    ----------
    m : Module
        Gets the logic.
    first, second : Value
        Operands, ``FLOAT32``.
    advance : Value
        All stages move in this clock.

    Returns
    -------
    sum : Value
        ``FLOAT32``, a register.
    overflow : Value
        It is an infinity; a register.
    """
    ordered = _order(m, first, second)
    steps = (_align, _add, _normalize)
    partial = stepped(m, ordered, steps, advance=advance, name="partial")
    rounded, too_large = _round(m, register(m, partial, advance=advance, name="normalized"))
    total, overflow = Signal(FLOAT32, reset_less=True), Signal(reset_less=True)
    with m.If(advance):
        m.d.sync += [total.eq(rounded), overflow.eq(too_large)]
    return total, overflow
