"""The whole kernel: indices, scale words and activations in, finished outputs out."""

from amaranth.hdl import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.formats import FloatFormat, NumberFormat
from rtl.layouts import (
    FLOAT32,
    column_layout,
    epilogue_activations_layout,
    epilogue_outputs_layout,
    lut_write_layout,
    tile_correction_layout,
    tile_indices_layout,
    tile_row_scales_layout,
)
from rtl.lookup import DEFAULT_LOOKUP
from rtl.lut_tile import LutTile
from rtl.modes import Modes
from rtl.products import DEFAULT_MULTIPLIER
from rtl.tile_epilogue import TileEpilogue

__all__ = ["MatmulTile"]


class MatmulTile(wiring.Component):
    """Look up weights, multiply them with activations, apply row scales and corrections.

    :class:`rtl.lut_tile.LutTile` and :class:`rtl.tile_epilogue.TileEpilogue` behind it. Bit-equal
    to :func:`golden.kernel.matmul`.

    Throughput ``rows * columns`` products in every clock, as long as the epilogue of a tile takes
    no longer than the input channels of the next one (:func:`rtl.tile_epilogue.clocks_of_tile`). A
    stalled output stalls the tile once its outputs have no place.

    Where any format has row scales, tensors without them need row scales of 1.

    Parameters
    ----------
    rows, columns, modes, activation, activation_scale
        As :class:`LutTile`.
    slots, float_layout
        As :class:`TileEpilogue`.
    lookup, multiplier
        As :class:`LutTile`.

    Members
    -------
    i : In(stream.Signature(tile_indices_layout))
        Indices in tile order with scale words.
    i_lut : In(stream.Signature(lut_write_layout))
        LUTs and layer exponent of the next tensor.
    i_row_scale : In(stream.Signature(tile_row_scales_layout))
        Row scales of each tile; only if a format has them.
    i_activation : In(stream.Signature(epilogue_activations_layout))
        Activations; ``last`` where the weights have it.
    i_column : In(stream.Signature(column_layout))
        Columns of each tile that have corrections.
    i_correction : In(stream.Signature(tile_correction_layout))
        Corrections of each tile.
    o : Out(stream.Signature(epilogue_outputs_layout))
        Outputs, in the order of :class:`rtl.sop_tile.SopTile`.
    """

    def __init__(
        self, *, rows: int, columns: int, modes: Modes, activation: NumberFormat,
        activation_scale: FloatFormat, slots: int, float_layout: data.StructLayout = FLOAT32,
        lookup: str = DEFAULT_LOOKUP, multiplier: str = DEFAULT_MULTIPLIER,
    ) -> None:  # fmt: skip
        self.lut_tile = LutTile(
            rows=rows, columns=columns, modes=modes, activation=activation,
            activation_scale=activation_scale, lookup=lookup, multiplier=multiplier,
        )  # fmt: skip
        self.epilogue = TileEpilogue(
            rows=rows, columns=columns, block_size=modes.block_size, activation=activation,
            activation_scale=activation_scale, slots=slots, row_scales=modes.row_scale,
            float_layout=float_layout,
        )  # fmt: skip
        self.shape = self.epilogue.shape
        activations = epilogue_activations_layout(
            columns=columns, element=activation, scale=activation_scale
        )
        corrections = tile_correction_layout(rows=rows, slots=slots)
        outputs = epilogue_outputs_layout(units=self.shape.units, float_layout=float_layout)
        scales = {"i_row_scale": In(stream.Signature(tile_row_scales_layout(rows=rows)))}
        super().__init__(
            {
                "i": In(stream.Signature(tile_indices_layout(rows=rows, modes=modes))),
                "i_lut": In(stream.Signature(lut_write_layout(modes=modes))),
                **(scales if modes.row_scale else {}),
                "i_activation": In(stream.Signature(activations)),
                "i_column": In(stream.Signature(column_layout())),
                "i_correction": In(stream.Signature(corrections)),
                "o": Out(stream.Signature(outputs)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.lut_tile = tile = self.lut_tile
        m.submodules.epilogue = epilogue = self.epilogue
        connect(m, flipped(self.i), tile.i)
        connect(m, flipped(self.i_lut), tile.i_lut)
        connect(m, tile.o, epilogue.i)
        for name in ("i_row_scale", "i_column", "i_correction"):
            if name in self.signature.members:
                connect(m, flipped(getattr(self, name)), getattr(epilogue, name))
        connect(m, epilogue.o, flipped(self.o))
        # A beat of activations goes to both at once; neither's ready depends on its valid.
        both = [tile.i_activation, epilogue.i_activation]
        m.d.comb += [
            self.i_activation.ready.eq(both[0].ready & both[1].ready),
            both[0].valid.eq(self.i_activation.valid & both[1].ready),
            both[1].valid.eq(self.i_activation.valid & both[0].ready),
            epilogue.i_activation.p.eq(self.i_activation.p),
            *(
                tile.i_activation.p[name].eq(self.i_activation.p[name])
                for name in tile.i_activation.p.shape().members
            ),
        ]
        return m
