"""The second moment of a layer's inputs, factored for error feedback (:mod:`golden.feedback`)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.engine import inner_loop
from golden.errors import InputError
from golden.exact_products import add_joined, integer_products, kept_bits, split

__all__ = [
    "DEFAULT_DAMPING",
    "Factors",
    "factor",
    "factor_second_moment",
    "solve",
]

Float64 = NDArray[np.float64]

_PANEL = 64  # columns that are factored together
_TILE = 256  # rows and columns that are updated together: what they need stays in the cache

DEFAULT_DAMPING = 0.02
"""Share of the mean of H's diagonal that is added to the diagonal (docs/numerics.md)."""


@dataclass(frozen=True, eq=False)
class Factors:
    """``H + damping = (U + I) D (U + I)^T`` in the order in which blocks are quantized.

    Attributes
    ----------
    order : intp array, shape (columns,)
        Input channels in order of their turn: whole blocks, each in its own order.
    moment : float64 array, shape (columns, columns)
        H + damping, rows and columns in that order.
    upper : float64 array, shape (columns, columns)
        U, strictly upper triangular, rows and columns in that order.
    diagonal : float64 array, shape (columns,)
        D, positive, in that order.
    """

    order: NDArray[np.intp]
    moment: Float64
    upper: Float64
    diagonal: Float64


def factor_second_moment(
    second_moment: NDArray[np.floating], block_size: int, damping: float = DEFAULT_DAMPING
) -> Factors:
    """Factor the second moment of a layer's inputs.

    Blocks take their turn in descending order of the power of their channels, equals in order of
    position: errors of the strongest channels are made first, where most of the others can still
    make up for them. Channels that were never excited count as channels of power 1, apart from all
    others.

    Parameters
    ----------
    second_moment : float array, shape (columns, columns)
        Symmetric, positive semidefinite. Not modified.
    block_size : int
        Of the format.
    damping : float
        Share of the mean power that every channel gets on top, apart from all others. It stands for
        what the calibration text does not tell.

    Raises
    ------
    InputError
        If the matrix is not square, finite and symmetric, or so far from positive semidefinite that
        damping does not help; the message names the channel.

    Notes
    -----
    Elementwise operations and :mod:`golden.exact_products` only: LAPACK's results depend on the
    machine.
    """
    moment = _checked(second_moment)
    columns = len(moment)
    silent = np.diag(moment) == 0
    power = np.where(silent, 1.0, np.diag(moment))
    added = damping * float(np.cumsum(power)[-1]) / columns
    starts = np.arange(0, columns, block_size)
    turn = np.argsort(-np.add.reduceat(power, starts), kind="stable")
    order = np.concatenate(
        [np.arange(starts[i], min(starts[i] + block_size, columns)) for i in turn]
    )
    damped = moment[np.ix_(order, order)]
    damped[silent[order], :] = 0.0
    damped[:, silent[order]] = 0.0
    damped[np.arange(columns), np.arange(columns)] = power[order] + added
    # Channels scaled by powers of two to a power near 1, which changes no bit of the result.
    units = np.ldexp(1.0, np.frexp(np.diag(damped))[1] // 2)
    upper = np.empty_like(damped)
    tiles = [slice(start, start + _TILE) for start in range(0, columns, _TILE)]
    for own in tiles:
        np.divide(damped[own], np.multiply.outer(units[own], units), out=upper[own])
    diagonal = factor(upper, order)
    for own in tiles:
        upper[own] *= np.divide.outer(units[own], units)
    return Factors(order, damped, upper, diagonal * units * units)


def factor(rest: Float64, order: NDArray[np.intp]) -> Float64:
    """D of a matrix ``(U + I) D (U + I)^T``, and U in its place.

    Panels of columns take their turn from the last to the first.

    Parameters
    ----------
    rest : float64 array, shape (channels, channels)
        Its upper triangle is read; U takes its place.
    order : intp array, shape (channels,)
        Names of the channels, for the message.

    Raises
    ------
    InputError
        If the matrix is not positive definite.
    """
    columns = len(rest)
    diagonal = np.empty(columns)
    for stop in range(columns, 0, -_PANEL):
        start = max(0, stop - _PANEL)
        powers = np.zeros((stop, stop - start))  # U times D
        failed = eliminate(rest, start, diagonal, powers)
        if failed >= 0:
            raise InputError(
                f"second moment: not positive definite at channel {order[failed]}, damped as it is"
            )
        if start:
            _update(rest, start, stop, powers[:start])
    for start in range(0, columns, _TILE):
        own = slice(start, start + _TILE)
        rest[own, :start] = 0.0
        rest[own, own] = np.triu(rest[own, own], 1)
    return diagonal


@inner_loop
def eliminate(rest: Float64, start: int, diagonal: Float64, powers: Float64) -> int:
    """Factor the columns of a panel, ``start`` and those after it.

    Parameters
    ----------
    rest : float64 array, shape (channels, channels)
        Upper triangle of what is left of the matrix; in the panel U is left in its place.
    start : int
        First column of the panel.
    diagonal : float64 array, shape (channels,)
        Entries of the panel are written.
    powers : float64 array, shape (stop, stop - start)
        U times D of the panel's columns up to ``stop - 1`` is written above the diagonal.

    Returns
    -------
    failed : int
        The channel at which the matrix is not positive definite, or -1.
    """
    for k in range(len(powers) - 1, start - 1, -1):
        diagonal[k] = rest[k, k]
        if not diagonal[k] > 0:
            return k
        powers[:k, k - start] = rest[:k, k]
        rest[:k, k] /= diagonal[k]
        rest[:k, start:k] -= np.multiply.outer(rest[:k, k], powers[start:k, k - start])
    return -1


def _update(rest: Float64, start: int, stop: int, powers: Float64) -> None:
    """Subtract what a panel explains from the upper triangle of the columns before it."""
    bits = kept_bits(stop - start)
    left, right = split(powers, bits), split(rest[:start, start:stop], bits).transposed
    for first in range(0, start, _TILE):
        columns = slice(first, min(first + _TILE, start))
        for top in range(0, columns.stop, _TILE):
            rows = slice(top, min(top + _TILE, columns.stop))
            products = integer_products(left[rows], right[:, columns])
            add_joined(rest[rows, columns], products, left, right, -1)


@inner_loop
def solve(upper: Float64, diagonal: Float64, right: Float64) -> Float64:
    """Solution x of ``(U + I) D (U + I)^T x = right``, shape (channels, anything)."""
    x = right.copy()
    count = len(x)
    for k in range(count - 1, -1, -1):
        for later in range(k + 1, count):
            x[k] -= upper[k, later] * x[later]
    x /= diagonal[:, None]
    for k in range(count):
        for earlier in range(k):
            x[k] -= upper[earlier, k] * x[earlier]
    return x


def _checked(second_moment: NDArray[np.floating]) -> Float64:
    moment = np.asarray(second_moment, dtype=np.float64)
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise InputError(f"second moment: shape {moment.shape} is not square")
    if not np.isfinite(moment).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(moment))[0])
        raise InputError(f"second moment: entry ({row}, {column}) is {moment[row, column]}")
    if not _symmetric(moment):
        row, column = (int(i) for i in np.argwhere(moment != moment.T)[0])
        raise InputError(f"second moment: not symmetric at ({row}, {column})")
    if (np.diag(moment) < 0).any():
        channel = int(np.flatnonzero(np.diag(moment) < 0)[0])
        raise InputError(f"second moment: channel {channel} has negative power")
    return moment


def _symmetric(moment: Float64) -> bool:
    """Whether a matrix equals its transpose, compared in tiles for the sake of the cache."""
    starts = range(0, len(moment), _TILE)
    return all(
        np.array_equal(moment[i : i + _TILE, j : j + _TILE], moment[j : j + _TILE, i : i + _TILE].T)
        for i in starts
        for j in range(0, i + 1, _TILE)
    )
