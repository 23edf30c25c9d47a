"""A product cut into the tiles that hardware computes it in."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from golden.activations import QuantizedActivations
from golden.corrections import Corrections
from golden.errors import InputError
from golden.tensor import QuantizedTensor, take_rows

__all__ = ["FAULT_KINDS", "Operands", "TilePart", "operands_of"]

FAULT_KINDS = ("index", "scale", "activation", "row_scale", "correction")
"""What :meth:`Operands.flipped` can change."""

ONE = 0x3F80
"""Of bfloat16: a row scale that changes nothing."""


@dataclass(frozen=True)
class TilePart:
    """Blocks of one tile of rows with one tile of tokens, which is what comes between two outputs.

    Attributes
    ----------
    row_tile, token_tile : int
    blocks : range
        Of the input channels.
    row_scales : bool
        Whether row scales are applied.
    corrections : int or None
        How many corrections of each row are added; None for all. Others than 0 need all blocks.
    """

    row_tile: int
    token_tile: int
    blocks: range
    row_scales: bool = True
    corrections: int | None = None

    @property
    def sums(self) -> "TilePart":
        """The same without row scales and corrections."""
        return replace(self, row_scales=False, corrections=0)


@dataclass(frozen=True, eq=False)
class Operands:
    """Weights and activations filled up to whole tiles; :func:`operands_of` makes them.

    Attributes
    ----------
    tensor : QuantizedTensor
        With rows of index 0 under scale word 0 at the end.
    activations : QuantizedActivations
        In the blocks of the weights, with tokens of code 0 at the end.
    corrections : Corrections or None
        Of the tensor, none in the rows that fill it up.
    rows, columns : int
        Of a tile.
    """

    tensor: QuantizedTensor
    activations: QuantizedActivations
    corrections: Corrections | None
    rows: int
    columns: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of rows, and of tokens."""
        return self.tensor.shape[0] // self.rows, self.activations.shape[0] // self.columns

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.tensor.indices.shape[1]

    def parts(self) -> list[TilePart]:
        """The whole product in the order in which the tile computes it."""
        rows, tokens = self.tiles
        whole = range(self.blocks)
        return [TilePart(row, token, whole) for row in range(rows) for token in range(tokens)]

    def row_scales(self, part: TilePart) -> NDArray[np.uint16]:
        """Row scales of a part, shape (rows,): 1 where there are none."""
        scales = self.tensor.row_scales
        if scales is None or not part.row_scales:
            return np.full(self.rows, ONE, dtype=np.uint16)
        return scales[part.row_tile * self.rows : (part.row_tile + 1) * self.rows]

    def cut(
        self, part: TilePart
    ) -> tuple[QuantizedTensor, QuantizedActivations, Corrections | None]:
        """The operands of a part on their own."""
        size = self.tensor.format.block_size
        rows, tokens = (
            slice(number * count, (number + 1) * count)
            for number, count in ((part.row_tile, self.rows), (part.token_tile, self.columns))
        )
        tensor, activations = take_rows(self.tensor, rows), self.activations
        sparse = self.corrections
        blocks = slice(part.blocks.start, part.blocks.stop)
        channels = min(blocks.stop * size, tensor.shape[1]) - blocks.start * size
        exponents = activations.token_exponents
        return (
            replace(
                tensor,
                shape=(self.rows, channels),
                indices=tensor.indices[:, blocks],
                scale_words=tensor.scale_words[:, blocks],
                row_scales=None if tensor.row_scales is None else self.row_scales(part),
            ),
            replace(
                activations,
                shape=(self.columns, channels),
                elements=activations.elements[tokens, blocks],
                scale_codes=activations.scale_codes[tokens, blocks],
                token_exponents=None if exponents is None else exponents[tokens],
            ),
            None if sparse is None or part.corrections == 0 else sparse.take_rows(
                rows, part.corrections
            ),
        )  # fmt: skip

    def flipped(self, kind: str, position: int, bit: int) -> "Operands":
        """The same with one bit changed, to see that the comparison notices.

        Parameters
        ----------
        kind : str
            One of :data:`FAULT_KINDS`: ``"index"`` (position counts stored weights of the tensor),
            ``"scale"`` (its blocks), ``"activation"`` (channels of the first token, then of the
            second, and so on), ``"row_scale"`` (rows), ``"correction"`` (values, in the order of
            the file).
        position, bit : int
            Which element, and which of its bits, 0 being the lowest.

        Raises
        ------
        InputError
            If there is no such element or bit.
        """
        tensor, activations, corrections = self.tensor, self.activations, self.corrections
        none = np.empty(0, dtype=np.uint16)
        row_scales = none if tensor.row_scales is None else tensor.row_scales
        values = none if corrections is None else corrections.values
        array, width = {
            "index": (tensor.indices, tensor.format.index_bits),
            "scale": (tensor.scale_words, tensor.format.word.width),
            "activation": (activations.elements, activations.format.element.width),
            "row_scale": (row_scales, 16),
            "correction": (values, 16),
        }[kind]
        if position >= array.size or bit >= width:
            raise InputError(
                f"fault {kind}:{position}:{bit}: there are {array.size} elements of {width} bits"
            )
        array = array.copy()
        array.flat[position] ^= 1 << bit
        if kind == "index":
            return replace(self, tensor=replace(tensor, indices=array))
        if kind == "scale":
            return replace(self, tensor=replace(tensor, scale_words=array))
        if kind == "row_scale":
            return replace(self, tensor=replace(tensor, row_scales=array))
        if kind == "correction":
            assert corrections is not None
            return replace(self, corrections=replace(corrections, values=array))
        return replace(self, activations=replace(activations, elements=array))


def _filled_rows(tensor: QuantizedTensor, more: int) -> QuantizedTensor:
    row_scales = tensor.row_scales
    return replace(
        tensor,
        shape=(tensor.shape[0] + more, tensor.shape[1]),
        indices=np.pad(tensor.indices, ((0, more), (0, 0), (0, 0))),
        scale_words=np.pad(tensor.scale_words, ((0, more), (0, 0))),
        row_scales=None if row_scales is None else np.pad(row_scales, (0, more)),
    )


def _filled_tokens(activations: QuantizedActivations, more: int) -> QuantizedActivations:
    exponents = activations.token_exponents
    return replace(
        activations,
        shape=(activations.shape[0] + more, activations.shape[1]),
        elements=np.pad(activations.elements, ((0, more), (0, 0), (0, 0))),
        scale_codes=np.pad(activations.scale_codes, ((0, more), (0, 0))),
        token_exponents=None if exponents is None else np.pad(exponents, (0, more)),
    )


def _in_blocks(activations: QuantizedActivations, blocks: int, size: int) -> QuantizedActivations:
    """The same values in shorter blocks: longer ones have their scale in each part."""
    fmt, (tokens, _) = activations.format, activations.shape
    elements = activations.elements.reshape(tokens, -1)[:, : blocks * size]
    elements = np.pad(elements, ((0, 0), (0, blocks * size - elements.shape[1])))
    repeat = fmt.block_size // size if fmt.block_size else blocks
    return replace(
        activations,
        format=replace(fmt, block_size=size),
        elements=elements.reshape(tokens, blocks, size),
        scale_codes=activations.scale_codes.repeat(repeat, axis=1)[:, :blocks],
    )


def _filled_corrections(corrections: Corrections, more: int) -> Corrections:
    return replace(
        corrections,
        shape=(corrections.shape[0] + more, corrections.shape[1]),
        indptr=np.pad(corrections.indptr, (0, more), mode="edge"),
    )


def operands_of(
    tensor: QuantizedTensor, activations: QuantizedActivations, corrections: Corrections | None,
    *, rows: int, columns: int,
) -> Operands:  # fmt: skip
    """Fill the operands of a product up to whole tiles.

    Parameters
    ----------
    tensor : QuantizedTensor
        Its format has blocks.
    activations : QuantizedActivations
        Blocks are whole blocks of the weights, or there is one scale a token.
    corrections : Corrections or None
    rows, columns : int
        Of a tile.
    """
    blocked = _in_blocks(activations, tensor.indices.shape[1], tensor.format.block_size)
    more = -tensor.shape[0] % rows
    return Operands(
        _filled_rows(tensor, more),
        _filled_tokens(blocked, -activations.shape[0] % columns),
        None if corrections is None else _filled_corrections(corrections, more),
        rows,
        columns,
    )
