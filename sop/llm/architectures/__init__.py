"""Architectures of GGUF files, a module each: nothing else has to know its name.

A module has a function ``layout(fields, file)`` and is called as the architecture is in
``general.architecture``, with ``_`` for ``-``. Hugging Face folders need none: transformers knows
what they are.
"""

import importlib
import pkgutil
from pathlib import Path

from sop.files.gguf_file import GgufFile
from sop.llm.gguf_layout import GgufFields, GgufLayout

__all__ = ["gguf_layout"]


def gguf_layout(path: Path, file: GgufFile) -> GgufLayout:
    """Read the configuration and tensor names of an open GGUF file.

    Raises
    ------
    InputError
        If its architecture is not known, it has metadata or tensors that are not, or transformers
        is not installed.
    """
    modules = {item.name.replace("_", "-"): item.name for item in pkgutil.iter_modules(__path__)}
    fields = GgufFields(path, file)
    name = fields.string("general.architecture", *sorted(modules))
    layout: GgufLayout = importlib.import_module(f"{__name__}.{modules[name]}").layout(fields, file)
    return layout
