"""The LUT decoder: indices and metabits in, HIF codes out."""

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from golden.formats import E2M3
from rtl.layouts import (
    LAYER_EXPONENT_BITS,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
)
from rtl.lookup import DEFAULT_LOOKUP, LOOKUPS, SELECTIONS, TAKING_TURNS
from rtl.modes import Modes, by_mode, check_lanes

__all__ = ["LutDecoder"]


class LutDecoder(wiring.Component):
    """Look up every index of a beat in the LUT that its block's metabit selects.

    Latency 1 cycle, throughput 1 beat per cycle; a stalled output stalls the input. The n-th tensor
    on ``i`` is decoded with the n-th set of LUTs on ``i_lut``, however the two are timed: LUTs are
    written into a shadow bank, which becomes active right after the beat with ``last``, or at once
    while no tensor is under way. If the bank is complete by then, the next tensor starts without a
    bubble; if not, ``i`` waits for it. Every entry that the tensor's indices can name must be
    written for every tensor; a tensor of atoms needs only the write with ``last``.

    Reset empties both banks and drops the beat in flight. Bit-exact with the LUT step of
    :func:`golden.tensor.decode`.

    Parameters
    ----------
    lanes : int
        Weights per beat, a multiple or a divisor of the block size, 8 to 512.
    modes : Modes
        Formats that can be decoded.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`: structures that do the same at different cost.

    Members
    -------
    i : In(stream.Signature(index_beat_layout))
        Indices and scale words of the next ``lanes`` weights.
    i_lut : In(stream.Signature(lut_write_layout))
        Writes into the shadow bank; not ready while a complete bank waits for its tensor.
    o : Out(stream.Signature(hif_beat_layout))
        Codes, scale codes without metabit, layer exponent and mode of the tensor. Codes are HIF,
        but those of atoms other than E2M3 stay as they are.
    """

    def __init__(self, *, lanes: int, modes: Modes, lookup: str = DEFAULT_LOOKUP):
        check_lanes(lanes, modes.block_size)
        if lookup not in LOOKUPS:
            raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, not {lookup!r}")
        self.lanes = lanes
        self.modes = modes
        self.lookup = lookup
        super().__init__(
            {
                "i": In(stream.Signature(index_beat_layout(lanes=lanes, modes=modes))),
                "i_lut": In(stream.Signature(lut_write_layout(modes=modes))),
                "o": Out(stream.Signature(hif_beat_layout(lanes=lanes, modes=modes))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        modes = self.modes
        loaded = Signal()  # the active bank holds the LUTs of the current tensor
        pending = Signal()  # the shadow bank is complete
        swap = Signal()  # the shadow bank becomes active
        active = Signal()  # which bank decodes, where both take turns
        settings = {
            "layer_exponent": signed(LAYER_EXPONENT_BITS),
            **({"mode": modes.mode_bits} if modes.mode_bits else {}),
        }
        active_settings = {
            name: Signal(shape, name=f"active_{name}", reset_less=True)
            for name, shape in settings.items()
        }
        pending_settings = {
            name: Signal(shape, name=f"pending_{name}", reset_less=True)
            for name, shape in settings.items()
        }
        write = self.i_lut.valid & self.i_lut.ready
        m.d.comb += self.i_lut.ready.eq(~pending)
        with m.If(write & self.i_lut.p.last):
            m.d.sync += pending.eq(1)
            for name, value in pending_settings.items():
                m.d.sync += value.eq(self.i_lut.p[name])

        # Payload registers need no reset: nothing reads them while `valid` is low.
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)
        step = Signal()  # a beat moves from the input into the output register
        m.d.comb += [
            self.i.ready.eq(loaded & (~self.o.valid | self.o.ready)),
            step.eq(self.i.valid & self.i.ready),
        ]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)

        mode = active_settings.get("mode", Const(0))
        codes = self._codes(m, active, swap, mode, write)
        scale_words = self.i.p.scale_words
        with m.If(step):
            exponent = active_settings["layer_exponent"]
            units = [Const(modes.element_exponent(fmt), signed(3)) for fmt in modes.formats]
            m.d.sync += [
                self.o.valid.eq(1),
                beat.layer_exponent.eq(exponent + by_mode(mode, units)),
                beat.last.eq(self.i.p.last),
            ]
            if modes.mode_bits:
                m.d.sync += beat.mode.eq(mode)
            if modes.row_scale:
                m.d.sync += beat.row_scales.eq(self.i.p.row_scales)
            for slot, word in enumerate(scale_words):
                scale = by_mode(mode, [word[: fmt.word.scale.width] for fmt in modes.formats])
                m.d.sync += beat.scales[slot].eq(scale)
            for lane, code in enumerate(codes):
                m.d.sync += beat.codes[lane].eq(code)

        # The boundary between two tensors: the shadow bank takes over, or the input has to wait.
        boundary = Signal()
        m.d.comb += boundary.eq(~loaded | (step & self.i.p.last))
        m.d.comb += swap.eq(boundary & pending)
        with m.If(boundary):
            m.d.sync += loaded.eq(pending)
        with m.If(swap):
            m.d.sync += pending.eq(0)
            if self.lookup in TAKING_TURNS:
                m.d.sync += active.eq(~active)
            for name, value in pending_settings.items():
                m.d.sync += active_settings[name].eq(value)
        return m

    def _codes(
        self, m: Module, active: Value, swap: Value, mode: Value, write: Value
    ) -> list[Value]:
        """Decoded code of every lane."""
        modes = self.modes
        looked_up = self._look_up(m, active, swap, mode, write)
        codes = []
        for lane, index in enumerate(self.i.p.indices):
            promoted = Signal(modes.hif.width, name=f"promoted_{lane}")
            if modes.promotes:
                element = index[: E2M3.width]
                # Each code picks its value; code 0 is 0.
                picked = (
                    Mux(element == number, value, 0)
                    for number, value in enumerate(self._promotions())
                    if value
                )
                m.d.comb += promoted.eq(reduce(or_, picked))
            by_format = [
                looked_up[lane] if fmt.codebooks
                else promoted if fmt.atom == E2M3
                else index[: fmt.index_bits]
                for fmt in modes.formats
            ]  # fmt: skip
            codes.append(by_mode(mode, by_format))
        return codes

    def _promotions(self) -> list[int]:
        """HIF code of every E2M3 code, times 8."""
        values = (E2M3.decode(code).value for code in range(1 << E2M3.width))
        return [self.modes.hif.encode(value * 2**E2M3.mantissa_bits) for value in values]

    def _look_up(
        self, m: Module, active: Value, swap: Value, mode: Value, write: Value
    ) -> list[Value]:
        """LUT entry of every lane."""
        modes = self.modes
        if not modes.codebook_formats:
            return []
        selects = []
        for word in self.i.p.scale_words:
            metabits = [
                word[fmt.word.scale.width] if fmt.word.metabit_bits else Const(0)
                for fmt in modes.formats
            ]
            selects.append(by_mode(mode, metabits))
        slots = [lane * len(selects) // self.lanes for lane in range(self.lanes)]
        if self.lookup == "memory":
            return self._read_memory(m, active, write, [selects[slot] for slot in slots])
        # Lanes share as much as possible: the LUT of a scale word is chosen once, and per lane one
        # entry of that.
        if self.lookup == "two_banks":
            tables = self._tables_in_turn(m, active, write)
        else:
            tables = self._tables(m, swap, write)
        chosen = [
            self._choose(m, f"table_{slot}", select, tables) for slot, select in enumerate(selects)
        ]
        pick = SELECTIONS[self.lookup]
        return [
            pick(m, f"lane_{lane}", chosen[slots[lane]], index[: modes.index_bits])
            for lane, index in enumerate(self.i.p.indices)
        ]

    def _tables(self, m: Module, swap: Value, write: Value) -> list[list[Value]]:
        """Entries of the active bank, by LUT; a swap copies all of the shadow bank into it."""
        tables = []
        for lut in range(self.modes.luts):
            row: list[Value] = []
            for index in range(1 << self.modes.index_bits):
                shadow, entry = (
                    Signal(self.modes.hif.width, name=f"{bank}_{lut}_{index}", reset_less=True)
                    for bank in ("shadow", "active")
                )
                with m.If(self._names(lut, index, write)):
                    m.d.sync += shadow.eq(self.i_lut.p.code)
                with m.If(swap):
                    m.d.sync += entry.eq(shadow)
                row.append(entry)
            tables.append(row)
        return tables

    def _tables_in_turn(self, m: Module, active: Value, write: Value) -> list[list[Value]]:
        """Entries of the active bank, by LUT; each bank is active in every other tensor."""
        width = self.modes.hif.width
        tables = []
        for lut in range(self.modes.luts):
            row: list[Value] = []
            for index in range(1 << self.modes.index_bits):
                here = self._names(lut, index, write)
                banks = [
                    Signal(width, name=f"bank_{bank}_{lut}_{index}", reset_less=True)
                    for bank in range(2)
                ]
                for bank, register in enumerate(banks):
                    with m.If(here & (~active if bank else active)):
                        m.d.sync += register.eq(self.i_lut.p.code)
                code = Signal(width, name=f"active_{lut}_{index}")
                m.d.comb += code.eq(Mux(active, banks[1], banks[0]))
                row.append(code)
            tables.append(row)
        return tables

    def _names(self, lut: int, index: int, write: Value) -> Value:
        """Whether the entry of a LUT is written."""
        entry = self.i_lut.p
        return write & (Cat(entry.index, entry.lut) == (lut << self.modes.index_bits) + index)

    def _read_memory(
        self, m: Module, active: Value, write: Value, selects: list[Value]
    ) -> list[Value]:
        """Entry of every lane, each from a read port: address is index, LUT, bank, lowest first."""
        modes = self.modes
        depth = 2 * modes.luts << modes.index_bits
        m.submodules.banks = banks = Memory(shape=modes.hif.width, depth=depth, init=[])
        port = banks.write_port()
        m.d.comb += [
            port.addr.eq(Cat(self.i_lut.p.index, self.i_lut.p.lut, ~active)),
            port.data.eq(self.i_lut.p.code),
            port.en.eq(write),
        ]
        entries = []
        for index, select in zip(self.i.p.indices, selects, strict=True):
            read = banks.read_port(domain="comb")
            lut = select if modes.luts == 2 else Cat()
            m.d.comb += read.addr.eq(Cat(index[: modes.index_bits], lut, active))
            entries.append(read.data)
        return entries

    @staticmethod
    def _choose(m: Module, name: str, select: Value, tables: list[list[Value]]) -> list[Value]:
        """The LUT that a metabit selects."""
        if len(tables) == 1:
            return tables[0]
        codes = []
        for index, (first, second) in enumerate(zip(*tables, strict=True)):
            code = Signal(len(first), name=f"{name}_{index}")
            m.d.comb += code.eq(Mux(select, second, first))
            codes.append(code)
        return codes
