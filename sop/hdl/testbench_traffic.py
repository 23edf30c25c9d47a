"""What an exported testbench sends into a unit and expects from it, by the golden model.

Every word is made from :class:`golden.vectors.files.VectorStream`, so the same bytes come out
everywhere. Two tensors of each format: one of some beats whose rows end inside beats, one of a
single beat; each has LUTs of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from amaranth.lib import data, wiring
from numpy.typing import NDArray

from golden.corrections import Corrections
from golden.float_input import float_to_hif
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor
from golden.vectors.decoding import moderate_bfloat16, vector_tensor
from golden.vectors.files import VectorStream
from golden.vectors.layers import stand_in_luts
from rtl.float_to_hif import FloatToHif, converted_beat_layout, source_beat_layout
from rtl.layouts import float_beat_layout, merged_beat_layout
from rtl.modes import Modes
from rtl.registers import LUT_WINDOW, PLANES, register
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.units import FLOAT_LAYOUTS, UNITS
from sim.beats import beats_from_fields, beats_from_planes, lut_writes, payloads
from sim.planes import plane_packets
from sim.reference import code_beats, correction_beats, value_beats, weights

__all__ = ["AxiTraffic", "RegisterStep", "Traffic", "axi_traffic", "has_traffic", "stream_traffic"]

_BEATS = 24  # of the longer tensor of a format, about
_ROWS_OF_BLOCKS = 3  # blocks in one of its rows; the last one is partly padding
_CORRECTED = 16  # one weight in so many

Pair = tuple[QuantizedTensor, Corrections | None]


@dataclass(frozen=True)
class Traffic:
    """Words of every input stream and of the output stream, by stream name."""

    inputs: Mapping[str, list[int]]
    output: list[int]


@dataclass(frozen=True)
class RegisterStep:
    """One access of the AXI4-Lite master.

    ``kind`` is ``"write"``, ``"read"`` (the value has to be ``data``), ``"set"`` or ``"clear"``:
    read again and again until all bits of ``data`` are set, or none is.
    """

    kind: str
    address: int
    data: int


@dataclass(frozen=True)
class AxiTraffic:
    """Register accesses, and words of every AXI4-Stream without their handshake.

    A word of an input is ``tdata`` with ``tlast`` above it; of the output also what lies above
    that, ``tkeep`` or ``tuser``.
    """

    steps: list[RegisterStep]
    inputs: Mapping[str, list[int]] = field(default_factory=dict)
    output: list[int] = field(default_factory=list)


def _corrections(shape: tuple[int, int], seed: str) -> Corrections:
    stream = VectorStream(f"corrections/{seed}")
    mask = (stream.words(shape[0] * shape[1]) % _CORRECTED == 0).reshape(shape)
    # Several in one beat, at both ends of it.
    mask[0, : min(3, shape[1])] = True
    values = stream.codes(mask.size, moderate_bfloat16()).astype(np.uint32) << np.uint32(16)
    return Corrections.from_mask(mask, values.view(np.float32).reshape(shape))


def _tensors(formats: tuple[QuantFormat, ...], lanes: int, corrected: bool) -> list[Pair]:
    pairs: list[Pair] = []
    for number, fmt in enumerate(formats):
        size = fmt.block_size
        columns = (_ROWS_OF_BLOCKS - 1) * size + size // 2 + 1
        rows = max(2, -(-_BEATS * lanes // (_ROWS_OF_BLOCKS * size)))
        for name, shape in (("long", (rows, columns)), ("short", (1, min(lanes, size) - 3))):
            seed = f"testbench/{fmt.name}/{number}/{name}"
            stored = (shape[0], -(-shape[1] // size), size)
            tensor = vector_tensor(fmt, shape, stored, seed, stand_in_luts(fmt, seed))
            # The short one has none: that is a case of its own.
            sparse = _corrections(shape, seed) if corrected and name == "long" else None
            pairs.append((tensor, sparse))
    return pairs


def has_traffic(unit: str) -> bool:
    """Whether there is traffic for the streams of a unit: it works on tensors of weights."""
    return UNITS[unit].streams.keys() <= {"i", "i_lut", "i_entry", "o"}


def stream_traffic(
    unit: str,
    component: wiring.Component,
    formats: tuple[QuantFormat, ...],
    *,
    lanes: int,
    output: str,
) -> Traffic:
    """Traffic of a unit with streams of payload, valid and ready.

    Parameters
    ----------
    unit : str
        One of :data:`rtl.units.UNITS` that :func:`has_traffic`.
    component : wiring.Component
        The unit.
    formats : tuple of QuantFormat
        Those it was built for.
    lanes : int
    output : str
        One of :func:`rtl.units.outputs_of`; ignored by units that have only one.
    """
    if isinstance(component, FloatToHif):
        return _conversion(component)
    record = UNITS[unit]
    if "format" not in record.takes:  # any will do
        formats = formats[:1]
    modes, corrected = Modes(formats), "i_entry" in record.streams
    pairs = _tensors(formats, lanes, corrected=corrected)

    def stored(tensor: QuantizedTensor, _: Corrections | None) -> NDArray[np.uint8]:
        return beats_from_planes(
            tensor.index_plane, tensor.scale_plane, tensor.format,
            lanes=lanes, modes=modes, row_scales=tensor.row_scales,
        )  # fmt: skip

    def codes(tensor: QuantizedTensor, _: Corrections | None) -> NDArray[np.uint8]:
        return code_beats(tensor, lanes=lanes, modes=modes)

    def values(
        layout: Callable[..., data.StructLayout], name: str, *, corrected: bool
    ) -> Callable[[QuantizedTensor, Corrections | None], NDArray[np.uint8]]:
        def beats(tensor: QuantizedTensor, sparse: Corrections | None) -> NDArray[np.uint8]:
            beat = layout(lanes=lanes, float_layout=FLOAT_LAYOUTS[name])
            return value_beats(weights(tensor, sparse if corrected else None), beat, name)

        return beats

    def words(
        of: Callable[[QuantizedTensor, Corrections | None], NDArray[np.uint8]],
    ) -> list[int]:
        return [word for pair in pairs for word in payloads(of(*pair))]

    kinds = {
        "index_beat": stored, "hif_beat": codes,
        "dense_beat": values(float_beat_layout, "float32", corrected=False),
        "float_beat": values(float_beat_layout, output, corrected=False),
        "merged_beat": values(merged_beat_layout, output, corrected=True),
    }  # fmt: skip
    inputs = {"i": words(kinds[record.streams["i"]])}
    if "i_lut" in record.streams:
        inputs["i_lut"] = [word for tensor, _ in pairs for word in lut_writes(tensor, modes)]
    if corrected:
        inputs["i_entry"] = words(correction_beats)
    return Traffic(inputs, words(kinds[record.streams["o"]]))


def _conversion(unit: FloatToHif) -> Traffic:
    """Every code of the source; of bfloat16 a random choice."""
    width, lanes = unit.source.width, unit.lanes
    count = lanes * _BEATS
    codes = np.arange(1 << width, dtype=np.uint16)
    if width > 8:
        every = np.ones(1 << width, dtype=bool)
        codes = VectorStream(f"testbench/{unit.source.name}").codes(count, every)
    codes = np.resize(codes, -(-max(count, len(codes)) // lanes) * lanes)
    result = float_to_hif(codes, unit.source, unit.hif, unit.shift)
    flags = {
        name: getattr(result, name).reshape(-1, lanes).any(axis=1).astype(np.uint8)
        for name in ("inexact", "saturated", "nan")
    }
    source = source_beat_layout(lanes=lanes, source=unit.source)
    out = converted_beat_layout(lanes=lanes, hif=unit.hif)
    return Traffic(
        {"i": list(payloads(beats_from_fields({"codes": codes}, source)))},
        list(payloads(beats_from_fields({"codes": result.codes, **flags}, out))),
    )


# ------------------------------------------------------------------------------------------- AXI


def _bus_words(packet: bytes, width: int) -> list[int]:
    """A packet as words of ``tdata`` and ``tlast``."""
    size = width // 8
    words = [
        int.from_bytes(packet[start : start + size], "little")
        for start in range(0, len(packet), size)
    ]
    return [word | int(place == len(words) - 1) << width for place, word in enumerate(words)]


def _field(name: str, field_name: str) -> int:
    return next(item.mask for item in register(name).fields if item.name == field_name)


def _start(unit: SopDecoderAxi, tensor: QuantizedTensor, entries: int) -> list[RegisterStep]:
    """Accesses that describe and start one tensor."""
    ready = _field("STATUS", "start_ready") | _field("STATUS", "lut_ready")
    steps = [RegisterStep("set", register("STATUS").address, ready)]
    for number, lut in enumerate(tensor.luts):
        codes = bytes(lut.codes)
        first = LUT_WINDOW + (number << unit.modes.index_bits)
        steps += [
            RegisterStep("write", first + at, int.from_bytes(codes[at : at + 4], "little"))
            for at in range(0, len(codes), 4)
        ]
    rows, columns = tensor.shape
    settings = {
        "MODE": unit.modes.mode_of(tensor.format),
        "LAYER_EXPONENT": tensor.layer_exponent & 0xFF,
        "ROWS": rows,
        "COLUMNS": columns,
        "CORRECTIONS": entries,
        "CONTROL": _field("CONTROL", "start"),
    }
    steps += [
        RegisterStep("write", register(name).address, value) for name, value in settings.items()
    ]
    return steps


def _output_words(
    unit: SopDecoderAxi, tensor: QuantizedTensor, sparse: Corrections | None, output: str
) -> list[int]:
    lanes, width = unit.lanes, len(unit.m_axis_tdata)
    if unit.float_layout is None:
        return _code_words(unit, tensor, width)
    beat = float_beat_layout(lanes=lanes, float_layout=unit.float_layout)
    lane_bytes = unit.float_layout.size // 8
    words = []
    for word in payloads(value_beats(weights(tensor, sparse), beat, output)):
        values = word & (1 << width) - 1
        last = word >> beat["last"].offset & 1
        used = (tensor.indices.size - 1) % lanes + 1 if last else lanes
        keep = (1 << used * lane_bytes) - 1
        words.append(values | last << width | keep << width + 1)
    return words


def _code_words(unit: SopDecoderAxi, tensor: QuantizedTensor, width: int) -> list[int]:
    """Codes in whole bytes, scale codes and row scales in 16 bits; exponent and mode above."""
    beats = code_beats(tensor, lanes=unit.lanes, modes=unit.modes)
    layout = unit.core.o.p.shape()
    words = []
    for word in payloads(beats):
        parts = []
        for name, bits in (("codes", unit.code_bits), ("scales", 16), ("row_scales", 16)):
            if name not in layout.members:
                continue
            items = layout[name].shape.length
            narrow = layout[name].width // items
            for item in range(items):
                value = word >> layout[name].offset + item * narrow & (1 << narrow) - 1
                parts.append((value, bits))
        packed = at = 0
        for value, bits in parts:
            packed |= value << at
            at += bits
        exponent_bits = layout["layer_exponent"].width
        exponent = word >> layout["layer_exponent"].offset & (1 << exponent_bits) - 1
        sign = exponent >> exponent_bits - 1
        user = exponent | (0xFFFF << exponent_bits & 0xFFFF) * sign
        user |= unit.modes.mode_of(tensor.format) << 16
        last = word >> layout["last"].offset & 1
        words.append(packed | last << width | user << width + 1)
    return words


def axi_traffic(unit: SopDecoderAxi, formats: tuple[QuantFormat, ...], output: str) -> AxiTraffic:
    """Traffic of the decoder behind AXI: describes, starts and checks every tensor.

    Parameters
    ----------
    unit : SopDecoderAxi
    formats : tuple of QuantFormat
        Those it was built for.
    output : str
        ``"float32"``, ``"bfloat16"`` or ``"codes"``.
    """
    steps: list[RegisterStep] = []
    inputs: dict[str, list[int]] = {plane: [] for plane in PLANES if plane in unit.core.widths}
    words: list[int] = []
    pairs = _tensors(formats, unit.lanes, corrected=unit.core.corrections)
    for tensor, sparse in pairs:
        steps += _start(unit, tensor, sparse.entries if sparse is not None else 0)
        for plane, packet in plane_packets(tensor, sparse).items():
            inputs[plane] += _bus_words(packet, unit.core.widths[plane])
        words += _output_words(unit, tensor, sparse, output)
    steps += [
        RegisterStep("clear", register("STATUS").address, _field("STATUS", "busy")),
        RegisterStep("read", register("ERRORS").address, 0),
        RegisterStep("read", register("TENSORS").address, len(pairs)),
        RegisterStep("read", register("BEATS").address, len(words)),
    ]
    return AxiTraffic(steps, inputs, words)
