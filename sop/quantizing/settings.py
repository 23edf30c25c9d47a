"""What a model is quantized to: format or budget, effort, corrections, overrides."""

import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import lru_cache
from typing import Any

from golden.codebook_file import parse_codebooks
from golden.errors import InputError
from golden.feedback import DEFAULT_PASSES
from golden.formats import DEFAULT_HIF, HIF_FORMATS
from golden.layer import Recipe, parse_recipe
from golden.training import Training

__all__ = ["EFFORTS", "KEEP", "LADDER", "Effort", "Override", "Settings", "decimal_number"]

_MAX_DIGITS = 100  # of a number in the settings, its sign and point included

KEEP = "keep"
"""In place of a format: the tensor is stored as it came."""

LADDER = (
    "Any4-Any4^64sRS1E2M4",
    "Any4-Any4^32sRS1E2M4",
    "Any4-Any4sRS1E2M4",
    "Any4-Any4sS1E5M5",
    "DD5-DD5^32sRS1E2M4",
    "DD5-DD5sRS1E2M4",
    "DD6-DD6^32sRS1E2M4",
    "DD6-DD6sRS1E2M4",
    "DD6-DD6sS1E5M5",
    "E3M4sUE4M4",
    "E4M5sUE4M4",
)
"""Formats that a bit budget is spent on, cheapest first."""


@dataclass(frozen=True)
class Effort:
    """How much time is traded for fidelity.

    Attributes
    ----------
    training : Training
    judged_blocks : int or None
        Blocks on which searched codebooks are judged.
    feedback_passes : int
    trial : Training
        For formats that are only tried, to plan a budget.
    sampled_weights : int
        Weights of a layer on which they are tried, in whole rows.
    """

    training: Training
    judged_blocks: int | None
    feedback_passes: int
    trial: Training
    sampled_weights: int


_LITTLE = Training(blocks=2048, rounds=1, sweeps=0)
_SOME = Training(blocks=4096, rounds=2, sweeps=1)
_MUCH = Training(blocks=16384, rounds=4, sweeps=4, partners=1)

EFFORTS = {
    "fast": Effort(_LITTLE, 2048, 0, _LITTLE, 1 << 15),
    "default": Effort(_SOME, 4096, DEFAULT_PASSES, _LITTLE, 1 << 15),
    "best": Effort(_MUCH, None, 3, _SOME, 1 << 17),
}


@dataclass(frozen=True)
class Override:
    """A format for the tensors whose name matches a shell pattern."""

    match: str
    format: str


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a model is quantized to, besides its weights and statistics.

    Attributes
    ----------
    format : str or None
        One recipe (:func:`golden.layer.parse_recipe`) for all tensors, or None with a budget.
    bits_per_weight : str or None
        Budget over all quantized tensors as a decimal number, or None with a format.
    ladder : tuple of str
        Recipes that the budget may be spent on.
    hif : str
        Format of LUT entries.
    effort : str
        A key of :data:`EFFORTS`.
    outliers, residuals : float
        Densities of the sparse corrections OPQ and Wr.
    feedback : bool
        Error feedback, for the layers whose second moment is known. Off: it helps on text like
        that of the calibration and hurts on other text (docs/quantize.md).
    overrides : tuple of Override
        The first one that matches a tensor decides.
    codebooks : str
        The user's codebook file, as text; empty if there is none.
    """

    format: str | None = None
    bits_per_weight: str | None = "4.75"
    ladder: tuple[str, ...] = LADDER
    hif: str = DEFAULT_HIF.name
    effort: str = "default"
    outliers: float = 0.0
    residuals: float = 0.0
    feedback: bool = False
    overrides: tuple[Override, ...] = ()
    codebooks: str = ""

    def __post_init__(self) -> None:
        """Check everything that can be checked without the model."""
        if (self.format is None) == (self.bits_per_weight is None):
            raise InputError("give either a format or a budget of bits per weight")
        if self.hif not in HIF_FORMATS:
            raise InputError(f"hif must be one of {', '.join(HIF_FORMATS)}, not {self.hif!r}")
        if self.effort not in EFFORTS:
            raise InputError(f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}")
        for name, value in (("opq", self.outliers), ("wr", self.residuals)):
            if not 0.0 <= value < 1.0:
                raise InputError(f"{name} must be at least 0 and below 1, not {value}")
        if self.bits_per_weight is not None:
            self.budget_per_weight()
        names = (self.format,) if self.format else self.ladder
        for name in (*names, *(override.format for override in self.overrides)):
            if name != KEEP:
                self.recipe(name)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, under their own names."""
        overrides = [asdict(override) for override in self.overrides]
        return {**asdict(self), "ladder": list(self.ladder), "overrides": overrides}

    def budget_per_weight(self) -> Fraction:
        """The budget, exactly as written."""
        budget = decimal_number(str(self.bits_per_weight))
        if budget is None or not 0 < budget <= 32:
            raise InputError(
                f"bpw must be a number above 0, at most 32, not {self.bits_per_weight:.80}"
            )
        return budget

    def recipe(self, name: str, *, trial: bool = False) -> Recipe:
        """The recipe of a format name under these settings, to quantize with or only to try."""
        return _recipe(self, name, trial)

    def overridden(self, tensor: str) -> str | None:
        """Format that the first matching override gives a tensor, None if none matches."""
        for override in self.overrides:
            if fnmatchcase(tensor, override.match):
                return override.format
        return None


def decimal_number(text: str) -> Fraction | None:
    """Value of a decimal number such as ``4.75`` or ``5e-4``, exactly; None if it is none.

    No infinity, fractions, digits of other scripts or groups of digits; an exponent has at most
    three digits, because all digits of the number are written out.
    """
    plain = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII)
    return Fraction(text) if plain and len(text) <= _MAX_DIGITS else None


@lru_cache(maxsize=64)
def _recipe(settings: Settings, name: str, trial: bool) -> Recipe:
    hif, effort = HIF_FORMATS[settings.hif], EFFORTS[settings.effort]
    codebooks = {}
    if settings.codebooks:
        codebooks = parse_codebooks(settings.codebooks.encode(), "--codebooks", hif)
    return parse_recipe(
        name,
        hif,
        codebooks=codebooks,
        training=effort.trial if trial else effort.training,
        outliers=settings.outliers,
        residuals=settings.residuals,
        feedback_passes=effort.feedback_passes,
        judged_blocks=effort.trial.blocks if trial else effort.judged_blocks,
    )
