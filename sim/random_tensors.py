"""Quantized tensors of random codes; every weight is in the normal range of float32."""

import numpy as np

from golden.codebooks import Lut
from golden.convert import code_dtype, round_bfloat16
from golden.formats import HifFormat
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor

__all__ = ["random_tensor"]

# Scale codes from 1/8 to 7/8 of a format's range keep every product in float32's normal range,
# whatever the layer exponents below are.
_SCALE_RANGE = (1, 7, 8)
_LAYER_EXPONENTS = (-3, 3)


def _random_lut(rng: np.random.Generator, hif: HifFormat, entries: int) -> Lut:
    values = np.array(sorted(hif.canonical))
    below, above = values[values < 0], values[values > 0]
    chosen = [rng.choice(below, 1), rng.choice(above, 1)]
    others = np.setdiff1d(values, np.concatenate(chosen))
    chosen.append(rng.choice(others, entries - 2, replace=False))
    return Lut(hif, tuple(hif.canonical[value] for value in np.sort(np.concatenate(chosen))))


def random_tensor(
    rng: np.random.Generator, fmt: QuantFormat, shape: tuple[int, int]
) -> QuantizedTensor:
    """A tensor of random indices, scales, LUTs and row scales.

    Parameters
    ----------
    rng : numpy.random.Generator
    fmt : QuantFormat
    shape : tuple of int
        (rows, columns).
    """
    stored = fmt.block_shape(*shape)
    low, high, parts = _SCALE_RANGE
    codes = 1 << fmt.word.scale.width
    scales = rng.integers(codes * low // parts, codes * high // parts, stored[:2], dtype=np.uint16)
    metabits = rng.integers(0, 1 << fmt.word.metabit_bits, stored[:2], dtype=np.uint16)
    row_scales = round_bfloat16(rng.uniform(0.5, 2, shape[0]).astype(np.float32))
    return QuantizedTensor(
        fmt,
        shape,
        rng.integers(0, 1 << fmt.index_bits, stored, dtype=code_dtype(fmt.index_bits)),
        fmt.word.join(scales, metabits),
        tuple(_random_lut(rng, fmt.hif, fmt.lut_entries) for _ in fmt.codebooks),
        int(rng.integers(*_LAYER_EXPONENTS)),
        row_scales if fmt.row_scale else None,
    )
