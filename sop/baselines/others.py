"""The formats a user would otherwise pick, for comparison: what each makes of a weight matrix.

Four sources, none of them a port of foreign code except NF4, which is a few lines:

* formats of this project's notation, through :mod:`golden`;
* OCP MX formats by the conversion that their standard gives;
* NF4 as in bitsandbytes, bit for bit (a test compares the two where bitsandbytes is installed);
* block formats of llama.cpp and ik_llama.cpp through their own compiled code, loaded with
  :mod:`ctypes` from the PyPI packages ``libggml-python`` and ``ik-llama-cpp-python``. These
  packages are optional; a baseline without its package says so in :attr:`Baseline.why_not`.
  Where a row is no multiple of their block of 256, consecutive rows are joined.
"""

import ctypes
import importlib.util
import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from golden.blocks import check_weights, usable_channel_norms
from golden.codebooks import fixed_levels
from golden.convert import format_table
from golden.errors import InputError
from golden.notation import parse_format
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import decode

__all__ = ["BASELINES", "Baseline", "ggml_encoder"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_CHUNK_WEIGHTS = 1 << 18  # bounds what NF4 and MX need besides their result


@dataclass(frozen=True)
class Baseline:
    """A weight format with the quantizer that its users have.

    Attributes
    ----------
    name : str
        Name that users of the format know.
    source : str
        Whose rule or code quantizes.
    bits_per_weight : Fraction
        Stored bits of codes and block scales per weight; what is stored once per tensor is left
        out.
    needs : str
        PyPI package that must be installed; empty if none.
    uses_channel_norms : bool
        Whether the quantizer can weight errors by channel.
    """

    name: str
    source: str
    bits_per_weight: Fraction
    needs: str
    uses_channel_norms: bool
    _reconstruct: Callable[[Float32, Float64 | None], Float32]
    _check: Callable[[], object]  # raises InputError if a package is missing or unusable

    @property
    def why_not(self) -> str:
        """Why the baseline cannot be used here, in one line; empty if it can."""
        try:
            self._check()
        except InputError as error:
            return f"{self.name}: {error}"
        return ""

    @property
    def available(self) -> bool:
        """Whether the baseline can be used here."""
        return not self.why_not

    def reconstruct(
        self, weights: Float32, channel_norms: NDArray[np.floating] | None = None
    ) -> Float32:
        """Quantize a weight matrix and decode it again.

        Parameters
        ----------
        weights : float32 array, shape (rows, columns)
            Finite. Not modified.
        channel_norms : float array, shape (columns,), optional
            Root mean square of each input channel (:func:`golden.blocks.usable_channel_norms`).
            Formats that can weight errors use it (llama.cpp's "importance matrix" is its square),
            the others ignore it. For llama.cpp all one is not the same as none: without an
            importance matrix its quantizers count errors of large weights more.

        Returns
        -------
        reconstruction : float32 array, shape (rows, columns)

        Raises
        ------
        InputError
            If the baseline is not available, or the weights or norms are not as above or cannot be
            held by the format.
        """
        check_weights(weights)
        norms = None
        if channel_norms is not None:
            norms, _ = usable_channel_norms(channel_norms, weights.shape[1])
        try:
            return self._reconstruct(np.ascontiguousarray(weights), norms)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None


def _by_block(
    weights: Float32, block_size: int, reconstruct: Callable[[Float32], Float32]
) -> Float32:
    """Reconstruct blocks of weights in memory order, some at a time; the last is zero-padded.

    ``reconstruct`` maps (blocks, block_size) to the same shape.
    """
    flat = weights.reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)
    result = np.empty_like(blocks)
    step = _CHUNK_WEIGHTS // block_size
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        result[part] = reconstruct(blocks[part])
    return result.reshape(-1)[: flat.size].reshape(weights.shape)


# ------------------------------------------------------------------------------------ via golden


def _golden_absmax(format_name: str, weights: Float32, _: Float64 | None) -> Float32:
    return decode(quantize(weights, parse_format(format_name), mode=ScaleMode.ABSMAX))


def _microscaling(format_name: str, weights: Float32, _: Float64 | None) -> Float32:
    """Conversion of OCP Microscaling Formats 1.0, section 6.3.

    The scale is the largest power of two not above the block's largest magnitude, divided by the
    largest power of two of the element format. Elements round to nearest, ties to even; the part
    of a binade beyond the largest element saturates.
    """
    fmt = parse_format(format_name)
    assert fmt.atom is not None
    elements = format_table(fmt.atom)
    largest_exponent = math.frexp(elements.high_end)[1]

    def reconstruct(blocks: Float32) -> Float32:
        absmax = np.abs(blocks).max(axis=1, keepdims=True)
        exponents = np.maximum(np.frexp(absmax)[1] - largest_exponent, -127)
        scaled = np.ldexp(blocks.astype(np.float64), -exponents)
        return np.ldexp(elements.nearest_value(scaled), exponents).astype(np.float32)

    columns = weights.shape[1]
    padded = np.pad(weights, ((0, 0), (0, -columns % fmt.block_size)))
    return _by_block(padded, fmt.block_size, reconstruct)[:, :columns]


# ------------------------------------------------------------------------------------------- NF4

_NF4_BLOCK = 64

# The published levels (QLoRA, arXiv 2305.14314, appendix E); golden stores them mirrored.
_NF4_LEVELS = -np.array(fixed_levels("NF4", _NF4_BLOCK)[::-1], dtype=np.float32)
_NF4_BOUNDS = (_NF4_LEVELS[:-1] + _NF4_LEVELS[1:]) / np.float32(2)


def _nf4_blocks(blocks: Float32) -> Float32:
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    # bitsandbytes multiplies by the rounded reciprocal; dividing gives other codes now and then.
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))
    result: Float32 = _NF4_LEVELS[np.searchsorted(_NF4_BOUNDS, scaled, side="left")] * absmax
    return result


def _nf4(weights: Float32, _: Float64 | None) -> Float32:
    return _by_block(weights, _NF4_BLOCK, _nf4_blocks)


# ---------------------------------------------------------------------- llama.cpp, ik_llama.cpp


@dataclass(frozen=True)
class _GgmlPackage:
    """A PyPI package with a GGML library in it, and where."""

    requirement: str
    module: str
    library: str  # file name without suffix
    project: str
    cpu_flag: str = ""  # in /proc/cpuinfo of an x86; without it, loading kills the process


_GGML = _GgmlPackage("libggml-python", "libggml", "libggml-base", "llama.cpp")
# A fork with types of its own, by the author of llama.cpp's K-quants.
_IK_GGML = _GgmlPackage("ik-llama-cpp-python", "ik_llama_cpp", "libggml", "ik_llama.cpp", "avx2")


@dataclass(frozen=True)
class _GgmlType:
    """A block type of GGML."""

    name: str
    number: int  # in `enum ggml_type`
    block_size: int
    block_bytes: int
    package: _GgmlPackage
    uses_importance: bool = True

    @property
    def bits_per_weight(self) -> Fraction:
        return Fraction(8 * self.block_bytes, self.block_size)

    @property
    def dequantizer(self) -> str:
        """Name of the C function that decodes."""
        lower = self.name.lower()
        # llama.cpp spells its K-quants with a capital, ik_llama.cpp does not.
        spelled = lower if self.name.startswith("IQ") else lower.replace("_k", "_K")
        return f"dequantize_row_{spelled}"


_GGML_TYPES = (
    _GgmlType("Q8_0", 8, 32, 34, _GGML, uses_importance=False),
    _GgmlType("IQ6_K", 141, 256, 212, _IK_GGML),
    _GgmlType("Q6_K", 14, 256, 210, _GGML),
    _GgmlType("IQ5_K", 140, 256, 176, _IK_GGML),
    _GgmlType("Q5_K", 13, 256, 176, _GGML),
    _GgmlType("IQ4_K", 139, 256, 144, _IK_GGML),
    _GgmlType("Q4_K", 12, 256, 144, _GGML),
    _GgmlType("IQ4_NL", 20, 32, 18, _GGML),
    _GgmlType("IQ4_XS", 23, 256, 136, _GGML),
)

_FLOAT16_MAX = 65504.0
# Where all importances of a block are zero, the quantizers give up the whole block.
_LEAST_IMPORTANCE = 1e-12


class _InitParams(ctypes.Structure):
    _fields_ = (  # `struct ggml_init_params`
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class _GgmlLibrary:
    """The functions of a GGML library that are needed here."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [
            ctypes.c_int, pointer, pointer, integer, integer, integer, pointer,
        ]  # fmt: skip
        self._type_name = self._library.ggml_type_name
        self._type_name.restype = ctypes.c_char_p
        self._type_name.argtypes = [ctypes.c_int]
        # ik_llama.cpp fills its table of float16 values here; without it every scale is 0.
        self._library.ggml_init.restype = ctypes.c_void_p
        self._library.ggml_init.argtypes = [_InitParams]
        self._library.ggml_free.argtypes = [ctypes.c_void_p]
        self._library.ggml_free(self._library.ggml_init(_InitParams(1024, None, True)))

    def has(self, ggml_type: _GgmlType) -> bool:
        """Whether the library knows the type, by the same number."""
        known: bytes | None = self._type_name(ggml_type.number)
        same = known is not None and known.decode().lower() == ggml_type.name.lower()
        return same and hasattr(self._library, ggml_type.dequantizer)

    def encode(
        self, ggml_type: _GgmlType, rows: Float32, importance: Float32 | None
    ) -> NDArray[np.uint8]:
        """Blocks of all rows, one after the other; a row is whole blocks, shape (rows, columns)."""
        count, columns = rows.shape
        blocks = np.empty(rows.size // ggml_type.block_size * ggml_type.block_bytes, np.uint8)
        self._quantize(
            ggml_type.number, rows.ctypes.data, blocks.ctypes.data, 0, count, columns,
            None if importance is None else importance.ctypes.data,
        )  # fmt: skip
        return blocks

    def decode(self, ggml_type: _GgmlType, blocks: NDArray[np.uint8]) -> Float32:
        """Weights of blocks, shape (weights,)."""
        dequantize = getattr(self._library, ggml_type.dequantizer)
        dequantize.restype = None
        dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        count = blocks.size // ggml_type.block_bytes * ggml_type.block_size
        weights = np.empty(count, np.float32)
        dequantize(blocks.ctypes.data, weights.ctypes.data, count)
        return weights


def _package_folder(module: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _cpu_lacks(flag: str) -> bool:
    """Whether this is an x86 on Linux, some virtual machines among them, without that feature."""
    cpuinfo = Path("/proc/cpuinfo")
    if not flag or platform.machine() != "x86_64" or not cpuinfo.exists():
        return False
    return flag not in cpuinfo.read_text().split()


@cache
def _load(package: _GgmlPackage) -> _GgmlLibrary:
    """The library of a package; raises InputError if there is none, or it cannot be used."""
    folder = _package_folder(package.module)
    if folder is None:
        raise InputError(f"not installed; run `pip install {package.requirement}`")
    if _cpu_lacks(package.cpu_flag):
        raise InputError(f"package {package.requirement} needs a CPU with {package.cpu_flag}")
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    paths = sorted(folder.rglob(package.library + suffix))
    if not paths:
        raise InputError(f"package {package.requirement} has no {package.library}{suffix}")
    try:
        return _GgmlLibrary(paths[0])
    except (OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"package {package.requirement} cannot be used: {reason}") from error


def _library_with(ggml_type: _GgmlType) -> _GgmlLibrary:
    """The library that has a type; raises InputError if there is none."""
    library = _load(ggml_type.package)
    if not library.has(ggml_type):
        requirement = ggml_type.package.requirement
        raise InputError(f"package {requirement} does not have type {ggml_type.name}")
    return library


def _joined_rows(ggml_type: _GgmlType, weights: Float32) -> Float32:
    """Weights as rows of whole blocks.

    Where the columns are no multiple of the block, as many consecutive rows are joined as it takes.
    llama.cpp itself would choose another type for such a matrix.
    """
    rows, columns = weights.shape
    joined = math.lcm(columns, ggml_type.block_size)
    if weights.size % joined:
        raise InputError(
            f"{rows} x {columns} weights are not whole blocks of {ggml_type.block_size}"
        )
    return weights.reshape(-1, joined)


def _importance(channel_norms: Float64, count: int) -> Float32:
    """Squared norms relative to the largest, repeated to ``count`` columns."""
    relative = np.maximum((channel_norms / channel_norms.max()) ** 2, _LEAST_IMPORTANCE)
    return np.tile(relative.astype(np.float32), count // channel_norms.size)


def _ggml(ggml_type: _GgmlType, weights: Float32, channel_norms: Float64 | None) -> Float32:
    library = _library_with(ggml_type)
    # Scales are float16. Overflow makes NaN of the block, or the library aborts the process.
    if np.abs(weights).max() > _FLOAT16_MAX:
        raise InputError(f"weights beyond {_FLOAT16_MAX:g}, the largest float16")
    rows = _joined_rows(ggml_type, weights)
    importance = None
    if channel_norms is not None and ggml_type.uses_importance:
        importance = _importance(channel_norms, rows.shape[1])
    blocks = library.encode(ggml_type, rows, importance)
    return library.decode(ggml_type, blocks).reshape(weights.shape)


def ggml_encoder(name: str) -> Callable[[Float32], NDArray[np.uint8]]:
    """The bare quantizer behind one of llama.cpp's or ik_llama.cpp's baselines, to be timed.

    Parameters
    ----------
    name : str
        Such as ``"IQ4_NL"``.

    Returns
    -------
    encode : callable
        Maps finite float32 weights, shape (rows, columns), C order, columns a multiple of 256, to
        the bytes of their blocks.

    Raises
    ------
    InputError
        If there is no such baseline, or it is not available.
    """
    known = {ggml_type.name: ggml_type for ggml_type in _GGML_TYPES}
    if name not in known:
        raise InputError(f"baseline {name!r} is none of {', '.join(known)}")
    try:
        library = _library_with(known[name])
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return lambda weights: library.encode(known[name], weights, None)


# -------------------------------------------------------------------------------------- registry


def _own(name: str, source: str, bits: Fraction, reconstruct: Callable[..., Float32]) -> Baseline:
    return Baseline(name, source, bits, "", False, reconstruct, lambda: None)


def _from_notation(
    name: str, format_name: str, reconstruct: Callable[..., Float32] = _golden_absmax
) -> Baseline:
    bits = parse_format(format_name).bits_per_weight
    return _own(name, format_name, bits, partial(reconstruct, format_name))


def _from_ggml(ggml_type: _GgmlType) -> Baseline:
    return Baseline(
        ggml_type.name,
        ggml_type.package.project,
        ggml_type.bits_per_weight,
        ggml_type.package.requirement,
        ggml_type.uses_importance,
        partial(_ggml, ggml_type),
        partial(_library_with, ggml_type),
    )


def _registry() -> Mapping[str, Baseline]:
    found = [
        *(_from_ggml(ggml_type) for ggml_type in _GGML_TYPES),
        _from_notation("FP8", "E4M3^0sUE8M0"),
        _from_notation("E2M3sUE4M4", "E2M3sUE4M4"),
        _from_notation("MXFP6", "E2M3^32sUE8M0", _microscaling),
        # NVFP4 stores the sign bit of its scales, though none is negative. Its tensor scale is a
        # float32 where ours is a power of two.
        _from_notation("NVFP4", "E2M1sS1E4M3"),
        _own("NF4", "bitsandbytes", 4 + Fraction(32, _NF4_BLOCK), _nf4),
        _from_notation("MXFP4", "E2M1^32sUE8M0", _microscaling),
    ]
    found.sort(key=lambda baseline: -baseline.bits_per_weight)
    return MappingProxyType({baseline.name: baseline for baseline in found})


BASELINES = _registry()
"""All baselines by name, most bits first."""
