"""Error feedback against numpy.linalg and against a reference that goes row by row.

The reference rounds one row and one block at a time with plain loops. It takes the scale codes that
the scale search proposes for its targets (golden/tests/test_search.py shows what they are worth),
and everything else from the definitions: targets, metabits, indices and the order of blocks.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden import feedback
from golden.convert import decode_array, level_table
from golden.errors import InputError
from golden.factors import DEFAULT_DAMPING, Factors, factor_second_moment
from golden.feedback import Feedback, quantize_with_feedback, second_moment_error
from golden.formats import BF16
from golden.notation import parse_format
from golden.quantize import quantize
from golden.search import NormalizedChunk, ScaleSearch, cells_for
from golden.tensor import QuantizedTensor, decode
from golden.tests.second_moments import (
    autoregressive,
    block_order,
    gaussian,
    low_rank,
    reference_factors,
    symmetric,
    uneven,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# The last one pairs a LUT that has a zero with one that has none.
FORMATS = ("NF4sS1E5M5", "BOF4-NF4sS1E5M5", "NF4^8sUE8M0", "BOF4-NF4T^32sRUE4M4")


def plain_tensor(weights: Float32, name: str, moment: Float64) -> QuantizedTensor:
    return quantize(weights, parse_format(name), channel_norms=np.sqrt(np.diag(moment)))


def trace_error(weights: Float32, reconstruction: Float32, moment: Float64) -> float:
    """What second_moment_error is to compute, in the order of a BLAS."""
    errors = weights.astype(np.float64) - reconstruction
    return float(np.trace(errors @ moment @ errors.T))


# ---------------------------------------------------------------------------------------- error


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (12, 1), (30, 200)])
@pytest.mark.parametrize("decades", [0.0, 4.0])
def test_error_is_the_trace(shape: tuple[int, int], decades: float) -> None:
    weights = gaussian(*shape, seed=1)
    reconstruction = weights + np.float32(0.05) * gaussian(*shape, seed=2)
    moment = uneven(shape[1], 3, decades)
    made = second_moment_error(weights, reconstruction, moment)
    wanted = trace_error(weights, reconstruction, moment)
    assert made == pytest.approx(wanted, rel=1e-9)
    single = second_moment_error(weights, reconstruction, moment.astype(np.float32))
    assert single == pytest.approx(made, rel=1e-4)
    assert second_moment_error(weights, weights, moment) == 0.0


def test_a_massive_activation_does_not_hide_the_other_channels() -> None:
    """One channel ten thousand times stronger than the others, and hit exactly."""
    weights, noise = gaussian(8, 100, seed=1), gaussian(8, 100, seed=2)
    noise[:, 9] *= np.float32(1e-5)
    norms = np.ones(100)
    norms[9] = 1e4
    moment = symmetric(low_rank(100, 20, seed=3) * np.multiply.outer(norms, norms))
    reconstruction = weights + np.float32(0.05) * noise
    made = second_moment_error(weights, reconstruction, moment)
    assert made == pytest.approx(trace_error(weights, reconstruction, moment), rel=1e-5)


def test_an_error_that_cancels_is_small() -> None:
    """Errors of two channels with the same input make up for each other."""
    moment = np.ones((2, 2)) + 1e-6 * np.eye(2)
    weights = np.array([[1.0, 1.0]], dtype=np.float32)
    reconstruction = np.array([[1.5, 0.5]], dtype=np.float32)
    assert second_moment_error(weights, reconstruction, moment) == pytest.approx(5e-7, rel=1e-4)


# ------------------------------------------------------------------------------------- reference


class RowByRow:
    """Feedback of one layer with loops over rows, blocks and channels."""

    def __init__(self, weights: Float32, plain: QuantizedTensor, moment: Float64) -> None:
        self.weights = weights.astype(np.float64)
        self.plain = plain
        self.size = plain.format.block_size
        columns = len(moment)
        self.damped = moment + DEFAULT_DAMPING * np.trace(moment) / columns * np.eye(columns)
        self.order = block_order(moment, self.size)
        self.turns = [channel // self.size for channel in self.order if channel % self.size == 0]
        self.values = np.zeros(weights.shape)
        self.words = np.zeros(plain.scale_words.shape, dtype=np.int64)
        self.indices = np.zeros(plain.indices.shape, dtype=np.int64)
        self.tables = [level_table(lut.values) for lut in plain.luts]
        self.cells = cells_for(plain.format.lut_entries)
        scale = plain.format.word.scale
        self.searches = [ScaleSearch(table, scale, self.cells) for table in self.tables]

    def channels(self, block: int) -> list[int]:
        """Input channels of a block."""
        return list(range(len(self.damped)))[block * self.size : (block + 1) * self.size]

    def multiplier(self, row: int) -> float:
        """What the decoded scale codes of a row are multiplied with."""
        unit = 2.0**self.plain.layer_exponent
        if self.plain.row_scales is None:
            return unit
        return unit * float(decode_array(self.plain.row_scales, BF16)[row])

    def round(
        self, row: int, wanted: Float64, targets: Float64, upper: Float64, diagonal: Float64
    ) -> list[tuple[float, int, list[int], list[float]]]:
        """What a block misses, its scale word, indices and values: under each LUT."""
        count, scale = len(targets), self.plain.format.word.scale
        padded, importance = np.zeros((self.size, 1)), np.zeros((self.size, 1))
        padded[:count, 0], importance[:count, 0] = targets, diagonal
        multiplier = self.multiplier(row)
        chunk = NormalizedChunk(padded, importance, np.array([multiplier]), cells=self.cells)
        found = []
        for metabit, (table, search) in enumerate(zip(self.tables, self.searches, strict=True)):
            code = int(search.encode(chunk).scale_codes[0])
            step = float(decode_array([code], scale)[0]) * multiplier
            indices: list[int] = []
            values: list[float] = []
            missed = 0.0
            for k in range(count):
                carried = sum((wanted[i] - values[i]) * upper[i, k] for i in range(k))
                target = targets[k] + carried
                distances = np.abs(table.values * step - target).tolist()
                indices.append(distances.index(min(distances)))
                values.append(float(table.values[indices[-1]]) * step)
                missed += diagonal[k] * (target - values[-1]) ** 2
            found.append((missed, metabit << scale.width | code, indices, values))
        return found

    def store(self, row: int, block: int, word: int, indices: list[int]) -> None:
        scale = self.plain.format.word.scale
        self.words[row, block] = word
        table = self.tables[word >> scale.width]
        step = float(decode_array([word & ((1 << scale.width) - 1)], scale)[0])
        padding = [int(np.abs(table.values).argmin())] * (self.size - len(indices))
        self.indices[row, block] = indices + padding
        self.values[row, self.channels(block)] = table.values[indices] * step * self.multiplier(row)

    def feed(self) -> None:
        """One pass in which each target knows the errors made before."""
        inner, diagonal = reference_factors(self.damped[np.ix_(self.order, self.order)])
        place = {channel: position for position, channel in enumerate(self.order)}
        for row in range(len(self.weights)):
            errors = np.zeros(len(self.order))
            for block in self.turns:
                channels = self.channels(block)
                own = slice(place[channels[0]], place[channels[-1]] + 1)
                weights = self.weights[row, channels]
                targets = weights + errors[: own.start] @ inner[: own.start, own]
                part = self.round(row, weights, targets, inner[own, own], diagonal[own])
                _, word, indices, _ = min(part, key=lambda found: found[0])
                self.store(row, block, word, indices)
                errors[own] = weights - self.values[row, channels]

    def improve(self) -> None:
        """One pass in which each block is rounded again for the errors of all others."""
        for row in range(len(self.weights)):
            for block in self.turns:
                channels = self.channels(block)
                errors = self.weights[row] - self.values[row]
                errors[channels] = 0.0
                inner = self.damped[np.ix_(channels, channels)]
                upper, diagonal = reference_factors(inner)
                wanted = self.weights[row, channels] + np.linalg.solve(
                    inner, self.damped[channels] @ errors
                )
                left = wanted - self.values[row, channels]
                part = self.round(row, wanted, wanted, upper, diagonal)
                missed, word, indices, _ = min(part, key=lambda found: found[0])
                if missed < left @ inner @ left:
                    self.store(row, block, word, indices)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [64, 75])
def test_feedback_is_that_of_the_row_by_row_reference(name: str, columns: int) -> None:
    weights = gaussian(4, columns, seed=columns)
    weights[1] *= np.float32(0.03)
    moment = uneven(columns, 5, decades=1.0)
    plain = plain_tensor(weights, name, moment)
    reference = RowByRow(weights, plain, moment)
    reference.feed()
    for passes in range(3):
        made = quantize_with_feedback(weights, plain, moment, passes=passes)
        assert made.used
        np.testing.assert_array_equal(made.tensor.scale_words, reference.words)
        np.testing.assert_array_equal(made.tensor.indices, reference.indices)
        np.testing.assert_array_equal(decode(made.tensor), reference.values.astype(np.float32))
        reference.improve()


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_taken_together_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made for groups of blocks; the errors of a group change the largest of all."""
    weights = gaussian(5, 200, seed=3)
    weights[:, 70:75] *= np.float32(30)
    moment = uneven(200, 5, decades=1.0)
    plain = plain_tensor(weights, name, moment)
    made = []
    for channels in (1, 64, 1000):
        monkeypatch.setattr(feedback, "_GROUP_CHANNELS", channels)
        made.append(quantize_with_feedback(weights, plain, moment).tensor)
    for other in made[1:]:
        np.testing.assert_array_equal(other.scale_words, made[0].scale_words)
        np.testing.assert_array_equal(other.indices, made[0].indices)


# --------------------------------------------------------------------------------------- results


def check_result(made: Feedback, weights: Float32, plain: QuantizedTensor, moment: Float64) -> None:
    """An ordinary tensor of the plain one's format, with the errors that the result reports."""
    tensor = made.tensor
    assert tensor.format is plain.format
    assert tensor.shape == plain.shape
    assert tensor.luts == plain.luts
    assert tensor.layer_exponent == plain.layer_exponent
    assert tensor.row_scales is plain.row_scales
    assert tensor.indices.dtype == plain.indices.dtype
    assert tensor.scale_words.dtype == np.uint16
    error = second_moment_error(weights, decode(tensor), moment)
    assert made.plain_error == second_moment_error(weights, decode(plain), moment)
    assert error == min(made.plain_error, made.feedback_error)
    assert made.used == (made.feedback_error < made.plain_error)
    assert made.used or tensor is plain


@given(
    name=st.sampled_from(FORMATS),
    rows=st.integers(1, 4),
    columns=st.integers(1, 50),
    rank=st.integers(1, 60),
    decades=st.sampled_from([0.0, 2.0, 4.0]),
    passes=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_feedback_is_never_worse_than_the_plain_tensor(
    name: str, rows: int, columns: int, rank: int, decades: float, passes: int, seed: int
) -> None:
    """Few weights and channels that hardly depend on each other, where it may well not help."""
    rng = np.random.default_rng(seed)
    norms = 10.0 ** rng.uniform(-decades / 2, decades / 2, columns) * (rng.random(columns) > 0.1)
    sample = rng.standard_normal((columns, rank)) * norms[:, None]
    moment = symmetric(sample @ sample.T)
    weights = gaussian(rows, columns, seed)
    plain = plain_tensor(weights, name, moment)
    kept = weights.copy(), plain.indices.copy(), plain.scale_words.copy(), moment.copy()
    made = quantize_with_feedback(weights, plain, moment, passes=passes)
    check_result(made, weights, plain, moment)
    np.testing.assert_array_equal(weights, kept[0])
    np.testing.assert_array_equal(plain.indices, kept[1])
    np.testing.assert_array_equal(plain.scale_words, kept[2])
    np.testing.assert_array_equal(moment, kept[3])


@pytest.mark.parametrize("name", FORMATS)
def test_feedback_cannot_help_where_channels_do_not_depend_on_each_other(name: str) -> None:
    """With a diagonal H every weight is rounded as before: the plain tensor comes back itself."""
    weights = gaussian(12, 75, seed=1)
    moment = np.diag(10.0 ** np.random.default_rng(2).uniform(-1, 1, 75))
    plain = plain_tensor(weights, name, moment)
    factors = factor_second_moment(moment, plain.format.block_size, damping=0.0)
    made = quantize_with_feedback(weights, plain, moment, factors)
    assert made.tensor is plain
    assert not made.used
    assert made.feedback_error == pytest.approx(made.plain_error, rel=1e-12)


def test_a_tensor_better_than_feedback_is_kept() -> None:
    """Weights that the plain tensor holds exactly."""
    moment = autoregressive(40)
    plain = plain_tensor(gaussian(3, 40, seed=1), "NF4sS1E5M5", moment)
    weights = decode(plain)
    made = quantize_with_feedback(weights, plain, moment)
    check_result(made, weights, plain, moment)
    assert made.tensor is plain
    assert made.plain_error == 0.0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["autoregressive", "low rank"])
def test_feedback_pays_where_channels_depend_on_each_other(name: str, kind: str) -> None:
    """The error falls about as much as the sum of D is below the trace of H."""
    moment = autoregressive(75) if kind == "autoregressive" else low_rank(75, 10, seed=4)
    weights = gaussian(24, 75, seed=1)
    plain = plain_tensor(weights, name, moment)
    factors = factor_second_moment(moment, plain.format.block_size)
    made = quantize_with_feedback(weights, plain, moment, factors)
    check_result(made, weights, plain, moment)
    expected = float(factors.diagonal.sum() / np.trace(moment))
    assert expected < 0.25
    assert made.feedback_error < 1.6 * expected * made.plain_error


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [1, 2])
def test_more_passes_never_make_it_worse(name: str, seed: int) -> None:
    """Without damping, because it is the damped error that a pass lowers, row by row."""
    moment = low_rank(75, 12, seed)
    weights = gaussian(8, 75, seed)
    plain = plain_tensor(weights, name, moment)
    factors = factor_second_moment(moment, plain.format.block_size, damping=0.0)
    errors = []
    for passes in range(4):
        made = quantize_with_feedback(weights, plain, moment, factors, passes=passes)
        check_result(made, weights, plain, moment)
        missed = weights.astype(np.float64) - decode(made.tensor)
        errors.append(np.einsum("ij,jk,ik->i", missed, moment, missed))
    changes = np.diff(errors, axis=0)
    assert (changes <= 1e-9 * errors[0]).all()
    assert changes[0].sum() < -0.03 * errors[0].sum()


# --------------------------------------------------------------------------------- special inputs


def test_channels_never_excited_are_rounded_for_their_own_sake() -> None:
    """Their errors cost nothing, so feedback must not dump the errors of others there."""
    moment = autoregressive(75)
    silent = np.arange(75) % 3 == 1
    moment[silent, :] = moment[:, silent] = 0.0
    weights = gaussian(16, 75, seed=1)
    plain = plain_tensor(weights, "NF4sS1E5M5", moment)
    made = quantize_with_feedback(weights, plain, moment)
    check_result(made, weights, plain, moment)
    assert made.used
    before, after = (
        np.square((weights - decode(tensor))[:, silent]).mean() for tensor in (plain, made.tensor)
    )
    assert after < 1.1 * before


def test_without_any_excitation_the_plain_tensor_stays() -> None:
    weights, moment = gaussian(3, 40, seed=1), np.zeros((40, 40))
    plain = plain_tensor(weights, "NF4sS1E5M5", moment)
    made = quantize_with_feedback(weights, plain, moment)
    assert made.tensor is plain
    assert made.plain_error == made.feedback_error == 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    """A row of zeros has nothing to carry on: scale code 0, metabit 0, the level nearest zero."""
    weights = gaussian(6, 75, seed=1)
    weights[[0, 3]] = 0.0
    moment = autoregressive(75)
    plain = plain_tensor(weights, name, moment)
    made = quantize_with_feedback(weights, plain, moment)
    assert made.used
    for part in ("scale_words", "indices"):
        row = getattr(made.tensor, part)[[0, 3]]
        np.testing.assert_array_equal(row, getattr(plain, part)[[0, 3]])
    assert not made.tensor.scale_words[[0, 3]].any()


def test_a_layer_of_zeros_stays_as_it_is() -> None:
    weights, moment = np.zeros((2, 20), dtype=np.float32), autoregressive(20)
    plain = plain_tensor(weights, "BOF4-NF4sS1E5M5", moment)
    assert quantize_with_feedback(weights, plain, moment).tensor is plain


@pytest.mark.parametrize("name", FORMATS)
def test_padding_holds_the_level_nearest_zero(name: str) -> None:
    weights, moment = gaussian(6, 75, seed=1), autoregressive(75)
    plain = plain_tensor(weights, name, moment)
    made = quantize_with_feedback(weights, plain, moment)
    assert made.used
    count = 75 % plain.format.block_size
    for row in range(6):
        lut = plain.luts[int(made.tensor.metabits[row, -1])]
        nearest = int(np.abs(np.array(lut.values)).argmin())
        assert set(made.tensor.indices[row, -1, count:].tolist()) == {nearest}


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["E2M3sUE4M4", "E2M1^32sUE8M0", "E4M3^0sUE8M0"])
def test_atoms_are_refused(name: str) -> None:
    weights, moment = gaussian(2, 32, seed=1), autoregressive(32)
    plain = quantize(weights, parse_format(name))
    message = f"needs a codebook format .* not {re.escape(plain.format.name)} of shape"
    with pytest.raises(InputError, match=message):
        quantize_with_feedback(weights, plain, moment)


@pytest.mark.parametrize("shape", [(3, 32), (2, 31), (2, 48)])
def test_weights_of_another_layer_are_refused(shape: tuple[int, int]) -> None:
    moment = autoregressive(32)
    plain = plain_tensor(gaussian(2, 32, seed=1), "NF4sS1E5M5", moment)
    with pytest.raises(InputError, match=r"of shape \(2, 32\) for weights of shape"):
        quantize_with_feedback(gaussian(*shape, seed=1), plain, autoregressive(shape[1]))


@pytest.mark.parametrize("shape", [(31, 31), (32, 31), (32,), (33, 33)])
def test_a_moment_of_another_layer_is_refused(shape: tuple[int, ...]) -> None:
    weights = gaussian(2, 32, seed=1)
    plain = plain_tensor(weights, "NF4sS1E5M5", autoregressive(32))
    with pytest.raises(InputError, match=r"second moment: shape .* for 32 channels"):
        quantize_with_feedback(weights, plain, np.ones(shape))


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_weights_and_moments_are_checked(bad: float) -> None:
    weights, moment = gaussian(2, 32, seed=1), autoregressive(32)
    plain = plain_tensor(weights, "NF4sS1E5M5", moment)
    with pytest.raises(InputError, match="second moment: "):
        quantize_with_feedback(weights, plain, np.where(np.eye(32), bad, moment))
    weights[1, 2] = np.nan
    with pytest.raises(InputError, match="weight at row 1, column 2 is nan"):
        quantize_with_feedback(weights, plain, moment)


def test_factors_must_be_those_of_the_layer_and_the_block_size() -> None:
    weights = gaussian(2, 64, seed=1)
    moment = autoregressive(64) * np.linspace(1.0, 2.0, 64)
    moment = symmetric(moment)
    plain = plain_tensor(weights, "NF4sS1E5M5", moment)
    other = factor_second_moment(autoregressive(48), 16)
    with pytest.raises(InputError, match="factors: of 48 channels, the weights have 64"):
        quantize_with_feedback(weights, plain, moment, other)
    small = factor_second_moment(moment, 8)
    with pytest.raises(InputError, match=r"channel 56 does not follow channel 55, .* block of 16"):
        quantize_with_feedback(weights, plain, moment, small)
    shifted = Factors(np.roll(small.order, 8), small.moment, small.upper, small.diagonal)
    with pytest.raises(InputError, match="which is in the same block of 16"):
        quantize_with_feedback(weights, plain, moment, shifted)
    # Blocks that belong together may be larger.
    wide = factor_second_moment(moment, 32)
    check_result(quantize_with_feedback(weights, plain, moment, wide), weights, plain, moment)


def test_given_factors_are_used() -> None:
    weights, moment = gaussian(4, 75, seed=1), autoregressive(75)
    plain = plain_tensor(weights, "NF4sS1E5M5", moment)
    made = quantize_with_feedback(weights, plain, moment)
    same = quantize_with_feedback(weights, plain, moment, factor_second_moment(moment, 16))
    np.testing.assert_array_equal(same.tensor.indices, made.tensor.indices)
    other = factor_second_moment(moment, 16, damping=1.0)
    less = quantize_with_feedback(weights, plain, moment, other)
    assert made.feedback_error < less.feedback_error < less.plain_error
    broken = replace(other, upper=np.zeros_like(other.upper))
    none = quantize_with_feedback(weights, plain, moment, broken, passes=0)
    assert none.feedback_error > less.feedback_error
