"""Error feedback: rounding errors of earlier input channels are carried into later ones.

What a layer's outputs lose is ``tr((W - W_hat) H (W - W_hat)^T)`` with the second moment
``H = E[x x^T]`` of its inputs. Factored as ``H = (U + I) D (U + I)^T``, U strictly upper
triangular, that is the sum over channels k of ``D_k (t_k - w_hat_k)^2`` where the target
``t_k = w_k + sum_{i < k} (w_i - w_hat_i) U_ik`` knows all errors made before: so rounding the
target instead of the weight minimises each term in turn (GPTQ, Frantar et al., arXiv 2210.17323;
LDLQ, Chee et al., arXiv 2307.13304). Beyond the paper: scale, metabit and codebooks are those of
this format, chosen for each block when its turn comes, for the targets of that moment.

The file that results is an ordinary one: the same hardware decodes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.block_rounding import RoundedBlock, Turn, missed_by, round_in_turn
from golden.blocks import check_weights
from golden.convert import decode_array, level_table
from golden.engine import inner_loop
from golden.errors import InputError
from golden.exact_products import (
    Products,
    SplitMatrix,
    SplitRows,
    add_product,
    integer_exponent,
    integer_products,
    joined,
    kept_bits,
    round_to_integers,
    scaled,
    split,
    to_integers,
)
from golden.factors import Factors, factor, factor_second_moment, solve
from golden.formats import BF16
from golden.search import NormalizedChunk, ScaleSearch, cells_for
from golden.tensor import QuantizedTensor, check_float32_range, decode

__all__ = ["DEFAULT_PASSES", "Feedback", "quantize_with_feedback", "second_moment_error"]

Float64 = NDArray[np.float64]

DEFAULT_PASSES = 2
"""Passes after the first one; each costs as much (docs/numerics.md tells what it gains)."""

_GROUP_CHANNELS = 256
"""Channels whose products with others are made together: enough for a BLAS to be at its best."""


def second_moment_error(
    weights: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    second_moment: NDArray[np.floating],
) -> float:
    """``tr((W - W_hat) H (W - W_hat)^T)``, the mean squared error of the layer's outputs.

    Parameters
    ----------
    weights, reconstruction : float32 arrays, shape (rows, columns)
    second_moment : float array, shape (columns, columns)
        Symmetric. None of them is modified.

    Returns
    -------
    error : float
        Summed over outputs, the same on every machine.
    """
    # As sum_ij H_ij (E^T E)_ij: both matrices are symmetric, so half of the products are enough.
    errors = split(weights.astype(np.float64) - reconstruction, kept_bits(len(weights)))
    total = 0.0
    for start in range(0, weights.shape[1], _GROUP_CHANNELS):
        own = slice(start, start + _GROUP_CHANNELS)
        left, right = errors[:, own].transposed, errors[:, start:]
        total += weighted_sum(
            integer_products(left, right), left.low @ right.low, left, right,
            np.asarray(second_moment[own, start:], dtype=np.float64),
        )  # fmt: skip
    return total


@inner_loop
def weighted_sum(
    products: Products, lows: Float64, left: SplitMatrix, right: SplitMatrix, moment: Float64
) -> float:
    """Sum of the products of errors of some channels with those of all that follow, H-weighted.

    Parameters
    ----------
    products : Products
        Of ``left`` and ``right``, shape (channels, channels that follow); may be overwritten.
    lows : float64 array, same shape
        Product of their low parts: a channel may have errors far below the largest.
    left, right : SplitMatrix
        Their exponents count.
    moment : float64 array, same shape
        H. The channels themselves come first; what lies beyond them counts twice.
    """
    terms = joined(products, left, right)
    terms += scaled(lows, left.low_exponent + right.low_exponent)
    terms *= moment
    terms[:, len(terms) :] *= 2.0
    return float(np.cumsum(np.add.reduce(terms, axis=0))[-1])


@dataclass(frozen=True, eq=False)
class Feedback:
    """Result of :func:`quantize_with_feedback`.

    Attributes
    ----------
    tensor : QuantizedTensor
        The better one of the two.
    used : bool
        Whether that is the one with feedback.
    plain_error, feedback_error : float
        H-weighted errors of both.
    """

    tensor: QuantizedTensor
    used: bool
    plain_error: float
    feedback_error: float


def quantize_with_feedback(
    weights: NDArray[np.float32],
    plain: QuantizedTensor,
    second_moment: NDArray[np.floating],
    factors: Factors | None = None,
    *,
    passes: int = DEFAULT_PASSES,
) -> Feedback:
    """Quantize a layer again, with the format, LUTs, f and row scales of a plain result.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    plain : QuantizedTensor
        Result for these weights under a codebook format.
    second_moment : float array, shape (columns, columns)
        H of the layer's inputs.
    factors : Factors, optional
        Of ``second_moment``, for layers that share their input; made here if not given.
    passes : int
        How often every block is rounded again afterwards.

    Returns
    -------
    result : Feedback
        Never worse than ``plain`` in the H-weighted error: where feedback does not help, ``plain``
        is what is returned.

    Raises
    ------
    InputError
        If the parts do not fit each other.
    """
    check_weights(weights)
    if plain.format.atom is not None or plain.shape != weights.shape:
        raise InputError(
            f"feedback needs a codebook format and its own weights, not {plain.format.name} of "
            f"shape {plain.shape} for weights of shape {weights.shape}"
        )
    if np.shape(second_moment) != (weights.shape[1], weights.shape[1]):
        raise InputError(
            f"second moment: shape {np.shape(second_moment)} for {weights.shape[1]} channels"
        )
    size = plain.format.block_size
    factors = factors or factor_second_moment(second_moment, size)
    _check_order(factors.order, weights.shape[1], size)
    tensor = _Sweep(weights, plain, factors).run(passes)
    errors = [
        second_moment_error(weights, decode(candidate), second_moment)
        for candidate in (plain, tensor)
    ]
    used = errors[1] < errors[0]
    return Feedback(tensor if used else plain, used, errors[0], errors[1])


def _check_order(order: NDArray[np.intp], columns: int, block_size: int) -> None:
    """Refuse factors of another number of channels, or of blocks of another size."""
    if len(order) != columns:
        raise InputError(f"factors: of {len(order)} channels, the weights have {columns}")
    # Whatever the order of blocks, inside a block channels follow each other.
    apart = (order % block_size != 0) & (np.diff(order, prepend=-1) != 1)
    if apart.any():
        channel = int(order[apart][0])
        raise InputError(
            f"factors: channel {channel} does not follow channel {channel - 1}, which is in the "
            f"same block of {block_size}"
        )


class _Sweep:
    """All column blocks of a layer in turn, all rows together; arrays are (channels, rows)."""

    def __init__(
        self, weights: NDArray[np.float32], plain: QuantizedTensor, factors: Factors
    ) -> None:
        self.plain = plain
        self.factors = factors
        self.weights = np.ascontiguousarray(weights[:, factors.order].T, dtype=np.float64)
        self.values = np.zeros_like(self.weights)
        multipliers = np.full(len(weights), np.ldexp(1.0, plain.layer_exponent))
        if plain.row_scales is not None:
            multipliers *= decode_array(plain.row_scales, BF16)
        self.multipliers = multipliers
        self.cells = cells_for(plain.format.lut_entries)
        self.scale = plain.format.word.scale
        self.searches = [
            ScaleSearch(level_table(lut.values), self.scale, self.cells) for lut in plain.luts
        ]
        self._factored: dict[int, tuple[Float64, Float64]] = {}
        self.indices = np.zeros_like(plain.indices)
        self.words = np.zeros_like(plain.scale_words)

    def run(self, passes: int) -> QuantizedTensor:
        """One pass with feedback, then passes that improve block after block."""
        self.feed()
        for _ in range(passes):
            self.improve()
        magnitudes = np.abs(self.values)
        if magnitudes.any():
            smallest = float(magnitudes[magnitudes > 0].min())
            check_float32_range(smallest, float(magnitudes.max()))
        plain = self.plain
        return QuantizedTensor(
            plain.format,
            plain.shape,
            self.indices,
            self.words,
            plain.luts,
            plain.layer_exponent,
            plain.row_scales,
        )

    def _groups(self) -> Iterator[list[tuple[int, slice]]]:
        """Yield the blocks in order, some at a time, each with the places of its channels."""
        size, columns = self.plain.format.block_size, self.plain.shape[1]
        group: list[tuple[int, slice]] = []
        start = 0
        while start < columns:
            block = int(self.factors.order[start]) // size
            stop = start + min(size, columns - block * size)
            group.append((block, slice(start, stop)))
            start = stop
            if start == columns or start - group[0][1].start >= _GROUP_CHANNELS:
                yield group
                group = []

    def feed(self) -> None:
        """Round every block for targets that know the errors of all blocks before."""
        targets = self.weights.copy()
        upper, diagonal = self.factors.upper, self.factors.diagonal
        made: list[_MadeErrors] = []
        for group in self._groups():
            inside = slice(group[0][1].start, group[-1][1].stop)
            for errors in made:
                errors.carry(targets, inside)
            for block, own in group:
                turn = Turn(self.weights[own], targets[own], upper[own, own], diagonal[own])
                self._store(block, own, self._best(turn))
                if own.stop < len(targets):
                    made.append(_MadeErrors(upper, own, self.weights[own] - self.values[own]))
                    made[-1].carry(targets, slice(own.stop, inside.stop))

    def improve(self) -> None:
        """Round every block again, for the errors of all others as they are, where that helps."""
        pulls = _Pulls(self.factors.moment, self.weights - self.values)
        for group in self._groups():
            pulls.enter([own for _, own in group])
            for block, own in group:
                upper, diagonal = self._own_factors(own)
                # What the block would be if it could make up for all other errors at once.
                wanted = self.weights[own] + solve(upper, diagonal, pulls.on(own))
                turn = Turn(wanted, wanted, upper, diagonal)
                word, words = self.plain.format.word, self.words[:, block]
                now = RoundedBlock(
                    word.metabit(words),
                    word.scale_code(words),
                    self.indices[:, block, : own.stop - own.start].T,
                    self.values[own],
                    missed_by(turn, self.values[own]),
                )
                self._store(block, own, now.replace(self._best(turn)))
                pulls.replace(own, self.weights[own] - self.values[own])

    def _own_factors(self, own: slice) -> tuple[Float64, Float64]:
        """U and D of a block by itself."""
        if own.start not in self._factored:
            upper = self.factors.moment[own, own].copy()
            self._factored[own.start] = upper, factor(upper, self.factors.order[own])
        return self._factored[own.start]

    def _best(self, turn: Turn) -> RoundedBlock:
        """Round a block under the best scales of each LUT, and take the better LUT of each row."""
        size, count = self.plain.format.block_size, len(turn.targets)
        padding = ((0, size - count), (0, 0))
        importance = np.pad(turn.diagonal[:, None], padding)
        chunk = NormalizedChunk(
            np.pad(turn.targets, padding),
            np.broadcast_to(importance, (size, turn.targets.shape[1])),
            self.multipliers,
            cells=self.cells,
        )
        rounded = []
        for metabit, search in enumerate(self.searches):
            codes = search.encode(chunk).scale_codes
            scales = decode_array(codes, self.scale) * self.multipliers
            indices, values, missed = round_in_turn(turn, search.levels, scales)
            metabits = np.where(codes == 0, 0, metabit).astype(np.uint16)
            kept = indices.astype(self.indices.dtype)
            rounded.append(RoundedBlock(metabits, codes, kept, values, missed))
        return rounded[0] if len(rounded) == 1 else rounded[0].replace(rounded[1])

    def _store(self, block: int, own: slice, rounded: RoundedBlock) -> None:
        self.values[own] = rounded.values
        self.words[:, block] = self.plain.format.word.join(rounded.codes, rounded.metabits)
        count = len(rounded.values)
        self.indices[:, block, :count] = rounded.indices.T
        # Padding holds the level nearest zero.
        zeros = np.array([search.levels.nearest_index(np.zeros(1))[0] for search in self.searches])
        self.indices[:, block, count:] = zeros[rounded.metabits][:, None]


class _MadeErrors:
    """Errors of a block, rounded to integers, that later channels make up for.

    Parameters
    ----------
    upper : float64 array, shape (columns, columns)
        U.
    own : slice
        Places of the block's channels.
    errors : float64 array, shape (channels, rows)
    """

    def __init__(self, upper: Float64, own: slice, errors: Float64) -> None:
        self._bits = kept_bits(len(errors))
        self._upper = upper[own]
        # One exponent for all later channels, whichever of them are looked at together.
        self._exponent = integer_exponent(np.abs(self._upper[:, own.stop :]).max(), self._bits)
        self._errors, self._errors_exponent = to_integers(errors, self._bits)

    def carry(self, targets: Float64, channels: slice) -> None:
        """Add what some later channels make up for to their targets, shape (columns, rows)."""
        shares = round_to_integers(self._upper[:, channels], self._exponent, self._bits)
        exponent = self._exponent + self._errors_exponent
        add_product(targets[channels], shares.T, self._errors, exponent)


class _Pulls:
    """What the errors of all other blocks ask of each block.

    Only the errors of one block change at a time: products with those outside a group of blocks are
    made once for the whole group.

    Parameters
    ----------
    moment : float64 array, shape (columns, columns)
        H, damped, in order.
    errors : float64 array, shape (columns, rows)
    """

    def __init__(self, moment: Float64, errors: Float64) -> None:
        self._moment = moment
        self._bits = kept_bits(len(moment))
        self._errors = SplitRows(errors, self._bits)

    def enter(self, group: Sequence[slice]) -> None:
        """Go on to the next group, whose blocks follow each other."""
        self._inside = slice(group[0].start, group[-1].stop)
        self._others: dict[int, SplitMatrix] = {}
        for own in group:
            others = self._moment[own].copy()
            others[:, own] = 0.0
            self._others[own.start] = split(others, self._bits)
        self._multiply_outside()

    def _multiply_outside(self) -> None:
        parts, inside = self._errors.parts, self._inside
        high = np.concatenate([others.high for others in self._others.values()])
        low = np.concatenate([others.low for others in self._others.values()])
        others = SplitMatrix(high, low, 0, 0)
        before, after = slice(0, inside.start), slice(inside.stop, None)
        self._outside = _added(
            integer_products(others[:, before], parts[before]),
            integer_products(others[:, after], parts[after]),
        )

    def on(self, own: slice) -> Float64:
        """What they ask of the channels of a block of the group, shape (channels, rows)."""
        others, parts = self._others[own.start], self._errors.parts
        places = slice(own.start - self._inside.start, own.stop - self._inside.start)
        high, high_low, low_high = self._outside
        outside = high[places], high_low[places], low_high[places]
        inside = integer_products(others[:, self._inside], parts[self._inside])
        return joined(_added(inside, outside), others, parts)

    def replace(self, own: slice, errors: Float64) -> None:
        """Put the errors of a block that was rounded again in place of the old ones."""
        if self._errors.replace(own, errors):
            self._multiply_outside()


def _added(first: Products, second: Products) -> Products:
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]
