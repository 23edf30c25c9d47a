"""What a GGUF file is to transformers: checked metadata, and the place of every tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from sop.files.gguf_file import GgufFile
from sop.llm.places import to_half_split

__all__ = ["GgufFields", "GgufLayout"]


class GgufFields:
    """Metadata of a GGUF file, each value checked on reading."""

    def __init__(self, path: Path, file: GgufFile) -> None:
        self._path = path
        self._values = file.metadata

    def error(self, key: str, problem: str) -> InputError:
        """Return the error for the metadata entry `key`."""
        return InputError(f"{self._path}: field '{key}': {problem}")

    def tensor_error(self, name: str, problem: str) -> InputError:
        """Return the error for a tensor."""
        return InputError(f"{self._path}: tensor {name!r}: {problem}")

    def has(self, key: str) -> bool:
        """Whether the file has a single value of this name."""
        return key in self._values

    def string(self, key: str, *expected: str) -> str:
        """One of the expected values; refuses any other."""
        value = self._values.get(key)
        if not isinstance(value, str) or value not in expected:
            names = " or ".join(map(repr, expected))
            raise self.error(key, f"{value!r} is not supported, expected {names}")
        return value

    def count(self, key: str) -> int:
        """Positive integer."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, f"expected a positive integer, got {value!r}")
        return value

    def positive(self, key: str) -> float:
        """Positive, finite number."""
        value = self._values.get(key)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.error(key, f"expected a positive number, got {value!r}")
        return value


@dataclass(frozen=True)
class GgufLayout:
    """How a GGUF file maps to a model of transformers.

    Attributes
    ----------
    model_class : str
        Class of transformers, such as ``"LlamaForCausalLM"``.
    config : transformers.PretrainedConfig
    parameters : Mapping of str to str
        Name in transformers of every tensor of the file, in file order.
    rotary_heads : Mapping of str to int
        Heads of each tensor whose rows are in another order in transformers.
    """

    model_class: str
    config: Any
    parameters: Mapping[str, str]
    rotary_heads: Mapping[str, int] = field(default_factory=dict)

    def to_parameter(self, name: str, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights of a tensor of the file, with the rows in the order of transformers."""
        if name in self.rotary_heads:
            return to_half_split(weights, self.rotary_heads[name])
        return weights
