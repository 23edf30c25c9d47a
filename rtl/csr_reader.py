"""Corrections of the file (compressed sparse rows) as entries with positions in the stream."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import BFLOAT16, correction_layout

__all__ = ["NUMBER", "CsrReader"]

NUMBER = unsigned(32)
"""A row pointer or a column number."""


class CsrReader(wiring.Component):
    """Turn row pointers, columns and values into :func:`rtl.layouts.correction_layout`.

    One row pointer or one entry per cycle. After the final entry of a tensor there is an empty one
    with ``last``. A row pointer is wrong if it is less than the right one before it or more than
    the number of entries, or if the first one is not 0 or the last one not the number of entries;
    then the rows on both sides of it have no entries. An entry is wrong if its column is outside
    the matrix; it is left out. Both set ``wrong``. So no position is outside its row. Columns that
    do not ascend are not noticed here: :class:`rtl.sparse_merge.SparseMerge` drops such entries.

    Members
    -------
    i_pointer : In(stream.Signature(NUMBER))
        One more than rows; none if the tensor has no entries.
    i_column : In(stream.Signature(NUMBER))
        Columns; of up to 65,536 columns only the lower 16 bits count.
    i_value : In(stream.Signature(BFLOAT16))
        Values.
    o : Out(stream.Signature(correction_layout))
        Entries.
    begin : In(1)
        Starts a tensor; only while ``done``.
    rows : In(32)
        Its rows; this and the next three count while it starts.
    columns : In(32)
        Its columns.
    row_weights : In(32)
        Weights of a row in the stream: columns and padding.
    entries : In(32)
        Its entries; may be 0.
    done : Out(1)
        Everything was read and given.
    wrong : Out(1)
        In one clock, where that is noticed.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "i_pointer": In(stream.Signature(NUMBER)),
                "i_column": In(stream.Signature(NUMBER)),
                "i_value": In(stream.Signature(BFLOAT16)),
                "o": Out(stream.Signature(correction_layout())),
                "begin": In(1),
                "rows": In(32),
                "columns": In(32),
                "row_weights": In(32),
                "entries": In(32),
                "done": Out(1),
                "wrong": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        rows, columns, row_weights, entries = (Signal(32) for _ in range(4))
        wide = Signal()  # all bits of a column number count
        with m.If(self.begin):
            m.d.sync += [
                rows.eq(self.rows), columns.eq(self.columns), wide.eq(self.columns > 1 << 16),
                row_weights.eq(self.row_weights), entries.eq(self.entries),
            ]  # fmt: skip
        end = Signal(32)  # entries up to the end of the current row
        left = Signal(32)  # those of the current row that were not taken
        more = Signal()  # there are such
        row = Signal(32)  # rows whose end is known
        first = Signal()  # the next row pointer is the first one
        sure = Signal()  # the latest row pointer was right
        skip = Signal()  # the pointer at the start of the current row was wrong
        base = Signal(32)  # position of the first weight of the current row
        closing = Signal()  # the empty entry has yet to be given
        active = Signal()

        reading = active & (row != rows)
        pointer = self.i_pointer.p
        fits = Signal()
        m.d.comb += fits.eq(
            Mux(
                first,
                ~pointer.any(),
                (pointer >= end) & (pointer <= entries)
                & ((row + 1 != rows) | (pointer == entries)),
            )
        )  # fmt: skip
        with m.If((reading | first) & ~more):
            m.d.comb += self.i_pointer.ready.eq(1)
            with m.If(self.i_pointer.valid):
                m.d.comb += self.wrong.eq(~fits)
                m.d.sync += [first.eq(0), sure.eq(fits)]
                with m.If(~first):
                    m.d.sync += [
                        row.eq(row + 1),
                        skip.eq(~sure),
                        base.eq(base + Mux(row.any(), row_weights, 0)),
                    ]
                    with m.If(fits):
                        m.d.sync += [
                            end.eq(pointer), left.eq(pointer - end), more.eq(pointer != end)
                        ]  # fmt: skip

        column = Mux(wide, self.i_column.p, self.i_column.p[:16])
        inside = Signal()
        both = Signal()
        step = Signal()
        finished = ~more & ((end == entries) | (~reading & ~first))
        m.d.comb += [
            inside.eq((column < columns) & ~skip),
            both.eq(more & self.i_column.valid & self.i_value.valid),
            step.eq(both & (self.o.ready | ~inside)),
            self.i_column.ready.eq(step),
            self.i_value.ready.eq(step),
            # The empty one is beyond every beat, so that the last correction does not wait for it.
            self.o.p.position.eq(Mux(more, base + column, (1 << 32) - 1)),
            self.o.p.value.eq(self.i_value.p),
            self.o.p.empty.eq(~more),
            self.o.p.last.eq(~more),
            self.o.valid.eq((both & inside) | (closing & finished)),
        ]
        with m.If(step):
            m.d.sync += [left.eq(left - 1), more.eq(left != 1)]
            m.d.comb += self.wrong.eq(~inside)
        with m.If(closing & finished & self.o.ready):
            m.d.sync += closing.eq(0)
        m.d.comb += self.done.eq(~active)
        with m.If(~reading & ~first & ~more & ~closing):
            m.d.sync += active.eq(0)
        with m.If(self.begin):
            m.d.sync += [
                active.eq(1),
                end.eq(0),
                left.eq(0),
                more.eq(0),
                # A tensor without entries has no row pointers either.
                row.eq(Mux(self.entries.any(), 0, self.rows)),
                first.eq(self.entries.any()),
                base.eq(0),
                closing.eq(1),
            ]
        return m
