"""Promotion of E2M3 into HIF: nothing is rounded, and each code is the canonical one."""

import pytest

from golden.formats import E2M3, E4M3, HIF8T, HIF_FORMATS, HifFormat
from golden.notation import parse_format
from golden.promotion import (
    PROMOTED_EXPONENT,
    decoded_format,
    element_exponent,
    is_promoted,
    promoted_codes,
)


@pytest.mark.parametrize("hif", HIF_FORMATS.values(), ids=lambda hif: hif.name)
def test_every_promoted_code_means_the_same_weight(hif: HifFormat) -> None:
    codes = promoted_codes(hif).tolist()
    assert len(codes) == 1 << E2M3.width
    for code, promoted in enumerate(codes):
        value = E2M3.decode(code).value
        assert hif.decode(promoted).value * 2**PROMOTED_EXPONENT == value
        assert promoted == hif.canonical[value / 2**PROMOTED_EXPONENT]


def test_only_promoted_atoms_change_their_format() -> None:
    for name, promoted, decoded in (
        ("E2M3sUE4M4", True, HIF8T),
        ("DD4-DD4sS1E5M5", False, HIF8T),
        ("E4M3sUE4M4", False, E4M3),
    ):
        fmt = parse_format(name)
        assert is_promoted(fmt) == promoted
        assert decoded_format(fmt, HIF8T) == decoded
        assert element_exponent(fmt) == (-3 if promoted else 0)
