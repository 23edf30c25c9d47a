"""Functional coverage: what simulations did on the pins, counted in declared bins.

A simulation that finds a folder in the environment variable ``SOP_COVERAGE`` leaves its counts
there. :mod:`tb.coverage_report` is the command that merges and judges them.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

__all__ = [
    "BINS",
    "VARIABLE",
    "Counts",
    "declared_table",
    "empty_bins",
    "markdown",
    "merge",
    "undeclared_bins",
]

VARIABLE = "SOP_COVERAGE"
"""Environment variable with the folder that gets the counts; without it nothing is counted."""

STALLS = ("none", "in", "out", "both")
FLOAT_CLASSES = ("zero", "subnormal", "smallest normal", "mid", "largest")
SIGNS = ("+", "-")
KINDS = ("4-bit LUT", "5-bit LUT", "6-bit LUT", "E2M3", "other atom")


def _cross(*parts: Iterable[object]) -> tuple[str, ...]:
    return tuple(" ".join(map(str, choice)) for choice in product(*parts))


def _traffic(unit: str, *phases: str) -> dict[str, tuple[str, ...]]:
    """Bins that every unit has; ``phases`` are what a reset can hit besides."""
    return {
        f"{unit}: stalls of a tensor": STALLS,
        f"{unit}: beats of a tensor": ("one", "several"),
        f"{unit}: reset": ("idle", "mid-tensor", "draining", "output stalled", *phases),
    }


def _hif(unit: str, names: Mapping[str, tuple[range, range]]) -> dict[str, tuple[str, ...]]:
    """Shift x sign of the significand, with reserved shifts."""
    return {
        f"{unit}: {name} shift x significand": (
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


BINS: dict[str, tuple[str, ...]] = {
    **_traffic("lut_decoder", "LUT load under way", "LUTs waiting"),
    **{
        f"lut_decoder: entries of {bits}-bit LUTs": _cross(("La", "Lb"), range(1 << bits))
        for bits in (4, 5, 6)
    },
    "lut_decoder: metabits of a beat": ("all 0", "all 1", "mixed"),
    "lut_decoder: format, then next format": tuple(f"{a} > {b}" for a, b in product(KINDS, KINDS)),
    "lut_decoder: beats against LUT writes": ("fewer", "as many", "more"),
    "lut_decoder: LUTs of the next tensor": (
        "early", "just in time", "one clock late", "late", "late, input waits",
    ),
    **_traffic("hif_to_float"),
    **_hif(
        "hif_to_float",
        {
            "HIF7": (range(4), range(0)),
            "HIF8": (range(5), range(5, 8)),
            "HIF8T": (range(4), range(0)),
        },
    ),
    "hif_to_float: element of an atom": (
        *_cross(("integer",), ("zero", "positive", "negative", "reserved")),
        *_cross(("float",), SIGNS, FLOAT_CLASSES), "float NaN",
    ),
    "hif_to_float: unsigned scale": FLOAT_CLASSES,
    "hif_to_float: signed scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved", "- reserved"),
    "hif_to_float: row scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved", "- reserved"),
    "hif_to_float: layer exponent": ("lowest", "negative", "zero", "positive", "highest"),
    "hif_to_float: format, then next format": (
        "HIF > HIF", "HIF > atom", "atom > HIF", "atom > the same", "atom > another atom",
    ),
    **{
        f"hif_to_float: {output} value": ("zero", *_cross(SIGNS, ("normal", "infinity")))
        for output in ("float32", "bfloat16")
    },
    "hif_to_float: flags of a beat": (
        "none", "reserved", "overflow", "underflow", "several at once",
    ),
    **_traffic("sparse_merge", "correction pending"),
    "sparse_merge: corrections of a beat": ("0", "1", "2", "several", "every lane"),
    "sparse_merge: lane of a correction": ("first", "inner", "last"),
    "sparse_merge: correction": (
        "exact", "rounded up", "rounded down", "tie", "nothing changed", "cancelled to zero",
        "cancelled in part", "carry", "subnormal sum", "overflow", "of a zero", "by zero",
        "by a subnormal", "by a negative", "misplaced", "reserved",
    ),
    "sparse_merge: corrections of a tensor": ("none", "one", "several"),
    **{
        f"sparse_merge: {output} value": (
            "zero", *_cross(SIGNS, ("subnormal", "normal", "infinity")),
        )
        for output in ("float32", "bfloat16")
    },
    "sparse_merge: flags of a beat": ("none", "reserved", "overflow", "misplaced"),
    **_traffic("float_to_hif"),
    **{
        f"float_to_hif: code of {name}": (*_cross(SIGNS, FLOAT_CLASSES), *specials)
        for name, specials in {
            "E2M1": (), "E2M3": (), "E3M2": (), "E4M3": ("NaN",), "BF16": ("NaN", "infinity"),
        }.items()
    },
    **{
        f"float_to_hif: {name} shift x significand": _canonical(shifts)
        for name, shifts in {"HIF7": 4, "HIF8": 5, "HIF8T": 4}.items()
    },
    "float_to_hif: rounding": (
        "exact", "nearest above", "nearest below", "tie to above", "tie to below", "low end",
        "high end",
    ),
    "float_to_hif: flags of a beat": (
        "none", "inexact", "saturated", "nan", "inexact and nan", "saturated and nan",
    ),
    "sop_tile: stalls of a tensor": STALLS,
    "sop_tile: beats of a tensor": ("several",),  # a block is the shortest
    "sop_tile: reset": ("idle", "mid-tensor", "draining", "output stalled"),
    "sop_tile: blocks of a tile": ("one", "several"),
    "sop_tile: input that waits": ("weights", "activations"),
    **_hif("sop_tile", {"HIF8": (range(5), range(5, 8))}),
    "sop_tile: integer": ("zero", "positive", "negative", "reserved"),
    "sop_tile: float": (*_cross(SIGNS, FLOAT_CLASSES), "NaN"),
    "sop_tile: unsigned scale": FLOAT_CLASSES,
    "sop_tile: signed scale": (*_cross(SIGNS, FLOAT_CLASSES), "+ reserved", "- reserved"),
    "sop_tile: output": ("zero", *_cross(SIGNS, ("subnormal", "normal", "infinity"))),
    "sop_tile: flags of a beat": ("none", "reserved", "overflow"),
    "float_decoder: stalls of a tensor": STALLS,
    "float_decoder: beats of a tensor": ("one", "several"),
}  # fmt: skip
"""Bins of each group; each can be hit, and must be."""


class Counts:
    """Hits of bins in one simulation."""

    def __init__(self) -> None:
        self.hits: Counter[tuple[str, str]] = Counter()

    def hit(self, group: str, bin_name: str, times: int = 1) -> None:
        """Count; what is not declared is seen when counts are merged."""
        self.hits[group, bin_name] += times

    def write(self, folder: Path) -> None:
        """Leave the counts as a JSON file of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="counts_", suffix=".part", dir=folder)
        nested: dict[str, dict[str, int]] = {}
        for (group, bin_name), count in sorted(self.hits.items()):
            nested.setdefault(group, {})[bin_name] = count
        with os.fdopen(handle, "w") as stream:
            json.dump(nested, stream)
        # Whole files only: another process may merge at any time.
        Path(name).rename(Path(name).with_suffix(".json"))


def merge(folder: Path) -> Counter[tuple[str, str]]:
    """Sum of all counts in a folder.

    Raises
    ------
    ValueError
        If a file counts a bin that is not declared.
    """
    total: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.glob("counts_*.json")):
        for group, bins in json.loads(path.read_text()).items():
            total.update({(group, bin_name): count for bin_name, count in bins.items()})
    unknown = undeclared_bins(total)
    if unknown:
        raise ValueError(f"hits of bins that are not declared: {'; '.join(unknown)}")
    return total


def _declared() -> Iterator[tuple[str, str]]:
    for group, bins in BINS.items():
        yield from ((group, name) for name in bins)


def empty_bins(total: Mapping[tuple[str, str], int]) -> list[str]:
    """Declared bins that nothing hit."""
    return [f"{group}: {name}" for group, name in _declared() if not total.get((group, name))]


def undeclared_bins(total: Mapping[tuple[str, str], int]) -> list[str]:
    """What was hit but is not declared."""
    known = set(_declared())
    return [f"{group}: {name}" for group, name in total if (group, name) not in known]


def markdown(total: Mapping[tuple[str, str], int]) -> str:
    """Table of all groups: bins, those that were hit, the fewest hits of a bin."""
    lines = ["| Unit | Group | Bins | Hit | Fewest hits |", "|---|---|---|---|---|"]
    for group, bins in BINS.items():
        hits = [total.get((group, name), 0) for name in bins]
        unit, _, title = group.partition(": ")
        hit = sum(map(bool, hits))
        lines.append(f"| `{unit}` | {title} | {len(bins)} | {hit} | {min(hits)} |")
    declared = list(_declared())
    hit = sum(1 for key in declared if total.get(key))
    lines.append(f"| all | | {len(declared)} | {hit} | |")
    return "\n".join(lines)


def declared_table() -> str:
    """Table of all groups with their bins, for the documentation."""
    lines = ["| Unit | Group | Bins | |", "|---|---|---|---|"]
    for group, bins in BINS.items():
        unit, _, title = group.partition(": ")
        shown = ", ".join(bins) if len(bins) <= 12 else f"{bins[0]}, {bins[1]} ... {bins[-1]}"
        lines.append(f"| `{unit}` | {title} | {len(bins)} | {shown} |")
    return "\n".join(lines) + "\n"
