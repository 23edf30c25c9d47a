"""The whole decoder as one unit: stored planes and sparse corrections in, weights out."""

from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import connect, flipped

from rtl.float_decoder import FloatDecoder
from rtl.layouts import FLOAT32
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import Modes
from rtl.register_slice import cut
from rtl.sparse_merge import SparseMerge

__all__ = ["SparseDecoder"]


class SparseDecoder(wiring.Component):
    """:class:`FloatDecoder` followed by :class:`SparseMerge`, with registers between them.

    Latency 13 cycles, with bfloat16 14, where corrections are there in time. Throughput 1 beat per
    cycle, or 1 correction per cycle where a beat has more than one. Dense values are float32 until
    corrections are added. Bit-equal to :meth:`golden.corrections.Corrections.add_to` of
    :func:`golden.tensor.decode`, rows one after the other with their padding.

    Parameters
    ----------
    lanes, modes, lookup
        As :class:`LutDecoder`.
    float_layout : data.StructLayout
        As :class:`SparseMerge`.

    Members
    -------
    i : In(stream.Signature(index_beat_layout))
        Indices and scale words of the next ``lanes`` weights.
    i_lut : In(stream.Signature(lut_write_layout))
        Writes into the shadow bank of LUTs.
    i_entry : In(stream.Signature(correction_layout))
        Corrections in the order of their positions in the stream.
    o : Out(stream.Signature(merged_beat_layout))
        Weights and flags.
    """

    def __init__(
        self,
        *,
        lanes: int,
        modes: Modes,
        lookup: str = DEFAULT_LOOKUP,
        float_layout: data.StructLayout = FLOAT32,
    ) -> None:
        self.decode = FloatDecoder(lanes=lanes, modes=modes, lookup=lookup)
        self.merge = SparseMerge(lanes=lanes, float_layout=float_layout)
        super().__init__(
            {
                "i": self.decode.signature.members["i"],
                "i_lut": self.decode.signature.members["i_lut"],
                "i_entry": self.merge.signature.members["i_entry"],
                "o": self.merge.signature.members["o"],
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.decode = decode = self.decode
        m.submodules.merge = merge = self.merge
        connect(m, flipped(self.i), decode.i)
        connect(m, flipped(self.i_lut), decode.i_lut)
        connect(m, flipped(self.i_entry), merge.i_entry)
        # Whether the merger takes a beat depends on positions of corrections: not in the clock in
        # which the stages before it have to know.
        cut(m, "cut", decode.o, merge.i)
        connect(m, merge.o, flipped(self.o))
        return m
