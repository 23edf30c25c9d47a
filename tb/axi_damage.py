"""Everything that can be wrong with the packets of a tensor, and what must come of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from golden.packing import unpack_bits
from tb.axi_traffic import Csr, Job, judged, whole_words

__all__ = ["WRONG_ENTRIES", "damaged", "possible_damage"]

_Rng = np.random.Generator


def _ascending_places(csr: Csr) -> NDArray[np.intp]:
    """Entries that follow another one of their row, whose column is not 0."""
    starts = np.isin(np.arange(len(csr.columns)), csr.pointers)
    return np.flatnonzero(~starts[1:] & (csr.columns[:-1] > 0)) + 1


# Each kind: where in a job it can be done, and how it is done there.
_Places = Callable[[Csr], NDArray[np.intp]]
_Change = Callable[[Csr, int, _Rng, int], None]


def _first(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.pointers[0] = rng.integers(1, len(csr.values) + 2)


def _descends(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.pointers[place] = csr.pointers[place - 1] - 1


def _too_large(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.pointers[place] = len(csr.values) + 1


def _largest(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.pointers[place] = 0xFFFFFFFF


def _last_small(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.pointers[-1] -= 1


def _last_large(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.pointers[-1] += 1


def _outside(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.columns[place] = columns


def _far_outside(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.columns[place] = np.iinfo(csr.columns.dtype).max


def _repeats(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.columns[place] = csr.columns[place - 1]


def _column_descends(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.columns[place] = csr.columns[place - 1] - 1


def _infinite(csr: Csr, place: int, rng: _Rng, columns: int) -> None:
    csr.values[place] = rng.choice([0x7F80, 0xFF80, 0x7FC1])


def _any_place(csr: Csr) -> NDArray[np.intp]:
    return np.arange(len(csr.values))


_ENTRY_DAMAGE: dict[str, tuple[_Places, _Change]] = {
    "first pointer not 0": (_any_place, _first),
    "pointer descends": (lambda csr: np.flatnonzero(csr.pointers[:-1] > 0) + 1, _descends),
    "pointer too large": (lambda csr: np.arange(1, len(csr.pointers) - 1), _too_large),
    "pointer of all ones": (lambda csr: np.arange(1, len(csr.pointers) - 1), _largest),
    "last pointer too small": (_any_place, _last_small),
    "last pointer too large": (_any_place, _last_large),
    "column outside": (_any_place, _outside),
    "column of all ones": (_any_place, _far_outside),
    "column repeats": (_ascending_places, _repeats),
    "column descends": (_ascending_places, _column_descends),
    "value infinite": (_any_place, _infinite),
}

WRONG_ENTRIES = tuple(_ENTRY_DAMAGE)
"""Kinds of damage to the content of corrections."""


def possible_damage(job: Job, widths: Mapping[str, int]) -> list[str]:
    """Kinds of damage that can be done to a job: ``short_`` and ``long_`` planes, wrong entries."""
    kinds = [f"long_{plane}" for plane in job.packets]
    kinds += [
        f"short_{plane}" for plane, packet in job.packets.items() if 8 * len(packet) > widths[plane]
    ]
    csr = job.csr
    return kinds + [
        kind for kind, (places, _) in _ENTRY_DAMAGE.items() if csr is not None and len(places(csr))
    ]


def damaged(rng: _Rng, job: Job, kind: str, widths: Mapping[str, int], output: str) -> Job:
    """The job with one thing wrong, in whole words.

    Parameters
    ----------
    rng : numpy.random.Generator
    job : Job
        As :func:`tb.axi_traffic.random_job` makes it.
    kind : str
        One of :func:`possible_damage`.
    widths : mapping of str to int
        Bits of the buses, by plane.
    output : str
        As for :func:`tb.axi_traffic.random_job`.
    """
    if kind in _ENTRY_DAMAGE:
        assert job.csr is not None
        places, change = _ENTRY_DAMAGE[kind]
        csr = Csr(job.csr.pointers.copy(), job.csr.columns.copy(), job.csr.values.copy())
        change(csr, int(rng.choice(places(csr))), rng, job.tensor.shape[1])
        packets = {**job.packets, **csr.planes}
        return whole_words(rng, judged(replace(job, csr=csr, packets=packets), output), widths)
    length, plane = kind.split("_", 1)
    size = widths[plane] // 8
    whole = whole_words(rng, job, widths)
    packet = whole.packets[plane]
    if length == "long":
        packet += rng.bytes(size * int(rng.integers(1, 4)))
        errors = job.errors | {kind}
        return replace(whole, packets={**whole.packets, plane: packet}, errors=errors)
    kept = size * int(rng.integers(1, len(packet) // size))
    content = np.frombuffer(job.packets[plane], dtype=np.uint8).copy()
    content[kept:] = 0
    packets = {**whole.packets, plane: packet[:kept]}
    return judged(replace(_with_content(whole, plane, content), packets=packets), output, kind)


def _with_content(job: Job, plane: str, content: NDArray[np.uint8]) -> Job:
    """The job as if one of its planes were those bytes."""
    tensor, csr = job.tensor, job.csr
    if plane == "indices":
        indices = unpack_bits(content, tensor.format.index_bits, tensor.indices.size)
        return replace(
            job,
            tensor=replace(
                tensor, indices=indices.astype(tensor.indices.dtype).reshape(tensor.indices.shape)
            ),
        )
    if plane == "scales":
        shape = tensor.scale_words.shape
        words = unpack_bits(content, tensor.format.word.width, tensor.scale_words.size)
        return replace(
            job, tensor=replace(tensor, scale_words=words.astype(np.uint16).reshape(shape))
        )
    if plane == "row_scales":
        return replace(job, tensor=replace(tensor, row_scales=content.view("<u2")))
    assert csr is not None
    return replace(
        job,
        csr=Csr(
            content.view("<u4") if plane == "row_pointers" else csr.pointers,
            content.view(csr.columns.dtype) if plane == "columns" else csr.columns,
            content.view("<u2") if plane == "values" else csr.values,
        ),
    )
