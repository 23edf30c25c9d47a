"""Exact decoding, and the checks of a tensor's parts."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.errors import InputError
from golden.formats import BF16, HIF7, HIF8, HIF8T, HifFormat, Kind, NumberFormat
from golden.notation import QuantFormat, parse_format
from golden.packing import unpack_bits
from golden.tensor import QuantizedTensor, check_float32_range, decode

FORMATS = {
    name: parse_format(name)
    for name in (
        "E2M1sUE4M4", "E2M3sUE4M4", "E2M3^32sUE8M0", "E4M3^0sUE8M0", "E4M3^8sS1E5M5", "E3M4sUE5M7",
        "E4M5sS1E4M3", "E5M6^8sUE4M4", "INT4sS1E4M3", "INT8^64sBF16", "HIF7sUE4M4", "HIF8sS1E5M5",
        "HIF8T^32sUE5M5", "NF4sUE4M4", "SH4^64sS1E5M5", "BOF4-NF4sS1E5M5", "NF4-Split87^8sUE4M3",
        "NF4-DD4sRS1E2M4", "NF4sRUE4M4", "DD6sS1E4M3", "DD5-DD5sUE4M4", "BOF4-NF4sRUE5M7",
    )
} | {"DD6-DD6sRS1E4M3/HIF8T": parse_format("DD6-DD6sRS1E4M3", HIF8T),
     "NF4-DD4sS1E5M5/HIF8": parse_format("NF4-DD4sS1E5M5", HIF8)}  # fmt: skip


def some_lut(entries: int, hif: HifFormat, seed: int) -> Lut:
    values = list(hif.canonical)
    inner = np.arange(1, len(values) - 1)
    picked = np.random.default_rng(seed).choice(inner, entries - 2, replace=False).tolist()
    ends = [0, len(values) - 1]  # on both sides of zero
    return Lut(hif, tuple(hif.canonical[values[i]] for i in sorted([*picked, *ends])))


def codes_with_value(fmt: NumberFormat) -> list[int]:
    bad = (Kind.NAN, Kind.RESERVED)
    return [code for code in range(1 << fmt.width) if fmt.decode(code).kind not in bad]


def random_tensor(fmt: QuantFormat, seed: int, shape: tuple[int, int] = (3, 45)) -> QuantizedTensor:
    """Every part at random from what is allowed, zeros of both signs included."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    grid = (rows, -(-columns // fmt.block_size)) if fmt.block_size else (1, 1)
    size = fmt.block_size or rows * columns
    element = codes_with_value(fmt.atom) if fmt.atom else list(range(fmt.lut_entries))
    scales = codes_with_value(fmt.word.scale)
    if fmt.word.scale.exponent_bits == 8:
        # Only scales whose products stay inside float32.
        scales = [c for c in scales if 2.0**-90 < abs(fmt.word.scale.decode(c).value) < 2.0**90]
        scales.append(0)
    elements = rng.choice(element, (*grid, size)).astype(
        np.uint16 if fmt.index_bits > 8 else np.uint8
    )
    # The lowest code is zero; -0 is the code of the sign bit alone where there is one.
    elements.flat[:2] = 0, 1 << fmt.index_bits - 1 if fmt.name.startswith("E") else 0
    words = (
        rng.choice(scales, grid)
        | rng.integers(0, 2, grid) * fmt.word.metabit_bits << fmt.word.scale.width
    )
    luts = tuple(
        fixed_lut(name, fmt.block_size, fmt.hif)
        if name in FIXED_CODEBOOKS
        else some_lut(fmt.lut_entries, fmt.hif, seed + i)
        for i, name in enumerate(fmt.codebooks)
    )
    # bfloat16 of magnitude 2**-8 to 2**8, with a zero of either sign.
    bits = rng.integers(119 << 7, 135 << 7, rows) | rng.integers(0, 2, rows) << 15
    bits[0] &= 0x8000
    return QuantizedTensor(
        fmt, shape, elements, words.astype(np.uint16), luts, int(rng.integers(-30, 20)),
        bits.astype(np.uint16) if fmt.row_scale else None,
    )  # fmt: skip


def dense_by_fractions(tensor: QuantizedTensor) -> list[list[Fraction]]:
    """Every value of every block, padding included, from the scalar decoders."""
    fmt, scale = tensor.format, tensor.format.word.scale
    rows: list[list[Fraction]] = []
    for row in range(len(tensor.scale_words)):
        values = []
        for block in range(tensor.scale_words.shape[1]):
            word = int(tensor.scale_words[row, block])
            metabit, code = divmod(word, 2**scale.width)
            real = scale.decode(code).value * Fraction(2) ** tensor.layer_exponent
            if tensor.row_scales is not None:
                real *= BF16.decode(int(tensor.row_scales[row])).value
            for index in tensor.indices[row, block].tolist():
                if fmt.atom is not None:
                    level = fmt.atom.decode(index).value
                else:
                    lut = tensor.luts[metabit]
                    level = lut.hif.decode(lut.codes[index]).value
                values.append(level * real)
        rows.append(values)
    return rows


@pytest.mark.parametrize("seed", [61, 62, 63])
@pytest.mark.parametrize("name", FORMATS)
def test_decode_equals_fractions(name: str, seed: int) -> None:
    fmt = FORMATS[name]
    tensor = random_tensor(fmt, seed)
    wanted = dense_by_fractions(tensor)
    padded = decode(tensor, padded=True)
    assert padded.dtype == np.float32
    if fmt.block_size == 0:
        wanted = [wanted[0][row * 45 : (row + 1) * 45] for row in range(3)]
    assert [[Fraction(v) for v in row] for row in padded.astype(float).tolist()] == wanted
    assert not np.signbit(padded[padded == 0]).any()
    assert fmt.atom is None or (padded == 0).any()
    dense = decode(tensor)
    assert dense.shape == (3, 45)
    assert np.array_equal(dense, padded[:, :45])


def test_widest_significands_are_exact() -> None:
    """8 bits of HIF8T level, 8 of scale and 8 of row scale fill a float32 significand."""
    fmt = parse_format("DD6sRS1E5M7", HIF8T)
    values = sorted(HIF8T.canonical)
    lut = Lut(HIF8T, tuple(HIF8T.canonical[v] for v in [values[0], *values[-63:]]))
    scale = fmt.word.scale.encode(Fraction(255, 128))
    row = BF16.encode(Fraction(-255, 128))
    tensor = QuantizedTensor(
        fmt, (1, 16), np.full((1, 1, 16), 63, np.uint8), np.full((1, 1), scale, np.uint16),
        (lut,), 3, np.array([row], np.uint16),
    )  # fmt: skip
    assert decode(tensor)[0, 0] == float(-248 * Fraction(255, 128) ** 2 * 8)


@pytest.mark.parametrize("name", ["INT8sS1E5M5", "E2M3sS1E5M5", "NF4sRS1E5M5"])
def test_zeros_are_positive(name: str) -> None:
    """Zero elements, zero scales and zero row scales, with negative partners of each."""
    fmt = parse_format(name)
    tensor = random_tensor(fmt, 64, (4, 16))
    indices, words = tensor.indices.copy(), tensor.scale_words.copy()
    indices[:, :, :8] = 0x80 >> (8 - fmt.index_bits) if name.startswith("E") else 0
    words[0], words[1], words[2] = 0, 1 << 10, 0x43F  # 0, -0, a negative scale
    rows = None if tensor.row_scales is None else np.array([0xBF80, 0x3F80, 0x8000, 0], np.uint16)
    dense = decode(replace(tensor, indices=indices, scale_words=words, row_scales=rows))
    assert not np.signbit(dense[dense == 0]).any()
    assert not dense[:2].any()


def test_metabits_and_scale_codes_are_the_parts_of_the_word() -> None:
    tensor = random_tensor(parse_format("BOF4-NF4sS1E5M5"), 65)
    words = tensor.scale_words
    assert np.array_equal(tensor.metabits, words // 2048)
    assert np.array_equal(tensor.scale_codes, words % 2048)
    assert set(tensor.metabits.ravel().tolist()) == {0, 1}
    single = random_tensor(parse_format("INT8sBF16"), 65)
    assert not single.metabits.any()
    assert np.array_equal(single.scale_codes, single.scale_words)


@pytest.mark.parametrize("name", ["BOF4-NF4sS1E5M5", "E2M3sUE4M4", "DD6sS1E4M3", "E5M6^8sUE4M4"])
def test_planes_hold_indices_and_words(name: str) -> None:
    tensor = random_tensor(FORMATS[name], 66)
    fmt = tensor.format
    indices = unpack_bits(tensor.index_plane, fmt.index_bits, tensor.indices.size)
    assert np.array_equal(indices, tensor.indices.ravel())
    words = unpack_bits(tensor.scale_plane, fmt.word.width, tensor.scale_words.size)
    assert np.array_equal(words, tensor.scale_words.ravel())


PAIR = random_tensor(parse_format("BOF4-NF4sS1E5M5"), 67, (2, 40))
ROWS = random_tensor(parse_format("NF4sRUE4M4"), 68, (2, 40))
LAYER = random_tensor(parse_format("E2M3^0sUE8M0"), 69, (2, 40))


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (
            PAIR,
            {"indices": np.zeros((2, 2, 16), np.uint8)},
            r"indices: shape \(2, 2, 16\), expected \(2, 3, 16\)",
        ),
        (PAIR, {"indices": np.zeros((2, 3, 8), np.uint8)}, r"indices: shape"),
        (
            PAIR,
            {"indices": np.zeros((2, 3, 16), np.int64)},
            "indices: dtype int64, expected uint8 or uint16",
        ),
        (
            PAIR,
            {"indices": np.full((2, 3, 16), 16, np.uint8)},
            r"indices: 16 is not in range\(16\)",
        ),
        (
            PAIR,
            {"scale_words": np.zeros((2, 2), np.uint16)},
            r"scale_words: shape \(2, 2\), expected \(2, 3\)",
        ),
        (PAIR, {"scale_words": np.zeros((2, 3), np.float32)}, "scale_words: dtype float32"),
        (
            PAIR,
            {"scale_words": np.full((2, 3), 4096, np.uint16)},
            r"scale_words: 4096 is not in range\(4096\)",
        ),
        (PAIR, {"luts": PAIR.luts[:1]}, "luts: BOF4-NF4sS1E5M5 has 2 LUTs, not 1"),
        (PAIR, {"luts": ()}, "luts: BOF4-NF4sS1E5M5 has 2 LUTs, not 0"),
        (
            PAIR,
            {"luts": (PAIR.luts[0], some_lut(32, HIF7, 1))},
            r"luts\[1\]: .* 16 entries of HIF7, not 32 of HIF7",
        ),
        (PAIR, {"luts": (some_lut(16, HIF8, 1), PAIR.luts[1])}, r"luts\[0\]: .*not 16 of HIF8"),
        (PAIR, {"layer_exponent": 128}, "layer_exponent: 128 is not in -128..127"),
        (PAIR, {"layer_exponent": -129}, "layer_exponent: -129 is not in -128..127"),
        (
            PAIR,
            {"row_scales": np.zeros(2, np.uint16)},
            "row_scales: BOF4-NF4sS1E5M5 has no row scales",
        ),
        (PAIR, {"shape": (3, 40)}, "indices: shape"),
        (PAIR, {"shape": (2, 49)}, "indices: shape"),
        (ROWS, {"row_scales": None}, "row_scales: NF4sRUE4M4 has row scales"),
        (
            ROWS,
            {"row_scales": np.zeros(3, np.uint16)},
            r"row_scales: shape \(3,\), expected \(2,\)",
        ),
        (ROWS, {"row_scales": np.zeros(2, np.uint32)}, "row_scales: dtype uint32"),
        (LAYER, {"luts": PAIR.luts[:1]}, r"luts: E2M3\^0sUE8M0 has 0 LUTs, not 1"),
        (LAYER, {"indices": np.zeros((1, 1, 79), np.uint8)}, r"expected \(1, 1, 80\)"),
        (LAYER, {"scale_words": np.zeros((2, 1), np.uint8)}, r"expected \(1, 1\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    tensor: QuantizedTensor, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        replace(tensor, **change)


def test_ends_of_each_range_fit() -> None:
    words = np.full((2, 3), 4095, np.uint16)
    indices = np.full((2, 3, 16), 15, np.uint16)
    for exponent in (-128, 127):
        replace(PAIR, scale_words=words, indices=indices, layer_exponent=exponent)
    replace(PAIR, shape=(2, 33))
    replace(PAIR, shape=(2, 48))


@pytest.mark.parametrize(
    ("name", "part", "code", "kind"),
    [
        ("E4M3sUE4M4", "indices", 0x7F, "nan"),
        ("INT8sUE4M4", "indices", 0x80, "reserved"),
        ("INT4sUE4M4", "indices", 0x8, "reserved"),
        ("HIF8sUE4M4", "indices", 0xA1, "reserved"),
        ("E2M3sBF16", "scale_words", 0x7F80, "reserved"),
        ("NF4sRUE4M4", "row_scales", 0xFFC0, "reserved"),
    ],
)
def test_reserved_codes_are_refused(name: str, part: str, code: int, kind: str) -> None:
    """Either when the tensor is made or when it is decoded."""
    tensor = random_tensor(parse_format(name), 70, (2, 16))
    array = getattr(tensor, part).copy()
    array.flat[-1] = code
    with pytest.raises(InputError, match=f"code {code:#x} at position .* is {kind}"):
        decode(replace(tensor, **{part: array}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("exponent", "message"), [(-128, "would be subnormal"), (127, "would overflow float32")]
)
def test_values_outside_float32_are_refused(exponent: int, message: str, padded: bool) -> None:
    """One level 1 times scale 2**-3 times 2**-128, or one level 120 times 2**-3 times 2**127."""
    common, odd = (120, 1) if exponent < 0 else (1, 120)
    indices = np.full((1, 1, 16), HIF7.encode(common), np.uint8)
    indices[0, 0, 5] = HIF7.encode(odd)
    tensor = replace(
        random_tensor(parse_format("HIF7sUE4M4"), 71, (1, 16)),
        indices=indices,
        scale_words=np.full((1, 1), 0x40, np.uint16),
        layer_exponent=exponent,
    )
    with pytest.raises(InputError, match=message):
        decode(tensor, padded=padded)


def test_ends_of_the_float32_range() -> None:
    smallest, largest = 2.0**-126, float(np.finfo(np.float32).max)
    check_float32_range(smallest, largest)
    check_float32_range(math.inf, 0.0)  # nothing but zeros
    with pytest.raises(InputError, match="subnormal in float32"):
        check_float32_range(float(np.nextafter(smallest, 0)), 1.0)
    with pytest.raises(InputError, match="overflow float32"):
        check_float32_range(1.0, float(np.nextafter(largest, np.inf)))


def test_decode_does_not_change_its_input() -> None:
    tensor = random_tensor(parse_format("NF4sRUE4M4"), 72)
    kept = tensor.indices.copy(), tensor.scale_words.copy()
    decode(tensor)
    assert np.array_equal(tensor.indices, kept[0])
    assert np.array_equal(tensor.scale_words, kept[1])
