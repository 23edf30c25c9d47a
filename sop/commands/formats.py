"""``sop formats``."""

from typing import Annotated, Any

import typer

from golden.formats import DEFAULT_HIF
from sop.shared.console import (
    HifOption,
    JsonOption,
    out,
    parse_format_option,
    print_json,
    print_rows,
)
from sop.shared.format_list import describe_format, format_list

__all__ = ["formats"]


def formats(
    names: Annotated[
        list[str] | None, typer.Argument(help="Formats to describe; without it, list all.")
    ] = None,
    hif: HifOption = DEFAULT_HIF.name,
    as_json: JsonOption = False,
) -> None:
    """List number formats, codebooks and quantization formats with their bits.

    Example: `sop formats` or `sop formats BOF4-NF4^32sS1E5M5 --json`
    """
    if names:
        listing: dict[str, list[dict[str, Any]]] = {
            "formats": [describe_format(parse_format_option(name, hif)) for name in names]
        }
    else:
        listing = format_list()
    if as_json:
        print_json(listing)
        return
    for group in ("atoms", "scales"):
        if group in listing:
            rows = [
                [
                    f["name"],
                    str(f["bits"]),
                    str(f["distinct_values"]),
                    f"{f['min']:g}",
                    f"{f['max']:g}",
                ]
                for f in listing[group]
            ]
            print_rows(group, ["name", "bits", "distinct", "min", "max"], rows)
            out.print()
    if "codebooks" in listing:
        rows = [
            [book["name"], " ".join(str(level) for level in book["levels"]["HIF7"])]
            for book in listing["codebooks"]
        ]
        print_rows("codebooks (blocks of 16, levels on HIF7)", ["name", "levels"], rows)
        out.print()
    rows = [
        [f["name"], f"{f['bits_per_weight']:g}", str(f["index_bits"]), str(f["block_size"]),
         str(f["scale_word_bits"]), f["note"]]
        for f in listing["formats"]
    ]  # fmt: skip
    columns = ["name", "bits/weight", "index bits", "block", "scale word bits", "note"]
    print_rows("quantization formats", columns, rows)
