"""Parts of quantizing a layer, and what searching scales, codebooks and layer exponents gains."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

import golden.blocks
from golden.codebooks import Lut
from golden.formats import ATOMS
from golden.notation import QuantFormat, parse_format
from golden.quantize import (
    ScaledLayer,
    choose_metabits,
    levels_of,
    quantize,
    resolve_luts,
    scaled_layer,
)
from golden.scaling import BlockEncoding, ScaleMode
from golden.tensor import decode
from golden.tests.quantize_reference import (
    FAR,
    Reference,
    exact_errors,
    gaussian,
    lut_grid,
    luts_of,
    one_lut,
    one_pass_modes,
    some_excluded,
    uneven_norms,
)

# -------------------------------------------------------------------------------- parts of a layer


def pair_layer(
    name: str, seed: int, rows: int = 5, columns: int = 40
) -> tuple[ScaledLayer, Reference, tuple[Lut, ...]]:
    """A layer with everything: a short last block, channel norms and excluded weights."""
    fmt = parse_format(name)
    weights, luts = gaussian(seed, rows, columns), luts_of(fmt, seed)
    weights[1, 16:32] = 0.0
    norms, excluded = uneven_norms(seed, columns), some_excluded(seed, weights.shape)
    end = min(lut_grid(lut).small_end for lut in luts)
    layer = scaled_layer(weights, fmt, end, norms, excluded)
    return layer, Reference(weights, fmt, luts, norms, excluded), luts


@pytest.mark.parametrize("name", ["DD4-DD4sS1E4M3", "BOF4-DD4sRS1E2M4"])
@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("chunk", [16, 48, 1 << 15])
@pytest.mark.parametrize("seed", [81])
def test_encode_returns_codes_and_errors_of_every_set_of_levels(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: ScaleMode, chunk: int, seed: int
) -> None:
    """Errors to the last bit: their sums have a documented order."""
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", chunk)
    layer, reference, luts = pair_layer(name, seed)
    tables = levels_of(reference.fmt, luts)
    encodings = layer.encode(tables, mode)
    assert len(encodings) == 2
    for encoding, grid in zip(encodings, reference.grids, strict=True):
        codes = encoding.scale_codes.tolist()
        if mode is not ScaleMode.SEARCH:
            assert codes == [reference.scale_code(b, grid, mode) for b in reference.blocks]
        wanted = [
            reference.error(block, grid, code)
            for block, code in zip(reference.blocks, codes, strict=True)
        ]
        assert encoding.errors.tolist() == wanted, f"seed {seed}"


@pytest.mark.parametrize("name", ["DD4-DD4sS1E4M3", "BOF4-DD4sRS1E2M4"])
@pytest.mark.parametrize("chunk", [16, 48, 1 << 15])
@pytest.mark.parametrize("seed", [82])
def test_assemble_takes_the_nearest_level_under_any_scales_and_metabits(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk: int, seed: int
) -> None:
    """Also under scales of either sign that no mode would choose."""
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", chunk)
    layer, reference, luts = pair_layer(name, seed)
    rng, width = np.random.default_rng(seed), reference.scale.width
    signs = rng.integers(0, 2, len(layer.blocks)) << (width - 1)
    codes = (rng.integers(1, 1 << (width - 1), len(layer.blocks)) | signs).astype(np.uint16)
    metabits = rng.integers(0, 2, len(layer.blocks)).astype(np.uint16)
    tensor = layer.assemble(reference.fmt, luts, metabits, codes)
    elements, dense = reference.elements((metabits.astype(int) << width | codes).tolist())
    assert tensor.indices.reshape(len(elements), -1).tolist() == elements
    assert decode(tensor, padded=True).ravel().tolist() == [float(value) for value in dense]
    assert np.array_equal(tensor.metabits.ravel(), metabits)
    assert np.array_equal(tensor.scale_codes.ravel(), codes)


@pytest.mark.parametrize("name", ["DD4-DD4sS1E4M3", "BOF4-DD4sRS1E2M4"])
@pytest.mark.parametrize("seed", [83])
def test_chunks_are_all_blocks_in_order(
    monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", 64)
    layer, reference, _ = pair_layer(name, seed)
    chunks = list(layer.chunks(4096))
    assert [len(chunk) for chunk in chunks] == [4, 4, 4, 3]
    assert {chunk.cells for chunk in chunks} == {4096}
    for attribute, wanted in (
        ("blocks", [block.elements for block in reference.blocks]),
        ("weights", [block.importance for block in reference.blocks]),
        ("multipliers", [block.unit for block in reference.blocks]),
    ):
        joined = np.concatenate([getattr(chunk, attribute) for chunk in chunks], axis=-1)
        assert joined.T.tolist() == wanted
    some = layer.chunk(np.array([12, 3]), 4096)
    assert some.blocks.T.tolist() == [reference.blocks[i].elements for i in (12, 3)]
    assert some.multipliers.tolist() == [reference.blocks[i].unit for i in (12, 3)]


def test_the_metabit_is_one_only_where_the_second_lut_has_the_lower_error() -> None:
    first = BlockEncoding(np.array([7, 7, 7, 0], np.uint16), np.array([1.0, 1.0, 1.0, 0.0]))
    second = BlockEncoding(np.array([9, 5, 9, 0], np.uint16), np.array([0.5, 1.0, 2.0, 0.0]))
    metabits, chosen = choose_metabits([first, second])
    assert metabits.dtype == np.uint16
    assert metabits.tolist() == [1, 0, 0, 0]
    assert chosen.scale_codes.tolist() == [9, 7, 7, 0]
    assert chosen.errors.tolist() == [0.5, 1.0, 1.0, 0.0]
    metabits, chosen = choose_metabits([second])
    assert metabits.dtype == np.uint16
    assert metabits.tolist() == [0, 0, 0, 0]
    assert chosen.scale_codes.tolist() == [9, 5, 9, 0]


def test_levels_are_those_of_the_atom_or_of_each_lut() -> None:
    (atom,) = levels_of(parse_format("E2M1sUE4M4"), ())
    assert atom.values.tolist() == [float(value) for value in ATOMS["E2M1"].canonical]
    fmt = parse_format("NF4-DD4sS1E5M5")
    luts = luts_of(fmt, 84)
    levels = [table.values.tolist() for table in levels_of(fmt, luts)]
    assert levels == [lut_grid(lut).values for lut in luts]


# ------------------------------------------------------------------------------------- the search


SEARCHED = (
    "BOF4-NF4sS1E5M5", "NF4sS1E4M3", "E2M3sUE4M4", "SH4-DD4sUE4M4", "DD5-DD5sRS1E2M4",
    "E3M2^0sUE4M4", "INT4^0sS1E5M5",
)  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("seed", [71])
def test_the_search_is_never_worse_than_one_pass_on_any_block(
    name: str, weighted: bool, seed: int
) -> None:
    fmt, weights = parse_format(name), gaussian(seed, 12, 70)
    norms = uneven_norms(seed, 70) if weighted else None
    luts = luts_of(fmt, seed)
    searched = quantize(weights, fmt, luts=luts, channel_norms=norms)
    found = exact_errors(weights, searched, norms)
    for mode in one_pass_modes(fmt):
        one_pass = quantize(weights, fmt, mode=mode, luts=luts, channel_norms=norms)
        assert one_pass.layer_exponent == searched.layer_exponent
        errors = exact_errors(weights, one_pass, norms)
        # Errors are compared in float64, which holds them to 15 digits.
        pairs = zip(found, errors, strict=True)
        assert all(own <= (1 + Fraction(2) ** -48) * other for own, other in pairs)
        assert sum(found) < 0.97 * sum(errors)


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("seed", [34])
def test_a_pair_takes_the_better_codebook_of_each_block(
    mode: ScaleMode, weighted: bool, seed: int
) -> None:
    weights = gaussian(seed, 40, 64)
    norms = uneven_norms(seed, 64) if weighted else None
    # An extreme with which f, on which errors depend, is the same for the pair and its halves.
    weights[0, 0] = 4.5
    pair, *both = (
        quantize(weights, parse_format(f"{name}sS1E5M5"), mode=mode, channel_norms=norms)
        for name in ("BOF4-NF4", "BOF4", "NF4")
    )
    assert [single.layer_exponent for single in both] == [pair.layer_exponent] * 2
    first, second = (exact_errors(weights, single, norms) for single in both)
    better = [a <= b for a, b in zip(first, second, strict=True)]
    assert any(better)
    assert not all(better)
    wanted = np.where(better, *(single.scale_words.ravel() for single in both))
    assert pair.scale_codes.ravel().tolist() == wanted.tolist(), f"seed {seed}"
    assert pair.metabits.ravel().tolist() == [int(not first) for first in better]


# --------------------------------------------------------------------------------- layer exponent


def total_error(layer: ScaledLayer, exponent: int, fmt: QuantFormat) -> float:
    """Least error of a layer under another layer exponent."""
    tables = levels_of(fmt, resolve_luts(fmt))
    moved = replace(layer, layer_exponent=exponent)
    _, chosen = choose_metabits(moved.encode(tables, ScaleMode.SEARCH))
    return math.fsum(chosen.errors)


@pytest.mark.parametrize(
    ("name", "outlier", "norm", "step"),
    [
        ("NF4sS1E2M0", 40.0, 1.0, 0),
        ("E2M1sS1E2M0", 200.0, 1.0, -1),
        ("NF4sS1E2M0", 20.0, 1e-3, -2),
        ("BOF4-NF4sS1E3M3", 200.0, 1.0, 1),
        ("NF4sS1E4M3", 200.0, 1.0, None),
    ],
)
@pytest.mark.parametrize("seed", [91])
def test_narrow_scale_formats_take_the_best_of_four_layer_exponents(
    name: str, outlier: float, norm: float, step: int | None, seed: int
) -> None:
    """Clipping one weight far above all others lets these have finer scales.

    With four exponent bits f stays, though f + 1 would be better here. In the third case f - 3
    would be better still, but is not tried.
    """
    fmt, weights, norms = parse_format(name), gaussian(seed, 12, 32), np.ones(32)
    weights[0, 3], norms[3] = outlier, norm
    end = min(table.small_end for table in levels_of(fmt, resolve_luts(fmt)))
    layer = scaled_layer(weights, fmt, end, norms)
    first = layer.layer_exponent
    totals = [total_error(layer, first + change, fmt) for change in (0, -1, -2, 1)]
    best = (0, -1, -2, 1)[totals.index(min(totals))]
    assert best == (1 if step is None else step)
    if name == "NF4sS1E2M0" and step == -2:
        assert total_error(layer, first - 3, fmt) < min(totals)
    tensor = quantize(weights, fmt, channel_norms=norms)
    assert tensor.layer_exponent == first + (step or 0)
    total = float(sum(exact_errors(weights, tensor, norms)))
    assert total == pytest.approx(totals[0] if step is None else min(totals), rel=1e-12)
    for mode in one_pass_modes(fmt):
        assert quantize(weights, fmt, mode=mode, channel_norms=norms).layer_exponent == first


@pytest.mark.parametrize("factor", [3.0, 4.0, 6.0])
def test_the_first_layer_exponent_wins_a_tie(factor: float) -> None:
    """E2M1 ends at 6 and S1E2M0 at 4: these weights are exact, with f + 1 as well as with f."""
    fmt = parse_format("E2M1sS1E2M0")
    weights = np.tile(np.array([1.0, -0.5, 0.5, 0.0], dtype=np.float32) * factor, (2, 8))
    layer = scaled_layer(weights, fmt, 6.0)
    exponents = [layer.layer_exponent + step for step in (0, 1)]
    assert [total_error(layer, exponent, fmt) for exponent in exponents] == [0.0, 0.0]
    assert quantize(weights, fmt).layer_exponent == exponents[0]


@pytest.mark.parametrize("first", [-125, -126, -127, -128])
@pytest.mark.parametrize("seed", [92])
def test_layer_exponents_that_the_hardware_does_not_take_are_not_tried(
    first: int, seed: int
) -> None:
    """A weight that hardly counts makes lower exponents better, of which the field ends at -128."""
    fmt = parse_format("DD4sS1E2M0")
    signs = np.where(gaussian(seed, 4, 32) < 0, -1.0, 1.0)
    signs[0, 3] = 200.0
    weights = np.ldexp(signs, first + 1).astype(np.float32)
    norms = np.ones(32)
    norms[3] = 1e-6
    for mode, wanted in ((ScaleMode.ABSMAX, first), (ScaleMode.SEARCH, max(first - 2, -128))):
        tensor = quantize(weights, fmt, mode=mode, luts=(one_lut(FAR),), channel_norms=norms)
        assert tensor.layer_exponent == wanted


def test_row_scales_leave_no_layer_exponent_to_search() -> None:
    """Row scales are as the one-pass modes have them; test_scaling.py shows how they are chosen."""
    weights = gaussian(93, 6, 32)
    weights[0, 3] = 200.0
    fmt = parse_format("NF4sRS1E2M0")
    searched, simple = (
        quantize(weights, fmt, mode=mode) for mode in (ScaleMode.SEARCH, ScaleMode.ABSMAX)
    )
    assert searched.layer_exponent == 0
    assert searched.row_scales is not None
    assert simple.row_scales is not None
    assert np.array_equal(searched.row_scales, simple.row_scales)
