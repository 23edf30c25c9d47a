"""From a checkpoint to a folder that Hugging Face's transformers loads.

What is no weight (configuration, tokenizer) comes from the model that was quantized: a folder of
the same layout, whose files are copied, or a GGUF file of a known architecture, from whose
metadata they are made (:mod:`sop.llm.gguf_layout`).
"""

import json
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import Checkpoint
from golden.container_file import OutgoingTensor
from golden.errors import InputError
from sop.checkpoints.decode import decoded_tensor, raw_tensor
from sop.files.gguf_file import GgufFile
from sop.files.models import Model, open_model, resolve_model
from sop.files.quantization_config import plain_config
from sop.files.recorded_source import other_model
from sop.files.safetensors_file import DTYPES, float_tensor, write_safetensors
from sop.files.safetensors_reader import FLOAT_TYPES
from sop.files.scaled_weights import FP8_TYPES
from sop.files.weights import checkpoint_weights, restored_tensors
from sop.llm.architectures import gguf_layout
from sop.llm.gguf_layout import GgufLayout
from sop.llm.gguf_tokenizer import gguf_tokenizer
from sop.llm.packages import require
from sop.shared.output import new_folder
from sop.shared.progress import Report

__all__ = ["export_checkpoint"]

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_COPIED = (".jinja", ".json", ".model", ".tiktoken", ".txt")  # configuration and tokenizers
_INDEX = ".index.json"  # tells which file holds which weights; there is one file only
_SPECIAL_TOKENS = ("bos", "eos")


def export_checkpoint(
    checkpoint: Checkpoint,
    source: Path,
    folder: Path,
    dtype: str,
    report: Report,
    *,
    allow_other_model: bool = False,
) -> tuple[str, ...]:
    """Write a folder for ``AutoModelForCausalLM.from_pretrained``; memory holds one tensor.

    Parameters
    ----------
    checkpoint : Checkpoint
        Has all tensors of the model, each quantized or as it came.
    source : Path
        The model that was quantized: a Hugging Face folder, or a GGUF file, which needs the extra
        ``llm``.
    folder : Path
        Written under another name first; must not exist, or be empty.
    dtype : str
        Type of all tensors of floats, a key of :data:`sop.files.safetensors_file.DTYPES`.
    report : callable
        See :data:`sop.shared.progress.Report`; counts tensors.
    allow_other_model : bool
        Whether the source may have other weights than those that were quantized.

    Returns
    -------
    notes : tuple of str
        What was left out, and why; that the source has other weights, if so.

    Raises
    ------
    InputError
        If checkpoint and source do not fit each other, the source has other weights than those
        that were quantized, one of them is broken or of a kind that is not supported, or the folder
        cannot be made (:func:`sop.shared.output.new_folder`).
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    source = resolve_model(source)
    if not source.is_dir() and (source.suffix.lower() != ".gguf" or not source.is_file()):
        raise InputError(f"{source}: expected a .gguf file or a Hugging Face folder")
    with new_folder(folder, (source, checkpoint.path)) as made, open_model(source) as model:
        _check_tensors(checkpoint, model)
        problem = other_model(checkpoint, source, model.fingerprint)
        if problem and not allow_other_model:
            raise InputError(f"{problem}; --allow-other-model takes it")
        export = _export_folder if source.is_dir() else _export_gguf
        notes = export(checkpoint, model, made, dtype, report)
        return (problem, *notes) if problem else notes


def _check_tensors(checkpoint: Checkpoint, model: Model) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the source, but for scales."""
    stored, shapes = (
        {name: info.shape for name, info in infos.items() if name not in model.scale_tensors}
        for infos in (restored_tensors(checkpoint), model.tensors)
    )
    for name in sorted(stored.keys() | shapes.keys()):
        if stored.get(name) != shapes.get(name):
            has, needs = stored.get(name, "no such tensor"), shapes.get(name, "no such tensor")
            problem = f"{has} in this checkpoint, {needs} in {model.path}"
            raise InputError(f"{checkpoint.path}: tensor {name!r}: {problem}")


# ------------------------------------------------------------------------------ Hugging Face folder


def _export_folder(
    checkpoint: Checkpoint, model: Model, made: Path, dtype: str, report: Report
) -> tuple[str, ...]:
    source, quantized_before = model.path, bool(model.source_note)
    text = _folder_config(model, dtype)
    for file in sorted(source.iterdir()):
        if file.suffix in _COPIED and not file.name.endswith(_INDEX) and file.is_file():
            shutil.copyfile(file, made / file.name)
    (made / _CONFIG).write_text(text + "\n", encoding="utf-8")
    tensors = [_folder_tensor(checkpoint, name, dtype) for name in checkpoint.model_tensors]
    raw = [name for name in checkpoint.raw_names if name not in model.scale_tensors]
    tensors += [_folder_tensor(checkpoint, name, dtype) for name in raw]
    write_safetensors(made / _WEIGHTS, tensors, report)
    note = "weights of few bits with scales were written as plain numbers, without scales"
    return (note,) if quantized_before else ()


def _folder_config(model: Model, dtype: str) -> str:
    """Configuration of the model, with the type that its weights will have.

    Without what says that they are quantized: they are plain numbers now. A source that cannot be
    read so was refused when it was opened.
    """
    path = model.path / _CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        config = plain_config(model.config)
        # transformers 4 called it torch_dtype.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        return json.dumps(config, indent=2)
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply") from error


def _folder_tensor(checkpoint: Checkpoint, name: str, dtype: str) -> OutgoingTensor:
    if name in checkpoint.raw_names and checkpoint.raw_info(name).dtype not in (
        *FLOAT_TYPES,
        *FP8_TYPES,
    ):
        return raw_tensor(checkpoint, name)
    return decoded_tensor(checkpoint, name, dtype)


# --------------------------------------------------------------------------------------- GGUF file


def _export_gguf(
    checkpoint: Checkpoint, model: Model, made: Path, dtype: str, report: Report
) -> tuple[str, ...]:
    with closing(GgufFile(model.path)) as file:
        layout = gguf_layout(model.path, file)
        text = json.dumps(_config(layout, file, dtype), indent=2)
        (made / _CONFIG).write_text(text + "\n", encoding="utf-8")
        notes = _write_tokenizer(model.path, file, made)
    tensors = []
    for name, parameter in layout.parameters.items():
        read = partial(_parameter, checkpoint, layout, name)
        tensors.append(float_tensor(parameter, model.tensors[name].shape, dtype, read))
    write_safetensors(made / _WEIGHTS, tensors, report)
    return notes


def _parameter(checkpoint: Checkpoint, layout: GgufLayout, name: str) -> NDArray[np.float32]:
    return layout.to_parameter(name, checkpoint_weights(checkpoint, name))


def _config(layout: GgufLayout, file: GgufFile, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(layout.config.to_json_string())
    return config | {
        "architectures": [layout.model_class],
        "dtype": dtype,
        # transformers 4 reads it here only, and would take another one in silence.
        "rope_theta": layout.config.rope_parameters["rope_theta"],
        **{f"{part}_token_id": _special_id(file, part) for part in _SPECIAL_TOKENS},
    }


def _special_id(file: GgufFile, part: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{part}_token_id")
    return value if type(value) is int else None


def _write_tokenizer(source: Path, file: GgufFile, made: Path) -> tuple[str, ...]:
    """Write the files of the tokenizer; if its kind is not supported, a note that says so."""
    try:
        tokenizer = gguf_tokenizer(source, file)
    except InputError as error:
        return (f"no tokenizer was written: {error}",)
    ids = {part: _special_id(file, part) for part in _SPECIAL_TOKENS}
    tokens = {
        f"{part}_token": tokenizer.id_to_token(number)
        for part, number in ids.items()
        if number is not None and 0 <= number < tokenizer.get_vocab_size()
    }
    fast = require("transformers").PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        fast.chat_template = template
    fast.save_pretrained(made)
    return ()
