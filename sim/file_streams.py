"""A unit between files, at the speed of the simulator.

A generated Verilog wrapper reads the words of every input stream from a file and writes those of
the output to one, so Python has no part in a clock. It runs on both simulators.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from amaranth.lib import data, wiring
from numpy.typing import NDArray

from rtl.verilog import to_verilog
from sim.simulator import Design, simulate

__all__ = ["CLOCKS_VARIABLE", "FileRun", "FileStreams", "file_streams", "word_bytes"]

CLOCKS_VARIABLE = "SOP_BULK_CLOCKS"
"""Environment variable that tells :mod:`sim.bulk_bench` how many clocks the run should take."""

_TOP = "bulk"
_RESULT_FILE = "clocks.json"  # what the wrapper writes into the folder of its run

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


def word_bytes(layout: data.StructLayout) -> int:
    """Bytes of a word in a file of an input stream, most significant first."""
    return -(-layout.size // 8)


def _source(name: str, layout: data.StructLayout) -> str:
    size = word_bytes(layout)
    return _SOURCE.format(name=name, bytes=size, top=8 * size - 1)


@dataclass(frozen=True)
class FileStreams:
    """A unit whose streams are files.

    Parameters
    ----------
    name : str
        Name of its module.
    unit : wiring.Component
        Its output stream is called ``o``, its main input ``i``.
    inputs : mapping of str to data.StructLayout
        Payload of every input stream, by name.
    out : data.StructLayout
        Payload of the output.
    """

    name: str
    unit: wiring.Component
    inputs: Mapping[str, data.StructLayout]
    out: data.StructLayout

    @property
    def out_bytes(self) -> int:
        """Bytes of a word in the output file: whole words of 32 bits, little-endian."""
        return 4 * -(-self.out.size // 32)

    @cached_property
    def verilog(self) -> str:
        """Source text of the unit and the wrapper."""
        connections = [
            f"    .{stream}__payload({stream}_word[{layout.size - 1}:0]), "
            f".{stream}__valid({stream}_valid), .{stream}__ready({stream}_ready),"
            for stream, layout in self.inputs.items()
        ]
        padding = 8 * self.out_bytes - self.out.size
        wrapper = _WRAPPER.format(
            top=self.name,
            sources="".join(_source(*stream) for stream in self.inputs.items()),
            connections="\n".join(connections),
            out_top=self.out.size - 1,
            padding=f"{padding}'b0, " if padding else "",
            result=_RESULT_FILE,
        )
        return to_verilog(self.unit, self.name) + wrapper


@dataclass(frozen=True)
class FileRun:
    """What came out of a run.

    Attributes
    ----------
    words : uint8 array, shape (beats, bytes)
        The output, of which :attr:`FileStreams.out_bytes` say how it is stored; only while the
        :class:`FileJob` is open.
    clocks : int
        From the first beat on ``i`` to the last one on ``o``, both counted.
    seconds : float
        That the simulator was running.
    folder : Path
        Where it ran, with a waveform if one was recorded.
    """

    words: NDArray[np.uint8]
    clocks: int
    seconds: float
    folder: Path

    @property
    def waveform(self) -> Path | None:
        """The recording, if there is one."""
        return next(iter([*self.folder.glob("*.fst"), *self.folder.glob("*.vcd")]), None)


class FileJob:
    """Files of one run; :func:`file_streams` opens it.

    Attributes
    ----------
    inputs : dict of str to Path
        Of every input stream, to be written by the caller (:meth:`opened`).
    """

    def __init__(self, streams: FileStreams, folder: Path, build_root: Path) -> None:
        self._streams, self._folder, self._build_root = streams, folder, build_root
        self.inputs = {name: folder / f"{name}.bin" for name in streams.inputs}

    @contextmanager
    def opened(self) -> Iterator[dict[str, IO[bytes]]]:
        """Input files, by stream, open for writing."""
        with ExitStack() as stack:
            yield {
                name: stack.enter_context(open(path, "wb")) for name, path in self.inputs.items()
            }

    def run(
        self, simulator: str, *, beats: int, expected_clocks: int, waves: bool = False
    ) -> FileRun:
        """Stream the files through the unit.

        Parameters
        ----------
        simulator : str
            One of :data:`sim.installed.SIMULATORS`.
        beats : int
            How many will come out.
        expected_clocks : int
            How long that takes if no clock is lost; much more is an error.
        waves : bool
            Whether to record all signals.

        Raises
        ------
        InputError
            If the simulator is missing.
        SimulationError
            If the simulation could not be built, or hung.
        """
        given = {path.name: path for path in self.inputs.values()}
        for name, text in (("beats.txt", f"{beats}\n"), ("o.bin", "")):
            given[name] = self._folder / name
            given[name].write_text(text)
        folder = simulate(
            Design(_TOP, self._streams.verilog, bulk=True, waves=waves),
            module="sim.bulk_bench",
            simulator=simulator,
            build_root=self._build_root,
            environment={CLOCKS_VARIABLE: str(expected_clocks)},
            files=given,
        )
        size = self._streams.out_bytes
        return FileRun(
            np.memmap(given["o.bin"], dtype=np.uint8, mode="r").reshape(-1, size),
            json.loads((folder / _RESULT_FILE).read_text())["clocks"],
            json.loads((folder / "seconds.json").read_text()),
            folder,
        )


@contextmanager
def file_streams(streams: FileStreams, build_root: Path) -> Iterator[FileJob]:
    """A folder with the files of one run, gone afterwards."""
    build_root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bulk_", dir=build_root))
    try:
        yield FileJob(streams, folder, build_root)
    finally:
        shutil.rmtree(folder)
