"""Fixed codebooks, as real levels and as codes on the HIF grid.

A codebook is stored mirrored: the end of largest magnitude is the negative one, because only that
end of a two's-complement significand is a power of two and so holds the full scale exactly.

What each table comes from:

* NF4 [paper: the name]: the 16 levels published with QLoRA (Dettmers et al., arXiv 2305.14314,
  appendix E, and bitsandbytes' table), mirrored.
* BOF4 [paper: the name]: block-wise optimal float with signed normalisation, mean squared error
  (Blumenberg et al., arXiv 2505.06653, BOF4-S); computed by :func:`golden.bof4.bof4_levels`, and a
  test computes every table again.
* Split87 [rebuilt: the paper gives the name only]: seven magnitudes of E2M1 on both sides and zero,
  plus the level that its redundant -0 code frees.
* SH4 [rebuilt: the paper gives the name only]: sinh-spaced, ``sinh(k / 8) / sinh(1)``, k = -7..8.
* NF4T, BOF4T, Split87T, SH4T [ours]: each of these with all levels moved up by half an inner step,
  its *offset twin*. A block in which no weight is near zero has no use for a level at zero, and a
  pair whose levels interleave reaches twice as many values near zero as one that shares them.
* user codebooks: :mod:`golden.codebook_file`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from golden.convert import decode_array, encode_array, level_table
from golden.errors import InputError
from golden.formats import HifFormat

__all__ = [
    "BLOCK_SIZES",
    "FIXED_CODEBOOKS",
    "PAPER_CODEBOOKS",
    "TWIN_CODEBOOKS",
    "Lut",
    "fixed_levels",
    "fixed_lut",
    "lut_from_levels",
]

BLOCK_SIZES = (8, 16, 32, 64)
"""Block sizes (weights per scale word) of codebook formats."""

# Published order and sign; the extreme of both sides is 1.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Sixteenths; 12 below and 16 above zero are E2M1's top magnitude and the freed level.
_SPLIT87 = tuple(
    k / 16 for k in (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16)
)  # fmt: skip

# Decimal constants rather than math.sinh at run time: libm may differ between machines.
_SH4 = (
    -0.8432655127515678, -0.6997242143587125, -0.5671303501574106, -0.443409441985037,
    -0.32662583223171765, -0.21495239978860511, -0.10664197408831189, 0.0,
    0.10664197408831189, 0.21495239978860511, 0.32662583223171765, 0.443409441985037,
    0.5671303501574106, 0.6997242143587125, 0.8432655127515678, 1.0,
)  # fmt: skip

_BOF4 = {
    8: (
        -0.8972904112, -0.7271185482, -0.5800959721, -0.4488326846,
        -0.3283956139, -0.2152227402, -0.1065379980, 0.0,
        0.1001980754, 0.2021793087, 0.3078690988, 0.4195063468,
        0.5398841133, 0.6727302720, 0.8233708579, 1.0,
    ),
    16: (
        -0.8867418313, -0.7102948684, -0.5628646926, -0.4337303064,
        -0.3165589463, -0.2071602045, -0.1024672485, 0.0,
        0.0964974293, 0.1948502080, 0.2971004573, 0.4057139134,
        0.5239437582, 0.6564775989, 0.8107474082, 1.0,
    ),
    32: (
        -0.8732956128, -0.6907623701, -0.5437138363, -0.4173574206,
        -0.3039144177, -0.1986213533, -0.0981754536, 0.0,
        0.0926251234, 0.1871527174, 0.2857118837, 0.3909584758,
        0.5065712408, 0.6382247529, 0.7958384266, 1.0,
    ),
    64: (
        -0.8568214120, -0.6691702077, -0.5234593517, -0.4004492265,
        -0.2910344741, -0.1899917898, -0.0938557703, 0.0,
        0.0887641831, 0.1794525882, 0.2742484767, 0.3759495017,
        0.4885909354, 0.6187701108, 0.7790818343, 1.0,
    ),
}  # fmt: skip

PAPER_CODEBOOKS = ("NF4", "BOF4", "Split87", "SH4")
"""Names of the paper's fixed codebooks, each of 16 levels."""

TWIN_CODEBOOKS = tuple(f"{name}T" for name in PAPER_CODEBOOKS)
"""Names of their offset twins, each of 16 levels."""

FIXED_CODEBOOKS = PAPER_CODEBOOKS + TWIN_CODEBOOKS
"""Names of all codebooks whose levels do not depend on the layer."""


@dataclass(frozen=True)
class Lut:
    """One lookup table: ascending levels as canonical codes of a HIF format.

    Parameters
    ----------
    hif : HifFormat
        Format of the entries.
    codes : tuple of int
        One canonical code per index; ``2**index_bits`` of them, values strictly ascending.
    """

    hif: HifFormat
    codes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that entries are canonical codes in ascending order."""
        if len(self.codes) < 2 or len(self.codes) & (len(self.codes) - 1):
            raise InputError(f"a LUT has a power of two of entries, not {len(self.codes)}")
        if not all(0 <= code < 1 << self.hif.width for code in self.codes):
            raise InputError(f"LUT entries must be {self.hif.width}-bit codes, not {self.codes}")
        values = self.values  # raises for a reserved code
        for index, (code, value) in enumerate(zip(self.codes, values, strict=True)):
            if self.hif.canonical[value] != code:
                raise InputError(
                    f"LUT entry {index}: {self.hif.name} code {code:#x} is not canonical"
                )
        if not values.min() < 0 < values.max():
            raise InputError(f"LUT entries must lie on both sides of zero, not {values.tolist()}")
        if not (np.diff(values) > 0).all():
            raise InputError(f"LUT entries must ascend strictly, not {values.tolist()}")

    @property
    def values(self) -> NDArray[np.int64]:
        """Integer values of the entries, ascending, shape (entries,)."""
        return decode_array(self.codes, self.hif).astype(np.int64)


def fixed_levels(name: str, block_size: int) -> tuple[float, ...]:
    """Real levels of a fixed codebook as stored: ascending, mirrored, from -1 to at most 1.

    Parameters
    ----------
    name : str
        One of :data:`FIXED_CODEBOOKS`.
    block_size : int
        One of :data:`BLOCK_SIZES`; only BOF4 depends on it.

    Raises
    ------
    InputError
        If there is no such codebook, or no table for that block size.
    """
    if block_size not in BLOCK_SIZES:
        raise InputError(f"codebooks exist for blocks of {BLOCK_SIZES} weights, not {block_size}")
    tables = {"NF4": _NF4, "BOF4": _BOF4[block_size], "Split87": _SPLIT87, "SH4": _SH4}
    if name in TWIN_CODEBOOKS:
        return _offset_twin(fixed_levels(name.removesuffix("T"), block_size))
    if name not in tables:
        raise InputError(f"unknown codebook {name!r}: fixed ones are {', '.join(FIXED_CODEBOOKS)}")
    return tuple(-level for level in reversed(tables[name]))


def _offset_twin(levels: Sequence[float]) -> tuple[float, ...]:
    """All levels moved up by half the mean of the two steps next to the level at zero."""
    zero = levels.index(0.0)
    half_step = (levels[zero + 1] - levels[zero - 1]) / 4
    return tuple(min(level + half_step, 1.0) for level in levels)


def lut_from_levels(levels: Sequence[float], hif: HifFormat) -> Lut:
    """Round real levels in [-1, 1] to the HIF grid: nearest, ties to even, times the full scale.

    Raises
    ------
    InputError
        If a level is outside [-1, 1], or two levels round to the same entry.
    """
    real = level_table(levels).values
    if abs(real).max() > 1:
        raise InputError(f"codebook levels must lie in [-1, 1], not {list(levels)}")
    return Lut(hif, tuple(int(code) for code in encode_array(real * hif.full_scale, hif)))


@lru_cache(maxsize=64)
def fixed_lut(name: str, block_size: int, hif: HifFormat) -> Lut:
    """LUT of a fixed codebook on the grid of ``hif``; errors as :func:`fixed_levels`."""
    return lut_from_levels(fixed_levels(name, block_size), hif)
