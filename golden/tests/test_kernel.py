"""The kernel against exact fractions, a float32 loop, and itself in other orders."""

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray

import golden.kernel as kernel_module
from golden.activations import (
    ActivationFormat,
    QuantizedActivations,
    decode_activations,
    parse_activation_format,
    quantize_activations,
)
from golden.convert import decode_array, encode_array
from golden.corrections import Corrections
from golden.errors import InputError
from golden.exact_sum import ExactSum
from golden.formats import BF16, E4M3, E5M6, HIF8, UE8M0, Kind, NumberFormat
from golden.kernel import kernel_block_size, matmul
from golden.notation import QuantFormat, parse_format
from golden.tensor import QuantizedTensor, decode_elements, decode_scales
from golden.tests.kernel_reference import Reference, float32
from golden.tests.processors import digests_by_environment
from golden.vectors.conformance import DEFAULT_FORMATS
from golden.vectors.layers import vector_luts

WEIGHTS = [parse_format(name, hif) for name, hif in DEFAULT_FORMATS]
ACTIVATION_NAMES = (
    "INT8^8sUE8M0", "INT8^16sUE8M0", "INT8^64sUE8M0", "INT8^64sBF16", "INT8^0sUE4M4",
    "INT4^0sUE8M0", "HIF7^64sUE4M4", "HIF8^64sUE8M0", "HIF8T^0sBF16", "E2M1^64sUE4M4",
    "E2M3^0sUE8M0", "E4M3^64sUE8M0", "E4M3^64sBF16", "E4M3^0sUE4M4",
)  # fmt: skip
REGIMES = ("usual", "small", "large", "cancelling", "wide")


def activation_format(name: str) -> ActivationFormat:
    fmt = parse_activation_format(name)
    assert fmt is not None
    return fmt


ACTIVATIONS = [activation_format(name) for name in ACTIVATION_NAMES]


@lru_cache
def codes_of(fmt: NumberFormat) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Codes that have a value, and their values."""
    decoded = [(code, fmt.decode(code)) for code in range(1 << fmt.width)]
    codes = [code for code, one in decoded if one.kind not in (Kind.NAN, Kind.RESERVED)]
    return np.array(codes, dtype=np.uint16), decode_array(codes, fmt)


def codes_near(
    fmt: NumberFormat, exponent: int, count: int, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Codes within three binades of ``2**exponent``, of either sign; one in sixteen is zero."""
    codes, values = codes_of(fmt)
    magnitudes = np.abs(values)
    inside = (magnitudes >= 2.0 ** (exponent - 3)) & (magnitudes <= 2.0 ** (exponent + 3))
    found = rng.choice(codes[inside], count)
    return np.where(rng.random(count) < 1 / 16, 0, found).astype(np.uint16)


def binade(fmt: NumberFormat) -> int:
    """Exponent of a large value."""
    return int(max(fmt.max_value, -fmt.min_value)).bit_length() - 1


@dataclass
class Case:
    """Random operands of three rows and three tokens, whose products lie near 2**target."""

    weights: QuantFormat
    activations: ActivationFormat
    regime: str
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.size = kernel_block_size(self.weights, self.activations)
        self.columns = (2 if self.size < 32 else 1) * self.size + 3
        element = self.weights.atom or self.weights.hif
        targets = {"small": (-152, -122), "large": (120, 130)}
        target = int(self.rng.integers(*targets.get(self.regime, (-4, 5))))
        rest = target - binade(element) - binade(self.activations.element)
        self.target, self.layer_exponent = target, rest // 2
        self.activation_exponent = rest - rest // 2

    def tensor(self) -> QuantizedTensor:
        fmt, rng, rows = self.weights, self.rng, 3
        size = fmt.block_size or rows * self.columns
        blocks = -(-self.columns // size) if fmt.block_size else 1
        shape = (rows, blocks) if fmt.block_size else (1, 1)
        elements = np.arange(1 << fmt.index_bits) if fmt.atom is None else codes_of(fmt.atom)[0]
        indices = rng.choice(elements.astype(np.uint16), (*shape, size))
        scales = codes_near(fmt.word.scale, 0, int(np.prod(shape)), rng).reshape(shape)
        metabits = rng.integers(0, 1 << fmt.word.metabit_bits, shape).astype(np.uint16)
        if self.regime == "wide":
            scales = rng.choice(codes_of(fmt.word.scale)[0], shape)
        words = metabits << np.uint16(fmt.word.scale.width) | scales
        if self.regime == "cancelling" and blocks > 1:
            indices[:, 1], words[:, 1] = indices[:, 0], words[:, 0]
        row_scales = codes_near(BF16, 0, rows, rng) if fmt.row_scale else None
        return QuantizedTensor(
            fmt,
            (rows, self.columns),
            indices,
            words,
            vector_luts(fmt),
            self.layer_exponent,
            row_scales,
        )

    def tokens(self) -> QuantizedActivations:
        fmt, rng, tokens = self.activations, self.rng, 3
        blocks, size = fmt.blocks(self.columns)
        elements = rng.choice(codes_of(fmt.element)[0], (tokens, blocks * size)).astype(np.uint8)
        elements[0, : 2 * self.size] = 0
        elements[:, self.columns :] = 0
        exponent = 0 if fmt.has_token_exponents else self.activation_exponent
        scales = codes_near(fmt.scale, exponent, tokens * blocks, rng).reshape(tokens, blocks)
        if self.regime == "wide":
            scales = rng.choice(codes_of(fmt.scale)[0], (tokens, blocks))
        exponents = None
        if fmt.has_token_exponents:
            exponents = np.full(tokens, self.activation_exponent, dtype=np.int16)
        if self.regime == "cancelling" and self.columns > 2 * self.size:
            first = decode_array(elements[:, : self.size], fmt.element)
            opposite = encode_array(-first, fmt.element)
            elements[:, self.size : 2 * self.size] = opposite
            elements[1:, 2 * self.size :] = 0
            if fmt.block_size == self.size:
                scales[:, 1] = scales[:, 0]
        elements = elements.reshape(tokens, blocks, size)
        return QuantizedActivations(fmt, (tokens, self.columns), elements, scales, exponents)

    def corrections(self) -> Corrections | None:
        if self.rng.random() < 0.5:
            return None
        mask = self.rng.random((3, self.columns)) < 2 / self.columns
        exponent = self.target - binade(self.activations.element) - self.activation_exponent
        found = Corrections.from_mask(mask, np.zeros(mask.shape, dtype=np.float32))
        values = codes_near(BF16, min(max(exponent, -120), 120), found.entries, self.rng)
        return replace(found, values=values)


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def expected(
    case: Case, tensor: QuantizedTensor, activations: QuantizedActivations,
    corrections: Corrections | None, seen: Counter[str], exact: bool,
) -> tuple[list[list[int]], list[list[int]]]:  # fmt: skip
    """float32 and bfloat16 bits by the reference, tokens by rows."""
    reference = Reference(tensor, activations, corrections, case.size, exact, seen)
    outputs = [[reference.output(row, token) for row in range(3)] for token in range(3)]
    wide = [[bits_of(y) for y in row] for row in outputs]
    return wide, [[bits_of(reference.bfloat16(y)) >> 16 for y in row] for row in outputs]


@pytest.mark.parametrize("regime", REGIMES)
def test_kernel_equals_exact_fractions(regime: str) -> None:
    seen: Counter[str] = Counter()
    outputs = 0
    for number, (weights, activations) in enumerate(itertools.product(WEIGHTS, ACTIVATIONS)):
        if weights.block_size > activations.block_size > 0:
            continue
        rng = np.random.default_rng([REGIMES.index(regime), number])
        case = Case(weights, activations, regime, rng)
        tensor, tokens, corrections = case.tensor(), case.tokens(), case.corrections()
        exact = number % 3 == 0
        wide, narrow = expected(case, tensor, tokens, corrections, seen, exact)
        where = f"{weights.name}, {activations.name}, seed {number}"
        found = matmul(tensor, tokens, corrections, exact=exact)
        assert found.bits.tolist() == wide, where
        assert (found.overflow == np.isinf(found.values)).all()
        found = matmul(tensor, tokens, corrections, exact=exact, output="bfloat16")
        assert found.bits.tolist() == narrow, where
        assert (found.overflow == np.isinf(found.values)).all()
        outputs += found.bits.size
    wanted = {
        "usual": {"tie": 50, "zero block": 100},
        "small": {"subnormal": 1000, "tie": 100},
        "large": {"infinity": 500},
        "cancelling": {"cancelled": 300, "negative zero": 1},
        "wide": {"subnormal": 100, "infinity": 100},
    }
    assert outputs > 2000
    assert all(seen[event] >= count for event, count in wanted[regime].items()), seen


def test_long_products_are_among_them() -> None:
    """Else the products that float64 does not hold would go untested."""
    pairs = [(w, a) for w in WEIGHTS for a in ACTIVATIONS if w.block_size <= (a.block_size or 64)]
    bits = [kernel_module._product_bits(w, a, kernel_block_size(w, a)) for w, a in pairs]
    assert sum(count > 53 for count in bits) >= 10
    assert sum(count <= 53 for count in bits) > 100


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_is_rounded_twice(sign: int, exact: bool) -> None:
    """2**53 + 2**29 + 1 is above a tie of float32, but float64 rounds it to that tie.

    The same one below: 2**53 + 3 * 2**29 - 1.
    """
    fmt, tokens = parse_format("E5M6sUE8M0"), activation_format("E4M3sUE8M0")
    one = np.full((2, 1), UE8M0.encode(1), dtype=np.uint16)
    weights = np.zeros((2, 1, 16), dtype=np.uint16)
    activations = np.zeros((2, 1, 16), dtype=np.uint8)
    # In units of 2**-20 and 2**-9.
    large, middle, small = (Fraction(2) ** exponent for exponent in (16, -8, -20))
    weights[0, 0, :3] = [E5M6.encode(sign * value) for value in (large, middle, small)]
    weights[1, 0, :3] = [E5M6.encode(sign * value) for value in (large, 3 * middle, -small)]
    activations[:, 0, :3] = [E4M3.encode(Fraction(2) ** exponent) for exponent in (8, 8, -9)]
    tensor = QuantizedTensor(fmt, (2, 16), weights, one, (), 0)
    quantized = QuantizedActivations(tokens, (2, 16), activations, one)
    found = matmul(tensor, quantized, exact=exact).values[0] * np.float32(2**29)
    assert found.tolist() == [sign * (2.0**53 + 2.0**30)] * 2


def test_what_is_odd_already_stays() -> None:
    """2**55 + 3 * 2**31 - 6 is below a tie, and nearest to an odd float64 that is below it, too."""
    weights = np.zeros((1, 1, 16), dtype=np.uint16)
    activations = np.zeros((1, 1, 16), dtype=np.uint8)
    values = [*[Fraction(2**16)] * 4, Fraction(3, 2**6), Fraction(-6, 2**20)]
    weights[0, 0, :6] = [E5M6.encode(value) for value in values]
    activations[0, 0, :6] = [*[E4M3.encode(2**8)] * 5, E4M3.encode(Fraction(1, 2**9))]
    one = np.full((1, 1), UE8M0.encode(1), dtype=np.uint16)
    tensor = QuantizedTensor(parse_format("E5M6sUE8M0"), (1, 16), weights, one, (), 0)
    tokens = QuantizedActivations(activation_format("E4M3sUE8M0"), (1, 16), activations, one)
    assert matmul(tensor, tokens).values[0, 0] == 2.0**-29 * (2**55 + 2**32)


# -------------------------------------------------------------------------------- the float32 loop


def float32_loop(
    tensor: QuantizedTensor, activations: QuantizedActivations, corrections: Corrections | None
) -> NDArray[np.float32]:
    """The ten lines of docs/kernel.md in ordinary float32 arithmetic."""
    size, (rows, columns) = tensor.format.block_size, tensor.shape
    weights, weight_scales = decode_elements(tensor), decode_scales(tensor)
    tokens = activations.shape[0]
    x_hat = decode_activations(activations)
    result = np.zeros((tokens, rows), dtype=np.float32)
    for token, row in itertools.product(range(tokens), range(rows)):
        acc = np.float32(0)
        for block in range(-(-columns // size)):
            x_block = (
                activations.format.block_size and block * size // activations.format.block_size
            )
            part = slice(block * size, min((block + 1) * size, columns))
            scale = activations.scales[token, x_block]
            x_int = x_hat[token, part] / scale if scale else np.zeros(part.stop - part.start)
            product = sum(int(w) * int(x) for w, x in zip(weights[row, block], x_int, strict=False))
            term = np.float32(product * (weight_scales[row, block] * scale))
            acc = acc if np.isinf(acc) else acc + term
        y = acc
        if tensor.row_scales is not None:
            y = y * np.float32(decode_array(tensor.row_scales[row], BF16))
        if corrections is not None:
            for entry in range(*corrections.indptr[row : row + 2]):
                v = np.float32(decode_array(corrections.values[entry], BF16))
                x = np.float32(x_hat[token, corrections.columns[entry]])
                y = y if np.isinf(y) else y + v * x
        result[token, row] = y
    return result


@pytest.mark.parametrize("regime", ["usual", "small", "cancelling"])
@pytest.mark.parametrize("name", ["INT8^64sUE8M0", "INT8^64sBF16", "HIF8T^0sUE4M4"])
def test_kernel_equals_a_float32_loop(name: str, regime: str) -> None:
    activations = activation_format(name)
    for number, weights in enumerate(WEIGHTS):
        if weights.atom is not None:
            continue
        case = Case(weights, activations, regime, np.random.default_rng(number))
        tensor, tokens, corrections = case.tensor(), case.tokens(), case.corrections()
        with np.errstate(under="ignore"):
            wanted = float32_loop(tensor, tokens, corrections)
        found = matmul(tensor, tokens, corrections)
        assert found.bits.tolist() == wanted.view(np.uint32).tolist(), f"{weights.name} {number}"


# ------------------------------------------------------------------------------------------- order


def random_operands(
    weights: str = "BOF4-NF4sS1E5M5", activations: str = "INT8sUE8M0", rows: int = 5,
    columns: int = 96, tokens: int = 4,
) -> tuple[QuantizedTensor, QuantizedActivations]:  # fmt: skip
    fmt, rng = parse_format(weights), np.random.default_rng(7)
    size = fmt.block_size or rows * columns
    shape = (rows, -(-columns // size)) if fmt.block_size else (1, 1)
    words = codes_near(fmt.word.scale, 0, shape[0] * shape[1], rng).reshape(shape)
    elements = np.arange(1 << fmt.index_bits) if fmt.atom is None else codes_of(fmt.atom)[0]
    indices = rng.choice(elements.astype(np.uint16), (*shape, size))
    tensor = QuantizedTensor(fmt, (rows, columns), indices, words, vector_luts(fmt), -3)
    values = rng.standard_normal((tokens, columns)).astype(np.float32)
    values *= np.float32(2) ** rng.integers(-9, 9, (tokens, columns)).astype(np.float32)
    return tensor, quantize_activations(values, activation_format(activations))


def reordered(
    tensor: QuantizedTensor, tokens: QuantizedActivations, order: NDArray[np.intp]
) -> tuple[QuantizedTensor, QuantizedActivations]:
    """The same products with the blocks in another order."""
    return (
        replace(tensor, indices=tensor.indices[:, order], scale_words=tensor.scale_words[:, order]),
        replace(
            tokens, elements=tokens.elements[:, order], scale_codes=tokens.scale_codes[:, order]
        ),
    )


@pytest.mark.parametrize("weights", ["BOF4-NF4sS1E5M5", "E5M6sUE4M4"])
def test_exact_sums_do_not_depend_on_the_order_of_blocks(weights: str) -> None:
    tensor, tokens = random_operands(weights, "E4M3sBF16", columns=320)
    orders = [np.random.default_rng(n).permutation(20) for n in range(5)]
    exact = {matmul(*reordered(tensor, tokens, o), exact=True).bits.tobytes() for o in orders}
    rounded = {matmul(*reordered(tensor, tokens, o)).bits.tobytes() for o in orders}
    assert len(exact) == 1
    assert len(rounded) > 1


def test_exact_sums_may_be_split() -> None:
    rng = np.random.default_rng(3)
    values = np.ldexp(
        rng.integers(-(2**53), 2**53, (40, 6)).astype(np.float64), rng.integers(-200, 60, (40, 6))
    )
    values[20:, 0] = -values[:20, 0]
    values[:, 1] = 0.0
    values[:2, 1] = 2.0**53 + 2.0**29, 2.0**-150  # above a tie by what is three bins below
    whole, first, second = (ExactSum((6,), -200, 113) for _ in range(3))
    for number, row in enumerate(values):
        whole.add(row)
        (first if number % 3 else second).add(row)
    first.merge(second)
    sums = [sum(map(Fraction, column), Fraction(0)) for column in values.T.tolist()]
    assert 0 in sums
    bits = [bits_of(float32(value)) for value in sums]
    assert whole.round().view(np.uint32).tolist() == bits
    assert first.round().view(np.uint32).tolist() == bits


@pytest.mark.parametrize("weights", ["BOF4-NF4sS1E5M5", "E4M3^0sUE8M0"])
def test_a_tile_is_as_the_whole(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, tokens = random_operands(weights, rows=11, tokens=9)
    mask = np.random.default_rng(1).random((11, 96)) < 0.05
    corrections = Corrections.from_mask(mask, np.full((11, 96), 0.3, np.float32))
    whole = matmul(tensor, tokens, corrections)
    monkeypatch.setattr(kernel_module, "_TILE_TOKENS", 4)
    monkeypatch.setattr(kernel_module, "_TILE_WEIGHTS", 64)
    assert matmul(tensor, tokens, corrections).bits.tolist() == whole.bits.tolist()


def test_operands_are_not_modified() -> None:
    tensor, tokens = random_operands()
    before = [a.copy() for a in (tensor.indices, tensor.scale_words, tokens.elements)]
    matmul(tensor, tokens)
    after = [tensor.indices, tensor.scale_words, tokens.elements]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------------------------------- edges


def test_infinity_stays_through_every_later_step() -> None:
    """Overflow in the first block, the opposite in the second, then a row scale and corrections."""
    fmt = parse_format("NF4-BOF4sRS1E2M4")
    luts = vector_luts(fmt)
    low, zero = 0, luts[0].values.tolist().index(0)
    indices = np.full((3, 2, 16), zero, dtype=np.uint8)
    indices[:, 0, 0] = low
    indices[:, 1, :2] = low
    one = np.uint16(fmt.word.scale.encode(1))
    row_scales = np.array([0x3F80, 0x0000, 0xBF80], dtype=np.uint16)  # 1, 0, -1
    words = np.full((3, 2), one)
    tensor = QuantizedTensor(fmt, (3, 32), indices, words, luts, 0, row_scales)
    elements = np.zeros((1, 2, 16), dtype=np.uint8)
    elements[0, 0, 0], elements[0, 1, 0], elements[0, 1, 1] = 127, 129, 129
    scales = np.full((1, 2), UE8M0.encode(2**127), dtype=np.uint16)
    tokens = QuantizedActivations(activation_format("INT8sUE8M0"), (1, 32), elements, scales)
    mask = np.zeros((3, 32), dtype=bool)
    mask[:, 16] = True
    corrections = Corrections.from_mask(mask, np.full((3, 32), -1, np.float32))
    for exact in (False, True):
        found = matmul(tensor, tokens, corrections, exact=exact)
        # The sum of all blocks is positive: only rounding block by block overflows downwards.
        sign = 1 if exact else -1
        assert found.values[0].tolist() == [sign * np.inf, sign * np.inf, -sign * np.inf]
        assert found.overflow.all()


def test_bfloat16_alone_may_overflow() -> None:
    """511 * 2**119 lies half-way between the largest bfloat16 and 2**128, 510 * 2**119 is it."""
    fmt, int8 = parse_format("HIF8sUE8M0"), activation_format("INT8sUE8M0")
    word = np.array([[UE8M0.encode(2**119)]], dtype=np.uint16)
    indices = np.zeros((1, 1, 16), dtype=np.uint8)
    indices[0, 0, :2] = HIF8.encode(4), HIF8.encode(1)
    tensor = QuantizedTensor(fmt, (1, 16), indices, word, (), 0)
    for second, overflow in ((3, True), (2, False)):
        elements = np.zeros((1, 1, 16), dtype=np.uint8)
        elements[0, 0, :2] = 127, second
        one = np.full((1, 1), UE8M0.encode(1), np.uint16)
        tokens = QuantizedActivations(int8, (1, 16), elements, one)
        wide, narrow = matmul(tensor, tokens), matmul(tensor, tokens, output="bfloat16")
        assert wide.values[0, 0] == (508 + second) * 2.0**119
        assert not wide.overflow.any()
        assert narrow.overflow[0, 0] == overflow
        assert narrow.values[0, 0] == (np.inf if overflow else 255 * 2.0**120)


def test_weights_with_one_scale_take_blocks_of_activations() -> None:
    one_scale, blocks = parse_format("E4M3^0sUE8M0"), parse_format("NF4^32sUE4M4")
    int8 = {size: activation_format(f"INT8^{size}sBF16") for size in (0, 8, 64)}
    assert kernel_block_size(one_scale, int8[8]) == 8
    assert kernel_block_size(one_scale, int8[0]) == 16
    assert kernel_block_size(one_scale, int8[64], 16) == 16
    assert kernel_block_size(blocks, int8[64]) == kernel_block_size(blocks, int8[0], 32) == 32
    with pytest.raises(InputError, match=r"blocks of 8 channels .* whole blocks of 32"):
        kernel_block_size(blocks, int8[8])
    with pytest.raises(InputError, match=r"blocks of 64 channels .* whole blocks of 48"):
        kernel_block_size(one_scale, int8[64], 48)
    with pytest.raises(InputError, match=r"block size 16: NF4\^32sUE4M4 has blocks of 32"):
        kernel_block_size(blocks, int8[64], 16)
    for weights in (one_scale, blocks):
        with pytest.raises(InputError, match="block size 0: must be at least 1"):
            kernel_block_size(weights, int8[64], 0)


def test_operands_that_do_not_fit_are_refused() -> None:
    tensor, tokens = random_operands()
    _, shorter = random_operands(columns=80)
    with pytest.raises(InputError, match="activations: 80 channels, the weights have 96 columns"):
        matmul(tensor, shorter)
    with pytest.raises(InputError, match="output 'float16': must be one of float32, bfloat16"):
        matmul(tensor, tokens, output="float16")
    mask = np.ones((5, 80), dtype=bool)
    corrections = Corrections.from_mask(mask, np.zeros((5, 80), np.float32))
    with pytest.raises(InputError, match=r"corrections: shape \(5, 80\), the weights have \(5, 96"):
        matmul(tensor, tokens, corrections)
    reserved = replace(tokens, elements=np.full_like(tokens.elements, 128))
    with pytest.raises(InputError, match=r"INT8 code 0x80 at position .* is reserved"):
        matmul(tensor, reserved)


# ------------------------------------------------------------------------------------ any processor


def digests() -> dict[str, str]:
    """SHA-256 sums of products, and of quantized activations, of some size."""
    made = {}
    for weights, name in itertools.product(
        ("BOF4-NF4sS1E5M5", "E5M6sUE4M4"), ("INT8sUE8M0", "E4M3^0sUE4M4")
    ):
        tensor, tokens = random_operands(weights, name, rows=300, columns=530, tokens=70)
        made[f"activations of {weights}, {name}"] = sha256(tokens.elements, tokens.scale_codes)
        for exact in (False, True):
            bits = matmul(tensor, tokens, exact=exact).bits
            made[f"{weights} x {name}, exact {exact}"] = sha256(bits)
    return made


def sha256(*arrays: NDArray[np.unsignedinteger]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_products_are_the_same_on_every_processor() -> None:
    found = digests_by_environment("golden.tests.test_kernel")
    assert len(set(found["default"].values())) > 8
    assert all(made == found["default"] for made in found.values())


if __name__ == "__main__":
    print(json.dumps(digests()))
