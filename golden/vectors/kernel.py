"""Vectors of the kernel: quantized weights times quantized activations, and the float32 sums.

Every case is a small matrix with row scales and corrections where the format has them, a few tokens
of activations, as numbers and as the codes they become, and the outputs bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.activations import (
    ActivationFormat,
    QuantizedActivations,
    parse_activation_format,
    quantize_activations,
)
from golden.corrections import Corrections, column_dtype
from golden.kernel import kernel_block_size, matmul
from golden.notation import DEFAULT_BLOCK_SIZE, QuantFormat
from golden.scaling import LAYER_EXPONENT_RANGE
from golden.tensor import QuantizedTensor, decode_elements, decode_scales
from golden.vectors.decoding import moderate_bfloat16, vector_tensor
from golden.vectors.files import VectorFile, VectorStream, float32_bits, hex_strings, json_text
from golden.vectors.layers import describe_layer

__all__ = ["activation_formats", "kernel_file"]

_ROWS, _TOKENS = 3, 3
_EDGES = {"near_overflow": 127, "overflow": 134, "near_underflow": -138}
"""Exponents that the largest product is brought to."""


def activation_formats(fmt: QuantFormat, *, exhaustive: bool) -> list[ActivationFormat]:
    """Formats of activations that the vectors of a weight format have."""
    size = fmt.block_size or DEFAULT_BLOCK_SIZE
    names = [f"INT8^{size}sUE8M0", "E4M3^0sUE4M4"]
    if exhaustive:
        names += [
            "INT8^64sBF16", "INT8^0sUE4M4", f"INT4^{size}sUE8M0", f"HIF7^{size}sUE4M4",
            f"HIF8^{size}sUE8M0", "HIF8T^64sBF16", f"E2M1^{size}sUE4M4", "E2M3^64sUE8M0",
            f"E4M3^{size}sUE8M0",
        ]  # fmt: skip
    formats = (parse_activation_format(name) for name in names)
    return [one for one in formats if one is not None]


@dataclass(frozen=True)
class _Operands:
    """Random operands of one pair of formats."""

    weights: QuantFormat
    activations: ActivationFormat
    number: int

    @property
    def size(self) -> int:
        return kernel_block_size(self.weights, self.activations)

    @property
    def columns(self) -> int:
        return 2 * self.size + 3

    def stream(self, name: str) -> VectorStream:
        weights = f"{self.weights.name}/{self.weights.hif.name}"
        return VectorStream(f"kernel/{weights}/{self.activations.name}/{name}/{self.number}")

    def tensor(self, name: str) -> QuantizedTensor:
        stored = self.weights.block_shape(_ROWS, self.columns)
        seed = f"kernel/{self.weights.name}/{self.weights.hif.name}/{name}/{self.number}"
        return vector_tensor(self.weights, (_ROWS, self.columns), stored, seed)

    def inputs(self, name: str) -> NDArray[np.float64]:
        """Activations whose blocks differ in size; one block and the last token are zero."""
        stream = self.stream(name)
        blocks = -(-self.columns // self.size)
        values = stream.bell(_TOKENS * self.columns).reshape(_TOKENS, self.columns)
        shifts = stream.words(_TOKENS * blocks).reshape(_TOKENS, blocks) % 16 - 8
        values = np.ldexp(values, np.repeat(shifts, self.size, axis=1)[:, : self.columns])
        values[0, : self.size] = 0.0
        values[-1] = 0.0
        return values

    def corrections(self, name: str) -> Corrections:
        """Two entries in the first row, one in the last, none between."""
        draws = self.stream(f"{name}/corrections")
        first, second, third = (int(word) % (self.columns - 1) for word in draws.words(3))
        columns = [min(first, second), max(first, second) + 1, third]
        return Corrections(
            (_ROWS, self.columns),
            np.array([0, 2, 2, 3], dtype=np.int64),
            np.array(columns, dtype=column_dtype(self.columns)),
            draws.codes(3, moderate_bfloat16()),
        )


def _largest_exponent(tensor: QuantizedTensor, values: NDArray[np.float64]) -> int:
    """Exponent of the largest single product: no sum, whose last bit a machine could choose."""
    rows, columns = tensor.shape
    weights = np.abs(decode_elements(tensor) * decode_scales(tensor)[..., None])
    products = np.abs(values)[:, None] * weights.reshape(rows, -1)[:, :columns]
    return int(np.frexp(products.max())[1])


def _aimed(
    tensor: QuantizedTensor, values: NDArray[np.float64], exponent: int
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """The same operands with products up to ``2**exponent``: half by f, half by the activations."""
    distance = exponent - _largest_exponent(tensor, values)
    allowed = LAYER_EXPONENT_RANGE
    layer = min(max(tensor.layer_exponent + distance // 2, allowed[0]), allowed[-1])
    rest = distance - (layer - tensor.layer_exponent)
    return replace(tensor, layer_exponent=layer), np.ldexp(values, rest)


def _cancelling(
    tensor: QuantizedTensor, values: NDArray[np.float64], size: int
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """The second block takes away what the first one gave, where weights have blocks."""
    values[:, size : 2 * size] = -values[:, :size]
    if not tensor.format.block_size:
        return tensor, values
    indices, words = tensor.indices.copy(), tensor.scale_words.copy()
    indices[:, 1], words[:, 1] = indices[:, 0], words[:, 0]
    return replace(tensor, indices=indices, scale_words=words), values


def _describe(activations: QuantizedActivations, values: NDArray[np.float32]) -> dict[str, Any]:
    fmt, exponents = activations.format, activations.token_exponents
    return {
        "activations": fmt.name,
        "activation_element_format": fmt.element.name,
        "activation_scale_format": fmt.scale.name,
        "activation_block_size": fmt.block_size,
        "tokens": activations.shape[0],
        "inputs": hex_strings(float32_bits(values), 32),
        "activation_elements": activations.elements.reshape(-1).tolist(),
        "activation_scale_codes": activations.scale_codes.reshape(-1).tolist(),
        "token_exponents": None if exponents is None else exponents.tolist(),
    }


def _case(
    operands: _Operands, name: str, tensor: QuantizedTensor, inputs: NDArray[np.float64]
) -> dict[str, Any]:
    values = inputs.astype(np.float32)
    activations = quantize_activations(values, operands.activations)
    corrections = operands.corrections(name)
    wide = matmul(tensor, activations, corrections)
    narrow = matmul(tensor, activations, corrections, output="bfloat16")
    exact = matmul(tensor, activations, corrections, exact=True)
    row_scales = tensor.row_scales
    return {
        "name": f"{name}_{operands.number}",
        "rows": _ROWS,
        "columns": operands.columns,
        "kernel_block_size": operands.size,
        "layer_exponent": tensor.layer_exponent,
        "luts": [list(lut.codes) for lut in tensor.luts],
        "row_scales": None if row_scales is None else hex_strings(row_scales, 16),
        "index_plane": tensor.index_plane.tobytes().hex(),
        "scale_plane": tensor.scale_plane.tobytes().hex(),
        "correction_row_starts": corrections.indptr.tolist(),
        "correction_columns": corrections.columns.tolist(),
        "correction_values": hex_strings(corrections.values, 16),
        **_describe(activations, values),
        "float32": hex_strings(wide.bits, 32),
        "bfloat16": hex_strings(narrow.bits, 16),
        "exact_float32": hex_strings(exact.bits, 32),
    }


def _cases(operands: _Operands) -> Iterator[dict[str, Any]]:
    tensor, values = operands.tensor("usual"), operands.inputs("usual")
    # Scales of 8-bit exponents may be far from 1, and inputs must be float32.
    yield _case(operands, "usual", *_aimed(tensor, values, 8))
    for name, exponent in _EDGES.items():
        tensor, values = operands.tensor(name), operands.inputs(name)
        yield _case(operands, name, *_aimed(tensor, values, exponent))
    tensor, values = operands.tensor("cancelling"), operands.inputs("cancelling")
    tensor, values = _cancelling(*_aimed(tensor, values, 8), operands.size)
    yield _case(operands, "cancelling", tensor, values)


def kernel_file(fmt: QuantFormat, *, exhaustive: bool, repeats: int) -> VectorFile:
    """Products of one weight format with several formats of activations.

    Parameters
    ----------
    fmt : QuantFormat
    exhaustive : bool
        With every kind of activations.
    repeats : int
        Random operands of each kind of case.
    """
    cases = [
        case
        for activations in activation_formats(fmt, exhaustive=exhaustive)
        for number in range(repeats)
        for case in _cases(_Operands(fmt, activations, number))
    ]
    outputs = sum(len(case["float32"]) for case in cases)
    return VectorFile(json_text({**describe_layer(fmt), "cases": cases}), outputs)
