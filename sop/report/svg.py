"""Matplotlib figures as part of a web page.

What the page wants and Matplotlib's file does not have: no ids that clash between figures, colours
that follow the page's light or dark mode, the page's font, a title per mark for the pointer, and a
fraction of the bytes.
"""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from sop.shared.marks import PNG_SOFTWARE

__all__ = [
    "FIXED_BLACK",
    "FIXED_WHITE",
    "PALETTE",
    "Drawing",
    "inline_svg",
    "page_style",
    "png",
    "printable",
]

PALETTE = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d1d9e0",
    "paper": "#ffffff",
    "first": "#0b6bcb",
    "second": "#b35900",
}
"""Colours that differ in dark mode: names of the page's custom properties, values in light mode."""

FIXED_BLACK = "#111111"
FIXED_WHITE = "#fefefe"

_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sop",  # the same ids on every run
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "DejaVu Sans",  # comes with Matplotlib
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PALETTE["paper"],
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_HREF = "{http://www.w3.org/1999/xlink}href"
_VARIABLES = {colour: f"var(--{name})" for name, colour in PALETTE.items()}
_ESCAPED = re.compile("|".join(_VARIABLES))
_PNG_DPI = 300


def page_style() -> AbstractContextManager[None]:
    """Settings of Matplotlib under which figures must be made and saved."""
    settings: Any = _STYLE  # its stubs want the names as literals
    return matplotlib.rc_context(settings)


@dataclass
class Drawing:
    """A figure and what its marks say.

    Attributes
    ----------
    figure : Figure
    tips : dict of str to sequence of str
        For a group id, one text per mark that the group draws, in drawing order.
    """

    figure: Figure
    tips: dict[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def blank(
        cls, width: float, height: float, layout: Literal["constrained"] | None = "constrained"
    ) -> "Drawing":
        """Return an empty figure of this size in inches, in the page's style."""
        with page_style():
            return cls(Figure(figsize=(width, height), layout=layout))

    def label(self, artist: Artist, tips: Sequence[str]) -> None:
        """Give each mark of an artist its text."""
        group = f"marks{len(self.tips)}"
        artist.set_gid(group)
        self.tips[group] = tips


def printable(text: str) -> str:
    r"""Spell out what cannot be seen or turns the direction of writing, as in ``\u202e``."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text.encode("utf-8", "backslashreplace").decode("utf-8")
    )


def png(drawing: Drawing) -> bytes:
    """Return the figure as a PNG for print."""
    file = io.BytesIO()
    with page_style():
        metadata = {"Software": PNG_SOFTWARE}
        drawing.figure.savefig(file, format="png", dpi=_PNG_DPI, metadata=metadata)
    return file.getvalue()


def inline_svg(drawing: Drawing, prefix: str, label: str) -> Markup:
    """Return the figure as an ``<svg>`` element of an HTML page.

    Parameters
    ----------
    drawing : Drawing
    prefix : str
        Starts every id; unique on the page.
    label : str
        What the figure shows, for screen readers.
    """
    file = io.StringIO()
    with page_style():
        drawing.figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(file.getvalue())
    for group, tips in drawing.tips.items():
        _add_titles(root, group, tips)
    _clean(root, prefix)
    attributes = {
        "class": "plot", "viewBox": root.get("viewBox", ""), "role": "img", "tabindex": "0",
        "aria-label": label,
    }  # fmt: skip
    # The page scales a figure down, never up.
    width = float(root.get("width", "0pt").removesuffix("pt")) * 4 / 3
    attributes["style"] = f"max-width: {width:.0f}px"
    root.attrib.clear()
    root.attrib.update(attributes)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _add_titles(root: ElementTree.Element, group: str, tips: Sequence[str]) -> None:
    parent = root.find(f".//*[@id='{group}']")
    marks = [] if parent is None else list(_marks(parent))
    if len(marks) != len(tips):
        raise AssertionError(f"{group}: {len(marks)} marks drawn, {len(tips)} texts")
    for mark, tip in zip(marks, tips, strict=True):
        mark.set("class", "mark")
        ElementTree.SubElement(mark, "title").text = printable(tip)


def _marks(parent: ElementTree.Element) -> list[ElementTree.Element]:
    found = []
    for child in parent:
        kind = child.tag.rpartition("}")[2]
        if kind in ("path", "use"):
            found.append(child)
        elif kind != "defs":
            found += _marks(child)
    return found


def _clean(root: ElementTree.Element, prefix: str) -> None:
    """Drop what a page does not need, and make the rest its own."""
    used = {
        match
        for element in root.iter()
        for value in (element.get(_HREF, ""), element.get("clip-path", ""))
        for match in re.findall(r"#([\w.-]+)", value)
    }
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = (element.text or "").strip() if element.tag != "text" else element.text
        element.tail = None
        if element.get("id") in used:
            element.set("id", f"{prefix}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        if _HREF in element.attrib:
            element.set("href", f"#{prefix}-{element.attrib.pop(_HREF)[1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.get("clip-path", "").replace("#", f"#{prefix}-"))
        if "style" in element.attrib:
            element.set("style", _style(element.get("style", "")))
        for name in ("x", "y", "transform", "width", "height"):
            if name in element.attrib:
                element.set(name, _short_numbers(element.get(name, "")))
        if "d" in element.attrib:
            element.set("d", _short_path(element.get("d", "")))
        if re.match(r"rotate\(-?0 ", element.get("transform", "")):
            del element.attrib["transform"]
    _hoist(root)


def _style(text: str) -> str:
    text = re.sub(r"font-family: [^;]*;?\s*", "", text)
    text = _ESCAPED.sub(lambda match: _VARIABLES[match[0]], text)
    return text.replace(": ", ":").replace("; ", ";").strip("; ")


def _short_numbers(text: str) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0"), text)
    return re.sub(r"\.(?!\d)", "", text)


def _short_path(text: str) -> str:
    """Path with two decimals, and with H and V where a line is horizontal or vertical."""
    short, x, y = "", "", ""
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", _short_numbers(text)):
        values = numbers.split()
        if command == "L" and values[0] == x:
            short += f"V{values[1]}"
        elif command == "L" and values[1] == y:
            short += f"H{values[0]}"
        else:
            short += command + " ".join(values)
        x, y = values[-2:] if values else ("", "")
    return short


def _hoist(element: ElementTree.Element) -> None:
    """Move style and clipping that all children of a group share to the group."""
    for child in list(element):
        _hoist(child)
        if child.tag == "g" and not len(child):
            element.remove(child)
    if element.tag != "g" or len(element) < 2:
        return
    for name in ("style", "clip-path"):
        values = {child.get(name) for child in element}
        if len(values) == 1 and None not in values and name not in element.attrib:
            element.set(name, element[0].attrib[name])
            for child in element:
                del child.attrib[name]
