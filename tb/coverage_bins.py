"""Declared bins of functional coverage by unit: what traffic has to hit (:mod:`tb.coverage`)."""

from collections.abc import Iterable, Mapping
from itertools import product

__all__ = [
    "FLOAT_DECODER",
    "FLOAT_TO_HIF",
    "HIF_TO_FLOAT",
    "LUT_DECODER",
    "LUT_TILE",
    "SOP_TILE",
    "SPARSE_MERGE",
    "TILE_EPILOGUE",
]

Bins = Mapping[str, tuple[str, ...]]

STALLS = ("none", "in", "out", "both")
FLOAT_CLASSES = ("zero", "subnormal", "smallest normal", "mid", "largest")
SIGNS = ("+", "-")
KINDS = ("4-bit LUT", "5-bit LUT", "6-bit LUT", "E2M3", "other atom")


def _cross(*parts: Iterable[object]) -> tuple[str, ...]:
    return tuple(" ".join(map(str, choice)) for choice in product(*parts))


def _traffic(*phases: str) -> dict[str, tuple[str, ...]]:
    """Bins that every unit has; ``phases`` are what a reset can hit besides."""
    return {
        "stalls of a tensor": STALLS,
        "beats of a tensor": ("one", "several"),
        "reset": ("idle", "mid-tensor", "draining", "output stalled", *phases),
    }


def _hif(names: Mapping[str, tuple[range, range]]) -> dict[str, tuple[str, ...]]:
    """Shift x sign of the significand, with reserved shifts."""
    return {
        f"{name} shift x significand": (
            *_cross(shifts, ("negative", "zero", "positive")),
            *(
                f"{label} (reserved)"
                for label in _cross(reserved, ("negative", "zero", "positive"))
            ),
        )
        for name, (shifts, reserved) in names.items()
    }


def _canonical(shifts: int) -> tuple[str, ...]:
    """Of canonical codes only shift 0 has a zero."""
    return ("0 zero", *_cross(range(shifts), ("negative", "positive")))


LUT_DECODER: Bins = {
    **_traffic("LUT load under way", "LUTs waiting"),
    **{
        f"entries of {bits}-bit LUTs": _cross(("La", "Lb"), range(1 << bits))
        for bits in (4, 5, 6)
    },
    "metabits of a beat": ("all 0", "all 1", "mixed"),
    "format, then next format": tuple(f"{a} > {b}" for a, b in product(KINDS, KINDS)),
    "beats against LUT writes": ("fewer", "as many", "more"),
    "LUTs of the next tensor": (
        "early", "just in time", "one clock late", "late", "late, input waits",
    ),
}  # fmt: skip

HIF_TO_FLOAT: Bins = {
    **_traffic(),
    **_hif(
        {
            "HIF7": (range(4), range(0)),
            "HIF8": (range(5), range(5, 8)),
            "HIF8T": (range(4), range(0)),
        },
    ),
    "element of an atom": (
        *_cross(("integer",), ("zero", "positive", "negative", "reserved")),
        *_cross(("float",), SIGNS, FLOAT_CLASSES), "float NaN",
    ),
    "unsigned scale": FLOAT_CLASSES,
    "signed scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved", "- reserved"),
    "row scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved", "- reserved"),
    "layer exponent": ("lowest", "negative", "zero", "positive", "highest"),
    "format, then next format": (
        "HIF > HIF", "HIF > atom", "atom > HIF", "atom > the same", "atom > another atom",
    ),
    **{
        f"{output} value": ("zero", *_cross(SIGNS, ("normal", "infinity")))
        for output in ("float32", "bfloat16")
    },
    "flags of a beat": (
        "none", "reserved", "overflow", "underflow", "several at once",
    ),
}  # fmt: skip

SPARSE_MERGE: Bins = {
    **_traffic("correction pending"),
    "corrections of a beat": ("0", "1", "2", "several", "every lane"),
    "lane of a correction": ("first", "inner", "last"),
    "correction": (
        "exact", "rounded up", "rounded down", "tie", "nothing changed", "cancelled to zero",
        "cancelled in part", "carry", "subnormal sum", "overflow", "of a zero", "by zero",
        "by a subnormal", "by a negative", "misplaced", "reserved",
    ),
    "corrections of a tensor": ("none", "one", "several"),
    **{
        f"{output} value": (
            "zero", *_cross(SIGNS, ("subnormal", "normal", "infinity")),
        )
        for output in ("float32", "bfloat16")
    },
    "flags of a beat": ("none", "reserved", "overflow", "misplaced"),
}  # fmt: skip

FLOAT_TO_HIF: Bins = {
    **_traffic(),
    **{
        f"code of {name}": (*_cross(SIGNS, FLOAT_CLASSES), *specials)
        for name, specials in {
            "E2M1": (), "E2M3": (), "E3M2": (), "E4M3": ("NaN",), "BF16": ("NaN", "infinity"),
        }.items()
    },
    **{
        f"{name} shift x significand": _canonical(shifts)
        for name, shifts in {"HIF7": 4, "HIF8": 5, "HIF8T": 4}.items()
    },
    "rounding": (
        "exact", "nearest above", "nearest below", "tie to above", "tie to below", "low end",
        "high end",
    ),
    "flags of a beat": (
        "none", "inexact", "saturated", "nan", "inexact and nan", "saturated and nan",
    ),
}  # fmt: skip

SOP_TILE: Bins = {
    "stalls of a tensor": STALLS,
    "beats of a tensor": ("several",),  # a block is the shortest
    "reset": ("idle", "mid-tensor", "draining", "output stalled"),
    "blocks of a tile": ("one", "several"),
    "input that waits": ("weights", "activations"),
    **_hif({"HIF8": (range(5), range(5, 8))}),
    "integer": ("zero", "positive", "negative", "reserved"),
    "float": (*_cross(SIGNS, FLOAT_CLASSES), "NaN"),
    "unsigned scale": FLOAT_CLASSES,
    "signed scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved", "- reserved"),
    "output": ("zero", *_cross(SIGNS, ("subnormal", "normal", "infinity"))),
    "flags of a beat": ("none", "reserved", "overflow"),
}  # fmt: skip

LUT_TILE: Bins = {
    "stalls of a tensor": STALLS,
    "beats of a tensor": ("several",),  # a block is the shortest
    "reset": (
        "idle", "mid-tensor", "draining", "output stalled", "LUT load under way", "LUTs waiting",
    ),
    "tiles of a tensor": ("one", "several"),
    "format, then next format": ("the same", "another"),
    "metabits of a block": ("all 0", "all 1", "mixed"),
}  # fmt: skip

TILE_EPILOGUE: Bins = {
    "stalls of a tensor": STALLS,
    "beats of a tensor": ("several",),  # of these tiles
    "reset": ("idle", "mid-tensor", "draining", "output stalled", "activations kept"),
    "columns of a tile": ("none", "one", "several", "as many as slots"),
    "corrections of a tile": ("none", "one", "several"),
    "rows of corrections that follow each other": ("the same", "another"),
    "correction": (
        "exact", "rounded up", "rounded down", "tie", "nothing changed", "cancelled to zero",
        "cancelled in part", "carry", "subnormal sum", "overflow", "of a zero", "by zero",
        "by a subnormal", "by a negative", "of an infinity", "of -0 and -0", "misplaced",
        "reserved",
    ),
    "product": ("zero", *_cross(SIGNS, ("subnormal", "normal", "infinity"))),
    "row scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved"),
    "sum times row scale": ("zero", *_cross(SIGNS, ("subnormal", "normal", "infinity"))),
    **{
        f"{output} value": ("zero", *_cross(SIGNS, ("subnormal", "normal", "infinity")))
        for output in ("float32", "bfloat16")
    },
    "flags of a beat": ("none", "reserved", "overflow", "misplaced"),
}  # fmt: skip

FLOAT_DECODER: Bins = {
    "stalls of a tensor": STALLS,
    "beats of a tensor": ("one", "several"),
}  # fmt: skip
