"""Activation formats, and how activations are quantized to them at run time.

Names are those of :mod:`golden.notation`, read for activations: ``INT8^32sBF16`` is symmetric
8-bit integers with one bfloat16 scale per block of 32 input channels of one token; ``^0`` is one
scale a token. Scales narrower than 8 exponent bits, such as UE4M4, come with one power of two per
token, because their range alone holds no whole token. ``none`` leaves activations in float.

A scale is made from the largest magnitude of its block (mode ``absmax``), which maps to the smaller
end of the element format. Scales with mantissa bits: nearest code, ties to even. Powers of two: the
smallest that is not below, so that no element saturates. A block of zeros gets scale code 0 and
elements 0; any other block never gets scale code 0. docs/kernel.md says what hardware needs for it.

As in :mod:`golden.scaling`, only IEEE operations on one float64 at a time decide anything. Inputs
have 24 significant bits and a scale times a midpoint at most 17, so a rounded quotient lies on the
same side of a midpoint as the exact one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.convert import RoundingTable, decode_array, format_table
from golden.errors import InputError
from golden.formats import (
    BF16,
    E2M1,
    E2M3,
    E4M3,
    HIF7,
    HIF8,
    HIF8T,
    INT4,
    INT8,
    FloatFormat,
    NumberFormat,
)
from golden.notation import parse_format
from golden.scaling import LAYER_EXPONENT_RANGE, ScaleRounder, covering_exponents
from golden.tensor import check_code_array

__all__ = [
    "ACTIVATION_ELEMENTS",
    "DEFAULT_ACTIVATION_FORMAT",
    "NO_QUANTIZATION",
    "ActivationFormat",
    "QuantizedActivations",
    "decode_activations",
    "parse_activation_format",
    "quantize_activations",
]

Float64 = NDArray[np.float64]

ACTIVATION_ELEMENTS: dict[str, NumberFormat] = {
    fmt.name: fmt for fmt in (INT8, INT4, HIF7, HIF8, HIF8T, E2M1, E2M3, E4M3)
}
"""Element formats of activations."""

DEFAULT_ACTIVATION_FORMAT = "INT8sUE8M0"
"""The cheapest scales in hardware, at a tenth of what 4-bit weights cost (docs/kernel.md)."""

NO_QUANTIZATION = "none"
"""Name that stands for activations in float."""

# Activations quantized at a time: a few float64 arrays of this size stay below 100 MB.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ActivationFormat:
    """A parsed name; made by :func:`parse_activation_format`.

    Attributes
    ----------
    name : str
        Canonical spelling: without ``^16``.
    element : NumberFormat
    block_size : int
        Channels per scale; 0 is one scale for a token.
    scale : FloatFormat
        Unsigned, or BF16, of which only positive values occur.
    """

    name: str
    element: NumberFormat
    block_size: int
    scale: FloatFormat

    @property
    def has_token_exponents(self) -> bool:
        """Whether each token has a power of two beside its scales."""
        return self.scale.exponent_bits < 8

    def blocks(self, channels: int) -> tuple[int, int]:
        """(Blocks, elements of a block) of a token with so many channels."""
        size = self.block_size or channels
        return -(-channels // size), size


def parse_activation_format(name: str) -> ActivationFormat | None:
    """Parse the name of an activation format; ``none`` gives None.

    Raises
    ------
    InputError
        If the name is not of the notation, or names something that activations cannot have.
    """
    if name == NO_QUANTIZATION:
        return None
    try:
        fmt = parse_format(name)
    except InputError as error:
        raise InputError(f"activations: {error}") from None
    where = f"activation format {name!r}"
    if fmt.atom is None or fmt.atom.name not in ACTIVATION_ELEMENTS:
        known = ", ".join(ACTIVATION_ELEMENTS)
        element = fmt.atom.name if fmt.atom is not None else "-".join(fmt.codebooks)
        raise InputError(f"{where}: element {element}, must be one of {known}")
    scale = fmt.word.scale
    if scale.signed and scale != BF16:
        raise InputError(
            f"{where}: scale {scale.name} has a sign, which scales of activations do not use; "
            "must be UE<e>M<m> or BF16"
        )
    return ActivationFormat(fmt.name, fmt.atom, fmt.block_size, scale)


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """Activations of some tokens as the kernel takes them.

    Parameters
    ----------
    format : ActivationFormat
    shape : tuple of int
        (tokens, channels), without padding.
    elements : uint8 array, shape (tokens, blocks, block elements)
        Codes of ``format.element``; those of padding are 0.
    scale_codes : uint16 array, shape (tokens, blocks)
        Codes of ``format.scale``.
    token_exponents : int16 array, shape (tokens,), or None
        In range(-128, 128), where the format has them: every scale of the token is times two to
        this power.
    saturated : int
        How many elements the quantizer clipped: those beyond an end by more than half of the last
        step. 0 where the codes come from elsewhere.

    Raises
    ------
    InputError
        If the parts do not fit each other, or a code is out of range; the message names the part.
        (NaN and reserved codes are found by :func:`decode_activations`.)
    """

    format: ActivationFormat
    shape: tuple[int, int]
    elements: NDArray[np.uint8]
    scale_codes: NDArray[np.uint16]
    token_exponents: NDArray[np.int16] | None = None
    saturated: int = 0

    def __post_init__(self) -> None:
        """Check every part against the format and the shape."""
        fmt, (tokens, channels) = self.format, self.shape
        if tokens < 1 or channels < 1:
            raise InputError(f"shape: {self.shape} has no activations")
        blocks, size = fmt.blocks(channels)
        check_code_array("elements", self.elements, (tokens, blocks, size), 1 << fmt.element.width)
        check_code_array("scale_codes", self.scale_codes, (tokens, blocks), 1 << fmt.scale.width)
        if self.elements.reshape(tokens, -1)[:, channels:].any():
            raise InputError("elements: padding at the end of a token must have code 0")
        exponents = self.token_exponents
        if fmt.has_token_exponents != (exponents is not None):
            raise InputError(
                f"token_exponents: {fmt.name} has {'' if exponents is None else 'no '}"
                "powers of two per token"
            )
        if exponents is None:
            return
        if exponents.shape != (tokens,) or exponents.dtype != np.int16:
            raise InputError(
                f"token_exponents: {exponents.dtype} of shape {exponents.shape}, expected int16, "
                f"({tokens},)"
            )
        outside = [value for value in exponents.tolist() if value not in LAYER_EXPONENT_RANGE]
        if outside:
            raise InputError(f"token_exponents: {outside[0]} is not in -128..127")

    @property
    def scales(self) -> Float64:
        """Real scale of every block, exact, float64, shape (tokens, blocks).

        Raises
        ------
        InputError
            If a code is reserved.
        """
        scales = decode_array(self.scale_codes, self.format.scale)
        if self.token_exponents is None:
            return scales
        return np.ldexp(scales, self.token_exponents[:, None].astype(np.int64))


def decode_activations(activations: QuantizedActivations) -> Float64:
    """Exact values of activations, without padding.

    At most 16 significant bits; some may lie outside float32's range, hence float64. A zero is
    always +0.

    Returns
    -------
    values : float64 array, shape (tokens, channels)

    Raises
    ------
    InputError
        If a code is NaN or reserved.
    """
    tokens, channels = activations.shape
    elements = decode_array(activations.elements, activations.format.element)
    values = elements * activations.scales[..., None] + 0.0
    return values.reshape(tokens, -1)[:, :channels]


def _check_activations(values: NDArray[np.float32]) -> None:
    if values.ndim != 2 or values.size == 0:
        raise InputError(
            f"activations must be a non-empty matrix (tokens, channels), not {values.shape}"
        )
    if values.dtype != np.float32:
        raise InputError(f"activations must be float32, not {values.dtype}")
    finite = np.isfinite(values)
    if not finite.all():
        token, channel = (int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"activation of token {token}, channel {channel} is {values[token, channel]} "
            f"({int((~finite).sum())} activations are not finite)"
        )


def quantize_activations(
    values: NDArray[np.float32], fmt: ActivationFormat
) -> QuantizedActivations:
    """Quantize activations, each token for itself.

    Parameters
    ----------
    values : float32 array, shape (tokens, channels)
        Finite. Not modified.
    fmt : ActivationFormat

    Raises
    ------
    InputError
        If ``values`` is not a non-empty float32 matrix, or holds NaN or infinity; the message names
        token and channel.
    """
    _check_activations(values)
    tokens, channels = values.shape
    blocks, size = fmt.blocks(channels)
    elements = np.zeros((tokens, blocks, size), dtype=np.uint8)
    scale_codes = np.zeros((tokens, blocks), dtype=np.uint16)
    exponents = np.zeros(tokens, dtype=np.int16) if fmt.has_token_exponents else None
    saturated = 0
    step = max(1, _CHUNK // (blocks * size))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        padded = np.zeros((len(values[part]), blocks * size))
        padded[:, :channels] = values[part]
        chunk = padded.reshape(-1, blocks, size)
        absmax = np.abs(chunk).max(axis=2)
        units = np.ones(len(chunk))
        if exponents is not None:
            exponents[part] = _token_exponents(absmax.max(axis=1), fmt)
            units = np.ldexp(1.0, exponents[part].astype(np.int64))
        scale_codes[part] = _scale_codes(absmax / units[:, None], fmt)
        scales = decode_array(scale_codes[part], fmt.scale) * units[:, None]
        # Scale 0 occurs only in a block of zeros, of which any divisor makes zeros.
        quotients = chunk / np.where(scales == 0, 1.0, scales)[..., None]
        elements[part], clipped = _nearest(quotients, fmt.element)
        saturated += clipped
    return QuantizedActivations(
        fmt, (tokens, channels), elements, scale_codes, exponents, saturated
    )


def _token_exponents(absmax: Float64, fmt: ActivationFormat) -> NDArray[np.int64]:
    """Smallest power of two for each token with which no scale exceeds the scale format.

    Tokens so small that it would not fit the 8-bit field take the smallest that does.
    """
    limit = format_table(fmt.element).small_end * float(fmt.scale.max_value)
    wanted = covering_exponents(absmax, limit)
    return np.clip(wanted, LAYER_EXPONENT_RANGE[0], LAYER_EXPONENT_RANGE[-1])


def _scale_codes(absmax: Float64, fmt: ActivationFormat) -> NDArray[np.uint16]:
    """Scale code of every block, by its largest magnitude in units of the token's power of two."""
    rounder = ScaleRounder(fmt.scale)
    wanted = absmax / format_table(fmt.element).small_end
    codes = rounder.nearest(wanted) if fmt.scale.mantissa_bits else rounder.covering(wanted)
    return np.where(absmax == 0, np.uint16(0), codes)


def _nearest(quotients: Float64, element: NumberFormat) -> tuple[NDArray[np.uint8], int]:
    """Codes of the nearest values, never -0, and how many were clipped."""
    table = format_table(element)
    codes = np.array(list(element.canonical.values()), dtype=np.uint8)
    low, high = _saturation_thresholds(table)
    clipped = np.count_nonzero((quotients < low) | (quotients > high))
    return codes[table.nearest_index(quotients)], int(clipped)


def _saturation_thresholds(table: RoundingTable) -> tuple[float, float]:
    """Where half a step beyond each end is."""
    first, second, *_, before, last = table.values.tolist()
    return first - (second - first) / 2, last + (last - before) / 2
