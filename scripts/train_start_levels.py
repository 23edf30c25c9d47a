"""Compute the levels from which per-layer training starts (`START_LEVELS` in golden/training.py).

Most layers are close to normal within a row, some have heavier tails, so LUTs trained once on
random deviates of both kinds are a good start for every layer. Run it as
`python scripts/train_start_levels.py 4 HIF8T 2 normal --tries 100`. It descends from several
beginnings, then from perturbed copies of the best result so far, and prints that result.
The deviates come from NumPy's PCG64; another generator gives levels that differ by a grid step here
and there.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import fixed_lut
from golden.formats import HIF7, HIF_FORMATS, HifFormat
from golden.notation import parse_format
from golden.quantize import scaled_layer
from golden.training import (
    START_LEVELS,
    Training,
    TrainingSample,
    initial_levels,
    train_codebooks,
)

Levels = NDArray[np.int64]

_MOVED = 0.15  # share of the entries that a perturbation moves


def deviates(family: str, blocks: int) -> NDArray[np.float32]:
    """Random blocks of a family, shape (blocks, 16)."""
    rng = np.random.default_rng(1)
    if family == "normal":
        values = rng.standard_normal((blocks, 16))
    elif family == "student6":
        values = rng.standard_t(6.0, (blocks, 16))
    else:
        values = rng.laplace(size=(blocks, 16))
    return values.astype(np.float32)


def beginnings(count: int, hif: HifFormat, luts: int) -> list[list[Levels]]:
    """Start levels that owe nothing to earlier training, and the results of earlier training."""
    starts = [
        [initial_levels(hif, count, shift + number / luts) for number in range(luts)]
        for shift in (0.0, 0.25)
    ]
    ratio = hif.full_scale // HIF7.full_scale
    if count == 16:
        books = [fixed_lut(name, 16, HIF7).values * ratio for name in ("BOF4", "NF4")]
        starts.append(books[:luts])
    for (name, entries, number), families in START_LEVELS.items():
        if (entries, number) == (count, luts) and HIF_FORMATS[name].full_scale <= hif.full_scale:
            factor = hif.full_scale // HIF_FORMATS[name].full_scale
            starts += [[np.array(one) * factor for one in pair] for pair in families.values()]
    return starts


def perturbed(
    luts: Sequence[Levels], hif: HifFormat, rng: np.random.Generator
) -> list[Levels] | None:
    """Some entries moved by one or two grid values, None if a LUT is none any more."""
    grid = np.array([int(value) for value in hif.canonical], dtype=np.int64)
    moved = []
    for levels in luts:
        places = np.searchsorted(grid, levels)
        steps = rng.choice([-2, -1, 1, 2], size=len(levels)) * (rng.random(len(levels)) < _MOVED)
        places = np.clip(places + steps, 0, len(grid) - 1)
        if (np.diff(places) < 1).any():
            return None
        moved.append(grid[places])
    return moved


def main() -> None:
    """Print the levels for the index bits, HIF format, number of LUTs and family asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bits", type=int, choices=(4, 5, 6))
    parser.add_argument("hif", choices=HIF_FORMATS)
    parser.add_argument("luts", type=int, choices=(1, 2))
    parser.add_argument("family", choices=("normal", "student6", "laplace"))
    parser.add_argument("--blocks", type=int, default=8192)
    parser.add_argument("--tries", type=int, default=0, help="perturbations after the beginnings")
    asked = parser.parse_args()
    hif, count = HIF_FORMATS[asked.hif], 1 << asked.bits

    weights = deviates(asked.family, asked.blocks)
    fmt = parse_format("-".join([f"DD{asked.bits}"] * asked.luts) + "sS1E5M5", hif)
    sample = TrainingSample(scaled_layer(weights, fmt, 0.88 * hif.full_scale), asked.blocks, count)
    effort = Training(blocks=asked.blocks, rounds=0, sweeps=20, least_gain=1e-4)
    power = float((weights.astype(np.float64) ** 2).sum())
    rng = np.random.default_rng(2)

    best: list[Levels] = []
    least = np.inf
    starts = beginnings(count, hif, asked.luts)
    for number in range(len(starts) + asked.tries):
        start = starts[number] if number < len(starts) else perturbed(best, hif, rng)
        if start is None:
            continue
        luts, error = train_codebooks(sample, start, hif, effort=effort)
        if error < least:
            least, best = error, [lut.values for lut in luts]
            print(f"# start {number}: relative MSE {error / power:.4e}", flush=True)
            for levels in best:
                print("    ", levels.tolist(), flush=True)


if __name__ == "__main__":
    main()
