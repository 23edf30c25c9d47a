"""Payloads of every stream, built from the format objects of the golden model.

This is the only place where a format becomes a bit layout; testbenches pack and unpack through the
same layouts.
"""

from amaranth.hdl import signed
from amaranth.lib import data

from golden.formats import HifFormat, NumberFormat
from golden.notation import ScaleWord

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "LAYER_EXPONENT_BITS",
    "float_beat_layout",
    "format_layout",
    "hif_beat_layout",
    "index_beat_layout",
    "lut_write_layout",
    "scale_word_layout",
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


def scale_word_layout(word: ScaleWord) -> data.StructLayout:
    """Fields of a scale word: those of the scale, then the metabit where there is one."""
    return _struct(word.fields)


def index_beat_layout(
    *, lanes: int, index_bits: int, block_size: int, word: ScaleWord
) -> data.StructLayout:
    """A beat as the planes hold it: ``lanes`` indices and the scale words of their blocks.

    ``last`` marks the final beat of a tensor.
    """
    return data.StructLayout(
        {
            "indices": data.ArrayLayout(index_bits, lanes),
            "scale_words": data.ArrayLayout(scale_word_layout(word), lanes // block_size),
            "last": 1,
        }
    )


def lut_write_layout(*, luts: int, index_bits: int, hif: HifFormat) -> data.StructLayout:
    """One write into the shadow bank.

    ``last`` completes the bank; ``layer_exponent`` counts in that write only.
    """
    return data.StructLayout(
        {
            "index": index_bits,
            "lut": (luts - 1).bit_length(),
            "code": format_layout(hif),
            "layer_exponent": signed(LAYER_EXPONENT_BITS),
            "last": 1,
        }
    )


def hif_beat_layout(
    *, lanes: int, block_size: int, hif: HifFormat, word: ScaleWord
) -> data.StructLayout:
    """A decoded beat: ``lanes`` HIF codes, the scale codes of their blocks, the layer exponent."""
    return data.StructLayout(
        {
            "codes": data.ArrayLayout(format_layout(hif), lanes),
            "scales": data.ArrayLayout(format_layout(word.scale), lanes // block_size),
            "layer_exponent": signed(LAYER_EXPONENT_BITS),
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
