"""Random tensors for :mod:`tb.axi_bench`: planes as the file has them, and what must come out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from golden.corrections import Corrections, column_dtype
from golden.errors import InputError
from golden.float_output import element_to_float
from golden.formats import BF16
from golden.notation import QuantFormat
from golden.tensor import QuantizedTensor, decode
from sim.planes import plane_packets
from sim.random_tensors import random_tensor
from sim.reference import code_values

__all__ = ["Csr", "Job", "extreme_job", "judged", "random_job", "whole_words"]

_EXTREME_EXPONENTS = (-128, -100, 100, 127)
_DENSITIES = (0.0, 0.01, 0.1, 0.9)

_Bits = NDArray[np.unsignedinteger]


@dataclass(frozen=True, eq=False)
class Csr:
    """Corrections as the planes hold them, right or wrong."""

    pointers: NDArray[np.uint32]
    columns: NDArray[np.unsignedinteger]
    values: NDArray[np.uint16]

    @property
    def planes(self) -> dict[str, bytes]:
        """Bytes of the three planes."""
        return {
            "row_pointers": self.pointers.tobytes(),
            "columns": self.columns.tobytes(),
            "values": self.values.tobytes(),
        }


@dataclass(frozen=True, eq=False)
class Job:
    """One tensor on its way through the hardware.

    Parameters
    ----------
    tensor : QuantizedTensor
    csr : Csr or None
        Corrections; None if there are no entries.
    packets : mapping of str to bytes
        What is sent on the stream of each plane; missing planes have no packet.
    expected : uint array
        Floating-point bit patterns, or codes, of all weights with padding.
    errors : set of str
        Fields of ERRORS that have to be set, and no others.
    """

    tensor: QuantizedTensor
    csr: Csr | None
    packets: Mapping[str, bytes]
    expected: _Bits
    errors: frozenset[str] = field(default_factory=frozenset)

    @property
    def weights(self) -> int:
        """Weights with padding."""
        return self.tensor.indices.size

    @property
    def entries(self) -> int:
        """Number of corrections."""
        return len(self.csr.values) if self.csr else 0


def _random_csr(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Csr | None:
    mask = rng.random(shape) < density
    values = (rng.standard_t(3, shape) * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
    made = Corrections.from_mask(mask, values)
    if not made.entries:
        return None
    return Csr(made.indptr.astype("<u4"), made.columns, made.values)


def _codes(tensor: QuantizedTensor) -> NDArray[np.unsignedinteger]:
    """Element codes, shape (rows, blocks, block size)."""
    if tensor.format.atom is not None:
        return tensor.indices
    codes = np.array([lut.codes for lut in tensor.luts], dtype=np.uint8)
    return codes[tensor.metabits[..., None], tensor.indices]


def _dense(tensor: QuantizedTensor) -> tuple[NDArray[np.float32], set[str]]:
    """Values with padding, shape (rows, padded columns), and flags."""
    try:
        return decode(tensor, padded=True), set()
    except InputError:  # beyond what the golden model answers for; hardware has an answer
        fmt = tensor.format
        row_scales = tensor.row_scales
        result = element_to_float(
            _codes(tensor),
            tensor.scale_codes[..., None],
            tensor.layer_exponent,
            element=fmt.atom or fmt.hif,
            scale=fmt.word.scale,
            row_scales=None if row_scales is None else row_scales[:, None, None],
        )
    names = {"reserved": "reserved_code", "overflow": "overflow", "underflow": "underflow"}
    flags = {name for flag, name in names.items() if getattr(result, flag).any()}
    return result.bits.view(np.float32).reshape(tensor.shape[0], -1), flags


def _kept(csr: Csr, shape: tuple[int, int]) -> tuple[list[int], list[int], bool]:
    """Row and number of every entry that is not left out, and whether any is.

    A row is right if both its pointers are; an entry of a right row, if its column is inside the
    matrix and above those of the row that were kept.
    """
    pointers, columns = csr.pointers.tolist(), csr.columns.tolist()
    rows, numbers = [], []
    read, sure = 0, pointers[0] == 0
    wrong = not sure
    for row, end in enumerate(pointers[1:]):
        right = read <= end <= len(columns) and (row + 1 < shape[0] or end == len(columns))
        lowest = 0
        for number in range(read, end if right else read):
            if sure and lowest <= columns[number] < shape[1]:
                rows.append(row)
                numbers.append(number)
                lowest = columns[number] + 1
            else:
                wrong = True
        read = end if right else read
        wrong |= not right
        sure = right
    return rows, numbers, wrong


def judged(job: Job, output: str, *damage: str) -> Job:
    """The job with what must come out of it, and the flags that it raises.

    Parameters
    ----------
    job : Job
        Its ``expected`` and ``errors`` are ignored.
    output : str
        ``"float32"``, ``"bfloat16"`` or ``"codes"``.
    *damage : str
        Flags that its packets raise by their lengths.
    """
    if output == "codes":
        expected = code_values(job.tensor, job.tensor.format.hif)
        return replace(job, expected=expected, errors=frozenset(damage))
    values, flags = _dense(job.tensor)
    flags |= set(damage)
    if job.csr is not None:
        rows, numbers, wrong = _kept(job.csr, job.tensor.shape)
        bits = job.csr.values[numbers]
        finite = ~BF16.has_top_exponent(bits)
        places = np.array(rows, dtype=np.intp)[finite], job.csr.columns[numbers][finite]
        with np.errstate(over="ignore"):
            values = values.copy()
            values[places] += bits[finite].view(ml_dtypes.bfloat16).astype(np.float32)
        flags |= {"wrong_corrections"} if wrong else set()
        flags |= set() if finite.all() else {"reserved_code"}
    flat = np.ascontiguousarray(values).reshape(-1)
    if output == "bfloat16":
        rounded = _to_bfloat16(flat)
        flags |= {"overflow"} if BF16.has_top_exponent(rounded).any() else set()
        return replace(job, expected=rounded, errors=frozenset(flags))
    flags |= set() if np.isfinite(flat).all() else {"overflow"}
    return replace(job, expected=flat.view(np.uint32), errors=frozenset(flags))


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Nearest, ties to even, infinities included."""
    with np.errstate(over="ignore"):
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def random_job(
    rng: np.random.Generator,
    fmt: QuantFormat,
    output: str,
    shape: tuple[int, int] | None = None,
    density: float | None = None,
) -> Job:
    """A small tensor of random codes.

    Parameters
    ----------
    rng : numpy.random.Generator
    fmt : QuantFormat
    output : str
        ``"float32"``, ``"bfloat16"`` or ``"codes"``; the last has no corrections.
    shape : tuple of int, optional
        (rows, columns); random if not given.
    density : float, optional
        Share of weights that have a correction; random if not given.
    """
    shape = shape or (int(rng.integers(1, 12)), int(rng.integers(1, 150)))
    tensor = random_tensor(rng, fmt, shape)
    if output == "codes":
        density = 0.0
    csr = _random_csr(rng, shape, rng.choice(_DENSITIES) if density is None else density)
    return judged(_packed(tensor, csr), output)


def extreme_job(rng: np.random.Generator, fmt: QuantFormat, output: str) -> Job:
    """A tensor with any scale code and a large or small layer exponent: flags are likely."""
    job = random_job(rng, fmt, output)
    words = rng.integers(0, 1 << fmt.word.width, job.tensor.scale_words.shape, dtype=np.uint16)
    exponent = int(rng.choice(_EXTREME_EXPONENTS))
    tensor = replace(job.tensor, scale_words=words, layer_exponent=exponent)
    return judged(_packed(tensor, job.csr), output)


def _packed(tensor: QuantizedTensor, csr: Csr | None) -> Job:
    """A job that nothing is known about yet."""
    packets = plane_packets(tensor)
    if csr is not None:
        assert csr.columns.dtype == column_dtype(tensor.shape[1])
        packets |= csr.planes
    return Job(tensor, csr, packets, np.empty(0, dtype=np.uint32))


def whole_words(rng: np.random.Generator, job: Job, widths: Mapping[str, int]) -> Job:
    """The job with its packets filled up to whole words of the buses, with noise.

    What follows a plane in its final word has no meaning.
    """
    packets = {
        plane: packet + rng.bytes(-len(packet) % (widths[plane] // 8))
        for plane, packet in job.packets.items()
    }
    return replace(job, packets=packets)
