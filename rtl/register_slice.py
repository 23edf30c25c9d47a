"""A stream cut by registers in both directions."""

from amaranth.hdl import Module, Mux, ResetInserter, ShapeLike, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, PureInterface, connect

__all__ = ["RegisterSlice", "any_layout", "cut"]


def any_layout(shape: ShapeLike) -> ShapeLike:
    """The payload as it was given."""
    return shape


class RegisterSlice(wiring.Component):
    """Hold up to two words, so that no input reaches an output of the other side in one clock.

    Latency 1 cycle, throughput 1 word per cycle. AXI wants its ports like this (AMBA AXI, IHI 0022,
    A3.2.1: no combinatorial paths between inputs and outputs).

    Parameters
    ----------
    shape : ShapeLike
        Payload.

    Members
    -------
    i : In(stream.Signature(any_layout))
        Words.
    o : Out(stream.Signature(any_layout))
        The same words.
    """

    def __init__(self, *, shape: ShapeLike) -> None:
        super().__init__(
            {
                "i": In(stream.Signature(any_layout(shape))),
                "o": Out(stream.Signature(any_layout(shape))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        shape = self.o.p.shape()
        # Payload registers need no reset: nothing reads them while they are not valid.
        word = Signal(shape, reset_less=True)
        spare = Signal(shape, reset_less=True)  # what came while the output waited
        spare_valid = Signal()
        m.d.comb += [self.i.ready.eq(~spare_valid), self.o.p.eq(word)]
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [
                self.o.valid.eq(self.i.valid | spare_valid),
                word.eq(Mux(spare_valid, spare, self.i.p)),
                spare_valid.eq(0),
            ]
        with m.Elif(self.i.valid & ~spare_valid):
            m.d.sync += [spare.eq(self.i.p), spare_valid.eq(1)]
        return m


def cut(
    m: Module, name: str, source: PureInterface, sink: PureInterface, clear: Value | None = None
) -> None:
    """Connect two streams through registers in both directions.

    Parameters
    ----------
    m : Module
        Gets the registers.
    name : str
        Of the submodule.
    source, sink : streams
    clear : Value, optional
        Empties the registers.
    """
    registers = RegisterSlice(shape=source.p.shape())
    m.submodules[name] = registers if clear is None else ResetInserter(clear)(registers)
    connect(m, source, registers.i)
    connect(m, registers.o, sink)
