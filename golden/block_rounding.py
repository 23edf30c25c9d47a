"""One block of every row under error feedback: its channels are rounded one after the other.

Arrays are (channels, rows), so that what happens to all rows at once runs along the contiguous
axis.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.convert import RoundingTable
from golden.engine import inner_loop

__all__ = ["RoundedBlock", "Turn", "missed_by", "round_in_turn"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Turn:
    """A block whose turn it is.

    Attributes
    ----------
    weights, targets : float64 arrays, shape (channels, rows)
        What the block's own errors are counted from, and the targets of its channels as far as
        other blocks decide them.
    upper : float64 array, shape (channels, channels)
    diagonal : float64 array, shape (channels,)
        How its own channels take part: U and D of :mod:`golden.factors`.
    """

    weights: Float64
    targets: Float64
    upper: Float64
    diagonal: Float64

    def target(self, k: int, values: Float64) -> Float64:
        """Target of channel k after the values of the channels before it, shape (rows,)."""
        target = self.targets[k].copy()
        for earlier in range(k):
            target += (self.weights[earlier] - values[earlier]) * self.upper[earlier, k]
        return target


@dataclass(frozen=True, eq=False)
class RoundedBlock:
    """A block of every row, rounded.

    Attributes
    ----------
    metabits, codes : uint16 arrays, shape (rows,)
        Of the scale words.
    indices : unsigned array, shape (channels, rows)
    values : float64 array, shape (channels, rows)
    missed : float64 array, shape (rows,)
        ``sum_k D_k (t_k - w_hat_k)**2``.
    """

    metabits: NDArray[np.uint16]
    codes: NDArray[np.uint16]
    indices: NDArray[np.unsignedinteger]
    values: Float64
    missed: Float64

    def replace(self, other: "RoundedBlock") -> "RoundedBlock":
        """Of each row the better one, this one among equals."""
        where = other.missed < self.missed
        return RoundedBlock(
            np.where(where, other.metabits, self.metabits),
            np.where(where, other.codes, self.codes),
            np.where(where, other.indices, self.indices),
            np.where(where, other.values, self.values),
            np.where(where, other.missed, self.missed),
        )


@inner_loop
def missed_by(turn: Turn, values: Float64) -> Float64:
    """What given values, shape (channels, rows), miss in each row."""
    total = np.zeros(values.shape[1])
    for k in range(len(values)):
        total += turn.diagonal[k] * (turn.target(k, values) - values[k]) ** 2
    return total


@inner_loop
def round_in_turn(
    turn: Turn, levels: RoundingTable, scales: Float64
) -> tuple[NDArray[np.intp], Float64, Float64]:
    """Round a block's channels in turn, each with the errors of those before it.

    Parameters
    ----------
    turn : Turn
    levels : RoundingTable
    scales : float64 array, shape (rows,)
        Of the block in each row; 0 only where all targets are 0.

    Returns
    -------
    indices : unsigned array, shape (channels, rows)
        Of the levels.
    values : float64 array, shape (channels, rows)
    missed : float64 array, shape (rows,)
    """
    divisors = np.where(scales == 0, 1.0, scales)
    values: Float64 = np.empty(turn.targets.shape)
    indices = np.empty(values.shape, dtype=np.intp)
    missed: Float64 = np.zeros(len(scales))
    for k in range(len(values)):
        target = turn.target(k, values)
        indices[k] = levels.nearest_index(target / divisors)
        values[k] = levels.values[indices[k]] * scales
        missed += turn.diagonal[k] * (target - values[k]) ** 2
    return indices, values, missed
