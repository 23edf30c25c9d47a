"""Conversion between planes of a tensor and the beats of a stream, in NumPy.

A set of beats is a uint8 array of shape (beats, bytes): each row is one payload, little-endian,
padded with zero bits to whole bytes.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.notation import QuantFormat
from golden.packing import unpack_bits
from golden.tensor import QuantizedTensor
from rtl.layouts import index_beat_layout, lut_write_layout
from rtl.modes import Modes

__all__ = ["beats_from_fields", "beats_from_planes", "field_bits", "lut_writes", "payloads"]


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
    elements = 8 * len(index_plane) // fmt.index_bits
    blocks = elements // fmt.block_size
    repeat = fmt.block_size * modes.slots(lanes) // lanes
    fields = {
        "indices": unpack_bits(index_plane, fmt.index_bits, elements),
        "scale_words": unpack_bits(scale_plane, fmt.word.width, blocks).repeat(repeat),
    }
    if row_scales is not None:
        fields["row_scales"] = row_scales.repeat(blocks // len(row_scales) * repeat)
    return beats_from_fields(fields, index_beat_layout(lanes=lanes, modes=modes))


def beats_from_fields(
    fields: Mapping[str, NDArray[np.unsignedinteger] | int], layout: data.StructLayout
) -> NDArray[np.uint8]:
    """Pack the values of one tensor into beats.

    Parameters
    ----------
    fields : mapping of str to array or int
        Unsigned values of the elements of array fields, in stream order; the first one says how
        many beats there are, and all are filled up with zeros. An integer is the same in every
        beat; fields that are missing are zero. ``last`` is set in the final beat.
    layout : data.StructLayout
        Payload of the stream.

    Returns
    -------
    beats : uint8 array, shape (beats, bytes)
    """
    columns: list[tuple[NDArray[np.uint32], int]] = []
    count, end = 0, 0
    for name, field in layout:
        length = field.shape.length if isinstance(field.shape, data.ArrayLayout) else 1
        width = field.width // length
        values = fields.get(name, 0)
        if isinstance(values, int):
            padded = np.full(count * length, values & (1 << width) - 1, dtype="<u4")
        else:
            count = count or -(-len(values) // length)
            padded = np.zeros(count * length, dtype="<u4")
            padded[: len(values)] = values
        if name == "last":
            padded[-1] = 1
        assert field.offset == end, "a layout without gaps"
        end += field.width
        columns.append((padded, width))
    parts = []
    while columns and columns[0][1] in (8, 16, 32):  # whole bytes: no bit has to be moved
        padded, width = columns.pop(0)
        parts.append(padded.astype(f"<u{width // 8}").view(np.uint8).reshape(count, -1))
    if columns:
        bits = [_bits(padded, width).reshape(count, -1) for padded, width in columns]
        parts.append(np.packbits(np.concatenate(bits, axis=1), axis=1, bitorder="little"))
    return np.concatenate(parts, axis=1)


def _bits(values: NDArray[np.uint32], width: int) -> NDArray[np.uint8]:
    """The low bits of every value, lowest first."""
    size = -(-width // 8)
    raw = values.view(np.uint8).reshape(-1, 4)[:, :size]
    return np.unpackbits(raw, axis=1, bitorder="little")[:, :width]


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
            fields["mode"] = modes.mode_of(tensor.format)
        writes.append(layout.const(fields).as_bits())
    return writes
