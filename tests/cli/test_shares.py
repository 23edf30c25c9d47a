"""Shares in percent, which never round to all or nothing."""

import pytest

from sop.shared.shares import percent


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (1.0, 2, "100.00"),
        (1 - 1e-12, 2, "over 99.99"),
        (0.99996, 2, "over 99.99"),
        (0.9999, 2, "99.99"),
        (0.9996, 1, "over 99.9"),
        (0.5, 1, "50.0"),
        (0.0001, 2, "0.01"),
        (0.00004, 2, "under 0.01"),
        (1e-12, 1, "under 0.1"),
        (0.0, 2, "0.00"),
    ],
)
def test_only_all_and_nothing_read_so(share: float, digits: int, text: str) -> None:
    assert percent(share, digits) == text
