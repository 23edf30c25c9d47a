"""Which tensors one file can hold: their names, the fields' names, the slices of stacked ones."""

import re
from collections.abc import Iterable, Mapping

from golden.checkpoint.info import QuantizedInfo, SourceInfo
from golden.checkpoint.layout import FIELDS
from golden.container import RawInfo
from golden.errors import InputError, located
from golden.strict_json import shown

__all__ = [
    "check_tensor_name",
    "check_names",
    "check_slices",
    "check_source",
    "check_source_dtype",
    "claimed_names",
    "matrices_of_tensors",
]

_MAX_NAME_BYTES = 1024
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would break lines of text


def check_tensor_name(name: str) -> None:
    """Refuse names that are empty, reserved, too long, not Unicode, or would break a line of text.

    Raises
    ------
    InputError
        The message shows the name.
    """
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError(f"name {shown(name)} is not valid Unicode") from None
    if not 1 <= length <= _MAX_NAME_BYTES or name == "__metadata__":
        raise InputError(f"name {shown(name)} is reserved, empty or over {_MAX_NAME_BYTES} bytes")
    if _UNPRINTABLE.search(name):
        raise InputError(f"name {shown(name)} holds a control character or line separator")


def claimed_names(name: str) -> tuple[str, ...]:
    """Names that no other tensor may have beside a quantized one, whatever fields it has."""
    return (name, *(f"{name}.{field}" for field in FIELDS))


def check_source_dtype(name: object) -> None:
    """Refuse what names no type that weights may have had: letters, digits and ``_``, up to 32."""
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]{1,32}", name)):
        raise InputError(f"field 'dtype': {shown(name)} is not a type name")


def check_source(name: str, source: SourceInfo | None) -> None:
    """Refuse a source that does not fit the name of the matrix, or that says nothing."""
    if source is None:
        return
    if source.name != name:
        raise InputError(f"field 'source': {shown(source.name)}, expected the name of the matrix")
    if (source.index is None) != (source.count is None):
        raise InputError("field 'source': 'index' and 'count' must both be null or both numbers")
    if source.index is None and not source.transposed:
        raise InputError("field 'source': must be null for a matrix that is stored as it came")
    if source.index is not None and not 0 <= source.index < (source.count or 0):
        raise InputError(f"field 'source': index {source.index} is not below {source.count}")


def check_slices(infos: Mapping[str, QuantizedInfo], taken: Iterable[str]) -> None:
    """Refuse stacked tensors that are not complete, not alike, or stored under their name too."""
    first: dict[str, tuple[str, QuantizedInfo]] = {}
    found: dict[str, int] = {}
    for name, info in infos.items():
        source = info.source
        if source is None or source.index is None:
            continue
        other, like = first.setdefault(source.tensor, (name, info))
        found[source.tensor] = found.get(source.tensor, 0) + 1
        assert like.source is not None, "kept are those with a source only"
        facts = (source.count, source.transposed, info.shape)
        if facts != (like.source.count, like.source.transposed, like.shape):
            problem = f"count, shape and 'transposed' must be those of {shown(other)}"
            raise InputError(f"tensor {shown(name)}: field 'source': {problem}")
    names = set(taken)
    for tensor, (name, info) in first.items():
        count = info.source.count if info.source is not None else 0
        if found[tensor] != count:
            problem = f"{found[tensor]} of {count} slices of {shown(tensor)} are here"
            raise InputError(f"tensor {shown(name)}: field 'source': {problem}")
        if tensor in names:
            problem = "is stored in slices and as a whole"
            raise InputError(f"tensor {shown(tensor)}: {problem}")


def matrices_of_tensors(infos: Mapping[str, QuantizedInfo]) -> dict[str, tuple[str, ...]]:
    """Names of the matrices of each of the model's tensors, both sorted."""
    places = sorted(
        (name, 0, name) if info.source is None
        else (info.source.tensor, info.source.index or 0, name)
        for name, info in infos.items()
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for tensor, _, name in places:
        found.setdefault(tensor, []).append(name)
    return {tensor: tuple(names) for tensor, names in found.items()}


def check_names(matrices: Mapping[str, SourceInfo | None], raw: Mapping[str, RawInfo]) -> None:
    """Refuse a set of tensors that no checkpoint can hold, before any of them is made.

    Parameters
    ----------
    matrices : mapping of str to SourceInfo or None
        Those that will be quantized, by name.
    raw : mapping of str to RawInfo
        Those that will be stored as they came.

    Raises
    ------
    InputError
        If a name is not allowed, two tensors or their fields share one, or a raw tensor has a type
        or shape that the file cannot hold.
    """
    owners: dict[str, str] = {}
    for name, info in raw.items():
        with located(f"tensor {shown(name)}"):
            check_tensor_name(name)
            _ = info.nbytes  # refuses what can be no tensor
        owners[name] = name
    for name, source in matrices.items():
        with located(f"tensor {shown(name)}"):
            check_source(name, source)
            for claimed in claimed_names(name):
                check_tensor_name(claimed)
                _claim(owners, claimed, name)
    for tensor in {source.tensor for source in matrices.values() if source is not None}:
        if owners.get(tensor, tensor) != tensor or tensor in raw:
            problem = f"name {shown(tensor)} is taken by another tensor or its fields"
            raise InputError(f"tensor {shown(tensor)}: {problem}")


def _claim(owners: dict[str, str], name: str, owner: str) -> None:
    if name in owners:
        raise InputError(
            f"its field or name {shown(name)} is also that of tensor {shown(owners[name])}"
        )
    owners[name] = owner
