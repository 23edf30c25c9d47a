"""Statistics of what the layers of a model see over a text, gathered into a calibration file."""

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.container import RawInfo
from golden.container_file import OutgoingTensor, array_bytes
from golden.errors import InputError
from golden.hashing import text_sha256
from sop.files.calibration import MOMENT, NORMS, Calibration, CalibrationHeader
from sop.files.calibration_description import CalibrationDescription, CalibrationRun
from sop.files.recorded_source import recorded_name
from sop.files.safetensors_file import write_safetensors
from sop.llm.model import TorchModel
from sop.llm.packages import require
from sop.llm.places import Site
from sop.llm.windows import Text, Windows, cut_windows
from sop.shared.marks import CALIBRATION_KEY, PARTIAL_KEY
from sop.shared.progress import Report, silent

__all__ = ["calibrate_model", "partial_path"]

_TYPE_NAMES = {"<f8": "F64", "<f4": "F32"}
_TOKENS = ".tokens"  # in partial files
_SQUARES = ".sum_of_squares"
_PRODUCTS = ".sum_of_products"
_SAVE_EVERY = 8  # windows between two saves of a partial file
_COMPUTING_PACKAGES = ("numpy", "torch", "transformers")
_PROBED_TOKENS = 64  # enough to see which layers read the same input

Float64 = NDArray[np.float64]


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    tensors = [
        OutgoingTensor(
            name, RawInfo(_TYPE_NAMES[array.dtype.str], array.shape), partial(_chunks, array)
        )
        for name, array in arrays.items()
    ]
    write_safetensors(path, tensors, metadata=metadata)


def _chunks(array: NDArray[Any]) -> list[memoryview]:
    return [array_bytes(array)]


class _Sums:
    """Sums over the tokens so far, in float64, per layer whose statistics are stored.

    Parameters
    ----------
    columns : Mapping of str to int
        Input channels of each of these layers.
    second_moment : bool
        Whether to sum products too.
    """

    def __init__(self, columns: Mapping[str, int], second_moment: bool) -> None:
        self.windows = 0
        self.arrays: dict[str, Float64] = {}
        self.second_moment = second_moment
        for name, count in columns.items():
            self.arrays[name + _TOKENS] = np.zeros(1)
            self.arrays[name + _SQUARES] = np.zeros(count)
            if second_moment:
                self.arrays[name + _PRODUCTS] = np.zeros((count, count))

    def add(self, name: str, x: Float64) -> None:
        """Add some inputs, shape (tokens, columns)."""
        squares = np.square(x).sum(axis=0)
        if not np.isfinite(squares).all():
            raise InputError(f"tensor {name!r}: its input is not finite in window {self.windows}")
        self.arrays[name + _TOKENS] += len(x)
        self.arrays[name + _SQUARES] += squares
        if self.second_moment:
            # NumPy computes a matrix times its transpose as a symmetric product (BLAS syrk).
            self.arrays[name + _PRODUCTS] += x.T @ x

    def tokens(self, name: str) -> int:
        """How many tokens a layer has seen."""
        return int(self.arrays[name + _TOKENS][0])

    def statistics(self, name: str) -> dict[str, NDArray[Any]]:
        """What the calibration file stores for one layer, which has seen at least one token."""
        tokens = self.tokens(name)
        stored: dict[str, NDArray[Any]] = {
            name + NORMS: np.sqrt(self.arrays[name + _SQUARES] / tokens)
        }
        if self.second_moment:
            moment = self.arrays[name + _PRODUCTS] / tokens
            # Exactly symmetric whatever BLAS does.
            stored[name + MOMENT] = ((moment + moment.T) / 2).astype(np.float32)
        return stored

    def save(self, path: Path, description: CalibrationDescription) -> None:
        """Write a partial file."""
        metadata = {PARTIAL_KEY: json.dumps(description.to_json()), "windows": str(self.windows)}
        _write(path, self.arrays, metadata)

    def resume(
        self, path: Path, run: CalibrationRun, layers: Mapping[str, str], total: int
    ) -> None:
        """Go on from a partial file of an equal run; refuse any other."""
        header = CalibrationHeader(path)
        found = header.description(PARTIAL_KEY)
        for entry in fields(CalibrationRun):
            then, now = getattr(found.run, entry.name), getattr(run, entry.name)
            if entry.compare and then != now:
                problem = f"was {then!r} when this run was interrupted, is {now!r} now"
                raise header.error(entry.name, f"{problem}; delete the file to start afresh")
        if found.layers != layers:
            raise header.error("layers", "not those of the model")
        header.check_tensors({key: ("F64", array.ndim) for key, array in self.arrays.items()})
        for key, array in self.arrays.items():
            if header.tensors[key].shape != array.shape:
                problem = f"field 'shape': {header.tensors[key].shape}, expected {array.shape}"
                raise InputError(f"{path}: tensor {key!r}: {problem}")
        windows = header.metadata.get("windows", "")
        if windows not in map(str, range(1, total)):
            raise header.error("windows", f"{windows!r:.80} is not in 1..{total - 1}")
        self.windows = int(windows)
        self.arrays = header.read_arrays()


# --------------------------------------------------------------------------------------- gathering


def _software() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _COMPUTING_PACKAGES]
    return ", ".join([*versions, f"{require('torch').get_num_threads()} threads"])


def _shared_inputs(
    model: TorchModel, ids: NDArray[np.int64]
) -> tuple[dict[str, str], dict[str, str]]:
    """Find the layers that get the same input, by running some tokens.

    Returns
    -------
    leaders : dict of str to str
        For every layer, the first one that gets the same input.
    misused : dict of str to str
        Layers whose input cannot be seen, and why.
    """
    same: dict[Site, Site] = {}
    misused: set[str] = set()
    last: tuple[Site, Any] | None = None

    def observe(site: Site, x: Any) -> None:
        nonlocal last
        if last is None or x is not last[1]:
            last = (site, x)
        same.setdefault(site, last[0])

    with model.watching(model.layers, observe, misused.add):
        model.run(ids)
    if not same:
        raise InputError(f"{model.path}: the inputs of its layers cannot be seen")
    unseen = {
        name: "they are used in a way that is not known"
        for name in model.layers
        if model.places[name].parameter in misused
    }
    leaders: dict[str, str] = {}
    first: dict[Site, str] = {}
    for name in model.layers:
        if name not in unseen:
            site = model.places[name].site
            leaders[name] = first.setdefault(same.get(site, site), name)
    return leaders, unseen


def partial_path(path: Path) -> Path:
    """Where an interrupted run that is to write a file leaves what it has."""
    return path.with_name(path.name + ".partial")


def calibrate_model(
    model: TorchModel,
    text: Text,
    path: Path,
    *,
    tokens: int,
    window: int | None = None,
    skip_tokens: int = 0,
    second_moment: bool = False,
    bos: str = "auto",
    on_window: Report = silent,
    save_every: int = _SAVE_EVERY,
) -> Calibration:
    """Run a model over a text and write statistics of the inputs of its linear layers.

    Every `save_every` windows the sums so far go to the file `path` with ``.partial`` appended. If
    that file exists at the start and is of an equal run, this one continues from it, with the same
    result as an unbroken run.

    Parameters
    ----------
    model : TorchModel
    text : Text
    path : Path
        The file to write, whole or not at all; an older file is replaced, and its folder must
        exist (:func:`sop.shared.output.writing_file` checks both).
    tokens, window, skip_tokens, bos
        See :func:`sop.llm.windows.cut_windows`.
    second_moment : bool
        Gather second moments too, which takes 8 bytes of memory per square of input channels.
    on_window : callable
        Gets the numbers of windows done and in all: at the start and after each window.
    save_every : int
        Windows between two saves.

    Returns
    -------
    Calibration
        The file just written, opened. Experts that no token was sent to are among its
        `uncovered`.

    Raises
    ------
    InputError
        If a setting is out of range, the text is too short, a window is longer than the model
        allows, an input is not finite, or a partial file is of another run.
    OSError
        If a file cannot be written.
    """
    if not model.layers:
        some = next(iter(model.unplaced_layers.items()), None)
        reason = f"{some[0]}: {some[1]}" if some else "no blocks with known names"
        raise InputError(f"{model.path}: no layer can be calibrated: {reason}")
    windows = cut_windows(
        model, text, tokens=tokens, window=window, skip_tokens=skip_tokens, bos=bos
    )
    run = _run(model, text, windows, skip_tokens, second_moment)
    layers, unseen = _shared_inputs(model, windows.parts[0][:_PROBED_TOKENS])
    leaders = [name for name, leader in layers.items() if name == leader]
    columns = {name: model.places[name].shape[1] for name in leaders}
    if second_moment:
        _check_memory(model, columns)
    sums = _Sums(columns, second_moment)
    unfinished, total = partial_path(path), len(windows.parts)
    if unfinished.exists():
        sums.resume(unfinished, run, layers, total)
    on_window(sums.windows, total)
    while sums.windows < total:
        _add_window(model, leaders, windows.parts[sums.windows], sums)
        if sums.windows % save_every == 0 and sums.windows < total:
            sums.save(unfinished, CalibrationDescription(run, layers))
        on_window(sums.windows, total)
    _write_statistics(path, run, layers, sums, dict(model.unplaced_layers) | unseen)
    unfinished.unlink(missing_ok=True)
    return Calibration(path)


def _memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_memory(model: TorchModel, columns: Mapping[str, int]) -> None:
    """Refuse second moments that cannot be held; of many experts they are larger than the model."""
    needed, present = sum(8 * count**2 for count in columns.values()), _memory_bytes()
    if needed > present:
        problem = f"{len(columns)} second moments take {needed / 1e9:.0f} GB of memory"
        raise InputError(
            f"--second-moment: {model.path}: {problem}, this machine has {present / 1e9:.0f} GB"
        )


def _run(
    model: TorchModel, text: Text, windows: Windows, skip_tokens: int, second_moment: bool
) -> CalibrationRun:
    return CalibrationRun(
        model=recorded_name(model.path.resolve()),
        model_sha256=model.sha256,
        config_sha256=model.config_sha256,
        text=text.name,
        text_sha256=text_sha256(text.content),
        skip_tokens=skip_tokens,
        tokens=windows.tokens,
        window=windows.window,
        prefix_tokens=windows.prefix,
        second_moment=second_moment,
        software=_software(),
    )


def _add_window(
    model: TorchModel, leaders: Sequence[str], ids: NDArray[np.int64], sums: _Sums
) -> None:
    by_site = {model.places[name].site: name for name in leaders}

    def observe(site: Site, x: Any) -> None:
        if site in by_site and x.numel():
            sums.add(by_site[site], x.double().numpy().reshape(-1, x.shape[-1]))

    def misuse(parameter: str) -> None:
        problem = f"{parameter!r} is used in different ways, which is not supported"
        raise InputError(f"{model.path}: {problem}")

    with model.watching(leaders, observe, misuse):
        model.run(ids)
    sums.windows += 1


def _write_statistics(
    path: Path,
    run: CalibrationRun,
    layers: Mapping[str, str],
    sums: _Sums,
    uncovered: dict[str, str],
) -> None:
    stored: dict[str, NDArray[Any]] = {}
    counts = {leader: sums.tokens(leader) for leader in dict.fromkeys(layers.values())}
    for leader, count in counts.items():
        if count:
            stored |= sums.statistics(leader)
    seen = {name: leader for name, leader in layers.items() if counts[leader]}
    uncovered |= dict.fromkeys(layers.keys() - seen.keys(), "no token was sent there")
    description = CalibrationDescription(
        run,
        seen,
        layer_tokens={leader: count for leader, count in counts.items() if count},
        # In the order of the model, which makes the file the same each time.
        uncovered={name: uncovered[name] for name in sorted(uncovered)},
    )
    _write(path, stored, {CALIBRATION_KEY: json.dumps(description.to_json())})
