"""Per-layer search of the codebooks that reconstruct a layer best [paper].

Every candidate codebook is tried once on every block. The errors are kept, so the error of a pair
is a sum of minima, and all pairs of a dozen candidates cost little more than the dozen themselves.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.convert import level_table
from golden.errors import InputError
from golden.formats import HifFormat
from golden.notation import TRAINED_CODEBOOKS, QuantFormat
from golden.quantize import ScaledLayer, choose_metabits, fitted_layer, scaled_layer
from golden.scaling import BlockEncoding, ScaleMode
from golden.tensor import QuantizedTensor
from golden.training import (
    Training,
    TrainingSample,
    best_start,
    start_levels,
    train_codebooks,
)

__all__ = ["Candidate", "PairSearch", "fixed_candidates", "search_codebooks"]


@dataclass(frozen=True)
class Candidate:
    """A codebook that may be chosen: its name in format names, and its LUT."""

    name: str
    lut: Lut


@dataclass(frozen=True, eq=False)
class PairSearch:
    """Result of :func:`search_codebooks`.

    Attributes
    ----------
    tensor : QuantizedTensor
        The layer under the codebooks chosen.
    error : float
        Its activation-weighted squared error, under the f or the row scales that fit its LUTs.
    errors : tuple of (names, error)
        Every codebook or pair that was judged, in order of trial: its names joined by ``-``, and
        the error of the judged blocks under it, all with the f or the row scales that fit the
        smallest end of all candidates. Trained codebooks may occur with several tables.
    """

    tensor: QuantizedTensor
    error: float
    errors: tuple[tuple[str, float], ...]


def fixed_candidates(block_size: int, hif: HifFormat) -> list[Candidate]:
    """All fixed codebooks, offset twins included."""
    return [Candidate(name, fixed_lut(name, block_size, hif)) for name in FIXED_CODEBOOKS]


def _total(errors: NDArray[np.float64]) -> float:
    """Sum in block order, the same on every machine."""
    return float(np.cumsum(errors)[-1])


def _small_end(hif: HifFormat, candidates: Sequence[Candidate]) -> float:
    """Smallest magnitude of an end over all candidates, trained ones as they usually come out."""
    ends = [level_table(candidate.lut.values).small_end for candidate in candidates]
    return min([0.8125 * hif.full_scale, *ends])


def _trained_candidates(
    layer: ScaledLayer, fmt: QuantFormat, fixed: Sequence[Candidate], training: Training
) -> list[Candidate]:
    """Trained codebooks: a pair trained together, and a partner for the best fixed codebooks."""
    name = next(book for book, bits in TRAINED_CODEBOOKS.items() if bits == fmt.index_bits)
    sample = TrainingSample(layer, training.blocks, fmt.lut_entries)
    starts = start_levels(fmt.hif, fmt.lut_entries, len(fmt.codebooks))
    luts, _ = train_codebooks(sample, best_start(sample, starts), fmt.hif, effort=training)
    found = list(luts)
    if len(fmt.codebooks) == 2 and training.partners:
        errors = {book.name: sample.rank(book.lut.values).errors for book in fixed}
        with_trained = sample.rank(luts[1].values).errors
        order = sorted(
            range(len(fixed)),
            key=lambda i: (_total(np.minimum(errors[fixed[i].name], with_trained)), i),
        )
        for position in order[: training.partners]:
            start = [fixed[position].lut.values, luts[1].values]
            pair, _ = train_codebooks(
                sample, start, fmt.hif, trained=(False, True), effort=training
            )
            found.append(pair[1])
    unique = list(dict.fromkeys(found))
    return [Candidate(name, lut) for lut in unique]


def search_codebooks(
    weights: NDArray[np.float32],
    template: QuantFormat,
    *,
    candidates: Sequence[Candidate] = (),
    training: Training | None = None,
    judged_blocks: int | None = None,
    channel_norms: NDArray[np.floating] | None = None,
    excluded: NDArray[np.bool_] | None = None,
) -> PairSearch:
    """Quantize a layer with the codebook, or the pair of codebooks, that gives the least error.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    template : QuantFormat
        A codebook format. How many codebooks it has, their index bits, HIF format, block size and
        scale word are what the result has; which ones it names does not matter.
    candidates : sequence of Candidate
        Codebooks to try besides the trained ones (:func:`fixed_candidates`, the user's own).
    training : Training, optional
        Also try codebooks trained on this layer, with that effort.
    judged_blocks : int, optional
        Judge the codebooks by tabulated errors of so many blocks, evenly spaced. All blocks,
        exactly, if not given.
    channel_norms : float array, shape (columns,), optional
        See :func:`golden.blocks.usable_channel_norms`.
    excluded : bool array, shape (rows, columns), optional
        Weights that a sparse correction will set right: they count neither in an extreme nor in an
        error (:mod:`golden.outliers`).

    Returns
    -------
    result : PairSearch
        With the codebook or pair of the least judged error, the first of equals.

    Raises
    ------
    InputError
        If there are too few candidates, they do not fit the template, or the weights cannot be
        quantized.

    Notes
    -----
    Paper, abstract: per-layer pair search over fixed and dynamic codebooks. What is tried, and in
    which order, is this project's own.
    """
    pool = list(candidates)
    small_end = _small_end(template.hif, pool)
    layer = scaled_layer(weights, template, small_end, channel_norms, excluded)
    if training is not None:
        pool += _trained_candidates(layer, template, pool, training)
    count = len(template.codebooks)
    if len(pool) < max(count, 1):
        raise InputError(f"{template.name}: {len(pool)} candidates, it needs at least {count}")
    for candidate in pool:
        if len(candidate.lut.codes) != template.lut_entries or candidate.lut.hif != template.hif:
            raise InputError(
                f"codebook {candidate.name} has {len(candidate.lut.codes)} entries of "
                f"{candidate.lut.hif.name}, {template.name} needs {template.lut_entries} of "
                f"{template.hif.name}"
            )
    tables = [level_table(candidate.lut.values) for candidate in pool]
    if judged_blocks is None:
        encodings = layer.encode(tables, ScaleMode.SEARCH)
    else:
        sample = TrainingSample(layer, judged_blocks, template.lut_entries)
        encodings = [sample.rank(candidate.lut.values) for candidate in pool]
    judged = _judge(encodings, count)
    _, members = min(judged)
    fmt = template.with_codebooks(tuple(pool[member].name for member in members))
    used = [tables[member] for member in members]
    # Candidates were judged under the f or the row scales of the smallest end of them all.
    layer = fitted_layer(weights, fmt, used, ScaleMode.SEARCH, channel_norms, excluded)
    metabits, encoding = choose_metabits(layer.encode(used, ScaleMode.SEARCH))
    luts = [pool[member].lut for member in members]
    tensor = layer.assemble(fmt, luts, metabits, encoding.scale_codes)
    error = _total(encoding.errors)
    table = tuple(("-".join(pool[member].name for member in pair), total) for total, pair in judged)
    return PairSearch(tensor, error, table)


def _judge(encodings: Sequence[BlockEncoding], count: int) -> list[tuple[float, tuple[int, ...]]]:
    """Error and members of every choice of ``count`` codebooks."""
    return [
        (_total(np.minimum.reduce([encodings[member].errors for member in members])), members)
        for members in itertools.combinations(range(len(encodings)), count)
    ]
