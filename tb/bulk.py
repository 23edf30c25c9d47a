"""Whole models through a unit, at the speed of the simulator.

A generated Verilog wrapper reads the words of every input stream from a file and writes those of
the output to one, so Python has no part in a clock. It runs on both simulators. Every bit that
comes out is compared with the golden model, in NumPy.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.corrections import Corrections
from golden.errors import InputError
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor
from rtl.layouts import (
    correction_layout,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
    merged_beat_layout,
)
from rtl.modes import Modes
from rtl.units import FLOAT_LAYOUTS, build_unit, configuration_name, latency_of
from rtl.verilog import to_verilog
from tb.beats import beats_from_planes, lut_writes
from tb.reference import code_beats, correction_beats, stream_positions, value_beats, weights
from tb.simulator import Design, simulate

__all__ = ["BULK_UNITS", "BulkDecoder", "BulkDifference", "BulkResult", "run_bulk"]

BULK_UNITS = ("lut_decoder", "sparse_decoder")
"""Units that can be run in bulk: the lookup alone, and everything up to the weights."""

CLOCKS_VARIABLE = "SOP_BULK_CLOCKS"
"""Environment variable that tells :mod:`tb.bulk_bench` how many clocks the run should take."""

RESULT_FILE = "clocks.json"
"""What :mod:`tb.bulk_bench` writes into the folder of its run."""

_SOURCE = """
  // {name}: one word from the file whenever the unit took the one before.
  reg [{top}:0] {name}_next, {name}_word;
  reg {name}_valid;
  wire {name}_ready;
  integer {name}_file, {name}_got;
  initial {name}_file = $fopen("{name}.bin", "rb");
  always @(posedge clk)
    if (rst) {name}_valid <= 1'b0;
    else if (!{name}_valid || {name}_ready) begin
      {name}_got = $fread({name}_next, {name}_file);
      {name}_word <= {name}_next;
      {name}_valid <= {name}_got == {bytes};
    end
"""

_WRAPPER = """\
// Streams files through {top}.
module bulk (
  input wire clk /* verilator public_flat_rw */,
  input wire rst /* verilator public_flat_rw */,
  output reg done /* verilator public_flat_rw */
);
{sources}
  wire [{out_top}:0] o_payload;
  wire o_valid;
  {top} unit (
    .clk(clk), .rst(rst),
{connections}
    .o__payload(o_payload), .o__valid(o_valid), .o__ready(1'b1)
  );
  integer o_file, found;
  reg [63:0] beats, clock, first_in, out;
  initial begin
    o_file = $fopen("beats.txt", "r");
    found = $fscanf(o_file, "%d", beats);
    $fclose(o_file);
    o_file = $fopen("o.bin", "wb");
    done = 1'b0;
  end
  always @(posedge clk)
    if (rst) begin
      clock <= 0;
      out <= 0;
      first_in <= 0;
      done <= 1'b0;
    end else begin
      clock <= clock + 1;
      if (i_valid && i_ready && first_in == 0) first_in <= clock;
      if (o_valid) begin
        $fwrite(o_file, "%u", {{{padding}o_payload}});
        out <= out + 1;
        if (out + 1 == beats) begin
          $fclose(o_file);
          o_file = $fopen("{result}", "w");
          $fwrite(o_file, "{{\\"clocks\\": %0d}}", clock - first_in + 1);
          $fclose(o_file);
          done <= 1'b1;
        end
      end
    end
endmodule
"""


def _byte_count(layout: data.StructLayout) -> int:
    return -(-layout.size // 8)


def _source(name: str, layout: data.StructLayout) -> str:
    size = _byte_count(layout)
    return _SOURCE.format(name=name, bytes=size, top=8 * size - 1)


@dataclass(frozen=True)
class BulkDecoder:
    """One unit in its wrapper.

    Parameters
    ----------
    unit : str
        One of :data:`BULK_UNITS`.
    formats : tuple of QuantFormat
        What it decodes; each tensor has one of them.
    lanes : int
    output : str
        ``"float32"`` or ``"bfloat16"``, of the weights.
    simulator : str
    build_root : Path
    """

    unit: str
    formats: tuple[QuantFormat, ...]
    lanes: int
    output: str
    simulator: str
    build_root: Path

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    @property
    def inputs(self) -> dict[str, data.StructLayout]:
        """Payload of every input stream."""
        streams = {
            "i": index_beat_layout(lanes=self.lanes, modes=self.modes),
            "i_lut": lut_write_layout(modes=self.modes),
        }
        if self.unit == "sparse_decoder":
            streams["i_entry"] = correction_layout()
        return streams

    @property
    def out(self) -> data.StructLayout:
        """Payload of the output."""
        if self.unit == "lut_decoder":
            return hif_beat_layout(lanes=self.lanes, modes=self.modes)
        return merged_beat_layout(lanes=self.lanes, float_layout=FLOAT_LAYOUTS[self.output])

    @property
    def out_bytes(self) -> int:
        """Bytes of one beat in the output file: whole words of 32 bits."""
        return 4 * -(-self.out.size // 32)

    @property
    def latency(self) -> int:
        """Clocks from a beat in to the same beat out."""
        return latency_of(self.unit, self.output)

    def design(self) -> Design:
        """The unit and its wrapper."""
        name = configuration_name(self.unit, self.formats, lanes=self.lanes, output=self.output)
        unit = build_unit(self.unit, self.formats, lanes=self.lanes, output=self.output)
        connections = [
            f"    .{stream}__payload({stream}_word[{layout.size - 1}:0]), "
            f".{stream}__valid({stream}_valid), .{stream}__ready({stream}_ready),"
            for stream, layout in self.inputs.items()
        ]
        padding = 8 * self.out_bytes - self.out.size
        wrapper = _WRAPPER.format(
            top=name,
            sources="".join(_source(*stream) for stream in self.inputs.items()),
            connections="\n".join(connections),
            out_top=self.out.size - 1,
            padding=f"{padding}'b0, " if padding else "",
            result=RESULT_FILE,
        )
        return Design("bulk", to_verilog(unit, name) + wrapper, bulk=True)


@dataclass(frozen=True)
class BulkDifference:
    """The first value that differs: tensor by number, row and column in the padded tensor."""

    tensor: int
    row: int
    column: int
    beat: int
    expected: int
    actual: int


@dataclass
class BulkResult:
    """Outcome of a run.

    ``clocks`` from the first beat in to the last one out, both counted; ``expected_clocks`` is one
    for each beat, or correction of a beat that has several, and the unit's latency; that many it
    must be if ``loads_hidden``: every tensor is longer than the load of the next one's LUTs. Times
    in seconds.
    """

    weights: int = 0
    beats: int = 0
    corrections: int = 0
    clocks: int = 0
    expected_clocks: int = 0
    loads_hidden: bool = True
    wrong_beats: int = 0
    first_difference: BulkDifference | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every bit was right and no clock was lost without need."""
        in_time = self.clocks == self.expected_clocks or not self.loads_hidden
        return not self.wrong_beats and in_time


def _input_clocks(tensor: QuantizedTensor, sparse: Corrections | None, lanes: int) -> int:
    """Clocks that a tensor occupies the input: one a beat, or one a correction if more."""
    beats = -(-tensor.indices.size // lanes)
    if sparse is None or not sparse.entries:
        return beats
    per_beat = np.bincount(stream_positions(tensor, sparse) // lanes, minlength=beats)
    return int(np.maximum(per_beat, 1).sum())


def _expected(
    decoder: BulkDecoder, tensor: QuantizedTensor, sparse: Corrections | None
) -> NDArray[np.uint8]:
    """Every beat of a tensor as the golden model has it."""
    if decoder.unit == "lut_decoder":
        return code_beats(tensor, lanes=decoder.lanes, modes=decoder.modes)
    return value_beats(weights(tensor, sparse), decoder.out, decoder.output)


def _locate(
    decoder: BulkDecoder, tensor: QuantizedTensor, number: int, beat: int,
    expected: NDArray[np.uint8], actual: NDArray[np.uint8],
) -> BulkDifference:  # fmt: skip
    """Where the first differing beat differs; fields after the values count as its first lane."""
    out = decoder.out
    name = "codes" if "codes" in out.members else "values"
    width = out[name].width // decoder.lanes
    words = [int.from_bytes(row.tobytes(), "little") for row in (expected, actual)]
    mask = (1 << width) - 1
    lanes = [
        lane
        for lane in range(decoder.lanes)
        if (words[0] ^ words[1]) >> (out[name].offset + lane * width) & mask
    ]
    lane = lanes[0] if lanes else 0
    if lanes:
        words = [word >> (out[name].offset + lane * width) & mask for word in words]
    row_length = tensor.indices.shape[1] * tensor.indices.shape[2]
    row, column = divmod(beat * decoder.lanes + lane, row_length)
    return BulkDifference(number, row, column, beat, expected=words[0], actual=words[1])


def _write_inputs(
    decoder: BulkDecoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    files: dict[str, IO[bytes]],
    result: BulkResult,
) -> None:
    lut_bytes = _byte_count(decoder.inputs["i_lut"])
    beats_before = None
    for tensor, sparse in tensors:
        beats = beats_from_planes(
            tensor.index_plane,
            tensor.scale_plane,
            tensor.format,
            lanes=decoder.lanes,
            modes=decoder.modes,
            row_scales=tensor.row_scales,
        )
        # $fread fills from the most significant byte on, so words are big-endian.
        files["i"].write(beats[:, ::-1].tobytes())
        writes = lut_writes(tensor, decoder.modes)
        result.loads_hidden &= beats_before is None or beats_before > len(writes)
        beats_before = len(beats)
        for word in writes:
            files["i_lut"].write(word.to_bytes(lut_bytes, "big"))
        if "i_entry" in files:
            entries = correction_beats(tensor, sparse)
            files["i_entry"].write(entries[:, ::-1].tobytes())
            result.corrections += sparse.entries if sparse is not None else 0
            result.expected_clocks += _input_clocks(tensor, sparse, decoder.lanes)
        else:
            result.expected_clocks += len(beats)
        result.weights += tensor.shape[0] * tensor.shape[1]
        result.beats += len(beats)


def _flip(path: Path, layout: data.StructLayout, bit: int) -> None:
    size = _byte_count(layout)
    beats = path.stat().st_size // size
    beat, place = divmod(bit, layout.size)
    if not 0 <= beat < beats:
        raise InputError(f"bit {bit} does not exist: {beats} beats of {layout.size} bits")
    with open(path, "r+b") as file:
        file.seek(beat * size + size - 1 - place // 8)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << place % 8]))


def run_bulk(
    decoder: BulkDecoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    *,
    flipped_bit: int | None = None,
) -> BulkResult:
    """Stream tensors through the RTL and compare every bit with the golden model.

    Parameters
    ----------
    decoder : BulkDecoder
    tensors : iterable of (QuantizedTensor, Corrections or None)
        Gone through twice, one at a time, so it may load them when asked.
    flipped_bit : int, optional
        A bit of the words on ``i``, counted through the whole run, that the hardware gets wrong: to
        see that the comparison notices.

    Raises
    ------
    InputError
        If the hardware cannot take the formats or lane count, the simulator is missing, or there is
        no such bit to flip.
    SimulationError
        If the simulation could not be built, or hung.
    """
    design = decoder.design()  # first, because it checks the arguments
    result = BulkResult()
    decoder.build_root.mkdir(parents=True, exist_ok=True)
    job = Path(tempfile.mkdtemp(prefix="bulk_", dir=decoder.build_root))
    try:
        start = time.perf_counter()
        paths = {name: job / f"{name}.bin" for name in decoder.inputs}
        files: dict[str, IO[bytes]] = {name: open(path, "wb") for name, path in paths.items()}
        try:
            _write_inputs(decoder, tensors, files, result)
        finally:
            for file in files.values():
                file.close()
        if flipped_bit is not None:
            _flip(paths["i"], decoder.inputs["i"], flipped_bit)
        result.expected_clocks += decoder.latency
        (job / "beats.txt").write_text(f"{result.beats}\n")
        (job / "o.bin").touch()
        given = {path.name: path for path in (*paths.values(), job / "beats.txt", job / "o.bin")}
        prepared = time.perf_counter()
        folder = simulate(
            design,
            module="tb.bulk_bench",
            simulator=decoder.simulator,
            build_root=decoder.build_root,
            environment={CLOCKS_VARIABLE: str(result.expected_clocks)},
            files=given,
        )
        timing = json.loads((folder / RESULT_FILE).read_text())
        simulated = time.perf_counter()
        result.clocks = timing["clocks"]
        _compare(decoder, tensors, job / "o.bin", result)
        seconds = json.loads((folder / "seconds.json").read_text())
        result.seconds = {
            "prepare": prepared - start,
            "build": simulated - prepared - seconds,
            "simulate": seconds,
            "compare": time.perf_counter() - simulated,
        }
        shutil.rmtree(folder)
    finally:
        shutil.rmtree(job)
    return result


def _compare(
    decoder: BulkDecoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    path: Path,
    result: BulkResult,
) -> None:
    used = _byte_count(decoder.out)
    actual = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, decoder.out_bytes)
    start = 0
    for number, (tensor, sparse) in enumerate(tensors):
        expected = _expected(decoder, tensor, sparse)
        got = actual[start : start + len(expected), :used]
        start += len(expected)
        wrong = np.flatnonzero((got != expected).any(axis=1))
        if len(wrong) and result.first_difference is None:
            beat = int(wrong[0])
            result.first_difference = _locate(
                decoder, tensor, number, beat, expected[beat], got[beat]
            )
        result.wrong_beats += len(wrong)
