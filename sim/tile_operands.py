"""A product cut into the tiles that hardware computes it in."""

from dataclasses import dataclass, replace

import numpy as np

from golden.activations import QuantizedActivations
from golden.errors import InputError
from golden.tensor import QuantizedTensor, take_rows

__all__ = ["FAULT_KINDS", "Operands", "TilePart", "operands_of"]

FAULT_KINDS = ("index", "scale", "activation")
"""What :meth:`Operands.flipped` can change."""


@dataclass(frozen=True)
class TilePart:
    """Blocks of one tile of rows with one tile of tokens, which is what comes between two outputs.

    Attributes
    ----------
    row_tile, token_tile : int
    blocks : range
        Of the input channels.
    """

    row_tile: int
    token_tile: int
    blocks: range


@dataclass(frozen=True, eq=False)
class Operands:
    """Weights and activations filled up to whole tiles; :func:`operands_of` makes them.

    Attributes
    ----------
    tensor : QuantizedTensor
        With rows of index 0 under scale word 0 at the end.
    activations : QuantizedActivations
        In the blocks of the weights, with tokens of code 0 at the end.
    rows, columns : int
        Of a tile.
    """

    tensor: QuantizedTensor
    activations: QuantizedActivations
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

    def cut(self, part: TilePart) -> tuple[QuantizedTensor, QuantizedActivations]:
        """The operands of a part on their own."""
        size = self.tensor.format.block_size
        rows, tokens = (
            slice(number * count, (number + 1) * count)
            for number, count in ((part.row_tile, self.rows), (part.token_tile, self.columns))
        )
        tensor, activations = take_rows(self.tensor, rows), self.activations
        blocks = slice(part.blocks.start, part.blocks.stop)
        channels = min(blocks.stop * size, tensor.shape[1]) - blocks.start * size
        exponents = activations.token_exponents
        return (
            replace(
                tensor,
                shape=(self.rows, channels),
                indices=tensor.indices[:, blocks],
                scale_words=tensor.scale_words[:, blocks],
            ),
            replace(
                activations,
                shape=(self.columns, channels),
                elements=activations.elements[tokens, blocks],
                scale_codes=activations.scale_codes[tokens, blocks],
                token_exponents=None if exponents is None else exponents[tokens],
            ),
        )

    def flipped(self, kind: str, position: int, bit: int) -> "Operands":
        """The same with one bit changed, to see that the comparison notices.

        Parameters
        ----------
        kind : str
            One of :data:`FAULT_KINDS`: ``"index"`` (position counts stored weights of the tensor),
            ``"scale"`` (its blocks), ``"activation"`` (channels of the first token, then of the
            second, and so on).
        position, bit : int
            Which element, and which of its bits, 0 being the lowest.

        Raises
        ------
        InputError
            If there is no such element or bit.
        """
        tensor, activations = self.tensor, self.activations
        array, width = {
            "index": (tensor.indices, tensor.format.index_bits),
            "scale": (tensor.scale_words, tensor.format.word.width),
            "activation": (activations.elements, activations.format.element.width),
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


def operands_of(
    tensor: QuantizedTensor, activations: QuantizedActivations, *, rows: int, columns: int
) -> Operands:
    """Fill the operands of a product up to whole tiles.

    Parameters
    ----------
    tensor : QuantizedTensor
        Its format has blocks.
    activations : QuantizedActivations
        Blocks are whole blocks of the weights, or there is one scale a token.
    rows, columns : int
        Of a tile.
    """
    blocked = _in_blocks(activations, tensor.indices.shape[1], tensor.format.block_size)
    return Operands(
        _filled_rows(tensor, -tensor.shape[0] % rows),
        _filled_tokens(blocked, -activations.shape[0] % columns),
        rows,
        columns,
    )
