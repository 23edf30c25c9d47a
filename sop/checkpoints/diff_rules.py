"""Which rule decides each value of a checkpoint, and where it is written."""

from dataclasses import dataclass

__all__ = ["RULES", "Rule"]


@dataclass(frozen=True)
class Rule:
    """What decides a value.

    Attributes
    ----------
    source : tuple of str
        Document and the words in it where the rule stands.
    text : str
        The rule in one sentence.
    """

    source: tuple[str, str]
    text: str


def _numerics(words: str, text: str) -> Rule:
    return Rule(("docs/numerics.md", words), text)


RULES = {
    "config": Rule(
        ("docs/checkpoint.md", "how the model was quantized"),
        "The settings differ, so any code may differ.",
    ),
    "calibration": Rule(
        ("docs/checkpoint.md", "summary of the calibration"),
        "Channel norms weight the errors that choose scales and metabits, so those may differ.",
    ),
    "tensors": Rule(
        ("docs/checkpoint.md", "one entry for each quantized tensor"),
        "A tensor is quantized, stored as it came, or not there.",
    ),
    "format": Rule(
        ("docs/checkpoint.md", "canonical [format name]"),
        "Codes of different formats or shapes mean different things and are not compared.",
    ),
    "layer_exponent": Rule(
        ("docs/formats.md", "f is the least integer"),
        "The layer exponent is the smallest with which no scale exceeds the format, 0 for 8-bit "
        "exponents; scale formats of fewer than 4 exponent bits also try its neighbours.",
    ),
    "luts": Rule(
        ("docs/formats.md", "stored as canonical HIF codes"),
        "A level times the full scale goes to the nearest HIF value, ties to the even significand, "
        "stored with the smallest shift.",
    ),
    "row_scales": Rule(
        ("docs/formats.md", "a bfloat16 scale per"),
        "A row scale puts the largest block of its row near the top of the scale format, rounded "
        "to bfloat16, ties to even.",
    ),
    "metabit": _numerics(
        "**Metabit**",
        "The metabit is 1 only if the second LUT gives a lower error than the first, so 0 if both "
        "give the same.",
    ),
    "zero_block": _numerics(
        "**Zero blocks**",
        "A block of zeros, and no other, has scale code 0, metabit 0 and the level nearest zero.",
    ),
    "scale": _numerics(
        "**search**",
        "Of all candidates, those of the one-pass modes among them, the scale code with the least "
        "error wins, the lower code among equals.",
    ),
    "index": _numerics(
        "**Level of a weight**",
        "Nearest to weight / scale; a tie takes the lower index of a codebook, the even code of an "
        "atom.",
    ),
    "padding": _numerics(
        "**Padding**",
        "The weight is padding of the last block of its row: it counts in no error and is no part "
        "of the result; hardware streams it, so its value must be in range.",
    ),
    "corrections": Rule(
        ("docs/checkpoint.md", "**corrections**"),
        "An entry holds what the dense value misses, rounded to bfloat16, ties to even; it differs "
        "where the dense value or the choice of places does.",
    ),
    "raw": Rule(
        ("docs/checkpoint.md", "left as it came"),
        "The tensor was not quantized: its bytes are those of the model.",
    ),
}
"""Rules by name; each stands where its `source` says."""
