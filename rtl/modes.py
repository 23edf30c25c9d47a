"""The formats that one piece of hardware decodes, of which each tensor chooses one."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from amaranth.hdl import Const, Mux, Value
from amaranth.hdl._ast import Concat, Operator, Slice, SwitchValue  # no public names; 0.5 is pinned

from golden.codebooks import BLOCK_SIZES
from golden.formats import FloatFormat, HifFormat, IntFormat, NumberFormat
from golden.notation import QuantFormat
from golden.promotion import decoded_format, element_exponent, is_promoted

__all__ = [
    "MAX_LANES",
    "MAX_MODES",
    "Modes",
    "by_mode",
    "check_lanes",
    "distinct_formats",
]

MAX_LANES = 512
MAX_MODES = 16

_ROW_SCALE_SIGNIFICAND_BITS = 8  # bfloat16 with hidden bit


def check_lanes(lanes: int, block_size: int) -> None:
    """Refuse a beat that is neither whole blocks nor a whole fraction of one.

    Raises
    ------
    ValueError
        If ``block_size`` is not one of the format's, or ``lanes`` is neither a multiple nor a
        divisor of it, or not in 8 to 512.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, not {block_size!r}")
    whole = lanes > 0 and (lanes % block_size == 0 or block_size % lanes == 0)
    if not (BLOCK_SIZES[0] <= lanes <= MAX_LANES and whole):
        raise ValueError(
            f"lanes must be a multiple or a divisor of the block size {block_size}, "
            f"{BLOCK_SIZES[0]} to {MAX_LANES}, not {lanes!r}"
        )


def _significand_bits(element: NumberFormat) -> int:
    """Bits that the magnitude of any significand of an element format needs."""
    if isinstance(element, HifFormat):
        return element.significand_bits  # two's complement reaches 2**(bits - 1)
    if isinstance(element, IntFormat):
        return element.bits - 1
    assert isinstance(element, FloatFormat)
    return element.mantissa_bits + 1


def _without_names(fmt: QuantFormat) -> QuantFormat:
    """The format with codebooks that say nothing but their size: contents are loaded."""
    return (
        fmt.with_codebooks((f"DD{fmt.index_bits}",) * len(fmt.codebooks)) if fmt.codebooks else fmt
    )


def distinct_formats(formats: Iterable[QuantFormat]) -> tuple[QuantFormat, ...]:
    """Formats without those that the hardware cannot tell from an earlier one."""
    return tuple({_without_names(fmt): fmt for fmt in reversed(tuple(formats))}.values())[::-1]


@dataclass(frozen=True)
class Modes:
    """Formats of a decoder; ``mode`` of a tensor is its format's position here.

    Codebook formats share one LUT memory and one format of LUT entries. Atom formats (promoted
    tensors) bypass the LUTs: E2M3 becomes HIF codes, exactly, because HIF7 holds every value of
    E2M3 times 8; other atoms keep their codes, which only :class:`rtl.hif_to_float.HifToFloat` can
    read.

    Parameters
    ----------
    formats : tuple of QuantFormat
        1 to 16 formats.

    Raises
    ------
    ValueError
        If the formats cannot share hardware, or one cannot be streamed.
    """

    formats: tuple[QuantFormat, ...]

    def __post_init__(self) -> None:
        """Check that one piece of hardware can take all of them."""
        if not 1 <= len(self.formats) <= MAX_MODES:
            raise ValueError(f"a decoder has 1 to {MAX_MODES} formats, not {len(self.formats)}")
        if len(distinct_formats(self.formats)) < len(self.formats):
            raise ValueError("a format is given twice (codebook names make no difference)")
        for fmt in self.formats:
            if not fmt.block_size:
                raise ValueError(f"{fmt.name} has no blocks; the hardware takes block scales")
        if len({fmt.hif for fmt in self.formats if fmt.codebooks}) > 1:
            raise ValueError(
                "all codebook formats of a decoder have the same format of LUT entries"
            )

    def mode_of(self, fmt: QuantFormat) -> int:
        """Value of ``mode`` for a tensor of that format, whatever its codebooks.

        Raises
        ------
        ValueError
            If it is none of the formats.
        """
        shapes = [_without_names(known) for known in self.formats]
        if _without_names(fmt) not in shapes:
            raise ValueError(f"{fmt.name} is none of the decoder's formats")
        return shapes.index(_without_names(fmt))

    @cached_property
    def codebook_formats(self) -> tuple[QuantFormat, ...]:
        """Those that use the LUTs."""
        return tuple(fmt for fmt in self.formats if fmt.codebooks)

    @property
    def hif(self) -> HifFormat:
        """Format of LUT entries and of decoded E2M3."""
        return (self.codebook_formats or self.formats)[0].hif

    @property
    def mode_bits(self) -> int:
        """Width of ``mode``; 0 where there is nothing to choose."""
        return (len(self.formats) - 1).bit_length()

    @property
    def block_size(self) -> int:
        """Weights per scale word of a beat: of the formats' block sizes the smallest."""
        return min(fmt.block_size for fmt in self.formats)

    @property
    def element_bits(self) -> int:
        """Bits of the widest stored element."""
        return max(fmt.index_bits for fmt in self.formats)

    @property
    def index_bits(self) -> int:
        """Bits of the widest LUT index; 0 without codebook formats."""
        return max((fmt.index_bits for fmt in self.codebook_formats), default=0)

    @property
    def luts(self) -> int:
        """LUTs per tensor: 2 if any format is a pair, 1 if not, 0 without codebook formats."""
        return max((len(fmt.codebooks) for fmt in self.codebook_formats), default=0)

    @property
    def word_bits(self) -> int:
        """Bits of the widest scale word."""
        return max(fmt.word.width for fmt in self.formats)

    @property
    def scale_bits(self) -> int:
        """Bits of the widest scale code, without metabit."""
        return max(fmt.word.scale.width for fmt in self.formats)

    @property
    def row_scale(self) -> bool:
        """Whether any format has row scales."""
        return any(fmt.row_scale for fmt in self.formats)

    @property
    def promotes(self) -> bool:
        """Whether E2M3 is among the formats."""
        return any(map(is_promoted, self.formats))

    def decoded(self, fmt: QuantFormat) -> NumberFormat:
        """Number format of the codes that the lookup step gives for a format."""
        return decoded_format(fmt, self.hif)

    def element_exponent(self, fmt: QuantFormat) -> int:
        """Exponent of the last place of decoded codes at shift 0: value = code * 2**this."""
        return element_exponent(fmt)

    @property
    def code_bits(self) -> int:
        """Bits of the widest decoded code."""
        return max(self.decoded(fmt).width for fmt in self.formats)

    @property
    def element_significand_bits(self) -> int:
        """Bits of the widest magnitude of a decoded element's significand."""
        return max(_significand_bits(self.decoded(fmt)) for fmt in self.formats)

    @property
    def scale_significand_bits(self) -> int:
        """Bits of the widest significand of block scale times row scale."""
        return max(
            fmt.word.scale.mantissa_bits + 1 + fmt.row_scale * _ROW_SCALE_SIGNIFICAND_BITS
            for fmt in self.formats
        )

    @property
    def product_bits(self) -> int:
        """Bits of the widest product of element, block scale and row scale: at most 23.

        So float32's 24 hold it exactly (element 7, block scale 8, row scale 8).
        """
        return self.element_significand_bits + self.scale_significand_bits

    def slots(self, lanes: int) -> int:
        """Scale words of a beat."""
        return max(1, lanes // self.block_size)


def _structure(value: Value) -> Hashable:
    """Equal for expressions that do the same to the same signals.

    Signals count by identity: two may have one name. So does what is rarer than the kinds below,
    which at worst leaves a multiplexer between equals.
    """
    if isinstance(value, Const):
        return (Const, len(value), value.shape().signed, value.value)
    if isinstance(value, Slice):
        return (Slice, value.start, value.stop, _structure(value.value))
    if isinstance(value, Concat):
        return (Concat, *map(_structure, value.parts))
    if isinstance(value, Operator):
        return (value.operator, *map(_structure, value.operands))
    if isinstance(value, SwitchValue):
        cases = ((patterns, _structure(chosen)) for patterns, chosen in value.cases)
        return (SwitchValue, _structure(value.test), *cases)
    return id(value)


def by_mode(mode: Value, values: Sequence[Value]) -> Value:
    """The one of ``values``, one per format, that ``mode`` names.

    Neighbours that are the same expression are merged, and a mode beyond the last format counts as
    it, so a single format costs nothing.
    """
    result = values[-1]
    for number in reversed(range(len(values) - 1)):
        if _structure(values[number]) != _structure(result):
            result = Mux(mode == number, values[number], result)
    return result
