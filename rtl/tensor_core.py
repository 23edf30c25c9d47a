"""Planes of one tensor after the other in, decoded beats out, without a gap between tensors."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.notation import QuantFormat
from rtl.beat_source import BeatSource, index_piece_bits, scale_piece_bits, slot_weights
from rtl.csr_reader import CsrReader
from rtl.layouts import LAYER_EXPONENT_BITS, lut_write_layout
from rtl.lookup import TAKING_TURNS
from rtl.lut_decoder import LutDecoder
from rtl.modes import Modes, by_mode
from rtl.plane_reader import PLANE_BITS, PlaneReader, plane_word_layout
from rtl.register_slice import cut
from rtl.registers import ERROR_FIELDS
from rtl.row_scales import RowScaleExpander
from rtl.sparse_decoder import SparseDecoder

__all__ = ["CORE_ERRORS", "TensorCore", "plane_widths"]

_SMALL_PLANE_BITS = 32  # bus width of planes with few bits a row

CORE_ERRORS = tuple(
    field.name
    for field in ERROR_FIELDS
    if field.name not in ("start_refused", "lut_refused", "luts_missing", "timeout")
)
"""Flags of ERRORS that the core raises; the others are about registers."""

# Flags of a beat, and what they are in ERRORS.
_BEAT_FLAGS = {
    "reserved": "reserved_code", "overflow": "overflow", "underflow": "underflow",
    "misplaced": "wrong_corrections",
}  # fmt: skip

# Tensors whose first beat was given and whose last one has not left.
_MOST_TENSORS = 2


def _bus_width(bits: int) -> int:
    """The narrowest bus, 32 bits or more, that brings so many bits a clock."""
    return max(32, 1 << (bits - 1).bit_length())


class _Waiting:
    """The tensor that waits, offered to every stage until all have taken it.

    Attributes
    ----------
    values : dict of str to Value
        What it is, and its sizes.
    pending, sized : Signal
        There is one; its sizes are known.
    released : Signal
        All stages have taken it: in this clock it waits no more.
    taken, over : list of Value
        Of each stage: has taken it; is over with the tensor before it.
    """

    def __init__(self, m: Module) -> None:
        self._m = m
        self.values: dict[str, Value] = {}
        self.pending, self.sized, self.released = (
            Signal(name=name) for name in ("pending", "sized", "released")
        )
        self.taken: list[Value] = []
        self.over: list[Value] = []

    def offer(self, name: str, ready: Value, done: Value) -> Value:
        """Offer it to a stage, which takes it in the first clock with ``ready``.

        ``done``: the stage has nothing left of the tensor before.
        """
        m = self._m
        taken = Signal(name=f"taken_{name}")
        with m.If(self.sized & ready):
            m.d.sync += taken.eq(1)
        with m.If(self.released):
            m.d.sync += taken.eq(0)
        self.taken.append(taken)
        self.over.append(taken | done)
        return self.sized & ~taken


def plane_widths(*, lanes: int, modes: Modes, corrections: bool = True) -> dict[str, int]:
    """Bits of ``tdata`` of every input stream, by plane: wide enough for a beat every clock."""
    widths = {
        "indices": _bus_width(max(index_piece_bits(fmt, lanes) for fmt in modes.formats)),
        "scales": _bus_width(max(scale_piece_bits(fmt, lanes) for fmt in modes.formats)),
    }
    small = ["row_scales"] if modes.row_scale else []
    small += ["row_pointers", "columns", "values"] if corrections else []
    return widths | dict.fromkeys(small, _SMALL_PLANE_BITS)


class TensorCore(wiring.Component):
    """Everything that a reset command resets: tensors, planes, decoder.

    A tensor that was started waits while its size is worked out, 33 clocks. Then each stage (each
    plane, source, row scales, corrections, LUTs) takes it as soon as that stage alone is over with
    the tensor before, be it in the very clock of its last beat: tensors that are started in time
    leave without a gap. When all have taken it, the next one may be started.

    Parameters
    ----------
    lanes, modes, lookup
        As :class:`LutDecoder`.
    float_layout : data.StructLayout or None
        As :class:`rtl.sop_decoder_axi.SopDecoderAxi`.

    Members
    -------
    i_indices, i_scales : In(stream.Signature(plane_word_layout))
        Planes; the others are there where :func:`plane_widths` has them.
    i_row_pointers, i_columns, i_values : In(stream.Signature(plane_word_layout))
        Corrections.
    i_row_scales : In(stream.Signature(plane_word_layout))
        Row scales.
    o : Out(stream.Signature(merged_beat_layout))
        Beats of the decoder; without ``float_layout`` :func:`rtl.layouts.hif_beat_layout`.
    lut : In(stream.Signature(lut_write_layout))
        Entries of LUTs; ready until a tensor is started, and again when it has taken them.
    start : In(1)
        A tensor is started; only while ``start_ready``.
    mode, layer_exponent, rows, columns, entries : In(unsigned)
        What it is.
    start_ready : Out(1)
        No tensor waits.
    luts_missing : Out(1)
        Some entry of the LUTs of ``mode`` was not written since the reset, a clock ago.
    busy : Out(1)
        A tensor waits, or is not ``done``.
    left : In(1)
        A tensor's final beat leaves for good in this clock.
    done : Out(1)
        A tensor is over: its final beat has left and all its packets have ended.
    tail : Out(unsigned)
        Lanes in use in a tensor's final beat; valid with it.
    starved : Out(1)
        A beat is missing for lack of input.
    errors : Out(unsigned)
        :data:`CORE_ERRORS`, in the clock in which they are noticed.
    """

    def __init__(
        self, *, lanes: int, modes: Modes, lookup: str, float_layout: data.StructLayout | None
    ) -> None:
        self.lanes = lanes
        self.modes = modes
        self.lookup = lookup
        if float_layout is None:
            self.decode: wiring.Component = LutDecoder(lanes=lanes, modes=modes, lookup=lookup)
        else:
            self.decode = SparseDecoder(
                lanes=lanes, modes=modes, float_layout=float_layout, lookup=lookup
            )
        self.corrections = float_layout is not None
        self.widths = plane_widths(lanes=lanes, modes=modes, corrections=self.corrections)
        planes = {
            f"i_{plane}": In(stream.Signature(plane_word_layout(width=width)))
            for plane, width in self.widths.items()
        }
        super().__init__(
            {
                **planes,
                "o": self.decode.signature.members["o"],
                "lut": In(stream.Signature(lut_write_layout(modes=modes))),
                "start": In(1),
                "mode": In(modes.mode_bits),
                "layer_exponent": In(signed(LAYER_EXPONENT_BITS)),
                "rows": In(32),
                "columns": In(32),
                "entries": In(32),
                "start_ready": Out(1),
                "luts_missing": Out(1),
                "busy": Out(1),
                "left": In(1),
                "done": Out(1),
                "tail": Out(lanes.bit_length()),
                "starved": Out(1),
                "errors": Out(len(CORE_ERRORS)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        modes, lanes = self.modes, self.lanes
        m.submodules.decode = decode = self.decode
        m.submodules.source = source = BeatSource(lanes=lanes, modes=modes)
        # Each is replaced by whoever raises it.
        errors: dict[str, Value] = {name: Const(0) for name in CORE_ERRORS}
        waiting = self._describe(m, errors)
        tensor = waiting.values
        mode, rows = tensor["mode"], tensor["rows"]

        # --- planes -------------------------------------------------------------------------------
        never = Const(0)
        indices = self._read(
            m, errors, "indices", source.index_sizes, mode, tensor["index_bits"], never
        )
        scales = self._read(
            m, errors, "scales", source.scale_sizes, mode, tensor["scale_bits"], never
        )
        for plane, reader in (("indices", indices), ("scales", scales)):
            m.d.comb += reader.begin.eq(waiting.offer(plane, reader.ready, reader.done))
        # A beat waits for all planes: not in the clock in which their readers have to know.
        cut(m, "cut_indices", indices.o, source.i_index)
        cut(m, "cut_scales", scales.o, source.i_scale)
        if modes.row_scale:
            scaled = by_mode(mode, [Const(int(fmt.row_scale)) for fmt in modes.formats])
            scaled_rows = Mux(scaled, rows, 0)
            reader = self._read(
                m, errors, "row_scales", (16,), Const(0, 0), Cat(Const(0, 4), scaled_rows), never
            )
            m.submodules.expand = expand = RowScaleExpander(slots=modes.slots(lanes))
            cut(m, "cut_row_scales", reader.o, expand.i)
            cut(m, "cut_expand", expand.o, source.i_row_scale)
            row_slots = tensor["padded"] >> (slot_weights(modes, lanes).bit_length() - 1)
            m.d.comb += [
                reader.begin.eq(waiting.offer("row_scales", reader.ready, reader.done)),
                expand.begin.eq(waiting.offer("expand", expand.ready, expand.done)),
                expand.rows.eq(scaled_rows),
                expand.row_slots.eq(row_slots),
            ]
        else:
            m.d.comb += source.i_row_scale.valid.eq(1)
        if self.corrections:
            self._correct(m, errors, waiting)

        # --- source and decoder -------------------------------------------------------------------
        under_way = Signal(range(_MOST_TENSORS + 1))
        may_begin = source.ready & (under_way != _MOST_TENSORS)
        begin = waiting.offer("source", may_begin, source.done)
        begins = begin & may_begin
        m.d.comb += [
            source.begin.eq(begins),
            source.mode.eq(mode),
            source.weights.eq(tensor["weights"]),
            self.starved.eq(~source.done & ~source.o.valid & decode.i.ready),
        ]
        m.d.sync += under_way.eq(under_way + begins - self.left)
        connect(m, source.o, decode.i)
        connect(m, decode.o, flipped(self.o))
        step = self.o.valid & self.o.ready
        for flag, name in _BEAT_FLAGS.items():
            if flag in self.o.p.shape().members:
                errors[name] |= step & self.o.p[flag]

        # Each tensor under way has its own tail.
        tails = [Signal.like(self.tail, name=f"tail_{number}") for number in range(_MOST_TENSORS)]
        given, gone = Signal(), Signal()  # which of them is the next
        m.d.comb += self.tail.eq(Mux(gone, tails[1], tails[0]))
        with m.If(source.o.valid & source.o.ready & source.o.p.last):
            m.d.sync += given.eq(~given)
            for number, tail in enumerate(tails):
                with m.If(given == number):
                    m.d.sync += tail.eq(source.tail)
        with m.If(step & self.o.p.last):
            m.d.sync += gone.eq(~gone)

        self._load_luts(m, waiting)
        self._finish(m, waiting)
        m.d.comb += self.errors.eq(Cat(errors.values()))
        return m

    def _describe(self, m: Module, errors: dict[str, Value]) -> _Waiting:
        """The tensor that waits: what was started, and its sizes once ``sized``."""
        modes = self.modes
        settings = {
            "mode": modes.mode_bits, "layer_exponent": signed(LAYER_EXPONENT_BITS),
            "rows": 32, "columns": 32, "entries": 32,
        }  # fmt: skip
        waiting = _Waiting(m)
        pending, sized, started = waiting.pending, waiting.sized, waiting.values
        for name, shape in settings.items():
            started[name] = Signal(shape, name=f"next_{name}")
        multiplying, judging = Signal(), Signal()
        multiplier = Signal(32)
        weights = Signal(33)  # 2**32 or more: too many
        bit = Signal(5)
        m.d.comb += self.start_ready.eq(~pending)
        with m.If(self.start):
            m.d.sync += [value.eq(getattr(self, name)) for name, value in started.items()]
            m.d.sync += [
                pending.eq(1), multiplying.eq(1), multiplier.eq(self.rows), weights.eq(0)
            ]  # fmt: skip

        mode, columns = started["mode"], started["columns"]
        blocks = [(fmt.block_size - 1).bit_length() for fmt in modes.formats]
        padded = Signal(32)
        rounded = [
            Cat(Const(0, shift), (columns + ((1 << shift) - 1))[shift:32]) for shift in blocks
        ]
        m.d.comb += padded.eq(by_mode(mode, rounded))
        with m.If(multiplying):
            # From the highest bit of the number of rows down; once too large it stays so.
            total = Signal(34)
            m.d.comb += total.eq((weights[:32] << 1) + Mux(multiplier[-1], padded, 0))
            m.d.sync += [
                weights.eq(Cat(total[:32], total[32:].any() | weights[32])),
                multiplier.eq(multiplier << 1),
                bit.eq(bit + 1),
                multiplying.eq(~bit.all()),
                judging.eq(bit.all()),
            ]
        index_bits, scale_bits = Signal(PLANE_BITS), Signal(PLANE_BITS)
        wide = Signal()  # columns of corrections are stored as uint32, else as uint16
        # Padded columns are less than columns only if they do not fit 32 bits.
        impossible = weights[32] | (padded < columns)
        errors["too_large"] = judging & impossible
        with m.If(judging):
            elements = [weights[:32] * fmt.index_bits for fmt in modes.formats]
            words = [
                weights[shift:32] * fmt.word.width
                for shift, fmt in zip(blocks, modes.formats, strict=True)
            ]
            m.d.sync += [
                judging.eq(0),
                pending.eq(~impossible),
                sized.eq(~impossible),
                index_bits.eq(by_mode(mode, elements)),
                scale_bits.eq(by_mode(mode, words)),
                wide.eq(columns > 1 << 16),
            ]

        # A stage takes it once; when all have, the next one may be started.
        with m.If(waiting.released):
            m.d.sync += [pending.eq(0), sized.eq(0)]
        waiting.values |= {
            "padded": padded, "weights": weights[:32],
            "index_bits": index_bits, "scale_bits": scale_bits, "wide": wide,
        }  # fmt: skip
        return waiting

    def _read(
        self,
        m: Module,
        errors: dict[str, Value],
        plane: str,
        sizes: tuple[int, ...],
        size: Value,
        bits: Value,
        finish: Value,
    ) -> PlaneReader:
        """The reader of a plane."""
        reader = PlaneReader(width=self.widths[plane], sizes=sizes)
        m.submodules[f"read_{plane}"] = reader
        connect(m, flipped(getattr(self, f"i_{plane}")), reader.i)
        m.d.comb += [reader.size.eq(size), reader.bits.eq(bits), reader.finish.eq(finish)]
        errors[f"short_{plane}"] = reader.short
        errors[f"long_{plane}"] = reader.long
        return reader

    def _correct(self, m: Module, errors: dict[str, Value], waiting: _Waiting) -> None:
        """Corrections: three planes and what joins them are one stage."""
        tensor = waiting.values
        rows, columns, entries = (tensor[name] for name in ("rows", "columns", "entries"))
        m.submodules.csr = csr = CsrReader()
        wide = tensor["wide"]
        pointer_bits = Mux(entries.any(), Cat(Const(0, 5), rows + 1), 0)
        column_bits = Mux(wide, entries << 5, entries << 4)
        one_size, finish = Const(0, 0), csr.done
        pointers = self._read(m, errors, "row_pointers", (32,), one_size, pointer_bits, finish)
        numbers = self._read(m, errors, "columns", (16, 32), wide, column_bits, finish)
        values = self._read(m, errors, "values", (16,), one_size, entries << 4, finish)
        done = csr.done & pointers.done & numbers.done & values.done
        # A clock later than it could be: four parts that wait for each other are a long way.
        ended = Signal()
        begin = waiting.offer("corrections", ended, done) & ended
        m.d.sync += ended.eq(done & ~begin)
        # What the part that joins them does not want any more is dropped here and in the readers.
        for name, reader, sink in (
            ("row_pointers", pointers, csr.i_pointer),
            ("columns", numbers, csr.i_column),
            ("values", values, csr.i_value),
        ):
            cut(m, f"cut_{name}", reader.o, sink, clear=finish)
        cut(m, "cut_entries", csr.o, self.decode.i_entry)
        m.d.comb += [
            *(part.begin.eq(begin) for part in (csr, pointers, numbers, values)),
            csr.rows.eq(rows),
            csr.columns.eq(columns),
            csr.row_weights.eq(tensor["padded"]),
            csr.entries.eq(entries),
        ]
        errors["wrong_corrections"] = csr.wrong

    def _load_luts(self, m: Module, waiting: _Waiting) -> None:
        """LUT writes; what completes the LUTs of a tensor is their latest write, once more."""
        decode = self.decode
        activate = waiting.offer("luts", decode.i_lut.ready, Const(1))
        latest, activation = Signal(self.lut.p.shape()), Signal(self.lut.p.shape())
        m.d.comb += [
            activation.index.eq(latest.index),
            activation.lut.eq(latest.lut),
            activation.code.eq(latest.code),
            activation.layer_exponent.eq(waiting.values["layer_exponent"]),
            activation.last.eq(1),
            decode.i_lut.p.eq(Mux(activate, activation, self.lut.p)),
            decode.i_lut.valid.eq(activate | (self.lut.valid & self.lut.ready)),
            self.lut.ready.eq(decode.i_lut.ready & ~waiting.pending),
        ]
        if self.modes.mode_bits:
            m.d.comb += activation.mode.eq(waiting.values["mode"])
        with m.If(self.lut.valid & self.lut.ready):
            m.d.sync += latest.eq(self.lut.p)
        self._watch_luts(m, activate & decode.i_lut.ready)

    def _watch_luts(self, m: Module, activated: Value) -> None:
        """Which entries were written since the reset, in each bank where banks take turns.

        Entries have no reset, so that nothing else would tell those that hold something.
        """
        modes = self.modes
        turns = self.lookup in TAKING_TURNS
        bank = Signal(name="lut_bank")  # the one that is written
        if turns:
            with m.If(activated):
                m.d.sync += bank.eq(~bank)
        place = Cat(self.lut.p.index, self.lut.p.lut)
        banks = [
            Signal(modes.luts << modes.index_bits, name=f"luts_written_{number}")
            for number in range(1 + turns)
        ]
        for number, written in enumerate(banks):
            with m.If(self.lut.valid & self.lut.ready & (bank == number)):
                m.d.sync += [entry.eq(entry | (place == at)) for at, entry in enumerate(written)]
        current = Mux(bank, banks[-1], banks[0]) if turns else banks[0]
        complete = [
            self._needed(fmt, current).all() if fmt.codebooks else Const(1) for fmt in modes.formats
        ]
        m.d.sync += self.luts_missing.eq(~by_mode(self.mode, complete))

    def _needed(self, fmt: QuantFormat, written: Value) -> Value:
        """Of a bit for each entry those of the LUTs of a format."""
        stride = 1 << self.modes.index_bits
        return Cat(
            written[lut * stride : lut * stride + fmt.lut_entries]
            for lut in range(len(fmt.codebooks))
        )

    def _finish(self, m: Module, waiting: _Waiting) -> None:
        """Tensors are over one after the other, once all stages are and the final beat has left."""
        reading = Signal()  # the latest tensor that all stages took is not over in one of them
        # Tensors that are over in all stages, and that have left, but are not both.
        read, left = (
            Signal(range(_MOST_TENSORS + 1), name=f"{name}_only") for name in ("read", "left")
        )
        now_read = reading & Cat(waiting.over).all()
        m.d.comb += [
            waiting.released.eq(waiting.sized & Cat(waiting.taken).all()),
            self.done.eq(read.any() & left.any()),
            self.busy.eq(waiting.pending | reading | read.any()),
        ]
        # `reading` is that of the tensor before while stages take the one that waits.
        m.d.sync += [
            reading.eq((reading & ~now_read) | waiting.released),
            read.eq(read + now_read - self.done),
            left.eq(left + self.left - self.done),
        ]
