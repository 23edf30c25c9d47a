"""The decoder as a peripheral: AXI4-Stream in and out, AXI4-Lite registers, an interrupt."""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect

from rtl.axi_lite import AxiLiteBridge, axi_lite_members
from rtl.identity import build_text, format_text, identification
from rtl.layouts import FLOAT32, LAYER_EXPONENT_BITS
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import Modes, by_mode
from rtl.parts.axi_stream import AxiStream
from rtl.plane_reader import plane_word_layout
from rtl.register_slice import RegisterSlice
from rtl.registers import (
    ADDRESS_BITS,
    LUT_WINDOW,
    OUTPUTS,
    REGISTERS,
    Register,
    register,
)
from rtl.tensor_core import CORE_ERRORS, TensorCore

__all__ = ["SopDecoderAxi"]

_OUTPUTS = {23: "float32", 7: "bfloat16"}  # by mantissa bits


@dataclass(frozen=True)
class _Commands:
    """Reset and stop, where they are given, and the states that a stop leads to."""

    reset: Value
    stop: Value
    stopping: Value
    stopped: Value


class SopDecoderAxi(wiring.Component):
    """Planes of a file in over AXI4-Stream, weights out; registers over AXI4-Lite.

    Each plane of a tensor is one packet on a stream of its own, byte for byte as the file has it:
    ``tdata`` words are full, lowest byte first, up to the final one, whose bytes after the plane
    are ignored, and which has ``tlast``. One word a clock brings one beat a clock. Registers and
    what they do are in :mod:`rtl.registers`; a tensor runs once START is written and may be
    started, with its LUTs, while the one before it runs.

    A packet that ends early is continued with zeros, the rest of one that is too long is dropped,
    wrong corrections are left out, and ERRORS tells. It waits without limit only for words, for
    the ``tlast`` of a packet, and for a receiver; TIMEOUT tells, and STOP ends it.

    Output: ``tdata`` of floats is ``lanes`` values, rows one after the other with their padding;
    ``tkeep`` of the final beat leaves out the lanes after the end. Without ``float_layout`` it is
    ``lanes`` codes of 8 bits (16 if an atom has more than 8), then a scale code of 16 bits for each
    scale word, then as many row scales if a format has them, ``tuser`` is the layer exponent (16
    bits, two's complement) and above it the mode, and there is no ``tkeep``.

    Parameters
    ----------
    lanes, modes, lookup
        As :class:`LutDecoder`.
    float_layout : data.StructLayout or None
        ``FLOAT32`` or ``BFLOAT16``; None gives codes and scales, and takes no corrections.

    Members
    -------
    s_axil : In(AXI4-Lite)
        Registers.
    s_axis_indices, s_axis_scales : In(AXI4-Stream)
        Elements and scale words.
    s_axis_row_scales : In(AXI4-Stream)
        If a format has row scales.
    s_axis_row_pointers, s_axis_columns, s_axis_values : In(AXI4-Stream)
        Corrections, with ``float_layout``; no packets for a tensor without corrections.
    m_axis : Out(AXI4-Stream)
        Decoded beats; ``tlast`` on the final one of a tensor.
    irq : Out(1)
        Level; high while an enabled bit of IRQ_STATUS is set.
    """

    def __init__(
        self,
        *,
        lanes: int,
        modes: Modes,
        lookup: str = DEFAULT_LOOKUP,
        float_layout: data.StructLayout | None = FLOAT32,
    ) -> None:
        self.core = TensorCore(lanes=lanes, modes=modes, float_layout=float_layout, lookup=lookup)
        self.lanes = lanes
        self.modes = modes
        self.float_layout = float_layout
        self._out_shape = self._output_layout()
        self._inputs = {
            plane: AxiStream(f"s_axis_{plane}", width) for plane, width in self.core.widths.items()
        }
        widths = {name: field.width for name, field in self._out_shape if name != "last"}
        self._output = AxiStream("m_axis", **widths)
        ports = axi_lite_members("s_axil", ADDRESS_BITS)
        for stream in self._inputs.values():
            ports |= stream.members(In)
        ports |= self._output.members(Out)
        super().__init__({**ports, "irq": Out(1)})

    def _output_layout(self) -> data.StructLayout:
        lanes, modes = self.lanes, self.modes
        if self.float_layout is not None:
            width = lanes * self.float_layout.size
            return data.StructLayout({"data": width, "keep": width // 8, "last": 1})
        words = modes.slots(lanes) * (1 + modes.row_scale)
        user = LAYER_EXPONENT_BITS * 2 + modes.mode_bits
        codes = lanes * self.code_bits
        return data.StructLayout({"data": codes + 16 * words, "user": user, "last": 1})

    @property
    def output(self) -> str:
        """What comes out, one of :data:`rtl.registers.OUTPUTS`."""
        return (
            "codes" if self.float_layout is None else _OUTPUTS[self.float_layout["mantissa"].width]
        )

    @property
    def identity(self) -> str:
        """Text whose hash is BUILD_ID."""
        modes = self.modes
        return build_text(
            modes.formats, lut_entry=modes.hif.name, lanes=self.lanes, output=self.output
        )

    @property
    def code_bits(self) -> int:
        """Bits that a code takes on the output without ``float_layout``: whole bytes."""
        return 8 if self.modes.code_bits <= 8 else 16

    def elaborate(self, platform):
        m = Module()
        core_reset = Signal()  # in reset all inputs are ready, and what they bring is dropped
        stop = Signal(name="stop_command")  # then everything but the output is held in reset
        stopping, reset = Signal(name="stopping"), Signal(name="reset_command")
        commands = _Commands(reset, stop, stopping, stopped=Signal(name="stopped"))
        m.d.comb += core_reset.eq(reset | stop | stopping)
        m.d.sync += stopping.eq((stopping | stop) & ~reset)
        core = self.core
        m.submodules.core = ResetInserter(core_reset)(core)
        for plane, width in core.widths.items():
            cut = RegisterSlice(shape=plane_word_layout(width=width))
            m.submodules[f"slice_{plane}"] = ResetInserter(core_reset)(cut)
            port = self._inputs[plane].ports(self)
            m.d.comb += [
                cut.i.p.data.eq(port.data),
                cut.i.p.last.eq(port.last),
                cut.i.valid.eq(port.valid),
                port.ready.eq(cut.i.ready),
            ]
            connect(m, cut.o, getattr(core, f"i_{plane}"))
        out = RegisterSlice(shape=self._out_shape)
        m.submodules.slice_out = ResetInserter(reset)(out)
        self._connect_output(m, out, commands)
        self._registers(m, commands)
        return m

    def _connect_output(self, m: Module, out: RegisterSlice, commands: _Commands) -> None:
        beat, port = self.core.o.p, self._output.ports(self)
        # After a stop a packet that has begun gets one more beat, its last one, without values.
        inside, stopping = Signal(name="packet_begun"), commands.stopping
        with m.If(out.i.valid & out.i.ready):
            m.d.sync += inside.eq(~out.i.p.last)
        with m.If(commands.reset):
            m.d.sync += inside.eq(0)
        m.d.comb += [
            commands.stopped.eq(stopping & ~inside & ~port.valid),
            out.i.valid.eq(Mux(stopping, inside, self.core.o.valid)),
            self.core.o.ready.eq(out.i.ready),
            out.i.p.last.eq(beat.last | stopping),
            self.core.left.eq(port.moves & port.last),
            port.data.eq(out.o.p.data),
            port.last.eq(out.o.p.last),
            port.valid.eq(out.o.valid),
            out.o.ready.eq(port.ready),
        ]
        if self.float_layout is not None:
            assert port.keep is not None
            width = self.float_layout.size // 8
            used = [
                (~beat.last | (self.core.tail > lane)) & ~stopping for lane in range(self.lanes)
            ]
            m.d.comb += [
                out.i.p.data.eq(beat["values"]),
                out.i.p.keep.eq(Cat(bit.replicate(width) for bit in used)),
                port.keep.eq(out.o.p.keep),
            ]
            return
        padded = [_extended(Value.cast(code), self.code_bits) for code in beat.codes]
        padded += [_extended(scale, 16) for scale in beat.scales]
        if self.modes.row_scale:
            padded += [scale.as_value() for scale in beat.row_scales]
        mode = beat.mode if self.modes.mode_bits else Cat()
        exponent = Signal(signed(2 * LAYER_EXPONENT_BITS))
        assert port.user is not None
        m.d.comb += [
            exponent.eq(beat.layer_exponent),
            out.i.p.data.eq(Cat(padded)),
            out.i.p.user.eq(Cat(exponent, mode)),
            port.user.eq(out.o.p.user),
        ]

    def _registers(self, m: Module, commands: _Commands) -> None:
        core, modes = self.core, self.modes
        m.submodules.bridge = bridge = AxiLiteBridge(address_bits=ADDRESS_BITS)
        for name in axi_lite_members("axi", ADDRESS_BITS):
            ours = getattr(self, f"s_axil{name.removeprefix('axi')}")
            theirs = getattr(bridge, name)
            into = self.signature.members[f"s_axil{name.removeprefix('axi')}"].flow is In
            m.d.comb += theirs.eq(ours) if into else ours.eq(theirs)

        write = Signal()  # a register, not a LUT entry, is written in this clock
        data_word = bridge.write_data
        mask = Cat(bit.replicate(8) for bit in bridge.write_strobe)
        enabled_word = Signal(32)
        m.d.comb += enabled_word.eq(data_word & mask)

        def written(item: Register) -> Value:
            return write & (bridge.write_address[2:] == item.address >> 2)

        values = {item.name: Signal(32, name=f"register_{item.name}") for item in REGISTERS}
        known = values["MODE"] < len(modes.formats)
        formats = [Const(identification(format_text(fmt)), 32) for fmt in modes.formats]
        constants: dict[str, int | Value] = {
            "BUILD_ID": identification(self.identity),
            "FORMAT_ID": Mux(known, by_mode(values["MODE"], formats), 0),
        }
        for item in REGISTERS:
            reset = sum(field.reset << field.lowest for field in item.fields)
            used = sum(field.mask for field in item.fields)
            if item.access == "ro":
                m.d.comb += values[item.name].eq(constants.get(item.name, reset))
            elif item.access == "rw":
                old = values[item.name]
                with m.If(written(item)):
                    m.d.sync += old.eq(((old & ~mask) | enabled_word) & used)

        # --- what reads as a constant or as a state -----------------------------------------------
        config = {
            "lanes": self.lanes, "formats": len(modes.formats), "lut_index_bits": modes.index_bits,
            "luts": modes.luts, "output": OUTPUTS.index(self.output),
        }  # fmt: skip
        lut_ready = core.lut.ready & ~commands.stopping
        start_ready = core.start_ready & ~commands.stopping
        status = {
            "busy": core.busy, "start_ready": start_ready, "lut_ready": lut_ready,
            "stopped": commands.stopped,
        }  # fmt: skip
        for name, parts in (("CONFIG", config), ("STATUS", status)):
            for field in register(name).fields:
                target = values[name][field.lowest : field.lowest + field.width]
                m.d.comb += target.eq(parts[field.name])

        # --- commands -----------------------------------------------------------------------------
        command = {
            field.name: Signal(name=f"command_{field.name}") for field in register("CONTROL").fields
        }
        asked = Cat(written(register("CONTROL")) & enabled_word[at] for at in range(len(command)))
        m.d.comb += Cat(command.values()).eq(asked)
        several = (asked & (asked - 1)[: len(asked)]).any()
        shaped = values["ROWS"].any() & values["COLUMNS"].any()
        acceptable = start_ready & known & shaped & ~several
        if not core.corrections:
            acceptable &= ~values["CORRECTIONS"].any()
        start_refused, luts_missing = Signal(), Signal()
        m.d.comb += [
            start_refused.eq(command["start"] & ~acceptable),
            luts_missing.eq(command["start"] & acceptable & core.luts_missing),
            core.start.eq(command["start"] & acceptable & ~core.luts_missing),
            commands.reset.eq(command["reset"] & ~several),
            commands.stop.eq(command["stop"] & ~several),
            core.mode.eq(values["MODE"]),
            core.layer_exponent.eq(values["LAYER_EXPONENT"][:LAYER_EXPONENT_BITS]),
            core.rows.eq(values["ROWS"]),
            core.columns.eq(values["COLUMNS"]),
            core.entries.eq(values["CORRECTIONS"]),
        ]

        # --- LUT window: one entry a clock --------------------------------------------------------
        entries = modes.luts << modes.index_bits
        byte = Signal(2)
        codes = [data_word[low : low + 8] for low in range(0, 32, 8)]
        address = bridge.write_address
        in_window = address[LUT_WINDOW.bit_length() - 1 :] == 1
        place = Cat(byte, address[2 : LUT_WINDOW.bit_length() - 1])
        lut_error = Signal()
        lut_done = Signal()
        m.d.comb += [
            core.lut.p.index.eq(place[: modes.index_bits]),
            core.lut.p.code.eq(by_mode(byte, codes)[: modes.hif.width]),
            core.lut.p.layer_exponent.eq(0),
        ]
        if modes.luts == 2:
            m.d.comb += core.lut.p.lut.eq(place[modes.index_bits])
        strobe = by_mode(byte, list(bridge.write_strobe))
        with m.If(bridge.write & in_window):
            m.d.comb += core.lut.valid.eq(strobe & (place < entries))
            m.d.sync += byte.eq(byte + 1)
            m.d.comb += [
                lut_error.eq(strobe & (~lut_ready | (place >= entries))),
                lut_done.eq(byte.all() | lut_error),
            ]
            with m.If(lut_done):
                m.d.sync += byte.eq(0)

        # --- flags and counters -------------------------------------------------------------------
        raised = {
            "start_refused": start_refused, "lut_refused": lut_error, "luts_missing": luts_missing,
            "timeout": self._timeout(m, values["TIMEOUT"], written(register("TIMEOUT"))),
        }  # fmt: skip
        raised |= dict(zip(CORE_ERRORS, core.errors, strict=True))
        errors = register("ERRORS")
        clear = Mux(written(errors), enabled_word, 0)
        flags = values["ERRORS"]
        for field in errors.fields:
            bit = flags[field.lowest]
            m.d.sync += bit.eq((bit & ~clear[field.lowest]) | raised[field.name])
        status_register = register("IRQ_STATUS")
        interrupts = values["IRQ_STATUS"]
        done = Signal()
        cleared = written(status_register) & enabled_word[0]
        m.d.sync += done.eq((done & ~cleared) | core.done)
        m.d.comb += interrupts.eq(Cat(done, (flags & values["ERROR_ENABLE"]).any()))
        m.d.sync += self.irq.eq((interrupts & values["IRQ_ENABLE"]).any())
        out = self._output.ports(self)
        counts = {
            "TENSORS": core.done, "BEATS": out.moves, "INPUT_WAITS": core.starved,
            "OUTPUT_WAITS": out.valid & ~out.ready,
        }  # fmt: skip
        for name, event in counts.items():
            counter = Signal(32, name=f"count_{name.lower()}")
            m.d.sync += counter.eq(counter + event)
            m.d.comb += values[name].eq(counter)

        # --- answers ------------------------------------------------------------------------------
        refused = start_refused | luts_missing | several
        writable = [item for item in REGISTERS if item.access != "ro"]
        hit = Cat(bridge.write_address[2:] == item.address >> 2 for item in writable).any()
        m.d.comb += [
            write.eq(bridge.write & ~in_window),
            bridge.write_done.eq(Mux(in_window, lut_done, 1)),
            bridge.write_refused.eq(Mux(in_window, lut_error, ~hit | refused)),
            bridge.read_refused.eq(1),
        ]
        with m.Switch(bridge.read_address[2:]):
            for item in REGISTERS:
                with m.Case(item.address >> 2):
                    m.d.comb += bridge.read_refused.eq(0)
                    m.d.comb += bridge.read_data.eq(values[item.name])

    def _timeout(self, m: Module, limit: Value, written: Value) -> Value:
        """Nothing has moved on any stream for so many clocks while a tensor is under way."""
        streams = (self._output, *self._inputs.values())
        moves = Cat(stream.ports(self).moves for stream in streams).any()
        clocks = Signal(32, name="quiet_clocks")
        quiet = self.core.busy & ~moves & ~written
        m.d.sync += clocks.eq(Mux(quiet, clocks + 1, 0))
        reached = Signal(name="timeout_reached")
        m.d.comb += reached.eq(quiet & limit.any() & (clocks == limit))
        return reached


def _extended(value: Value, width: int) -> Value:
    """With zeros above it."""
    return Cat(value, Const(0, width - len(value)))
