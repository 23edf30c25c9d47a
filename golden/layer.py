"""One layer through the whole method: codebooks, scales, error feedback and sparse corrections."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import FIXED_CODEBOOKS, Lut
from golden.convert import level_table
from golden.corrections import Corrections, corrected
from golden.errors import InputError
from golden.factors import Factors
from golden.feedback import DEFAULT_PASSES, Feedback, quantize_with_feedback
from golden.formats import HIF7, HifFormat
from golden.notation import TRAINED_CODEBOOKS, QuantFormat, parse_format
from golden.outliers import corrections_at, outlier_mask, residual_mask
from golden.pair_search import Candidate, fixed_candidates, search_codebooks
from golden.quantize import quantize, scaled_layer
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor, decode
from golden.training import (
    Training,
    TrainingSample,
    best_start,
    start_levels,
    train_codebooks,
)

__all__ = ["SEARCHED_CODEBOOK", "QuantizedLayer", "Recipe", "parse_recipe", "quantize_layer"]

SEARCHED_CODEBOOK = "Any4"
"""Stands in the name of a recipe for the codebook that fits a layer best."""


@dataclass(frozen=True)
class Recipe:
    """How a layer is to be quantized; made by :func:`parse_recipe`.

    Attributes
    ----------
    name : str
        A format name, or one with ``Any4`` for each codebook.
    format : QuantFormat
        With ``DD4`` in place of ``Any4``. Codebooks DD4, DD5 and DD6 are trained on the layer.
    searched : bool
        Whether the codebooks are chosen among the candidates and trained ones.
    candidates : tuple of Candidate
        Codebooks to choose from where they are searched; user codebooks are looked up here.
    training : Training
        Effort of training.
    mode : ScaleMode
        How block scales are chosen where no codebook is trained or searched; else ``search``.
    outliers, residuals : float
        Densities of the sparse corrections OPQ and Wr, in [0, 1).
    feedback_passes : int
        Passes after the first one of error feedback (:mod:`golden.feedback`).
    judged_blocks : int or None
        Blocks on which searched codebooks are judged; None is all of them.
    """

    name: str
    format: QuantFormat
    searched: bool = False
    candidates: tuple[Candidate, ...] = ()
    training: Training = field(default_factory=Training)
    mode: ScaleMode = ScaleMode.SEARCH
    outliers: float = 0.0
    residuals: float = 0.0
    feedback_passes: int = DEFAULT_PASSES
    judged_blocks: int | None = None


def parse_recipe(
    name: str,
    hif: HifFormat = HIF7,
    *,
    codebooks: dict[str, Lut] | None = None,
    training: Training | None = None,
    mode: ScaleMode = ScaleMode.SEARCH,
    outliers: float = 0.0,
    residuals: float = 0.0,
    feedback_passes: int = DEFAULT_PASSES,
    judged_blocks: int | None = None,
) -> Recipe:
    """Recipe of a format name, in which ``Any4`` may stand for codebooks.

    Parameters
    ----------
    name : str
        Such as ``"Any4-Any4sS1E5M5"``, ``"NF4-DD4sS1E5M5"`` or ``"E2M3sUE4M4"``.
    hif : HifFormat
        Format of LUT entries.
    codebooks : dict of str to Lut, optional
        The user's own (:func:`golden.codebook_file.read_codebooks`).
    training, mode, outliers, residuals, feedback_passes, judged_blocks
        As in :class:`Recipe`.

    Raises
    ------
    InputError
        If the name is not of the notation, or names a user codebook that is not given.
    """
    own = tuple(Candidate(book, lut) for book, lut in (codebooks or {}).items())
    searched = SEARCHED_CODEBOOK in name
    fmt = parse_format(name.replace(SEARCHED_CODEBOOK, "DD4"), hif)
    if searched and any(book not in TRAINED_CODEBOOKS for book in fmt.codebooks):
        raise InputError(f"format {name!r}: {SEARCHED_CODEBOOK} must stand for all codebooks")
    for book in fmt.codebooks:
        known = (*FIXED_CODEBOOKS, *TRAINED_CODEBOOKS, *(candidate.name for candidate in own))
        if book not in known:
            raise InputError(f"format {name!r}: there is no codebook {book!r}")
    fixed = tuple(fixed_candidates(fmt.block_size, hif)) if searched else ()
    return Recipe(
        name if searched else fmt.name,
        fmt,
        searched,
        fixed + own,
        training or Training(),
        mode,
        outliers,
        residuals,
        feedback_passes,
        judged_blocks,
    )


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """What is stored of a layer, and how error feedback went.

    Attributes
    ----------
    tensor : QuantizedTensor
        The dense part.
    corrections : Corrections or None
        The sparse part.
    feedback : Feedback or None
        None where it was not tried.
    """

    tensor: QuantizedTensor
    corrections: Corrections | None
    feedback: Feedback | None

    @property
    def stored_bits(self) -> int:
        """Bits of everything stored."""
        sparse = 0 if self.corrections is None else self.corrections.stored_bits
        return self.tensor.format.stored_bits(*self.tensor.shape) + sparse

    def reconstruct(self) -> NDArray[np.float32]:
        """Weights that the layer stands for, shape (rows, columns)."""
        return corrected(decode(self.tensor), self.corrections)


def quantize_layer(
    weights: NDArray[np.float32],
    recipe: Recipe,
    channel_norms: NDArray[np.floating] | None = None,
    second_moment: NDArray[np.floating] | None = None,
    factors: Factors | None = None,
) -> QuantizedLayer:
    """Quantize a layer as its recipe says.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Finite. Not modified.
    recipe : Recipe
    channel_norms : float array, shape (columns,), optional
        See :func:`golden.blocks.usable_channel_norms`.
    second_moment : float array, shape (columns, columns), optional
        H of the layer's inputs. With it codebook formats are quantized with error feedback, unless
        the recipe has sparse corrections, which take the place of what feedback would carry on.
    factors : Factors, optional
        Of ``second_moment``, for layers that share their input.

    Raises
    ------
    InputError
        If the weights, norms or moments cannot be used.
    """
    excluded = None
    if recipe.outliers:
        # One scale word for a whole tensor: outliers stand out from their row.
        size = recipe.format.block_size or weights.shape[1]
        excluded = outlier_mask(weights, size, recipe.outliers)
    tensor = _dense(weights, recipe, channel_norms, excluded)
    sparse = bool(recipe.outliers or recipe.residuals)
    if sparse:
        corrections = _corrections(weights, tensor, recipe.residuals, channel_norms, excluded)
        return QuantizedLayer(tensor, corrections, None)
    if second_moment is None or recipe.format.atom is not None:
        return QuantizedLayer(tensor, None, None)
    feedback = quantize_with_feedback(
        weights, tensor, second_moment, factors, passes=recipe.feedback_passes
    )
    return QuantizedLayer(feedback.tensor, None, feedback)


def _dense(
    weights: NDArray[np.float32],
    recipe: Recipe,
    channel_norms: NDArray[np.floating] | None,
    excluded: NDArray[np.bool_] | None,
) -> QuantizedTensor:
    fmt = recipe.format
    trained = [book in TRAINED_CODEBOOKS for book in fmt.codebooks]
    if recipe.searched or (trained and all(trained)):
        candidates = recipe.candidates if recipe.searched else ()
        return search_codebooks(
            weights,
            fmt,
            candidates=candidates,
            training=recipe.training,
            judged_blocks=recipe.judged_blocks,
            channel_norms=channel_norms,
            excluded=excluded,
        ).tensor
    luts = _luts(weights, recipe, trained, channel_norms, excluded) if fmt.codebooks else ()
    return quantize(
        weights, fmt, mode=recipe.mode, luts=luts, channel_norms=channel_norms, excluded=excluded
    )


def _luts(
    weights: NDArray[np.float32],
    recipe: Recipe,
    trained: list[bool],
    channel_norms: NDArray[np.floating] | None,
    excluded: NDArray[np.bool_] | None,
) -> tuple[Lut, ...]:
    """LUTs of a format of which at most one codebook is trained, as a partner of the other."""
    fmt = recipe.format
    own = {candidate.name: candidate.lut for candidate in recipe.candidates}
    own |= {book.name: book.lut for book in fixed_candidates(fmt.block_size, fmt.hif)}
    if not any(trained):
        return tuple(own[book] for book in fmt.codebooks)
    given = [own.get(book) for book in fmt.codebooks]
    starts = [
        [family[number] if lut is None else lut.values for number, lut in enumerate(given)]
        for family in start_levels(fmt.hif, fmt.lut_entries, len(trained))
    ]
    small_end = min(level_table(levels).small_end for start in starts for levels in start)
    layer = scaled_layer(weights, fmt, small_end, channel_norms, excluded)
    sample = TrainingSample(layer, recipe.training.blocks, fmt.lut_entries)
    luts, _ = train_codebooks(
        sample, best_start(sample, starts), fmt.hif, trained=trained, effort=recipe.training
    )
    return luts


def _corrections(
    weights: NDArray[np.float32],
    tensor: QuantizedTensor,
    residuals: float,
    channel_norms: NDArray[np.floating] | None,
    excluded: NDArray[np.bool_] | None,
) -> Corrections:
    """Outliers, then the largest of the errors that are left."""
    dense = decode(tensor)
    mask = np.zeros(weights.shape, dtype=bool) if excluded is None else excluded
    corrections = corrections_at(weights, dense, mask)
    if residuals:
        reconstruction = corrections.add_to(dense)
        mask = mask | residual_mask(weights, reconstruction, residuals, channel_norms)
        corrections = corrections_at(weights, dense, mask)
    return corrections
