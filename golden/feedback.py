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

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.blocks import check_weights
from golden.convert import RoundingTable, code_dtype, decode_array, level_table
from golden.errors import InputError
from golden.exact_products import exact_product
from golden.formats import BF16
from golden.search import NormalizedChunk, ScaleSearch, cells_for
from golden.tensor import QuantizedTensor, check_float32_range, decode

__all__ = [
    "DEFAULT_DAMPING",
    "DEFAULT_PASSES",
    "Feedback",
    "Factors",
    "factor_second_moment",
    "quantize_with_feedback",
    "second_moment_error",
]

Float64 = NDArray[np.float64]

DEFAULT_PASSES = 2
"""Passes after the first one; each costs as much (docs/numerics.md tells what it gains)."""

_PANEL = 64  # columns that are factored together

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
    Elementwise operations and :func:`golden.exact_products.exact_product` only: LAPACK's results
    depend on the machine.
    """
    moment = _checked(second_moment)
    columns = len(moment)
    silent = np.diag(moment) == 0
    moment[silent, :] = 0.0
    moment[:, silent] = 0.0
    moment[silent, silent] = 1.0
    power = np.diag(moment).copy()
    added = damping * float(np.cumsum(power)[-1]) / columns
    starts = np.arange(0, columns, block_size)
    turn = np.argsort(-np.add.reduceat(power, starts), kind="stable")
    order = np.concatenate(
        [np.arange(starts[i], min(starts[i] + block_size, columns)) for i in turn]
    )
    damped = moment[np.ix_(order, order)]
    damped[np.arange(columns), np.arange(columns)] += added
    # Channels scaled by powers of two to a power near 1, which changes no bit of the result.
    units = np.ldexp(1.0, np.frexp(np.diag(damped))[1] // 2)
    upper, diagonal = _factor(damped / np.multiply.outer(units, units), order)
    upper *= np.divide.outer(units, units)
    return Factors(order, damped, upper, diagonal * units * units)


def _factor(rest: Float64, order: NDArray[np.intp]) -> tuple[Float64, Float64]:
    """U and D of a matrix, which is overwritten; panels from the last column to the first."""
    columns = len(rest)
    diagonal = np.empty(columns)
    for stop in range(columns, 0, -_PANEL):
        start = max(0, stop - _PANEL)
        powers = np.empty((stop, stop - start))  # U times D
        for k in range(stop - 1, start - 1, -1):
            diagonal[k] = rest[k, k]
            if not diagonal[k] > 0:
                raise InputError(
                    f"second moment: not positive definite at channel {order[k]}, damped as it is"
                )
            powers[:k, k - start] = rest[:k, k]
            powers[k:, k - start] = 0.0
            rest[:k, k] /= diagonal[k]
            rest[:k, start:k] -= np.multiply.outer(rest[:k, k], powers[start:k, k - start])
        if start:
            update = exact_product(powers[:start], rest[:start, start:stop].T, precise=True)
            rest[:start, :start] -= update
    return np.triu(rest, 1), diagonal


def _checked(second_moment: NDArray[np.floating]) -> Float64:
    moment = np.array(second_moment, dtype=np.float64)
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise InputError(f"second moment: shape {moment.shape} is not square")
    if not np.isfinite(moment).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(moment))[0])
        raise InputError(f"second moment: entry ({row}, {column}) is {moment[row, column]}")
    if not np.array_equal(moment, moment.T):
        row, column = (int(i) for i in np.argwhere(moment != moment.T)[0])
        raise InputError(f"second moment: not symmetric at ({row}, {column})")
    if (np.diag(moment) < 0).any():
        channel = int(np.flatnonzero(np.diag(moment) < 0)[0])
        raise InputError(f"second moment: channel {channel} has negative power")
    return moment


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
        None of them is modified.

    Returns
    -------
    error : float
        Summed over outputs, the same on every machine.
    """
    errors = weights.astype(np.float64) - reconstruction
    # The power of channels spans many orders of magnitude: 20 bits would lose the weak ones.
    product = exact_product(errors, np.asarray(second_moment, dtype=np.float64), precise=True)
    return float(np.cumsum(np.add.reduce(product * errors, axis=0))[-1])


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


@dataclass(frozen=True, eq=False)
class _Rounded:
    """A block of every row: metabits and scale codes (rows,), the rest (channels, rows).

    ``missed`` is ``sum_k D_k (t_k - w_hat_k)**2`` of each row, shape (rows,).
    """

    metabits: NDArray[np.uint16]
    codes: NDArray[np.uint16]
    indices: NDArray[np.unsignedinteger]
    values: Float64
    missed: Float64

    def replace(self, other: "_Rounded") -> "_Rounded":
        """Of each row the better one, this one among equals."""
        where = other.missed < self.missed
        return _Rounded(
            np.where(where, other.metabits, self.metabits),
            np.where(where, other.codes, self.codes),
            np.where(where, other.indices, self.indices),
            np.where(where, other.values, self.values),
            np.where(where, other.missed, self.missed),
        )


@dataclass(frozen=True, eq=False)
class _Turn:
    """A block whose turn it is.

    ``targets`` are those of its channels as far as other blocks decide them, ``weights`` what its
    own errors are counted from, both (channels, rows); ``upper`` and ``diagonal`` say how its own
    channels take part.
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

    def missed(self, values: Float64) -> Float64:
        """What given values miss, shape (rows,)."""
        total = np.zeros(values.shape[1])
        for k in range(len(values)):
            total += self.diagonal[k] * (self.target(k, values) - values[k]) ** 2
        return total


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
        self.tables = [level_table(lut.values) for lut in plain.luts]
        self.cells = cells_for(plain.format.lut_entries)
        self.scale = plain.format.word.scale
        self.searches = [ScaleSearch(table, self.scale, self.cells) for table in self.tables]
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

    def _turns(self) -> Iterator[tuple[int, slice]]:
        """Yield the blocks in order, each with the places of its channels in that order."""
        size, columns = self.plain.format.block_size, self.plain.shape[1]
        start = 0
        while start < columns:
            block = int(self.factors.order[start]) // size
            stop = start + min(size, columns - block * size)
            yield block, slice(start, stop)
            start = stop

    def feed(self) -> None:
        """Round every block for targets that know the errors of all blocks before."""
        targets = self.weights.copy()
        upper, diagonal = self.factors.upper, self.factors.diagonal
        for block, own in self._turns():
            turn = _Turn(self.weights[own], targets[own], upper[own, own], diagonal[own])
            self._store(block, own, self._best(turn))
            later = upper[own, own.stop :]
            if later.shape[1]:
                errors = self.weights[own] - self.values[own]
                targets[own.stop :] += exact_product(later.T, errors)

    def improve(self) -> None:
        """Round every block again, for the errors of all others as they are, where that helps."""
        moment = self.factors.moment
        errors = self.weights - self.values
        for block, own in self._turns():
            upper, diagonal = _factor(moment[own, own].copy(), self.factors.order[own])
            others = moment[own].copy()
            others[:, own] = 0.0
            pull = _solve(upper, diagonal, exact_product(others, errors, precise=True))
            # What the block would be if it could make up for all other errors at once.
            wanted = self.weights[own] + pull
            turn = _Turn(wanted, wanted, upper, diagonal)
            word, words = self.plain.format.word, self.words[:, block]
            now = _Rounded(
                word.metabit(words),
                word.scale_code(words),
                self.indices[:, block, : own.stop - own.start].T,
                self.values[own],
                turn.missed(self.values[own]),
            )
            self._store(block, own, now.replace(self._best(turn)))
            errors[own] = self.weights[own] - self.values[own]

    def _best(self, turn: _Turn) -> _Rounded:
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
        rounded = [
            self._round(turn, table, search.encode(chunk).scale_codes, metabit)
            for metabit, (search, table) in enumerate(zip(self.searches, self.tables, strict=True))
        ]
        return rounded[0] if len(rounded) == 1 else rounded[0].replace(rounded[1])

    def _round(
        self, turn: _Turn, table: RoundingTable, codes: NDArray[np.uint16], metabit: int
    ) -> _Rounded:
        """Round a block's channels in turn, each with the errors of those before it."""
        scales = decode_array(codes, self.scale) * self.multipliers
        divisors = np.where(codes == 0, 1.0, scales)
        values: Float64 = np.empty(turn.targets.shape)
        indices: NDArray[np.unsignedinteger] = np.empty(
            values.shape, dtype=code_dtype(self.plain.format.index_bits)
        )
        missed: Float64 = np.zeros(len(codes))
        for k in range(len(values)):
            target = turn.target(k, values)
            index = table.nearest_index(target / divisors)
            indices[k] = index
            values[k] = table.values[index] * scales
            missed += turn.diagonal[k] * (target - values[k]) ** 2
        metabits = np.where(codes == 0, 0, metabit).astype(np.uint16)
        return _Rounded(metabits, codes, indices, values, missed)

    def _store(self, block: int, own: slice, rounded: _Rounded) -> None:
        self.values[own] = rounded.values
        self.words[:, block] = self.plain.format.word.join(rounded.codes, rounded.metabits)
        count = len(rounded.values)
        self.indices[:, block, :count] = rounded.indices.T
        # Padding holds the level nearest zero.
        zeros = np.array([table.nearest_index(np.zeros(1))[0] for table in self.tables])
        self.indices[:, block, count:] = zeros[rounded.metabits][:, None]


def _solve(upper: Float64, diagonal: Float64, right: Float64) -> Float64:
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
