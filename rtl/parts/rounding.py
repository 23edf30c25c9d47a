"""Rounding to nearest, ties to even (IEEE 754-2019, 4.3.1)."""

from amaranth.hdl import Const, Value

__all__ = ["increment", "nearest_even"]


def increment(kept: Value, half: Value, rest: Value) -> Value:
    """Whether a magnitude is rounded up: 1 is then added to ``kept``.

    Parameters
    ----------
    kept : Value
        The bits that stay.
    half : Value
        The highest bit that goes, worth half of the last place that stays.
    rest : Value
        Whether any bit below it is set.
    """
    return half & (rest | kept[0])


def nearest_even(value: Value, dropped: int) -> tuple[Value, Value]:
    """The upper bits of a magnitude, and whether 1 has to be added to them.

    Parameters
    ----------
    value : Value
        Unsigned.
    dropped : int
        Number of bits that go, less than the width of ``value``.
    """
    if not dropped:
        return value, Const(0, 1)
    kept = value[dropped:]
    return kept, increment(kept, value[dropped - 1], value[: dropped - 1].any())
