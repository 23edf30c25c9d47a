"""Memories of the outputs of a tile, and where in them the outputs of a row are."""

from collections.abc import Sequence
from typing import Any

from amaranth.hdl import Const, Module, Mux, Signal, Value
from amaranth.lib.memory import Memory

from rtl.parts.choice import pick
from rtl.parts.pipeline import delayed
from rtl.sop_tile import TileShape

__all__ = ["Banks", "EpilogueShape", "Targets"]


class EpilogueShape(TileShape):
    """Also where the outputs of a row are: in which banks, at which addresses.

    Bank u, address s has what the scale unit u gives in step s. An adder serves ``banks_per_lane``
    banks, of which only one has outputs of any one row; a correction takes ``turns`` clocks, which
    is one unless a bank has several outputs of a row.

    Attributes
    ----------
    lanes : int
        Adders: one a token, or one a bank where banks have several tokens.
    banks_per_lane, turns : int
    """

    def __init__(self, rows: int, columns: int, block_size: int) -> None:
        super().__init__(rows, columns, block_size)
        self.banks_per_lane = 1 if rows % self.used else rows // self.used
        self.lanes = self.units // self.banks_per_lane
        # By lane and row: bank of the lane, address and column.
        self._targets: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for unit in range(self.units):
            lane, bank = divmod(unit, self.banks_per_lane)
            for step in range(self.used):
                place = self.place(unit, step)
                if place is not None:
                    outputs = self._targets.setdefault((lane, place[0]), [])
                    outputs.append((bank, step, place[1]))
        self.turns = max(map(len, self._targets.values()))

    def target(self, lane: int, row: int, turn: int) -> tuple[int, int, int] | None:
        """Bank of the lane, address and column of an output of a row; None where it has none."""
        outputs = self._targets.get((lane, row), [])
        return outputs[turn] if turn < len(outputs) else None


class Banks:
    """Memories of the outputs; each has one port to read and one to write.

    ``step`` and ``leaves``: what is read while outputs leave; ``values`` is what they are then.
    """

    def __init__(self, m: Module, shape: EpilogueShape) -> None:
        self._m, self._shape = m, shape
        self.step, self.leaves = Signal(range(shape.used)), Signal(name="banks_leave")
        self._ports, self.values = [], []
        for unit in range(shape.units):
            memory = Memory(shape=32, depth=shape.used, init=[])
            m.submodules[f"bank_{unit}"] = memory
            read, write = memory.read_port(domain="comb"), memory.write_port()
            self._ports.append((read, write))
            # Only the last bank may have steps without an output.
            there = sum(shape.place(unit, step) is not None for step in range(shape.used))
            value = read.data if there == shape.used else Mux(self.step < there, read.data, 0)
            self.values.append(value)

    def _of_lane(self, lane: int) -> Sequence[tuple[Any, Any]]:
        count = self._shape.banks_per_lane
        return self._ports[lane * count : (lane + 1) * count]

    def fill(self, valid: Value, address: Value, values: Sequence[Value]) -> None:
        """Write a beat."""
        for (_, write), value in zip(self._ports, values, strict=True):
            self._m.d.comb += [write.addr.eq(address), write.data.eq(value), write.en.eq(valid)]

    def read_at(self, lane: int, address: Value) -> None:
        """What the banks of a lane give, unless the outputs leave."""
        for read, _ in self._of_lane(lane):
            self._m.d.comb += read.addr.eq(Mux(self.leaves, self.step, address))

    def before(self, lane: int, bank: Value) -> Value:
        """The value in one of the lane's banks."""
        values = [read.data for read, _ in self._of_lane(lane)]
        if len(values) == 1:
            return values[0]
        chosen = Signal(32, name=f"before_{lane}")
        self._m.d.comb += chosen.eq(pick(values, bank))
        return chosen

    def add(self, lane: int, valid: Value, bank: Value, address: Value, value: Value) -> None:
        """Write a sum into one of the lane's banks."""
        for number, (_, write) in enumerate(self._of_lane(lane)):
            with self._m.If(valid & (bank == number)):
                self._m.d.comb += [write.addr.eq(address), write.data.eq(value), write.en.eq(1)]


class Targets:
    """Where the outputs of a correction are, by lane, so many clocks after it came.

    ``key`` is its turn and, above that, its row; ``valid`` whether it came, one clock ago and more.
    What is the same for several lanes exists once.
    """

    def __init__(
        self, m: Module, shape: EpilogueShape, rows: int, key: Value, valid: Sequence[Value]
    ) -> None:
        self._m, self._key, self._valid = m, key, valid
        turn_bits = (shape.turns - 1).bit_length()
        self._places = [
            {
                turn | row << turn_bits: shape.target(lane, row, turn)
                for row in range(rows)
                for turn in range(shape.turns)
            }
            for lane in range(shape.lanes)
        ]
        self._known: dict[tuple[tuple[int, int], ...], list[Value]] = {}

    def _stages(self, name: str, numbers: dict[int, int]) -> list[Value]:
        """A number for each key, from the clock of the correction on; any number for others."""
        known = tuple(numbers.items())
        if known not in self._known:
            start = Signal(range(max(numbers.values()) + 1), name=f"{name}_{len(self._known)}")
            if len(set(numbers.values())) == 1:
                start = Const(known[0][1])
                self._known[known] = [start] * (len(self._valid) + 1)
                return self._known[known]
            constants = {number: Const(number, len(start)) for number in numbers.values()}
            values = [
                constants[numbers[key]] if key in numbers else None
                for key in range(max(numbers) + 1)
            ]
            self._m.d.comb += start.eq(pick(values, self._key))
            later = delayed(self._m, start, len(self._valid), advance=Const(1), name=start.name)
            self._known[known] = [start, *later]
        return self._known[known]

    def _part(self, name: str, lane: int, place: int) -> list[Value]:
        targets = self._places[lane]
        return self._stages(name, {key: to[place] for key, to in targets.items() if to})

    def bank(self, lane: int, clocks: int) -> Value:
        """Number of the bank among the lane's."""
        return self._part("bank", lane, 0)[clocks]

    def address(self, lane: int, clocks: int) -> Value:
        """Address in it."""
        return self._part("address", lane, 1)[clocks]

    def column(self, lane: int) -> Value:
        """Token, when what was kept for the correction is there."""
        return self._part("token", lane, 2)[1]

    def writes(self, lane: int) -> Value:
        """The lane has an output of that row, and its sum is there."""
        there = {key: int(to is not None) for key, to in self._places[lane].items()}
        return self._valid[-1] & self._stages("there", there)[-1]
