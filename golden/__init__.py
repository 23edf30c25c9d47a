"""Pure-NumPy model of the quantizer and decoder: the truth that hardware must equal.

What most programs start with is named here; each name is imported when it is first used, so that a
program pays only for what it takes. All else is in the modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from golden.activations import parse_activation_format, quantize_activations
    from golden.checkpoint import Checkpoint, CheckpointWriter, reconstruct
    from golden.errors import InputError
    from golden.formats import DEFAULT_HIF
    from golden.kernel import matmul
    from golden.layer import parse_recipe, quantize_layer

__all__ = [
    "DEFAULT_HIF",
    "Checkpoint",
    "CheckpointWriter",
    "InputError",
    "matmul",
    "parse_activation_format",
    "parse_recipe",
    "quantize_activations",
    "quantize_layer",
    "reconstruct",
]

_HOMES = {
    "DEFAULT_HIF": "formats",
    "Checkpoint": "checkpoint",
    "CheckpointWriter": "checkpoint",
    "InputError": "errors",
    "matmul": "kernel",
    "parse_activation_format": "activations",
    "parse_recipe": "layer",
    "quantize_activations": "activations",
    "quantize_layer": "layer",
    "reconstruct": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a name of :data:`__all__` from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
