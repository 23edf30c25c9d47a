"""Pieces of planes joined into the beats of a decoder."""

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from golden.notation import QuantFormat
from rtl.layouts import index_beat_layout
from rtl.modes import Modes, by_mode, check_lanes
from rtl.plane_reader import piece_layout
from rtl.row_scales import row_scales_layout

__all__ = ["BeatSource", "index_piece_bits", "scale_piece_bits", "slot_weights"]


def index_piece_bits(fmt: QuantFormat, lanes: int) -> int:
    """Bits of the elements of a beat."""
    return lanes * fmt.index_bits


def scale_piece_bits(fmt: QuantFormat, lanes: int) -> int:
    """Bits of the scale words of a beat, or of the one that several beats share."""
    return max(1, lanes // fmt.block_size) * fmt.word.width


def slot_weights(modes: Modes, lanes: int) -> int:
    """Weights of a beat that belong to one of its scale words."""
    return lanes // modes.slots(lanes)


class BeatSource(wiring.Component):
    """Join elements, scale words and row scales, which arrive at different rates, into beats.

    A beat takes one piece of elements, and one of row scales where the format has them. It takes
    one piece of scale words; where a block is longer than a beat, that piece serves all beats of
    the block. A beat leaves when all these are there. The final beat of a tensor may be partly
    filled; its other lanes are zero, whatever the planes have there.

    Throughput: a beat every clock, also from one tensor to the next. No latency: combinational.

    Parameters
    ----------
    lanes : int
    modes : Modes

    Members
    -------
    i_index : In(stream.Signature(piece_layout))
        Elements of a beat, :func:`index_piece_bits` of the tensor's format.
    i_scale : In(stream.Signature(piece_layout))
        Scale words, :func:`scale_piece_bits` of the tensor's format.
    i_row_scale : In(stream.Signature(row_scales_layout))
        Row scales of a beat; waited for only where the tensor's format has them.
    o : Out(stream.Signature(index_beat_layout))
        Beats.
    begin : In(1)
        Start a tensor; only in a clock with ``ready``.
    mode : In(unsigned)
        Number of its format in ``modes``.
    weights : In(32)
        How many weights it has, padding of rows included.
    ready : Out(1)
        A tensor may start: none is under way, or the final beat of one leaves in this clock.
    done : Out(1)
        No tensor is under way.
    tail : Out(unsigned)
        Lanes in use in the tensor's final beat; valid with that beat.
    """

    def __init__(self, *, lanes: int, modes: Modes) -> None:
        check_lanes(lanes, modes.block_size)
        self.lanes = lanes
        self.modes = modes
        self.index_sizes = tuple(index_piece_bits(fmt, lanes) for fmt in modes.formats)
        self.scale_sizes = tuple(scale_piece_bits(fmt, lanes) for fmt in modes.formats)
        slots = modes.slots(lanes)
        super().__init__(
            {
                "i_index": In(stream.Signature(piece_layout(sizes=self.index_sizes))),
                "i_scale": In(stream.Signature(piece_layout(sizes=self.scale_sizes))),
                "i_row_scale": In(stream.Signature(row_scales_layout(slots=slots))),
                "o": Out(stream.Signature(index_beat_layout(lanes=lanes, modes=modes))),
                "begin": In(1),
                "mode": In(modes.mode_bits),
                "weights": In(32),
                "ready": Out(1),
                "done": Out(1),
                "tail": Out(lanes.bit_length()),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes, modes = self.lanes, self.modes
        slots = modes.slots(lanes)
        mode = Signal.like(self.mode)
        remaining = Signal(32)
        final = Signal()
        step = Signal()
        waits = by_mode(mode, [Const(int(fmt.row_scale)) for fmt in modes.formats])
        m.d.comb += [
            final.eq(remaining <= lanes),
            self.done.eq(~remaining.any()),
            self.o.valid.eq(
                self.i_index.valid & self.i_scale.valid & (self.i_row_scale.valid | ~waits)
                & ~self.done
            ),
            self.o.p.last.eq(final),
            step.eq(self.o.valid & self.o.ready),
            self.i_index.ready.eq(step),
            self.i_row_scale.ready.eq(step & waits),
            self.ready.eq(self.done | (step & final)),
            self.tail.eq(remaining[: len(self.tail)]),
        ]  # fmt: skip
        with m.If(step):
            m.d.sync += remaining.eq(Mux(final, 0, remaining - lanes))

        # A scale word of a block that is longer than a beat stays for as many beats.
        holds = [max(1, fmt.block_size // lanes) for fmt in modes.formats]
        held = Signal(range(max(holds)))
        enough = held == by_mode(mode, [Const(hold - 1, len(held)) for hold in holds])
        m.d.comb += self.i_scale.ready.eq(step & (enough | final))
        with m.If(step):
            m.d.sync += held.eq(Mux(enough | final, 0, held + 1))

        for slot in range(slots):
            first = slot * lanes // slots
            inside = Signal(name=f"inside_{slot}")
            m.d.comb += inside.eq(remaining > first)
            words = []
            for fmt in modes.formats:
                place = slot * max(1, lanes // fmt.block_size) // slots * fmt.word.width
                words.append(self.i_scale.p[place : place + fmt.word.width])
            scale = Mux(inside, by_mode(mode, words), 0)
            m.d.comb += self.o.p.scale_words[slot].eq(scale)
            if modes.row_scale:
                row_scale = self.i_row_scale.p[slot].as_value()
                m.d.comb += self.o.p.row_scales[slot].eq(Mux(inside & waits, row_scale, 0))
            for lane in range(first, first + lanes // slots):
                elements = [
                    self.i_index.p[lane * fmt.index_bits : (lane + 1) * fmt.index_bits]
                    for fmt in modes.formats
                ]
                element = Mux(inside, by_mode(mode, elements), 0)
                m.d.comb += self.o.p.indices[lane].eq(element)
        with m.If(self.begin & self.ready):
            m.d.sync += [mode.eq(self.mode), remaining.eq(self.weights)]
        return m
