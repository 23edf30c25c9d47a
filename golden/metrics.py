"""How far a reconstruction is from the weights."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["cosine_gap_ppm", "relative_mse"]


def _check_shapes(weights: NDArray[np.float32], reconstruction: NDArray[np.float32]) -> None:
    if weights.shape != reconstruction.shape:
        raise ValueError(f"shapes differ: {weights.shape} and {reconstruction.shape}")


def relative_mse(weights: NDArray[np.float32], reconstruction: NDArray[np.float32]) -> float:
    """Squared error over squared weights, ``sum((W - W_hat)**2) / sum(W**2)``.

    Parameters
    ----------
    weights, reconstruction : float32 arrays, the same shape
        Not modified.

    Returns
    -------
    ratio : float
        0 for an exact reconstruction, also where all weights are zero; infinite where only the
        weights are.
    """
    _check_shapes(weights, reconstruction)
    exact = weights.astype(np.float64)
    error = float(np.sum((exact - reconstruction) ** 2))
    power = float(np.sum(exact**2))
    if power == 0.0:
        return float("inf") if error else 0.0
    return error / power


def cosine_gap_ppm(
    weights: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    channel_norms: NDArray[np.float64] | None = None,
) -> float:
    """Gap of the activation-weighted cosine in parts per million, ``(1 - ACos) * 1e6`` [paper].

    ``ACos = <W, W_hat>_c / (|W|_c |W_hat|_c)`` with ``<A, B>_c = sum_jk c_k**2 A_jk B_jk``.

    Parameters
    ----------
    weights, reconstruction : float32 arrays, shape (rows, columns)
        Not modified.
    channel_norms : float64 array, shape (columns,), optional
        c, the root mean square of each input channel; without it the plain cosine.

    Returns
    -------
    gap : float
        0 to 2e6; 0 where both are all zero, 1e6 where only one is.
    """
    _check_shapes(weights, reconstruction)
    first, second = weights.astype(np.float64), reconstruction.astype(np.float64)
    power = 1.0 if channel_norms is None else np.asarray(channel_norms, dtype=np.float64) ** 2
    product = float(np.sum(power * first * second))
    norms = float(np.sum(power * first**2)), float(np.sum(power * second**2))
    if norms[0] == 0.0 or norms[1] == 0.0:
        return 0.0 if norms[0] == norms[1] else 1e6
    # Rounding can take the cosine of (almost) equal matrices above 1 by an ulp or two.
    cosine = min(1.0, product / float(np.sqrt(norms[0]) * np.sqrt(norms[1])))
    return (1.0 - cosine) * 1e6
