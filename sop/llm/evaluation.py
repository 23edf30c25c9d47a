"""How far a language model with replaced weights is from the reference, over one text.

For every position of every window that has a next token, with the reference's distribution p over
the next token and the candidate's q, both from float32 logits in float64:

* KL divergence ``sum(p * (log p - log q))`` in nats;
* negative log likelihood of the next token, whose mean's exponential is the perplexity;
* whether both have the same most probable token.

The standard error of the mean KL is over blocks of 256 consecutive positions of a window.
Neighbours share their context, so their KL are not independent: counting them as if they were
halves the error. With SmolLM2 it grows up to blocks of 128 and is level from there to whole windows
of 1024. All candidates see the same tokens, so a difference between two of them is less uncertain
than the two alone (:meth:`Evaluation.kl_difference`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.hashing import text_sha256
from golden.metrics import cosine_gap_ppm, relative_mse
from sop.files.calibration_description import CalibrationSummary
from sop.llm.candidates import Candidate
from sop.llm.model import TorchModel
from sop.llm.packages import require
from sop.llm.windows import Text, cut_windows
from sop.shared.progress import StepReport, silent

__all__ = [
    "Evaluation",
    "LayerError",
    "evaluate",
    "overlapping_tokens",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

DEFAULT_TOKENS = 8192
DEFAULT_SKIP_TOKENS = 60000  # beyond what calibration takes by default

_BLOCK_POSITIONS = 256
_LOGITS_AT_ONCE = 1 << 23  # bounds what comparing two distributions needs: about 300 MB
# The output layer on its own against the whole model.
_LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LayerError:
    """Error of one replaced tensor against the reference's.

    Attributes
    ----------
    name : str
    weights : int
        How many it has.
    cosine_gap_ppm : float
        :func:`golden.metrics.cosine_gap_ppm`, by channel norms where they were given.
    relative_mse : float
        :func:`golden.metrics.relative_mse`.
    """

    name: str
    weights: int
    cosine_gap_ppm: float
    relative_mse: float


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured for one candidate.

    Attributes
    ----------
    name : str
        Of the candidate.
    bits_per_weight : float or None
        As the candidate said.
    kl : float
        Mean KL(reference || candidate) in nats per token.
    kl_standard_error : float or None
        Of this mean, over blocks of 256 positions; None where there is one block only.
    perplexity, reference_perplexity : float
        exp of the mean negative log likelihood.
    top1_agreement : float
        Share of positions with the same most probable token, 0 to 1.
    layers : tuple of LayerError
        Of the replaced tensors, in the order of the model.
    block_positions : tuple of int
        Positions in each block.
    block_kl : tuple of float
        Mean KL of each block.
    activations : str or None
        As the candidate said.
    """

    name: str
    bits_per_weight: float | None
    kl: float
    kl_standard_error: float | None
    perplexity: float
    reference_perplexity: float
    top1_agreement: float
    layers: tuple[LayerError, ...]
    block_positions: tuple[int, ...] = field(repr=False)
    block_kl: tuple[float, ...] = field(repr=False)
    activations: str | None = None

    @property
    def positions(self) -> int:
        """Tokens that were predicted."""
        return sum(self.block_positions)

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over the reference's."""
        return self.perplexity / self.reference_perplexity

    @property
    def cosine_gap_ppm(self) -> float:
        """Mean of the layers, weighted by their numbers of weights."""
        return self._mean([layer.cosine_gap_ppm for layer in self.layers])

    @property
    def relative_mse(self) -> float:
        """Mean of the layers, weighted by their numbers of weights."""
        return self._mean([layer.relative_mse for layer in self.layers])

    def _mean(self, values: list[float]) -> float:
        return float(np.average(values, weights=[layer.weights for layer in self.layers]))

    def kl_difference(self, other: "Evaluation") -> tuple[float, float | None]:
        """Mean KL minus that of another candidate on the same tokens.

        Returns
        -------
        difference : float
            In nats per token; negative if this one is closer to the reference.
        standard_error : float or None
            Of the difference, over the differences block by block.

        Raises
        ------
        ValueError
            If the two were not evaluated on blocks of equal sizes.
        """
        if self.block_positions != other.block_positions:
            raise ValueError(f"{self.name} and {other.name} were evaluated on other tokens")
        differences = np.subtract(self.block_kl, other.block_kl)
        return _mean_and_error(differences, np.array(self.block_positions))


def _mean_and_error(values: Float64, counts: NDArray[np.int64]) -> tuple[float, float | None]:
    """Mean over positions of blocks' means, and its standard error over blocks."""
    shares = counts / counts.sum()
    mean = float((shares * values).sum())
    if values.size < 2:
        return mean, None
    # Blocks of equal size make this the usual estimate, std(ddof=1) / sqrt(blocks).
    variance = values.size / (values.size - 1) * ((shares * (values - mean)) ** 2).sum()
    return mean, math.sqrt(variance)


def overlapping_tokens(calibration: CalibrationSummary, text: Text, first: int, count: int) -> int:
    """How many of the tokens from `first` on, `count` in number, a calibration has seen.

    Parameters
    ----------
    calibration : CalibrationSummary
        One that does not say what it has seen has seen none, as far as can be said.
    text : Text
        0 if the calibration was run on another. Positions are those of one tokenizer.
    first, count : int
    """
    start, length = calibration.skip_tokens, calibration.tokens
    if start is None or length is None:
        return 0
    if calibration.text_sha256 != text_sha256(text.content):
        return 0
    return max(0, min(first + count, start + length) - max(first, start))


# --------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class _Positions:
    """Measures of the positions of one window; float64 or bool arrays, shape (positions,)."""

    kl: Float64
    loss: Float64
    reference_loss: Float64
    agrees: NDArray[np.bool_]


def evaluate(
    model: TorchModel,
    candidates: Sequence[Candidate],
    text: Text,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int | None = None,
    skip_tokens: int = DEFAULT_SKIP_TOKENS,
    bos: str = "auto",
    channel_norms: Callable[[str], Float64 | None] | None = None,
    on_step: StepReport = silent,
) -> list[Evaluation]:
    """Run a model as it is, then with the weights of each candidate, over the same tokens.

    Afterwards the model has its own weights again, also if this fails.

    Parameters
    ----------
    model : TorchModel
        Its present weights are the reference.
    candidates : sequence of Candidate
        Evaluated one after the other; the weights of one are in memory at a time.
    text : Text
    tokens, window, skip_tokens, bos
        See :func:`sop.llm.windows.cut_windows`. Where windows start with a begin-of-text token,
        the first token of the text is predicted from it.
    channel_norms : callable, optional
        Maps the name of a tensor to the root mean square of its input channels, shape (inputs,),
        for the cosine gap, or to None if they are not known.
    on_step : callable
        Gets what is about to be done, and how many windows are done and in all, the reference's
        included.

    Returns
    -------
    evaluations : list of Evaluation
        One per candidate, in their order.

    Raises
    ------
    InputError
        If a setting or a candidate does not fit the model, or logits are not finite.
    """
    windows = cut_windows(
        model, text, tokens=tokens, window=window, skip_tokens=skip_tokens, bos=bos, least_tokens=2
    )
    names = [candidate.names(model) for candidate in candidates]
    norms = _read_norms(model, sorted(set().union(*names)), channel_norms)
    _check_output_layer(model)
    first = windows.context
    total = len(windows.parts) * (1 + len(candidates))
    done = 0
    # Kept of the reference is what its output layer reads, not its log-probabilities: exactly as
    # good, and a hundredth of the size (2.4 MB instead of 200 MB per 1024 tokens of SmolLM2).
    # Running that layer again for each candidate costs a fraction of its own run.
    reference = []
    for ids in windows.parts:
        on_step("reference", done, total)
        reference.append(model.run(ids)[first:])
        done += 1
    evaluations = []
    for candidate, replaced in zip(candidates, names, strict=True):
        on_step(f"{candidate.name}: weights", done, total)
        measured = []
        head = model.head_copy(replaced)
        with (
            _replaced(model, candidate, replaced, norms) as layers,
            candidate.computing(model),
        ):
            for ids, states in zip(windows.parts, reference, strict=True):
                on_step(candidate.name, done, total)
                changed = model.run(ids)[first:]
                measured.append(_measure(model, states, head, changed, ids[first + 1 :]))
                done += 1
        evaluations.append(_evaluation(candidate, layers, measured))
    on_step("done", done, total)
    return evaluations


def _read_norms(
    model: TorchModel, names: list[str], channel_norms: Callable[[str], Float64 | None] | None
) -> dict[str, Float64]:
    """Channel norms of some tensors; empty if there are none at all."""
    if channel_norms is None:
        return {}
    known = {name: channel_norms(name) for name in names}
    norms = {name: values for name, values in known.items() if values is not None}
    for name, values in norms.items():
        channels = model.places[name].shape[1]
        if values.shape != (channels,):
            problem = f"{values.size} channel norms, {model.path} has {channels} channels"
            raise InputError(f"tensor {name!r}: {problem}")
    return norms


def _check_output_layer(model: TorchModel) -> None:
    """Refuse a model whose logits are not what :meth:`TorchModel.logits` makes of its states."""
    torch = require("torch")
    ids = np.zeros(1, dtype=np.int64)
    with torch.inference_mode():
        whole = model.module(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
    if not torch.allclose(
        model.logits(model.run(ids)), whole, rtol=_LOGITS_TOLERANCE, atol=_LOGITS_TOLERANCE
    ):
        problem = "logits depend on more than the input of the output layer: not supported"
        raise InputError(f"{model.path}: {problem}")


@contextmanager
def _replaced(
    model: TorchModel,
    candidate: Candidate,
    names: tuple[str, ...],
    norms: Mapping[str, Float64],
) -> Iterator[tuple[LayerError, ...]]:
    """Within this context the model has the candidate's weights; gives their errors."""
    own: dict[str, Float32] = {}
    layers = []
    try:
        for name in names:
            before = model.weight(name)
            after = candidate.read(name, before.shape)
            gap = cosine_gap_ppm(before, after, norms.get(name))
            layers.append(LayerError(name, before.size, gap, relative_mse(before, after)))
            own[name] = before
            model.set_weight(name, np.ascontiguousarray(after))
        yield tuple(layers)
    finally:
        for name, weights in own.items():
            model.set_weight(name, weights)


def _measure(
    model: TorchModel, reference: Any, head: Any, candidate: Any, targets: NDArray[np.int64]
) -> _Positions:
    """Compare the distributions over the next token, for all positions of a window but the last.

    `head` is the reference's output layer if the candidate has another one.

    ``log p = a - log(sum(exp(a)))`` of logits a, so KL is the mean under p of the difference of
    the logits, less the difference of the logarithms.
    """
    torch = require("torch")
    parts: list[list[Any]] = []
    vocabulary = model.module.get_output_embeddings().weight.shape[0]
    step = max(1, _LOGITS_AT_ONCE // vocabulary)
    for start in range(0, targets.size, step):
        rows = slice(start, min(start + step, targets.size))
        target = torch.from_numpy(targets[rows])[:, None]
        first, second = model.logits(reference[rows], head), model.logits(candidate[rows])
        agrees = first.argmax(dim=1) == second.argmax(dim=1)
        first, first_sum, p = _shifted(first)
        second, second_sum, _ = _shifted(second)
        loss = second_sum - second.gather(1, target)[:, 0]
        reference_loss = first_sum - first.gather(1, target)[:, 0]
        mean_difference = first.sub_(second).mul_(p).sum(dim=1) / first_sum.exp()
        parts.append([mean_difference - (first_sum - second_sum), loss, reference_loss, agrees])
    return _Positions(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def _shifted(logits: Any) -> tuple[Any, Any, Any]:
    """Logits less the largest of their row in float64, log of their sum of exp, and exp."""
    shifted = logits.double()
    shifted -= shifted.amax(dim=1, keepdim=True)
    powers = shifted.exp()
    return shifted, powers.sum(dim=1).log(), powers


def _evaluation(
    candidate: Candidate, layers: tuple[LayerError, ...], windows: list[_Positions]
) -> Evaluation:
    counts, means = [], []
    for measured in windows:
        for start in range(0, measured.kl.size, _BLOCK_POSITIONS):
            block = measured.kl[start : start + _BLOCK_POSITIONS]
            counts.append(block.size)
            means.append(float(block.mean()))
    kl, error = _mean_and_error(np.array(means), np.array(counts))
    losses = [
        float(np.concatenate([getattr(measured, key) for measured in windows]).mean())
        for key in ("loss", "reference_loss")
    ]
    if not all(map(math.isfinite, (kl, *losses))):
        raise InputError(f"{candidate.name}: logits of the model are not finite")
    return Evaluation(
        name=candidate.name,
        bits_per_weight=candidate.bits_per_weight,
        kl=kl,
        kl_standard_error=error,
        perplexity=math.exp(losses[0]),
        reference_perplexity=math.exp(losses[1]),
        top1_agreement=float(np.concatenate([measured.agrees for measured in windows]).mean()),
        layers=layers,
        block_positions=tuple(counts),
        block_kl=tuple(means),
        activations=candidate.activations,
    )
