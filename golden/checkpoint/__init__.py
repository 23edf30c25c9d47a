"""The checkpoint file: one safetensors file with the planes that the hardware streams.

docs/checkpoint.md is the specification, for readers in any language. Reading believes nothing in
the file: header, sizes, codes and positions are checked before a byte is used, and each error names
file, tensor and field. Writing and reading hold one tensor in memory, raw tensors not even that.

Its layers, each of which knows only those before it:

* :mod:`golden.strict_json`: JSON that is read strictly;
* :mod:`golden.container` and :mod:`golden.container_file`: the safetensors container as a table,
  and its files;
* :mod:`golden.checkpoint.info` and :mod:`golden.checkpoint.layout`: what there is to know of a
  quantized tensor, and the bytes of its fields, both ways;
* :mod:`golden.checkpoint.names` and :mod:`golden.checkpoint.metadata`: which tensors one file can
  hold, and the JSON text about them, both ways;
* :mod:`golden.checkpoint.reader` and :mod:`golden.checkpoint.writer`, which copies from the former.
"""

from golden.checkpoint.info import QuantizedInfo, SourceInfo, StoredTensor, reconstruct
from golden.checkpoint.metadata import METADATA_KEY, VERSION, config_hash
from golden.checkpoint.names import check_names
from golden.checkpoint.reader import Checkpoint
from golden.checkpoint.writer import CheckpointWriter, check_header
from golden.container import RawInfo

__all__ = [
    "METADATA_KEY",
    "VERSION",
    "Checkpoint",
    "CheckpointWriter",
    "QuantizedInfo",
    "RawInfo",
    "SourceInfo",
    "StoredTensor",
    "check_header",
    "check_names",
    "config_hash",
    "reconstruct",
]
