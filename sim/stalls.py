"""When a stream pauses: generators of idle cycles, shared by drivers and sinks."""

import random
from collections.abc import Iterator

__all__ = ["STALL_MODES", "no_stalls", "random_stalls", "stall_pair"]

STALL_MODES = ("none", "in", "out", "both")
"""Which side of a unit pauses: neither, the source, the sink, or both."""


def no_stalls() -> Iterator[int]:
    """Never pause."""
    while True:
        yield 0


def random_stalls(seed: str) -> Iterator[int]:
    """Idle cycles before each transfer: mostly none, sometimes one to four, rarely a long pause."""
    # Strings seed Python's generator identically on every platform and in every process.
    rng = random.Random(seed)
    while True:
        chance = rng.random()
        yield 0 if chance < 0.6 else rng.randint(1, 4) if chance < 0.97 else rng.randint(5, 20)


def stall_pair(mode: str, seed: int) -> tuple[Iterator[int], Iterator[int]]:
    """Stall generators of the source and the sink for one of :data:`STALL_MODES`.

    Raises
    ------
    ValueError
        If there is no such mode.
    """
    if mode not in STALL_MODES:
        raise ValueError(f"stall mode must be one of {STALL_MODES}, not {mode!r}")
    source = random_stalls(f"source-{seed}") if mode in ("in", "both") else no_stalls()
    sink = random_stalls(f"sink-{seed}") if mode in ("out", "both") else no_stalls()
    return source, sink
