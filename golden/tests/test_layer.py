from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.codebooks import Lut, fixed_lut
from golden.convert import encode_array
from golden.errors import InputError
from golden.feedback import second_moment_error
from golden.formats import BF16, HIF7, HIF8T
from golden.layer import QuantizedLayer, Recipe, parse_recipe, quantize_layer
from golden.metrics import measure
from golden.outliers import outlier_mask
from golden.pair_search import search_codebooks
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import decode
from golden.training import Training

QUICK = Training(blocks=256, rounds=1, sweeps=0)


def gaussian(seed: int, rows: int = 24, columns: int = 64) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def norms(seed: int, columns: int = 64) -> NDArray[np.float64]:
    return np.exp(np.random.default_rng(seed).standard_normal(columns))


def moment(seed: int, columns: int = 64) -> NDArray[np.float64]:
    """Second moment of strongly correlated channels."""
    mixed = np.random.default_rng(seed).standard_normal((8, columns))
    return mixed.T @ mixed + 0.05 * np.eye(columns)


def user_lut() -> Lut:
    codes = encode_array(np.arange(-120, 136, 16, dtype=np.int64), HIF7)
    return Lut(HIF7, tuple(int(code) for code in codes))


# ------------------------------------------------------------------------------------------ names


def test_any4_stands_for_the_codebooks_of_a_template() -> None:
    recipe = parse_recipe("Any4-Any4^32sRS1E2M4", HIF8T)
    assert recipe.searched
    assert recipe.name == "Any4-Any4^32sRS1E2M4"
    assert recipe.format.name == "DD4-DD4^32sRS1E2M4"
    assert {"NF4", "BOF4T"} <= {candidate.name for candidate in recipe.candidates}
    assert all(candidate.lut.hif is HIF8T for candidate in recipe.candidates)


def test_other_names_are_formats() -> None:
    recipe = parse_recipe("NF4-DD4^16sS1E5M5")
    assert not recipe.searched
    assert recipe.name == recipe.format.name == "NF4-DD4sS1E5M5"
    assert recipe.candidates == ()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Any4-NF4sS1E5M5", "must stand for all"),
        ("Any5sS1E5M5", "unknown element 'Any5'"),
        ("mine-NF4sS1E5M5", "there is no codebook 'mine'"),
        ("NF4", "not of the form"),
    ],
)
def test_wrong_names_are_refused(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_recipe(name)


# ------------------------------------------------------------------------------------------ dense


def test_fixed_codebooks_and_atoms_go_through_the_plain_quantizer() -> None:
    weights, c = gaussian(1), norms(2)
    for name in ("BOF4-NF4sS1E5M5", "E2M3sUE4M4", "E4M3^0sUE8M0"):
        for mode in (ScaleMode.SEARCH, ScaleMode.ABSMAX):
            layer = quantize_layer(weights, parse_recipe(name, mode=mode), c)
            expected = quantize(weights, layer.tensor.format, mode=mode, channel_norms=c)
            np.testing.assert_array_equal(layer.tensor.indices, expected.indices)
            np.testing.assert_array_equal(layer.tensor.scale_words, expected.scale_words)
            assert layer.corrections is None
            assert layer.feedback is None


@pytest.mark.parametrize("name", ["DD4-DD4sRS1E2M4", "DD4sS1E4M3", "DD5-DD5sS1E5M5"])
def test_trained_codebooks_are_those_of_the_search_without_candidates(name: str) -> None:
    weights, c = gaussian(3), norms(4)
    layer = quantize_layer(weights, parse_recipe(name, HIF8T, training=QUICK), c)
    expected = search_codebooks(weights, layer.tensor.format, training=QUICK, channel_norms=c)
    assert layer.tensor.luts == expected.tensor.luts
    np.testing.assert_array_equal(layer.tensor.scale_words, expected.tensor.scale_words)


@pytest.mark.parametrize(("name", "fixed"), [("NF4-DD4sS1E5M5", 0), ("DD4-BOF4sS1E5M5", 1)])
def test_a_fixed_codebook_keeps_its_place_beside_a_trained_one(name: str, fixed: int) -> None:
    recipe = parse_recipe(name, training=Training(blocks=256, rounds=2, sweeps=1))
    weights = gaussian(5)
    layer = quantize_layer(weights, recipe)
    book = recipe.format.codebooks[fixed]
    assert layer.tensor.format is recipe.format
    assert layer.tensor.luts[fixed] == fixed_lut(book, 16, HIF7)
    assert layer.tensor.luts[1 - fixed] != layer.tensor.luts[fixed]
    alone = quantize(weights, replace(recipe.format).with_codebooks((book,)))
    assert measure(weights, layer.reconstruct()).gap_ppm < measure(weights, decode(alone)).gap_ppm


def test_user_codebooks_take_part_by_name_and_in_the_search() -> None:
    codebooks = {"even": user_lut()}
    levels = np.random.default_rng(6).choice(user_lut().values, (24, 64)).astype(np.float32)
    named = quantize_layer(levels, parse_recipe("NF4-evensS1E5M5", codebooks=codebooks))
    assert named.tensor.luts[1] == user_lut()
    np.testing.assert_array_equal(named.reconstruct(), levels)
    searched = parse_recipe("Any4sS1E5M5", codebooks=codebooks, training=QUICK)
    assert quantize_layer(levels, searched).tensor.format.codebooks == ("even",)


def test_judging_on_all_blocks_equals_no_sample() -> None:
    weights = gaussian(7)
    layers = [
        quantize_layer(
            weights, parse_recipe("Any4-Any4sS1E5M5", training=QUICK, judged_blocks=judged)
        )
        for judged in (None, weights.size // 16)
    ]
    assert layers[0].tensor.format is layers[1].tensor.format
    np.testing.assert_array_equal(layers[0].tensor.indices, layers[1].tensor.indices)


# --------------------------------------------------------------------------------- error feedback


def test_feedback_is_used_where_the_second_moment_is_given() -> None:
    weights, h = gaussian(8), moment(9)
    c = np.sqrt(np.diag(h))
    recipe = parse_recipe("BOF4-NF4sS1E5M5")
    plain = quantize_layer(weights, recipe, c)
    layer = quantize_layer(weights, recipe, c, h)
    assert layer.feedback is not None
    assert layer.feedback.used
    errors = [second_moment_error(weights, one.reconstruct(), h) for one in (plain, layer)]
    assert errors == [layer.feedback.plain_error, layer.feedback.feedback_error]
    assert errors[1] < 0.6 * errors[0]


def test_feedback_passes_come_from_the_recipe() -> None:
    weights, h = gaussian(10), moment(11)
    errors = []
    for passes in (0, 3):
        recipe = parse_recipe("BOF4-NF4sS1E5M5", feedback_passes=passes)
        layer = quantize_layer(weights, recipe, None, h)
        assert layer.feedback is not None
        errors.append(layer.feedback.feedback_error)
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "recipe", [parse_recipe("E2M3sUE4M4"), parse_recipe("NF4sS1E5M5", residuals=0.01)]
)
def test_atoms_and_corrected_layers_go_without_feedback(recipe: Recipe) -> None:
    weights = gaussian(12)
    layer = quantize_layer(weights, recipe, None, moment(13))
    assert layer.feedback is None
    np.testing.assert_array_equal(
        layer.reconstruct(), quantize_layer(weights, recipe).reconstruct()
    )


# -------------------------------------------------------------------------------------- corrections


def test_outliers_and_residuals_share_one_sparse_part() -> None:
    weights, c = gaussian(14), norms(15)
    weights[3, 5] = 40.0
    layer = quantize_layer(
        weights, parse_recipe("BOF4-NF4sS1E5M5", outliers=0.01, residuals=0.02), c
    )
    assert layer.corrections is not None
    mask = np.zeros(weights.shape, dtype=bool)
    rows = np.repeat(np.arange(24), np.diff(layer.corrections.indptr))
    mask[rows, layer.corrections.columns] = True
    outliers = outlier_mask(weights, 16, 0.01)
    assert outliers[3, 5]
    assert mask[outliers].all()
    assert 15 + 30 - 15 <= mask.sum() <= 15 + 30
    assert abs(layer.reconstruct()[3, 5] / 40.0 - 1.0) < 2.0**-8
    # The outlier's block is scaled as if it were not there.
    expected = quantize(weights, layer.tensor.format, channel_norms=c, excluded=outliers)
    np.testing.assert_array_equal(layer.tensor.scale_words, expected.scale_words)
    bare = quantize_layer(weights, parse_recipe("BOF4-NF4sS1E5M5"), c)
    assert layer.stored_bits == bare.stored_bits + layer.corrections.stored_bits


def test_residuals_are_the_largest_weighted_errors() -> None:
    weights, c = gaussian(16), norms(17)
    layer = quantize_layer(weights, parse_recipe("NF4sS1E5M5", residuals=0.05), c)
    bare = quantize_layer(weights, parse_recipe("NF4sS1E5M5"), c)
    errors = np.abs(weights.astype(np.float64) - bare.reconstruct()) * c
    left = np.abs(weights.astype(np.float64) - layer.reconstruct()) * c
    changed = layer.reconstruct() != bare.reconstruct()
    assert changed.sum() == int(0.05 * weights.size)
    assert errors[changed].min() >= errors[~changed].max()
    assert left.max() == errors[~changed].max()


def test_outliers_of_a_tensor_with_one_scale_stand_out_from_their_row() -> None:
    weights = gaussian(18)
    weights[2] *= 1e-3
    weights[2, 7] = 1.0
    layer = quantize_layer(weights, parse_recipe("E4M3^0sUE8M0", outliers=1 / weights.size))
    assert layer.corrections is not None
    assert layer.corrections.columns.tolist() == [7]
    assert layer.corrections.indptr.tolist() == [0, 0, 0] + [1] * 22


# ----------------------------------------------------------------- what follows from a file's LUTs

TRAINED = Training(blocks=64, rounds=1, sweeps=0, partners=1)


def small_end(layer: QuantizedLayer) -> Fraction:
    values = [[int(value) for value in lut.values] for lut in layer.tensor.luts]
    return Fraction(min(min(-table[0], table[-1]) for table in values))


@pytest.mark.parametrize(
    "name",
    ["DD4sUE4M4", "DD4-DD4sS1E4M3", "DD6sUE5M7", "NF4-DD4sS1E5M5", "Any4-Any4sUE4M3",
     "own-DD4sUE4M4", "DD4-DD4sUE3M4", "NF4-DD4sS1E2M4"],
)  # fmt: skip
@pytest.mark.parametrize("seed", [31])
def test_layer_exponents_follow_from_the_stored_luts(name: str, seed: int) -> None:
    """The smallest f under which no scale exceeds the format, by the LUTs as stored."""
    rng = np.random.default_rng(seed)
    for magnitude in np.geomspace(1.0, 2.0, 6):  # so that rounding up or down shows
        weights = (rng.standard_t(5, (16, 64)) * magnitude).astype(np.float32)
        recipe = parse_recipe(name, HIF8T, codebooks={"own": fixed_lut("SH4T", 16, HIF8T)},
                              training=TRAINED)  # fmt: skip
        layer = quantize_layer(weights, recipe)
        scale = layer.tensor.format.word.scale
        largest, limit = Fraction(float(np.abs(weights).max())), small_end(layer) * scale.max_value
        smallest = next(f for f in range(-128, 128) if largest <= limit * Fraction(2) ** f)
        narrow = scale.exponent_bits < 4
        steps = (0, -1, -2, 1) if narrow else (0,)
        assert layer.tensor.layer_exponent - smallest in steps


@pytest.mark.parametrize("name", ["DD4-DD4sRS1E2M4", "Any4sRUE4M3", "DD6-DD6sRS1E2M4"])
@pytest.mark.parametrize("seed", [33])
def test_row_scales_follow_from_the_stored_luts(name: str, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_t(5, (16, 64)).astype(np.float32)
    weights[3] = 0.0
    layer = quantize_layer(weights, parse_recipe(name, HIF8T, training=TRAINED))
    scale = layer.tensor.format.word.scale
    top = Fraction(2) ** (2**scale.exponent_bits - 1 - scale.bias)
    expected = []
    for row in weights:
        largest = Fraction(float(np.abs(row).max()))
        expected.append(BF16.encode(largest / (small_end(layer) * top) if largest else 1))
    assert layer.tensor.layer_exponent == 0
    assert layer.tensor.row_scales is not None
    assert layer.tensor.row_scales.tolist() == expected
