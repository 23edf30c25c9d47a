"""Loading a language model with its tokenizer, from a GGUF file or a Hugging Face folder."""

import hashlib
from pathlib import Path
from typing import Any

from golden.errors import InputError
from golden.hashing import file_sha256
from sop.files.choice import choose_tensors
from sop.files.models import Model, open_model, resolve_model
from sop.llm.gguf import open_gguf
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import one_line, require
from sop.llm.places import UNUSED, Place, PlaceFinder

__all__ = ["open_torch_model"]

# The files of a Hugging Face folder, besides its weights, that decide what the model computes.
_CONFIG_SUFFIXES = (".json", ".model", ".txt")


def open_torch_model(path: str | Path) -> TorchModel:
    """Load a model with its tokenizer.

    Parameters
    ----------
    path : str or Path
        A ``.gguf`` file of an architecture in :mod:`sop.llm.architectures`, a folder in the layout
        of Hugging Face, or
        a name (:func:`sop.files.models.resolve_model`).

    Raises
    ------
    InputError
        If it is neither, the model is of a kind that is not supported, it is broken, or the extra
        ``llm`` is not installed.
    OSError
        If a file cannot be read.
    """
    for package in ("torch", "transformers"):
        require(package)
    path = resolve_model(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path}: expected a .gguf file or a Hugging Face folder")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return open_gguf(path)


def _open_folder(path: Path) -> TorchModel:
    with open_model(path) as file:
        module, unused = _load_module(path, file)
        tokenizer = _load_tokenizer(path)
        layers = _default_layers(file)
        places, unplaced = _find_places(module, file, unused)
        return TorchModel(
            path,
            file.fingerprint(),
            module,
            places,
            tokenizer,
            layers=layers,
            unplaced=unplaced,
            config_sha256=_config_sha256(path),
        )


def _load_module(path: Path, file: Model) -> tuple[Any, frozenset[str]]:
    """The model, and the tensors of the file that it does not use."""
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    options = {
        "dtype": "float32",
        "output_loading_info": True,
        # One product per expert that is sent tokens, so that the inputs of each can be seen.
        "experts_implementation": "eager",
    }
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
        quantized = [part for part in parts if hasattr(part, "quantization_config")]
        if not quantized and not file.scales:
            module, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, **options, **local
            )
        else:
            # What the reader here makes of the weights; transformers would need other packages.
            for part in quantized:
                del part.quantization_config
            kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            weights = {
                name: require("torch").from_numpy(file.read(name))
                for name in file.tensors
                if name not in file.scale_tensors
            }
            module, info = kind.from_pretrained(None, config=config, state_dict=weights, **options)
    except InputError:
        raise
    except Exception as error:  # whatever transformers makes of a folder it cannot use
        raise InputError(f"{path}: transformers cannot load it: {one_line(error)}") from error
    # transformers only warns about these, and puts random numbers where weights are missing.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise InputError(f"{path}: {problem.replace('_', ' ')}: {sorted(info[problem])[0]!r}")
    return module.eval(), frozenset(info["unexpected_keys"])


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        prefix = _prefix(tokenizer)
    except Exception as error:  # as above
        problem = f"transformers cannot load its tokenizer: {one_line(error)}"
        raise InputError(f"{path}: {problem}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return Tokenizer(encode, prefix, tokenizer.bos_token_id)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _config_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in _CONFIG_SUFFIXES and file.is_file():
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _find_places(
    module: Any, file: Model, unused: frozenset[str]
) -> tuple[dict[str, Place], dict[str, str]]:
    finder = PlaceFinder(dict(module.named_parameters()))
    places: dict[str, Place] = {}
    unplaced: dict[str, str] = {}
    for name, matrix in file.matrices.items():
        weights = file.read_matrix(matrix)
        place, problem = finder.find(matrix.tensor, matrix.index, weights)
        if place is None:
            unplaced[name] = UNUSED if matrix.tensor in unused else problem
        else:
            places[name] = place
    return places, unplaced


def _default_layers(file: Model) -> list[str]:
    """Matrices that ``sop quantize`` takes unless it is told otherwise; there may be none."""
    try:
        return [matrix.name for matrix in choose_tensors(file).matrices]
    except InputError:
        return []
