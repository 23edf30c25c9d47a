"""``sop sim-matmul``: layers of a running model computed by the RTL.

The model runs in PyTorch up to each layer. The layer's real input is quantized and goes, with the
weights of a checkpoint, through the tile; every output bit is compared with the golden model, and
the model goes on with what the hardware computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.activations import ActivationFormat, QuantizedActivations
from golden.checkpoint import Checkpoint, StoredTensor
from golden.errors import InputError
from golden.kernel import KernelOutput, matmul
from golden.notation import QuantFormat
from golden.tensor import take_rows
from rtl.modes import Modes, distinct_formats
from sim.bulk_matmul import BulkTile, MatmulResult, run_matmul, slots_for
from sim.matmul_mismatch import FinishStep, MatmulMismatch, Step, locate_mismatch
from sop.checkpoints.inspection import matching_tensors
from sop.files.roles import block_number
from sop.hdl.simulate import Fault, shown_float
from sop.llm.candidates import checkpoint_candidate
from sop.llm.kernel_candidates import ActivationQuantizer
from sop.llm.model import TorchModel
from sop.llm.replacing import replacing
from sop.llm.windows import Windows
from sop.shared.progress import StepReport, silent

__all__ = [
    "LayerRun",
    "MatmulSimulation",
    "TileSettings",
    "choose_layers",
    "explain",
    "tiles_of",
]


@dataclass(frozen=True)
class TileSettings:
    """Tile and simulator.

    Attributes
    ----------
    rows, columns : int
    activations : ActivationFormat
    simulator : str
    build_root : Path
    output : str
        ``"float32"`` or ``"bfloat16"``.
    """

    rows: int
    columns: int
    activations: ActivationFormat
    simulator: str
    build_root: Path
    output: str = "float32"


@dataclass
class LayerRun:
    """What is known of a layer, over all windows that the model was run on.

    Attributes
    ----------
    name, format : str
    shape : tuple of int
        (rows, columns) of the weights that the RTL multiplied.
    row_scales : bool
        Whether the format has them.
    corrections : int
        Those of the rows that the RTL multiplied.
    hidden : bool
        Whether the hardware never waited for corrections (:class:`sim.bulk_matmul.TileOutputs`).
    tokens, products, mismatches, wrong_flags : int
    clocks, expected_clocks : int
        From the first operands to the last outputs of the layer, both counted, and how many it has
        to be, if ``hidden``; at least, if not.
    in_time : bool
        Whether it took as many.
    squared_error, squared_reference : float
        Of all outputs, corrections included, against the product of the input as it was with the
        model's own weights; and of that product.
    seconds : float
        That the simulator ran.
    mismatch : MatmulMismatch or None
        The first one.
    """

    name: str
    format: str
    shape: tuple[int, int]
    row_scales: bool
    corrections: int
    tokens: int = 0
    products: int = 0
    clocks: int = 0
    expected_clocks: int = 0
    mismatches: int = 0
    wrong_flags: int = 0
    hidden: bool = True
    in_time: bool = True
    squared_error: float = 0.0
    squared_reference: float = 0.0
    seconds: float = 0.0
    mismatch: MatmulMismatch | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        """Whether every bit and every clock was right."""
        return not (self.mismatches or self.wrong_flags) and self.in_time

    @property
    def relative_mse(self) -> float:
        """Squared error over squared reference; 0 where the reference is zero."""
        return self.squared_error / self.squared_reference if self.squared_reference else 0.0

    def add(self, result: MatmulResult) -> None:
        """Count one product."""
        outputs = result.outputs
        self.tokens += len(result.output.bits)
        self.products += result.products
        self.clocks += outputs.clocks
        self.expected_clocks += outputs.expected_clocks
        self.mismatches += result.mismatches
        self.wrong_flags += outputs.wrong_flags
        self.hidden &= outputs.hidden
        self.in_time &= result.in_time
        self.seconds += outputs.seconds


def choose_layers(
    checkpoint: Checkpoint, model: TorchModel, patterns: Sequence[str] | None
) -> list[str]:
    """Quantized tensors to compute, in the order of the model.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : TorchModel
    patterns : sequence of str, optional
        Of :func:`sop.checkpoints.inspection.matching_tensors`; without them all tensors of decoder
        block 0.

    Raises
    ------
    InputError
        If the checkpoint is not one of that model, nothing matches, or a tensor that matches is
        one that the model computes without.
    """
    known = checkpoint_candidate(checkpoint, model).names(model)
    if patterns:
        wanted = matching_tensors(checkpoint, patterns)
    else:
        wanted = [name for name in checkpoint.names if block_number(name) == 0]
        if not wanted:
            raise InputError(
                f"{checkpoint.path}: no quantized tensor of a block 0; name some with --tensors"
            )
    for name in wanted:
        if name not in known:
            problem = f"{model.path}: {model.unplaced[name]}"
            raise InputError(f"{checkpoint.path}: tensor {name!r}: {problem}")
    return [name for name in known if name in set(wanted)]


def tiles_of(
    checkpoint: Checkpoint, names: Sequence[str], settings: TileSettings
) -> dict[QuantFormat, BulkTile]:
    """Hardware for every format; formats that one tile can take share it.

    Raises
    ------
    InputError
        If the hardware cannot take a format; the message names file and tensor.
    """
    groups: dict[Any, list[QuantFormat]] = {}
    slots: dict[QuantFormat, int] = {}
    for name in names:
        fmt = checkpoint.info(name).format
        try:
            modes = Modes((fmt,))
            groups.setdefault(
                (fmt.block_size, fmt.word.scale, modes.decoded(fmt), modes.hif), []
            ).append(fmt)
            _tile((fmt,), settings).check()
            needed = slots_for(checkpoint.read(name).corrections, settings.rows)
        except (InputError, ValueError) as error:
            raise InputError(f"{checkpoint.path}: tensor {name!r}: {error}") from None
        slots[fmt] = max(needed, slots.get(fmt, 0))
    tiles = {}
    for formats in groups.values():
        tile = _tile(distinct_formats(formats), settings, slots=max(slots[fmt] for fmt in formats))
        tiles.update(dict.fromkeys(formats, tile))
    return tiles


def _tile(formats: tuple[QuantFormat, ...], settings: TileSettings, **more: int) -> BulkTile:
    return BulkTile(
        formats, settings.activations, settings.rows, settings.columns, settings.simulator,
        settings.build_root, settings.output, **more,
    )  # fmt: skip


class MatmulSimulation:
    """Runs a model whose layers are computed by the RTL.

    Parameters
    ----------
    checkpoint : Checkpoint
        Stays open.
    model : TorchModel
        What is in no chosen layer is computed with its own weights.
    names : sequence of str
        Layers, from :func:`choose_layers`.
    settings : TileSettings
    tiles : dict
        From :func:`tiles_of`.
    first_rows : int, optional
        Only so many rows of each layer go through the RTL; golden computes the others.
    fault : Fault, optional
        Of the first layer, in the first window (:meth:`sim.tile_operands.Operands.flipped`).
    on_step : callable
        Gets the name of a layer that is about to be computed, and how many were and will be.

    Attributes
    ----------
    layers : dict of str to LayerRun
        Those computed so far, by name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: TorchModel,
        names: Sequence[str],
        settings: TileSettings,
        tiles: dict[QuantFormat, BulkTile],
        *,
        first_rows: int | None = None,
        fault: Fault | None = None,
        on_step: StepReport = silent,
    ) -> None:
        self._checkpoint, self._model, self._names = checkpoint, model, names
        self._settings, self._tiles = settings, tiles
        self._first_rows, self._fault = first_rows, fault
        self._on_step = on_step
        self._done = self._total = 0
        self._quantize = ActivationQuantizer(settings.activations)
        self.layers: dict[str, LayerRun] = {}

    def run(self, windows: Windows) -> None:
        """Run the model over some text.

        Raises
        ------
        InputError
            If an input of a layer is not finite; the message names file and tensor.
        SimulationError
            If the simulation could not be built, or hung.
        """
        self._total += len(windows.parts) * len(self._names)
        for ids in windows.parts:
            with replacing(self._model, self._names, self._compute):
                self._model.run(ids)

    def _compute(self, name: str, x: Any) -> NDArray[np.float32]:
        """The product of a layer, as the model goes on with it."""
        self._on_step(name, self._done, self._total)
        self._done += 1
        stored = self._checkpoint.read(name)
        try:
            activations = self._quantize(x)
            result = self._product(name, stored, activations)
        except InputError as error:
            raise InputError(f"{self._checkpoint.path}: tensor {name!r}: {error}") from error
        values = x.detach().reshape(-1, x.shape[-1]).numpy()
        reference = values.astype(np.float64) @ self._model.weight(name).T
        self.layers[name].squared_error += float(((reference - result.values) ** 2).sum())
        self.layers[name].squared_reference += float((reference**2).sum())
        return result.values

    def _product(
        self, name: str, stored: StoredTensor, activations: QuantizedActivations
    ) -> KernelOutput:
        """The product, from the RTL as far as it computes it."""
        tensor, sparse = stored.tensor, stored.corrections
        rows = min(self._first_rows or tensor.shape[0], tensor.shape[0])
        part, of_part = tensor, sparse
        if rows < tensor.shape[0]:
            part = take_rows(tensor, slice(0, rows))
            of_part = None if sparse is None else sparse.take_rows(slice(0, rows))
        tile = self._tiles[tensor.format]
        fault, self._fault = self._fault, None
        bit = None if fault is None else (fault.kind, fault.position, fault.bit)
        result = run_matmul(tile, part, activations, of_part, fault=bit)
        layer = self.layers.get(name)
        if layer is None:
            layer = self.layers[name] = LayerRun(
                name, tensor.format.name, part.shape, tensor.format.row_scale,
                0 if of_part is None else of_part.entries,
            )  # fmt: skip
        layer.add(result)
        if layer.mismatch is None:
            layer.mismatch = locate_mismatch(tile, result)
        if part is tensor:
            return result.output
        whole = matmul(tensor, activations, sparse, output=self._settings.output)
        whole.bits[:, :rows] = result.output.bits
        return whole


def explain(name: str, mismatch: MatmulMismatch, output: str = "float32") -> list[str]:
    """Lines that locate a mismatch and show both values in hex and decoded."""
    actual, expected = (shown_float(bits, output) for bits in (mismatch.actual, mismatch.expected))
    lines = [f"{name}: row {mismatch.row}, token {mismatch.token}: RTL {actual}, golden {expected}"]
    step = mismatch.step
    if step is None:
        lines.append("computed alone the tile is right: it depends on what was computed before")
    elif isinstance(step, FinishStep):
        lines.append(f"the sums are right; first wrong {_finish_step(step)}")
    else:
        what = {"T": "T, the product of the block", "acc": "acc, the sum of T and what was before"}
        lines.append(
            f"first wrong in block {step.block} (channels {step.channels[0]} to "
            f"{step.channels[1]}), step {what[step.name]}: RTL {shown_float(step.actual)}, golden "
            f"{shown_float(step.expected)} (P = {step.product}, S = {step.scale!r})"
        )
    recorded = "block alone, then of all blocks up to it" if isinstance(step, Step) else "tile"
    lines.append(f"waveform of the {recorded}: {mismatch.waveform or 'could not be recorded'}")
    return lines


def _finish_step(step: FinishStep) -> str:
    what = {
        "row scale": f"after multiplication with row scale {step.factor!r}",
        "correction": f"after correction {step.factor!r} of channel {step.column}, activation "
        f"{step.activation!r}",
        "bfloat16": "after rounding to bfloat16",
    }[step.name]
    output = "bfloat16" if step.name == "bfloat16" else "float32"
    actual, expected = (shown_float(bits, output) for bits in (step.actual, step.expected))
    return f"{what}: RTL {actual}, golden {expected}"
