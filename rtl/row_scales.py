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

    Throughput 1 beat per cycle, also across the end of a tensor; a beat in which k rows end takes k
    cycles if its last scale word is that of the last of them, else k + 1.

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
        Starts a tensor, in a clock with ``ready``.
    rows : In(32)
        Its rows; may be 0.
    row_slots : In(32)
        Scale words of a row.
    ready : Out(1)
        All scales of the tensor before have been taken, with its last one in this clock.
    done : Out(1)
        The same without the one that is taken in this clock.
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
                "ready": Out(1),
                "done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        slots = self.slots
        values = Signal(self.o.p.shape(), reset_less=True)
        filled = Signal(range(slots + 1))
        final = Signal()  # what is filled is all of the tensor's final beat
        left = Signal(32)  # scale words of the current row that have no place yet
        rows = Signal(32)  # that have not ended
        row_slots = Signal(32)

        taken = self.o.valid & self.o.ready
        base = Signal.like(filled)
        room = Signal.like(filled)
        ends = Signal()
        step = Signal()
        m.d.comb += [
            self.o.p.eq(values),
            self.o.valid.eq((filled == slots) | final),
            base.eq(Mux(taken, 0, filled)),
            room.eq(slots - base),
            ends.eq(left <= room),
            step.eq(self.i.valid & rows.any() & (~self.o.valid | self.o.ready)),
            self.i.ready.eq(step & ends),
            self.done.eq(~rows.any()),
            self.ready.eq(self.done | (step & ends & (rows == 1))),
        ]
        m.d.sync += filled.eq(base)
        with m.If(taken):
            m.d.sync += final.eq(0)
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
                    left.eq(row_slots),
                    rows.eq(rows - 1),
                    final.eq(rows == 1),
                ]
        with m.If(self.begin & self.ready):
            m.d.sync += [
                left.eq(self.row_slots), row_slots.eq(self.row_slots), rows.eq(self.rows),
            ]  # fmt: skip
        return m
