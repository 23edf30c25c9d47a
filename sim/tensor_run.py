"""Whole tensors through the RTL, compared with the golden model bit by bit."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor
from rtl.layouts import lut_write_layout
from rtl.modes import Modes
from sim.beats import beats_from_planes, lut_writes
from sim.decoder import Decoder, Result
from sim.simulator import simulate

__all__ = [
    "FAULT_KINDS",
    "FOLDER_VARIABLE",
    "Stimulus",
    "flip_bit",
    "run_tensors",
    "stimulus_of",
]

FOLDER_VARIABLE = "SOP_TENSOR_RUN"
"""Environment variable that tells :mod:`sim.tensor_bench` the folder of its job."""

FAULT_KINDS = ("index", "scale", "lut")
"""What :func:`flip_bit` can change."""


@dataclass(frozen=True, eq=False)
class Stimulus:
    """What the hardware receives for one tensor: its planes and LUT writes.

    Kept apart from the tensor so that a test can change one bit on the way to the hardware.
    """

    index_plane: NDArray[np.uint8]
    scale_plane: NDArray[np.uint8]
    row_scales: NDArray[np.uint16] | None
    lut_writes: list[int]


def stimulus_of(tensor: QuantizedTensor, modes: Modes) -> Stimulus:
    """The unchanged stimulus of a tensor."""
    writes = lut_writes(tensor, modes)
    return Stimulus(tensor.index_plane, tensor.scale_plane, tensor.row_scales, writes)


def flip_bit(stimulus: Stimulus, fmt: QuantFormat, kind: str, position: int, bit: int) -> Stimulus:
    """A stimulus with one bit changed, to see that the comparison notices.

    Parameters
    ----------
    stimulus : Stimulus
        Not modified.
    fmt : QuantFormat
        Format of the tensor.
    kind : str
        ``"index"`` (position counts padded weights), ``"scale"`` (blocks), ``"lut"`` (entries, the
        second LUT after the first).
    position, bit : int
        Which element, and which of its bits, 0 being the lowest.

    Raises
    ------
    InputError
        If there is no such element or bit.
    """
    writes, planes = list(stimulus.lut_writes), {}
    planes["index"], planes["scale"] = stimulus.index_plane.copy(), stimulus.scale_plane.copy()
    widths = {"index": fmt.index_bits, "scale": fmt.word.width, "lut": fmt.hif.width}
    count = len(writes) if kind == "lut" else 8 * len(planes[kind]) // widths[kind]
    if not (0 <= position < count and 0 <= bit < widths[kind]):
        raise InputError(
            f"fault {kind}:{position}:{bit} does not exist: {count} elements of {widths[kind]} bits"
        )
    if kind == "lut":
        # The place of the code depends on LUT and index only, not on other formats of the hardware.
        layout = lut_write_layout(modes=Modes((fmt,)))
        writes[position] ^= 1 << (layout["code"].offset + bit)
    else:
        place = position * widths[kind] + bit
        planes[kind][place // 8] ^= np.uint8(1 << place % 8)
    return dataclasses.replace(
        stimulus, index_plane=planes["index"], scale_plane=planes["scale"], lut_writes=writes
    )


def _judged(
    decoder: Decoder, tensor: QuantizedTensor, beats: NDArray[np.uint8], timing: dict[str, int]
) -> Result:
    rows, columns = tensor.shape
    # Beats that are offered with pauses, or one tensor after the other, take longer.
    result = Result(rows * columns, len(beats), clocks=timing["clocks"], in_step=False)
    result.compare(decoder, 0, tensor, decoder.expected(tensor), beats)
    return result


def run_tensors(
    decoder: Decoder,
    tensors: Sequence[QuantizedTensor],
    stimuli: Sequence[Stimulus] | None = None,
    *,
    stalls: str = "none",
    seed: int = 1,
    waves: bool = False,
    beat_limit: int | None = None,
    module: str = "sim.tensor_bench",
) -> tuple[list[Result], Path]:
    """Stream tensors through the simulated decoder and compare every bit with the golden model.

    Parameters
    ----------
    decoder : Decoder
        Of the float decoder; it must have the format of every tensor.
    tensors : sequence of QuantizedTensor
        What the golden model decodes.
    stimuli : sequence of Stimulus, optional
        What the hardware receives; made from the tensors if not given.
    stalls : str
        One of :data:`sim.stalls.STALL_MODES`.
    seed : int
        Seed of the stalls.
    waves : bool
        Whether to record a waveform.
    beat_limit : int, optional
        Stream only that many beats of each tensor.
    module : str
        Bench that streams the job (:func:`sim.tensor_bench.stream_job`).

    Returns
    -------
    results : list of Result
        One per tensor.
    folder : Path
        Where the simulation ran: log and waveform.

    Raises
    ------
    SimulationError
        If the simulation could not be built, or hung.
    """
    modes = decoder.modes
    job_root = decoder.build_root
    job_root.mkdir(parents=True, exist_ok=True)
    job_folder = Path(tempfile.mkdtemp(prefix="job_", dir=job_root))
    try:
        inputs = stimuli or [stimulus_of(tensor, modes) for tensor in tensors]
        for number, (tensor, stimulus) in enumerate(zip(tensors, inputs, strict=True)):
            beats = beats_from_planes(
                stimulus.index_plane,
                stimulus.scale_plane,
                tensor.format,
                lanes=decoder.lanes,
                modes=modes,
                row_scales=stimulus.row_scales,
            )[:beat_limit]
            np.save(job_folder / f"input_{number}.npy", beats)
        job = {
            "stalls": stalls,
            "seed": seed,
            "tensors": [{"lut_writes": stimulus.lut_writes} for stimulus in inputs],
        }
        (job_folder / "job.json").write_text(json.dumps(job))
        folder = simulate(
            decoder.design(waves=waves),
            module=module,
            simulator=decoder.simulator,
            build_root=decoder.build_root,
            environment={FOLDER_VARIABLE: str(job_folder.resolve())},
            seed=seed,
        )
        timing = json.loads((job_folder / "result.json").read_text())["tensors"]
        results = []
        for number, tensor in enumerate(tensors):
            beats = np.load(job_folder / f"output_{number}.npy")
            results.append(_judged(decoder, tensor, beats, timing[number]))
    finally:
        shutil.rmtree(job_folder)
    return results, folder
