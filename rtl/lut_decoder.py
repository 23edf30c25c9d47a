"""The LUT decoder: indices and metabits in, HIF codes out."""

from amaranth.hdl import Cat, Module, Signal, signed
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.codebooks import BLOCK_SIZES
from golden.formats import HifFormat
from golden.notation import MAX_SCALE_WORD_BITS, ScaleWord
from rtl.layouts import (
    LAYER_EXPONENT_BITS,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
)

__all__ = ["LutDecoder", "check_lanes"]

INDEX_BITS = range(4, 7)
MAX_LANES = 512


def check_lanes(lanes: int, block_size: int) -> None:
    """Refuse a beat that is not a whole number of blocks.

    Raises
    ------
    ValueError
        If ``block_size`` is not one of the format's, or ``lanes`` is not a multiple of it up to
        512.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, not {block_size!r}")
    if not (block_size <= lanes <= MAX_LANES and lanes % block_size == 0):
        raise ValueError(
            f"lanes must be a multiple of the block size {block_size} up to {MAX_LANES}, "
            f"not {lanes!r}"
        )


class LutDecoder(wiring.Component):
    """Look up every index of a beat in the LUT that its block's metabit selects.

    Latency 1 cycle, throughput 1 beat per cycle; a stalled output stalls the input. The n-th tensor
    on ``i`` is decoded with the n-th set of LUTs on ``i_lut``, however the two are timed: LUTs are
    written into a shadow bank, which becomes active right after the beat with ``last``, or at once
    while no tensor is under way. If the bank is complete by then, the next tensor starts without a
    bubble; if not, ``i`` waits for it. Every entry must be written for every tensor.

    Reset empties both banks and drops the beat in flight. Bit-exact with the LUT step of
    :func:`golden.tensor.decode`.

    Parameters
    ----------
    lanes : int
        Weights per beat, a multiple of ``block_size``, at most 512.
    index_bits : int
        Bits of a LUT index, 4 to 6.
    block_size : int
        Weights per scale word: 8, 16, 32 or 64.
    hif : HifFormat
        Format of LUT entries.
    word : ScaleWord
        Scale word; with a metabit there are two LUTs, without it one.

    Members
    -------
    i : In(stream.Signature(index_beat_layout))
        Indices and scale words of the next ``lanes`` weights.
    i_lut : In(stream.Signature(lut_write_layout))
        Writes into the shadow bank; not ready while a complete bank waits for its tensor.
    o : Out(stream.Signature(hif_beat_layout))
        HIF codes, scale codes without metabit, and the layer exponent of the tensor.
    """

    def __init__(
        self, *, lanes: int, index_bits: int, block_size: int, hif: HifFormat, word: ScaleWord
    ):
        check_lanes(lanes, block_size)
        if index_bits not in INDEX_BITS:
            raise ValueError(f"index_bits must be 4, 5 or 6, not {index_bits!r}")
        if not 2 <= word.width <= MAX_SCALE_WORD_BITS:
            raise ValueError(f"scale words must have 2 to 16 bits, not {word.width}")
        self.lanes = lanes
        self.index_bits = index_bits
        self.block_size = block_size
        self.hif = hif
        self.word = word
        self.luts = 1 << word.metabit_bits
        super().__init__(
            {
                "i": In(
                    stream.Signature(
                        index_beat_layout(
                            lanes=lanes, index_bits=index_bits, block_size=block_size, word=word
                        )
                    )
                ),
                "i_lut": In(
                    stream.Signature(
                        lut_write_layout(luts=self.luts, index_bits=index_bits, hif=hif)
                    )
                ),
                "o": Out(
                    stream.Signature(
                        hif_beat_layout(lanes=lanes, block_size=block_size, hif=hif, word=word)
                    )
                ),
            }
        )

    def elaborate(self, platform):
        m = Module()
        active = Signal()  # which bank decodes
        loaded = Signal()  # the active bank holds the LUTs of the current tensor
        pending = Signal()  # the shadow bank is complete
        active_exponent = Signal(signed(LAYER_EXPONENT_BITS), reset_less=True)
        pending_exponent = Signal(signed(LAYER_EXPONENT_BITS), reset_less=True)

        # Two banks of `luts` tables: address = index, LUT, bank from the lowest bit up.
        m.submodules.banks = banks = Memory(
            shape=self.hif.width, depth=2 * self.luts << self.index_bits, init=[]
        )
        write = banks.write_port()
        lut_write = self.i_lut.p
        m.d.comb += [
            self.i_lut.ready.eq(~pending),
            write.addr.eq(Cat(lut_write.index, lut_write.lut, ~active)),
            write.data.eq(lut_write.code),
            write.en.eq(self.i_lut.valid & self.i_lut.ready),
        ]
        with m.If(write.en & lut_write.last):
            m.d.sync += [pending.eq(1), pending_exponent.eq(lut_write.layer_exponent)]

        # Payload registers need no reset: nothing reads them while `valid` is low.
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)
        step = Signal()  # a beat moves from the input into the output register
        m.d.comb += [
            self.i.ready.eq(loaded & (~self.o.valid | self.o.ready)),
            step.eq(self.i.valid & self.i.ready),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(step):
            m.d.sync += [
                self.o.valid.eq(1),
                beat.layer_exponent.eq(active_exponent),
                beat.last.eq(self.i.p.last),
            ]
            for block, word in enumerate(self.i.p.scale_words):
                m.d.sync += beat.scales[block].eq(word.as_value()[: self.word.scale.width])
            for lane, index in enumerate(self.i.p.indices):
                word = self.i.p.scale_words[lane // self.block_size]
                metabit = word.metabit if self.word.metabit_bits else Cat()
                read = banks.read_port(domain="comb")
                m.d.comb += read.addr.eq(Cat(index, metabit, active))
                m.d.sync += beat.codes[lane].eq(read.data)

        # The boundary between two tensors: the shadow bank takes over, or the input has to wait.
        boundary = Signal()
        m.d.comb += boundary.eq(~loaded | (step & self.i.p.last))
        with m.If(boundary):
            m.d.sync += loaded.eq(pending)
            with m.If(pending):
                m.d.sync += [
                    active.eq(~active),
                    active_exponent.eq(pending_exponent),
                    pending.eq(0),
                ]
        return m
