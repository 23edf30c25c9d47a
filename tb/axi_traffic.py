"""Random tensors for :mod:`tb.axi_bench`: planes as the file has them, right and wrong packets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import Lut
from golden.convert import round_bfloat16
from golden.corrections import Corrections
from golden.errors import InputError
from golden.formats import HifFormat
from golden.notation import QuantFormat
from golden.packing import unpack_bits
from golden.tensor import QuantizedTensor, decode

__all__ = ["Job", "damaged", "random_job", "whole_words"]

# Scale codes from 1/8 to 7/8 of a format's range keep every product in float32's normal range,
# whatever the layer exponents below are.
_SCALE_RANGE = (1, 7, 8)
_LAYER_EXPONENTS = (-3, 3)


@dataclass(frozen=True, eq=False)
class Job:
    """One tensor on its way through the hardware.

    Parameters
    ----------
    tensor : QuantizedTensor
    corrections : Corrections or None
    packets : mapping of str to bytes
        What is sent on the stream of each plane; missing planes have no packet.
    expected : uint array or None
        Floating-point bit patterns, or codes, of all weights with padding; None: not compared.
    errors : set of str
        Fields of ERRORS that have to be set.
    """

    tensor: QuantizedTensor
    corrections: Corrections | None
    packets: Mapping[str, bytes]
    expected: NDArray[np.unsignedinteger] | None
    errors: frozenset[str] = field(default_factory=frozenset)

    @property
    def weights(self) -> int:
        """Weights with padding."""
        return self.tensor.indices.size

    @property
    def entries(self) -> int:
        """Number of corrections."""
        return self.corrections.entries if self.corrections else 0


def _random_lut(rng: np.random.Generator, hif: HifFormat, entries: int) -> Lut:
    values = np.array(sorted(hif.canonical))
    below, above = values[values < 0], values[values > 0]
    chosen = [rng.choice(below, 1), rng.choice(above, 1)]
    others = np.setdiff1d(values, np.concatenate(chosen))
    chosen.append(rng.choice(others, entries - 2, replace=False))
    return Lut(hif, tuple(hif.canonical[value] for value in np.sort(np.concatenate(chosen))))


def _random_corrections(rng: np.random.Generator, shape: tuple[int, int]) -> Corrections:
    mask = rng.random(shape) < rng.choice([0.0, 0.01, 0.1, 0.9])
    values = (rng.standard_t(3, shape) * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
    return Corrections.from_mask(mask, values)


def _expected(
    tensor: QuantizedTensor, corrections: Corrections | None, output: str
) -> NDArray[np.unsignedinteger] | None:
    if output == "codes":
        codes = np.array([lut.codes for lut in tensor.luts], dtype=np.uint8)
        return codes[tensor.metabits[..., None], tensor.indices].reshape(-1)
    try:
        values = decode(tensor, padded=True)
    except InputError:  # beyond the range that the golden model answers for
        return None
    if corrections is not None:
        columns = tensor.shape[1]
        values[:, :columns] = corrections.add_to(np.ascontiguousarray(values[:, :columns]))
    flat = values.reshape(-1)
    return round_bfloat16(flat) if output == "bfloat16" else flat.view(np.uint32)


def random_job(
    rng: np.random.Generator, fmt: QuantFormat, output: str, shape: tuple[int, int] | None = None
) -> Job:
    """A small tensor of random codes.

    Parameters
    ----------
    rng : numpy.random.Generator
    fmt : QuantFormat
    output : str
        ``"float32"``, ``"bfloat16"`` or ``"codes"``; the last has no corrections.
    shape : tuple of int, optional
        (rows, columns); random if not given. A tensor of given shape has no corrections.
    """
    plain = shape is not None or output == "codes"
    shape = shape or (int(rng.integers(1, 12)), int(rng.integers(1, 150)))
    blocks = (shape[0], -(-shape[1] // fmt.block_size))
    low, high, parts = _SCALE_RANGE
    codes = 1 << fmt.word.scale.width
    scales = rng.integers(codes * low // parts, codes * high // parts, blocks, dtype=np.uint16)
    metabits = rng.integers(0, 1 << fmt.word.metabit_bits, blocks, dtype=np.uint16)
    row_scales = round_bfloat16(rng.uniform(0.5, 2, shape[0]).astype(np.float32))
    tensor = QuantizedTensor(
        fmt,
        shape,
        rng.integers(0, 1 << fmt.index_bits, (*blocks, fmt.block_size), dtype=np.uint8),
        scales | metabits << np.uint16(fmt.word.scale.width),
        tuple(_random_lut(rng, fmt.hif, fmt.lut_entries) for _ in fmt.codebooks),
        int(rng.integers(*_LAYER_EXPONENTS)),
        row_scales if fmt.row_scale else None,
    )
    corrections = None if plain else _random_corrections(rng, shape)
    packets = {"indices": tensor.index_plane.tobytes(), "scales": tensor.scale_plane.tobytes()}
    if tensor.row_scales is not None:
        packets["row_scales"] = tensor.row_scales.astype("<u2").tobytes()
    if corrections is not None and corrections.entries:
        packets["row_pointers"] = corrections.indptr.astype("<u4").tobytes()
        packets["columns"] = corrections.columns.astype("<u2").tobytes()
        packets["values"] = corrections.values.astype("<u2").tobytes()
    return Job(tensor, corrections, packets, _expected(tensor, corrections, output))


def _filled(
    rng: np.random.Generator, packets: Mapping[str, bytes], widths: Mapping[str, int]
) -> dict[str, bytes]:
    """Packets of whole words: what follows a plane in its final word has no meaning."""
    return {
        plane: packet + rng.bytes(-len(packet) % (widths[plane] // 8))
        for plane, packet in packets.items()
    }


def whole_words(rng: np.random.Generator, job: Job, widths: Mapping[str, int]) -> Job:
    """The job with its packets filled up to whole words of the buses, with noise."""
    return replace(job, packets=_filled(rng, job.packets, widths))


def damaged(rng: np.random.Generator, job: Job, widths: Mapping[str, int], output: str) -> Job:
    """The job with one packet too short or too long, or with wrong corrections.

    Parameters
    ----------
    rng : numpy.random.Generator
    job : Job
        As :func:`random_job` makes it.
    widths : mapping of str to int
        Bits of the buses, by plane.
    output : str
        As for :func:`random_job`.
    """
    plane = str(rng.choice(list(job.packets)))
    size = widths[plane] // 8
    packets = _filled(rng, job.packets, widths)
    words = len(packets[plane]) // size
    if plane in ("row_pointers", "columns") and rng.random() < 0.5:
        return _with_wrong_corrections(rng, job, packets, plane)
    if words == 1 or rng.random() < 0.5:
        packets[plane] += rng.bytes(size * int(rng.integers(1, 4)))
        return replace(job, packets=packets, errors=frozenset({f"long_{plane}"}))
    kept = size * int(rng.integers(1, words))
    packets[plane] = packets[plane][:kept]
    errors = {f"short_{plane}"}
    expected = None
    if plane in ("indices", "scales"):
        fmt, tensor = job.tensor.format, job.tensor
        whole = np.frombuffer(job.packets[plane], dtype=np.uint8).copy()
        whole[kept:] = 0
        if plane == "indices":
            values = unpack_bits(whole, fmt.index_bits, tensor.indices.size)
            tensor = replace(tensor, indices=values.astype(np.uint8).reshape(tensor.indices.shape))
        else:
            values = unpack_bits(whole, fmt.word.width, tensor.scale_words.size)
            words_shape = tensor.scale_words.shape
            tensor = replace(tensor, scale_words=values.astype(np.uint16).reshape(words_shape))
        expected = _expected(tensor, job.corrections, output)
    elif plane in ("row_pointers", "columns"):
        # Zeros instead of what is missing are wrong, unless they happen to be right.
        errors |= {"wrong_corrections?"}
    return replace(job, packets=packets, errors=frozenset(errors), expected=expected)


def _with_wrong_corrections(
    rng: np.random.Generator, job: Job, packets: dict[str, bytes], plane: str
) -> Job:
    """One row pointer that is too large, or one column that is outside the matrix."""
    assert job.corrections is not None
    whole = np.frombuffer(packets[plane], dtype="<u4" if plane == "row_pointers" else "<u2").copy()
    number = job.tensor.shape[0] + 1 if plane == "row_pointers" else job.entries
    place = int(rng.integers(number))
    whole[place] = job.entries + 1 if plane == "row_pointers" else job.tensor.shape[1]
    packets[plane] = whole.tobytes()
    return replace(job, packets=packets, errors=frozenset({"wrong_corrections"}), expected=None)
