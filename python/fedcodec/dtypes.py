"""The dtypes that travel: ids on the wire (frozen), names, and how their bytes are held."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class DType(NamedTuple):
    """One dtype of the wire format."""

    id: int
    name: str
    itemsize: int
    storage: np.dtype[np.generic]  # of the 1-D arrays that coders read and write
    host: np.dtype[
        np.generic
    ]  # of arrays of its values; float16 stands in for the bits of a bfloat16

    @property
    def is_float(self) -> bool:
        """Whether the codec applies; other dtypes are lossless."""
        return self.id <= 4


def _dtype(id: int, name: str, itemsize: int, storage: str = "uint8") -> DType:
    host = np.dtype("float16" if name == "bfloat16" else name)
    return DType(id, name, itemsize, np.dtype(storage), host)


_ALL = (
    _dtype(1, "float32", 4, "float32"),
    _dtype(2, "float16", 2, "uint16"),
    _dtype(3, "bfloat16", 2, "uint16"),
    _dtype(4, "float64", 8, "float64"),
    _dtype(8, "int8", 1),
    _dtype(9, "int16", 2),
    _dtype(10, "int32", 4),
    _dtype(11, "int64", 8),
    _dtype(12, "uint8", 1),
    _dtype(13, "uint16", 2),
    _dtype(14, "uint32", 4),
    _dtype(15, "uint64", 8),
    _dtype(16, "bool", 1),
)
BY_ID = {dtype.id: dtype for dtype in _ALL}
BY_NAME = {dtype.name: dtype for dtype in _ALL}
