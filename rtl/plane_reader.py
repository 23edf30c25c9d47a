"""Planes of the file, as a bus brings them, cut into the pieces that decoding needs."""

from collections.abc import Sequence
from math import gcd

from amaranth.hdl import Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.modes import by_mode

__all__ = ["PLANE_BITS", "PlaneReader", "piece_layout", "plane_word_layout"]

PLANE_BITS = 40
"""Width of the size of a plane in bits: 2**32 - 1 weights of 8 bits, and some."""


def plane_word_layout(*, width: int) -> data.StructLayout:
    """One transfer of a bus. ``last`` marks the final one of a plane."""
    return data.StructLayout({"data": width, "last": 1})


def piece_layout(*, sizes: Sequence[int]) -> unsigned:
    """One piece, in the low bits; what is above the size in use has no meaning."""
    return unsigned(max(sizes))


class PlaneReader(wiring.Component):
    """Cut a plane, which arrives in words of ``width`` bits, into pieces of equal size.

    It is told how many bits the plane has, and counts them: the packet may end elsewhere. If the
    packet is too short, zeros stand for what is missing (``short``). If it is too long, the rest is
    taken and dropped (``long``). Either way all pieces come out, and no word of the next plane is
    taken. Where the plane does not fill its final piece, the rest of that piece has no meaning.

    Throughput: a piece every clock, as no piece is longer than a word; also from one plane to the
    next, if the next one is waiting.

    Parameters
    ----------
    width : int
        Bits of a word, a power of two.
    sizes : sequence of int
        Bits of a piece, one for each value of ``size``.

    Members
    -------
    i : In(stream.Signature(plane_word_layout))
        Words of the plane, first bit lowest.
    o : Out(stream.Signature(piece_layout))
        Pieces of the plane.
    begin : In(1)
        Start a plane; only in a clock with ``ready``.
    size : In(unsigned)
        Which of ``sizes`` its pieces have.
    bits : In(PLANE_BITS)
        Length of the plane in bits; may be 0.
    ready : Out(1)
        A plane may start: none is under way, or the final piece of one leaves in this clock.
    finish : In(1)
        Give no more pieces, and drop what is left of the plane.
    done : Out(1)
        No plane is under way: all its words were taken, and all its pieces have left.
    short, long : Out(1)
        High for one clock when it is seen that the packet is too short, or too long.
    """

    def __init__(self, *, width: int, sizes: Sequence[int]) -> None:
        if width < 8 or width & (width - 1):
            raise ValueError(f"width must be a power of two from 8, not {width!r}")
        if not sizes or min(sizes) < 1 or max(sizes) > width:
            raise ValueError(f"sizes must be 1 to {width} bits, not {sizes!r}")
        self.width = width
        self.sizes = tuple(sizes)
        super().__init__(
            {
                "i": In(stream.Signature(plane_word_layout(width=width))),
                "o": Out(stream.Signature(piece_layout(sizes=sizes))),
                "begin": In(1),
                "size": In((len(sizes) - 1).bit_length()),
                "bits": In(PLANE_BITS),
                "ready": Out(1),
                "finish": In(1),
                "done": Out(1),
                "short": Out(1),
                "long": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        width, sizes = self.width, self.sizes
        # Every fill of the buffer is a multiple of this many bits: fewer places to insert at.
        unit = gcd(width, *sizes)
        to_word, to_unit = width.bit_length() - 1, unit.bit_length() - 1
        capacity = width + max(sizes) - unit  # a word always fits where no piece is complete
        buffer = Signal(capacity)  # bits above the fill are 0, but after the final word
        fill = Signal(range(capacity // unit + 1))
        words = Signal(PLANE_BITS - to_word)  # still to come
        some, one = Signal(), Signal()  # there is one, exactly one: in registers, for speed
        tail = Signal(range(width // unit))  # fill that the final one brings, less 1
        size = Signal.like(self.size)
        dry = Signal()  # the packet has ended early: what is still to come is zeros
        drain = Signal()  # the packet goes on: what is still to come is dropped

        # The first word of a plane may be taken while the final piece of the one before is given.
        begins = Signal()
        last_bit = Signal(PLANE_BITS)
        words_now, tail_now = Signal.like(words), Signal.like(tail)
        some_now, one_now = Signal(), Signal()
        full = last_bit[to_word:]  # words before the final one
        m.d.comb += [
            begins.eq(self.begin & self.ready),
            last_bit.eq(self.bits - 1),
            words_now.eq(Mux(begins, Mux(self.bits.any(), full + 1, 0), words)),
            some_now.eq(Mux(begins, self.bits.any(), some)),
            one_now.eq(Mux(begins, self.bits.any() & ~full.any(), one)),
            tail_now.eq(Mux(begins, last_bit[to_unit:to_word], tail)),
        ]

        piece = by_mode(size, [Const(bits // unit, len(fill)) for bits in sizes])
        step = Signal()
        kept = Signal(capacity)
        kept_fill = Signal.like(fill)
        shifted = by_mode(size, [buffer[bits:] for bits in sizes])
        ended = ~some
        # Lint refuses a comparison that is always true: where there is room for one piece only.
        final_piece = ended if capacity == min(sizes) else ended & (fill <= piece)
        m.d.comb += [
            self.o.p.eq(buffer[: max(sizes)]),
            self.o.valid.eq((fill >= piece) | (ended & fill.any())),
            step.eq(self.o.valid & self.o.ready),
            kept.eq(Mux(begins, 0, Mux(step, shifted, buffer))),
            kept_fill.eq(Mux(begins, 0, Mux(step, Mux(final_piece, 0, fill - piece), fill))),
            self.done.eq(ended & ~drain & ~fill.any()),
            self.ready.eq(ended & ~drain & (~fill.any() | (step & final_piece))),
        ]

        room = (kept_fill <= max(sizes) // unit - 1) & some_now & ~drain & ~self.finish
        take = Signal()  # a word goes into the buffer
        m.d.comb += [
            self.i.ready.eq(drain | (room & ~dry)),
            take.eq(room & (self.i.valid | dry)),
        ]
        m.d.sync += [
            buffer.eq(kept), fill.eq(kept_fill), tail.eq(tail_now),
            words.eq(words_now), some.eq(some_now), one.eq(one_now),
        ]  # fmt: skip
        with m.If(begins):
            m.d.sync += size.eq(self.size)
        final = one_now
        with m.If(take):
            m.d.sync += [
                fill.eq(kept_fill + Mux(final, tail_now + 1, width // unit)),
                words.eq(words_now - 1),
                some.eq(~final),
                one.eq(words_now == 2),
                dry.eq((dry | self.i.p.last) & ~final),
                drain.eq(final & ~dry & ~self.i.p.last),
            ]
            for place in range(max(sizes) // unit):
                with m.If(kept_fill == place if place else ~kept_fill.any()):
                    low = place * unit
                    word = Mux(dry, 0, self.i.p.data)
                    m.d.sync += buffer[low : low + width].eq(kept[low : low + width] | word)
            m.d.comb += [
                self.short.eq(~dry & self.i.p.last & ~final),
                self.long.eq(~dry & ~self.i.p.last & final),
            ]
        with m.If(drain & self.i.valid & self.i.p.last):
            m.d.sync += drain.eq(0)
        with m.If(self.finish & ~begins):
            m.d.sync += [fill.eq(0), words.eq(0), some.eq(0), one.eq(0), dry.eq(0)]
            with m.If(~ended & ~dry):
                m.d.sync += drain.eq(1)
        return m
