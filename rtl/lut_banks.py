"""LUTs of the tensor under way and of the next one, and the lookup of every lane."""

from collections.abc import Sequence
from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import FlippedInterface

from golden.promotion import PROMOTED, is_promoted, promoted_codes
from rtl.layouts import LAYER_EXPONENT_BITS
from rtl.lookup import LOOKUPS, SELECTIONS, TAKING_TURNS
from rtl.modes import Modes, by_mode

__all__ = ["LutBanks", "check_lookup"]


def check_lookup(lookup: str) -> None:
    """Refuse what is no structure of a lookup.

    Raises
    ------
    ValueError
        If it is none of :data:`rtl.lookup.LOOKUPS`.
    """
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, not {lookup!r}")


class LutBanks:
    """Registers and logic of a decoder's LUTs, put into the decoder's own module.

    The n-th tensor is decoded with the n-th set of LUTs. Writes go into the shadow bank, which
    becomes active when the tensor under way ends, or at once while there is none. The decoder
    calls :meth:`look_up` once and :meth:`change_at` once, in this order.

    Parameters
    ----------
    m : Module
    i_lut : stream of :func:`rtl.layouts.lut_write_layout`
        Its ``ready`` is driven here: not while a complete bank waits for its tensor.
    modes : Modes
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.

    Attributes
    ----------
    loaded : Signal
        The active bank holds the LUTs of the tensor under way: its beats can be taken.
    mode : Value
        Mode of that tensor.
    """

    def __init__(self, m: Module, i_lut: FlippedInterface, modes: Modes, lookup: str) -> None:
        self._m, self._i_lut, self._modes, self._lookup = m, i_lut, modes, lookup
        self.loaded = Signal(name="loaded")
        self._pending = pending = Signal(name="pending")  # the shadow bank is complete
        self._swap = Signal(name="swap")  # the shadow bank becomes active
        self._active = Signal(name="active")  # which bank decodes, where both take turns
        settings = {
            "layer_exponent": signed(LAYER_EXPONENT_BITS),
            **({"mode": modes.mode_bits} if modes.mode_bits else {}),
        }
        self._active_settings, self._pending_settings = (
            {
                name: Signal(shape, name=f"{bank}_{name}", reset_less=True)
                for name, shape in settings.items()
            }
            for bank in ("active", "pending")
        )
        self.mode: Value = self._active_settings.get("mode", Const(0))
        self._write = i_lut.valid & i_lut.ready
        m.d.comb += i_lut.ready.eq(~pending)
        with m.If(self._write & i_lut.p.last):
            m.d.sync += pending.eq(1)
            for name, value in self._pending_settings.items():
                m.d.sync += value.eq(i_lut.p[name])

    @property
    def layer_exponent(self) -> Value:
        """That of the tensor under way, with what makes its elements integers."""
        units = [Const(self._modes.element_exponent(fmt), signed(3)) for fmt in self._modes.formats]
        return self._active_settings["layer_exponent"] + by_mode(self.mode, units)

    def scale(self, word: Value) -> Value:
        """Scale code of a scale word."""
        widths = [fmt.word.scale.width for fmt in self._modes.formats]
        return by_mode(self.mode, [word[:width] for width in widths])

    def metabit(self, word: Value) -> Value:
        """Metabit of a scale word; 0 where the format of the tensor has none."""
        metabits = [
            word[fmt.word.scale.width] if fmt.word.metabit_bits else Const(0)
            for fmt in self._modes.formats
        ]
        return by_mode(self.mode, metabits)

    def change_at(self, end: Value) -> None:
        """Change banks in the clock in which a tensor ends.

        Parameters
        ----------
        end : Value
            The last beat of the tensor under way is taken.
        """
        m = self._m
        # The boundary between two tensors: the shadow bank takes over, or the input has to wait.
        boundary = Signal(name="boundary")
        m.d.comb += boundary.eq(~self.loaded | end)
        m.d.comb += self._swap.eq(boundary & self._pending)
        with m.If(boundary):
            m.d.sync += self.loaded.eq(self._pending)
        with m.If(self._swap):
            m.d.sync += self._pending.eq(0)
            if self._lookup in TAKING_TURNS:
                m.d.sync += self._active.eq(~self._active)
            for name, value in self._pending_settings.items():
                m.d.sync += self._active_settings[name].eq(value)

    def look_up(self, indices: Sequence[Value], metabits: Sequence[Value]) -> list[Value]:
        """Decoded code of every lane.

        Parameters
        ----------
        indices : sequence of Value
            Stored elements, one for each lane.
        metabits : sequence of Value
            Of as many groups of neighbouring lanes, which share one.
        """
        m, modes = self._m, self._modes
        looked_up = self._entries(indices, metabits)
        codes = []
        for lane, index in enumerate(indices):
            promoted = Signal(modes.hif.width, name=f"promoted_{lane}")
            if modes.promotes:
                element = index[: PROMOTED.width]
                # Each code picks its value; code 0 is 0.
                picked = (
                    Mux(element == number, value, 0)
                    for number, value in enumerate(promoted_codes(modes.hif).tolist())
                    if value
                )
                m.d.comb += promoted.eq(reduce(or_, picked))
            by_format = [
                looked_up[lane] if fmt.codebooks
                else promoted if is_promoted(fmt)
                else index[: fmt.index_bits]
                for fmt in modes.formats
            ]  # fmt: skip
            codes.append(by_mode(self.mode, by_format))
        return codes

    def _entries(self, indices: Sequence[Value], metabits: Sequence[Value]) -> list[Value]:
        """LUT entry of every lane."""
        modes, m = self._modes, self._m
        if not modes.codebook_formats:
            return []
        slots = [lane * len(metabits) // len(indices) for lane in range(len(indices))]
        if self._lookup == "memory":
            return self._read_memory(indices, [metabits[slot] for slot in slots])
        # Lanes share as much as possible: the LUT of a scale word is chosen once, and per lane one
        # entry of that.
        tables = self._tables_in_turn() if self._lookup == "two_banks" else self._tables()
        chosen = [
            self._choose(f"table_{slot}", metabit, tables) for slot, metabit in enumerate(metabits)
        ]
        pick = SELECTIONS[self._lookup]
        return [
            pick(m, f"lane_{lane}", chosen[slots[lane]], index[: modes.index_bits])
            for lane, index in enumerate(indices)
        ]

    def _tables(self) -> list[list[Value]]:
        """Entries of the active bank, by LUT; a swap copies all of the shadow bank into it."""
        m, tables = self._m, []
        for lut in range(self._modes.luts):
            row: list[Value] = []
            for index in range(1 << self._modes.index_bits):
                shadow, entry = (
                    Signal(self._modes.hif.width, name=f"{bank}_{lut}_{index}", reset_less=True)
                    for bank in ("shadow", "active")
                )
                with m.If(self._names(lut, index)):
                    m.d.sync += shadow.eq(self._i_lut.p.code)
                with m.If(self._swap):
                    m.d.sync += entry.eq(shadow)
                row.append(entry)
            tables.append(row)
        return tables

    def _tables_in_turn(self) -> list[list[Value]]:
        """Entries of the active bank, by LUT; each bank is active in every other tensor."""
        m, active, width = self._m, self._active, self._modes.hif.width
        tables = []
        for lut in range(self._modes.luts):
            row: list[Value] = []
            for index in range(1 << self._modes.index_bits):
                here = self._names(lut, index)
                banks = [
                    Signal(width, name=f"bank_{bank}_{lut}_{index}", reset_less=True)
                    for bank in range(2)
                ]
                for bank, register in enumerate(banks):
                    with m.If(here & (~active if bank else active)):
                        m.d.sync += register.eq(self._i_lut.p.code)
                code = Signal(width, name=f"active_{lut}_{index}")
                m.d.comb += code.eq(Mux(active, banks[1], banks[0]))
                row.append(code)
            tables.append(row)
        return tables

    def _names(self, lut: int, index: int) -> Value:
        """Whether the entry of a LUT is written."""
        entry, place = self._i_lut.p, (lut << self._modes.index_bits) + index
        return self._write & (Cat(entry.index, entry.lut) == place)

    def _read_memory(self, indices: Sequence[Value], metabits: Sequence[Value]) -> list[Value]:
        """Entries of all lanes, each from a port: address is index, LUT, bank, lowest first."""
        m, modes, active = self._m, self._modes, self._active
        depth = 2 * modes.luts << modes.index_bits
        m.submodules.banks = banks = Memory(shape=modes.hif.width, depth=depth, init=[])
        port = banks.write_port()
        m.d.comb += [
            port.addr.eq(Cat(self._i_lut.p.index, self._i_lut.p.lut, ~active)),
            port.data.eq(self._i_lut.p.code),
            port.en.eq(self._write),
        ]
        entries = []
        for index, metabit in zip(indices, metabits, strict=True):
            read = banks.read_port(domain="comb")
            lut = metabit if modes.luts == 2 else Cat()
            m.d.comb += read.addr.eq(Cat(index[: modes.index_bits], lut, active))
            entries.append(read.data)
        return entries

    def _choose(self, name: str, metabit: Value, tables: list[list[Value]]) -> list[Value]:
        """The LUT that a metabit selects."""
        if len(tables) == 1:
            return tables[0]
        codes = []
        for index, (first, second) in enumerate(zip(*tables, strict=True)):
            code = Signal(len(first), name=f"{name}_{index}")
            self._m.d.comb += code.eq(Mux(metabit, second, first))
            codes.append(code)
        return codes
