"""What a difference of two checkpoints is: its field, its place, the values and the rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sop.checkpoints.diff_rules import RULES

__all__ = ["FIELDS", "DiffReport", "Difference", "Found", "Place", "top_bit"]

FIELDS = (
    "config", "calibration", "tensors", "format", "layer_exponent", "luts", "row_scales",
    "metabit", "sign", "exponent", "mantissa", "indices", "corrections", "raw",
)  # fmt: skip
"""What is counted, in the order in which the first difference is looked for.

A LUT entry, a row scale, each field of a scale word, an index and a correction count one each; of a
format each of its parts; of a raw tensor the tensor.
"""


@dataclass(frozen=True)
class Place:
    """Where a difference is; what does not apply is None.

    Attributes
    ----------
    tensor : str or None
    row, block, weight : int or None
        The block is counted in its row, the weight in its block.
    column : int or None
        Column of the weight in the matrix.
    key : str or None
        What else tells the place: a key of the configuration, a LUT and its entry, a byte.
    bit : int or None
        The highest bit of the code (for a scale word: of the whole word) that differs; 0 is the
        least significant.
    """

    tensor: str | None = None
    row: int | None = None
    block: int | None = None
    weight: int | None = None
    column: int | None = None
    key: str | None = None
    bit: int | None = None

    def __str__(self) -> str:
        """Return the place as words."""
        parts = [] if self.tensor is None else [f"tensor {self.tensor!r}"]
        for what in ("row", "block", "weight", "column", "key", "bit"):
            value = getattr(self, what)
            if value is not None:
                parts.append(value if what == "key" else f"{what} {value}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes
    ----------
    field : str
        One of :data:`FIELDS`.
    place : Place
    a, b : str
        What the two files hold.
    facts : tuple of str
        What the values mean and were decided by.
    rule : str
        A key of :data:`RULES`.
    """

    field: str
    place: Place
    a: str
    b: str
    facts: tuple[str, ...]
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        document, words = RULES[self.rule].source
        place = {key: value for key, value in vars(self.place).items() if value is not None}
        return {
            "field": self.field,
            **place,
            "a": self.a,
            "b": self.b,
            "facts": list(self.facts),
            "rule": RULES[self.rule].text,
            "rule_source": f"{document}: {words.strip('*')}",
        }


@dataclass(frozen=True)
class DiffReport:
    """Result of :func:`diff_checkpoints`.

    Attributes
    ----------
    first : Difference or None
        None if the files hold the same.
    counts : dict of str to int
        Number of differences of each of :data:`FIELDS`.
    """

    first: Difference | None
    counts: dict[str, int]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.first is None


@dataclass(frozen=True)
class Found:
    """Differences of one field in one tensor or file: how many, and how to describe the first."""

    field: str
    count: int
    first: Callable[[], Difference]


def top_bit(mask: int) -> int:
    """Position of the highest bit that is set; 0 is the least significant."""
    return mask.bit_length() - 1
