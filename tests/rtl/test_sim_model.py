"""Whole checkpoints through the RTL: ``sop sim-model`` and the bulk harness."""

from pathlib import Path

import numpy as np
import pytest

from golden.checkpoint import CheckpointWriter
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import HIF8
from golden.notation import QuantFormat, parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode
from sim.bulk import run_bulk
from sim.decoder import Decoder
from tests.support.commands import invoke

NAMES = ("BOF4-NF4^32sRS1E2M4", "NF4-BOF4sS1E5M5", "E2M3sUE4M4", "E3M4sUE4M4")
FORMATS = tuple(parse_format(name, HIF8) for name in NAMES)
PAIR = FORMATS[1]

Pair = tuple[QuantizedTensor, Corrections | None]


def corrected(fmt: QuantFormat, rows: int, columns: int, density: float, seed: int) -> Pair:
    """A quantized tensor, and corrections of some of its weights."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(4, (rows, columns)).astype(np.float32) * np.float32(0.02)
    tensor = quantize(weights, fmt)
    mask = rng.random(weights.shape) < density
    residuals = np.where(mask, weights - decode(tensor), np.float32(0))
    return tensor, Corrections.from_mask(mask, residuals) if density else None


def tensors(formats: tuple[QuantFormat, ...]) -> list[Pair]:
    """Ragged rows, beats that are not filled, none, few and many corrections, every format."""
    shapes = [(20, 130), (5, 32), (33, 64), (1, 16), (8, 100)]
    densities = [0.01, 0.0, 0.2, 1.0, 0.05]
    return [
        corrected(formats[number % len(formats)], *shapes[number], densities[number], number)
        for number in range(len(shapes))
    ]


@pytest.mark.parametrize("unit", ["lut_decoder", "sparse_decoder"])
@pytest.mark.parametrize(("lanes", "output"), [(16, "float32"), (64, "bfloat16")])
def test_every_bit_of_every_format(
    unit: str, lanes: int, output: str, simulator: str, build_root: Path
) -> None:
    decoder = Decoder(unit, FORMATS, lanes, output, simulator, build_root)
    result = run_bulk(decoder, tensors(FORMATS))
    assert result.wrong_beats == 0, result.first_difference
    assert result.weights == sum(rows * columns for rows, columns in
                                 [(20, 130), (5, 32), (33, 64), (1, 16), (8, 100)])  # fmt: skip


@pytest.mark.parametrize("unit", ["lut_decoder", "sparse_decoder"])
def test_no_clock_is_lost(unit: str, simulator: str, build_root: Path) -> None:
    # Each tensor is longer than the load of the next one's LUTs, 32 clocks.
    decoder = Decoder(unit, (PAIR,), 16, "float32", simulator, build_root)
    pairs = [corrected(PAIR, 12, 64, density, 7) for density in (0.0, 0.02, 0.3, 0.0)]
    result = run_bulk(decoder, pairs)
    assert result.passed, result
    beats = 4 * 12 * 64 // 16
    if unit == "lut_decoder":
        assert result.clocks == beats + 1
    else:
        assert result.clocks > beats + 7  # several corrections in a beat take a clock each


@pytest.mark.parametrize("unit", ["lut_decoder", "sparse_decoder"])
def test_one_wrong_bit_is_found_and_located(unit: str, simulator: str, build_root: Path) -> None:
    decoder = Decoder(unit, (PAIR,), 16, "float32", simulator, build_root)
    pairs = [corrected(PAIR, 12, 64, density, 7) for density in (0.0, 0.02, 0.3, 0.0)]
    # The lowest bit of the index of lane 5 in beat 3 of the second tensor: row 0, weight 53.
    beats = 12 * 64 // 16
    bit = (beats + 3) * decoder.inputs["i"].size + 5 * 4
    result = run_bulk(decoder, pairs, flipped_bit=bit)
    assert not result.passed
    assert result.wrong_beats == 1
    first = result.first_difference
    assert first is not None
    assert (first.tensor, first.row, first.column, first.beat) == (1, 0, 53, 3)
    assert first.expected != first.actual


def test_bit_that_does_not_exist(build_root: Path) -> None:
    decoder = Decoder("lut_decoder", (PAIR,), 16, "float32", "verilator", build_root)
    with pytest.raises(InputError, match="bit 100000 does not exist: 4 beats of 77 bits"):
        run_bulk(decoder, [corrected(PAIR, 1, 64, 0.0, 1)], flipped_bit=100_000)


def test_command(simulator: str, build_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with CheckpointWriter(path, config={}, calibration=None) as writer:
        for number, (tensor, sparse) in enumerate(tensors((PAIR,))):
            writer.add(f"blk.{number}.weight", tensor, sparse, "F32")
    options = ["sim-model", path, "--lanes", 16, "--sim", simulator, "--build", build_root]
    clean = invoke(*options, "--unit", "sparse_decoder")
    assert clean.exit_code == 0, clean.output
    assert clean.stdout.rstrip().endswith("PASS")
    faulty = invoke(*options, "--unit", "lut_decoder", "--inject-fault", 0)
    assert faulty.exit_code == 1
    assert "MISMATCH lut_decoder: tensor 'blk.0.weight', row 0, column 0 (beat 0)" in faulty.stdout
