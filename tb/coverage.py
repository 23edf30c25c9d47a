"""Functional coverage: what simulations did on the pins, counted in declared bins.

A simulation that finds a folder in the environment variable ``SOP_COVERAGE`` leaves its counts
there. :mod:`tb.coverage_report` is the command that merges and judges them.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tb.benches import BENCHES

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

BINS: dict[str, tuple[str, ...]] = {
    f"{unit}: {group}": bins
    for unit, bench in BENCHES.items()
    for group, bins in bench.coverage.items()
}
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
