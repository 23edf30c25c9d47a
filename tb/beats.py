"""Conversion between planes of a tensor and the beats of a stream, in NumPy.

A set of beats is a uint8 array of shape (beats, bytes): each row is one payload, little-endian,
padded with zero bits to whole bytes.
"""

from collections.abc import Iterator

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.notation import QuantFormat
from golden.packing import unpack_bits
from golden.tensor import QuantizedTensor
from rtl.layouts import index_beat_layout, lut_write_layout
from rtl.modes import Modes

__all__ = ["beats_from_planes", "field_bits", "lut_writes", "payloads"]


def beats_from_planes(
    index_plane: NDArray[np.uint8],
    scale_plane: NDArray[np.uint8],
    fmt: QuantFormat,
    *,
    lanes: int,
    modes: Modes,
    row_scales: NDArray[np.uint16] | None = None,
) -> NDArray[np.uint8]:
    """Cut the planes of a tensor into beats of :func:`rtl.layouts.index_beat_layout`.

    Parameters
    ----------
    index_plane, scale_plane : uint8 arrays
        As :mod:`golden.packing` packs them, whole blocks.
    fmt : QuantFormat
        Format of the tensor, one of ``modes``.
    lanes : int
    modes : Modes
    row_scales : uint16 array, shape (rows,), optional
        bfloat16 bit patterns, where ``fmt`` has row scales.

    Returns
    -------
    beats : uint8 array, shape (beats, bytes)
        The final beat is filled up with zeros and has ``last``.
    """
    layout = index_beat_layout(lanes=lanes, modes=modes)
    elements = 8 * len(index_plane) // fmt.index_bits
    blocks = elements // fmt.block_size
    slots = modes.slots(lanes)
    repeat = fmt.block_size * slots // lanes
    fields = {
        "indices": unpack_bits(index_plane, fmt.index_bits, elements),
        "scale_words": unpack_bits(scale_plane, fmt.word.width, blocks).repeat(repeat),
    }
    if row_scales is not None:
        fields["row_scales"] = row_scales.repeat(blocks // len(row_scales) * repeat)
    count = -(-elements // lanes)
    bits = np.zeros((count, 8 * -(-layout.size // 8)), dtype=np.uint8)
    for name, values in fields.items():
        slot = layout[name]
        width = slot.width // slot.shape.length
        padded = np.zeros(count * slot.shape.length, dtype="<u2")
        padded[: len(values)] = values
        spread = np.unpackbits(padded.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
        bits[:, slot.offset : slot.offset + slot.width] = spread[:, :width].reshape(count, -1)
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


def lut_writes(tensor: QuantizedTensor, modes: Modes) -> list[int]:
    """Payloads that load all LUTs of a tensor, its layer exponent and its mode.

    A tensor of atoms has one write, of an entry that nothing reads.
    """
    layout = lut_write_layout(modes=modes)
    entries = [
        (lut, index, code)
        for lut, table in enumerate(tensor.luts)
        for index, code in enumerate(table.codes)
    ] or [(0, 0, 0)]
    writes = []
    for position, (lut, index, code) in enumerate(entries):
        fields = {
            "index": index,
            "lut": lut,
            "code": layout["code"].shape.from_bits(code),
            "layer_exponent": tensor.layer_exponent,
            "last": int(position == len(entries) - 1),
        }
        if modes.mode_bits:
            fields["mode"] = modes.formats.index(tensor.format)
        writes.append(layout.const(fields).as_bits())
    return writes
