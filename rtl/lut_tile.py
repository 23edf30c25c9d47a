"""LUTs in front of a tile: indices in tile order and activations in, sums of products out."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.formats import FloatFormat, NumberFormat
from rtl import sop_tile
from rtl.layouts import (
    lut_write_layout,
    tile_activations_layout,
    tile_indices_layout,
    tile_outputs_layout,
)
from rtl.lookup import DEFAULT_LOOKUP
from rtl.lut_banks import LutBanks, check_lookup
from rtl.modes import Modes
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_tile import SopTile

__all__ = ["LATENCY", "LutTile"]

LATENCY = 1 + sop_tile.LATENCY
"""Clocks from the last beat of a tile to its first outputs, while nothing stalls."""


def _only(modes: Modes, what: str, values: list[object]) -> None:
    """Refuse formats that would need more than one tile."""
    for fmt, value in zip(modes.formats, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"{fmt.name} has another {what} than {modes.formats[0].name}: a tile has one"
            )


class LutTile(wiring.Component):
    """Look up the weights of a tile of rows and multiply them with columns of activations.

    A :class:`rtl.lut_decoder.LutDecoder` whose lanes are rows, and :class:`rtl.sop_tile.SopTile`
    behind it. Each row has its own scale word, which comes with the first weights of a block; its
    metabit chooses the row's LUT until the block ends. All rows share one set of LUTs.

    Throughput ``rows * columns`` products in every clock, across the ends of blocks, tiles and
    tensors, if the next tensor's LUTs are there. Latency 13 cycles from the last beat of a tile to
    its first outputs (:data:`LATENCY`). Bit-equal to :func:`golden.kernel.accumulate`: row scales
    and corrections are not applied.

    LUTs are loaded as into :class:`rtl.lut_decoder.LutDecoder`: the n-th tensor on ``i`` is decoded
    with the n-th set, and ``i`` waits for it. A tensor ends with the beat that has ``last_tile``.
    Formats may be mixed, tensor by tensor, as long as one tile can take them: blocks of one length,
    scales of one format, elements of one format after the lookup, which E2M3 joins as HIF.

    Parameters
    ----------
    rows, columns : int
        1 or more, at most :data:`rtl.sop_tile.MAX_OUTPUTS` outputs.
    modes : Modes
        Formats of the weights.
    activation : NumberFormat
        Elements of the activations, of :data:`rtl.sop_tile.ELEMENTS`.
    activation_scale : FloatFormat
        Format of their block scales.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.
    multiplier : str
        One of :data:`rtl.products.MULTIPLIERS`.

    Members
    -------
    i : In(stream.Signature(tile_indices_layout))
        Indices in tile order with scale words. A tile is whole blocks: ``last`` and ``last_tile``
        anywhere else than at the end of a block are not looked at.
    i_lut : In(stream.Signature(lut_write_layout))
        LUTs and layer exponent of the next tensor.
    i_activation : In(stream.Signature(tile_activations_layout))
        Activations.
    o : Out(stream.Signature(tile_outputs_layout))
        Outputs, in the order of :class:`rtl.sop_tile.SopTile`.
    """

    def __init__(
        self, *, rows: int, columns: int, modes: Modes, activation: NumberFormat,
        activation_scale: FloatFormat, lookup: str = DEFAULT_LOOKUP,
        multiplier: str = DEFAULT_MULTIPLIER,
    ) -> None:  # fmt: skip
        check_lookup(lookup)
        _only(modes, "block size", [fmt.block_size for fmt in modes.formats])
        _only(modes, "scale format", [fmt.word.scale for fmt in modes.formats])
        _only(modes, "element format", [modes.decoded(fmt) for fmt in modes.formats])
        self.modes = modes
        self.lookup = lookup
        self.tile = SopTile(
            rows=rows, columns=columns, block_size=modes.block_size,
            weight=modes.decoded(modes.formats[0]), activation=activation,
            weight_scale=modes.formats[0].word.scale, activation_scale=activation_scale,
            multiplier=multiplier,
        )  # fmt: skip
        activations = tile_activations_layout(
            columns=columns, element=activation, scale=activation_scale
        )
        outputs = tile_outputs_layout(units=self.tile.shape.units)
        super().__init__(
            {
                "i": In(stream.Signature(tile_indices_layout(rows=rows, modes=modes))),
                "i_lut": In(stream.Signature(lut_write_layout(modes=modes))),
                "i_activation": In(stream.Signature(activations)),
                "o": Out(stream.Signature(outputs)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.tile = tile = self.tile
        connect(m, flipped(self.i_activation), tile.i_activation)
        connect(m, tile.o, flipped(self.o))
        banks = LutBanks(m, self.i_lut, self.modes, self.lookup)
        place = Signal(range(self.modes.block_size))  # of the next beat in its block
        step, first, final = Signal(), Signal(), Signal()
        # Payload registers need no reset: nothing reads them while `valid` is low.
        beat = Signal(tile.i.p.shape(), reset_less=True)
        valid = Signal()
        m.d.comb += [
            tile.i.p.eq(beat),
            tile.i.valid.eq(valid),
            self.i.ready.eq(banks.loaded & (~valid | tile.i.ready)),
            step.eq(self.i.valid & self.i.ready),
            first.eq(~place.any()),
            final.eq(place == self.modes.block_size - 1),
        ]
        metabits = []
        for row, word in enumerate(self.i.p.scale_words):
            now, kept = Signal(name=f"metabit_{row}"), Signal(name=f"kept_{row}", reset_less=True)
            m.d.comb += now.eq(banks.metabit(word))
            with m.If(step & first):
                m.d.sync += [kept.eq(now), beat.scales[row].eq(banks.scale(word))]
            metabits.append(Mux(first, now, kept))
        codes = banks.look_up(self.i.p.indices, metabits)
        with m.If(tile.i.ready):
            m.d.sync += valid.eq(0)
        with m.If(step):
            m.d.sync += [
                valid.eq(1),
                place.eq(place + 1),
                beat.layer_exponent.eq(banks.layer_exponent),
                beat.last.eq(self.i.p.last),
                *(beat.codes[row].eq(code) for row, code in enumerate(codes)),
            ]
        banks.change_at(step & final & self.i.p.last & self.i.p.last_tile)
        return m
