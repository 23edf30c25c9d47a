"""AXI4-Lite subordinate: one transaction of each direction at a time."""

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["AxiLiteBridge", "axi_lite_members"]

_OKAY, _SLVERR = 0, 2


def axi_lite_members(prefix: str, address_bits: int) -> dict[str, wiring.Member]:
    """Ports of a subordinate (AMBA AXI, IHI 0022, B1.1) with 32 bits of data."""
    members = {
        "awaddr": In(address_bits), "awprot": In(3), "awvalid": In(1), "awready": Out(1),
        "wdata": In(32), "wstrb": In(4), "wvalid": In(1), "wready": Out(1),
        "bresp": Out(2), "bvalid": Out(1), "bready": In(1),
        "araddr": In(address_bits), "arprot": In(3), "arvalid": In(1), "arready": Out(1),
        "rdata": Out(32), "rresp": Out(2), "rvalid": Out(1), "rready": In(1),
    }  # fmt: skip
    return {f"{prefix}_{name}": member for name, member in members.items()}


class AxiLiteBridge(wiring.Component):
    """Turn AXI4-Lite into single writes and reads of registers.

    Every output is a register. A write takes at least 3 clocks, a read 3.

    Parameters
    ----------
    address_bits : int

    Members
    -------
    axi : In(AXI4-Lite)
        ``axi_awaddr`` and the others of :func:`axi_lite_members`.
    write : Out(1)
        A write waits; address, data and strobes are stable until ``write_done``.
    write_address, write_data, write_strobe : Out(unsigned)
        Byte address, data, and which bytes of it count.
    write_done : In(1)
        The write was carried out or refused, in this clock.
    write_refused : In(1)
        With ``write_done``: answered with SLVERR.
    read : Out(1)
        A read waits, for one clock.
    read_address : Out(unsigned)
        Byte address.
    read_data : In(32)
        Its data, in the same clock.
    read_refused : In(1)
        Nothing is there: answered with SLVERR.
    """

    def __init__(self, *, address_bits: int) -> None:
        self.address_bits = address_bits
        super().__init__(
            {
                **axi_lite_members("axi", address_bits),
                "write": Out(1),
                "write_address": Out(address_bits),
                "write_data": Out(32),
                "write_strobe": Out(4),
                "write_done": In(1),
                "write_refused": In(1),
                "read": Out(1),
                "read_address": Out(address_bits),
                "read_data": In(32),
                "read_refused": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        # Address and data of a write may come in either order. A channel is ready until it has
        # brought what the write needs, and again when the answer has been taken; not in reset.
        address_here, data_here = Signal(), Signal()
        with m.If(self.axi_awvalid & self.axi_awready):
            m.d.sync += [
                self.axi_awready.eq(0), address_here.eq(1),
                self.write_address.eq(self.axi_awaddr),
            ]  # fmt: skip
        with m.Elif(~address_here):
            m.d.sync += self.axi_awready.eq(1)
        with m.If(self.axi_wvalid & self.axi_wready):
            m.d.sync += [
                self.axi_wready.eq(0), data_here.eq(1),
                self.write_data.eq(self.axi_wdata), self.write_strobe.eq(self.axi_wstrb),
            ]  # fmt: skip
        with m.Elif(~data_here):
            m.d.sync += self.axi_wready.eq(1)
        m.d.comb += self.write.eq(address_here & data_here & ~self.axi_bvalid)
        with m.If(self.write & self.write_done):
            m.d.sync += [
                self.axi_bvalid.eq(1),
                self.axi_bresp.eq(self._response(self.write_refused)),
            ]
        with m.If(self.axi_bvalid & self.axi_bready):
            m.d.sync += [self.axi_bvalid.eq(0), address_here.eq(0), data_here.eq(0)]

        with m.If(self.axi_arvalid & self.axi_arready):
            m.d.sync += [
                self.axi_arready.eq(0), self.read.eq(1), self.read_address.eq(self.axi_araddr),
            ]  # fmt: skip
        with m.Elif(~self.read & ~self.axi_rvalid):
            m.d.sync += self.axi_arready.eq(1)
        with m.If(self.read):
            m.d.sync += [
                self.read.eq(0),
                self.axi_rvalid.eq(1),
                self.axi_rdata.eq(self.read_data),
                self.axi_rresp.eq(self._response(self.read_refused)),
            ]
        with m.If(self.axi_rvalid & self.axi_rready):
            m.d.sync += self.axi_rvalid.eq(0)
        return m

    @staticmethod
    def _response(refused):
        return refused * _SLVERR + _OKAY
