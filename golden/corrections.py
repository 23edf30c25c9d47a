"""Sparse corrections: what is added to the dense part of a quantized tensor.

``W_hat = dense + S`` with S in compressed sparse rows (CSR) and bfloat16 values. Outliers (OPQ) and
large residuals (Wr) [paper] share one S, so a position occurs at most once.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from golden.convert import round_bfloat16
from golden.errors import InputError
from golden.formats import BF16

__all__ = ["MAX_ENTRIES", "Corrections", "column_dtype", "corrected", "stored_bits"]

MAX_ENTRIES = (1 << 32) - 1
"""Most entries of one tensor: row pointers are stored as uint32."""

_POINTER_BITS = 32
_VALUE_BITS = 16


def column_dtype(columns: int) -> type[np.uint16 | np.uint32]:
    """Type of stored column numbers: uint16 for up to 65536 columns, else uint32."""
    return np.uint16 if columns <= 1 << 16 else np.uint32


def stored_bits(shape: tuple[int, int], entries: int) -> int:
    """Bits that so many entries of a (rows, columns) matrix take in a file."""
    column_bits = 8 * np.dtype(column_dtype(shape[1])).itemsize
    return _POINTER_BITS * (shape[0] + 1) + entries * (column_bits + _VALUE_BITS)


@dataclass(frozen=True, eq=False)
class Corrections:
    """A sparse matrix in CSR form that is added to a dense one.

    Parameters
    ----------
    shape : tuple of int
        (rows, columns) of the matrix, each at least 1.
    indptr : int64 array, shape (rows + 1,)
        Entries of row i are those from ``indptr[i]`` up to, not including, ``indptr[i + 1]``.
    columns : uint16 array, or uint32 if the matrix has more than 65536 columns, shape (entries,)
        Column of each entry, strictly ascending in a row, so that no position occurs twice.
    values : uint16 array, shape (entries,)
        bfloat16 bit patterns, finite. Zeros of either sign are allowed: added to a dense value,
        whose zeros are all +0, they change no bit.

    Raises
    ------
    InputError
        If the parts do not fit each other; the message names the part and the position.
    """

    shape: tuple[int, int]
    indptr: NDArray[np.int64]
    columns: NDArray[np.unsignedinteger]
    values: NDArray[np.uint16]

    def __post_init__(self) -> None:
        """Check every part."""
        rows, columns = self.shape
        if rows < 1 or columns < 1:
            raise InputError(f"shape: {self.shape} has no weights")
        _check_vector("indptr", self.indptr, np.int64)
        _check_vector("columns", self.columns, column_dtype(columns))
        _check_vector("values", self.values, np.uint16)
        self._check_indptr()
        self._check_columns()
        self._check_values()

    def _check_indptr(self) -> None:
        rows, entries = self.shape[0], len(self.values)
        if entries > MAX_ENTRIES:
            raise InputError(f"values: {entries} entries, at most {MAX_ENTRIES} can be stored")
        if len(self.indptr) != rows + 1:
            raise InputError(f"indptr: length {len(self.indptr)}, expected {rows + 1}")
        if self.indptr[0] != 0:
            raise InputError(f"indptr: starts at {self.indptr[0]}, must start at 0")
        descents = np.flatnonzero(self.indptr[1:] < self.indptr[:-1])
        if len(descents):
            row = int(descents[0])
            raise InputError(
                f"indptr: entry {row + 1} is {self.indptr[row + 1]}, less than "
                f"{self.indptr[row]} before it"
            )
        if self.indptr[-1] != entries:
            raise InputError(f"indptr: ends at {self.indptr[-1]}, but there are {entries} values")

    def _check_columns(self) -> None:
        if len(self.columns) != len(self.values):
            raise InputError(
                f"columns: length {len(self.columns)}, but there are {len(self.values)} values"
            )
        outside = np.flatnonzero(self.columns >= self.shape[1])
        if len(outside):
            raise InputError(
                f"columns: {self._entry(int(outside[0]))} is not in range({self.shape[1]})"
            )
        ascends = self.columns[1:] > self.columns[:-1]
        starts = self.indptr[1:-1]
        ascends[starts[(starts > 0) & (starts < len(self.columns))] - 1] = True
        wrong = np.flatnonzero(~ascends)
        if len(wrong):
            entry = int(wrong[0]) + 1
            raise InputError(
                f"columns: {self._entry(entry)} follows column {self.columns[entry - 1]}; columns "
                "must ascend strictly in a row"
            )

    def _check_values(self) -> None:
        infinite = np.flatnonzero(BF16.has_top_exponent(self.values))
        if len(infinite):
            entry = int(infinite[0])
            bits = int(self.values[entry])
            raise InputError(
                f"values: {self._entry(entry)} is {bits:#06x}, a bfloat16 NaN or infinity"
            )

    def _entry(self, entry: int) -> str:
        row = int(np.searchsorted(self.indptr, entry, side="right")) - 1
        return f"entry {entry} (row {row}, column {self.columns[entry]})"

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_], residuals: NDArray[np.float32]) -> "Corrections":
        """Corrections at chosen positions, rounded to bfloat16: nearest, ties to even.

        Parameters
        ----------
        mask : bool array, shape (rows, columns)
            Which positions get an entry, whatever its value. Not modified.
        residuals : float32 array, shape (rows, columns)
            ``weights - dense``; read only where the mask is set. Not modified.

        Raises
        ------
        InputError
            If the arrays do not fit each other, or a chosen residual is not finite in bfloat16.
        """
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise InputError(f"mask: must be a bool matrix, not {mask.dtype} of {mask.shape}")
        rows, columns = mask.shape
        _check_matrix("residuals", residuals, (rows, columns))
        indptr = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(mask, axis=1), out=indptr[1:])
        chosen: NDArray[np.unsignedinteger] = np.nonzero(mask)[1].astype(column_dtype(columns))
        return cls((rows, columns), indptr, chosen, round_bfloat16(residuals[mask]))

    @property
    def entries(self) -> int:
        """Number of stored entries."""
        return len(self.values)

    @property
    def stored_bits(self) -> int:
        """Bits of row pointers (uint32), columns and values as stored in a file."""
        return stored_bits(self.shape, self.entries)

    def take_rows(self, part: slice, first: int | None = None) -> "Corrections":
        """Corrections of some rows, as of a matrix of their own.

        Parameters
        ----------
        part : slice
            With ``start`` and ``stop`` in range, ``stop`` greater.
        first : int, optional
            Only so many of each row, in the order of their columns.
        """
        starts = self.indptr[part]
        counts = self.indptr[part.start + 1 : part.stop + 1] - starts
        if first is not None:
            counts = np.minimum(counts, first)
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        entries = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], counts)
        shape = part.stop - part.start, self.shape[1]
        return Corrections(shape, indptr, self.columns[entries], self.values[entries])

    def add_to(self, dense: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sum of a dense matrix and the corrections.

        Each entry is one float32 addition, rounded to nearest, ties to even; subnormal sums are
        kept. Weights without an entry are copied.

        Parameters
        ----------
        dense : float32 array, shape (rows, columns)
            Not modified.

        Returns
        -------
        corrected : float32 array, shape (rows, columns)

        Raises
        ------
        InputError
            If ``dense`` is not of that shape and type, or a sum overflows float32.
        """
        _check_matrix("dense", dense, self.shape)
        corrected = np.array(dense, order="C")
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))
        with np.errstate(over="ignore"):
            sums = corrected[rows, self.columns] + _bfloat16_values(self.values)
        overflow = np.flatnonzero(~np.isfinite(sums))
        if len(overflow):
            raise InputError(f"values: the sum at {self._entry(int(overflow[0]))} is not finite")
        corrected[rows, self.columns] = sums
        return corrected


def corrected(dense: NDArray[np.float32], corrections: Corrections | None) -> NDArray[np.float32]:
    """Dense weights plus their corrections, where there are any.

    Parameters
    ----------
    dense : float32 array, shape (rows, columns), or (rows, more) with padding, which is kept
        Not modified.
    corrections : Corrections or None

    Returns
    -------
    weights : float32 array, of the shape of ``dense``
        ``dense`` itself without corrections.

    Raises
    ------
    InputError
        As :meth:`Corrections.add_to`.
    """
    if corrections is None:
        return dense
    columns = corrections.shape[1]
    sums = corrections.add_to(dense[:, :columns])
    return sums if dense.shape[1] == columns else np.hstack([sums, dense[:, columns:]])


def _bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


def _check_vector(name: str, array: NDArray[np.integer], dtype: type[np.integer]) -> None:
    if array.ndim != 1 or array.dtype != dtype:
        expected = np.dtype(dtype)
        raise InputError(f"{name}: {array.dtype} of shape {array.shape}, expected 1-D {expected}")


def _check_matrix(name: str, array: NDArray[np.float32], shape: tuple[int, int]) -> None:
    if array.shape != shape or array.dtype != np.float32:
        raise InputError(f"{name}: {array.dtype} of shape {array.shape}, expected float32, {shape}")
