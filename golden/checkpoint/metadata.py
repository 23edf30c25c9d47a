"""The JSON text in a checkpoint that tells what its bytes are: both ways.

docs/checkpoint.md describes every key.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from golden.checkpoint.info import QuantizedInfo, SourceInfo
from golden.checkpoint.names import check_source, check_source_dtype, check_tensor_name
from golden.errors import InputError, located
from golden.formats import HIF_FORMATS
from golden.hashing import text_sha256
from golden.notation import QuantFormat, parse_format
from golden.strict_json import (
    canonical_json,
    check_json,
    integers,
    json_object,
    object_with,
    parse_json,
    shown,
)

__all__ = [
    "METADATA_KEY",
    "VERSION",
    "config_hash",
    "describe_tensor",
    "new_metadata",
    "read_metadata",
    "read_tensor_info",
]

VERSION = 2
METADATA_KEY = "scaled_outer_product"
"""Key of ``__metadata__`` that holds the JSON text of this format; others are ignored."""

_MAX_FORMAT_NAME = 64
_METADATA_KEYS = frozenset({"version", "config", "config_hash", "calibration", "tensors"})
_TENSOR_KEYS = frozenset({"format", "hif", "shape", "dtype", "layer_exponent", "source"})
_SOURCE_KEYS = frozenset({"tensor", "index", "count", "transposed"})


# --------------------------------------------------------------------------------------- writing


def config_hash(config: Mapping[str, object]) -> str:
    """SHA-256, in lower-case hex, of a configuration's JSON text as the writer stores it.

    That text is ASCII (other characters escaped), with keys sorted, without spaces.

    Raises
    ------
    InputError
        If the configuration is not JSON (see :class:`golden.checkpoint.CheckpointWriter`).
    """
    check_json(config)
    return text_sha256(canonical_json(config))


def new_metadata(
    config: Mapping[str, object], calibration: Mapping[str, object] | None
) -> dict[str, Any]:
    """Metadata of a file without tensors."""
    for key, value in (("config", config), ("calibration", calibration)):
        with located(key):
            check_json(value)
    return {
        "version": VERSION,
        # Text, so that its hash needs no agreement on how numbers are printed.
        "config": canonical_json(config),
        "config_hash": config_hash(config),
        "calibration": json.loads(canonical_json(calibration)),  # a copy
        "tensors": {},
    }


def describe_tensor(info: QuantizedInfo) -> dict[str, Any]:
    """Entry of a quantized matrix in the metadata."""
    return {
        "format": info.format.name,
        "hif": info.format.hif.name,
        "shape": list(info.shape),
        "dtype": info.source_dtype,
        "layer_exponent": info.layer_exponent,
        "source": None if info.source is None else asdict(info.source),
    }


# --------------------------------------------------------------------------------------- reading


def read_metadata(container: Mapping[str, str]) -> dict[str, Any]:
    """JSON object of this format in the metadata of the container, ``config`` parsed.

    Raises
    ------
    InputError
        If there is none, or anything in it but the entries of the tensors breaks the format.
    """
    if METADATA_KEY not in container:
        raise InputError(
            f"__metadata__: no key {METADATA_KEY!r}; this is a safetensors file, but no checkpoint "
            "of this program"
        )
    with located(f"metadata {METADATA_KEY!r}"):
        metadata = json_object(parse_json(container[METADATA_KEY]))
        version = metadata.get("version")
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"version {shown(version)}, this program reads version {VERSION}; no other was "
                "ever released: quantize the model again"
            )
        object_with(metadata, _METADATA_KEYS)
        with located("config"):
            metadata["config"] = _read_config(metadata["config"], metadata["config_hash"])
        if metadata["calibration"] is not None:
            with located("calibration"):
                _checked_object(metadata["calibration"])
        with located("tensors"):
            json_object(metadata["tensors"])
    return metadata


def _read_config(text: object, digest: object) -> dict[str, Any]:
    """JSON object in the text of the configuration, whose hash is that of its bytes."""
    if not isinstance(text, str):
        raise InputError(f"must be a string, not {shown(text)}")
    try:
        found = text_sha256(text)
    except UnicodeEncodeError:
        raise InputError("is not valid Unicode") from None
    if digest != found:
        raise InputError(f"config_hash: {shown(digest)}, config has {found!r}")
    return _checked_object(parse_json(text))


def _checked_object(value: object) -> dict[str, Any]:
    table = json_object(value)
    check_json(table)
    return table


def read_tensor_info(name: str, value: object) -> QuantizedInfo:
    """What the metadata say about a quantized tensor; the inverse of :func:`describe_tensor`.

    Raises
    ------
    InputError
        The message names the key.
    """
    table = object_with(value, _TENSOR_KEYS)
    with located("field 'shape'"):
        shape = integers(table["shape"], 1)
        if len(shape) != 2:
            raise InputError(f"must have two dimensions, not {shown(list(shape))}")
    exponent = table["layer_exponent"]
    if type(exponent) is not int or not -128 <= exponent <= 127:
        raise InputError(f"field 'layer_exponent': {shown(exponent)} is not in -128..127")
    check_source_dtype(table["dtype"])
    fmt = _read_format(table["format"], table["hif"])
    source = _read_source(name, table["source"])
    return QuantizedInfo(fmt, (shape[0], shape[1]), exponent, table["dtype"], source)


def _read_source(name: str, value: object) -> SourceInfo | None:
    if value is None:
        return None
    with located("field 'source'"):
        table = object_with(value, _SOURCE_KEYS)
        if not isinstance(table["tensor"], str):
            raise InputError(f"'tensor' must be a string, not {shown(table['tensor'])}")
        check_tensor_name(table["tensor"])
        for key in ("index", "count"):
            if table[key] is not None and type(table[key]) is not int:
                raise InputError(f"{key!r} must be a number or null, not {shown(table[key])}")
        if type(table["transposed"]) is not bool:
            raise InputError(
                f"'transposed' must be true or false, not {shown(table['transposed'])}"
            )
    source = SourceInfo(**table)
    check_source(name, source)
    return source


def _read_format(name: object, hif: object) -> QuantFormat:
    if not isinstance(hif, str) or hif not in HIF_FORMATS:
        raise InputError(f"field 'hif': {shown(hif)}, expected {', '.join(HIF_FORMATS)}")
    if not isinstance(name, str) or len(name) > _MAX_FORMAT_NAME:
        raise InputError(f"field 'format': {shown(name)} is not the name of a format")
    with located("field 'format'"):
        fmt = parse_format(name, HIF_FORMATS[hif])
        if fmt.name != name:
            raise InputError(f"{name!r}, must be spelled {fmt.name!r}")
    return fmt
