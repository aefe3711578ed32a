"""Read and write safetensors as numpy arrays without torch, including bfloat16 and float8, which numpy lacks."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize, safe_open

Array = np.ndarray[Any, np.dtype[Any]]

_NUMPY: Mapping[str, str] = {
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)},
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"},
}
"""The numpy dtype for the bits of each safetensors dtype."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A float format: `numpy` can hold its numbers; eps is its relative and `least` its absolute resolution."""

    numpy: type[np.floating]
    eps: float
    least: float


PRECISIONS: Mapping[str, Precision] = {
    "F64": Precision(np.float64, 2.0**-52, 2.0**-1074),
    "F32": Precision(np.float32, 2.0**-23, 2.0**-149),
    "F16": Precision(np.float16, 2.0**-10, 2.0**-24),
    "BF16": Precision(np.float32, 2.0**-7, 2.0**-133),
}
"""Allowed precisions of A and B, by safetensors' name."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor as stored in a file: safetensors' dtype, and raw bits if numpy has no such dtype."""

    raw: Array
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def is_float(self) -> bool:
        return self.dtype in PRECISIONS or self.dtype.startswith("F8")

    def numbers(self) -> Array:
        """The exact values."""
        if self.dtype == "BF16":
            return (self.raw.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "F8_E5M2":  # the upper half of a float16
            return (self.raw.astype(np.uint16) << 8).view(np.float16)
        if self.dtype == "F8_E4M3":
            return _E4M3[self.raw]
        return self.raw

    def to(self, dtype: str) -> "Stored":
        """Round to another precision; integers and booleans stay as they are."""
        return store(self.numbers(), dtype) if self.is_float and dtype != self.dtype else self


_POSITIVE = [math.ldexp((bits & 7) / 8 + (bits > 7), max(bits >> 3, 1) - 7) for bits in range(127)] + [math.nan]
_E4M3 = np.array([*_POSITIVE, *(-number for number in _POSITIVE)], np.float32)
"""The 256 values of float8 e4m3fn: no infinity; NaN if all bits but the sign are set."""


def rounded(numbers: Array, dtype: str) -> Array:
    """Round to the nearest values of a precision, in a numpy dtype that can hold them.

    >>> rounded(np.array([1.0, 1.00390625, 1.005]), "BF16").tolist()
    [1.0, 1.0, 1.0078125]
    """
    with np.errstate(over="ignore"):
        near = np.ascontiguousarray(numbers).astype(PRECISIONS[dtype].numpy)
    if dtype != "BF16":
        return near
    bits = near.view(np.uint32)
    even = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(near), near, even)


def store(numbers: Array, dtype: str) -> Stored:
    """Round to a precision and convert to its stored form."""
    near = rounded(numbers, dtype)
    return Stored((near.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else near, dtype)


def read_tensors(path: Path) -> dict[str, Stored]:
    """Read a file's tensors by name.  Raises SafetensorError for a broken file, KeyError for an unknown dtype."""
    with safe_open(path, framework="np"):
        pass  # compares the header with the file's size before all of it is read
    tensors = {}
    for name, view in sorted(deserialize(path.read_bytes())):  # which has another order every time
        bits = np.frombuffer(view["data"], _NUMPY[view["dtype"]])
        tensors[name] = Stored(bits.reshape(view["shape"]), view["dtype"])
    return tensors


def to_bytes(tensors: Mapping[str, Stored]) -> bytes:
    """Encode tensors as a safetensors file: a JSON header, then the values.

    safetensors' own functions need torch, or numpy without bfloat16.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    # Widest first, so that values are aligned to their size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].raw.itemsize, item[0])):
        parts.append(tensor.raw.tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
