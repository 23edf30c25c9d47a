"""The scaled outer product itself: a quantized tensor times quantized activations, bit for bit.

For output row n and token m, blocks b in ascending order along the input channels:

    P_b = sum over the block of w_int * x_int        integers, exact
    S_b = weight scale * activation scale            exact
    T_b = RNE32(P_b * S_b)
    acc = RNE32(acc + T_b), from +0
    y   = RNE32(acc * row scale)                     where the format has row scales
    y   = RNE32(y + RNE32(v * x))                    each correction v of the row, columns ascending

RNE32 rounds to float32: nearest, ties to even, subnormals kept. An infinite accumulator or output
stays infinite: nothing is added to it, and a row scale only gives it its sign. docs/kernel.md says
the same for readers in any language.

How it is computed here: all products of a block are integers times one and the same power of two,
so a float64 matrix product of *scaled* weights and activations is exact in any order of addition,
whatever BLAS does, as long as the integers stay below 2**53 (:func:`_product_bits`). One rounding
to float32 then gives T_b. Where they do not stay below (12-bit atoms), P_b is put together from two
products and rounded to odd first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.activations import ActivationFormat, QuantizedActivations, decode_activations
from golden.convert import decode_array, round_bfloat16
from golden.corrections import Corrections
from golden.errors import InputError
from golden.exact_sum import ExactSum, round_to_odd
from golden.formats import BF16, FloatFormat, NumberFormat
from golden.notation import DEFAULT_BLOCK_SIZE, QuantFormat
from golden.tensor import QuantizedTensor, decode_elements, decode_scales, take_rows

__all__ = [
    "OUTPUTS",
    "KernelOutput",
    "accumulate",
    "finish",
    "kernel_block_size",
    "matmul",
    "unit_exponent",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

OUTPUTS = ("float32", "bfloat16")

_FLOAT64_BITS = 53
_LOW_BITS = 19  # of a weight that is split in two

# Tokens, and rows times block elements, of what is multiplied at a time: sums and products stay in
# the second-level cache, and a BLAS does not start threads for so little (OpenBLAS: up to 2**18).
_TILE_TOKENS = 64
_TILE_WEIGHTS = 4096


@dataclass(frozen=True, eq=False)
class KernelOutput:
    """Result of :func:`matmul`.

    Attributes
    ----------
    bits : uint32 (float32) or uint16 (bfloat16) array, shape (tokens, rows)
        Bit patterns.
    overflow : bool array, shape (tokens, rows)
        Where a step gave an infinity, which then stayed.
    """

    bits: NDArray[np.unsignedinteger]
    overflow: NDArray[np.bool_]

    @property
    def values(self) -> Float32:
        """The outputs as float32 numbers, shape (tokens, rows)."""
        if self.bits.dtype == np.uint32:
            return self.bits.view(np.float32)
        return (self.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def unit_exponent(fmt: NumberFormat) -> int:
    """Exponent u with which every value of an element format is an integer times ``2**u``."""
    return fmt.min_exponent if isinstance(fmt, FloatFormat) else 0


def _largest_integer(fmt: NumberFormat) -> int:
    """Largest magnitude of a format in its unit."""
    return int(max(fmt.max_value, -fmt.min_value) / 2 ** unit_exponent(fmt))


def _element(fmt: QuantFormat) -> NumberFormat:
    return fmt.hif if fmt.atom is None else fmt.atom


def kernel_block_size(
    weights: QuantFormat, activations: ActivationFormat, block_size: int | None = None
) -> int:
    """Input channels between two roundings: the block of the weights.

    Weights with one scale for the whole layer have no block of their own. Theirs is ``block_size``,
    by default that of the activations, or 16 where those have one scale a token.

    Raises
    ------
    InputError
        If ``block_size`` is not that of the weights, or blocks of activations are not whole blocks.
    """
    size = weights.block_size
    if block_size is not None and block_size < 1:
        raise InputError(f"block size {block_size}: must be at least 1")
    if block_size is not None and size not in (0, block_size):
        raise InputError(f"block size {block_size}: {weights.name} has blocks of {size}")
    if not size:
        size = block_size or activations.block_size or DEFAULT_BLOCK_SIZE
    if activations.block_size % size:
        raise InputError(
            f"activations {activations.name}: blocks of {activations.block_size} channels are not "
            f"whole blocks of {size} of the weights"
        )
    return size


def _product_bits(weights: QuantFormat, activations: ActivationFormat, size: int) -> int:
    """Bits of the largest P_b times both scales' significands: 44 for HIF8, INT8, BF16, g = 64."""
    largest = size * _largest_integer(_element(weights)) * _largest_integer(activations.element)
    for scale in (weights.word.scale, activations.scale):
        largest *= (2 << scale.mantissa_bits) - 1
    return largest.bit_length()


def _cut(values: Float64, size: int) -> Float64:
    """Columns in zero-padded blocks: (rows, columns) to (rows, blocks, size)."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % size)))
    return padded.reshape(len(values), -1, size)


@dataclass(frozen=True, eq=False)
class _Operand:
    """One of the two matrices in blocks along K, vectors being rows of weights or tokens.

    Attributes
    ----------
    integers : float64 array, shape (vectors, blocks, block elements)
        Elements in units of their format; 0 in padding of activations.
    scales : float64 array, shape (vectors, blocks)
        Real scales times the unit.
    scale : FloatFormat
    """

    integers: Float64
    scales: Float64
    scale: FloatFormat

    @property
    def scaled(self) -> Float64:
        """Exact values, shape (vectors, blocks, block elements)."""
        return self.integers * self.scales[..., None]

    @property
    def block_limits(self) -> Float64:
        """For each block the largest magnitude of a value in it, shape (blocks,)."""
        largest = np.abs(self.integers).max(axis=2) * np.abs(self.scales)
        return largest.max(axis=0)

    @property
    def lowest_bit(self) -> int:
        """Exponent of a power of two that all values are multiples of."""
        magnitudes = np.abs(self.scales[self.scales != 0])
        if not magnitudes.size:
            return 0
        return int(np.frexp(magnitudes.min())[1]) - 1 - self.scale.mantissa_bits

    def take(self, vectors: slice) -> "_Operand":
        """Some of the vectors."""
        return _Operand(self.integers[vectors], self.scales[vectors], self.scale)


def _weight_operand(tensor: QuantizedTensor, size: int) -> _Operand:
    rows, columns = tensor.shape
    unit = unit_exponent(_element(tensor.format))
    elements = np.ldexp(decode_elements(tensor), -unit).reshape(rows, -1)[:, :columns]
    integers = _cut(elements, size)
    scales = np.ldexp(decode_scales(tensor), unit)
    scales = np.broadcast_to(scales, integers.shape[:2])
    return _Operand(integers, scales, tensor.format.word.scale)


def _activation_operand(activations: QuantizedActivations, size: int) -> _Operand:
    fmt, (tokens, channels) = activations.format, activations.shape
    unit = unit_exponent(fmt.element)
    codes = activations.elements.reshape(tokens, -1)[:, :channels]
    integers = _cut(np.ldexp(decode_array(codes, fmt.element), -unit), size)
    blocks = integers.shape[1]
    repeat = fmt.block_size // size if fmt.block_size else blocks
    scales = np.repeat(np.ldexp(activations.scales, unit), repeat, axis=1)[:, :blocks]
    return _Operand(integers, scales, fmt.scale)


_Terms = tuple[Float64, ...]  # shape (tokens, rows) each; their exact sum is P_b * S_b


def _direct_terms(activations: _Operand, weights: _Operand) -> Iterator[_Terms]:
    """P_b * S_b of all blocks in order where 53 bits hold them: one matrix product each."""
    left = np.ascontiguousarray(activations.scaled.transpose(1, 0, 2))
    right = np.ascontiguousarray(weights.scaled.transpose(1, 2, 0))
    product = np.empty((left.shape[1], right.shape[2]))
    for block in range(len(left)):
        np.matmul(left[block], right[block], out=product)
        yield (product,)


def _split_terms(activations: _Operand, weights: _Operand) -> Iterator[_Terms]:
    """The same for longer products: P_b from two matrix products, then times S_b in two halves.

    A weight has at most 37 bits (E5M6) and an activation 18 (E4M3), so that with blocks of up to 64
    each product is below 2**43 and P_b below 2**61. Half of P_b times S_b has 48 bits.
    """
    left = np.ascontiguousarray(activations.integers.transpose(1, 0, 2))
    right = np.ascontiguousarray(weights.integers.transpose(1, 2, 0))
    high_part = np.floor(np.ldexp(right, -_LOW_BITS))
    low_part = right - np.ldexp(high_part, _LOW_BITS)
    for block in range(len(left)):
        high = (left[block] @ high_part[block]).astype(np.int64)
        integers = (high << _LOW_BITS) + (left[block] @ low_part[block]).astype(np.int64)
        scales = np.multiply.outer(activations.scales[:, block], weights.scales[:, block])
        # Both halves have the sign of P_b, so neither is larger than the product.
        scales *= np.sign(integers)
        magnitude = np.abs(integers)
        upper = np.ldexp((magnitude >> 32).astype(np.float64), 32) * scales
        yield upper, (magnitude & 0xFFFFFFFF).astype(np.float64) * scales


def _round_terms(terms: _Terms) -> Float32:
    """T_b: the sum of the terms, rounded once."""
    if len(terms) == 1:
        return terms[0].astype(np.float32)
    first, second = terms
    total = first + second
    # Knuth's TwoSum: the exact error of the addition.
    share = total - first
    error = (first - (total - share)) + (second - share)
    return round_to_odd(total, error).astype(np.float32)


def _add(total: Float32, term: Float32) -> Float32:
    """One float32 addition each; what is infinite stays."""
    infinite = np.isinf(total)
    return np.where(infinite, total, np.where(infinite, np.float32(0), total) + term)


def _accumulate(terms: Iterator[_Terms], shape: tuple[int, int], limit: float) -> Float32:
    """The float32 accumulator after all blocks, shape (tokens, rows)."""
    total = np.zeros(shape, dtype=np.float32)
    # Every rounding adds at most 2**-24 of what is there: 2 is room for millions of blocks.
    if limit >= 2.0**127:
        for term in terms:
            total = _add(total, _round_terms(term))
        return total
    for term in terms:
        if len(term) == 1:
            # Rounds the product to float32 on its way into the addition.
            np.add(total, term[0], out=total, dtype=np.float32, casting="same_kind")
        else:
            total += _round_terms(term)
    return total


def _sum_exactly(
    terms: Iterator[_Terms], shape: tuple[int, int], low: int, limit: float
) -> Float32:
    """The sum of all P_b * S_b, rounded once."""
    # The bound is a float64 sum: one bit more than its exponent says is plenty.
    total = ExactSum(shape, low, int(np.frexp(limit)[1]) + 1)
    for term in terms:
        for part in term:
            total.add(part)
    return total.round()


def _times_row_scales(values: Float32, row_scales: NDArray[np.uint16]) -> Float32:
    """One float32 multiplication each; an infinity only gets the product's sign."""
    factors = decode_array(row_scales, BF16).astype(np.float32)
    infinite = np.isinf(values)
    finite = np.where(infinite, np.copysign(np.float32(1), values), values)
    scaled = finite * factors
    return np.where(infinite, np.copysign(np.float32(np.inf), scaled), scaled)


def _add_corrections(values: Float32, corrections: Corrections, activations: Float64) -> None:
    """Add all corrections to ``values``, shape (tokens, rows), in place.

    Step j adds the j-th correction of every row that has one.
    """
    starts = corrections.indptr[:-1]
    counts = np.diff(corrections.indptr)
    factors = decode_array(corrections.values, BF16)
    for step in range(int(counts.max())):
        affected = np.flatnonzero(counts > step)
        entries = starts[affected] + step
        # Exact in float64: 8 bits times at most 16. In float32 only the range can round it.
        products = activations[:, corrections.columns[entries]] * factors[entries]
        values[:, affected] = _add(values[:, affected], products.astype(np.float32))


def _tile(activations: _Operand, weights: _Operand, *, bits: int, exact: bool) -> Float32:
    """Accumulators of some tokens and rows before row scales, shape (tokens, rows)."""
    terms = (_direct_terms if bits <= _FLOAT64_BITS else _split_terms)(activations, weights)
    shape = len(activations.integers), len(weights.integers)
    size = activations.integers.shape[2]
    limit = size * float((activations.block_limits * weights.block_limits).sum())
    if exact:
        return _sum_exactly(terms, shape, activations.lowest_bit + weights.lowest_bit, limit)
    return _accumulate(terms, shape, limit)


def _check_subnormals() -> None:
    """Refuse a processor mode in which float32 arithmetic is not that of IEEE 754."""
    smallest = np.array([1], dtype=np.uint32).view(np.float32)
    if not (smallest * np.float32(1)).any():
        raise InputError(
            "this process flushes subnormal float32 numbers to zero, as libraries compiled with "
            "-ffast-math make it do: the kernel's results would differ"
        )


def _check_operands(
    tensor: QuantizedTensor,
    activations: QuantizedActivations,
    corrections: Corrections | None = None,
) -> None:
    columns = tensor.shape[1]
    if activations.shape[1] != columns:
        raise InputError(
            f"activations: {activations.shape[1]} channels, the weights have {columns} columns"
        )
    if corrections is not None and corrections.shape != tensor.shape:
        raise InputError(f"corrections: shape {corrections.shape}, the weights have {tensor.shape}")


def matmul(
    tensor: QuantizedTensor,
    activations: QuantizedActivations,
    corrections: Corrections | None = None,
    *,
    output: str = "float32",
    exact: bool = False,
    block_size: int | None = None,
) -> KernelOutput:
    """Product of activations with the transpose of a quantized matrix, in the kernel's arithmetic.

    Every bit is the same on every machine. Zeros: an accumulator of zero is +0; later steps have
    the signs that IEEE 754 gives them.

    Parameters
    ----------
    tensor : QuantizedTensor
        Weights, shape (rows, columns). Not modified.
    activations : QuantizedActivations
        Shape (tokens, columns), in the blocks of the weights or in multiples of them. Not modified.
    corrections : Corrections, optional
        Sparse part of the weights. Not modified.
    output : str
        ``"float32"``, or ``"bfloat16"``: the same rounded to nearest, ties to even.
    exact : bool
        Sum all P_b * S_b without rounding and round once, before row scales and corrections. The
        result then depends neither on the order of blocks nor on a split of K.
    block_size : int, optional
        Input channels between two roundings, for weights with one scale for the whole layer
        (:func:`kernel_block_size`).

    Returns
    -------
    product : KernelOutput
        Shape (tokens, rows).

    Raises
    ------
    InputError
        If the parts do not fit each other, a code is NaN or reserved, or this process flushes
        subnormal numbers to zero.
    """
    if output not in OUTPUTS:
        raise InputError(f"output {output!r}: must be one of {', '.join(OUTPUTS)}")
    _check_operands(tensor, activations, corrections)
    sums = accumulate(tensor, activations, exact=exact, block_size=block_size)
    return finish(sums, tensor, activations, corrections, output=output)


def accumulate(
    tensor: QuantizedTensor,
    activations: QuantizedActivations,
    *,
    exact: bool = False,
    block_size: int | None = None,
) -> Float32:
    """The first part of :func:`matmul`, what a tile computes: sums over all blocks.

    Parameters
    ----------
    tensor, activations, exact, block_size
        As for :func:`matmul`.

    Returns
    -------
    accumulators : float32 array, shape (tokens, rows)
        Before row scales and corrections. A zero is +0.

    Raises
    ------
    InputError
        As :func:`matmul`.
    """
    _check_subnormals()
    _check_operands(tensor, activations)
    size = kernel_block_size(tensor.format, activations.format, block_size)
    bits = _product_bits(tensor.format, activations.format, size)
    (tokens, _), (rows, _) = activations.shape, tensor.shape
    whole = _activation_operand(activations, size)
    result = np.empty((tokens, rows), dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        for part in _row_parts(rows, size):
            operand = _weight_operand(take_rows(tensor, part), size)
            for first in range(0, tokens, _TILE_TOKENS):
                some = slice(first, min(first + _TILE_TOKENS, tokens))
                result[some, part] = _tile(whole.take(some), operand, bits=bits, exact=exact)
    return result


def finish(
    accumulators: Float32,
    tensor: QuantizedTensor,
    activations: QuantizedActivations,
    corrections: Corrections | None = None,
    *,
    output: str = "float32",
) -> KernelOutput:
    """The second part of :func:`matmul`: row scales, corrections and rounding to the output.

    Parameters
    ----------
    accumulators : float32 array, shape (tokens, rows)
        Of :func:`accumulate`. Not modified.
    tensor, activations, corrections, output
        As for :func:`matmul`.

    Raises
    ------
    InputError
        As :func:`matmul`, or if ``accumulators`` has another shape.
    """
    if output not in OUTPUTS:
        raise InputError(f"output {output!r}: must be one of {', '.join(OUTPUTS)}")
    _check_subnormals()
    _check_operands(tensor, activations, corrections)
    shape = activations.shape[0], tensor.shape[0]
    if accumulators.shape != shape:
        raise InputError(f"accumulators: shape {accumulators.shape}, expected {shape}")
    result = accumulators.copy()
    with np.errstate(over="ignore", under="ignore"):
        if tensor.row_scales is not None:
            result = _times_row_scales(result, tensor.row_scales)
        if corrections is not None:
            _add_corrections(result, corrections, decode_activations(activations))
    if output == "bfloat16":
        rounded = round_bfloat16(result)
        return KernelOutput(rounded, (rounded & 0x7FFF) == BF16.exponent_mask)
    return KernelOutput(result.view(np.uint32), np.isinf(result))


def _row_parts(rows: int, size: int) -> Iterator[slice]:
    """Rows that are multiplied at a time."""
    step = max(1, _TILE_WEIGHTS // size)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
