"""The safetensors files of one model, with what their tensors stand for."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from sop.files.foreign import check_foreign
from sop.files.model_folder import read_config
from sop.files.mxfp4 import TYPE_NAME, Packed, find_packed, unpack
from sop.files.safetensors_reader import SafetensorsReader
from sop.files.scaled_weights import apply_scale, find_scales, has_own_scales, is_fp8
from sop.files.tensor_info import RawTensor, TensorInfo

__all__ = ["SafetensorsModel"]

_SHOWN = 300  # characters of a name in a message


class SafetensorsModel:
    """Open safetensors files, each of which holds some tensors of a model.

    Parameters
    ----------
    path : Path
        File or folder; names the model in errors.
    files : mapping of str to frozenset of str, or None
        Files beside or in `path`, and the tensors that each must hold, if that is known.

    Attributes
    ----------
    tensors : dict of str to TensorInfo
        Experts in MXFP4 as the tensors that they stand for.
    scales : dict of str to Scaling
        Of the FP8 weights.
    config : dict
        The content of ``config.json`` in the folder or beside the file; empty if there is none.

    Raises
    ------
    InputError
        If a file is broken or does not hold what it must, or another program has quantized the
        model.
    """

    def __init__(self, path: Path, files: Mapping[str, frozenset[str] | None]) -> None:
        self._opened: list[SafetensorsReader] = []
        self._homes: dict[str, SafetensorsReader] = {}
        try:
            self._open(path, files)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, files: Mapping[str, frozenset[str] | None]) -> None:
        folder = path if path.is_dir() else path.parent
        for file_name, expected in files.items():
            file = SafetensorsReader(folder / file_name)
            self._opened.append(file)
            if expected is not None and (differing := expected ^ file.tensors.keys()):
                name = min(differing)
                problem = "is not in it" if name in expected else "is not in the index"
                raise InputError(f"{file.path}: tensor {name[:_SHOWN]!r}: {problem}")
            self._homes |= dict.fromkeys(file.tensors, file)
        self.config = read_config(folder)
        stored = {name: file.tensors[name] for name, file in self._homes.items()}
        packed = find_packed(stored)
        self._packed: dict[str, Packed] = {info.name: parts for info, parts in packed.items()}
        hidden = {name for parts in packed.values() for name in (parts.blocks, parts.scales)}
        self.tensors = {name: info for name, info in stored.items() if name not in hidden}
        self.tensors |= {info.name: info for info in packed}
        readable = bool(packed) or any(map(is_fp8, stored.values()))
        config_path = folder / "config.json"
        check_foreign(self.tensors, self.config, path, config_path, readable=readable)
        self.scales = find_scales(self.tensors, self.config, path)

    def close(self) -> None:
        """Close the files; arrays that were read stay valid."""
        for file in self._opened:
            file.close()

    @property
    def quantized_types(self) -> tuple[str, bool]:
        """Types of the matrices that were quantized before, as words, and whether all were."""
        matrices = [
            info for name, info in self.tensors.items()
            if len(info.shape) > 1 and name not in {one.scale for one in self.scales.values()}
        ]  # fmt: skip
        before = [info for info in matrices if info.name in {*self.scales, *self._packed}]
        words = sorted({f"{info.source_type} ({_bits(info)}-bit, with scales)" for info in before})
        return " and ".join(words), len(before) == len(matrices)

    def read(self, name: str, index: int | None) -> NDArray[np.float32]:
        """Read a tensor, or the part of it at ``index`` of its first axis.

        Raises
        ------
        InputError
            As :meth:`sop.files.safetensors_reader.SafetensorsReader.read`.
        """
        if name in self.scales:
            return self._read_scaled(name, index)
        if name not in self._packed:
            return self._homes[name].read(name, index)
        if index is None:
            experts = range(self.tensors[name].shape[0])
            return np.stack([self._read_packed(name, number) for number in experts])
        return self._read_packed(name, index)

    def _read_scaled(self, name: str, index: int | None) -> NDArray[np.float32]:
        """Read FP8 weights, or one slice of a stacked tensor, and apply their scales."""
        scaling = self.scales[name]
        info, scale_info = self.tensors[name], self.tensors[scaling.scale]
        own = index is not None and has_own_scales(info.shape, scale_info.shape)
        file = self._homes[scaling.scale]
        read = file.read_stored if scale_info.source_type == "F8_E8M0" else file.read
        scale = read(scaling.scale, index if own else None)
        return apply_scale(self._homes[name].read_stored(name, index), scale, scaling.block)

    def _read_packed(self, name: str, index: int) -> NDArray[np.float32]:
        """Read one expert in MXFP4."""
        parts = self._packed[name]
        blocks, scales = (
            self._homes[part].read_stored(part, index) for part in (parts.blocks, parts.scales)
        )
        return unpack(blocks, scales)

    def raw(self, name: str) -> RawTensor:
        """Return a tensor as it is stored; one in MXFP4 as bfloat16, which holds its values."""
        if name not in self._packed:
            return self._homes[name].raw(name)
        return RawTensor("BF16", self.tensors[name].shape, self._unpacked(name))

    def _unpacked(self, name: str) -> Iterator[bytes]:
        for number in range(self.tensors[name].shape[0]):
            yield self._read_packed(name, number).astype(ml_dtypes.bfloat16).tobytes()


def _bits(info: TensorInfo) -> int:
    return 4 if info.source_type == TYPE_NAME else 8
