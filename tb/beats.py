"""Conversion between planes of a tensor and the beats of a stream, in NumPy.

A set of beats is a uint8 array of shape (beats, bytes): each row is one payload, little-endian,
padded with zero bits to whole bytes.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.tensor import QuantizedTensor
from rtl.layouts import lut_write_layout

__all__ = ["beats_from_planes", "field_bits", "lut_writes", "payloads"]


def beats_from_planes(
    planes: Mapping[str, NDArray[np.uint8]], layout: data.StructLayout
) -> NDArray[np.uint8]:
    """Cut planes into beats: each field takes the next bits of its plane; ``last`` marks the end.

    Parameters
    ----------
    planes : mapping of str to uint8 array
        One plane per field of ``layout`` other than ``last``, as :mod:`golden.packing` packs them;
        ``indices`` says how many beats there are.
    layout : data.StructLayout
        Payload of the stream.

    Returns
    -------
    beats : uint8 array, shape (beats, bytes)
        The final beat is filled up with zeros.
    """
    widths = {name: layout[name].width for name in planes}
    # Indices of whole blocks fill whole bytes; a scale plane may end with padding bits.
    count = -(-8 * len(planes["indices"]) // widths["indices"])
    bits = np.zeros((count, 8 * -(-layout.size // 8)), dtype=np.uint8)
    for name, plane in planes.items():
        flat = np.unpackbits(plane, bitorder="little")[: count * widths[name]]
        flat = np.pad(flat, (0, count * widths[name] - len(flat)))
        offset = layout[name].offset
        bits[:, offset : offset + widths[name]] = flat.reshape(count, widths[name])
    bits[-1, layout["last"].offset] = 1
    return np.packbits(bits, axis=1, bitorder="little")


def field_bits(beats: NDArray[np.uint8], layout: data.StructLayout, name: str) -> NDArray[np.uint8]:
    """Bits of one field in all beats, shape (beats, field width), lowest bit first."""
    bits = np.unpackbits(beats, axis=1, bitorder="little")
    offset = layout[name].offset
    return bits[:, offset : offset + layout[name].width]


def payloads(beats: NDArray[np.uint8]) -> Iterator[int]:
    """Each beat as an integer."""
    for row in beats:
        yield int.from_bytes(row.tobytes(), "little")


def lut_writes(tensor: QuantizedTensor) -> list[int]:
    """Payloads that load all LUTs of a tensor and its layer exponent."""
    fmt = tensor.format
    layout = lut_write_layout(luts=len(tensor.luts), index_bits=fmt.index_bits, hif=fmt.hif)
    entries = [
        (lut, index, code)
        for lut, table in enumerate(tensor.luts)
        for index, code in enumerate(table.codes)
    ]
    writes = []
    for position, (lut, index, code) in enumerate(entries):
        fields = {
            "index": index,
            "lut": lut,
            "code": layout["code"].shape.from_bits(code),
            "layer_exponent": tensor.layer_exponent,
            "last": int(position == len(entries) - 1),
        }
        writes.append(layout.const(fields).as_bits())
    return writes
