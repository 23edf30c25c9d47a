"""Formats to try everything on that holds for any of them."""

import pytest

from golden.formats import ATOMS, NumberFormat, scale_format

SCALE_NAMES = (
    "UE4M4", "UE4M3", "UE5M3", "UE5M5", "UE5M7", "S1E5M5", "S1E4M3", "S1E2M4", "UE8M0", "BF16",
)  # fmt: skip
SCALES = {name: scale_format(name) for name in SCALE_NAMES}
ALL: dict[str, NumberFormat] = {**ATOMS, **SCALES}

each_format = pytest.mark.parametrize("fmt", ALL.values(), ids=ALL.keys())
