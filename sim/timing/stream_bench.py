"""Scenarios of the units with streams, for the timing diagrams of :mod:`sim.timing.wavejson`.

A test records one scenario. What comes out is named after the word that the golden model expects;
any other word fails the test.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import cocotb
import numpy as np
from amaranth.lib import data
from cocotb.task import Task

from golden.corrections import Corrections, corrected
from golden.float_input import SOURCES, float_to_hif
from golden.float_output import element_to_float
from golden.tensor import QuantizedTensor, decode
from rtl.float_to_hif import converted_beat_layout, source_beat_layout
from rtl.layouts import (
    FLOAT32,
    correction_layout,
    float_beat_layout,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
    merged_beat_layout,
)
from sim.beats import beats_from_fields, beats_from_planes, lut_writes, payloads
from sim.clock import reset
from sim.lut_model import LutDecoderModel
from sim.random_tensors import random_tensor
from sim.stalls import no_stalls
from sim.stream import StreamDriver, StreamPins
from sim.timing.recorder import RecordedScene
from sim.timing.wavejson import Cell

__all__ = ["Scene"]


def named(words: Iterable[int], prefix: str, tensor: int) -> dict[int, Cell]:
    """Labels of words in order: prefix and number."""
    return {word: Cell(f"{prefix}{number}", tensor) for number, word in enumerate(words)}


def pauses(*clocks: int) -> Iterator[int]:
    """So many idle clocks before the first words, none before the others."""
    return chain(clocks, no_stalls())


class Scene(RecordedScene):
    """Drivers and recorder around one unit."""

    def __init__(self, dut: Any) -> None:
        super().__init__(dut)
        self.tasks: list[Task[None]] = []
        floats = {"lanes": self.lanes, "float_layout": FLOAT32}
        self.layouts = {
            "index": index_beat_layout(lanes=self.lanes, modes=self.modes),
            "lut": lut_write_layout(modes=self.modes),
            "hif": hif_beat_layout(lanes=self.lanes, modes=self.modes),
            "float": float_beat_layout(**floats),
            "merged": merged_beat_layout(**floats),
            "entry": correction_layout(),
        }
        for name in ("i", "i_lut", "i_entry"):
            if hasattr(dut, f"{name}__valid"):
                getattr(dut, f"{name}__valid").value = 0
        dut.o__ready.value = 1

    def send(self, stream: str, words: Sequence[int], *idle: int) -> Task[None]:
        """Offer words from now on, after so many idle clocks before each of the first."""
        driver = StreamDriver(StreamPins(self.dut, stream, self.dut.clk), pauses(*idle))
        task = cocotb.start_soon(driver.send(words))
        self.tasks.append(task)
        return task

    async def stall(self, after: int, clocks: int) -> None:
        """The output is not taken for some clocks."""
        await self.clocks(after)
        self.dut.o__ready.value = 0
        await self.clocks(clocks)
        self.dut.o__ready.value = 1

    # --- traffic of tensors -----------------------------------------------------------------------

    def tensor(self, beats: int) -> QuantizedTensor:
        """Random codes, one row of so many beats."""
        shape = (1, beats * self.lanes)
        return random_tensor(self.rng, self.config.formats[0], shape)

    def beats(self, tensor: QuantizedTensor) -> list[int]:
        """Payloads of the beats of a tensor."""
        rows = beats_from_planes(
            tensor.index_plane, tensor.scale_plane, tensor.format,
            lanes=self.lanes, modes=self.modes,
        )  # fmt: skip
        return list(payloads(rows))

    def watch_tensors(
        self, tensors: Sequence[QuantizedTensor], output: str, corrections: Sequence[Any] = ()
    ) -> None:
        """Rows of LUT writes, beats and results, named A, B and so on."""
        writes: dict[int, Cell] = {}
        inputs: dict[int, Cell] = {}
        outputs: dict[int, Cell] = {}
        model = LutDecoderModel(self.config)
        for number, tensor in enumerate(tensors):
            words = lut_writes(tensor, self.modes)
            entries = len(words) // len(tensor.luts)
            writes |= {
                word: Cell(f"L{'ab'[place // entries]}{place % entries}", number)
                for place, word in enumerate(words)
            }
            beats = self.beats(tensor)
            inputs |= named(beats, "AB"[number], number)
            if output == "hif":
                for word in words:
                    model.write(word)
                results = [model.decode(word) for word in beats]
            else:
                sparse = corrections[number] if corrections else None
                values = corrected(decode(tensor, padded=True), sparse)
                fields = {"values": values.reshape(-1).view(np.uint32)}
                results = list(payloads(beats_from_fields(fields, self.layouts[output])))
            outputs |= named(results, "AB"[number], number)
        self.recorder.payload("i_lut", writes, self.layouts["lut"], "last")
        self.recorder.payload("i", inputs, self.layouts["index"], "last")
        self.watched_output = (outputs, self.layouts[output])
        if not corrections:
            self.watch_output()

    def watch_output(self, *fields: str) -> None:
        """Rows of the output, after all inputs."""
        labels, layout = self.watched_output
        self.recorder.payload("o", labels, layout, *fields, "last")

    def entries(self, corrections: Corrections | None, tensor: int) -> dict[int, Cell]:
        """Payloads of the corrections of a tensor of one row, named by their position."""
        layout = self.layouts["entry"]
        last = 1 << layout["last"].offset
        if corrections is None:
            return {1 << layout["empty"].offset | last: Cell("none", tensor)}
        pairs = list(zip(corrections.columns.tolist(), corrections.values.tolist(), strict=True))
        words = [position | value << layout["value"].offset for position, value in pairs]
        words[-1] |= last
        labels = [Cell(str(position), tensor) for position, _ in pairs]
        return dict(zip(words, labels, strict=True))


def corrections_at(columns: int, positions: Sequence[int]) -> Corrections:
    """Corrections of one row, of value 1.5."""
    mask = np.zeros((1, columns), dtype=bool)
    mask[0, list(positions)] = True
    return Corrections.from_mask(mask, np.full((1, columns), 1.5, dtype=np.float32))


# --- LutDecoder, FloatDecoder ---------------------------------------------------------------------


@cocotb.test()
async def lut_decoder_reset(dut: Any) -> None:
    """Before and after the first reset; a reset in mid-tensor."""
    scene = Scene(dut)
    tensor = scene.tensor(5)
    scene.recorder.bit("rst")
    scene.watch_tensors([tensor], "hif")
    dut.rst.value = 0
    scene.recorder.start()
    await scene.clocks(1)
    await reset(dut)
    scene.send("i_lut", lut_writes(tensor, scene.modes))
    scene.send("i", scene.beats(tensor), 32)
    await scene.clocks(36)
    for task in scene.tasks:
        task.cancel()
    dut.i__valid.value = 0
    dut.rst.value = 1
    await scene.clocks(1)
    dut.rst.value = 0
    scene.send("i", scene.beats(tensor))
    await scene.finish("lut_decoder_reset", 4)


async def _load(dut: Any, output: str, name: str, clocks: int) -> None:
    scene = Scene(dut)
    tensor = scene.tensor(4)
    scene.watch_tensors([tensor], output)
    await reset(dut)
    scene.recorder.start()
    scene.send("i_lut", lut_writes(tensor, scene.modes), 1)
    scene.send("i", scene.beats(tensor), 1)
    await scene.finish(name, clocks)


@cocotb.test()
async def lut_decoder_load(dut: Any) -> None:
    """LUTs and beats are offered at once."""
    await _load(dut, "hif", "lut_decoder_load", 41)


@cocotb.test()
async def float_decoder_load(dut: Any) -> None:
    """LUTs and beats are offered at once."""
    await _load(dut, "float", "float_decoder_load", 44)


@cocotb.test()
async def lut_decoder_swap(dut: Any) -> None:
    """The second set of LUTs is complete before the first tensor ends."""
    scene = Scene(dut)
    tensors = [scene.tensor(38), scene.tensor(4)]
    scene.watch_tensors(tensors, "hif")
    await reset(dut)
    first, second = (lut_writes(tensor, scene.modes) for tensor in tensors)
    await scene.send("i_lut", first)
    scene.recorder.start()
    scene.send("i_lut", second, 3)
    scene.send("i", [word for tensor in tensors for word in scene.beats(tensor)], 2)
    await scene.finish("lut_decoder_swap", 46)


@cocotb.test()
async def lut_decoder_late(dut: Any) -> None:
    """The second set of LUTs is complete after the first tensor ends."""
    scene = Scene(dut)
    tensors = [scene.tensor(3), scene.tensor(3)]
    scene.watch_tensors(tensors, "hif")
    await reset(dut)
    first, second = (lut_writes(tensor, scene.modes) for tensor in tensors)
    await scene.send("i_lut", [*first, *second[:28]])
    scene.recorder.start()
    scene.send("i", [word for tensor in tensors for word in scene.beats(tensor)], 1)
    scene.send("i_lut", second[28:], 3)
    await scene.finish("lut_decoder_late", 14)


@cocotb.test()
async def lut_decoder_stall(dut: Any) -> None:
    """The output is not taken for three clocks."""
    scene = Scene(dut)
    tensor = scene.tensor(6)
    scene.watch_tensors([tensor], "hif")
    scene.recorder.tracks = scene.recorder.tracks[4:]  # LUTs are loaded before
    await reset(dut)
    await scene.send("i_lut", lut_writes(tensor, scene.modes))
    scene.recorder.start()
    scene.send("i", scene.beats(tensor), 2)
    await scene.stall(5, 3)
    await scene.finish("lut_decoder_stall", 6)


# --- converters -----------------------------------------------------------------------------------


def packed(fields: dict[str, Any], layout: data.StructLayout) -> list[int]:
    """Payloads of the beats of one tensor."""
    return list(payloads(beats_from_fields(fields, layout)))


@cocotb.test()
async def hif_to_float_latency(dut: Any) -> None:
    """Six beats; the output waits for the third."""
    scene = Scene(dut)
    fmt, lanes, beats = scene.config.formats[0], scene.lanes, 7
    layout_in, layout_out = scene.layouts["hif"], scene.layouts["float"]
    # Lane 0 counts up: 1.0 times 1, 2 and so on, at the scale code of 1.0.
    one = fmt.word.scale.bias << fmt.word.scale.mantissa_bits
    codes = scene.rng.integers(1 << fmt.hif.width, size=(beats, lanes))
    codes[:, 0] = np.arange(1, beats + 1)
    scales = np.full((beats, scene.modes.slots(lanes)), one, dtype=np.uint16)
    result = element_to_float(
        codes.reshape(scales.size, -1).astype(np.uint32), scales.reshape(-1, 1), 0,
        element=fmt.hif, scale=fmt.word.scale,
    )  # fmt: skip
    inputs = packed({"codes": codes.reshape(-1), "scales": scales.reshape(-1)}, layout_in)
    outputs = packed({"values": result.bits.reshape(-1)}, layout_out)
    scene.recorder.payload("i", named(inputs, "D", 0), layout_in, "codes", "scales", "last")
    scene.recorder.payload("o", named(outputs, "D", 0), layout_out, "values", "last")
    await reset(dut)
    scene.recorder.start()
    scene.send("i", inputs, 1)
    await scene.stall(7, 3)
    await scene.finish("hif_to_float_latency", 7)


@cocotb.test()
async def float_to_hif_latency(dut: Any) -> None:
    """Values that are exact, rounded, saturated and NaN."""
    scene = Scene(dut)
    source, hif = SOURCES["BF16"], scene.config.formats[0].hif
    layout_in = source_beat_layout(lanes=scene.lanes, source=source)
    layout_out = converted_beat_layout(lanes=scene.lanes, hif=hif)
    shown = [0xBF80, 0x3F00, 0x3E81, 0x3F80, 0x7FC0, 0x0000]
    codes = np.zeros((len(shown), scene.lanes), dtype=np.uint32)
    codes[:, 0] = shown
    result = float_to_hif(codes, source, hif)
    inputs = packed({"codes": codes.reshape(-1)}, layout_in)
    outputs = packed({"codes": result.codes.reshape(-1).astype(np.uint32)}, layout_out)
    flags = ("inexact", "saturated", "nan")
    for number in range(len(outputs)):
        for flag in flags:
            raised = int(getattr(result, flag)[number].any())
            outputs[number] |= raised << layout_out[flag].offset
    scene.recorder.payload("i", named(inputs, "D", 0), layout_in, "codes", "last")
    scene.recorder.payload("o", named(outputs, "D", 0), layout_out, "codes", *flags, "last")
    await reset(dut)
    scene.recorder.start()
    scene.send("i", inputs, 1)
    await scene.stall(6, 3)
    await scene.finish("float_to_hif_latency", 7)


# --- corrections ----------------------------------------------------------------------------------


class MergeScene(Scene):
    """Dense beats and entries of :class:`rtl.sparse_merge.SparseMerge`."""

    def watch(self, tensors: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
        """Tensors of so many beats, corrections at these positions; gives beats and entries."""
        beats: dict[int, Cell] = {}
        entries: dict[int, Cell] = {}
        results: dict[int, Cell] = {}
        for number, (count, positions) in enumerate(tensors):
            values = self.rng.standard_normal((1, count * self.lanes)).astype(np.float32)
            corrections = corrections_at(values.size, positions) if positions else None
            sums = corrected(values, corrections)
            for into, words, layout in ((beats, values, "float"), (results, sums, "merged")):
                fields = {"values": words.reshape(-1).view(np.uint32)}
                into |= named(packed(fields, self.layouts[layout]), "DE"[number], number)
            entries |= self.entries(corrections, number)
        self.recorder.payload("i", beats, self.layouts["float"], "last")
        self.recorder.payload("i_entry", entries, self.layouts["entry"], "empty", "last")
        self.recorder.payload("o", results, self.layouts["merged"], "last")
        return list(beats), list(entries)


@cocotb.test()
async def sparse_merge_corrections(dut: Any) -> None:
    """Three beats with no, one and three corrections."""
    scene = MergeScene(dut)
    beats, entries = scene.watch([(4, (40, 64, 65, 66))])
    await reset(dut)
    scene.recorder.start()
    scene.send("i", beats, 1)
    scene.send("i_entry", entries, 1)
    await scene.finish("sparse_merge_corrections", 13)


@cocotb.test()
async def sparse_merge_late(dut: Any) -> None:
    """The second entry is late; the output stalls; the second tensor has no corrections."""
    scene = MergeScene(dut)
    beats, entries = scene.watch([(2, (3, 35)), (1, ())])
    await reset(dut)
    scene.recorder.start()
    scene.send("i", beats, 1)
    scene.send("i_entry", entries, 1, 3)
    await scene.stall(9, 2)
    await scene.finish("sparse_merge_late", 5)


@cocotb.test()
async def sparse_decoder_tensor(dut: Any) -> None:
    """Two tensors from planes to weights."""
    scene = Scene(dut)
    tensors = [scene.tensor(3), scene.tensor(2)]
    corrections = [corrections_at(3 * scene.lanes, (5, 70)), None]
    scene.watch_tensors(tensors, "merged", corrections)
    entries: dict[int, Cell] = {}
    for number, item in enumerate(corrections):
        entries |= scene.entries(item, number)
    scene.recorder.payload("i_entry", entries, scene.layouts["entry"], "last")
    scene.watch_output()
    await reset(dut)
    scene.recorder.start()
    scene.send("i_lut", [word for tensor in tensors for word in lut_writes(tensor, scene.modes)], 1)
    scene.send("i", [word for tensor in tensors for word in scene.beats(tensor)], 1)
    scene.send("i_entry", list(entries), 1)
    await scene.finish("sparse_decoder_tensor", 80)
