"""The activations that the corrections of a tile need, kept while they go by."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.formats import FloatFormat, NumberFormat
from rtl.layouts import column_layout, epilogue_activations_layout, tile_activations_layout

__all__ = ["ColumnCapture"]


class ColumnCapture(wiring.Component):
    """Keep the activations of chosen input channels of a tile.

    A tile reads all activations anyway, one channel a beat. Those of channels that are named on
    ``i_column`` are written, with their scales, into the next slot of a memory of two halves: one
    is filled while the other one is read. So it takes ``2 * slots`` words of all tokens' codes and
    scales, however many channels there are.

    Throughput 1 beat per clock, as long as the columns are there in time and the half is free. A
    column that no beat has (it does not ascend, or is beyond the tile), or for which there is no
    slot, is dropped and sets ``misplaced``.

    Parameters
    ----------
    columns : int
        Tokens of a tile.
    block_size : int
    activation : NumberFormat
    activation_scale : FloatFormat
    slots : int
        Most channels of a tile that can be kept, a power of two.

    Members
    -------
    i : In(stream.Signature(epilogue_activations_layout))
        Activations.
    i_column : In(stream.Signature(column_layout))
        Channels.
    slot : In(unsigned)
        What to read.
    kept : Out(tile_activations_layout)
        What was in that slot one clock ago.
    complete : Out(1)
        All of a tile can be read.
    count : Out(unsigned)
        Its slots in use.
    misplaced : Out(1)
        A column of it was dropped.
    release : In(1)
        It is not needed any more; only while ``complete``.
    """

    def __init__(
        self, *, columns: int, block_size: int, activation: NumberFormat,
        activation_scale: FloatFormat, slots: int,
    ) -> None:  # fmt: skip
        self.block_size = block_size
        self.slots = slots
        formats: dict[str, Any] = {
            "columns": columns,
            "element": activation,
            "scale": activation_scale,
        }
        self.kept_layout = tile_activations_layout(**formats)
        super().__init__(
            {
                "i": In(stream.Signature(epilogue_activations_layout(**formats))),
                "i_column": In(stream.Signature(column_layout())),
                "slot": In((slots - 1).bit_length()),
                "kept": Out(self.kept_layout),
                "complete": Out(1),
                "count": Out(slots.bit_length()),
                "misplaced": Out(1),
                "release": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        wanted = self.i_column.p
        writes, reads = Signal(), Signal()  # halves of the memory
        halves = range(2)
        complete = [Signal(name=f"complete_{half}") for half in halves]
        misplaced = [Signal(name=f"misplaced_{half}", reset_less=True) for half in halves]
        counts = [Signal.like(self.count, name=f"count_{half}") for half in halves]
        channel, count = Signal(32), Signal.like(self.count)  # of the next beat; slots in use
        listed = Signal()  # the tile's last column was taken
        rest = Signal()  # the tile is over, but not its columns
        wrong = Signal()  # one of them was dropped

        accept, known, hit = Signal(), Signal(), Signal()
        room, ends, none_left = Signal(), Signal(), Signal()
        m.d.comb += [
            known.eq(listed | self.i_column.valid),
            self.i.ready.eq(~Mux(writes, complete[1], complete[0]) & ~rest & known),
            accept.eq(self.i.valid & self.i.ready),
            hit.eq(~listed & ~wanted.empty & (wanted.column == channel)),
            room.eq(count != self.slots),
            none_left.eq(listed | (wanted.last & (hit | wanted.empty))),
            self.i_column.ready.eq(rest | (accept & ~listed & (hit | wanted.empty))),
            ends.eq(
                Mux(rest, self.i_column.valid & wanted.last, accept & self.i.p.last & none_left)
            ),
        ]
        drops = Signal()
        m.d.comb += drops.eq((rest & self.i_column.valid) | (accept & hit & ~room))
        with m.If(accept):
            m.d.sync += [channel.eq(channel + 1), listed.eq(none_left)]
            with m.If(self.i.p.last):
                m.d.sync += rest.eq(~none_left)
            with m.If(hit & room):
                m.d.sync += count.eq(count + 1)
        with m.If(drops):
            m.d.sync += wrong.eq(1)
        with m.If(self.release):
            m.d.sync += reads.eq(~reads)
        with m.If(ends):
            m.d.sync += [
                writes.eq(~writes),
                *(signal.eq(0) for signal in (channel, count, listed, rest, wrong)),
            ]
        for half in halves:
            with m.If(self.release & (reads == half)):
                m.d.sync += complete[half].eq(0)
            with m.If(ends & (writes == half)):
                m.d.sync += [
                    complete[half].eq(1),
                    misplaced[half].eq(wrong | drops),
                    counts[half].eq(count + (accept & hit & room)),
                ]
        m.d.comb += [
            self.complete.eq(Mux(reads, complete[1], complete[0])),
            self.misplaced.eq(Mux(reads, misplaced[1], misplaced[0])),
            self.count.eq(Mux(reads, counts[1], counts[0])),
        ]
        self._remember(m, accept, Cat(count[: len(self.slot)], writes), accept & hit & room, reads)
        return m

    def _remember(
        self, m: Module, accept: Value, address: Value, write: Value, reads: Value
    ) -> None:
        """The memory, and the scales of the block that goes by."""
        place = Signal(range(self.block_size))  # of the next beat in its block
        with m.If(accept):
            m.d.sync += place.eq(Mux(self.i.p.last, 0, place + 1))
        m.submodules.memory = memory = Memory(
            shape=self.kept_layout.size, depth=2 * self.slots, init=[]
        )
        port, read = memory.write_port(), memory.read_port()
        word = Signal(self.kept_layout)
        for name in self.kept_layout.members:
            now = self.i.p[name]
            if name != "codes":  # which counts in every beat, unlike all others
                held = Signal(now.shape(), name=f"held_{name}", reset_less=True)
                with m.If(accept & ~place.any()):
                    m.d.sync += held.eq(now)
                now = Mux(place.any(), held, now)
            m.d.comb += word[name].eq(now)
        m.d.comb += [
            port.addr.eq(address),
            port.data.eq(word),
            port.en.eq(write),
            read.addr.eq(Cat(self.slot, reads)),
            self.kept.eq(read.data),
        ]
