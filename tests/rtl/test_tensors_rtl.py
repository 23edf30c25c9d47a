"""Whole quantized tensors through the float decoder, bit for bit, on every simulator."""

from pathlib import Path

import numpy as np
import pytest

from golden.codebooks import fixed_lut
from golden.formats import HIF7, HIF8, HifFormat
from golden.notation import QuantFormat, parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode
from sim.decoder import Decoder
from sim.installed import quickest_simulator
from sim.stalls import STALL_MODES
from sim.tensor_run import flip_bit, run_tensors, stimulus_of

SEED = 2026


def random_tensor(fmt: QuantFormat, rows: int, columns: int, seed: int = SEED) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(4, (rows, columns)).astype(np.float32) * np.float32(0.02)
    weights[0, : fmt.block_size] = 0.0  # a block of zeros
    return quantize(weights, fmt)


def every_combination(fmt: QuantFormat) -> QuantizedTensor:
    """A tensor with every index under every scale code and every metabit: one block each."""
    scale_words = np.arange(1 << fmt.word.width, dtype=np.uint16)[None, :]
    indices = np.arange(fmt.lut_entries, dtype=np.uint8)
    assert fmt.block_size == fmt.lut_entries
    return QuantizedTensor(
        fmt,
        (1, scale_words.size * fmt.block_size),
        np.broadcast_to(indices, (1, scale_words.size, fmt.block_size)).copy(),
        scale_words,
        tuple(fixed_lut(name, fmt.block_size, fmt.hif) for name in fmt.codebooks),
        -3,
    )


@pytest.mark.parametrize(
    "config", ["BOF4-NF4sS1E5M5", "Split87-SH4sS1E5M5", "NF4sUE4M4", "BOF4-NF4sUE4M4"]
)
def test_every_index_metabit_and_scale_code(
    config: str, built_by_both: str, build_root: Path
) -> None:
    fmt = parse_format(config)
    tensor = every_combination(fmt)
    decoder = Decoder(
        "float_decoder", (fmt,), 32, "float32", built_by_both, build_root
    )  # built once for all tests
    results, _ = run_tensors(decoder, [tensor])
    assert results[0].passed, results[0]
    assert 2 * results[0].beats == 1 << fmt.word.width


@pytest.mark.parametrize("stalls", STALL_MODES)
def test_consecutive_tensors(stalls: str, simulator: str, build_root: Path) -> None:
    # 40 columns: the last block of a row is padded; 3 x 3 blocks of 16 do not fill the last beat of
    # 32 lanes; a beat crosses the end of a row; short tensors wait for their LUTs.
    fmt = parse_format("BOF4-NF4sS1E5M5")
    shapes = [(3, 40), (1, 16), (24, 100), (7, 33)]
    tensors = [random_tensor(fmt, *shape, seed) for seed, shape in enumerate(shapes)]
    decoder = Decoder("float_decoder", (fmt,), 32, "float32", simulator, build_root)
    results, _ = run_tensors(decoder, tensors, stalls=stalls, seed=5)
    assert [result.passed for result in results] == [True] * len(shapes), results
    assert [result.beats for result in results] == [5, 1, 84, 11]


@pytest.mark.parametrize(
    ("name", "hif", "lanes", "output"),
    [
        ("NF4sUE4M4", HIF7, 16, "bfloat16"),
        ("BOF4-NF4^32sS1E5M5", HIF8, 64, "float32"),
        ("NF4^8sBF16", HIF7, 16, "float32"),
        ("BOF4-SH4^64sUE4M3", HIF7, 128, "bfloat16"),
        ("BOF4-NF4^64sRS1E2M4", HIF8, 16, "float32"),
        ("NF4^32sRS1E2M4", HIF7, 8, "bfloat16"),
        ("E2M3sUE4M4", HIF7, 16, "float32"),
        ("E5M6sUE4M4", HIF7, 16, "float32"),
        ("HIF8TsUE4M4", HIF7, 32, "float32"),
    ],
)
def test_formats(name: str, hif: HifFormat, lanes: int, output: str, build_root: Path) -> None:
    # One simulator is enough here, the one that builds faster: both run the tests above.
    simulator = quickest_simulator()
    fmt = parse_format(name, hif)
    tensor = random_tensor(fmt, 20, 130)
    decoder = Decoder("float_decoder", (fmt,), lanes, output, simulator, build_root)
    results, _ = run_tensors(decoder, [tensor])
    assert results[0].passed, results[0]


@pytest.mark.parametrize("stalls", STALL_MODES)
def test_formats_change_between_tensors(stalls: str, simulator: str, build_root: Path) -> None:
    names = ["BOF4-NF4^64sRS1E2M4", "E2M3sUE4M4", "NF4sS1E5M5", "E3M4sUE4M4", "INT8^32sUE8M0"]
    formats = tuple(parse_format(name, HIF8) for name in names)
    shapes = [(3, 100), (5, 40), (1, 16), (24, 100), (2, 33)]
    tensors = [
        random_tensor(formats[number % 5], *shapes[number // 2 % 5], number) for number in range(10)
    ]
    decoder = Decoder("float_decoder", formats, 32, "float32", simulator, build_root)
    results, _ = run_tensors(decoder, tensors, stalls=stalls, seed=6)
    assert [result.passed for result in results] == [True] * 10, results


@pytest.mark.parametrize("kind", ["index", "scale", "lut"])
def test_one_wrong_bit_is_found_and_located(kind: str, simulator: str, build_root: Path) -> None:
    fmt = parse_format("BOF4-NF4sS1E5M5")
    tensor = random_tensor(fmt, 6, 64)
    block, bit = 13, 0  # row 3, block 1; the lowest bit is the hardest to notice
    metabit = int(tensor.metabits.reshape(-1)[block])
    index = int(tensor.indices.reshape(-1)[block * 16 + 5])
    position = {"index": block * 16 + 5, "scale": block, "lut": metabit * 16 + index}[kind]
    decoder = Decoder("float_decoder", (fmt,), 32, "float32", simulator, build_root)
    faulty = flip_bit(stimulus_of(tensor, decoder.modes), fmt, kind, position, bit)

    clean, _ = run_tensors(decoder, [tensor])
    assert clean[0].passed
    results, _ = run_tensors(decoder, [tensor], [faulty])
    first = results[0].first_difference
    assert first is not None
    assert not results[0].passed

    # Where the hardware must differ follows from what the bit is part of.
    metabits = np.repeat(tensor.metabits.reshape(-1), 16)
    indices = tensor.indices.reshape(-1)
    values = decode(tensor, padded=True).reshape(-1)
    scale_codes = np.repeat(tensor.scale_codes.reshape(-1), 16)
    wrong = {
        "index": np.arange(indices.size) == position,
        "scale": (np.arange(indices.size) // 16 == block) & (values != 0),
        "lut": (metabits == metabit) & (indices == index) & (scale_codes != 0),
    }[kind]
    expected = int(np.flatnonzero(wrong)[0])
    assert results[0].mismatches == int(wrong.sum())
    assert (first.row, first.block, first.element) == (
        expected // 64, expected % 64 // 16, expected % 16
    )  # fmt: skip
    assert (first.beat, first.lane) == divmod(expected, 32)
    assert first.expected == int(values.view(np.uint32)[expected])
    assert first.actual != first.expected
