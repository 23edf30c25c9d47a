"""Registers in a row: behind one enable, or with a valid/ready handshake between each two."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from amaranth.hdl import Module, Signal, Value
from amaranth.lib.wiring import FlippedInterface

__all__ = ["Handshakes", "delayed", "register", "stepped"]


def register(m: Module, value: Value, *, advance: Value, name: str, reset: bool = False) -> Value:
    """A register of that name, which takes the value in each clock with ``advance``.

    Parameters
    ----------
    m : Module
        Gets the register.
    value : Value
    advance : Value
    name : str
    reset : bool
        Whether a reset clears it.
    """
    held: Value = Signal(value.shape(), name=name, reset_less=not reset)
    with m.If(advance):
        m.d.sync += held.eq(value)
    return held


def delayed(
    m: Module, value: Value, clocks: int, *, advance: Value, name: str, reset: bool = False
) -> list[Value]:
    """A value after each of so many clocks with ``advance``.

    Parameters
    ----------
    m : Module
        Gets the registers.
    value : Value
    clocks : int
        0 or more.
    advance : Value
        All registers move in this clock.
    name : str
        Prefix of their names.
    reset : bool
        Whether a reset clears them.

    Returns
    -------
    stages : list of Value
        The first is one clock old.
    """
    stages = []
    for number in range(clocks):
        value = register(m, value, advance=advance, name=f"{name}_{number}", reset=reset)
        stages.append(value)
    return stages


def stepped(
    m: Module,
    value: Value,
    steps: Sequence[Callable[[Module, Value], Value]],
    *,
    advance: Value,
    name: str,
) -> Value:
    """Steps of a computation, each of which finds its operand in a register.

    Parameters
    ----------
    m : Module
        Gets the logic.
    value : Value
        Operand of the first step.
    steps : sequence of callable
        Each adds its logic to the module and gives the operand of the next one.
    advance : Value
        All registers move in this clock.
    name : str
        Prefix of their names.

    Returns
    -------
    result : Value
        Of the last step, which has no register yet.
    """
    for number, step in enumerate(steps):
        value = step(m, register(m, value, advance=advance, name=f"{name}_{number}"))
    return value


class Handshakes:
    """Handshakes of a pipeline whose stages each hold a word or nothing.

    A stage takes a word whenever it is empty or its own word moves on, so bubbles close up while
    the output is stalled. Latency ``stages`` clocks, throughput 1 word per clock. Drives ``valid``
    of ``o``, a register, and ``ready`` of ``i``.

    Parameters
    ----------
    m : Module
        Gets the logic.
    i, o : streams
        Ends of the pipeline; the last stage is the payload of ``o``.
    stages : int
        At least 2.
    """

    def __init__(self, m: Module, i: FlippedInterface, o: FlippedInterface, stages: int) -> None:
        valid = [Signal(name=f"valid_{stage}") for stage in range(stages - 1)]
        ready = [Signal(name=f"ready_{stage}") for stage in range(stages - 1)]
        m.d.comb += [
            ready[-1].eq(~o.valid | o.ready),
            *(
                ready[stage - 1].eq(~valid[stage] | ready[stage])
                for stage in reversed(range(1, stages - 1))
            ),
            i.ready.eq(~valid[0] | ready[0]),
        ]
        self._m = m
        self._valid = [i.valid, *valid, o.valid]
        self._ready = [i.ready, *ready, o.ready]

    @contextmanager
    def stage(self, number: int) -> Iterator[None]:
        """Statements for when stage ``number``, 0 the first, takes a word; once for each stage."""
        m, valid, ready = self._m, self._valid[number + 1], self._ready[number + 1]
        with m.If(ready):
            m.d.sync += valid.eq(0)
        with m.If(self._valid[number] & self._ready[number]):
            m.d.sync += valid.eq(1)
            yield
