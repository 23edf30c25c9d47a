"""Ports of an AXI4-Stream (AMBA AXI-Stream, IHI 0051), with the names that the standard gives."""

from dataclasses import dataclass

from amaranth.hdl import Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["AxiStream", "AxiStreamPorts"]


@dataclass(frozen=True)
class AxiStreamPorts:
    """The signals of a stream on a component; ``keep`` and ``user`` are None where it has none."""

    data: Value
    valid: Value
    ready: Value
    last: Value
    keep: Value | None = None
    user: Value | None = None

    @property
    def moves(self) -> Value:
        """A word is handed over in this clock."""
        return self.valid & self.ready


@dataclass(frozen=True)
class AxiStream:
    """A stream with ``tlast``.

    Its ports are members of the component itself and not a signature of their own, whose members
    Amaranth would name with two underscores.

    Parameters
    ----------
    prefix : str
        Of the names of its ports.
    data : int
        Bits of ``tdata``.
    keep, user : int
        Bits of ``tkeep`` and ``tuser``; 0 leaves them out.
    """

    prefix: str
    data: int
    keep: int = 0
    user: int = 0

    def members(self, flow: type[In] | type[Out]) -> dict[str, wiring.Member]:
        """Ports of a component that receives (``In``) or sends (``Out``)."""
        back = Out if flow is In else In
        members = {
            "data": flow(self.data), "valid": flow(1), "ready": back(1), "last": flow(1),
            **{name: flow(bits) for name, bits in self._optional.items() if bits},
        }  # fmt: skip
        return {f"{self.prefix}_t{name}": member for name, member in members.items()}

    def ports(self, component: wiring.Component) -> AxiStreamPorts:
        """The signals on a component that has :meth:`members`."""
        names = ["data", "valid", "ready", "last"]
        names += [name for name, bits in self._optional.items() if bits]
        return AxiStreamPorts(
            **{name: getattr(component, f"{self.prefix}_t{name}") for name in names}
        )

    @property
    def _optional(self) -> dict[str, int]:
        return {"keep": self.keep, "user": self.user}
