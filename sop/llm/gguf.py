"""Loading a language model from a GGUF file."""

from collections.abc import Mapping
from pathlib import Path

from golden.errors import InputError
from sop.files.choice import linear_matrices
from sop.files.gguf_file import GgufFile
from sop.files.models import open_model
from sop.llm.architectures import gguf_layout
from sop.llm.gguf_layout import GgufLayout
from sop.llm.gguf_tokenizer import gguf_tokenizer
from sop.llm.model import Tokenizer, TorchModel
from sop.llm.packages import require
from sop.llm.places import Place

__all__ = ["open_gguf"]


def open_gguf(path: Path) -> TorchModel:
    """Load a model; see :func:`sop.llm.opening.open_torch_model`."""
    with open_model(path) as opened:
        sha256, layers = opened.fingerprint(), [one.name for one in linear_matrices(opened)]
    file = GgufFile(path)
    try:
        layout = gguf_layout(path, file)
        module = getattr(require("transformers"), layout.model_class)(layout.config).eval()
        model = TorchModel(
            path, sha256, module, _places(layout, file), _tokenizer(path, file), layers=layers
        )
        _load_weights(model, file, layout.parameters)
    finally:
        file.close()
    return model


def _places(layout: GgufLayout, file: GgufFile) -> dict[str, Place]:
    places = {}
    for name, parameter in layout.parameters.items():
        shape = file.tensors[name].shape
        if len(shape) == 2:
            heads = layout.rotary_heads.get(name, 0)
            places[name] = Place(parameter, None, False, 0, 1, (shape[0], shape[1]), heads)
    return places


def _tokenizer(path: Path, file: GgufFile) -> Tokenizer:
    tokenizer = gguf_tokenizer(path, file)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if type(bos) is not int or not 0 <= bos < tokenizer.get_vocab_size():
        return Tokenizer(encode)
    # llama.cpp adds none for a tokenizer of this kind unless the file says so.
    adds = file.metadata.get("tokenizer.ggml.add_bos_token") is True
    return Tokenizer(encode, (bos,) if adds else (), bos)


def _load_weights(model: TorchModel, file: GgufFile, parameters: Mapping[str, str]) -> None:
    torch = require("torch")
    targets = dict(model.module.named_parameters())
    for name, parameter in parameters.items():
        target = targets[parameter]
        if tuple(target.shape) != file.tensors[name].shape:
            where = f"{model.path}: tensor {name!r}: field 'dims'"
            problem = f"shape {file.tensors[name].shape}, expected {tuple(target.shape)}"
            raise InputError(f"{where}: {problem}")
        weights = file.read_tensor(name)
        if name in model.places:
            model.set_weight(name, weights)
        else:
            with torch.no_grad():
                target.copy_(torch.from_numpy(weights))
