"""Shifting down by any distance, without losing that something fell out."""

from amaranth.hdl import Module, Mux, Signal, Value

__all__ = ["shift_down"]


def shift_down(
    m: Module, value: Value, rest: Value, distance: Value, *, when: Value | None = None
) -> tuple[Value, Value, Value]:
    """Move a magnitude down by up to 31 places; longer distances are only noticed.

    Parameters
    ----------
    m : Module
        Gets the logic.
    value : Value
        Unsigned.
    rest : Value
        Whether anything is set below it.
    distance : Value
        Unsigned, 5 bits or more.
    when : Value, optional
        Whether it moves at all; without it, it does.

    Returns
    -------
    value : Value
        As wide as it came.
    rest : Value
        Whether anything is set below it now.
    far : Value
        It should have moved by 32 places or more.
    """

    def moves(asked: Value) -> Value:
        return asked if when is None else when & asked

    for bit in reversed(range(5)):
        step = 1 << bit
        moved = Signal(len(value), name=f"moved_{step}")
        lost = Signal(name=f"lost_{step}")
        shifted = moves(distance[bit])
        m.d.comb += [
            moved.eq(Mux(shifted, value >> step, value)),
            lost.eq(rest | (shifted & value[:step].any())),
        ]
        value, rest = moved, lost
    return value, rest, moves(distance[5:].any())
