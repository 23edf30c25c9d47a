"""The kernel's arithmetic on Python integers and fractions, one output at a time.

Written from docs/kernel.md and the scalar number formats alone. A float32 number is a Python float
here, so that zeros keep their signs and infinities are at hand.
"""

import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache

from golden.activations import QuantizedActivations
from golden.corrections import Corrections
from golden.formats import BF16, Kind, NumberFormat
from golden.tensor import QuantizedTensor


@lru_cache
def unit_of(fmt: NumberFormat) -> int:
    """Smallest exponent of any code."""
    decoded = (fmt.decode(code) for code in range(1 << fmt.width))
    return min(one.exponent for one in decoded if one.kind not in (Kind.NAN, Kind.RESERVED))


@cache
def integer(fmt: NumberFormat, code: int) -> int:
    """Value of a code in that unit."""
    return int(fmt.decode(code).value / Fraction(2) ** unit_of(fmt))


def float32(value: Fraction, precision: int = 24, seen: Counter[str] | None = None) -> float:
    """Round to float32, or to bfloat16 with precision 8; a zero comes out as +0."""
    seen = Counter() if seen is None else seen
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    quantum = Fraction(2) ** max(exponent - precision + 1, -125 - precision)
    steps = magnitude / quantum
    if steps.denominator == 2:
        seen["tie"] += 1
    result = round(steps) * quantum  # of a fraction: to nearest, ties to even
    if exponent < -126:
        seen["subnormal"] += 1
    if result >= Fraction(2) ** 128:
        seen["infinity"] += 1
        return math.copysign(math.inf, value)
    return math.copysign(float(result), value)


@dataclass
class Reference:
    """Computes outputs and counts what happened on the way."""

    tensor: QuantizedTensor
    activations: QuantizedActivations
    corrections: Corrections | None
    size: int
    exact: bool = False
    seen: Counter[str] = field(default_factory=Counter)

    def rounded(self, value: Fraction, precision: int = 24) -> float:
        return float32(value, precision, self.seen)

    def weights(self, row: int) -> list[int]:
        """Elements of a row in units of their format."""
        fmt, (_, columns) = self.tensor.format, self.tensor.shape
        if fmt.atom is not None:
            codes = self.tensor.indices.reshape(-1, self.tensor.indices.size // self._rows)[row]
            return [integer(fmt.atom, code) for code in codes.tolist()][:columns]
        found = []
        for block, word in enumerate(self.tensor.scale_words[row].tolist()):
            lut = self.tensor.luts[word >> fmt.word.scale.width]
            found += [int(lut.values[index]) for index in self.tensor.indices[row, block].tolist()]
        return found[:columns]

    @property
    def _rows(self) -> int:
        return self.tensor.shape[0]

    def weight_scale(self, row: int, column: int) -> Fraction:
        fmt = self.tensor.format
        place = (row, column // fmt.block_size) if fmt.block_size else (0, 0)
        code = int(self.tensor.scale_words[place]) & ((1 << fmt.word.scale.width) - 1)
        unit = Fraction(1) if fmt.atom is None else Fraction(2) ** unit_of(fmt.atom)
        return unit * fmt.word.scale.decode(code).value * Fraction(2) ** self.tensor.layer_exponent

    def tokens(self, token: int) -> list[int]:
        """Elements of a token in units of their format."""
        fmt, codes = self.activations.format, self.activations.elements[token].reshape(-1)
        return [integer(fmt.element, code) for code in codes.tolist()][: self.tensor.shape[1]]

    def activation_scale(self, token: int, column: int) -> Fraction:
        fmt = self.activations.format
        block = column // fmt.block_size if fmt.block_size else 0
        scale = fmt.scale.decode(int(self.activations.scale_codes[token, block])).value
        exponents = self.activations.token_exponents
        shift = 0 if exponents is None else int(exponents[token])
        return scale * Fraction(2) ** (shift + unit_of(fmt.element))

    def dense(self, row: int, token: int) -> float:
        """The accumulator after all blocks."""
        weights, activations = self.weights(row), self.tokens(token)
        total, exact_total = 0.0, Fraction(0)
        for start in range(0, len(weights), self.size):
            block = slice(start, start + self.size)
            products = sum(map(operator.mul, weights[block], activations[block]))
            term = products * self.weight_scale(row, start) * self.activation_scale(token, start)
            exact_total += term
            if term == 0:
                self.seen["zero block"] += 1
            if not math.isinf(total):
                total = self.plus(total, self.rounded(term))
        return self.rounded(exact_total) if self.exact else total

    def plus(self, first: float, second: float) -> float:
        if math.isinf(first) or math.isinf(second):
            return first if math.isinf(first) else second
        total = Fraction(first) + Fraction(second)
        if total == 0:
            if first:
                self.seen["cancelled"] += 1
            negative = math.copysign(1, first) < 0 and math.copysign(1, second) < 0
            return -0.0 if negative else 0.0
        return self.rounded(total)

    def times(self, first: float | Fraction, second: Fraction, sign: float) -> float:
        """Rounded product; ``sign`` is that of the result, also where it is zero."""
        if first in (math.inf, -math.inf):
            return math.copysign(math.inf, sign)
        return math.copysign(self.rounded(Fraction(first) * second), sign)

    def output(self, row: int, token: int) -> float:
        """The float32 output."""
        y = self.dense(row, token)
        if self.tensor.row_scales is not None:
            code = int(self.tensor.row_scales[row])
            y = self.times(y, BF16.decode(code).value, math.copysign(1, y) * (-1) ** (code >> 15))
        if self.corrections is not None:
            first, last = self.corrections.indptr[row : row + 2].tolist()
            for entry in range(first, last):
                code = int(self.corrections.values[entry])
                column = int(self.corrections.columns[entry])
                x = self.tokens(token)[column] * self.activation_scale(token, column)
                sign = (-1) ** (code >> 15) * (-1 if x < 0 else 1)
                y = self.plus(y, self.times(x, BF16.decode(code).value, sign))
        if y == 0 and math.copysign(1, y) < 0:
            self.seen["negative zero"] += 1
        return y

    def bfloat16(self, y: float) -> float:
        """The output as bfloat16."""
        if y == 0 or math.isinf(y):
            return y
        return self.rounded(Fraction(y), precision=8)
