"""Quantized activations against the scalar formats and exact fractions."""

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.activations import (
    ACTIVATION_ELEMENTS,
    ActivationFormat,
    decode_activations,
    parse_activation_format,
    quantize_activations,
)
from golden.errors import InputError
from golden.formats import BF16, INT8, UE8M0, FloatFormat

SCALES = ("UE8M0", "BF16", "UE4M4", "UE5M3")


def activation_format(name: str) -> ActivationFormat:
    fmt = parse_activation_format(name)
    assert fmt is not None
    return fmt


def test_names_are_those_of_weights() -> None:
    fmt = activation_format("INT8^16sUE8M0")
    assert (fmt.name, fmt.element, fmt.block_size, fmt.scale) == ("INT8sUE8M0", INT8, 16, UE8M0)
    fmt = activation_format("E4M3^0sBF16")
    assert (fmt.name, fmt.block_size, fmt.scale) == ("E4M3^0sBF16", 0, BF16)
    assert not fmt.has_token_exponents
    assert activation_format("E4M3sUE4M4").has_token_exponents
    assert parse_activation_format("none") is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("INT8", "activations: format 'INT8' is not of the form"),
        ("INT8^12sUE8M0", "block size 12, must be one of 0, 8, 16, 32, 64"),
        ("E5M6sUE8M0", "activation format 'E5M6sUE8M0': element E5M6, must be one of INT8, INT4"),
        ("NF4-BOF4sUE4M3", "element NF4-BOF4, must be one of"),
        ("INT8sS1E4M3", "scale S1E4M3 has a sign"),
        ("INT8sFP32", "unknown scale format 'FP32'"),
        ("INT8sRBF16", "row scales exist for codebook formats only"),
        ("None", "is not of the form"),
    ],
)
def test_names_that_cannot_be(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        parse_activation_format(name)


# ------------------------------------------------------------------------------- scalar reference


@lru_cache
def positive_values(scale: FloatFormat) -> dict[Fraction, int]:
    return {value: code for value, code in scale.canonical.items() if value > 0}


def scalar_scale(absmax: Fraction, fmt: ActivationFormat) -> int:
    """Code of a block's scale, in units of the token's power of two."""
    if absmax == 0:
        return 0
    wanted = absmax / min(fmt.element.max_value, -fmt.element.min_value)
    positive = positive_values(fmt.scale)
    if fmt.scale.mantissa_bits:
        return fmt.scale.encode(wanted) or next(iter(positive.values()))
    return positive[min((value for value in positive if value >= wanted), default=max(positive))]


def check_token_exponent(exponent: int, largest: Fraction, fmt: ActivationFormat) -> None:
    """The least power of two with which the largest scale covers the token; 0 without any."""
    limit = min(fmt.element.max_value, -fmt.element.min_value) * fmt.scale.max_value
    if largest == 0:
        assert exponent == 0
        return
    assert largest <= limit * Fraction(2) ** exponent
    assert exponent == -128 or largest > limit * Fraction(2) ** (exponent - 1)


def check_against_scalars(values: NDArray[np.float32], fmt: ActivationFormat) -> None:
    found = quantize_activations(values, fmt)
    decoded = decode_activations(found)
    for token, row in enumerate(values.tolist()):
        numbers = [Fraction(value) for value in row]
        exponent = 0
        if found.token_exponents is not None:
            exponent = int(found.token_exponents[token])
            check_token_exponent(exponent, max(map(abs, numbers)), fmt)
        size = fmt.block_size or len(row)
        for start in range(0, len(row), size):
            block = numbers[start : start + size]
            unit = Fraction(2) ** exponent
            code = scalar_scale(max(map(abs, block)) / unit, fmt)
            assert int(found.scale_codes[token, start // size]) == code
            scale = fmt.scale.decode(code).value * unit
            wanted = [fmt.element.encode(x / scale) if scale else 0 for x in block]
            codes = found.elements[token, start // size].tolist()
            assert codes == wanted + [0] * (size - len(block)), (token, start)
            values_of = [fmt.element.decode(code).value * scale for code in wanted]
            assert decoded[token, start : start + size].tolist() == list(map(float, values_of))


def hard_values(fmt: ActivationFormat, seed: int) -> NDArray[np.float32]:
    """Ties of elements and scales, zeros, subnormals and the largest numbers among random ones."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((12, 37)) * 2.0 ** rng.integers(-3, 3, (12, 37))
    end = float(min(fmt.element.max_value, -fmt.element.min_value))
    levels = np.array([float(value) for value in fmt.element.canonical])
    values[0] = rng.choice((levels[1:] + levels[:-1]) / 2, 37)  # under scale 1, given the extreme:
    values[0, :: fmt.block_size or 37] = end
    scales = np.array([float(value) for value in positive_values(fmt.scale) if 0.1 < value < 10])
    values[1] = end * rng.choice((scales[1:] + scales[:-1]) / 2, 37)
    values[2], values[3, :20], values[3, 20:] = 0, 0, -0.0
    values[4] *= 2.0**-130
    values[5] = rng.integers(-3, 4, 37) * 2.0**-149
    values[6] *= 2.0**120
    values[7] = np.finfo(np.float32).max
    values[8, 5:] = 0
    values[9] *= 2.0 ** rng.integers(-30, 30, 37)
    values[10, 0] = min(end * float(fmt.scale.max_value), 2.0**100)  # just covered by 2**0
    return np.clip(values, -3.4e38, 3.4e38).astype(np.float32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", ACTIVATION_ELEMENTS)
def test_quantizer_equals_exact_fractions(element: str, scale: str) -> None:
    for block_size in (0, 8):
        fmt = activation_format(f"{element}^{block_size}s{scale}")
        check_against_scalars(hard_values(fmt, block_size), fmt)


@pytest.mark.parametrize("element", ACTIVATION_ELEMENTS)
def test_power_of_two_scales_never_saturate_and_are_the_smallest_such(element: str) -> None:
    fmt = activation_format(f"{element}sUE8M0")
    rng = np.random.default_rng(1)
    values = rng.standard_normal((50, 64)).astype(np.float32)
    found = quantize_activations(values, fmt)
    assert found.saturated == 0
    finer = replace(found, scale_codes=found.scale_codes - np.uint16(1))
    end = float(min(fmt.element.max_value, -fmt.element.min_value))
    absmax = np.abs(values).reshape(50, 4, 16).max(axis=2)
    assert (absmax <= end * found.scales).all()
    assert (absmax > end * finer.scales).all()


def test_saturated_elements_are_counted() -> None:
    """Only where the scale was rounded down, and only beyond half a step: 127.5 here."""
    fmt = activation_format("INT8^8sUE2M2")
    values = np.zeros((2, 16), dtype=np.float32)
    values[:, 0] = 127 * 7.0  # the largest scale, so that the token has 2**0
    values[0, 8] = 127 * 1.12  # 1.12 becomes 1: 142 is beyond 127
    values[0, 9:13] = 127.6, 127.4, -127.6, -127.4
    values[1, 8] = 127 * 1.13  # becomes 1.25
    found = quantize_activations(values, fmt)
    assert found.scales.tolist() == [[7.0, 1.0], [7.0, 1.25]]
    assert found.saturated == 3
    assert INT8.decode(int(found.elements[0, 1, 3])).value == -127


def test_tokens_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = activation_format("HIF8sUE4M4")
    values = hard_values(fmt, 3)
    whole = quantize_activations(values, fmt)
    monkeypatch.setattr("golden.activations._CHUNK", 100)
    parts = quantize_activations(values, fmt)
    for name in ("elements", "scale_codes", "token_exponents"):
        assert (getattr(whole, name) == getattr(parts, name)).all()
    assert whole.saturated == parts.saturated
    for token in range(len(values)):
        one = quantize_activations(values[token : token + 1], fmt)
        assert (one.elements[0] == whole.elements[token]).all()


def test_a_negative_zero_has_the_value_zero() -> None:
    fmt = activation_format("E4M3sUE8M0")
    found = quantize_activations(np.ones((1, 16), np.float32), fmt)
    zeros = replace(found, elements=np.full_like(found.elements, 0x80))
    assert not np.signbit(decode_activations(zeros)).any()


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_activations_are_refused(bad: float) -> None:
    values = np.zeros((3, 20), dtype=np.float32)
    values[1, 7], values[2, 0] = bad, bad
    with pytest.raises(InputError, match=rf"token 1, channel 7 is {bad} \(2 activations"):
        quantize_activations(values, activation_format("INT8sUE8M0"))


def test_other_arrays_are_refused() -> None:
    fmt = activation_format("INT8sUE8M0")
    with pytest.raises(InputError, match=r"non-empty matrix .* not \(3,\)"):
        quantize_activations(np.zeros(3, np.float32), fmt)
    with pytest.raises(InputError, match="must be float32, not float64"):
        quantize_activations(np.zeros((1, 3)), fmt)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shape": (2, 0)}, r"shape: \(2, 0\) has no activations"),
        ({"shape": (2, 50)}, r"elements: shape \(2, 3, 16\), expected \(2, 4, 16\)"),
        ({"scale_codes": np.zeros((2, 2), np.uint16)}, r"scale_codes: shape \(2, 2\), expected"),
        ({"scale_codes": np.full((2, 3), 256, np.uint16)}, r"scale_codes: 256 is not in range"),
        ({"shape": (2, 36)}, "elements: padding at the end of a token must have code 0"),
        ({"token_exponents": None}, "token_exponents: INT8sUE4M4 has powers of two per token"),
        ({"token_exponents": np.zeros(2, np.int8)}, r"int8 of shape \(2,\), expected int16"),
        ({"token_exponents": np.full(2, 128, np.int16)}, r"128 is not in -128\.\.127"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], problem: str) -> None:
    values = np.ones((2, 37), dtype=np.float32)
    found = quantize_activations(values, activation_format("INT8sUE4M4"))
    with pytest.raises(InputError, match=problem):
        replace(found, **change)  # type: ignore[arg-type]  # each value is of its field's type


def test_a_format_without_powers_of_two_per_token_has_none() -> None:
    values = np.ones((2, 37), dtype=np.float32)
    found = quantize_activations(values, activation_format("INT8sUE8M0"))
    assert found.token_exponents is None
    with pytest.raises(InputError, match="INT8sUE8M0 has no powers of two per token"):
        replace(found, token_exponents=np.zeros(2, np.int16))
