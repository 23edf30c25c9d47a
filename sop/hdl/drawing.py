"""WaveJSON to SVG: what WaveDrom draws, without what is not in the picture."""

import importlib
import json
import re
from typing import Any

from golden.errors import InputError
from golden.extras import install_command

__all__ = ["draw"]


# WaveDrom draws gaps in the middle of a clock, over labels: gaps move right, labels left of them.
_GAP_SHIFT = 8
_GAP_ROOM = 27

# It sets the label of the first clock half over the edge.
_FIRST_LABEL = 19

# Its widths are for Helvetica of 11 points; other fonts are wider.
_FONT = "10pt", "Helvetica,Arial,sans-serif"


def draw(wave: dict[str, Any]) -> str:
    """A timing diagram as an SVG file; the same bytes on every run.

    Parameters
    ----------
    wave : dict
        WaveJSON, as :func:`sim.timing.wavejson` gives it.

    Raises
    ------
    InputError
        If the package ``wavedrom`` is not installed.
    """
    try:
        wavedrom = importlib.import_module("wavedrom")
    except ModuleNotFoundError as error:
        raise InputError(
            f"drawing needs the Python package {error.name!r}; install: "
            f"{install_command('datasheet', 'sim')}"
        ) from error
    text: str = wavedrom.render(json.dumps(wave)).tostring()
    return _compact(text) + "\n"


_USE = re.compile(r'<use transform="translate\(([\d.]+)\)" xlink:href="#([\w-]+)" />')


def _compact(text: str) -> str:
    """The same picture on white, in a third of the bytes."""
    head, definitions, rest = re.split(r"<defs>|</defs>", text)
    style, rest = rest.split("</style>")
    used = sorted({name for _, name in _USE.findall(rest)})
    parts = dict(re.findall(r'<g id="([\w-]+)">(.*?)</g>', definitions, re.DOTALL))
    kept = "".join(f'<g id="b{number}">{parts[name]}</g>' for number, name in enumerate(used))

    def use(match: re.Match[str]) -> str:
        x = float(match[1]) + _GAP_SHIFT * (match[2] == "gap")
        return f'<use x="{x:g}" xlink:href="#b{used.index(match[2])}"/>'

    gaps = {float(x) + _GAP_SHIFT for x, name in _USE.findall(rest) if name == "gap"}

    def label(match: re.Match[str]) -> str:
        x = max(float(match[2]), _FIRST_LABEL)
        x = next((gap - _GAP_ROOM for gap in gaps if abs(gap - x) < _GAP_ROOM), x)
        return f'{match[1]}"{x:g}"'

    rest = re.sub(r'(<text text-anchor="middle" x=)"(\d+)"', label, rest)
    rest = _USE.sub(use, rest)
    rest = re.sub(r' id="\w+"', "", rest)
    rest = re.sub(r'<g( transform="[^"]*")? />|<g></g>', "", rest)
    classes = set(re.findall(r'class="(\w+)"', kept + rest))
    rules = re.findall(r"(\.?\w+)\{(.*?)\}", re.sub(r"\s+", " ", style))
    sheet = "\n".join(
        f"{name}{{{body}}}" for name, body in rules if name == "text" or name[1:] in classes
    )
    sheet = sheet.replace("11pt", _FONT[0]).replace("Helvetica", _FONT[1])
    box = re.search(r'viewBox="0,0,([\d.]+),([\d.]+)"', head)
    assert box is not None, "WaveDrom always gives one"
    paper = f'<rect width="{box[1]}" height="{box[2]}" fill="#fff"/>'
    body = rest.replace("<g transform", "\n<g transform")
    return f"{head}<style>{sheet}</style>\n<defs>{kept}</defs>\n{paper}{body}"
