"""What all figures of a report have in common: style, width, labels, axes."""

from collections.abc import Sequence
from functools import wraps
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sop.report.svg import page_style, printable

__all__ = ["WIDTH", "log_axis", "plain_number", "short", "styled"]

WIDTH = 9.6  # inches
_MAX_LABEL = 34


def styled(draw: Any) -> Any:
    """Draw under the page's settings."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        with page_style():
            return draw(*args, **kwargs)

    return drawn


def short(text: str) -> str:
    """Return the text for a figure: ASCII, because fonts differ, and not too long."""
    text = printable(text).encode("ascii", "backslashreplace").decode("ascii")
    half = (_MAX_LABEL - 3) // 2
    return text if len(text) <= _MAX_LABEL else f"{text[:half]}...{text[-half:]}"


def plain_number(value: float, _: int = 0) -> str:
    """Return a number for an axis; Matplotlib gives its position, too."""
    return f"{value:g}"


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis of values logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if max(values) < 30 * min(values):  # too few powers of ten for labels
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
