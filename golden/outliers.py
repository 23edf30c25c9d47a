"""Which weights get a sparse correction: outliers (OPQ) and large residuals (Wr) [paper].

Both end in one :class:`golden.corrections.Corrections`, whose entries are the bfloat16 of what the
dense part misses. Outliers leave their block before its scale is chosen: they count neither in its
extreme nor in its error.
"""

import numpy as np
from numpy.typing import NDArray

from golden.blocks import usable_channel_norms
from golden.corrections import Corrections
from golden.errors import InputError

__all__ = ["corrections_at", "outlier_mask", "residual_mask"]


def _count(density: float, size: int) -> int:
    if not 0.0 <= density < 1.0:
        raise InputError(f"density of corrections must be at least 0 and below 1, not {density}")
    return int(density * size)


def _largest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mask of the ``count`` largest scores above zero; of equals the first ones."""
    flat = scores.reshape(-1)
    mask = np.zeros(flat.size, dtype=bool)
    if count:
        limit = np.partition(flat, flat.size - count)[flat.size - count]
        mask = flat > max(limit, 0.0)
        if limit > 0.0:
            equals = np.flatnonzero(flat == limit)
            mask[equals[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def outlier_mask(
    weights: NDArray[np.float32], block_size: int, density: float
) -> NDArray[np.bool_]:
    """OPQ: the weights that stand out most from their block.

    A weight is judged by its magnitude over the root mean square of the other weights of its block
    [rebuilt: the paper names a quantile; that it is taken over this ratio is ours].

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    block_size : int
        Weights of a block, at least 2; the last block of a row may be shorter.
    density : float
        Share of weights to mark, in [0, 1), rounded down to whole weights.

    Returns
    -------
    mask : bool array, shape (rows, columns)

    Raises
    ------
    InputError
        If ``density`` is out of range.
    """
    count = _count(density, weights.size)
    rows, columns = weights.shape
    padding = -columns % block_size
    squares = np.pad(weights.astype(np.float64), ((0, 0), (0, padding))) ** 2
    blocks = squares.reshape(rows, -1, block_size)
    sums = np.zeros(blocks.shape[:2])
    for k in range(block_size):
        sums += blocks[:, :, k]
    others = np.maximum(sums[:, :, None] - blocks, 0.0)
    # A short block has fewer others, whose mean is that much larger.
    lengths = np.minimum(block_size, columns - np.arange(0, columns, block_size))
    scaled = blocks * np.maximum(lengths - 1, 1)[:, None]
    # A weight alone in its block stands out infinitely, a zero never does.
    ratios = np.divide(scaled, others, out=np.full_like(blocks, np.inf), where=others > 0)
    ratios[blocks == 0] = 0.0
    return _largest(ratios.reshape(rows, -1)[:, :columns], count)


def residual_mask(
    weights: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    density: float,
    channel_norms: NDArray[np.floating] | None = None,
) -> NDArray[np.bool_]:
    """Wr: the weights with the largest activation-weighted squared error.

    Parameters
    ----------
    weights, reconstruction : float32 arrays, shape (rows, columns)
        Not modified.
    density : float
        Share of weights to mark, in [0, 1), rounded down to whole weights.
    channel_norms : float array, shape (columns,), optional
        See :func:`golden.blocks.usable_channel_norms`.

    Returns
    -------
    mask : bool array, shape (rows, columns)

    Raises
    ------
    InputError
        If ``density`` or a channel norm is out of range.
    """
    count = _count(density, weights.size)
    norms, _ = usable_channel_norms(channel_norms, weights.shape[1])
    errors = weights.astype(np.float64) - reconstruction
    # In the order of all weighted squares (golden.scaling.encode_with_codes).
    return _largest((errors * errors) * (norms * norms), count)


def corrections_at(
    weights: NDArray[np.float32], dense: NDArray[np.float32], mask: NDArray[np.bool_]
) -> Corrections:
    """What the dense part misses at the marked positions.

    Parameters
    ----------
    weights, dense : float32 arrays, shape (rows, columns)
    mask : bool array, shape (rows, columns)
        None of them is modified.
    """
    return Corrections.from_mask(mask, weights - dense)
