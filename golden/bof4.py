"""Computation of the BOF4 codebook: weighted Lloyd iteration over Gaussian blocks.

Model (Blumenberg et al., arXiv 2505.06653, signed normalisation, mean squared error): a block holds
``block_size`` independent standard normal weights; M is the weight of largest magnitude with its
sign, and every weight is divided by M. Level i should minimise the mean of ``M**2 * (w / M -
level)**2``. The levels 0 and 1 are pinned. Weights other than M lie in (-1, 1), with a density that
is symmetric:

    h(x) = integral over m > 0 of  m**3 phi(m x) phi(m) (2 Phi(m) - 1)**(block_size - 2)

The integral over x has a closed form, so the centroid of a cell needs one quadrature over m and no
random numbers.
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["bof4_levels"]

# m beyond 9 has probability below 1e-18 even for 64 weights; Simpson's rule on this grid is exact
# to better than 1e-12 (a test halves the step).
_MAX_EXTREME = 9.0
_STEPS = 600


def _normal_pdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_cdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)


def bof4_levels(block_size: int, *, steps: int = _STEPS) -> NDArray[np.float64]:
    """Optimal levels for Gaussian blocks, ascending, unmirrored (the pinned extreme is +1).

    Parameters
    ----------
    block_size : int
        Weights per block, at least 2.
    steps : int
        Even number of steps of the quadrature.

    Returns
    -------
    levels : float64 array, shape (16,), from about -0.9 to 1
        Seven below zero, zero, seven above, and one.
    """
    m = np.linspace(0.0, _MAX_EXTREME, steps + 1)
    simpson = np.where(np.arange(steps + 1) % 2, 4.0, 2.0)
    simpson[[0, -1]] = 1.0
    # 2 Phi(m) - 1 is the probability that a weight is smaller than m in magnitude.
    kernel = simpson * _normal_pdf(m) * (2 * _normal_cdf(m) - 1) ** (block_size - 2)

    levels = np.concatenate([np.arange(-7, 9) / 8.0])
    for _ in range(5000):
        edges = np.concatenate([[-1.0], (levels[:-1] + levels[1:]) / 2, [1.0]])
        # Integrals of m**3 phi(m x) and of x m**3 phi(m x) over x, up to each edge.
        mass = (kernel * m**2) @ _normal_cdf(np.outer(m, edges))
        moment = -(kernel * m) @ _normal_pdf(np.outer(m, edges))
        updated = np.diff(moment) / np.diff(mass)
        updated[7], updated[15] = 0.0, 1.0
        change = float(np.abs(updated - levels).max())
        levels = updated
        if change < 1e-13:
            break
    return levels
