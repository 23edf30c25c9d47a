"""What a checkpoint holds: sizes, and per tensor how its format was used."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import prod
from typing import Any

from golden.checkpoint import Checkpoint
from golden.checkpoint.layout import CORRECTION_FIELDS, FIELDS
from golden.convert import decode_array
from golden.errors import InputError
from rtl.identity import format_text, hexadecimal, identification
from sop.shared.progress import Report

__all__ = [
    "CheckpointSizes",
    "TensorUse",
    "checkpoint_sizes",
    "inspect_tensors",
    "matching_tensors",
]


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes of each kind of stored field over all tensors, without the header of the file.

    Attributes
    ----------
    indices, scales, luts, row_scales, corrections : int
        Of the quantized tensors.
    raw : int
        Of the tensors that are stored as they came.
    weights : int
        Number of quantized weights, without padding.
    """

    indices: int
    scales: int
    luts: int
    row_scales: int
    corrections: int
    raw: int
    weights: int


def checkpoint_sizes(checkpoint: Checkpoint) -> CheckpointSizes:
    """Sizes from the header of a checkpoint alone."""
    sizes = dict.fromkeys(FIELDS, 0)
    for name in checkpoint.names:
        for field, info in checkpoint.fields(name).items():
            sizes[field] += info.nbytes
    return CheckpointSizes(
        sizes["indices"],
        sizes["scales"],
        sizes["luts"],
        sizes["row_scales"],
        sum(sizes[field] for field in CORRECTION_FIELDS),
        raw=sum(checkpoint.raw_info(name).nbytes for name in checkpoint.raw_names),
        weights=sum(prod(checkpoint.info(name).shape) for name in checkpoint.names),
    )


@dataclass(frozen=True)
class TensorUse:
    """One quantized tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
        (rows, columns).
    format, hif : str
        Names of the format and of that of its LUT entries.
    hardware_format, format_id : str or None
        What a decoder calls the format, and has in its register FORMAT_ID; None if none can
        decode it.
    source_dtype : str
        Type of the weights before quantization.
    stored_bits_per_weight : Fraction
        Everything that is stored of the tensor, over its weights.
    metabit_share : float or None
        Share of blocks that use the second LUT; None if there is none.
    zero_block_share : float
        Share of blocks whose scale is zero.
    corrections : int or None
        Stored entries; None if the tensor has no sparse part.
    layer_exponent : int
    luts : tuple of tuple of int
        Values of the entries of each LUT.
    """

    name: str
    shape: tuple[int, int]
    format: str
    hif: str
    hardware_format: str | None
    format_id: str | None
    source_dtype: str
    stored_bits_per_weight: Fraction
    metabit_share: float | None
    zero_block_share: float
    corrections: int | None
    layer_exponent: int
    luts: tuple[tuple[int, ...], ...]

    @property
    def correction_share(self) -> float:
        """Stored corrections over weights."""
        return (self.corrections or 0) / prod(self.shape)

    def as_dict(self, *, codebooks: bool) -> dict[str, Any]:
        """Everything as JSON values, the LUTs only with `codebooks`."""
        facts = {
            "name": self.name,
            "shape": list(self.shape),
            "format": self.format,
            "hif": self.hif,
            "hardware_format": self.hardware_format,
            "format_id": self.format_id,
            "source_dtype": self.source_dtype,
            "stored_bits_per_weight": float(self.stored_bits_per_weight),
            "metabit_share": self.metabit_share,
            "zero_block_share": self.zero_block_share,
            "corrections": self.corrections,
            "correction_share": self.correction_share,
            "layer_exponent": self.layer_exponent,
        }
        return facts | ({"luts": [list(lut) for lut in self.luts]} if codebooks else {})


def matching_tensors(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[str]:
    """Return the names of the quantized tensors that match any of the patterns, in file order.

    Parameters
    ----------
    checkpoint : Checkpoint
    patterns : sequence of str
        Case-sensitive shell patterns as in :mod:`fnmatch`.

    Raises
    ------
    InputError
        If one of the patterns matches no quantized tensor, unless it is ``*``.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in checkpoint.names if fnmatchcase(name, pattern)]
        if not matches and pattern != "*":
            some = ", ".join(map(repr, checkpoint.names[:3])) or "none"
            raise InputError(
                f"{checkpoint.path}: pattern {pattern!r}: matches none of "
                f"{len(checkpoint.names)} quantized tensors, such as {some}"
            )
        chosen.update(matches)
    return [name for name in checkpoint.names if name in chosen]


def inspect_tensors(
    checkpoint: Checkpoint, pattern: str | None, report: Report
) -> Iterator[TensorUse]:
    """Read the quantized tensors one after the other, each one checked.

    Parameters
    ----------
    checkpoint : Checkpoint
    pattern : str or None
        Case-sensitive shell pattern as in :mod:`fnmatch`; None takes all.
    report : callable
        See :data:`sop.shared.progress.Report`.

    Raises
    ------
    InputError
        If the pattern matches no quantized tensor, or a tensor is broken.
    """
    names = matching_tensors(checkpoint, ["*"] if pattern is None else [pattern])
    for done, name in enumerate(names):
        report(done, len(names))
        yield _tensor_use(checkpoint, name)


def _tensor_use(checkpoint: Checkpoint, name: str) -> TensorUse:
    stored = checkpoint.read(name)
    tensor, fmt = stored.tensor, stored.tensor.format
    hardware = format_text(fmt) if fmt.block_size else None  # a decoder works on blocks
    scales = decode_array(tensor.scale_codes, fmt.word.scale)
    return TensorUse(
        name=name,
        shape=tensor.shape,
        format=fmt.name,
        hif=fmt.hif.name,
        hardware_format=hardware,
        format_id=None if hardware is None else hexadecimal(identification(hardware)),
        source_dtype=checkpoint.info(name).source_dtype,
        stored_bits_per_weight=Fraction(checkpoint.bits(name), prod(tensor.shape)),
        metabit_share=float(tensor.metabits.mean()) if fmt.word.metabit_bits else None,
        zero_block_share=float((scales == 0).mean()),
        corrections=None if stored.corrections is None else stored.corrections.entries,
        layer_exponent=tensor.layer_exponent,
        luts=tuple(tuple(lut.values.tolist()) for lut in tensor.luts),
    )
