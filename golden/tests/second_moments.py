"""Weights, second moments of their inputs, and their factors by numpy.linalg."""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def autoregressive(columns: int, correlation: float = 0.9) -> Float64:
    """Second moment of a first-order autoregressive signal of power 1."""
    distance = np.abs(np.subtract.outer(np.arange(columns), np.arange(columns)))
    moment: Float64 = correlation**distance
    return moment


def low_rank(columns: int, rank: int, seed: int) -> Float64:
    """A few common directions, and a little of its own for each channel."""
    directions = np.random.default_rng(seed).standard_normal((columns, rank))
    moment = directions @ directions.T / rank + 0.05 * np.eye(columns)
    return symmetric(moment)


def uneven(columns: int, seed: int, decades: float = 3.0) -> Float64:
    """Channels whose powers span twice that many orders of magnitude."""
    norms = 10.0 ** np.random.default_rng(seed).uniform(-decades / 2, decades / 2, columns)
    return symmetric(autoregressive(columns) * np.multiply.outer(norms, norms))


def symmetric(moment: Float64) -> Float64:
    """Symmetric to the last bit."""
    return np.maximum(moment, moment.T)


def gaussian(rows: int, columns: int, seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def block_order(moment: Float64, block_size: int) -> list[int]:
    """Channels by descending power of their block, the first block among equals."""
    starts = range(0, len(moment), block_size)
    powers = [float(np.diag(moment)[start : start + block_size].sum()) for start in starts]
    turns = sorted(range(len(powers)), key=lambda block: (-powers[block], block))
    blocks = [range(len(moment))[block * block_size : (block + 1) * block_size] for block in turns]
    return [channel for block in blocks for channel in block]


def reference_factors(matrix: Float64) -> tuple[Float64, Float64]:
    """U and D by the Cholesky factor of the matrix turned upside down."""
    root = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    ends = np.diag(root)
    return root / ends - np.eye(len(matrix)), ends**2
