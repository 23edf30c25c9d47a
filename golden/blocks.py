"""Weight matrices cut into blocks, and what belongs to each block."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError

__all__ = ["CHANNEL_NORM_RANGE", "Blocks", "check_weights", "cut_blocks", "usable_channel_norms"]

Float64 = NDArray[np.float64]

CHANNEL_NORM_RANGE = (1e-60, 1e60)
"""Norms outside would take weighted squared errors of float32 weights out of float64's range."""

# Weights per chunk: one float64 array of this size is 256 KiB, so that the handful that a chunk
# needs stays in the second-level cache.
_CHUNK_WEIGHTS = 1 << 15


def check_weights(weights: NDArray[np.float32]) -> None:
    """Refuse what cannot be quantized.

    Raises
    ------
    InputError
        If ``weights`` is not a non-empty float32 matrix, or holds NaN or infinity; the message
        names the position and how many there are.
    """
    if weights.ndim != 2 or weights.size == 0:
        raise InputError(f"weights must be a non-empty matrix (rows, columns), not {weights.shape}")
    if weights.dtype != np.float32:
        raise InputError(f"weights must be float32, not {weights.dtype}")
    finite = np.isfinite(weights)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"weight at row {row}, column {column} is {weights[row, column]} "
            f"({int((~finite).sum())} weights are not finite)"
        )


def usable_channel_norms(
    channel_norms: NDArray[np.floating] | None, columns: int
) -> tuple[Float64, int]:
    """Channel norms with 1 in place of those that calibration did not give.

    Parameters
    ----------
    channel_norms : float array, shape (columns,), or None
        Root mean square of each input channel; 0 or NaN where the calibration text never excited
        it. None stands for no calibration: all one, and none of them counted.
    columns : int
        Input channels of the layer.

    Returns
    -------
    norms : float64 array, shape (columns,)
    replaced : int
        Channels that were given as 0 or NaN and got 1.

    Raises
    ------
    InputError
        If the shape is wrong, or a norm is negative, infinite or outside
        :data:`CHANNEL_NORM_RANGE`; the message names the channel.
    """
    if channel_norms is None:
        return np.ones(columns), 0
    norms = np.asarray(channel_norms, dtype=np.float64)
    if norms.shape != (columns,):
        raise InputError(f"channel_norms has shape {norms.shape}, expected ({columns},)")
    missing = np.isnan(norms) | (norms == 0)
    norms = np.where(missing, 1.0, norms)
    low, high = CHANNEL_NORM_RANGE
    wrong = ~((norms >= low) & (norms <= high))
    if wrong.any():
        channel = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"channel_norms: channel {channel} is {norms[channel]:g}, must be 0 (never excited) or "
            f"{low:g} to {high:g}"
        )
    return norms, int(missing.sum())


@dataclass(frozen=True, eq=False)
class Blocks:
    """Weights cut into blocks along their columns, with the error weight of each.

    Attributes
    ----------
    values : float32 array, shape (rows * blocks_per_row, block_size)
        Zero-padded at the end of each row.
    error_weights : float64 array, shape (blocks_per_row, block_size), or None
        Squared channel norms, zero for padding; None for all one and no padding.
    blocks_per_row : int
    excluded : bool array, shape (rows * blocks_per_row, block_size), or None
        Weights that do not count; their ``values`` are zero.
    """

    values: NDArray[np.float32]
    error_weights: Float64 | None
    blocks_per_row: int
    excluded: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.values)

    def rows(self, members: NDArray[np.intp]) -> NDArray[np.intp]:
        """Row of each of some blocks."""
        return members // self.blocks_per_row

    def take(self, members: NDArray[np.intp]) -> tuple[Float64, Float64 | None]:
        """Weights and error weights of some blocks, both float64, shape (block_size, members)."""
        values = np.ascontiguousarray(self.values[members].T, dtype=np.float64)
        weights = None
        if self.error_weights is not None:
            weights = np.ascontiguousarray(self.error_weights[members % self.blocks_per_row].T)
        if self.excluded is not None:
            left = ~self.excluded[members].T
            weights = left.astype(np.float64) if weights is None else weights * left
        return values, weights

    def parts(self) -> Iterator[NDArray[np.intp]]:
        """Yield the numbers of all blocks, ascending, in parts that fit the cache."""
        step = max(1, _CHUNK_WEIGHTS // self.values.shape[1])
        for start in range(0, len(self), step):
            yield np.arange(start, min(start + step, len(self)))


def cut_blocks(
    weights: NDArray[np.float32],
    block_size: int,
    channel_norms: Float64 | None = None,
    excluded: NDArray[np.bool_] | None = None,
) -> Blocks:
    """Cut the rows of a matrix into blocks; ``block_size`` 0 makes the whole matrix one block.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
    block_size : int
    channel_norms : float64 array, shape (columns,), optional
        As :func:`usable_channel_norms` returns them; all one if not given.
    excluded : bool array, shape (rows, columns), optional
        Weights that are corrected anyway: they count neither in an extreme nor in an error.
    """
    rows, columns = weights.shape
    if excluded is not None:
        weights = np.where(excluded, np.float32(0.0), weights)
    if block_size == 0:
        importance = None if channel_norms is None else np.tile(channel_norms**2, (1, rows))
        outside = None if excluded is None else excluded.reshape(1, -1)
        return Blocks(weights.reshape(1, -1), importance, 1, outside)
    padding = ((0, 0), (0, -columns % block_size))
    # Without padding this is a view: a copy of the largest tensor is worth avoiding.
    padded = np.pad(weights, padding) if columns % block_size else weights
    values = padded.reshape(-1, block_size)
    outside = None if excluded is None else np.pad(excluded, padding).reshape(-1, block_size)
    if channel_norms is None and columns % block_size == 0:
        return Blocks(values, None, columns // block_size, outside)
    norms = np.ones(columns) if channel_norms is None else channel_norms
    importance = np.pad(norms**2, padding[1]).reshape(-1, block_size)
    return Blocks(values, importance, len(importance), outside)
