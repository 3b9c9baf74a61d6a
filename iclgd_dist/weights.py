"""What a safetensors file holds, without torch. Knows the format: the header's length, the header, and then the numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

_NAN_ABOVE = {"F64": (np.uint64, 0x7FF0_0000_0000_0000), "F32": (np.uint32, 0x7F80_0000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}
_AT_ONCE = 2**22  # numbers


def first_nan(path: Path) -> str | None:
    """Return the name of the first tensor with a NaN among its weights, or None. The file has been checked: its header is that of a whole file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__" and tensor["dtype"] in _NAN_ABOVE}
        for name, tensor in sorted(tensors.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            kind, infinity = _NAN_ABOVE[tensor["dtype"]]
            start, stop = tensor["data_offsets"]
            file.seek(8 + length + start)
            left = (stop - start) // np.dtype(kind).itemsize
            while left > 0:
                bits = np.fromfile(file, dtype=kind, count=min(left, _AT_ONCE))
                left -= len(bits)
                if (bits << kind(1)).max() > kind(infinity << 1):  # without the sign: NaN is what lies above infinity
                    return name
    return None
