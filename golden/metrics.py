"""How far a reconstruction is from the weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.blocks import usable_channel_norms

__all__ = ["Fidelity", "cosine_gap_ppm", "measure", "model_fidelity", "relative_mse"]


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


@dataclass(frozen=True)
class Fidelity:
    """How far one layer, or a whole model, is from its weights.

    Attributes
    ----------
    weights : int
        Number of weights.
    gap_ppm : float
        Gap of the activation-weighted cosine (:func:`cosine_gap_ppm`).
    plain_gap_ppm : float
        Gap of the cosine with all channel norms 1.
    squared_error, power : float
        Of the reconstruction and of the weights, both without activation weights.
    replaced_norms : int
        Channels without a usable norm, which counted with norm 1.
    """

    weights: int
    gap_ppm: float
    plain_gap_ppm: float
    squared_error: float
    power: float
    replaced_norms: int

    @property
    def relative_mse(self) -> float:
        """Squared error over squared weights; see :func:`relative_mse`."""
        if self.power == 0.0:
            return float("inf") if self.squared_error else 0.0
        return self.squared_error / self.power


def measure(
    weights: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    channel_norms: NDArray[np.floating] | None = None,
) -> Fidelity:
    """All measures of one layer.

    Parameters
    ----------
    weights, reconstruction : float32 arrays, shape (rows, columns)
        Not modified.
    channel_norms : float array, shape (columns,), optional
        See :func:`golden.blocks.usable_channel_norms`.

    Raises
    ------
    InputError
        If a channel norm is out of range.
    """
    _check_shapes(weights, reconstruction)
    norms, replaced = usable_channel_norms(channel_norms, weights.shape[1])
    exact = weights.astype(np.float64)
    return Fidelity(
        weights.size,
        cosine_gap_ppm(weights, reconstruction, norms),
        cosine_gap_ppm(weights, reconstruction),
        float(np.sum((exact - reconstruction) ** 2)),
        float(np.sum(exact**2)),
        replaced,
    )


def model_fidelity(layers: Sequence[Fidelity]) -> Fidelity:
    """Measures of a model: gaps are means weighted by parameters [paper], the rest are sums."""
    weights = sum(layer.weights for layer in layers)
    return Fidelity(
        weights,
        sum(layer.weights * layer.gap_ppm for layer in layers) / weights,
        sum(layer.weights * layer.plain_gap_ppm for layer in layers) / weights,
        sum(layer.squared_error for layer in layers),
        sum(layer.power for layer in layers),
        sum(layer.replaced_norms for layer in layers),
    )
