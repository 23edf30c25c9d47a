"""How many bits above the highest bit set are not."""

from amaranth.hdl import Cat, Const, Mux, Value

__all__ = ["leading_zeros"]


def leading_zeros(value: Value) -> tuple[Value, Value]:
    """Whether any bit is set, and if so how many bits above the highest of them are not.

    Halves are counted at the same time. Of 0 the count is the highest that its digits can hold.

    Parameters
    ----------
    value : Value
        Unsigned, extended with zeros at the bottom to a width that is a power of two.
    """
    value = Cat(Const(0, (1 << (len(value) - 1).bit_length()) - len(value)), value)
    if len(value) == 1:
        return value.any(), Const(0, 0)
    half = len(value) // 2
    low, below = leading_zeros(value[:half])
    high, above = leading_zeros(value[half:])
    return high | low, Cat(Mux(high, above, below), ~high)
