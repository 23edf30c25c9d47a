"""Whole models through a unit, at the speed of the simulator (:mod:`sim.file_streams`).

Every bit that comes out is compared with the golden model, in NumPy.
"""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.corrections import Corrections
from golden.errors import InputError
from golden.tensor import QuantizedTensor
from rtl.units import (
    LUT_DECODER,
    SPARSE_DECODER,
)
from sim.beats import beats_from_planes, lut_writes
from sim.decoder import Decoder, Result
from sim.file_streams import file_streams, word_bytes
from sim.reference import correction_beats, stream_positions

__all__ = ["BULK_UNITS", "run_bulk"]

BULK_UNITS = (LUT_DECODER.name, SPARSE_DECODER.name)
"""Units that can be run in bulk: the lookup alone, and everything up to the weights."""


def _input_clocks(tensor: QuantizedTensor, sparse: Corrections | None, lanes: int) -> int:
    """Clocks that a tensor occupies the input: one a beat, or one a correction if more."""
    beats = -(-tensor.indices.size // lanes)
    if sparse is None or not sparse.entries:
        return beats
    per_beat = np.bincount(stream_positions(tensor, sparse) // lanes, minlength=beats)
    return int(np.maximum(per_beat, 1).sum())


def _write_inputs(
    decoder: Decoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    files: dict[str, IO[bytes]],
    result: Result,
) -> None:
    lut_bytes = word_bytes(decoder.inputs["i_lut"])
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
        result.in_step &= beats_before is None or beats_before > len(writes)
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
    size = word_bytes(layout)
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
    decoder: Decoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    *,
    flipped_bit: int | None = None,
) -> Result:
    """Stream tensors through the RTL and compare every bit with the golden model.

    Parameters
    ----------
    decoder : Decoder
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
    result = Result()
    streams = decoder.file_streams()  # checks the arguments
    with file_streams(streams, decoder.build_root) as job:
        start = time.perf_counter()
        with job.opened() as files:
            _write_inputs(decoder, tensors, files, result)
        if flipped_bit is not None:
            _flip(job.inputs["i"], decoder.inputs["i"], flipped_bit)
        result.expected_clocks += decoder.latency
        prepared = time.perf_counter()
        run = job.run(decoder.simulator, beats=result.beats, expected_clocks=result.expected_clocks)
        simulated = time.perf_counter()
        result.clocks = run.clocks
        _compare(decoder, tensors, run.words, result)
        result.seconds = {
            "prepare": prepared - start,
            "build": simulated - prepared - run.seconds,
            "simulate": run.seconds,
            "compare": time.perf_counter() - simulated,
        }
        shutil.rmtree(run.folder)
    return result


def _compare(
    decoder: Decoder,
    tensors: Iterable[tuple[QuantizedTensor, Corrections | None]],
    actual: NDArray[np.uint8],
    result: Result,
) -> None:
    start = 0
    for number, (tensor, sparse) in enumerate(tensors):
        expected = decoder.expected(tensor, sparse)
        got = actual[start : start + len(expected)]
        start += len(expected)
        result.compare(decoder, number, tensor, expected, got)
