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

    Throughput 1 piece per cycle where a piece is no longer than a word. After the end of the plane
    pieces are filled up with zeros. A plane that ends early is continued with zeros (``short``); of
    one that goes on too long the rest is taken and dropped (``long``). So whatever the length of a
    packet is, the reader gives all pieces and is ready for the next plane.

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
        Pieces; there is no end to them.
    size : In(unsigned)
        Which of ``sizes``; does not change before ``done``.
    begin : In(1)
        Starts a plane; only while ``done``.
    bits : In(PLANE_BITS)
        Bits of the plane that starts; may be 0.
    finish : In(1)
        No more pieces are wanted; the rest of the plane is dropped.
    done : Out(1)
        All words of the plane have been taken.
    short, long : Out(1)
        In one clock, where that is noticed.
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
                "size": In((len(sizes) - 1).bit_length()),
                "begin": In(1),
                "bits": In(PLANE_BITS),
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
        capacity = width + max(sizes) - unit  # a word always fits where no piece is complete
        buffer = Signal(capacity)  # bits above the fill are 0
        fill = Signal(range(capacity // unit + 1))
        words = Signal(PLANE_BITS)  # still to come
        drain = Signal()

        size = by_mode(self.size, [Const(size // unit, len(fill)) for size in sizes])
        complete = Signal()
        step = Signal()
        kept = Signal(capacity)
        kept_fill = Signal.like(fill)
        shifted = by_mode(self.size, [buffer[size:] for size in sizes])
        ended = ~words.any()
        m.d.comb += [
            complete.eq(fill >= size),
            self.o.p.eq(buffer[: max(sizes)]),
            self.o.valid.eq(complete | ended),
            step.eq(self.o.valid & self.o.ready),
            kept.eq(Mux(step, shifted, buffer)),
            kept_fill.eq(Mux(step, Mux(complete, fill - size, 0), fill)),
        ]

        room = kept_fill <= max(sizes) // unit - 1
        take = Signal()  # a word goes into the buffer
        m.d.comb += [
            self.i.ready.eq(drain | (~ended & room & ~self.finish)),
            take.eq(self.i.valid & ~drain & ~ended & room & ~self.finish),
            self.done.eq(ended & ~drain),
        ]
        m.d.sync += [buffer.eq(kept), fill.eq(kept_fill)]
        final = words == 1
        with m.If(take):
            m.d.sync += [
                fill.eq(kept_fill + width // unit),
                words.eq(Mux(self.i.p.last, 0, words - 1)),
                drain.eq(final & ~self.i.p.last),
            ]
            for place in range(max(sizes) // unit):
                with m.If(kept_fill == place if place else ~kept_fill.any()):
                    low = place * unit
                    m.d.sync += buffer[low : low + width].eq(
                        kept[low : low + width] | self.i.p.data
                    )
            m.d.comb += [
                self.short.eq(self.i.p.last & ~final),
                self.long.eq(~self.i.p.last & final),
            ]
        with m.If(drain & self.i.valid & self.i.p.last):
            m.d.sync += drain.eq(0)
        with m.If(self.finish):
            m.d.sync += [buffer.eq(0), fill.eq(0), words.eq(0)]
            with m.If(~ended):
                m.d.sync += drain.eq(1)
        with m.If(self.begin):
            m.d.sync += [
                buffer.eq(0),
                fill.eq(0),
                words.eq((self.bits + (width - 1)) >> (width.bit_length() - 1)),
            ]
        return m
