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
from rtl.layouts import float_beat_layout, lut_write_layout
from rtl.modes import Modes
from rtl.units import FLOAT_DECODER, FLOAT_LAYOUTS, configuration_name, unit_verilog
from sim.beats import beats_from_planes, field_bits, lut_writes
from sim.reference import value_bits, weights
from sim.simulator import Design, require_simulator, simulate

__all__ = [
    "FAULT_KINDS",
    "FOLDER_VARIABLE",
    "Decoder",
    "Mismatch",
    "Stimulus",
    "TensorResult",
    "flip_bit",
    "run_tensors",
    "stimulus_of",
]

FOLDER_VARIABLE = "SOP_TENSOR_RUN"
"""Environment variable that tells :mod:`sim.tensor_bench` the folder of its job."""

FAULT_KINDS = ("index", "scale", "lut")
"""What :func:`flip_bit` can change."""

FLAGS = ("reserved", "overflow", "underflow")


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


@dataclass(frozen=True)
class Decoder:
    """One configuration of the float decoder under simulation.

    Parameters
    ----------
    formats : tuple of QuantFormat
        What it decodes; each tensor has one of them.
    lanes : int
    output : str
        ``"float32"`` or ``"bfloat16"``.
    simulator : str
    build_root : Path
    """

    formats: tuple[QuantFormat, ...]
    lanes: int
    output: str
    simulator: str
    build_root: Path

    def check(self) -> None:
        """Refuse what cannot be built or simulated here, before any long work.

        Raises
        ------
        InputError
            If the hardware cannot take the format or lane count, or the simulator
            cannot work here.
        """
        require_simulator(self.simulator, self.build_root)
        assert self.design(waves=False)

    @property
    def name(self) -> str:
        """Name of the top module."""
        return configuration_name(
            FLOAT_DECODER.name, self.formats, lanes=self.lanes, output=self.output
        )

    @property
    def format(self) -> QuantFormat:
        """The first format, which is the only one of most decoders."""
        return self.formats[0]

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    def design(self, *, waves: bool) -> Design:
        """Design to simulate, with or without recording."""
        name, text = unit_verilog(
            FLOAT_DECODER.name, self.formats, lanes=self.lanes, output=self.output
        )
        return Design(name, text, waves=waves)


@dataclass(frozen=True)
class Mismatch:
    """The first value that differs: where it is, and both bit patterns.

    ``row``, ``block`` and ``element`` locate the weight in the padded tensor, ``beat`` and ``lane``
    in the stream; ``expected`` and ``actual`` are bit patterns of the output format.
    """

    row: int
    block: int
    element: int
    beat: int
    lane: int
    expected: int
    actual: int


@dataclass(frozen=True)
class TensorResult:
    """Outcome of one tensor.

    ``clocks`` counts from the first beat offered to the last one taken; ``mismatches`` counts
    values; ``flags`` names those that any beat raised; ``misplaced_last`` counts beats whose
    ``last`` is wrong.
    """

    beats: int
    clocks: int
    mismatches: int
    first_mismatch: Mismatch | None
    flags: tuple[str, ...]
    misplaced_last: int

    @property
    def passed(self) -> bool:
        """Whether every bit was right."""
        return not (self.mismatches or self.flags or self.misplaced_last)


def expected_bits(tensor: QuantizedTensor, output: str) -> NDArray[np.unsignedinteger]:
    """Bit patterns that the hardware must produce, padded rows one after the other."""
    return value_bits(weights(tensor), output)


def _values(beats: NDArray[np.uint8], decoder: Decoder) -> NDArray[np.unsignedinteger]:
    layout = FLOAT_LAYOUTS[decoder.output]
    out = float_beat_layout(lanes=decoder.lanes, float_layout=layout)
    packed = np.packbits(field_bits(beats, out, "values"), axis=1, bitorder="little")
    return packed.view(np.uint32 if layout.size == 32 else np.uint16).reshape(-1)


def _compare(
    tensor: QuantizedTensor, beats: NDArray[np.uint8], clocks: int, decoder: Decoder
) -> TensorResult:
    expected = expected_bits(tensor, decoder.output)
    # The last beat may be longer than the tensor; what lies beyond is zero planes, hence +0.
    actual = _values(beats, decoder)
    expected = np.pad(expected[: len(actual)], (0, max(0, len(actual) - len(expected))))
    wrong = np.flatnonzero(expected != actual)
    out = float_beat_layout(lanes=decoder.lanes, float_layout=FLOAT_LAYOUTS[decoder.output])
    flags = tuple(name for name in FLAGS if field_bits(beats, out, name).any())
    wanted_last = np.arange(len(beats)) * decoder.lanes + decoder.lanes >= tensor.indices.size
    misplaced = int((field_bits(beats, out, "last")[:, 0] != wanted_last).sum())
    first = None
    if len(wrong):
        position = int(wrong[0])
        size = tensor.format.block_size
        block, element = divmod(position, size)
        row, block = divmod(block, tensor.scale_words.shape[1])
        beat, lane = divmod(position, decoder.lanes)
        first = Mismatch(
            row, block, element, beat, lane, int(expected[position]), int(actual[position])
        )
    return TensorResult(len(beats), clocks, len(wrong), first, flags, misplaced)


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
) -> tuple[list[TensorResult], Path]:
    """Stream tensors through the simulated decoder and compare every bit with the golden model.

    Parameters
    ----------
    decoder : Decoder
        Configuration; it must have the format of every tensor.
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
    results : list of TensorResult
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
            results.append(_compare(tensor, beats, timing[number]["clocks"], decoder))
    finally:
        shutil.rmtree(job_folder)
    return results, folder
