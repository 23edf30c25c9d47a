"""Product of an integer and a scale, rounded once to float32, in four clocks."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data

from rtl.layouts import FLOAT32
from rtl.parts.float_fields import BIAS, SIGNIFICAND, TOP_EXPONENT
from rtl.parts.leading_zeros import leading_zeros
from rtl.parts.pipeline import register, stepped
from rtl.parts.rounding import increment
from rtl.parts.shifting import shift_down

__all__ = ["LATENCY", "scaled_product"]

LATENCY = 4
"""Clocks with ``advance`` from the operands to their product."""

# `value` is a significand and one bit below it, `rest` whether anything is set below that.
# Exponents are biased, that of a normalized significand.
_REDUCED = {"sign": 1, "value": SIGNIFICAND + 1, "rest": 1}


def _multiply(
    m: Module, integer: Value, sign: Value, significand: Value, exponent: Value
) -> Signal:
    """Step 1: the exact product, and the biased exponent that it has if its top bit is set."""
    bits = len(integer) - 1 + len(significand)
    magnitude = Mux(integer < 0, -integer, integer)[: len(integer) - 1]
    # Of the exponent's own range, the width of the product and the bias.
    reach = (1 << len(exponent) - 1) + bits + BIAS
    layout = data.StructLayout(
        {"sign": 1, "product": bits, "exponent": signed(reach.bit_length() + 1)}
    )
    result = Signal(layout)
    m.d.comb += [
        result.sign.eq((integer < 0) ^ sign),
        result.product.eq(magnitude * significand),
        result.exponent.eq(exponent + (bits - 1 + BIAS)),
    ]
    return result


def _normalize(m: Module, product: Value) -> Signal:
    """Step 2: the product with its top bit set, unless it is 0, cut to what rounding needs."""
    bits = len(product.product)
    nonzero, zeros = leading_zeros(product.product)
    shifted = Signal(bits)
    m.d.comb += shifted.eq(product.product << zeros)
    below = bits - (SIGNIFICAND + 1)
    layout = data.StructLayout({**_REDUCED, "exponent": product.exponent.shape(), "nonzero": 1})
    result = Signal(layout)
    m.d.comb += [
        result.sign.eq(product.sign),
        result.value.eq(shifted[below:] if below > 0 else shifted << -below),
        result.rest.eq(shifted[:below].any() if below > 0 else 0),
        # Of more zeros than an exponent can make up for nothing is left anyway.
        result.exponent.eq(product.exponent - zeros),
        result.nonzero.eq(nonzero),
    ]
    return result


def _denormalize(m: Module, normalized: Value) -> Signal:
    """Step 3: move what is below the normal range down to the exponent of subnormals."""
    exponent = normalized.exponent
    below = Signal()
    distance = Signal(exponent.shape())
    m.d.comb += [below.eq(exponent < 1), distance.eq(1 - exponent)]
    # Moved by 32 places or more, it is less than half of the smallest subnormal.
    value, rest, far = shift_down(m, normalized.value, normalized.rest, distance, when=below)
    result = Signal(data.StructLayout({**_REDUCED, "exponent": 8, "infinite": 1}))
    m.d.comb += [
        result.sign.eq(normalized.sign),
        result.value.eq(Mux(far, 0, value)),
        result.rest.eq(rest & ~far),
        result.exponent.eq(Mux(below | ~normalized.nonzero, 0, exponent)),
        result.infinite.eq(normalized.nonzero & (exponent >= TOP_EXPONENT)),
    ]
    return result


def _round(m: Module, denormalized: Value) -> Signal:
    """Step 4: round and pack, ``FLOAT32``."""
    kept = denormalized.value[1:]
    up = increment(kept, denormalized.value[0], denormalized.rest)
    # Out of the mantissa the carry goes on into the exponent, which makes a subnormal the smallest
    # normal, and the largest number an infinity.
    magnitude = Signal(31)
    m.d.comb += magnitude.eq(Cat(kept[: SIGNIFICAND - 1], denormalized.exponent) + up)
    result = Signal(FLOAT32)
    infinite = denormalized.infinite
    m.d.comb += [
        result.sign.eq(denormalized.sign),
        result.exponent.eq(Mux(infinite, TOP_EXPONENT, magnitude[SIGNIFICAND - 1 :])),
        result.mantissa.eq(Mux(infinite, 0, magnitude[: SIGNIFICAND - 1])),
    ]
    return result


def scaled_product(
    m: Module, integer: Value, sign: Value, significand: Value, exponent: Value, advance: Value
) -> Value:
    """Round ``integer * (-1)**sign * significand * 2**exponent`` to float32.

    One rounding, to nearest, ties to even; subnormals are kept, what is too large is an infinity.
    A product of 0 has the sign of the factors, where the integer 0 counts as positive.

    Latency :data:`LATENCY` clocks with ``advance``, throughput 1 product per clock. Nothing moves
    without ``advance``. No register has a reset: the user knows which products are meant.

    Parameters
    ----------
    m : Module
        Gets the logic.
    integer : Value
        Signed; its lowest value, which has no negative, must not occur.
    sign, significand : Value
        Unsigned, of the scale.
    exponent : Value
        Signed, of the product's last place.
    advance : Value
        All stages move in this clock.

    Returns
    -------
    product : Value
        ``FLOAT32``, a register.
    """
    exact = _multiply(m, integer, sign, significand, exponent)
    steps = (_normalize, _denormalize, _round)
    rounded = stepped(m, exact, steps, advance=advance, name="product")
    return register(m, rounded, advance=advance, name="result")
