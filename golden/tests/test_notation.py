"""Format names: what they mean, how many bits they store, and which cannot exist."""

from fractions import Fraction

import numpy as np
import pytest

from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.errors import InputError
from golden.formats import ATOMS, BF16, HIF7, HIF8, HIF8T, UE8M0, scale_format
from golden.notation import (
    DEFAULT_BLOCK_SIZE,
    TRAINED_CODEBOOKS,
    ScaleWord,
    is_user_codebook,
    parse_format,
)
from golden.tensor import QuantizedTensor

# Name, canonical spelling, bits per weight, scale word bits, index bits, block size. Bits per
# weight are index bits + word bits / block size by hand; the first nine rows
# are examples of the paper's notation.
TABLE = [
    ("E2M3sUE4M4", "E2M3sUE4M4", 6.5, 8, 6, 16),
    ("E2M3^32sUE8M0", "E2M3^32sUE8M0", 6.25, 8, 6, 32),
    ("E4M3^0sUE8M0", "E4M3^0sUE8M0", 8.0, 8, 8, 0),
    ("NF4-DD4sS1E5M5", "NF4-DD4sS1E5M5", 4.75, 12, 4, 16),
    ("NF4sUE4M4", "NF4sUE4M4", 4.5, 8, 4, 16),
    ("DD6sS1E4M3", "DD6sS1E4M3", 6.5, 8, 6, 16),
    ("HIF7sUE4M4", "HIF7sUE4M4", 7.5, 8, 7, 16),
    ("BOF4-NF4sUE4M3", "BOF4-NF4sUE4M3", 4.5, 8, 4, 16),
    ("NF4-DD4sRS1E2M4", "NF4-DD4sRS1E2M4", 4.5, 8, 4, 16),
    ("E2M3^16sUE4M4", "E2M3sUE4M4", 6.5, 8, 6, 16),
    ("NF4-DD4^16sS1E5M5", "NF4-DD4sS1E5M5", 4.75, 12, 4, 16),
    ("NF4^016sRUE4M4", "NF4sRUE4M4", 4.5, 8, 4, 16),
    ("E2M3^0032sUE8M0", "E2M3^32sUE8M0", 6.25, 8, 6, 32),
    ("E2M1^32sUE8M0", "E2M1^32sUE8M0", 4.25, 8, 4, 32),
    ("E3M4^64sBF16", "E3M4^64sBF16", 8.25, 16, 8, 64),
    ("E4M5^8sUE5M7", "E4M5^8sUE5M7", 11.5, 12, 10, 8),
    ("E5M6sS1E4M3", "E5M6sS1E4M3", 12.5, 8, 12, 16),
    ("INT4^64sBF16", "INT4^64sBF16", 4.25, 16, 4, 64),
    ("INT8^0sUE8M0", "INT8^0sUE8M0", 8.0, 8, 8, 0),
    ("HIF8^8sUE4M4", "HIF8^8sUE4M4", 9.0, 8, 8, 8),
    ("HIF8TsUE4M4", "HIF8TsUE4M4", 8.5, 8, 8, 16),
    ("Split87-SH4^8sS1E4M3", "Split87-SH4^8sS1E4M3", 5.125, 9, 4, 8),
    ("DD4-DD4sS1E5M5", "DD4-DD4sS1E5M5", 4.75, 12, 4, 16),
    ("DD5-DD5^32sUE4M3", "DD5-DD5^32sUE4M3", 5.25, 8, 5, 32),
    ("DD6-DD6^64sRS1E7M7", "DD6-DD6^64sRS1E7M7", 6.25, 16, 6, 64),
    ("NF4sBF16", "NF4sBF16", 5.0, 16, 4, 16),
    ("NF4sRBF16", "NF4sRBF16", 5.0, 16, 4, 16),
    # The last "s" is the one before the scale.
    ("siss-miss^8sUE4M4", "siss-miss^8sUE4M4", 5.125, 9, 4, 8),
    ("ssss1-NF4sRS1E2M4", "ssss1-NF4sRS1E2M4", 4.5, 8, 4, 16),
    (f"{'s' * 24}-{'t' * 24}^64sRS1E7M7", f"{'s' * 24}-{'t' * 24}^64sRS1E7M7", 4.25, 16, 4, 64),
]


@pytest.mark.parametrize(
    ("name", "canonical", "bits", "word", "index", "block"), TABLE, ids=[row[0] for row in TABLE]
)
def test_names_mean_what_the_paper_says(
    name: str, canonical: str, bits: float, word: int, index: int, block: int
) -> None:
    fmt = parse_format(name)
    assert fmt.name == canonical
    assert fmt.bits_per_weight == Fraction(bits)
    assert fmt.word.width == word
    assert fmt.index_bits == index
    assert fmt.block_size == block
    assert parse_format(fmt.name) == fmt


def test_parts_of_an_atom_format() -> None:
    fmt = parse_format("E2M3^32sUE8M0", HIF8)
    assert fmt.atom is ATOMS["E2M3"]
    assert fmt.codebooks == ()
    assert fmt.lut_entries == 0
    assert fmt.word == ScaleWord(UE8M0, 0)
    assert not fmt.row_scale


def test_parts_of_a_pair_format() -> None:
    fmt = parse_format("NF4-DD4sRS1E2M4", HIF8)
    assert fmt.atom is None
    assert fmt.codebooks == ("NF4", "DD4")
    assert fmt.lut_entries == 16
    assert fmt.hif is HIF8
    assert fmt.word == ScaleWord(scale_format("S1E2M4"), 1)
    assert fmt.row_scale
    assert parse_format("NF4-DD4sRS1E2M4").hif is HIF7


def test_scale_word_fields_from_the_lowest_bit() -> None:
    """From the top bit down: metabit, sign, exponent, mantissa."""
    word = parse_format("NF4-DD4sS1E5M5").word
    assert word.fields == (("mantissa", 5), ("exponent", 5), ("sign", 1), ("metabit", 1))
    assert word.width == 12
    assert parse_format("NF4sUE4M4").word.fields == (("mantissa", 4), ("exponent", 4))
    assert parse_format("NF4sBF16").word.scale is BF16


@pytest.mark.parametrize("name", ["BOF4-NF4sS1E5M5", "DD6sUE4M4"])
def test_scale_words_are_split_as_they_were_joined(name: str) -> None:
    """All scale words of a format, as integers and as an array."""
    word = parse_format(name).word
    scales, metabits = 1 << word.scale.width, 1 << word.metabit_bits
    pairs = [(scale, metabit) for metabit in range(metabits) for scale in range(scales)]
    words = [word.join(*pair) for pair in pairs]
    assert words == list(range(1 << word.width))
    assert [(word.scale_code(one), word.metabit(one)) for one in words] == pairs
    codes, bits = (np.array(part, np.uint16) for part in zip(*pairs, strict=True))
    joined = word.join(codes, bits)
    assert joined.dtype == np.uint16
    assert joined.tolist() == words
    assert word.scale_code(joined).tolist() == codes.tolist()
    assert word.metabit(joined).tolist() == bits.tolist()


@pytest.mark.parametrize(
    ("name", "stored"),
    [("E2M3sUE4M4", (3, 3, 16)), ("NF4^8sUE4M4", (3, 5, 8)), ("E4M3^0sUE8M0", (1, 1, 99))],
)
def test_blocks_of_a_matrix(name: str, stored: tuple[int, int, int]) -> None:
    assert parse_format(name).block_shape(3, 33) == stored


def test_lower_case_names_are_codebooks_of_the_user() -> None:
    fmt = parse_format("mine-NF4sS1E5M5")
    assert fmt.codebooks == ("mine", "NF4")
    assert (fmt.index_bits, fmt.lut_entries) == (4, 16)
    assert [is_user_codebook(name) for name in ("mine", "m2", "2m", "Mine", "m-e", "")] == [
        True, True, False, False, False, False
    ]  # fmt: skip


def test_the_same_format_with_other_codebooks() -> None:
    fmt = parse_format("DD4-DD4^32sRS1E2M4", HIF8T)
    other = fmt.with_codebooks(("BOF4T", "mine"))
    assert other == parse_format("BOF4T-mine^32sRS1E2M4", HIF8T)


def test_defaults() -> None:
    assert DEFAULT_BLOCK_SIZE == 16
    assert TRAINED_CODEBOOKS == {"DD4": 4, "DD5": 5, "DD6": 6}
    assert [parse_format(f"{name}sUE4M4").lut_entries for name in ("DD4", "DD5", "DD6")] == [
        16,
        32,
        64,
    ]


def empty_tensor(name: str, rows: int, columns: int) -> QuantizedTensor:
    """Planes of zeros of the right size, made from the rules of the format."""
    fmt = parse_format(name, HIF8T)
    grid = (rows, -(-columns // fmt.block_size)) if fmt.block_size else (1, 1)
    size = fmt.block_size or rows * columns
    # The entries in the middle of the grid, so that they lie on both sides of zero.
    middle = list(HIF8T.canonical.values())[80 - fmt.lut_entries // 2 :][: fmt.lut_entries]
    trained = Lut(HIF8T, tuple(middle)) if fmt.codebooks else None
    luts = [
        fixed_lut(book, fmt.block_size, HIF8T) if book in FIXED_CODEBOOKS else trained
        for book in fmt.codebooks
    ]
    return QuantizedTensor(
        fmt, (rows, columns),
        np.zeros((*grid, size), np.uint16), np.zeros(grid, np.uint16),
        tuple(lut for lut in luts if lut is not None), 0,
        np.zeros(rows, np.uint16) if fmt.row_scale else None,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (5, 64), (7, 17)], ids=str)
@pytest.mark.parametrize("name", [row[1] for row in TABLE[:12] + TABLE[15:16] + TABLE[20:25]])
def test_stored_bits_are_the_bytes_of_the_planes(name: str, shape: tuple[int, int]) -> None:
    """Every LUT entry takes a byte and every row scale two."""
    tensor = empty_tensor(name, *shape)
    stored = tensor.index_plane.nbytes + tensor.scale_plane.nbytes
    stored += sum(len(lut.codes) for lut in tensor.luts)
    stored += tensor.row_scales.nbytes if tensor.row_scales is not None else 0
    assert tensor.format.stored_bits(*shape) == 8 * stored


def test_stored_bits_by_hand() -> None:
    # 2 rows of 3 blocks: 96 indices of 4 bits, 6 words of 12 bits, 2 LUTs of 16 bytes.
    assert parse_format("NF4-DD4sS1E5M5").stored_bits(2, 40) == 384 + 72 + 256
    # 1 row, 1 block of 8: 8 x 10 bits, one 12-bit word in two bytes.
    assert parse_format("E4M5^8sUE5M7").stored_bits(1, 3) == 80 + 16
    # 4 x 5 codes, one scale word.
    assert parse_format("E4M3^0sUE8M0").stored_bits(4, 5) == 160 + 8
    # 18 bits of codes and 11 of the scale each end in a byte of their own.
    assert parse_format("E2M3^0sS1E5M5").stored_bits(1, 3) == 24 + 16
    # 2 rows of 16: 32 x 4 bits, 2 words of 8, one LUT of 16 bytes, 2 row scales.
    assert parse_format("NF4sRUE4M4").stored_bits(2, 16) == 128 + 16 + 128 + 32


def test_large_tensors_approach_the_bits_per_weight() -> None:
    for name in ("NF4-DD4sS1E5M5", "E2M3^32sUE8M0", "E4M3^0sUE8M0"):
        fmt = parse_format(name)
        stored = Fraction(fmt.stored_bits(4096, 4096), 4096**2)
        assert fmt.bits_per_weight <= stored < fmt.bits_per_weight + Fraction(1, 1000)


IMPOSSIBLE = [
    (f"{'s' * 25}sUE4M4", f"unknown element '{'s' * 25}'"),
    ("", "is not of the form"),
    ("E2M3", "is not of the form"),
    ("E2M3sue4m4", "is not of the form"),
    ("E2M3 sUE4M4", "is not of the form"),
    ("E2M3sUE4M4 ", "is not of the form"),
    ("E2M3sUE4M4\n", "is not of the form"),
    ("E2M3^sUE4M4", "is not of the form"),
    ("E2M3^-8sUE4M4", "is not of the form"),
    ("E2M3^16^16sUE4M4", "is not of the form"),
    ("E2M3^12345sUE4M4", "is not of the form"),
    ("E2M3^1\u0666sUE4M4", "is not of the form"),
    ("sUE4M4", "is not of the form"),
    ("E2M3rUE4M4", "is not of the form"),
    ("E9M9sUE4M4", "unknown element 'E9M9'; atoms are E2M1, .*; codebooks are NF4"),
    ("Nf4sUE4M4", "unknown element 'Nf4'"),
    ("my-codebook-NF4sUE4M4", "3 codebooks, but a metabit picks one of two"),
    ("mine-DD5sUE4M4", "both codebooks of a pair must have the same index width"),
    ("NF4-sUE4M3", "unknown element ''"),
    ("-NF4sUE4M3", "unknown element ''"),
    ("NF4-XX4sUE4M3", "unknown element 'XX4'"),
    ("NF4-E2M1sUE4M3", "atom E2M1 cannot be part of a codebook pair"),
    ("HIF7-DD6sUE4M3", "atom HIF7 cannot be part of a codebook pair"),
    ("NF4-BOF4-SH4sUE4M3", "3 codebooks, but a metabit picks one of two"),
    ("NF4-DD5sUE4M3", "must have the same index width"),
    ("DD5-DD6sUE4M3", "must have the same index width"),
    ("NF4-NF4sUE4M3", "a pair of one codebook with itself"),
    ("E2M3^4sUE4M4", "block size 4, must be one of 0, 8, 16, 32, 64"),
    ("E2M3^24sUE4M4", "block size 24, must be"),
    ("E2M3^128sUE4M4", "block size 128, must be"),
    ("NF4^0sUE4M4", "block size 0, must be one of 8, 16, 32, 64"),
    ("NF4-DD4^0sUE4M3", "block size 0, must be one of 8, 16, 32, 64"),
    ("E2M3sE4M4", "unknown scale format 'E4M4'"),
    ("E2M3sUE4", "unknown scale format 'UE4'"),
    ("E2M3sFP32", "unknown scale format 'FP32'"),
    ("E2M3sUE1M4", "'UE1M4': exponent of 1 bits, must be 2 to 8"),
    ("E2M3sUE9M0", "'UE9M0': exponent of 9 bits, must be 2 to 8"),
    ("E2M3sUE4M8", "'UE4M8': mantissa of 8 bits, at most 7"),
    ("E2M3sUE8M2", "'UE8M2': 8-bit exponents exist only as UE8M0 and BF16"),
    ("NF4-DD4sBF16", "a scale word of 17 bits, at most 16"),
    ("E2M3sRUE4M4", "row scales exist for codebook formats only"),
    ("NF4sRRUE4M4", "unknown scale format 'RUE4M4'"),
    ("E2M3sUE04M4", "UE04M4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message"), IMPOSSIBLE, ids=[repr(row[0]) for row in IMPOSSIBLE])
def test_impossible_names_are_refused_with_the_part_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_format(name)
    assert repr(name) in str(caught.value)


def test_the_form_error_shows_examples() -> None:
    with pytest.raises(InputError, match="such as E2M3sUE4M4 or BOF4-NF4sS1E5M5"):
        parse_format("?")


def test_widest_scale_word_is_accepted() -> None:
    assert parse_format("NF4-DD4sS1E7M7").word.width == 16


def test_a_pair_of_one_trained_codebook_is_two_luts() -> None:
    assert parse_format("DD4-DD4sS1E5M5").codebooks == ("DD4", "DD4")
