"""Bit planes: how indices and scale words lie in a file, and how the hardware streams them.

Element i of a plane occupies bits ``i * width`` to ``(i + 1) * width - 1``; bit 0 is the least
significant bit of byte 0. Two 4-bit indices thus share a byte, the first in the low nibble. Planes
run over the blocks of all rows without padding between rows and end with zero bits up to a whole
byte.
"""

import numpy as np
from numpy.typing import NDArray

from golden.convert import code_dtype
from golden.errors import InputError

__all__ = ["pack_bits", "plane_bytes", "unpack_bits"]

# Elements handled at a time: a multiple of 8, so that every part but the last is whole bytes.
_CHUNK = 1 << 18


def plane_bytes(count: int, width: int) -> int:
    """Bytes of a plane of ``count`` elements of ``width`` bits."""
    return -(-count * width // 8)


def pack_bits(elements: NDArray[np.unsignedinteger], width: int) -> NDArray[np.uint8]:
    """Pack unsigned integers into a plane.

    Parameters
    ----------
    elements : uint8 or uint16 array, any shape, taken in row-major order
        Values in ``range(2**width)``. Not modified.
    width : int
        Bits per element, 1 to 16.

    Returns
    -------
    plane : uint8 array, shape (plane_bytes(elements.size, width),)

    Raises
    ------
    ValueError
        If an element does not fit into ``width`` bits.
    """
    flat = elements.reshape(-1)
    if flat.size and int(flat.max()) >> width:
        raise ValueError(f"element {int(flat.max())} does not fit into {width} bits")
    if width == 8:
        return flat.astype(np.uint8)
    if width == 4:
        padded = np.append(flat, np.zeros(flat.size % 2, flat.dtype)).astype(np.uint8)
        return padded[0::2] | padded[1::2] << np.uint8(4)
    positions = np.arange(width, dtype=np.uint16)
    parts = [
        np.packbits((flat[start : start + _CHUNK, None] >> positions & 1).astype(np.uint8),
                    bitorder="little")
        for start in range(0, flat.size, _CHUNK)
    ]  # fmt: skip
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_bits(plane: NDArray[np.uint8], width: int, count: int) -> NDArray[np.unsignedinteger]:
    """Unpack a plane; the inverse of :func:`pack_bits`.

    Parameters
    ----------
    plane : uint8 array, shape (plane_bytes(count, width),)
        Not modified.
    width : int
        Bits per element, 1 to 16.
    count : int
        Number of elements.

    Returns
    -------
    elements : uint8 (width up to 8) or uint16 array, shape (count,)

    Raises
    ------
    InputError
        If the plane has the wrong length, or bits after the last element are not zero.
    """
    expected = plane_bytes(count, width)
    if plane.shape != (expected,):
        raise InputError(f"plane of {count} x {width} bits has {expected} bytes, not {plane.shape}")
    used_in_last = count * width % 8
    if used_in_last and int(plane[-1]) >> used_in_last:
        raise InputError("plane has bits set after its last element")
    if width == 8:
        return plane.copy()
    if width == 4:
        return np.stack([plane & np.uint8(15), plane >> np.uint8(4)], axis=1).reshape(-1)[:count]
    dtype = code_dtype(width)
    weights: NDArray[np.unsignedinteger] = np.left_shift(1, np.arange(width)).astype(dtype)
    parts = []
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        part = plane[start * width // 8 : plane_bytes(stop, width)]
        bits = np.unpackbits(part, count=(stop - start) * width, bitorder="little")
        parts.append(np.sum(bits.reshape(-1, width) * weights, axis=1, dtype=dtype))
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
