"""The calls for arrays in a GPU's memory; `ops.cuda_backend` imports it when the first such array comes.

The functions are ops/reference.py's, for `GpuArray`s. What they refuse is the CPU's: by `anywhere` it does it, or says
what is wrong.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .. import dtypes
from .gpu_arrays import GpuArray
from .reference import Draw, Interpolation

_cuda: Any = importlib.import_module("fedcodec._cuda")

body = _cuda  # encode, decode, accumulate and check of whole bodies, as the native module has them

DeviceArray = _cuda.DeviceArray
Memory = _cuda.Memory
Refused = _cuda.Refused
merge = _cuda.merge
mean = _cuda.mean
to_host = _cuda.to_host
from_host = _cuda.from_host
device_of = _cuda.device_of


def _kept(parts: list[GpuArray], k: int) -> tuple[GpuArray, GpuArray]:
    wide = any(part.dtype == np.float64 for part in parts)
    values = parts[0].new((k,), np.float64 if wide else np.float32)
    return parts[0].new((k,), np.int64), values


def _storage(parts: list[GpuArray]) -> list[Any]:
    return [part.storage for part in parts]


def topk(parts: list[GpuArray], k: int) -> tuple[GpuArray, GpuArray]:
    """Positions and values of the `k` largest magnitudes."""
    positions, values = _kept(parts, k)
    _cuda.ops.topk(_storage(parts), k, positions.storage, values.storage)
    return positions, values


def topk_threshold(parts: list[GpuArray], k: int) -> tuple[float, int]:
    """The k-th largest magnitude, and how many of those equal to it are among the k largest."""
    threshold, ties = _cuda.ops.topk_threshold(_storage(parts), k)
    return threshold, ties


def percentile_threshold(
    parts: list[GpuArray], percentile: float, interpolation: Interpolation
) -> float:
    """The percentile of all magnitudes."""
    return float(_cuda.ops.percentile_threshold(_storage(parts), percentile, interpolation))


def compact(parts: list[GpuArray], threshold: float, ties: int = 0) -> tuple[GpuArray, GpuArray]:
    """Positions and values of the magnitudes above `threshold` and of the first `ties` equal to it."""
    kept: list[GpuArray] = []

    def allocate(k: int) -> tuple[Any, Any]:
        kept.extend(_kept(parts, k))
        return kept[0].storage, kept[1].storage

    _cuda.ops.compact(_storage(parts), threshold, ties, allocate)
    positions, values = kept
    return positions, values


def apply_mask(values: GpuArray, mask: GpuArray, out: GpuArray | None = None) -> GpuArray:
    """`values` where `mask` is True, +0 elsewhere."""
    out = out or values.new(values.shape, values.dtype)
    _cuda.ops.apply_mask(values.storage, mask.storage, out.storage)
    return out


def pack_mask(mask: GpuArray, out: GpuArray | None = None) -> GpuArray:
    """`mask` as a bit string."""
    out = out or mask.new(((mask.size + 7) // 8,), np.uint8)
    _cuda.ops.pack_mask(mask.storage, out.storage)
    return out


def unpack_mask(bits: GpuArray, n: int, out: GpuArray | None = None) -> GpuArray:
    """The first `n` bits of a bit string."""
    out = out or bits.new((n,), np.bool_)
    _cuda.ops.unpack_mask(bits.storage, out.storage)
    return out


def quantize(
    values: GpuArray,
    bits: int,
    inner: int,
    channels: int,
    draw: Draw | None = None,
    codes_out: GpuArray | None = None,
    scales_out: GpuArray | None = None,
) -> tuple[GpuArray, GpuArray]:
    """Codes of `bits` bits and one scale per channel."""
    codes = codes_out or values.new(values.shape, np.int8)
    scales = scales_out or values.new((channels,), np.float32)
    _cuda.ops.quantize(values.storage, bits, inner, channels, draw, codes.storage, scales.storage)
    return codes, scales


def dequantize(
    codes: GpuArray,
    scales: GpuArray,
    bits: int,
    inner: int,
    channels: int,
    out: GpuArray | None = None,
) -> GpuArray:
    """The values of `codes`."""
    out = out or codes.new(codes.shape, np.float32)
    _cuda.ops.dequantize(codes.storage, scales.storage, bits, inner, channels, out.storage)
    return out


def pack_codes(codes: GpuArray, bits: int, out: GpuArray | None = None) -> GpuArray:
    """Codes as two's complement of `bits` bits without gaps."""
    out = out or codes.new(((codes.size * bits + 7) // 8,), np.uint8)
    _cuda.ops.pack_codes(codes.storage, bits, out.storage)
    return out


def unpack_codes(packed: GpuArray, bits: int, n: int, out: GpuArray | None = None) -> GpuArray:
    """The `n` codes that `pack_codes` packed."""
    out = out or packed.new((n,), np.int8)
    _cuda.ops.unpack_codes(packed.storage, bits, out.storage)
    return out


def mean_magnitude(values: GpuArray) -> float:
    """The mean of |values| free of their order."""
    return float(_cuda.ops.mean_magnitude(values.storage))


def pack_signs(values: GpuArray, out: GpuArray | None = None) -> GpuArray:
    """A bit string with 1 where a value is below zero."""
    out = out or values.new(((values.size + 7) // 8,), np.uint8)
    _cuda.ops.pack_signs(values.storage, out.storage)
    return out


def unpack_signs(bits: GpuArray, magnitude: float, n: int, out: GpuArray | None = None) -> GpuArray:
    """`n` values of `magnitude`, negative where the bit is 1."""
    out = out or bits.new((n,), np.float32)
    _cuda.ops.unpack_signs(bits.storage, magnitude, out.storage)
    return out


def narrow(values: GpuArray, dtype: str, out: GpuArray | None, finite: bool) -> GpuArray:
    """`values` rounded to a narrower float type."""
    assert finite  # the GPU knows no other way
    out = out or values.new(values.shape, np.float32 if dtype == "float32" else np.uint16)
    _cuda.ops.narrow(values.storage, dtypes.BY_NAME[dtype].id, out.storage)
    return out


def widen(bits: GpuArray, dtype: str, out: GpuArray | None = None) -> GpuArray:
    """16-bit floats as float32."""
    out = out or bits.new(bits.shape, np.float32)
    _cuda.ops.widen(bits.storage, dtypes.BY_NAME[dtype].id, out.storage)
    return out


def pack_sparse(positions: GpuArray, n: int) -> bytes:
    """Positions as a sparse index set."""
    packed: bytes = _cuda.ops.pack_sparse(positions.storage, n)
    return packed


def scatter(positions: GpuArray, values: GpuArray, out: GpuArray) -> None:
    """``out[positions] = values``."""
    _cuda.ops.scatter(positions.storage, values.storage, out.storage)


def accumulate(accumulator: GpuArray, values: GpuArray, weight: float) -> None:
    """``accumulator += weight * values``."""
    _cuda.ops.accumulate(accumulator.storage, values.storage, weight)


def accumulate_sparse(
    accumulator: GpuArray, positions: GpuArray, values: GpuArray, weight: float
) -> None:
    """``accumulator[positions] += weight * values``."""
    _cuda.ops.accumulate_sparse(accumulator.storage, positions.storage, values.storage, weight)


def accumulate_codes(
    accumulator: GpuArray,
    codes: GpuArray,
    scales: GpuArray,
    bits: int,
    inner: int,
    channels: int,
    weight: float,
) -> None:
    """`accumulate` of the values that `dequantize` gives."""
    _cuda.ops.accumulate_codes(
        accumulator.storage, codes.storage, scales.storage, bits, inner, channels, weight
    )
