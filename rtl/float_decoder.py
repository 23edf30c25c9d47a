"""The dense decoder as one unit: stored planes in, floating point out."""

from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import connect, flipped

from rtl.hif_to_float import HifToFloat
from rtl.layouts import FLOAT32
from rtl.lookup import DEFAULT_LOOKUP
from rtl.lut_decoder import LutDecoder
from rtl.modes import Modes

__all__ = ["FloatDecoder"]


class FloatDecoder(wiring.Component):
    """:class:`LutDecoder` followed by :class:`HifToFloat`.

    Latency 5 cycles, throughput 1 beat per cycle; a stalled output stalls the input. Bit-equal to
    :func:`golden.tensor.decode` with ``padded=True``, rows one after the other.

    Parameters
    ----------
    lanes, modes, lookup
        As :class:`LutDecoder`.
    float_layout : data.StructLayout
        As :class:`HifToFloat`.

    Members
    -------
    i : In(stream.Signature(index_beat_layout))
        Indices and scale words of the next ``lanes`` weights.
    i_lut : In(stream.Signature(lut_write_layout))
        Writes into the shadow bank of LUTs.
    o : Out(stream.Signature(float_beat_layout))
        Floating-point values and flags.
    """

    def __init__(
        self,
        *,
        lanes: int,
        modes: Modes,
        lookup: str = DEFAULT_LOOKUP,
        float_layout: data.StructLayout = FLOAT32,
    ) -> None:
        self.lookup = LutDecoder(lanes=lanes, modes=modes, lookup=lookup)
        self.convert = HifToFloat(lanes=lanes, modes=modes, float_layout=float_layout)
        super().__init__(
            {
                "i": self.lookup.signature.members["i"],
                "i_lut": self.lookup.signature.members["i_lut"],
                "o": self.convert.signature.members["o"],
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.lookup = lookup = self.lookup
        m.submodules.convert = convert = self.convert
        connect(m, flipped(self.i), lookup.i)
        connect(m, flipped(self.i_lut), lookup.i_lut)
        connect(m, lookup.o, convert.i)
        connect(m, convert.o, flipped(self.o))
        return m
