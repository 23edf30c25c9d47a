"""The LUT decoder: indices and metabits in, HIF codes out."""

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import hif_beat_layout, index_beat_layout, lut_write_layout
from rtl.lookup import DEFAULT_LOOKUP
from rtl.lut_banks import LutBanks, check_lookup
from rtl.modes import Modes, check_lanes

__all__ = ["LutDecoder"]


class LutDecoder(wiring.Component):
    """Look up every index of a beat in the LUT that its block's metabit selects.

    Latency 1 cycle, throughput 1 beat per cycle; a stalled output stalls the input. The n-th tensor
    on ``i`` is decoded with the n-th set of LUTs on ``i_lut``, however the two are timed: LUTs are
    written into a shadow bank, which becomes active right after the beat with ``last``, or at once
    while no tensor is under way. If the bank is complete by then, the next tensor starts without a
    bubble; if not, ``i`` waits for it. Every entry that the tensor's indices can name must be
    written for every tensor; a tensor of atoms needs only the write with ``last``.

    Reset empties both banks and drops the beat in flight. Bit-exact with the LUT step of
    :func:`golden.tensor.decode`.

    Parameters
    ----------
    lanes : int
        Weights per beat, a multiple or a divisor of the block size, 8 to 512.
    modes : Modes
        Formats that can be decoded.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`: structures that do the same at different cost.

    Members
    -------
    i : In(stream.Signature(index_beat_layout))
        Indices and scale words of the next ``lanes`` weights.
    i_lut : In(stream.Signature(lut_write_layout))
        Writes into the shadow bank; not ready while a complete bank waits for its tensor.
    o : Out(stream.Signature(hif_beat_layout))
        Codes, scale codes without metabit, layer exponent and mode of the tensor. Codes are HIF,
        but those of atoms other than E2M3 stay as they are.
    """

    def __init__(self, *, lanes: int, modes: Modes, lookup: str = DEFAULT_LOOKUP):
        check_lanes(lanes, modes.block_size)
        check_lookup(lookup)
        self.lanes = lanes
        self.modes = modes
        self.lookup = lookup
        super().__init__(
            {
                "i": In(stream.Signature(index_beat_layout(lanes=lanes, modes=modes))),
                "i_lut": In(stream.Signature(lut_write_layout(modes=modes))),
                "o": Out(stream.Signature(hif_beat_layout(lanes=lanes, modes=modes))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        modes = self.modes
        banks = LutBanks(m, self.i_lut, modes, self.lookup)

        # Payload registers need no reset: nothing reads them while `valid` is low.
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)
        step = Signal()  # a beat moves from the input into the output register
        m.d.comb += [
            self.i.ready.eq(banks.loaded & (~self.o.valid | self.o.ready)),
            step.eq(self.i.valid & self.i.ready),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)

        scale_words = self.i.p.scale_words
        codes = banks.look_up(self.i.p.indices, [banks.metabit(word) for word in scale_words])
        with m.If(step):
            m.d.sync += [
                self.o.valid.eq(1),
                beat.layer_exponent.eq(banks.layer_exponent),
                beat.last.eq(self.i.p.last),
            ]
            if modes.mode_bits:
                m.d.sync += beat.mode.eq(banks.mode)
            if modes.row_scale:
                m.d.sync += beat.row_scales.eq(self.i.p.row_scales)
            for slot, word in enumerate(scale_words):
                m.d.sync += beat.scales[slot].eq(banks.scale(word))
            for lane, code in enumerate(codes):
                m.d.sync += beat.codes[lane].eq(code)
        banks.change_at(step & self.i.p.last)
        return m
