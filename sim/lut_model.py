"""The definition of a lookup: code = LUT[metabit][index], for the n-th tensor in its n-th LUTs."""

from amaranth.lib import data

from golden.notation import QuantFormat
from golden.promotion import element_exponent, is_promoted, promoted_codes
from rtl.layouts import hif_beat_layout, index_beat_layout, lut_write_layout
from rtl.modes import Modes
from sim.bench_config import BenchConfig

__all__ = ["LutDecoderModel", "LutModel"]

Luts = dict[tuple[int, int], int]
"""Code of every entry, by LUT and index."""


class LutModel:
    """Sets of LUTs that take their turn tensor by tensor, and the writes that load them.

    Parameters
    ----------
    modes : Modes
    """

    def __init__(self, modes: Modes) -> None:
        self.modes = modes
        self.layout_lut = lut_write_layout(modes=modes)
        self.clear()

    def clear(self) -> None:
        """Forget everything, as a reset does."""
        self.loading: Luts = {}
        self.loaded: list[tuple[Luts, int, int]] = []
        self.tensor = 0

    def field(self, layout: data.StructLayout, word: int, name: str) -> int:
        """Bits of a field; 0 if there is no such field."""
        if name not in layout.members:
            return 0
        return word >> layout[name].offset & (1 << layout[name].width) - 1

    def write(self, word: int) -> None:
        """One LUT write."""
        index, lut, code, exponent, mode = (
            self.field(self.layout_lut, word, name)
            for name in ("index", "lut", "code", "layer_exponent", "mode")
        )
        self.loading[lut, index] = code
        if self.field(self.layout_lut, word, "last"):
            self.loaded.append((self.loading, (exponent ^ 0x80) - 0x80, mode))
            self.loading = {}

    def current(self) -> tuple[Luts, int, int, QuantFormat]:
        """LUTs, layer exponent of decoded codes, mode and format of the tensor under way."""
        luts, layer_exponent, mode = self.loaded[self.tensor]
        fmt = self.modes.formats[mode]
        return luts, layer_exponent + element_exponent(fmt), mode, fmt

    def decode_element(self, fmt: QuantFormat, luts: Luts, word: int, element: int) -> int:
        """Output code of one element under one scale word."""
        if fmt.codebooks:
            return luts[fmt.word.metabit(word), element]
        if is_promoted(fmt):
            return int(promoted_codes(self.modes.hif)[element])
        return element

    def places(self, mode: int) -> list[tuple[int, int]]:
        """LUT and index of every entry of a tensor's LUTs."""
        fmt = self.modes.formats[mode]
        luts = range(len(fmt.codebooks))
        return [(lut, index) for lut in luts for index in range(fmt.lut_entries)] or [(0, 0)]

    def writes(
        self, places: list[tuple[int, int]], codes: list[int], exponents: list[int],
        modes: list[int],
    ) -> list[int]:  # fmt: skip
        """Payloads of LUT writes."""
        layout, words = self.layout_lut, []
        for (lut, index), code, exponent, mode in zip(places, codes, exponents, modes, strict=True):
            word = index << layout["index"].offset | lut << layout["lut"].offset
            word |= code << layout["code"].offset | exponent << layout["layer_exponent"].offset
            if self.modes.mode_bits:
                word |= mode << layout["mode"].offset
            words.append(word)
        words[-1] |= 1 << layout["last"].offset
        return words


class LutDecoderModel(LutModel):
    """What comes out of a decoder."""

    def __init__(self, config: BenchConfig) -> None:
        super().__init__(config.modes)
        self.lanes = config.lanes
        self.layout_in = index_beat_layout(lanes=config.lanes, modes=self.modes)
        self.layout_out = hif_beat_layout(lanes=config.lanes, modes=self.modes)

    def decode(self, word: int) -> int:
        """Output word of one input beat."""
        fields = self.layout_in.from_bits(word)
        luts, layer_exponent, mode, fmt = self.current()
        self.tensor += int(fields.last)
        words = list(fields.scale_words)
        codes = [
            self.decode_element(fmt, luts, words[lane * len(words) // self.lanes], element)
            for lane, element in enumerate(fields.indices)
        ]
        scales = [fmt.word.scale_code(word) for word in words]
        out = self.layout_out
        result = int(fields.last) << out["last"].offset
        exponent_mask = (1 << out["layer_exponent"].width) - 1
        result |= (layer_exponent & exponent_mask) << out["layer_exponent"].offset
        if "mode" in out.members:
            result |= mode << out["mode"].offset
        if "row_scales" in out.members:
            row_scales = self.field(self.layout_in, word, "row_scales")
            result |= row_scales << out["row_scales"].offset
        for name, values in (("codes", codes), ("scales", scales)):
            width = out[name].width // len(values)
            for position, value in enumerate(values):
                result |= value << (out[name].offset + position * width)
        return result
