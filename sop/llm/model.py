"""A language model that runs in PyTorch on the CPU, with the matrix names of its file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from sop.llm.packages import require
from sop.llm.places import Place, Site
from sop.llm.products import watching

__all__ = ["Tokenizer", "TorchModel"]

# Names under which configurations keep the longest window.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


@dataclass(frozen=True)
class Tokenizer:
    """What turns text into token ids.

    Attributes
    ----------
    encode : callable
        Token ids of a text, without any at its ends.
    prefix : tuple of int
        What the tokenizer itself puts before every text, such as a begin-of-text token.
    bos : int or None
        The begin-of-text token, if there is one.
    """

    encode: Callable[[str], list[int]]
    prefix: tuple[int, ...] = ()
    bos: int | None = None


class _HeadReached(Exception):
    """Carries the input of the output layer out of a model that need not run it."""

    def __init__(self, states: Any) -> None:
        self.states = states


class TorchModel:
    """A causal language model in float32 on the CPU; made by `open_torch_model`.

    Attributes
    ----------
    path : Path
        The GGUF file or Hugging Face folder.
    sha256 : str
        :meth:`sop.files.models.Model.fingerprint` of its weights, hexadecimal.
    config_sha256 : str
        Hash of the other files that decide what it computes; empty for a GGUF file.
    module : transformers.PreTrainedModel
        In evaluation mode.
    places : Mapping of str to Place
        Where each matrix of the file is in the module, by name of the matrix, in file order.
    layers : tuple of str
        The keys of `places` that ``sop quantize`` takes unless it is told otherwise.
    unplaced : Mapping of str to str
        Why matrices of the file have no place in the module.
    unplaced_layers : Mapping of str to str
        Those of them that ``sop quantize`` takes unless it is told otherwise.
    """

    def __init__(
        self,
        path: Path,
        sha256: str,
        module: Any,
        places: Mapping[str, Place],
        tokenizer: Tokenizer,
        *,
        layers: Sequence[str] | None = None,
        unplaced: Mapping[str, str] = MappingProxyType({}),
        config_sha256: str = "",
    ) -> None:
        self.path = path
        self.sha256 = sha256
        self.config_sha256 = config_sha256
        self.module = module
        self.places = MappingProxyType(dict(places))
        chosen = tuple(places if layers is None else layers)
        self.layers = tuple(name for name in chosen if name in places)
        self.unplaced = MappingProxyType(dict(unplaced))
        self.unplaced_layers = MappingProxyType(
            {name: unplaced[name] for name in chosen if name in unplaced}
        )
        self.tokenizer = tokenizer
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        if module.get_output_embeddings() is None:
            raise InputError(f"{path}: {type(module).__name__} has no output layer over tokens")

    @property
    def context_length(self) -> int | None:
        """Longest window the model was made for, in tokens; None if it has no such limit."""
        config = self.module.config.get_text_config()
        values = (getattr(config, name, None) for name in _CONTEXT_FIELDS)
        return next((value for value in values if type(value) is int and value > 0), None)

    def prefix(self, bos: str) -> tuple[int, ...]:
        """Tokens that every window starts with.

        Parameters
        ----------
        bos : str
            ``auto`` for those that the tokenizer puts before a text, ``yes`` for at least a
            begin-of-text token, ``no`` for none.

        Raises
        ------
        InputError
            If there is to be such a token and the tokenizer has none.
        """
        if bos not in ("auto", "yes", "no"):
            raise InputError(f"--bos must be auto, yes or no, not {bos!r}")
        if bos == "no":
            return ()
        if bos == "yes" and not self.tokenizer.prefix:
            if self.tokenizer.bos is None:
                problem = "its tokenizer has no begin-of-text token"
                raise InputError(f"--bos yes: {self.path}: {problem}")
            return (self.tokenizer.bos,)
        return self.tokenizer.prefix

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text, without any tokens added at its ends.

        Raises
        ------
        InputError
            If the tokenizer gives an id that the model has no embedding for.
        """
        ids = np.array(self.tokenizer.encode(text), dtype=np.int64)
        rows = self.module.get_input_embeddings().weight.shape[0]
        if ids.size and int(ids.max()) >= rows:
            problem = f"tokenizer gives token {ids.max()}, the model has {rows} embeddings"
            raise InputError(f"{self.path}: {problem}")
        return ids

    def weight(self, name: str) -> NDArray[np.float32]:
        """Weights of a matrix as they are now, a copy.

        Parameters
        ----------
        name : str
            A key of `places`.

        Returns
        -------
        weights : float32 array, shape (outputs, inputs)
            With the rows in the order of the file, as :meth:`set_weight` takes them.
        """
        return self.places[name].read(self._parameters)

    def set_weight(self, name: str, weights: NDArray[np.float32]) -> None:
        """Replace the weights of a matrix.

        Parameters
        ----------
        name : str
            A key of `places`.
        weights : float32 array, shape (outputs, inputs)
            With the rows in the order of the file.
        """
        self.places[name].write(self._parameters, weights)

    def run(self, ids: NDArray[np.int64]) -> Any:
        """Run all but the output layer over one window of tokens, at positions from 0 on.

        Returns
        -------
        states : torch.Tensor
            What the output layer would read: float32, shape (tokens, channels).
        """
        torch = require("torch")

        def stop(module: Any, args: tuple[Any, ...]) -> None:
            raise _HeadReached(args[0])

        handle = self.module.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            with torch.inference_mode():
                self.module(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        except _HeadReached as reached:
            return reached.states[0]
        finally:
            handle.remove()
        raise InputError(f"{self.path}: the model does not use its output layer")

    def logits(self, states: Any, head: Any = None) -> Any:
        """Run the output layer, and whatever the model does to the logits behind it.

        Parameters
        ----------
        states : torch.Tensor
            What :meth:`run` returned, or some of its rows.
        head : torch.Tensor, optional
            Weights of the output layer in place of its own.

        Returns
        -------
        logits : torch.Tensor
            float32, shape (tokens, vocabulary).
        """
        torch = require("torch")
        output = self.module.get_output_embeddings()
        with torch.inference_mode():
            bias = getattr(output, "bias", None)
            weight = output.weight if head is None else head
            logits = torch.nn.functional.linear(states, weight, bias)
            return logits if self._output_is_last else self._behind_output(logits)

    def head_copy(self, names: Sequence[str]) -> Any:
        """Weights of the output layer if some of these matrices are in it, else None."""
        weight = self.module.get_output_embeddings().weight
        inside = any(self._parameters[self.places[name].parameter] is weight for name in names)
        return weight.detach().clone() if inside else None

    @cached_property
    def _output_is_last(self) -> bool:
        """Whether the logits are what the output layer gives, neither scaled nor capped."""
        torch = require("torch")
        states = self.run(np.zeros(1, dtype=np.int64))
        with torch.inference_mode():
            logits = self.module.get_output_embeddings()(states)
            # The values themselves may be too small to be changed by a cap.
            return all(
                torch.equal(self._behind_output(scale * logits), scale * logits)
                for scale in (1.0, 1e4)
            )

    def _behind_output(self, logits: Any) -> Any:
        """What the model makes of the result of its output layer, by its own code."""
        torch = require("torch")

        def replace(module: Any, args: tuple[Any, ...], result: Any) -> Any:
            return logits[None]

        handle = self.module.get_output_embeddings().register_forward_hook(replace)
        try:
            ids = torch.zeros((1, 1), dtype=torch.int64)
            return self.module(input_ids=ids, use_cache=False).logits[0]
        finally:
            handle.remove()

    @contextmanager
    def watching(
        self,
        names: Sequence[str],
        observe: Callable[[Site, Any], None],
        misuse: Callable[[str], None],
    ) -> Iterator[None]:
        """Within this context, call `observe` with the input of each matrix before it is used.

        Parameters
        ----------
        names : sequence of str
            Keys of `places`.
        observe, misuse : callable
            As :func:`sop.llm.products.watching` says; sites are those of :attr:`Place.site`.
        """
        parameters = {
            place.parameter: (self._parameters[place.parameter], 0 if place.transposed else 1)
            for place in (self.places[name] for name in names)
        }
        with watching(parameters, observe, misuse):
            yield
