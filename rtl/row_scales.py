"""Row scales of the file, repeated for the scale words of a beat."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import BFLOAT16

__all__ = ["RowScaleExpander", "row_scales_layout"]


def row_scales_layout(*, slots: int) -> data.ArrayLayout:
    """The row scale of every scale word of a beat."""
    return data.ArrayLayout(BFLOAT16, slots)


class RowScaleExpander(wiring.Component):
    """Repeat every row's scale for the scale words of that row.

    Throughput 1 beat per cycle; a beat in which k rows end takes k cycles if its last scale word is
    that of the last of them, else k + 1.

    Parameters
    ----------
    slots : int
        Scale words of a beat.

    Members
    -------
    i : In(stream.Signature(BFLOAT16))
        A scale for each row.
    o : Out(stream.Signature(row_scales_layout))
        Those of a beat; the tensor's final beat may have fewer, from slot 0 up.
    begin : In(1)
        Starts a tensor; what was left of the one before is forgotten.
    rows : In(32)
        Its rows.
    row_slots : In(32)
        Scale words of a row.
    """

    def __init__(self, *, slots: int) -> None:
        self.slots = slots
        super().__init__(
            {
                "i": In(stream.Signature(BFLOAT16)),
                "o": Out(stream.Signature(row_scales_layout(slots=slots))),
                "begin": In(1),
                "rows": In(32),
                "row_slots": In(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        slots = self.slots
        values = Signal(self.o.p.shape(), reset_less=True)
        filled = Signal(range(slots + 1))
        left = Signal(32)  # scale words of the current row that have no place yet
        rows = Signal(32)  # that have not ended

        taken = self.o.valid & self.o.ready
        base = Signal.like(filled)
        room = Signal.like(filled)
        ends = Signal()
        step = Signal()
        m.d.comb += [
            self.o.p.eq(values),
            self.o.valid.eq((filled == slots) | (~rows.any() & filled.any())),
            base.eq(Mux(taken, 0, filled)),
            room.eq(slots - base),
            ends.eq(left <= room),
            step.eq(self.i.valid & rows.any() & (~self.o.valid | self.o.ready)),
            self.i.ready.eq(step & ends),
        ]
        m.d.sync += filled.eq(base)
        with m.If(step):
            # Slots after the end of the row are overwritten by the rows that follow.
            for slot in range(slots):
                with m.If(base <= slot if slot else ~base.any()):
                    m.d.sync += values[slot].eq(self.i.p)
            m.d.sync += left.eq(left - room)
            m.d.sync += filled.eq(slots)
            with m.If(ends):
                m.d.sync += [
                    filled.eq(base + left[: len(filled)]),
                    left.eq(self.row_slots),
                    rows.eq(rows - 1),
                ]
        with m.If(self.begin):
            m.d.sync += [filled.eq(0), left.eq(self.row_slots), rows.eq(self.rows)]
        return m
