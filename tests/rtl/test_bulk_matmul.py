"""Whole layers through the kernel in hardware (:mod:`sim.bulk_matmul`), and where it goes wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rtl.lut_tile
import rtl.matmul_tile
import rtl.sop_tile
import rtl.tile_epilogue
from golden.activations import QuantizedActivations, parse_activation_format, quantize_activations
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import HIF8
from golden.kernel import matmul
from golden.notation import QuantFormat, parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode
from rtl.tile_epilogue import clocks_of_tile
from sim.bulk_matmul import BulkTile, MatmulResult, run_matmul, slots_for
from sim.installed import quickest_simulator
from sim.matmul_mismatch import FinishStep, Step, locate_mismatch
from tb.faults import changed_module

SHAPE, TOKENS = (10, 70), 7  # neither fills tiles of 4 x 3, nor 70 channels blocks
PAIR = ("BOF4-NF4sS1E5M5", "INT8sUE8M0")

Layer = tuple[QuantizedTensor, QuantizedActivations, Corrections]


def layer(weights: str, activations: str, seed: int = 3, density: float = 0.02) -> Layer:
    """A small layer, with corrections of some weights, and inputs."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, SHAPE).astype(np.float32) * np.float32(0.02)
    x = rng.standard_t(4, (TOKENS, SHAPE[1])).astype(np.float32)
    tensor = quantize(values, parse_format(weights, HIF8))
    fmt = parse_activation_format(activations)
    assert fmt is not None
    mask = rng.random(SHAPE) < density
    residuals = np.where(mask, values - decode(tensor), np.float32(0))
    return tensor, quantize_activations(x, fmt), Corrections.from_mask(mask, residuals)


def tile_for(
    one: Layer, simulator: str, build_root: Path, *more: QuantFormat, output: str = "float32"
) -> BulkTile:
    """A tile of 4 x 3 for the format of a layer, and others."""
    formats = one[0].format, *more
    slots = slots_for(one[2], 4)
    return BulkTile(formats, one[1].format, 4, 3, simulator, build_root, output, slots)


def check(one: Layer, tile: BulkTile) -> None:
    tensor, activations, corrections = one
    result = run_matmul(tile, tensor, activations, corrections)
    assert result.mismatches == 0
    assert result.passed
    assert result.products == SHAPE[0] * SHAPE[1] * TOKENS
    blocks = -(-SHAPE[1] // tensor.format.block_size)
    beats = 3 * 3 * blocks * tensor.format.block_size  # of as many tiles
    last = corrections.take_rows(slice(8, 10))  # of the last tile of rows
    turns = [np.arange(count) for count in np.diff(last.indptr)]
    rows = np.repeat([0, 1], list(map(len, turns)))[
        np.argsort(np.concatenate(turns), kind="stable")
    ]
    after = clocks_of_tile(tile.unit.shape, rows.tolist(), row_scales=tile.modes.row_scale)
    assert result.outputs.hidden
    assert result.outputs.clocks == beats + rtl.lut_tile.LATENCY + after
    whole = matmul(tensor, activations, corrections, output=tile.output)
    assert (result.output.bits == whole.bits).all()
    assert (result.output.overflow == whole.overflow).all()
    without = matmul(tensor, activations, output=tile.output)
    assert (whole.bits != without.bits).any()


def test_every_bit_of_a_layer(simulator: str, build_root: Path) -> None:
    one = layer(*PAIR)
    check(one, tile_for(one, simulator, build_root))


def test_a_tile_waits_for_many_corrections(build_root: Path) -> None:
    """More than a tile has time for: every bit is right, and only the clocks are more."""
    tensor, activations, corrections = layer(*PAIR, density=0.5)
    tile = tile_for((tensor, activations, corrections), quickest_simulator(), build_root)
    result = run_matmul(tile, tensor, activations, corrections)
    assert result.passed
    assert not result.outputs.hidden
    assert result.outputs.clocks > result.outputs.expected_clocks
    early = replace(result.outputs, clocks=result.outputs.expected_clocks - 1)
    assert not replace(result, outputs=early).passed


def test_slots_hold_the_columns_of_a_tile() -> None:
    mask = np.zeros((8, 1000), bool)
    mask[:4, :65] = True
    mask[4:, 65:565] = True
    corrections = Corrections.from_mask(mask, np.zeros(mask.shape, np.float32))
    assert [slots_for(corrections, rows) for rows in (4, 8)] == [512, 1024]
    assert slots_for(corrections.take_rows(slice(0, 4)), 4) == 128
    assert slots_for(None, 4) == 64


@pytest.mark.parametrize(
    ("weights", "activations", "output"),
    [
        # Row scales, then promoted on the same tile; longer blocks; powers of two per token.
        (["BOF4-NF4^32sRS1E2M4", "E2M3^32sS1E2M4"], "E4M3^64sUE4M4", "bfloat16"),
        (["E2M1^16sUE4M3"], "INT8^0sBF16", "float32"),  # no LUT; one scale a token
        (["NF4sUE8M0"], "HIF8sUE8M0", "bfloat16"),  # a scale word of 0 is no scale of 0
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_other_formats(
    weights: list[str], activations: str, output: str, build_root: Path, thorough: bool
) -> None:
    if not thorough and len(weights) == 1:
        pytest.skip("only with --all-simulations")
    layers = [layer(name, activations) for name in weights]
    others = [one[0].format for one in layers[1:]]
    tile = tile_for(layers[0], quickest_simulator(), build_root, *others, output=output)
    for one in layers:
        check(one, tile)


# --- what goes wrong is located -------------------------------------------------------------------


def wrong(
    one: Layer, build_root: Path, fault: tuple[str, int, int] | None = None, output: str = "float32"
) -> tuple[BulkTile, MatmulResult]:
    tile = tile_for(one, quickest_simulator(), build_root, output=output)
    result = run_matmul(tile, *one, fault=fault)
    assert not result.passed
    return tile, result


@pytest.mark.parametrize(
    ("fault", "row", "token", "block"),
    [
        (("index", 5 * 80 + 37, 3), 5, 0, 2),
        (("scale", 9 * 5 + 4, 7), 9, 0, 4),
        (("activation", 6 * 80 + 18, 6), 0, 6, 1),
    ],
)
def test_a_wrong_bit_is_located(
    fault: tuple[str, int, int], row: int, token: int, block: int, build_root: Path
) -> None:
    tile, result = wrong(layer(*PAIR), build_root, fault)
    # The hardware did what golden does with the wrong bit: the comparison saw all that it changed.
    changed, true = (
        matmul(one.tensor, one.activations, one.corrections).bits
        for one in (result.given, result.operands)
    )
    assert result.mismatches == np.count_nonzero(changed != true) > 0
    found = locate_mismatch(tile, result)
    assert found is not None
    assert isinstance(found.step, Step)
    assert (found.row, found.token, found.step.block, found.step.name) == (row, token, block, "T")
    assert found.step.channels == (16 * block, min(16 * block + 15, SHAPE[1] - 1))
    assert found.actual != found.expected
    # T of golden is P times S, rounded.
    product = np.float32(found.step.product * found.step.scale)
    assert int(product.view(np.uint32)) == found.step.expected != found.step.actual
    assert found.waveform is not None
    assert found.waveform.stat().st_size > 0


def test_a_wrong_addition_is_located(build_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer(*PAIR)
    kept = "Mux(opens, 0, returning.as_value() & 0xFFFFF000)"
    faulty = changed_module(rtl.lut_tile, "Mux(opens, 0, returning)", kept, part=rtl.sop_tile)
    monkeypatch.setattr(rtl.matmul_tile, "LutTile", faulty.LutTile)
    tile, result = wrong(one, build_root)
    found = locate_mismatch(tile, result)
    assert found is not None
    assert isinstance(found.step, Step)
    # Nothing is added to the first block's T; the first row and token of all are wrong.
    assert (found.row, found.token, found.step.block, found.step.name) == (0, 0, 1, "acc")


@pytest.mark.parametrize(
    ("fault", "output", "name"),
    [
        (("correction", 2, 6), "float32", "correction"),
        (("row_scale", 4, 3), "bfloat16", "row scale"),
    ],
)
def test_a_wrong_step_after_the_sums_is_located(
    fault: tuple[str, int, int], output: str, name: str, build_root: Path, thorough: bool
) -> None:
    if not thorough and name != "correction":
        pytest.skip("only with --all-simulations")
    one = layer("BOF4-NF4^16sRS1E2M4", "INT8sUE8M0")
    tile, result = wrong(one, build_root, fault, output)
    found = locate_mismatch(tile, result)
    assert found is not None
    assert isinstance(found.step, FinishStep)
    assert found.step.name == name
    assert found.step.actual != found.step.expected
    sparse = one[2]
    if name == "correction":
        row = int(np.searchsorted(sparse.indptr, 2, side="right")) - 1
        assert (found.row, found.step.column) == (row, sparse.columns[2])
        assert found.step.factor == np.array([int(sparse.values[2]) << 16], "<u4").view("<f4")[0]
        assert found.step.activation != 0
    else:
        assert found.row == 4
    assert found.waveform is not None


def test_wrong_rounding_to_bfloat16_is_located(
    build_root: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool
) -> None:
    if not thorough:
        pytest.skip("only with --all-simulations")
    faulty = changed_module(rtl.tile_epilogue, "rounded.eq(kept + up)", "rounded.eq(kept)")
    monkeypatch.setattr(rtl.matmul_tile, "TileEpilogue", faulty.TileEpilogue)
    tile, result = wrong(layer(*PAIR), build_root, output="bfloat16")
    found = locate_mismatch(tile, result)
    assert found is not None
    assert isinstance(found.step, FinishStep)
    assert found.step.name == "bfloat16"


def test_what_only_happened_once_is_said_to_depend_on_more(build_root: Path) -> None:
    tile, result = wrong(layer(*PAIR), build_root, ("index", 0, 0))
    found = locate_mismatch(tile, replace(result, given=result.operands))
    assert found is not None
    assert found.step is None
    assert found.waveform is not None


def test_wrong_flags_and_clocks_do_not_pass(
    build_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = changed_module(
        rtl.tile_epilogue, "beat.overflow.eq(Cat(overflows).any())", "beat.overflow.eq(1)"
    )
    monkeypatch.setattr(rtl.matmul_tile, "TileEpilogue", faulty.TileEpilogue)
    one = layer(*PAIR)
    tile, result = wrong(one, build_root)
    assert (result.mismatches, result.outputs.wrong_flags) == (0, 9 * 12)
    assert locate_mismatch(tile, result) is None
    late = replace(result.outputs, wrong_flags=0, clocks=result.outputs.clocks + 1)
    assert not replace(result, outputs=late).passed


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        ("E5M6sUE4M4", "INT8sUE8M0", "E5M6 is no element of a tile"),
        ("BOF4^32sUE4M4", "INT8^16sUE8M0", "blocks of 16 channels are not whole blocks of 32"),
    ],
)
def test_what_the_tile_cannot_take(
    weights: str, activations: str, message: str, build_root: Path
) -> None:
    fmt, inputs = parse_format(weights), parse_activation_format(activations)
    assert inputs is not None
    with pytest.raises(InputError, match=message):
        assert BulkTile((fmt,), inputs, 4, 3, "verilator", build_root).streams


def test_a_bit_that_does_not_exist(build_root: Path) -> None:
    one = layer(*PAIR)
    with pytest.raises(InputError, match="fault scale:60:0: there are 60 elements of 12 bits"):
        run_matmul(tile_for(one, "verilator", build_root), *one[:2], fault=("scale", 60, 0))
