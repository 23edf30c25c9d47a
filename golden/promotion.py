"""E2M3 as HIF codes: how promoted tensors share a datapath with codebooks.

Every E2M3 value times 8 is an integer up to 60 that every HIF format holds, so hardware that
multiplies LUT entries takes promoted weights too: their codes are replaced, and the layer exponent
is 3 lower. Choice of this project; the paper names promotion only.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from golden.convert import decode_array, encode_array
from golden.formats import E2M3, HifFormat, NumberFormat
from golden.notation import QuantFormat

__all__ = [
    "PROMOTED",
    "PROMOTED_EXPONENT",
    "decoded_format",
    "element_exponent",
    "is_promoted",
    "promoted_codes",
]

PROMOTED = E2M3
"""Atom whose codes become HIF codes."""

PROMOTED_EXPONENT = -E2M3.mantissa_bits
"""A promoted weight is the integer of its HIF code times two to this power."""


def is_promoted(fmt: QuantFormat) -> bool:
    """Whether the elements of a format become HIF codes though they are no LUT indices."""
    return fmt.atom == PROMOTED


def decoded_format(fmt: QuantFormat, hif: HifFormat) -> NumberFormat:
    """Number format of elements after the lookup, where LUT entries and E2M3 are ``hif``."""
    return hif if fmt.atom is None or is_promoted(fmt) else fmt.atom


def element_exponent(fmt: QuantFormat) -> int:
    """Exponent that elements after the lookup are to be scaled with."""
    return PROMOTED_EXPONENT if is_promoted(fmt) else 0


@lru_cache(maxsize=8)
def promoted_codes(hif: HifFormat) -> NDArray[np.uint8]:
    """HIF code of every E2M3 code, shape (64,).

    Exact: each code means the E2M3 value times ``2**-PROMOTED_EXPONENT``.
    """
    values = decode_array(np.arange(1 << PROMOTED.width, dtype=np.uint8), PROMOTED)
    codes = encode_array(np.ldexp(values, -PROMOTED_EXPONENT), hif).astype(np.uint8)
    codes.flags.writeable = False
    return codes
