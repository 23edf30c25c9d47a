"""The contract of one configuration of a unit, as JSON describes it.

Everything else that is written about a unit (LiteX wrapper, datasheet) is made from it.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from amaranth.lib import data, stream, wiring

from golden.activations import ActivationFormat
from golden.notation import QuantFormat
from rtl.float_to_hif import FloatToHif
from rtl.identity import format_text, hexadecimal, identification
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import Modes
from rtl.registers import LUT_WINDOW
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sop_tile import LATENCY
from rtl.tile_units import TILE_UNIT, build_tile, tile_name
from rtl.units import build_unit, configuration_name, latency_of, outputs_of
from rtl.verilog import port_table
from sop import __version__

__all__ = ["GENERATOR", "LICENCE", "describe", "describe_tile", "timing"]

GENERATOR = f"scaled-outer-product {__version__}"
LICENCE = "Apache-2.0"

_ONE_BEAT = "one beat per clock"
_MERGED = "one beat per clock; a beat with several corrections takes a clock for each"

_THROUGHPUT = {"sparse_merge": _MERGED, "sparse_decoder": _MERGED}


def timing(unit: str, output: str) -> dict[str, int | str]:
    """Latency in clocks and throughput of a unit; nothing for one whose timing is not fixed."""
    if unit == "sop_decoder_axi":
        return {}
    return {
        "latency_clocks": latency_of(unit, output),
        "throughput": _THROUGHPUT.get(unit, _ONE_BEAT),
    }


def describe(
    unit: str,
    formats: QuantFormat | Sequence[QuantFormat],
    *,
    lanes: int,
    output: str,
    source: str = "BF16",
    lookup: str = DEFAULT_LOOKUP,
) -> tuple[wiring.Component, dict[str, Any]]:
    """Build a unit and describe it.

    Parameters
    ----------
    unit, formats, lanes, output, source, lookup
        As :func:`rtl.units.build_unit`.

    Returns
    -------
    component : wiring.Component
    description : dict
        ``module``, ``unit``, ``generator``, ``licence``, ``parameters``, ``timing``, ``clock``,
        ``reset``, ``streams`` and ``ports``; ready for JSON. Codebook names are not in it: LUT
        contents are loaded at run time.

    Raises
    ------
    InputError
        If the unit cannot be built.
    """
    component = build_unit(unit, formats, lanes=lanes, output=output, source=source, lookup=lookup)
    name = configuration_name(
        unit, formats, lanes=lanes, output=output, source=source, lookup=lookup
    )
    parameters = _parameters(component, unit, formats, lanes, output, source, lookup)
    description = _description(component, name, unit, parameters, timing(unit, output))
    if isinstance(component, SopDecoderAxi):
        entries = component.modes.luts << component.modes.index_bits
        stride = 1 << component.modes.index_bits
        window = {"address": LUT_WINDOW, "entries": entries, "stride": stride}
        description |= {
            "lut_window": window,
            "plane_widths": component.core.widths,
            "identification": _identification(component),
        }
    return component, description


def _identification(component: SopDecoderAxi) -> dict[str, Any]:
    """What the hardware calls itself and its formats, in the order of ``mode``."""
    return {
        "text": component.identity,
        "build_id": hexadecimal(identification(component.identity)),
        "formats": [
            {"text": text, "format_id": hexadecimal(identification(text))}
            for text in map(format_text, component.modes.formats)
        ],
    }


def describe_tile(
    weights: QuantFormat, activations: ActivationFormat, *, rows: int, columns: int, multiplier: str
) -> tuple[wiring.Component, dict[str, Any]]:
    """Build a tile and describe it, as :func:`describe` does for other units.

    Parameters
    ----------
    weights, activations, rows, columns, multiplier
        As :func:`rtl.tile_units.build_tile`.

    Raises
    ------
    InputError
        If the tile cannot be built.
    """
    tile = build_tile(weights, activations, rows=rows, columns=columns, multiplier=multiplier)
    shape = tile.shape
    parameters = {
        "rows": rows,
        "columns": columns,
        "block_size": tile.block_size,
        "weight": tile.weight.name,
        "weight_scale": tile.weight_scale.name,
        "activation": tile.activation.name,
        "activation_scale": tile.activation_scale.name,
        "multiplier": multiplier,
        "scale_units": shape.units,
        "output_beats": shape.used,
        # For each beat of a tile: row and column of the output of each scale unit.
        "outputs": [
            [shape.place(unit, step) for unit in range(shape.units)] for step in range(shape.used)
        ],
    }
    facts: dict[str, int | str] = {"latency_clocks": LATENCY, "throughput": _ONE_BEAT}
    name = tile_name(weights, activations, rows=rows, columns=columns, multiplier=multiplier)
    return tile, _description(tile, name, TILE_UNIT, parameters, facts)


def _description(
    component: wiring.Component,
    name: str,
    unit: str,
    parameters: dict[str, Any],
    facts: dict[str, int | str],
) -> dict[str, Any]:
    return {
        "module": name,
        "unit": unit,
        "generator": GENERATOR,
        "licence": LICENCE,
        "parameters": parameters,
        "timing": facts,
        "clock": "clk, rising edge",
        "reset": "rst, synchronous, active high; required once after power-up",
        "streams": _streams(component),
        "ports": _ports(component),
    }


def _parameters(
    component: wiring.Component,
    unit: str,
    formats: QuantFormat | Sequence[QuantFormat],
    lanes: int,
    output: str,
    source: str,
    lookup: str,
) -> dict[str, Any]:
    """Everything that shapes the hardware: of the arguments those that the component has."""
    known = inspect.signature(type(component)).parameters
    parameters: dict[str, Any] = {"lanes": lanes}
    if "modes" in known:
        modes = Modes((formats,) if isinstance(formats, QuantFormat) else tuple(formats))
        parameters["lut_entry"] = modes.hif.name if modes.codebook_formats else None
        # In the order of `mode`.
        parameters["formats"] = [_format_facts(fmt) for fmt in modes.formats]
    if outputs_of(unit):
        parameters["output"] = output
    if "lookup" in known and parameters["lut_entry"]:
        parameters["lookup"] = lookup
    if isinstance(component, FloatToHif):
        shift = component.shift
        parameters |= {"source": source, "lut_entry": component.hif.name, "shift": shift}
    return parameters


def _format_facts(fmt: QuantFormat) -> dict[str, Any]:
    return {
        "element": fmt.atom.name if fmt.atom else f"LUT of {2**fmt.index_bits}",
        "luts": len(fmt.codebooks),
        "index_bits": fmt.index_bits,
        "block_size": fmt.block_size,
        "scale": fmt.word.scale.name,
        "metabit": bool(fmt.word.metabit_bits),
        "scale_word_bits": fmt.word.width,
        "row_scale": fmt.row_scale,
    }


def _stream_members(component: wiring.Component) -> dict[str, wiring.Member]:
    """Those members that are streams of payload, valid and ready."""
    return {
        name: member
        for name, member in component.signature.members.items()
        if member.is_signature and isinstance(member.signature, stream.Signature)
    }


def _streams(component: wiring.Component) -> list[dict[str, Any]]:
    """Every stream: name, direction of its payload, and the payload's fields, one level deep."""
    streams = []
    for name, member in _stream_members(component).items():
        layout = getattr(component, name).payload.shape()
        fields = [
            {"name": key, "offset": field.offset, "width": field.width, **_shape_facts(field)}
            for key, field in layout
            if field.width
        ]
        direction = "input" if member.flow is wiring.In else "output"
        streams.append({"name": name, "direction": direction, "fields": fields})
    return streams


def _shape_facts(field: data.Field) -> dict[str, int | bool]:
    """Number of items of an array; whether a plain number is two's complement."""
    if isinstance(field.shape, data.ArrayLayout):
        return {"items": field.shape.length}
    return {"signed": True} if getattr(field.shape, "signed", False) else {}


def _payload_fields(layout: data.Layout, prefix: str = "", base: int = 0) -> list[dict[str, Any]]:
    """Every leaf field of a payload: dotted name, lowest bit, width."""
    fields = []
    for key, field in layout:
        name = f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}".lstrip(".")
        if isinstance(field.shape, data.Layout):
            fields += _payload_fields(field.shape, name, base + field.offset)
        elif field.width:
            fields.append({"name": name, "offset": base + field.offset, "width": field.width})
    return fields


def _ports(component: wiring.Component) -> list[dict[str, Any]]:
    """Every port; those that are payloads with all their leaf fields."""
    ports: list[dict[str, Any]] = [dict(port) for port in port_table(component)]
    by_name = {port["name"]: port for port in ports}
    for name in _stream_members(component):
        layout = getattr(component, name).payload.shape()
        by_name[f"{name}__payload"]["fields"] = _payload_fields(layout)
    return ports
