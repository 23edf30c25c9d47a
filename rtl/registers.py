"""The registers of :class:`rtl.sop_decoder_axi.SopDecoderAxi`: the one table of them.

Hardware, testbench, C header and register map are all made from it.
"""

from dataclasses import dataclass

__all__ = [
    "ADDRESS_BITS",
    "IDENTIFICATION",
    "LUT_WINDOW",
    "MAP_VERSION",
    "OF_THE_BUILD",
    "OUTPUTS",
    "PLANES",
    "REGISTERS",
    "Field",
    "Register",
    "register",
]

ADDRESS_BITS = 12
LUT_WINDOW = 0x400
"""Address of the first LUT entry; one byte an entry, as in the file."""

IDENTIFICATION = 0x534F5044  # "SOPD"
MAP_VERSION = (1, 1)
"""Major and minor: a new major version breaks drivers."""

OUTPUTS = ("float32", "bfloat16", "codes")
"""What comes out, by ``CONFIG.output``."""

OF_THE_BUILD = ("CONFIG", "BUILD_ID", "FORMAT_ID")
"""Registers whose values each configuration of the hardware has of its own."""

PLANES = ("indices", "scales", "row_scales", "row_pointers", "columns", "values")
"""Planes of a tensor, each with a stream of its own."""


@dataclass(frozen=True)
class Field:
    """Bits of a register. ``reset`` is the value after reset."""

    name: str
    lowest: int
    width: int
    text: str
    reset: int = 0

    @property
    def mask(self) -> int:
        """Its bits in the register."""
        return ((1 << self.width) - 1) << self.lowest


@dataclass(frozen=True)
class Register:
    """A register of 32 bits; bits that no field has read as 0 and ignore writes.

    ``access`` is ``"ro"`` (writes are refused), ``"rw"``, ``"w1c"`` (writing 1 clears a bit) or
    ``"wo"`` (reads as 0; writing 1 does what the field says).
    """

    name: str
    address: int
    access: str
    text: str
    fields: tuple[Field, ...]


def _word(text: str, reset: int = 0) -> tuple[Field, ...]:
    return (Field("value", 0, 32, text, reset),)


def _error_fields() -> tuple[Field, ...]:
    single = (
        (
            "start_refused",
            "START while another tensor waited or after a stop, with a shape or mode that is none, "
            "with another command, or with corrections where codes come out",
        ),
        (
            "lut_refused",
            "LUT write beyond the entries, while the tensor that waits still needs its LUTs, or "
            "after a stop",
        ),
        ("too_large", "Rows times padded columns is 2**32 or more; the tensor was skipped"),
        ("wrong_corrections", "Row pointers or columns of the corrections are wrong"),
        (
            "reserved_code",
            "A code or scale that the format reserves, or a correction that is not finite",
        ),
        ("overflow", "A weight beyond the output format's range"),
        ("underflow", "A decoded weight below 2**-126 that is not zero"),
        (
            "luts_missing",
            "START before every entry of the LUTs of its format was written; a reset forgets them",
        ),
        ("timeout", "For TIMEOUT clocks a tensor was under way and no word moved on any stream"),
    )
    fields = [Field(name, bit, 1, text) for bit, (name, text) in enumerate(single)]
    for number, plane in enumerate(PLANES):
        name = plane.replace("_", " ")
        fields += [
            Field(f"short_{plane}", 16 + 2 * number, 1, f"Packet of {name} shorter than the plane"),
            Field(f"long_{plane}", 17 + 2 * number, 1, f"Packet of {name} longer than the plane"),
        ]
    return tuple(fields)


ERROR_FIELDS = _error_fields()

REGISTERS = (
    Register("ID", 0x00, "ro", "Identification.", _word("ASCII `SOPD`", IDENTIFICATION)),
    Register(
        "VERSION", 0x04, "ro", "Version of this register map.",
        (
            Field("minor", 0, 8, "Additions", MAP_VERSION[1]),
            Field("major", 8, 8, "Changes that break drivers", MAP_VERSION[0]),
        ),
    ),
    Register(
        "CONFIG", 0x08, "ro", "What the hardware was built for.",
        (
            Field("lanes", 0, 10, "Weights per beat"),
            Field("formats", 12, 5, "Number of formats; MODE is below it"),
            Field("lut_index_bits", 20, 3, "A LUT has two to this power entries; 0 is no LUT"),
            Field("luts", 24, 2, "LUTs per tensor"),
            Field("output", 28, 2, "0: float32, 1: bfloat16, 2: codes and scales"),
        ),
    ),
    Register(
        "BUILD_ID", 0x0C, "ro", "What the hardware was built for, as a hash.",
        _word("First 32 bits of the SHA-256 of `identification.text` of the JSON description"),
    ),
    Register(
        "CONTROL", 0x10, "wo", "Commands, one at a time.",
        (
            Field("start", 0, 1, "Start the tensor that MODE to CORRECTIONS and LUTs describe"),
            Field("reset", 1, 1, "Forget tensors, LUTs and all on the streams at once; ends STOP"),
            Field("stop", 2, 1, "Forget the same, but end the output packet; inputs are dropped"),
        ),
    ),
    Register(
        "STATUS", 0x14, "ro", "State.",
        (
            Field("busy", 0, 1, "A tensor is decoded or waits"),
            Field("start_ready", 1, 1, "START is taken"),
            Field("lut_ready", 2, 1, "LUT writes are taken"),
            Field("stopped", 3, 1, "After a stop: the output packet has ended; RESET may follow"),
        ),
    ),
    Register(
        "IRQ_STATUS", 0x18, "w1c", "What asks for an interrupt.",
        (
            Field("done", 0, 1, "A tensor's final beat has left, and its packets have ended"),
            Field("error", 1, 1, "A flag of ERRORS that ERROR_ENABLE names is set; clear it there"),
        ),
    ),
    Register(
        "IRQ_ENABLE", 0x1C, "rw", "Which of them reach the interrupt line.",
        (Field("done", 0, 1, "Bit of IRQ_STATUS"), Field("error", 1, 1, "Bit of IRQ_STATUS")),
    ),
    Register("ERRORS", 0x20, "w1c", "What went wrong since it was cleared.", ERROR_FIELDS),
    Register(
        "ERROR_ENABLE", 0x24, "rw", "Which flags of ERRORS set IRQ_STATUS.error; bits as there.",
        ERROR_FIELDS,
    ),
    Register(
        "MODE", 0x28, "rw", "Format of the next tensor.",
        (Field("mode", 0, 4, "Position of its format in the configuration"),),
    ),
    Register(
        "LAYER_EXPONENT", 0x2C, "rw", "Layer exponent f of the next tensor.",
        (Field("value", 0, 8, "Two's complement"),),
    ),
    Register("ROWS", 0x30, "rw", "Rows of the next tensor.", _word("1 or more")),
    Register("COLUMNS", 0x34, "rw", "Columns of the next tensor.", _word("Without padding")),
    Register("CORRECTIONS", 0x38, "rw", "Corrections of the next tensor.", _word("0: no planes")),
    Register(
        "FORMAT_ID", 0x3C, "ro", "The format that MODE names, as a hash.",
        _word("That of the tensor's format in `sop inspect --json`; 0 if MODE names none"),
    ),
    Register("TENSORS", 0x40, "ro", "Tensors that are over: see IRQ_STATUS.", _word("Wraps")),
    Register("BEATS", 0x44, "ro", "Beats that have left.", _word("Wraps")),
    Register("INPUT_WAITS", 0x48, "ro", "Clocks that waited for planes.", _word("Wraps")),
    Register("OUTPUT_WAITS", 0x4C, "ro", "Clocks with a beat that was not taken.", _word("Wraps")),
    Register(
        "TIMEOUT", 0x50, "rw", "Clocks without progress that set ERRORS.timeout.",
        _word("0: never"),
    ),
)  # fmt: skip


def register(name: str) -> Register:
    """The register of that name."""
    return next(item for item in REGISTERS if item.name == name)
