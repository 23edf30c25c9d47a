"""Sparse corrections against plain loops over rows and scalar arithmetic."""

import struct
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import golden.corrections
from golden.corrections import Corrections, corrected
from golden.errors import InputError

Float32 = NDArray[np.float32]


def float32_of(bits: int) -> float:
    """Value of a bfloat16 bit pattern: the upper half of a float32."""
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def nearest_bfloat16(value: float) -> int:
    """Bit pattern by exact search: nearest, ties to the even pattern."""
    sign = 0x8000 if np.signbit(np.float32(value)) else 0
    low = struct.unpack("<I", struct.pack("<f", abs(value)))[0] >> 16
    distances = [abs(Fraction(float32_of(low + k)) - Fraction(abs(value))) for k in (0, 1)]
    if distances[0] == distances[1]:
        return sign | low + low % 2
    return sign | low + int(distances[1] < distances[0])


def random_case(
    rows: int, columns: int, seed: int, density: float = 0.3
) -> tuple[NDArray[np.bool_], Float32, Float32]:
    rng = np.random.default_rng(seed)
    residuals = rng.standard_normal((rows, columns)).astype(np.float32)
    dense = rng.standard_normal((rows, columns)).astype(np.float32)
    return rng.random((rows, columns)) < density, residuals, dense


SHAPES = [(1, 1), (1, 9), (9, 1), (6, 40), (3, 257)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [1])
def test_csr_lists_the_masked_positions_row_by_row(
    shape: tuple[int, int], density: float, seed: int
) -> None:
    mask, residuals, _ = random_case(*shape, seed, density)
    kept = mask.copy(), residuals.copy()
    made = Corrections.from_mask(mask, residuals)
    expected = [
        [(k, nearest_bfloat16(float(residuals[row, k]))) for k in range(shape[1]) if mask[row, k]]
        for row in range(shape[0])
    ]
    assert made.shape == shape
    assert made.entries == int(mask.sum())
    starts = made.indptr.tolist()
    pairs = list(zip(made.columns.tolist(), made.values.tolist(), strict=True))
    assert [pairs[a:b] for a, b in pairwise(starts)] == expected
    assert np.array_equal(mask, kept[0])
    assert np.array_equal(residuals, kept[1])


@pytest.mark.parametrize("seed", [2])
def test_memory_layout_changes_nothing(seed: int) -> None:
    mask, residuals, dense = random_case(5, 33, seed)
    whole = Corrections.from_mask(mask, residuals)
    other = Corrections.from_mask(np.asfortranarray(mask), np.asfortranarray(residuals))
    for part in ("indptr", "columns", "values"):
        assert np.array_equal(getattr(whole, part), getattr(other, part))
    assert np.array_equal(whole.add_to(dense), whole.add_to(np.asfortranarray(dense)))


@settings(max_examples=300, deadline=None)
@given(
    dense=st.floats(width=32, allow_nan=False, allow_infinity=False),
    residual=st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126),
)
def test_the_sum_is_one_float32_addition(dense: float, residual: float) -> None:
    """No float32 neighbour of the result is nearer to the exact sum, and a tie is even."""
    made = Corrections.from_mask(np.array([[True]]), np.array([[residual]], np.float32))
    value = Fraction(float32_of(int(made.values[0])))
    exact = Fraction(dense) + value
    if abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        with pytest.raises(InputError, match="not finite"):
            made.add_to(np.array([[dense]], np.float32))
        return
    result = made.add_to(np.array([[dense]], np.float32))[0, 0]
    error = abs(Fraction(float(result)) - exact)
    for end in (-np.inf, np.inf):
        with np.errstate(all="ignore"):
            neighbour = np.nextafter(result, np.float32(end))
        if np.isfinite(neighbour):
            distance = abs(Fraction(float(neighbour)) - exact)
            even = not int(result.view(np.uint32)) & 1
            assert error < distance or (error == distance and even)


@pytest.mark.parametrize("seed", [3])
def test_only_chosen_weights_change_and_inputs_stay_as_they_are(seed: int) -> None:
    mask, residuals, dense = random_case(6, 40, seed)
    kept = dense.copy()
    corrected = Corrections.from_mask(mask, residuals).add_to(dense)
    assert corrected.dtype == np.float32
    assert np.array_equal(dense, kept)
    assert not np.shares_memory(corrected, dense)
    assert np.array_equal(corrected[~mask], dense[~mask])
    for row, column in np.argwhere(mask):
        bits = nearest_bfloat16(float(residuals[row, column]))
        expected = np.float32(dense[row, column]) + np.float32(float32_of(bits))
        assert corrected[row, column] == expected


def test_zeros_of_either_sign_keep_every_bit() -> None:
    """Also +0 + -0 is +0."""
    residuals = np.array([[-0.0, 0.0, -0.0]], np.float32)
    made = Corrections.from_mask(np.ones((1, 3), np.bool_), residuals)
    assert made.values.tolist() == [0x8000, 0, 0x8000]
    dense = np.array([[0.0, -1.5, 2.0**-126]], np.float32)
    assert made.add_to(dense).tobytes() == dense.tobytes()


def test_subnormal_sums_are_kept() -> None:
    residuals = np.array([[-(2.0**-126)]], np.float32)
    made = Corrections.from_mask(np.array([[True]]), residuals)
    assert made.add_to(np.array([[1.5 * 2.0**-126]], np.float32))[0, 0] == 2.0**-127


@pytest.mark.parametrize(
    ("columns", "dtype", "bits"), [(65536, np.uint16, 16), (65537, np.uint32, 32)]
)
def test_columns_are_wide_enough_and_counted(columns: int, dtype: type, bits: int) -> None:
    mask = np.zeros((2, columns), np.bool_)
    mask[1, [0, columns - 1]] = True
    made = Corrections.from_mask(mask, mask.astype(np.float32))
    assert made.columns.dtype == dtype
    assert made.columns.tolist() == [0, columns - 1]
    assert made.stored_bits == 3 * 32 + 2 * (bits + 16)
    assert made.add_to(np.zeros((2, columns), np.float32))[1, columns - 1] == 1.0


def test_an_empty_one_is_valid_and_changes_nothing() -> None:
    made = Corrections.from_mask(np.zeros((3, 4), np.bool_), np.full((3, 4), np.nan, np.float32))
    assert made.stored_bits == 4 * 32
    dense = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(made.add_to(dense), dense)


# ---------------------------------------------------------------------------------------- errors


def parts(**changes: object) -> dict[str, Any]:
    """A valid 4 x 10 matrix with five entries, with some parts replaced."""
    valid = {
        "shape": (4, 10),
        "indptr": np.array([0, 2, 2, 4, 5], np.int64),
        "columns": np.array([3, 7, 2, 9, 2], np.uint16),
        "values": np.array([0x3F80, 0xBF80, 0, 0x8000, 0x7F7F], np.uint16),
    }
    return valid | changes


def array(values: list[int], dtype: type = np.uint16) -> NDArray[Any]:
    return np.array(values, dtype)


BAD_PARTS: list[tuple[dict[str, Any], str]] = [
    ({"shape": (0, 10)}, "shape: .* has no weights"),
    ({"shape": (4, 0)}, "shape: .* has no weights"),
    ({"shape": (4, 65537)}, "columns: uint16 of shape .*expected 1-D uint32"),
    ({"indptr": array([0, 2, 2, 4, 5], np.int32)}, "indptr: int32"),
    ({"indptr": array([0, 2, 2, 5], np.int64)}, "indptr: length 4, expected 5"),
    ({"indptr": array([1, 2, 2, 4, 5], np.int64)}, "indptr: starts at 1"),
    ({"indptr": array([0, 2, 1, 4, 5], np.int64)}, "indptr: entry 2 is 1, less than 2"),
    ({"indptr": array([0, 9, 2, 4, 5], np.int64)}, "indptr: entry 2 is 2, less than 9"),
    ({"indptr": array([0, -1, 2, 4, 5], np.int64)}, "indptr: entry 1 is -1, less than 0"),
    ({"indptr": array([0, 2, 2, 4, 4], np.int64)}, "indptr: ends at 4, but there are 5 values"),
    ({"indptr": array([0, 2, 2, 4, 6], np.int64)}, "indptr: ends at 6, but there are 5 values"),
    ({"columns": array([3, 7, 2, 9])}, "columns: length 4, but there are 5 values"),
    ({"columns": array([3, 7, 2, 9, 2], np.uint32)}, "columns: uint32"),
    ({"columns": array([3, 7, 2, 9, 2]).reshape(5, 1)}, r"columns: uint16 of shape \(5, 1\)"),
    ({"columns": array([3, 7, 2, 10, 2])}, r"entry 3 \(row 2, column 10\) is not in range\(10\)"),
    ({"columns": array([3, 3, 2, 9, 2])}, r"entry 1 \(row 0, column 3\) follows column 3"),
    ({"columns": array([3, 7, 9, 2, 2])}, r"entry 3 \(row 2, column 2\) follows column 9"),
    ({"values": array([0, 0, 0x7F80, 0, 0])}, r"entry 2 \(row 2, column 2\) is 0x7f80"),
    ({"values": array([0, 0, 0, 0, 0xFFC0])}, r"entry 4 \(row 3, column 2\) is 0xffc0"),
    ({"values": array([0, 0, 0, 0, 0], np.uint8)}, "values: uint8"),
]


def test_the_valid_parts_are_valid() -> None:
    """With an empty row inside, and columns that restart lower at row borders."""
    assert Corrections(**parts()).entries == 5


@pytest.mark.parametrize(("changes", "message"), BAD_PARTS)
def test_parts_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Corrections(**parts(**changes))


@pytest.mark.parametrize("rows", [(0, 0, 0, 3), (0, 3, 3, 3), (0, 0, 3, 3)])
def test_empty_first_and_last_rows_do_not_hide_a_repeated_column(rows: tuple[int, ...]) -> None:
    indptr, values = array(list(rows), np.int64), array([0, 0, 0])
    Corrections((3, 10), indptr, array([1, 2, 3]), values)
    with pytest.raises(InputError, match="follows column 2"):
        Corrections((3, 10), indptr, array([1, 2, 2]), values)


def test_more_entries_than_uint32_pointers_reach_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(golden.corrections, "MAX_ENTRIES", 4)
    with pytest.raises(InputError, match="values: 5 entries, at most 4"):
        Corrections(**parts())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, float(np.finfo(np.float32).max)])
def test_residuals_that_bfloat16_cannot_hold_are_named(bad: float) -> None:
    """The largest float32 rounds up to infinity."""
    residuals = np.zeros((2, 3), np.float32)
    residuals[1, 2] = bad
    with pytest.raises(InputError, match=r"entry 5 \(row 1, column 2\)"):
        Corrections.from_mask(np.ones((2, 3), np.bool_), residuals)


def doubles(*shape: int) -> Any:
    """Ones of a type that the calls below must refuse, and the type checker would."""
    return np.ones(shape)


BAD_CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: Corrections.from_mask(np.ones(3, np.bool_), np.ones(3, np.float32)), "mask: must be"),
    (lambda: Corrections.from_mask(np.ones((1, 3), np.uint8), np.ones((1, 3), np.float32)),
     "mask: must be"),
    (lambda: Corrections.from_mask(np.ones((1, 3), np.bool_), np.ones((3, 1), np.float32)),
     "residuals: float32 of shape"),
    (lambda: Corrections.from_mask(np.ones((1, 3), np.bool_), doubles(1, 3)),
     "residuals: float64"),
    (lambda: Corrections(**parts()).add_to(np.ones((4, 9), np.float32)), "dense: float32 of shape"),
    (lambda: Corrections(**parts()).add_to(doubles(4, 10)), "dense: float64"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_arrays_of_the_wrong_kind_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_sums_that_overflow_are_named() -> None:
    dense = np.zeros((4, 10), np.float32)
    dense[3, 2] = np.finfo(np.float32).max
    with pytest.raises(InputError, match=r"entry 4 \(row 3, column 2\) is not finite"):
        Corrections(**parts()).add_to(dense)


def test_corrected_weights_keep_padding_and_what_has_no_corrections() -> None:
    dense = np.arange(10, dtype=np.float32).reshape(2, 5)
    mask = np.array([[False, True, False], [False, False, True]])
    corrections = Corrections.from_mask(mask, np.full((2, 3), 0.5, np.float32))
    expected = [[0, 1.5, 2, 3, 4], [5, 6, 7.5, 8, 9]]
    assert corrected(dense, None) is dense
    assert corrected(dense, corrections).tolist() == expected
    assert corrected(dense[:, :3], corrections).tolist() == [row[:3] for row in expected]
    assert dense.tolist() == np.arange(10).reshape(2, 5).tolist()


def test_rows_of_a_matrix_of_their_own() -> None:
    mask = np.random.default_rng(5).random((6, 11)) < 0.4
    whole = Corrections.from_mask(mask, np.arange(66, dtype=np.float32).reshape(6, 11))
    part = Corrections.from_mask(mask[2:5], np.arange(66, dtype=np.float32).reshape(6, 11)[2:5])
    taken = whole.take_rows(slice(2, 5))
    for name in ("shape", "indptr", "columns", "values"):
        assert np.array_equal(getattr(taken, name), getattr(part, name))
    first = mask[2:5] & (np.cumsum(mask[2:5], axis=1) <= 2)
    taken = whole.take_rows(slice(2, 5), 2)
    assert taken.columns.tolist() == np.nonzero(first)[1].tolist()
    assert np.diff(taken.indptr).tolist() == first.sum(axis=1).tolist()
