"""The NumPy oracle: docs/numerics.md as code, and the backend where nothing is compiled.

Arguments are valid: `fedcodec.ops` and `fedcodec.body` see to that. Values that are not finite raise `NonFiniteError`,
save in the conversions. `parts` is a list of 1-D contiguous arrays, all float32 or all float64, treated as one flat
space. Positions are int64. `out` has the shape and dtype of the result.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError, NonFiniteError
from ..reader import Reader, varint

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
Bits = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Interpolation = Literal["linear", "lower", "higher"]
Narrow = Literal["float16", "bfloat16", "float32"]
Draw = tuple[int, int, int]

BITMAP, LIST, RICE = 0, 1, 2
COMPLEMENT = 4


def _finite(values: Array, name: str = "values") -> Array:
    wrong = ~np.isfinite(values)
    if wrong.any():
        place = int(wrong.argmax())
        raise NonFiniteError(f"{name}: element {place} is {values[place]}")
    return values


def _into(out: Array | None, result: Array) -> Array:
    if out is None:
        return result
    out[:] = result
    return out


# --- selection: numerics.md 2 -------------------------------------------------------------------------------------


def round_down(value: float, dtype: npt.DTypeLike) -> float:
    """The largest number of float type `dtype` that is at most `value`."""
    with np.errstate(over="ignore"):
        rounded = np.array(value).astype(dtype)
    if float(rounded) > value:
        rounded = np.nextafter(rounded, np.array(-math.inf, dtype))
    return float(rounded)


def _joined(parts: list[Array]) -> Array:
    return _finite(np.concatenate(parts)) if parts else np.zeros(0, np.float32)


def topk_threshold(parts: list[Array], k: int) -> tuple[float, int]:
    """The k-th largest magnitude, and how many of those equal to it are among the k largest."""
    magnitudes = np.abs(_joined(parts))
    if k == 0:
        return math.inf, 0
    place = magnitudes.size - k
    magnitudes.partition(place)
    threshold = magnitudes[place]
    return float(threshold), k - int(np.count_nonzero(magnitudes[place:] > threshold))


def percentile_threshold(
    parts: list[Array], percentile: float, interpolation: Interpolation
) -> float:
    """The percentile of all magnitudes, rounded down to the float type of `parts`; 0.0 of nothing."""
    magnitudes = np.abs(_joined(parts))
    if not magnitudes.size:
        return 0.0
    last = magnitudes.size - 1
    place = float(last) * percentile / 100.0
    low = math.floor(place)
    fraction = place - low
    high = min(low + 1, last)
    magnitudes.partition([low, high])
    a, b = float(magnitudes[low]), float(magnitudes[high])
    if interpolation == "linear":
        value = a + (b - a) * fraction
    else:
        value = b if interpolation == "higher" and fraction > 0 else a
    return round_down(value, magnitudes.dtype)


def compact(parts: list[Array], threshold: float, ties: int = 0) -> tuple[Positions, Array]:
    """Positions and values of the magnitudes above `threshold` and of the first `ties` equal to it."""
    values = _joined(parts)
    magnitudes = np.abs(values)
    limit = values.dtype.type(threshold)
    kept = magnitudes > limit
    kept[np.flatnonzero(magnitudes == limit)[:ties]] = True
    positions = np.flatnonzero(kept)
    return positions, values[positions]


def topk(parts: list[Array], k: int) -> tuple[Positions, Array]:
    """Positions and values of the `k` largest magnitudes."""
    return compact(parts, *topk_threshold(parts, k))


def kept_channels(
    values: Array, inner: int, channels: int, density: float | None, order: int, zeros: bool
) -> Mask:
    """Which channels are kept, value i being of channel (i / inner) mod channels; `zeros`: all-zero ones may be."""
    magnitudes = np.abs(_finite(values)).astype(np.float64).reshape(-1, channels, inner)
    largest = float(magnitudes.max())
    used: Mask = (magnitudes != 0).any(axis=(0, 2))
    if density is None:
        return used
    norms = np.zeros(channels, np.uint64)
    if largest > 0:
        exponent = max(math.frexp(largest)[1] - 1, -990)
        length = (values.size // channels - 1).bit_length()
        places = min(31, 62 - length) if order == 1 else (61 - length) // 2
        scaled = np.rint(magnitudes * 2.0 ** (places - exponent)).astype(np.uint64)
        norms = (scaled if order == 1 else scaled * scaled).sum(axis=(0, 2), dtype=np.uint64)
    k = max(1, round(density * channels))
    candidates = np.arange(channels) if zeros else np.flatnonzero(used)
    kept = np.zeros(channels, np.bool_)
    kept[candidates[np.argsort(~norms[candidates], kind="stable")[:k]]] = True
    return kept


# --- masks --------------------------------------------------------------------------------------------------------


def apply_mask(values: Array, mask: Mask, out: Array | None = None) -> Array:
    """`values` where `mask` is True, +0 elsewhere."""
    return _into(out, np.where(mask, _finite(values), values.dtype.type(0)))


def pack_mask(mask: Mask, out: Bits | None = None) -> Bits:
    """`mask` as a bit string, ceil(n / 8) bytes."""
    return _into(out, np.packbits(mask, bitorder="little"))


def unpack_mask(bits: Bits, n: int, out: Mask | None = None) -> Mask:
    """The first `n` bits of a bit string."""
    return _into(out, np.unpackbits(bits, count=n, bitorder="little").view(np.bool_))


def _pack_fields(values: Array, width: int) -> Bits:
    # The low `width` bits of every value, without gaps.
    fields = np.empty((values.size, width), np.uint8)
    for j in range(width):
        fields[:, j] = values >> j & 1
    return np.packbits(fields, bitorder="little")


def _unpack_fields(bits: Bits, width: int, n: int) -> Positions:
    fields = np.unpackbits(bits, count=n * width, bitorder="little").reshape(n, width)
    values = np.zeros(n, np.int64)
    for j in range(width):
        values |= fields[:, j].astype(np.int64) << j
    return values


# --- symmetric integers: numerics.md 3 ----------------------------------------------------------------------------


def _quotient_toward_zero(a: Float32, b: Float32) -> Float32:
    # float64 holds the product of two float32 exactly, so the comparison is the true one.
    quotient = a / b
    above = quotient.astype(np.float64) * b.astype(np.float64) > a
    return (quotient.view(np.uint32) - above.astype(np.uint32)).view(np.float32)


def _channels_of(n: int, inner: int, channels: int) -> Positions:
    return np.arange(n) // inner % channels


def quantize(
    values: Float32,
    bits: int,
    inner: int,
    channels: int,
    draw: Draw | None = None,
    codes_out: Codes | None = None,
    scales_out: Float32 | None = None,
) -> tuple[Codes, Float32]:
    """Codes of `bits` bits and one scale per channel; value i has channel (i / inner) mod channels.

    `draw` is (codec seed, call seed, number of the first value) and makes the rounding stochastic.
    """
    _finite(values)
    levels = np.float32(2 ** (bits - 1) - 1)
    channel = _channels_of(values.size, inner, channels)
    largest = np.zeros(channels, np.float32)
    np.maximum.at(largest, channel, np.abs(values))

    used = largest > 0
    scales = np.zeros(channels, np.float32)
    scales[used] = np.maximum(
        _quotient_toward_zero(largest[used], np.full(used.sum(), levels)), np.float32(2**-126)
    )
    inverses = np.zeros(channels, np.float32)
    inverses[used] = _quotient_toward_zero(np.ones(used.sum(), np.float32), scales[used])

    y = values * inverses[channel]
    if draw is None:
        q = np.rint(y)
    else:
        floor = np.floor(y)
        uniform = (philox(*draw, values.size) >> 8).astype(np.float32) * np.float32(2**-24)
        q = np.clip(floor + (uniform < y - floor), -levels, levels)
    return _into(codes_out, q.astype(np.int8)), _into(scales_out, scales)


def dequantize(
    codes: Codes,
    scales: Float32,
    bits: int,
    inner: int,
    channels: int,
    out: Float32 | None = None,
) -> Float32:
    """The values of `codes`; the most negative code reads as its successor."""
    q = np.maximum(codes, 1 - 2 ** (bits - 1)).astype(np.float32)
    with np.errstate(over="ignore"):  # scales of hostile payloads: the caller looks at the result
        return _into(out, q * scales[_channels_of(codes.size, inner, channels)])


def pack_codes(codes: Codes, bits: int, out: Bits | None = None) -> Bits:
    """Codes as two's complement of `bits` bits without gaps; those of more bits raise `ValueError`."""
    end = 1 << (bits - 1)
    if codes.size and not -end <= codes.min() <= codes.max() < end:
        raise ValueError(f"codes of {bits} bits are from {-end} to {end - 1}")
    return _into(out, _pack_fields(codes.view(np.uint8), bits))


def unpack_codes(packed: Bits, bits: int, n: int, out: Codes | None = None) -> Codes:
    """The `n` codes that `pack_codes` packed, sign-extended."""
    sign = 1 << (bits - 1)
    return _into(out, ((_unpack_fields(packed, bits, n) ^ sign) - sign).astype(np.int8))


# --- sign and magnitude: numerics.md 4 ----------------------------------------------------------------------------


def mean_magnitude(values: Float32) -> float:
    """The mean of |values| free of their order, a float32 number; 0.0 of nothing."""
    magnitudes = np.abs(_finite(values)).astype(np.float64)
    largest = float(magnitudes.max(initial=0.0))
    if largest == 0:
        return 0.0
    exponent = math.frexp(largest)[1] - 1
    total = int(np.rint(magnitudes * 2.0 ** (31 - exponent)).astype(np.uint64).sum(dtype=np.uint64))
    return float(np.float32(float(total) / float(values.size) * 2.0 ** (exponent - 31)))


def pack_signs(values: Float32, out: Bits | None = None) -> Bits:
    """A bit string with 1 where a value is below zero."""
    return pack_mask(_finite(values) < 0, out)


def unpack_signs(bits: Bits, magnitude: float, n: int, out: Float32 | None = None) -> Float32:
    """`n` values of `magnitude`, negative where the bit is 1."""
    signs = unpack_mask(bits, n)
    return _into(out, np.where(signs, np.float32(-magnitude), np.float32(magnitude)))


# --- conversions --------------------------------------------------------------------------------------------------


def _round_to_odd(values: Float64) -> Float32:
    # Keeps in the last bit whether anything was cut off, so that a second rounding rounds as one would.
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    error = np.abs(nearest.astype(np.float64)) - np.abs(values)
    bits = nearest.view(np.uint32) - (error > 0).astype(np.uint32)
    odd: Words = bits | (error != 0).astype(np.uint32)
    return odd.view(np.float32)


def narrow(values: Array, dtype: Narrow, out: Array | None = None, finite: bool = False) -> Array:
    """Float32 or float64 `values` rounded once to `dtype`: float32, or the bits of a 16-bit type as uint16.

    With `finite`, what is not finite or becomes so raises `NonFiniteError`.
    """
    if finite:
        result = narrow(_finite(values), dtype, out)
        _finite(result if dtype == "float32" else widen(result, dtype), f"values as {dtype}")
        return result
    with np.errstate(over="ignore"):  # to infinity: the caller looks at the result
        if dtype == "float32":
            return _into(out, values.astype(np.float32))
        if dtype == "float16":
            return _into(out, values.astype(np.float16).view(np.uint16))
    bits = (_round_to_odd(values) if values.dtype == np.float64 else values).view(np.uint32)
    return _into(out, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def widen(
    bits: npt.NDArray[np.uint16],
    dtype: Literal["float16", "bfloat16"],
    out: Float32 | None = None,
) -> Float32:
    """The float32 values of 16-bit floats given as their bits."""
    if dtype == "float16":
        return _into(out, bits.view(np.float16).astype(np.float32))
    return _into(out, (bits.astype(np.uint32) << 16).view(np.float32))


# --- random words and positions: numerics.md 5 and 6 --------------------------------------------------------------


def _philox4x32(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # Ten rounds over columns of four 32-bit words, kept in uint64 for the products.
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0, c1, c2, c3 = counters
    for _ in range(10):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def philox(codec_seed: int, call_seed: int, first: int, n: int, out: Words | None = None) -> Words:
    """The random words of values `first` to ``first + n - 1``."""
    blocks = np.uint64(first >> 2) + np.arange((first + n + 3 >> 2) - (first >> 2), dtype=np.uint64)
    counters = np.empty((4, blocks.size), np.uint64)
    counters[0] = blocks & np.uint64(0xFFFFFFFF)
    counters[1] = blocks >> np.uint64(32)
    counters[2] = call_seed & 0xFFFFFFFF
    counters[3] = call_seed >> 32
    words = _philox4x32(codec_seed, counters).T.ravel()
    return _into(out, words[first & 3 : (first & 3) + n].astype(np.uint32))


def draw_seed(codec_seed: int, call_seed: int, group: int) -> int:
    """The seed of the positions of the call's `group`-th group with random selection."""
    counter = np.array([group, 0x52414E44, call_seed & 0xFFFFFFFF, call_seed >> 32], np.uint64)
    words = _philox4x32(codec_seed, counter[:, None])
    return int(words[0, 0]) | int(words[1, 0]) << 32


def _mix(v: Words) -> Words:
    v = (v ^ (v >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    v = (v ^ (v >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return v ^ (v >> np.uint32(16))


def random_positions(n: int, k: int, seed: int) -> Positions:
    """The first `k` of a permutation of [0, n) that `seed` keys, ascending."""
    h = max(1, ((n - 1).bit_length() + 1) // 2 if n else 1)
    half, low = np.uint64(h), np.uint64((1 << h) - 1)
    keys = philox(seed, 0, 0, 8)
    positions = np.arange(k, dtype=np.uint64)
    outside = np.arange(k)
    while outside.size:
        left, right = positions[outside] >> half, positions[outside] & low
        for key in keys:
            left, right = (
                right,
                left ^ (_mix(right.astype(np.uint32) + key).astype(np.uint64) & low),
            )
        positions[outside] = left << half | right
        outside = outside[positions[outside] >= n]
    positions.sort()
    return positions.astype(np.int64)


# --- sparse index sets: format.md 4, numerics.md 7 ----------------------------------------------------------------


def _others(positions: Positions, length: int) -> Positions:
    rest = np.ones(length, np.bool_)
    rest[positions] = False
    return np.flatnonzero(rest)


def _pack_tile(kept: Positions, length: int, t: int) -> tuple[bytes, bytes]:
    flag = COMPLEMENT if 2 * kept.size > length else 0
    coded = _others(kept, length) if flag else kept
    count = coded.size
    if count == 0:
        return bytes([flag | (LIST if t == 16 else RICE), 0]), b""

    gaps = np.diff(coded, prepend=-1) - 1
    r0 = max(1, (int(coded[-1]) - (count - 1)) // count).bit_length() - 1
    rice = []
    for r in range(max(0, r0 - 2), r0 + 1):
        unary = count + int((gaps >> r).sum())
        rice.append((-(-count * r // 8) + -(-unary // 8), r, unary))
    rice_size, r, unary = min(rice)

    choices = [
        (bytes([flag | RICE | r << 3]) + varint(count) + varint(unary), rice_size, RICE),
        (bytes([BITMAP]) + varint(kept.size), (length + 7) // 8, BITMAP),
    ]
    if t == 16:
        choices.insert(0, (bytes([flag | LIST]) + varint(count), 2 * count, LIST))
    header, _, mode = min(choices, key=lambda choice: len(choice[0]) + choice[1])
    if mode == LIST:
        return header, coded.astype("<u2").tobytes()
    if mode == BITMAP:
        bits = np.zeros(length, np.bool_)
        bits[kept] = True
        return header, pack_mask(bits).tobytes()
    ones = np.zeros(unary, np.bool_)
    ones[np.cumsum((gaps >> r) + 1) - 1] = True
    return header, _pack_fields(gaps, r).tobytes() + pack_mask(ones).tobytes()


def require_increasing(positions: Positions, n: int) -> None:
    """Raise `ValueError` unless the positions increase strictly, from 0 to below `n`."""
    # Compared, not subtracted: a difference may wrap around.
    if positions.size and not (
        positions[0] >= 0 and positions[-1] < n and (positions[1:] > positions[:-1]).all()
    ):
        raise ValueError(f"positions must increase strictly, from 0 to below {n}")


def pack_sparse(positions: Positions, n: int) -> bytes:
    """The `positions` of [0, n) as a sparse index set; they increase strictly, or raise `ValueError`."""
    require_increasing(positions, n)
    dense = positions.size > n // 2
    t, most = 16, 20 if dense else 31
    coded = n - positions.size if dense else positions.size
    while t < most and coded << t < 512 * n and 1 << t < n:
        t += 1
    starts = range(0, n, 1 << t)
    cuts = np.searchsorted(positions, [*starts, n])
    tiles = [
        _pack_tile(positions[low:high] - start, min(1 << t, n - start), t)
        for start, low, high in zip(starts, cuts, cuts[1:], strict=False)
    ]
    return b"".join([bytes([t]), *(header for header, _ in tiles), *(data for _, data in tiles)])


def _padding_is_zero(bits: Bits, n: int) -> bool:
    return n % 8 == 0 or not bits[-1] >> n % 8


def _take_bits(reader: Reader, n: int, what: str) -> Bits:
    start = reader.offset
    bits = np.frombuffer(reader.take((n + 7) // 8), np.uint8)
    if not _padding_is_zero(bits, n):
        raise DecodeError(f"the padding of {what} is not zero", start)
    return bits


def _unpack_tile(
    reader: Reader, mode: int, r: int, count: int, unary: int, length: int
) -> Positions:
    start = reader.offset
    if mode == BITMAP:
        positions = np.flatnonzero(unpack_mask(_take_bits(reader, length, "a bitmap"), length))
        if positions.size != count:
            raise DecodeError(f"a bitmap has {positions.size} bits set, {count} declared", start)
        return positions
    if count == 0:
        return np.zeros(0, np.int64)
    if mode == LIST:
        positions = np.frombuffer(reader.take(2 * count), "<u2").astype(np.int64)
        if (np.diff(positions) <= 0).any():
            raise DecodeError("the positions of a tile do not increase", start)
    else:
        remainders = _unpack_fields(_take_bits(reader, count * r, "remainders"), r, count)
        start = reader.offset
        ones = np.flatnonzero(unpack_mask(_take_bits(reader, unary, "a unary string"), unary))
        if ones.size != count or ones[-1] != unary - 1:
            raise DecodeError(
                f"a unary string does not hold {count} ones, or does not end in one", start
            )
        quotients = np.diff(ones, prepend=-1) - 1
        positions = np.cumsum((quotients << r) + remainders + 1) - 1
    if positions[-1] >= length:
        raise DecodeError("a position is outside its tile", start)
    return positions


def unpack_sparse(buffer: bytes | memoryview, n: int) -> tuple[Positions, int]:
    """The positions of the sparse index set at the beginning of `buffer`, and how many bytes it takes.

    Raises `DecodeError`, its offset counted from the beginning of `buffer`.
    """
    reader = Reader(buffer)
    t = reader.byte()
    if not 16 <= t <= 31:
        raise DecodeError(f"tiles of 2^{t} elements, not of 2^16 to 2^31", 0)
    tiles = []
    for tile in range(0, n, 1 << t):
        start = reader.offset
        length = min(1 << t, n - tile)
        head = reader.byte()
        mode, complement, r = head & 3, head & COMPLEMENT, head >> 3
        count = reader.varint()
        unary = reader.varint() if mode == RICE and count else 0
        if mode == 3 or (mode == LIST and t != 16):
            raise DecodeError(f"a tile of 2^{t} elements has mode {mode}", start)
        if r > (30 if mode == RICE else 0) or (complement and mode == BITMAP):
            raise DecodeError(f"the tile header {head:#04x} is not valid", start)
        if count > length:
            raise DecodeError(f"a tile of {length} elements codes {count}", start)
        # More quotients than the tile has room for could not decode, and are not worth memory.
        if mode == RICE and not count <= unary <= count + (length - count >> r):
            raise DecodeError(f"a unary string of {unary} bits for {count} positions", start)
        tiles.append((tile, length, mode, complement, r, count, unary))

    positions = [np.zeros(0, np.int64)]
    for tile, length, mode, complement, r, count, unary in tiles:
        coded = _unpack_tile(reader, mode, r, count, unary, length)
        positions.append(tile + (_others(coded, length) if complement else coded))
    return np.concatenate(positions), reader.offset


def scatter(positions: Positions, values: Array, out: Array) -> None:
    """``out[positions] = values``."""
    out[positions] = _finite(values)


# --- sums: numerics.md 8 ------------------------------------------------------------------------------------------


def accumulate(accumulator: Array, values: Array, weight: float) -> None:
    """``accumulator += weight * values`` in the accumulator's float type, every operation rounded."""
    _add(accumulator, _finite(values), weight)


def _add(accumulator: Array, values: Array, weight: float) -> None:
    kind = accumulator.dtype.type
    accumulator += kind(weight) * values.astype(kind, copy=False)


def accumulate_sparse(
    accumulator: Array, positions: Positions, values: Array, weight: float
) -> None:
    """``accumulator[positions] += weight * values``, likewise."""
    kind = accumulator.dtype.type
    accumulator[positions] += kind(weight) * _finite(values).astype(kind, copy=False)


def accumulate_codes(
    accumulator: Array,
    codes: Codes,
    scales: Float32,
    bits: int,
    inner: int,
    channels: int,
    weight: float,
) -> None:
    """`accumulate` of the values that `dequantize` gives."""
    _add(accumulator, dequantize(codes, scales, bits, inner, channels), weight)


# --- checksum -----------------------------------------------------------------------------------------------------


def crc32(data: Any, value: int = 0) -> int:
    """CRC-32 with zlib's polynomial of `data` after those bytes that gave `value`."""
    return zlib.crc32(data, value)
