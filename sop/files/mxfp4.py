"""Experts in MXFP4, the type that gpt-oss ships in, read as the tensors that they stand for.

``x_blocks`` (U8, [experts, outputs, groups, 16]) holds two E2M1 codes in each byte, the first in
the low nibble; ``x_scales`` (U8, [experts, outputs, groups]) one E8M0 scale for each 32 weights.
They stand for ``x``, which transformers holds as [experts, inputs, outputs].

Source: ``integrations/mxfp4.py`` of transformers (``convert_moe_packed_tensors``); OCP
Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.convert import decode_array
from golden.formats import E2M1
from sop.files.tensor_info import TensorInfo

__all__ = ["TYPE_NAME", "Packed", "find_packed", "unpack"]

TYPE_NAME = "MXFP4"
_GROUP_BYTES = 16
_BIAS, _NAN = 127, 255  # of E8M0


@dataclass(frozen=True)
class Packed:
    """Names of the two tensors that hold an expert's weights."""

    blocks: str
    scales: str


def find_packed(tensors: Mapping[str, TensorInfo]) -> dict[TensorInfo, Packed]:
    """Return the tensors that pairs of blocks and scales stand for, and their parts.

    Pairs of other types or shapes are not taken.
    """
    found = {}
    for name, info in tensors.items():
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if stem == name or scales is None or stem in tensors or len(info.shape) != 4:
            continue
        experts, outputs, groups, size = info.shape
        fits = size == _GROUP_BYTES and scales.shape == (experts, outputs, groups)
        if fits and info.source_type == scales.source_type == "U8":
            shape = (experts, 2 * size * groups, outputs)
            bits = info.bits + scales.bits
            raw_bits = 16 * experts * 2 * size * groups * outputs
            whole = TensorInfo(stem, shape, TYPE_NAME, bits, raw_bits, "BF16")
            found[whole] = Packed(name, f"{stem}_scales")
    return found


def unpack(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the weights of one expert.

    Parameters
    ----------
    blocks : uint8 array, shape (outputs, groups, 16)
    scales : uint8 array, shape (outputs, groups)

    Returns
    -------
    weights : float32 array, shape (inputs, outputs)
        Exact; NaN where the scale is, infinite beyond float32's range.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, -1)
    exponents = scales.astype(np.int32)[..., None] - _BIAS
    with np.errstate(over="ignore"):
        values = np.ldexp(decode_array(codes, E2M1).astype(np.float32), exponents)
    values[scales == _NAN] = np.nan
    return np.ascontiguousarray(values.reshape(len(blocks), -1).T)
