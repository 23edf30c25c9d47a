"""Which matrices of a model are quantized, and what is left out, with the reason."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from golden.errors import InputError
from golden.notation import DEFAULT_BLOCK_SIZE
from sop.files.models import Model
from sop.files.roles import Role, block_number
from sop.files.tensor_info import Matrix

__all__ = [
    "Choice",
    "LeftOut",
    "choose_tensors",
    "linear_matrices",
    "linear_matrices_of_block",
    "select_matrices",
]

_BY_DEFAULT = (Role.LINEAR, Role.EXPERTS, Role.HEADS)
_UNUSUAL = (
    Role.ROUTER, Role.NORM, Role.CONVOLUTION, Role.POSITION, Role.BIAS, Role.STATE, Role.SCALE,
)  # fmt: skip
_NO_ORIENTATION = "cannot be told whether it is [outputs, inputs] or the transpose"
_NARROW = f"fewer than {DEFAULT_BLOCK_SIZE} input channels"
_EXCLUDED, _NOT_INCLUDED = "excluded", "not included"


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is stored as it came.

    Attributes
    ----------
    tensor : str
    reason : str
        Short; the same for all tensors that are left out alike.
    weights : int
    """

    tensor: str
    reason: str
    weights: int


@dataclass(frozen=True)
class Choice:
    """Result of :func:`choose_tensors`.

    Attributes
    ----------
    matrices : tuple of Matrix
        To quantize, in file order.
    left_out : tuple of LeftOut
        All other tensors, in file order, but the scales of FP8 weights.
    notes : tuple of str
        What is unusual about the choice, one sentence each.
    """

    matrices: tuple[Matrix, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()


def choose_tensors(
    model: Model, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Choice:
    """Choose the matrices to quantize.

    Parameters
    ----------
    model : Model
        The open model.
    include : sequence of str
        Shell patterns as in :mod:`fnmatch`; matrices of any name that match one of them. Without
        any, the linear weights of all blocks with at least 16 input channels, stacked experts
        among them, so neither embeddings nor the output head, routers, norms, convolutions and
        position tables.
    exclude : sequence of str
        Shell patterns of names to leave out.

    Raises
    ------
    InputError
        If a pattern matches no tensor, no matrix is left, or the names of the blocks are not known
        and nothing is included.
    """
    included, excluded = set(model.select(include)), set(model.select(exclude))
    by_tensor = model.matrices_by_tensor
    matrices: list[Matrix] = []
    left_out: list[LeftOut] = []
    for name, info in model.tensors.items():
        if name in model.scale_tensors:
            continue
        role = model.roles[name]
        wanted = name in included if include else role in _BY_DEFAULT
        if not wanted:
            reason = _NOT_INCLUDED if include else role.value
        elif not info.weights:
            reason = "empty"
        elif name in excluded:
            reason = _EXCLUDED
        elif name in by_tensor:
            found = by_tensor[name]
            # Less than one block: a filter or table under a name that is not known.
            if include or found[0].shape[1] >= DEFAULT_BLOCK_SIZE:
                matrices += found
                continue
            reason = _NARROW
        else:
            reason = _NO_ORIENTATION if role in _BY_DEFAULT else f"no matrix: {role.value}"
        left_out.append(LeftOut(name, reason, info.weights))
    if not matrices:
        raise InputError(f"{model.path}: {_why_nothing(model, include, left_out)}")
    return Choice(tuple(matrices), tuple(left_out), tuple(_notes(model, matrices)))


def _why_nothing(model: Model, include: Sequence[str], left_out: Sequence[LeftOut]) -> str:
    known = any(role in _BY_DEFAULT for role in model.roles.values())
    if not include and not known:
        return "no blocks with known names; name the tensors, such as --include '*'"
    unclear = [one for one in left_out if one.reason == _NO_ORIENTATION]
    if unclear:
        return f"tensor {unclear[0].tensor!r}: {_NO_ORIENTATION}"
    narrow = [one for one in left_out if one.reason == _NARROW]
    if narrow:
        return f"no matrix is left to quantize: tensor {narrow[0].tensor!r} has {_NARROW}"
    return "no matrix is left to quantize"


def _notes(model: Model, matrices: Iterable[Matrix]) -> list[str]:
    turned, unusual = {}, {}
    for matrix in matrices:
        if matrix.transposed:
            turned[matrix.tensor] = True
        role = model.roles[matrix.tensor]
        if role in _UNUSUAL:
            unusual[matrix.tensor] = role.value
    notes = []
    if turned:
        some = f"{len(turned)} tensors, such as {next(iter(turned))!r},"
        notes.append(f"{some} are [inputs, outputs] and are transposed to be quantized")
    notes += [f"{tensor!r} is a {role}, and quantized as asked" for tensor, role in unusual.items()]
    return notes


def select_matrices(model: Model, patterns: Sequence[str]) -> list[Matrix]:
    """Return the matrices of all tensors whose name matches a pattern, in file order.

    Raises
    ------
    InputError
        If a pattern matches no tensor, or a tensor that matches is no matrix.
    """
    by_tensor = model.matrices_by_tensor
    chosen: list[Matrix] = []
    for name in model.select(patterns):
        if name not in by_tensor:
            shape = list(model.tensors[name].shape)
            problem = f"shape {shape}, must be a non-empty matrix"
            raise InputError(f"{model.path}: tensor {name!r}: {problem}")
        chosen += by_tensor[name]
    return chosen


def linear_matrices(model: Model) -> list[Matrix]:
    """Return the linear weights and experts of all blocks, block after block.

    Raises
    ------
    InputError
        If the model has no block with known names.
    """
    blocks = _linear_matrices_by_block(model)
    if not blocks:
        raise InputError(f"{model.path}: no blocks with known names; name the tensors to use")
    return [matrix for block in sorted(blocks) for matrix in blocks[block]]


def linear_matrices_of_block(model: Model, block: int) -> list[Matrix]:
    """Return the linear weights and experts of one decoder block, in file order; at least one.

    A model with several stacks of layers gives those of each.

    Parameters
    ----------
    model : Model
        The open model.
    block : int
        Number of the block, from 0.

    Raises
    ------
    InputError
        If the model has no such block.
    """
    found = _linear_matrices_by_block(model)
    if block not in found:
        blocks = f"blocks {min(found)}..{max(found)}" if found else "no blocks with known names"
        raise InputError(f"{model.path}: block {block}: not in this file, which has {blocks}")
    return found[block]


def _linear_matrices_by_block(model: Model) -> dict[int, list[Matrix]]:
    blocks: dict[int, list[Matrix]] = {}
    for matrix in model.matrices.values():
        number = block_number(matrix.tensor)
        if number is not None and model.roles[matrix.tensor] in _BY_DEFAULT:
            blocks.setdefault(number, []).append(matrix)
    return blocks
