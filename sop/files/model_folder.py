"""Which files of a Hugging Face folder, or of a model on the hub, hold its weights.

Nothing in a folder is trusted: an index may only name files inside it, and no pickle is opened.
"""

import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from golden.errors import InputError
from golden.extras import install_command

__all__ = [
    "MERGE_GGUF",
    "check_no_part",
    "download_model",
    "is_hub_name",
    "read_config",
    "weight_files",
]

MERGE_GGUF = "merge the parts with llama-gguf-split --merge of llama.cpp first"
"""What to do with a GGUF model in several files."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_MAX_INDEX_BYTES = 32 << 20
_SHOWN = 200  # characters of a name from a file in a message

# What a repository on the hub may be asked for: weights, configuration, tokenizer. No code.
_HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.txt")


def is_hub_name(text: str) -> bool:
    """Whether a text looks like ``owner/name`` and is no path that exists."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII) is not None
    return looks and not Path(text).exists() and not text.endswith((".gguf", ".safetensors"))


def download_model(name: str) -> Path:
    """Folder of a model on the hub, downloaded unless it is there already.

    Parameters
    ----------
    name : str
        Such as ``"HuggingFaceTB/SmolLM2-135M"``.

    Raises
    ------
    InputError
        If ``huggingface_hub`` is not installed, or the model cannot be had.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        problem = "is neither a file nor a folder; to take it from the Hugging Face hub, install"
        raise InputError(f"{name}: {problem} the llm extra: {install_command('llm')}") from error
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:  # whatever the hub or the network comes up with
        reason = " ".join(str(error).split())[:_SHOWN]
        raise InputError(
            f"{name}: is neither a file nor a folder, and the Hugging Face hub does not give it: "
            f"{reason}"
        ) from error


def weight_files(folder: Path) -> dict[str, frozenset[str] | None]:
    """Names of the safetensors files of a model, and the tensors that each must hold.

    Parameters
    ----------
    folder : Path
        With ``model.safetensors``, or with ``model.safetensors.index.json`` and shards. Files may
        be symbolic links, as they are in the cache of the hub.

    Returns
    -------
    files : dict of str to frozenset of str, or None
        In order of name; None where there is no index that says.

    Raises
    ------
    InputError
        If there are no such files, or the index is broken or names anything but files of the
        folder.
    """
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    if (folder / _SINGLE).is_file():
        return {_SINGLE: None}
    present = sorted(path.name for path in folder.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in present):
        problem = "pickled files are never opened, because that runs code from the file"
        raise InputError(f"{folder}: {problem}; convert them to .safetensors")
    raise InputError(f"{folder}: no weights; expected {_SINGLE} or {_INDEX}")


def check_no_part(path: Path) -> None:
    """Refuse a file that is one of several of a model, by its name or an index beside it.

    Parameters
    ----------
    path : Path
        A ``.gguf`` or ``.safetensors`` file that is to be opened alone.

    Raises
    ------
    InputError
        If it is one; the message says what to open in its place.
    """
    gguf = path.suffix.lower() == ".gguf"
    for index in () if gguf else sorted(path.parent.glob("*.safetensors.index.json")):
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if path.name in files and any(file != path.name for file in files):
            problem = f"one file of several of a model, says {index.name}"
            raise InputError(f"{path}: {problem}; give the folder {path.parent}")
    of_total = re.search(r"-([0-9]{1,9})-of-([0-9]{1,9})$", path.stem, re.ASCII)
    if of_total and int(of_total[2]) > 1:
        stem, (number, total) = path.stem[: of_total.start()], of_total.groups()
        first, last = (
            f"{stem}-{one:0>{len(number)}}-of-{total}{path.suffix}" for one in (1, total)
        )
        advice = MERGE_GGUF if gguf else f"give the folder, with {_INDEX}"
        problem = f"by its name one of {int(total)} parts of a model ({first} to {last}); {advice}"
        raise InputError(f"{path}: {problem}")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``; empty if there is none.

    Raises
    ------
    InputError
        If it is not a JSON object.
    """
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    config = _read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object")
    return config


def _read_json(path: Path) -> Any:
    size = path.stat().st_size
    if size > _MAX_INDEX_BYTES:
        raise InputError(f"{path}: {size} bytes, at most {_MAX_INDEX_BYTES} are read")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {str(error)[:_SHOWN]}") from error


def _indexed_files(folder: Path) -> dict[str, frozenset[str] | None]:
    path = folder / _INDEX
    index = _read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: field 'weight_map': must be an object of tensor and file names")
    tensors: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        _check_file_name(path, tensor, file)
        tensors.setdefault(file, set()).add(tensor)
    _check_present(path, tensors)
    return {file: frozenset(tensors[file]) for file in sorted(tensors)}


def _check_file_name(path: Path, tensor: str, file: Any) -> None:
    plain = isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII)
    if not plain:
        raise InputError(
            f"{path}: field 'weight_map': tensor {tensor[:_SHOWN]!r} is in "
            f"{str(file)[:_SHOWN]!r}, expected a .safetensors file of this folder"
        )


def _check_present(path: Path, files: Iterable[str]) -> None:
    for file in files:
        if not (path.parent / file).is_file():
            raise InputError(f"{path}: field 'weight_map': there is no file {file!r}")
