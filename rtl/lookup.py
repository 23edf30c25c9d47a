"""Ways to pick one of the entries of a LUT, which differ in cost only (docs/synthesis.md)."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

from amaranth.hdl import Module, Mux, Signal, Value

__all__ = ["DEFAULT_LOOKUP", "LOOKUPS", "SELECTIONS", "TAKING_TURNS"]

Selection = Callable[[Module, str, Sequence[Value], Value], Value]
"""Takes a module, a prefix for names of signals, the entries and the index."""


def _tree(m: Module, name: str, entries: Sequence[Value], index: Value) -> Value:
    """Multiplexers of two inputs, one level for each bit of the index."""
    level = list(entries)
    for bit in index:
        level = [Mux(bit, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _one_hot(m: Module, name: str, entries: Sequence[Value], index: Value) -> Value:
    """OR over all entries, each behind a gate that only its index opens."""
    chosen = Signal(1 << len(index), name=f"{name}_chosen")
    m.d.comb += [bit.eq(index == number) for number, bit in enumerate(chosen)]
    gated = (entry & bit.replicate(len(entry)) for bit, entry in zip(chosen, entries, strict=True))
    return reduce(or_, gated)


def _two_level(m: Module, name: str, entries: Sequence[Value], index: Value) -> Value:
    """One-hot selection by the lower bits of the index in each group, then among the groups."""
    low = len(index) // 2
    size = 1 << low
    groups = []
    for number in range(0, len(entries), size):
        group = Signal(len(entries[0]), name=f"{name}_group_{number // size}")
        prefix = f"{name}_{number // size}"
        m.d.comb += group.eq(_one_hot(m, prefix, entries[number : number + size], index[:low]))
        groups.append(group)
    return _one_hot(m, name, groups, index[low:])


SELECTIONS: dict[str, Selection] = {
    "one_hot": _one_hot,
    "tree": _tree,
    "two_level": _two_level,
    "two_banks": _tree,
}
"""How a lane picks its entry from a LUT of registers, by structure."""

LOOKUPS = (*SELECTIONS, "memory")
"""Structures: selection from registers, or a memory with a read port for every lane.

In ``two_banks`` both banks are written in turn and a multiplexer is behind them; in the other
structures of registers a complete shadow bank is copied into the active one.
"""

TAKING_TURNS = ("two_banks", "memory")
"""Structures whose banks are active in turn."""

DEFAULT_LOOKUP = "one_hot"
