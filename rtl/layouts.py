"""Payloads of every stream, built from the format objects of the golden model.

This is the only place where a format becomes a bit layout; testbenches pack and unpack through the
same layouts.
"""

from amaranth.hdl import Shape, ShapeCastable, signed, unsigned
from amaranth.lib import data

from golden.formats import FloatFormat, NumberFormat
from rtl.modes import Modes

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "LAYER_EXPONENT_BITS",
    "column_layout",
    "correction_layout",
    "element_layout",
    "epilogue_activations_layout",
    "epilogue_outputs_layout",
    "float_beat_layout",
    "format_layout",
    "hif_beat_layout",
    "index_beat_layout",
    "lut_write_layout",
    "merged_beat_layout",
    "tile_activations_layout",
    "tile_correction_layout",
    "tile_indices_layout",
    "tile_outputs_layout",
    "tile_row_scales_layout",
    "tile_weights_layout",
]

LAYER_EXPONENT_BITS = 8  # two's complement; golden.tensor.QuantizedTensor checks the range

FLOAT32 = data.StructLayout({"mantissa": 23, "exponent": 8, "sign": 1})  # IEEE 754-2019, 3.4
BFLOAT16 = data.StructLayout({"mantissa": 7, "exponent": 8, "sign": 1})


def _struct(fields: tuple[tuple[str, int], ...]) -> data.StructLayout:
    # UE8M0 has no mantissa: a field of no bits would only be a name for nothing.
    return data.StructLayout({name: width for name, width in fields if width})


def format_layout(fmt: NumberFormat) -> data.StructLayout:
    """Fields of a number format, least significant first."""
    return _struct(fmt.fields)


def _mode_field(modes: Modes) -> dict[str, int]:
    return {"mode": modes.mode_bits} if modes.mode_bits else {}


def _row_scale_field(modes: Modes, slots: int) -> dict[str, data.ArrayLayout]:
    return {"row_scales": data.ArrayLayout(BFLOAT16, slots)} if modes.row_scale else {}


def element_layout(modes: Modes) -> Shape | ShapeCastable:
    """A decoded code: fields where there is one format of codes, else plain bits."""
    decoded = {modes.decoded(fmt) for fmt in modes.formats}
    return format_layout(decoded.pop()) if len(decoded) == 1 else unsigned(modes.code_bits)


def index_beat_layout(*, lanes: int, modes: Modes) -> data.StructLayout:
    """A beat as the planes hold it: ``lanes`` elements and the scale words of their blocks.

    Elements and scale words of formats narrower than the widest are extended with zeros. Where a
    block is longer than :attr:`Modes.block_size` or than a beat, its scale word is repeated.
    ``row_scales`` exists if any format has row scales: bfloat16, one for each scale word. ``last``
    marks the final beat of a tensor.
    """
    slots = modes.slots(lanes)
    return data.StructLayout(
        {
            "indices": data.ArrayLayout(modes.element_bits, lanes),
            "scale_words": data.ArrayLayout(modes.word_bits, slots),
            **_row_scale_field(modes, slots),
            "last": 1,
        }
    )


def lut_write_layout(*, modes: Modes) -> data.StructLayout:
    """One write into the shadow bank.

    ``last`` completes the bank; ``layer_exponent`` and ``mode`` count in that write only.
    """
    return data.StructLayout(
        {
            "index": modes.index_bits,
            "lut": max(0, modes.luts - 1).bit_length(),
            "code": format_layout(modes.hif),
            "layer_exponent": signed(LAYER_EXPONENT_BITS),
            **_mode_field(modes),
            "last": 1,
        }
    )


def hif_beat_layout(*, lanes: int, modes: Modes) -> data.StructLayout:
    """A decoded beat: ``lanes`` codes, the scale codes of their blocks, layer exponent and mode.

    The layer exponent includes what makes E2M3 an integer, so HIF consumers need not tell the two
    apart; that takes one bit more.
    """
    slots = modes.slots(lanes)
    return data.StructLayout(
        {
            "codes": data.ArrayLayout(element_layout(modes), lanes),
            "scales": data.ArrayLayout(modes.scale_bits, slots),
            **_row_scale_field(modes, slots),
            "layer_exponent": signed(LAYER_EXPONENT_BITS + modes.promotes),
            **_mode_field(modes),
            "last": 1,
        }
    )


def float_beat_layout(*, lanes: int, float_layout: data.StructLayout) -> data.StructLayout:
    """A beat of floating-point values with flags that are set if any lane raised them."""
    return data.StructLayout(
        {
            "values": data.ArrayLayout(float_layout, lanes),
            "reserved": 1,
            "overflow": 1,
            "underflow": 1,
            "last": 1,
        }
    )


def correction_layout() -> data.StructLayout:
    """One entry of the sparse part: a bfloat16 to add at a position of the stream of weights.

    ``position`` counts the tensor's weights in stream order, padding included. ``last`` marks a
    tensor's final entry. A tensor without corrections has one entry with ``last`` and ``empty``.
    """
    return data.StructLayout({"position": 32, "value": BFLOAT16, "empty": 1, "last": 1})


def merged_beat_layout(*, lanes: int, float_layout: data.StructLayout) -> data.StructLayout:
    """A beat of corrected values: as :func:`float_beat_layout`, with one more flag."""
    members = float_beat_layout(lanes=lanes, float_layout=float_layout).members
    return data.StructLayout({**members, "misplaced": 1})


def tile_weights_layout(
    *, rows: int, element: NumberFormat, scale: NumberFormat
) -> data.StructLayout:
    """Weights of one k: a code for each row of a tile.

    Scale codes and layer exponent count in the first beat of a block, ``last`` in the last beat of
    the last block of a tile. The layer exponent has room for what makes E2M3 in HIF codes integers.
    """
    return data.StructLayout(
        {
            "codes": data.ArrayLayout(format_layout(element), rows),
            "scales": data.ArrayLayout(scale.width, rows),
            "layer_exponent": signed(LAYER_EXPONENT_BITS + 1),
            "last": 1,
        }
    )


def tile_indices_layout(*, rows: int, modes: Modes) -> data.StructLayout:
    """Indices of one k as planes in tile order hold them: one for each row of a tile.

    Scale words count in the first beat of a block, ``last`` in the last beat of the last block of a
    tile, and ``last_tile`` there: it ends a tensor.
    """
    return data.StructLayout(
        {
            "indices": data.ArrayLayout(modes.element_bits, rows),
            "scale_words": data.ArrayLayout(modes.word_bits, rows),
            "last": 1,
            "last_tile": 1,
        }
    )


def tile_activations_layout(
    *, columns: int, element: NumberFormat, scale: FloatFormat
) -> data.StructLayout:
    """Activations of one k: a code for each column of a tile, which is a token.

    Scale codes count in the first beat of a block, and so do powers of two of the tokens, which
    exist where the scale has fewer than 8 exponent bits.
    """
    exponents = {"token_exponents": data.ArrayLayout(signed(LAYER_EXPONENT_BITS), columns)}
    return data.StructLayout(
        {
            "codes": data.ArrayLayout(format_layout(element), columns),
            "scales": data.ArrayLayout(scale.width, columns),
            **(exponents if scale.exponent_bits < 8 else {}),
        }
    )


def tile_outputs_layout(*, units: int) -> data.StructLayout:
    """Outputs of a tile, one of each scale unit: float32, and flags."""
    return data.StructLayout(
        {
            "values": data.ArrayLayout(FLOAT32, units),
            "reserved": 1,
            "overflow": 1,
            "last": 1,
        }
    )


def epilogue_activations_layout(
    *, columns: int, element: NumberFormat, scale: FloatFormat
) -> data.StructLayout:
    """As :func:`tile_activations_layout`; ``last`` marks the final beat of a tile."""
    members = tile_activations_layout(columns=columns, element=element, scale=scale).members
    return data.StructLayout({**members, "last": 1})


def tile_row_scales_layout(*, rows: int) -> data.StructLayout:
    """Row scales of all rows of a tile."""
    return data.StructLayout({"scales": data.ArrayLayout(BFLOAT16, rows)})


def column_layout() -> data.StructLayout:
    """An input channel of which a tile has corrections, counted from the tile's first.

    They ascend; ``last`` marks the final one of a tile. A tile without corrections has one with
    ``last`` and ``empty``.
    """
    return data.StructLayout({"column": 32, "empty": 1, "last": 1})


def tile_correction_layout(*, rows: int, slots: int) -> data.StructLayout:
    """A correction of one row of a tile.

    ``slot`` counts the tile's columns on :func:`column_layout` from 0. ``last`` marks the final
    correction of a tile; a tile without any has one with ``last`` and ``empty``.
    """
    return data.StructLayout(
        {
            "row": (rows - 1).bit_length(),
            "slot": (slots - 1).bit_length(),
            "value": BFLOAT16,
            "empty": 1,
            "last": 1,
        }
    )


def epilogue_outputs_layout(*, units: int, float_layout: data.StructLayout) -> data.StructLayout:
    """As :func:`tile_outputs_layout`, in either float format, and one flag more."""
    return data.StructLayout(
        {
            "values": data.ArrayLayout(float_layout, units),
            "reserved": 1,
            "overflow": 1,
            "misplaced": 1,
            "last": 1,
        }
    )
