"""Where a product of :mod:`sim.bulk_matmul` goes wrong: block and step, with a short recording."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from golden.activations import decode_activations
from golden.convert import decode_array
from golden.formats import BF16
from golden.kernel import matmul, unit_exponent
from golden.tensor import decode_elements, decode_scales
from sim.bulk_matmul import BulkTile, MatmulResult, run_parts
from sim.simulator import SimulationError
from sim.tile_operands import Operands, TilePart

__all__ = ["FinishStep", "MatmulMismatch", "Step", "locate_mismatch"]

_CLOCKS_AT_ONCE = 1 << 19  # of a search, which ends with the first run that shows something


@dataclass(frozen=True)
class Step:
    """The first block after which the sums differ, and how golden computes it.

    Attributes
    ----------
    block : int
    channels : tuple of int
        First and last input channel of the block.
    name : str
        ``"T"``, the product of the block alone, or ``"acc"``: its addition to the sum before.
    expected, actual : int
        float32 bits of the result of that step.
    product : int
        P, the block's sum of integer products.
    scale : float
        S, exact.
    """

    block: int
    channels: tuple[int, int]
    name: str
    expected: int
    actual: int
    product: int
    scale: float


@dataclass(frozen=True)
class FinishStep:
    """The first step after the sums that differs.

    Attributes
    ----------
    name : str
        ``"row scale"``, ``"correction"`` or ``"bfloat16"``, the rounding to it.
    expected, actual : int
        Bits of the result of that step, float32 or, after rounding to it, bfloat16.
    factor : float or None
        The row scale, or the value of the correction.
    column : int or None
        Input channel of the correction.
    activation : float or None
        What golden multiplies the correction with.
    """

    name: str
    expected: int
    actual: int
    factor: float | None = None
    column: int | None = None
    activation: float | None = None


@dataclass(frozen=True)
class MatmulMismatch:
    """One wrong output.

    Attributes
    ----------
    row, token : int
        Beyond those of the layer where they only fill up a tile.
    expected, actual : int
        Bits of float32 or bfloat16.
    step : Step, FinishStep or None
        None if the tile is right when it is computed on its own.
    waveform : Path or None
        Recording of the step's block alone and then of all blocks up to it, or of the tile up to a
        step after the sums; without a step, of the tile and the one before. None if it could not be
        made.
    """

    row: int
    token: int
    expected: int
    actual: int
    step: Step | FinishStep | None
    waveform: Path | None


class _Output:
    """One output of a tile, for any number of its blocks."""

    def __init__(self, tile: BulkTile, result: MatmulResult, row: int, token: int) -> None:
        self._tile, self._operands, self._given = tile, result.operands, result.given
        self._result, self._number, self._column = result, row, token
        self.row_tile, self._row = divmod(row, tile.rows)
        self.token_tile, self._token = divmod(token, tile.columns)

    def part(self, blocks: range) -> TilePart:
        """Some blocks of the output's tile."""
        return TilePart(self.row_tile, self.token_tile, blocks)

    def expected(self, part: TilePart) -> int:
        """What golden has."""
        result = matmul(*self._operands.cut(part), output=self._tile.output)
        return int(result.bits[self._token, self._row])

    def in_float32(self) -> "_Output":
        """The same without rounding to bfloat16."""
        tile = replace(self._tile, output="float32")
        return _Output(tile, self._result, self._number, self._column)

    def corrections(self) -> tuple[list[int], list[float]]:
        """Columns and values of the corrections of the output's row."""
        sparse, row = self._operands.corrections, self._number
        if sparse is None:
            return [], []
        mine = slice(sparse.indptr[row], sparse.indptr[row + 1])
        return sparse.columns[mine].tolist(), decode_array(sparse.values[mine], BF16).tolist()

    def row_scale(self, part: TilePart) -> float:
        """Row scale of the output."""
        return float(decode_array(self._operands.row_scales(part), BF16)[self._row])

    def activation(self, column: int) -> float:
        """What a correction in that column is multiplied with."""
        return float(decode_activations(self._operands.activations)[self._column, column])

    def actual(
        self, parts: list[TilePart], *, waves: bool = False
    ) -> tuple[list[int], Path | None]:
        """What the RTL has for each part, and a recording."""
        outputs = run_parts(self._tile, self._given, parts, waves=waves)
        return outputs.bits[:, self._token, self._row].tolist(), outputs.waveform

    def operands_of_block(self, block: int) -> tuple[int, float]:
        """P and S of golden."""
        return _product_and_scale(
            self._operands, self.part(range(block, block + 1)), self._row, self._token
        )


def _product_and_scale(
    operands: Operands, part: TilePart, row: int, token: int
) -> tuple[int, float]:
    tensor, activations, _ = operands.cut(part)
    fmt, element = tensor.format, activations.format.element
    units = unit_exponent(fmt.hif if fmt.atom is None else fmt.atom) + unit_exponent(element)
    weights = decode_elements(tensor)[row, 0]
    values = decode_array(activations.elements[token, 0], element)
    product = np.ldexp((weights * values).sum(), -units)
    scale = decode_scales(tensor)[row, 0] * activations.scales[token, 0]
    return int(product), float(np.ldexp(scale, units))


def _prefixes(blocks: int, size: int) -> Iterator[list[range]]:
    """All prefixes of a tile, shortest first, as many at a time as one run should have."""
    some: list[range] = []
    clocks = 0
    for count in range(1, blocks + 1):
        some.append(range(count))
        clocks += count * size
        if clocks >= _CLOCKS_AT_ONCE or count == blocks:
            yield some
            some, clocks = [], 0


def _first_wrong_block(output: _Output, blocks: int, size: int) -> int | None:
    for some in _prefixes(blocks, size):
        parts = [output.part(prefix).sums for prefix in some]
        for prefix, part, actual in zip(some, parts, output.actual(parts)[0], strict=True):
            if actual != output.expected(part):
                return prefix[-1]
    return None


def locate_mismatch(tile: BulkTile, result: MatmulResult) -> MatmulMismatch | None:
    """Find out where the first wrong output of a product goes wrong, by simulating its tile again.

    Parameters
    ----------
    tile : BulkTile
    result : MatmulResult
        Of that tile.

    Returns
    -------
    mismatch : MatmulMismatch or None
        None if there is no wrong output.
    """
    if result.first_mismatch is None:
        return None
    row, token = result.first_mismatch
    operands, size = result.operands, result.operands.tensor.format.block_size
    output = _Output(tile, result, row, token)
    whole = output.part(range(operands.blocks))
    number = operands.parts().index(whole)
    expected = output.expected(whole)
    actual = int(result.outputs.bits[number, token % tile.columns, row % tile.rows])
    sums = output.in_float32()
    block = _first_wrong_block(sums, operands.blocks, size)
    step: Step | FinishStep | None
    if block is not None:
        step, waveform = _step(sums, block, size, operands.tensor.shape[1])
        return MatmulMismatch(row, token, expected, actual, step, waveform)
    step, part = _finish_step(output, sums, whole)
    before = operands.parts()[max(0, number - 1) : number + 1]
    waveform = None
    try:
        shown = output if step is None or step.name == "bfloat16" else sums
        _, waveform = shown.actual([part] if step else before, waves=True)
    except SimulationError:
        pass
    return MatmulMismatch(row, token, expected, actual, step, waveform)


def _finish_step(
    output: _Output, sums: _Output, whole: TilePart
) -> tuple[FinishStep | None, TilePart]:
    """The wrong step after the sums, and what shows it."""
    columns, values = output.corrections()
    parts = [replace(whole, corrections=count) for count in range(len(columns) + 1)]
    for count, (part, actual) in enumerate(zip(parts, sums.actual(parts)[0], strict=True)):
        expected = sums.expected(part)
        if actual == expected:
            continue
        if not count:
            step = FinishStep("row scale", expected, actual, output.row_scale(whole))
        else:
            column = columns[count - 1]
            step = FinishStep(
                "correction", expected, actual, values[count - 1], column, output.activation(column)
            )
        return step, part
    (actual,), expected = output.actual([whole])[0], output.expected(whole)
    return (FinishStep("bfloat16", expected, actual) if actual != expected else None), whole


def _step(output: _Output, block: int, size: int, channels: int) -> tuple[Step, Path | None]:
    """The wrong step of a block, and its recording."""
    parts = [output.part(range(block, block + 1)).sums, output.part(range(block + 1)).sums]
    try:
        values, waveform = output.actual(parts, waves=True)
    except SimulationError:
        # The report counts more than the recording.
        (values, _), waveform = output.actual(parts), None
    expected = [output.expected(part) for part in parts]
    wrong = 0 if values[0] != expected[0] else 1
    product, scale = output.operands_of_block(block)
    last = min((block + 1) * size, channels) - 1
    step = Step(
        block, (block * size, last), ("T", "acc")[wrong], expected[wrong], values[wrong],
        product, scale,
    )  # fmt: skip
    return step, waveform
