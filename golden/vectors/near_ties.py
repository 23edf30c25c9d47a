"""Blocks whose two LUTs give almost the same error, so that the order of the arithmetic decides.

A reader that sums a block in another order, or multiplies with the norms in another order, comes to
another metabit on these blocks, and nowhere else.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from golden.convert import RoundingTable, decode_array
from golden.formats import FloatFormat
from golden.scaling import (
    Chunk,
    ScaleMode,
    ScaleRounder,
    choose_layer_exponent,
    one_pass_codes,
    sum_over_block,
)
from golden.vectors.files import VectorStream

__all__ = ["OTHER_PRODUCTS", "OTHER_SUMS", "NearTies"]

Float64 = NDArray[np.float64]
Sum = Callable[[Float64], float]
Product = Callable[[Float64, Float64], Float64]

_EXTREME = 1.75  # first of every block, so that all have one scale code whatever follows
_MAX_TRIES = 10_000  # about one in three near ties is decided by the order


def _halving(terms: Float64) -> float:
    return float(sum_over_block(terms[:, None])[0])


def _neighbours(terms: Float64) -> float:
    while len(terms) > 1:
        terms = terms[0::2] + terms[1::2]
    return float(terms[0])


def _left_to_right(terms: Float64) -> float:
    return float(np.cumsum(terms)[-1])


def _right_to_left(terms: Float64) -> float:
    return float(np.cumsum(terms[::-1])[-1])


def _stated(residuals: Float64, norms: Float64) -> Float64:
    return (residuals * residuals) * (norms * norms)


OTHER_SUMS: dict[str, Sum] = {
    "neighbours": _neighbours,
    "left to right": _left_to_right,
    "right to left": _right_to_left,
}
"""Orders of a block's sum that are not the stated one."""

OTHER_PRODUCTS: dict[str, Product] = {
    "(r n)(r n)": lambda r, n: (r * n) * (r * n),
    "((r r) n) n": lambda r, n: ((r * r) * n) * n,
    "(r (n n)) r": lambda r, n: (r * (n * n)) * r,
}
"""Orders of the product of residual and norm that are not the stated one."""


class NearTies:
    """Makes such blocks for a pair of LUTs.

    Parameters
    ----------
    tables : sequence of two RoundingTable
        Levels of both LUTs.
    scale : FloatFormat
    mode : ScaleMode
        ``absmax`` or ``argmax``.
    block_size : int
    """

    def __init__(
        self, tables: Sequence[RoundingTable], scale: FloatFormat, mode: ScaleMode, block_size: int
    ) -> None:
        self.tables, self.scale, self.mode, self.block_size = tables, scale, mode, block_size
        self._rounder = ScaleRounder(scale)
        small_end = min(table.small_end for table in tables)
        self._multiplier = 2.0 ** choose_layer_exponent(_EXTREME, small_end, scale)

    def _residuals(self, block: Float64) -> list[Float64]:
        """What each LUT misses of every weight, under its own scale."""
        chunk = Chunk(block[:, None], None, self._multiplier)
        missed = []
        for table in self.tables:
            codes = one_pass_codes(chunk, table, self._rounder, self.mode)
            scale = decode_array(codes, self.scale) * chunk.multipliers
            missed.append((chunk.blocks - table.nearest_value(chunk.blocks / scale) * scale)[:, 0])
        return missed

    def _candidate(self, stream: VectorStream) -> tuple[Float64, list[Float64], Float64] | None:
        """Weights, residuals and norms with (almost) equal errors; None if there are no norms."""
        bell = stream.bell(self.block_size) * 0.8
        bell[0] = _EXTREME
        block = bell.astype(np.float32).astype(np.float64)
        norms = (1 + stream.words(self.block_size) % 16) / 4.0
        residuals = self._residuals(block)
        gains = residuals[0] * residuals[0] - residuals[1] * residuals[1]
        surplus = math.fsum((norms * norms * gains).tolist())
        balancing = int(np.argmax(-math.copysign(1.0, surplus) * gains))
        rest = surplus - float(norms[balancing] ** 2 * gains[balancing])
        square = -rest / float(gains[balancing]) if gains[balancing] else 0.0
        if not square > 0.0:
            return None
        norms[balancing] = math.sqrt(square)
        return block, residuals, norms

    def _metabit(self, residuals: list[Float64], norms: Float64, add: Sum, times: Product) -> bool:
        first, second = (add(times(missed, norms)) for missed in residuals)
        return second < first

    def blocks(
        self, seed: str, variants: Sequence[tuple[Sum | None, Product | None]]
    ) -> tuple[Float64, Float64]:
        """One block for each variant of the arithmetic, which gives it another metabit.

        Parameters
        ----------
        seed : str
            Of :class:`VectorStream`.
        variants : sequence of (sum, product)
            None stands for the stated one.

        Returns
        -------
        weights, norms : float64 arrays, shape (variants * block_size,)
        """
        stream = VectorStream(seed)
        found: list[tuple[Float64, Float64]] = []
        for add, times in variants:
            for _ in range(_MAX_TRIES):
                candidate = self._candidate(stream)
                if candidate is None:
                    continue
                block, residuals, norms = candidate
                stated = self._metabit(residuals, norms, _halving, _stated)
                other = self._metabit(residuals, norms, add or _halving, times or _stated)
                if stated != other:
                    found.append((block, norms))
                    break
            else:
                raise RuntimeError(f"{seed}: no block that the order decides")
        blocks, norms_of_blocks = zip(*found, strict=True)
        return np.concatenate(blocks), np.concatenate(norms_of_blocks)
