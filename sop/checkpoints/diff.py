"""The first difference of two checkpoints, the rule that decides what differs, and counts.

Parts are looked at in a fixed order: configuration, calibration, list of tensors; then tensor by
tensor, in order of name, its format, layer exponent, LUTs, row scales, scale words, indices and
corrections; then the tensors that are stored as they came. Blocks, weights and entries are taken in
the order in which they are stored, bits from the top of a code down.
"""

import json
from collections.abc import Iterator
from functools import partial

from golden.checkpoint import Checkpoint, QuantizedInfo
from sop.checkpoints.differences import FIELDS, Difference, DiffReport, Found, Place, top_bit
from sop.checkpoints.matrix_diff import matrix_differences
from sop.files.tensor_info import Matrix
from sop.files.weights import Weights
from sop.shared.progress import Report

__all__ = ["diff_checkpoints"]


def diff_checkpoints(
    a: Checkpoint, b: Checkpoint, source: Weights | None, report: Report
) -> DiffReport:
    """Compare everything that two checkpoints hold; memory holds one pair of tensors.

    Parameters
    ----------
    a, b : Checkpoint
    source : Weights or None
        The model that was quantized, to tell the quotient behind the first index that differs.
    report : callable
        See :data:`sop.shared.progress.Report`; counts tensors.

    Raises
    ------
    InputError
        If a tensor is broken, or the source does not have the tensor of that index.
    """
    first = None
    counts = dict.fromkeys(FIELDS, 0)
    for found in _all_differences(a, b, source, report):
        first = first or found.first()
        counts[found.field] += found.count
    return DiffReport(first, counts)


def _all_differences(
    a: Checkpoint, b: Checkpoint, source: Weights | None, report: Report
) -> Iterator[Found]:
    yield from _file_differences(a, b)
    both = [name for name in a.names if name in b.names]
    raw = [name for name in a.raw_names if name in b.raw_names]
    for done, name in enumerate(both):
        report(done, len(both) + len(raw))
        yield from _info_differences(name, a.info(name), b.info(name))
        matrix = Matrix.of_checkpoint(name, a.info(name))
        # Read also what cannot be compared, so that a broken tensor is found.
        yield from matrix_differences(matrix, a.read(name), b.read(name), source)
    for done, name in enumerate(raw, len(both)):
        report(done, len(both) + len(raw))
        yield from _raw_differences(a, b, name)


# -------------------------------------------------------------------------------------- the header


def _file_differences(a: Checkpoint, b: Checkpoint) -> Iterator[Found]:
    yield from _table_differences("config", *(_leaves(c.config) for c in (a, b)))
    yield from _table_differences("calibration", *(_leaves(c.calibration) for c in (a, b)))
    kinds = [
        dict.fromkeys(c.names, "quantized") | dict.fromkeys(c.raw_names, "stored as it came")
        for c in (a, b)
    ]
    yield from _table_differences("tensors", *kinds)


def _leaves(value: object, key: str = "") -> dict[str, str]:
    """JSON values by their path, such as ``scales.mode``; as JSON, so that 1 is not true."""
    if isinstance(value, dict) and value:
        leaves: dict[str, str] = {}
        for name, item in value.items():
            leaves |= _leaves(item, f"{key}.{name}" if key else name)
        return leaves
    return {key or "(whole)": json.dumps(value)}


def _table_differences(field: str, a: dict[str, str], b: dict[str, str]) -> Iterator[Found]:
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    if keys:
        key = keys[0]
        values = a.get(key, "absent"), b.get(key, "absent")
        place = Place(tensor=key) if field == "tensors" else Place(key=key)
        yield Found(field, len(keys), lambda: Difference(field, place, *values, (), field))


def _info_differences(name: str, a: QuantizedInfo, b: QuantizedInfo) -> Iterator[Found]:
    parts = [
        {
            "format": info.format.name,
            "LUT entries": info.format.hif.name,
            "shape": f"{info.shape[0]}x{info.shape[1]}",
            "type before quantization": info.source_dtype,
            "place in the model": _place(info),
        }
        for info in (a, b)
    ]
    keys = [key for key in parts[0] if parts[0][key] != parts[1][key]]
    if keys:
        key = keys[0]
        values = parts[0][key], parts[1][key]
        place = Place(name, key=key)
        yield Found("format", len(keys), lambda: Difference("format", place, *values, (), "format"))
    if a.layer_exponent != b.layer_exponent:
        field, exponents = "layer_exponent", (str(a.layer_exponent), str(b.layer_exponent))
        yield Found(field, 1, lambda: Difference(field, Place(name), *exponents, (), field))


def _place(info: QuantizedInfo) -> str:
    source = info.source
    if source is None:
        return "as it is"
    part = "whole" if source.index is None else f"slice {source.index} of {source.count}"
    return f"{source.tensor!r}, {part}{', transposed' * source.transposed}"


def _raw_differences(a: Checkpoint, b: Checkpoint, name: str) -> Iterator[Found]:
    infos = [f"{info.dtype} {list(info.shape)}" for info in (a.raw_info(name), b.raw_info(name))]
    if infos[0] != infos[1]:
        values = infos[0], infos[1]
        yield Found("raw", 1, lambda: Difference("raw", Place(name), *values, (), "raw"))
        return
    start = 0
    for one, two in zip(a.raw_chunks(name), b.raw_chunks(name), strict=True):
        if one != two:
            yield Found("raw", 1, partial(_raw_difference, name, one, two, start))
            return
        start += len(one)


def _raw_difference(name: str, a: bytes, b: bytes, start: int) -> Difference:
    position = next(i for i, (one, two) in enumerate(zip(a, b, strict=True)) if one != two)
    one, two = a[position], b[position]
    place = Place(name, key=f"byte {start + position}", bit=top_bit(one ^ two))
    return Difference("raw", place, f"{one:#04x}", f"{two:#04x}", (), "raw")
