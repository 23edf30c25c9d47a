"""A checkpoint taken apart into header, metadata and data, and put together again."""

import json
from typing import Any

from golden.checkpoint import METADATA_KEY

__all__ = ["CheckpointParts"]


class CheckpointParts:
    """A checkpoint, to be changed and put together again.

    Parameters
    ----------
    content : bytes
        A valid file.

    Attributes
    ----------
    header : dict
        JSON object of the header; what its ``__metadata__`` holds is ignored.
    metadata : dict
        JSON object of this project's metadata.
    tensors : dict
        Entries of the quantized tensors in it.
    data : bytearray
    """

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = bytearray(content[8 + length :])
        self.metadata: dict[str, Any] = json.loads(self.header["__metadata__"][METADATA_KEY])
        self.tensors: dict[str, Any] = self.metadata["tensors"]

    def build(self) -> bytes:
        """Bytes of the file."""
        text = json.dumps(self.metadata, separators=(",", ":"))
        self.header["__metadata__"] = {METADATA_KEY: text}
        header = json.dumps(self.header, separators=(",", ":")).encode("ascii")
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + bytes(self.data)

    def poke(self, name: str, position: int, *values: int) -> None:
        """Change bytes of a tensor."""
        start = self.header[name]["data_offsets"][0] + position
        self.data[start : start + len(values)] = bytes(values)

    def append(self, name: str, dtype: str, shape: list[int], content: bytes) -> None:
        """Add a tensor behind the last one."""
        start = len(self.data)
        offsets = [start, start + len(content)]
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self.data += content

    def remove(self, name: str) -> None:
        """Remove a tensor and its bytes."""
        start, stop = self.header.pop(name)["data_offsets"]
        del self.data[start:stop]
        for name in self.header.keys() - {"__metadata__"}:
            offsets = self.header[name]["data_offsets"]
            if offsets[0] >= stop:
                self.header[name]["data_offsets"] = [at - stop + start for at in offsets]

    def replace(self, name: str, dtype: str, shape: list[int], content: bytes) -> None:
        """Put another tensor under a name."""
        self.remove(name)
        self.append(name, dtype, shape, content)
