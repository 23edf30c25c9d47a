"""One of many values, by a number: a tree of multiplexers of two."""

from collections.abc import Sequence

from amaranth.hdl import Mux, Value

__all__ = ["pick"]


def pick(values: Sequence[Value | None], index: Value) -> Value | None:
    """The value of that number; where there is none anything, and None if there is none at all.

    Neighbours that are the same object are merged, so that a choice among equals costs nothing.

    Parameters
    ----------
    values : sequence of Value or None
    index : Value
        Unsigned.
    """
    return _of_bits(values, index, len(index))


def _of_bits(values: Sequence[Value | None], index: Value, bits: int) -> Value | None:
    """Halves of the values first, by the highest of so many bits."""
    if not bits or not values:
        return values[0] if values else None
    half = 1 << bits - 1
    below, above = (_of_bits(part, index, bits - 1) for part in (values[:half], values[half:]))
    if below is above or above is None:
        return below
    return above if below is None else Mux(index[bits - 1], above, below)
