"""The contract of one configuration of a unit, as JSON describes it.

Everything else that is written about a unit (LiteX wrapper, datasheet) is made from it.
"""

from collections.abc import Sequence
from typing import Any

from amaranth.lib import data, stream, wiring

from golden.notation import QuantFormat
from rtl.float_to_hif import FloatToHif
from rtl.identity import format_text, hexadecimal, identification
from rtl.layouts import FLOAT32
from rtl.lut_tile import LutTile
from rtl.matmul_tile import MatmulTile
from rtl.registers import LUT_WINDOW
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sop_tile import SopTile, TileShape
from rtl.tile_epilogue import TileEpilogue
from rtl.units import UNITS, Options, Unit, build_unit, configuration_name, options_of
from rtl.verilog import port_table
from sop import __version__

__all__ = ["GENERATOR", "LICENCE", "describe", "timing"]

GENERATOR = f"scaled-outer-product {__version__}"
LICENCE = "Apache-2.0"


def timing(unit: str, output: str) -> dict[str, int | str]:
    """Latency in clocks and throughput of a unit; nothing for one whose timing is not fixed."""
    record = UNITS[unit]
    if record.latency is None:
        return {}
    return {"latency_clocks": record.clocks(output), "throughput": record.throughput}


def describe(
    unit: str, formats: QuantFormat | Sequence[QuantFormat], **options: Any
) -> tuple[wiring.Component, dict[str, Any]]:
    """Build a unit and describe it.

    Parameters
    ----------
    unit, formats, **options
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
    component = build_unit(unit, formats, **options)
    chosen = options_of(formats, **options)
    description = {
        "module": configuration_name(unit, formats, **options),
        "unit": unit,
        "generator": GENERATOR,
        "licence": LICENCE,
        "parameters": _parameters(component, UNITS[unit], chosen),
        "timing": timing(unit, chosen.output),
        "clock": "clk, rising edge",
        "reset": "rst, synchronous, active high; required once after power-up",
        "streams": _streams(component),
        "ports": _ports(component),
    }
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


def _parameters(component: wiring.Component, unit: Unit, options: Options) -> dict[str, Any]:
    """Everything that shapes the hardware: what the unit takes, and what follows from it."""
    parameters = _tile_parameters(component)
    if "lanes" in unit.takes:
        parameters["lanes"] = options.lanes
    if isinstance(component, SopTile | TileEpilogue):
        return parameters
    if "format" in unit.takes:
        modes = options.modes
        parameters["lut_entry"] = modes.hif.name if modes.codebook_formats else None
        # In the order of `mode`.
        parameters["formats"] = [_format_facts(fmt) for fmt in modes.formats]
    if "output" in unit.takes:
        parameters["output"] = options.output
    if "lookup" in unit.takes and parameters["lut_entry"]:
        parameters["lookup"] = options.lookup
    if isinstance(component, FloatToHif):
        parameters |= {
            "source": options.source, "lut_entry": component.hif.name, "shift": component.shift
        }  # fmt: skip
    return parameters


def _tile_parameters(component: wiring.Component) -> dict[str, Any]:
    """Of a tile, or of what is around it; nothing of other units."""
    if isinstance(component, MatmulTile):
        tile = _tile_parameters(component.lut_tile)
        return {**tile, **_tile_parameters(component.epilogue), "outputs": tile["outputs"]}
    if isinstance(component, LutTile):
        return _tile_parameters(component.tile)
    if isinstance(component, SopTile):
        return {
            "rows": component.rows,
            "columns": component.columns,
            "block_size": component.block_size,
            "weight": component.weight.name,
            "weight_scale": component.weight_scale.name,
            "activation": component.activation.name,
            "activation_scale": component.activation_scale.name,
            "multiplier": component.multiplier,
            **_outputs(component.shape),
        }
    if isinstance(component, TileEpilogue):
        shape = component.shape
        return {
            "rows": component.rows,
            "columns": component.columns,
            "block_size": component.capture.block_size,
            "activation": component.activation.name,
            "activation_scale": component.activation_scale.name,
            "row_scales": component.row_scales,
            "slots": component.capture.slots,
            "output": "float32" if component.float_layout == FLOAT32 else "bfloat16",
            "clocks_of_correction": shape.turns,
            **_outputs(shape),
        }
    return {}


def _outputs(shape: TileShape) -> dict[str, Any]:
    """Also, for each beat of a tile, row and column of the output of each scale unit."""
    return {
        "scale_units": shape.units,
        "output_beats": shape.used,
        "outputs": [
            [shape.place(unit, step) for unit in range(shape.units)] for step in range(shape.used)
        ],
    }


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
