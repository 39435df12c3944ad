"""The compiled kernels: ops/reference.py's names and meanings on the instruction set in use."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import DecodeError
from .reference import Positions

_native: Any = importlib.import_module("fedcodec._native")

body = _native  # encode, decode, accumulate and check of whole bodies, as fedcodec/body.py has them

topk = _native.ops.topk
topk_threshold = _native.ops.topk_threshold
percentile_threshold = _native.ops.percentile_threshold
compact = _native.ops.compact
apply_mask = _native.ops.apply_mask
pack_mask = _native.ops.pack_mask
unpack_mask = _native.ops.unpack_mask
random_positions = _native.ops.random_positions
quantize = _native.ops.quantize
dequantize = _native.ops.dequantize
pack_codes = _native.ops.pack_codes
unpack_codes = _native.ops.unpack_codes
mean_magnitude = _native.ops.mean_magnitude
pack_signs = _native.ops.pack_signs
unpack_signs = _native.ops.unpack_signs
narrow = _native.ops.narrow
widen = _native.ops.widen
philox = _native.ops.philox
draw_seed = _native.ops.draw_seed
pack_sparse = _native.pack_sparse
scatter = _native.ops.scatter
accumulate = _native.ops.accumulate
accumulate_sparse = _native.ops.accumulate_sparse
accumulate_codes = _native.ops.accumulate_codes
crc32 = _native.ops.crc32


def unpack_sparse(buffer: bytes | memoryview, n: int) -> tuple[Positions, int]:
    """The positions of the sparse index set at the beginning of `buffer`, and how many bytes it takes."""
    try:
        positions, used = _native.unpack_sparse(buffer, n)
    except _native.Malformed as error:
        raise DecodeError(*error.args) from None
    return positions, used
