"""The NumPy oracle against formulations that share nothing with it."""

from __future__ import annotations

import math
import struct
import zlib
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcodec import ops
from fedcodec.errors import BackendError, NonFiniteError
from fedcodec.ops import reference

F32_MAX = float(np.finfo(np.float32).max)
TINY = float(np.float32(1e-45))

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
floats64 = st.floats(allow_nan=False, allow_infinity=False)
awkward = st.sampled_from([0.0, -0.0, TINY, -TINY, 2.0**-126, 1.0, -1.0, 2.5, F32_MAX, -F32_MAX])


def arrays32(least=0, most=60):
    return hnp.arrays(np.float32, st.integers(least, most), elements=floats32 | awkward)


def arrays64(least=0, most=60):
    return hnp.arrays(np.float64, st.integers(least, most), elements=floats64 | awkward)


def split(array, cuts):
    return np.split(array, sorted(cut % (array.size + 1) for cut in cuts))


def next_up(value, dtype):
    with np.errstate(over="ignore"):
        return float(np.nextafter(dtype(value), dtype(np.inf)))


# --- selection ----------------------------------------------------------------------------------------------------


@given(arrays32(1) | arrays64(1), st.data())
def test_topk_keeps_the_largest_and_of_equals_the_lowest_position(x, data):
    k = data.draw(st.integers(0, x.size))
    parts = split(x, data.draw(st.lists(st.integers(0, 60), max_size=3)))
    threshold, ties = reference.topk_threshold(parts, k)
    positions, values = reference.compact(parts, threshold, ties)
    expected = sorted(sorted(range(x.size), key=lambda i: (-abs(x[i]), i))[:k])
    assert positions.tolist() == expected
    assert values.dtype == x.dtype
    assert values.tobytes() == x[expected].tobytes()


def test_topk_of_nothing():
    assert reference.topk_threshold([np.zeros(0, np.float32)], 0) == (math.inf, 0)
    assert reference.topk_threshold([], 0) == (math.inf, 0)
    assert reference.compact([], 1.0)[0].size == 0


@given(arrays32(1) | arrays64(1), st.floats(0, 100), st.sampled_from(["lower", "higher", "linear"]))
def test_percentile_is_an_exact_order_statistic(x, percentile, interpolation):
    ordered = sorted(float(v) for v in np.abs(x))
    place = (len(ordered) - 1) * percentile / 100
    low = int(place)
    a, b = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    exact = {
        "lower": a,
        "higher": b if place > low else a,
        "linear": a + (b - a) * (place - low),
    }[interpolation]
    got = reference.percentile_threshold([x], percentile, interpolation)
    # Rounding down to the float type leaves the set of larger numbers of that type as it is.
    assert got <= exact
    assert x.dtype.type(got) == got
    assert got == exact or next_up(got, x.dtype.type) > exact


@pytest.mark.parametrize("method", ["lower", "higher"])
def test_percentile_agrees_with_numpy(method):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for percentile in (0, 0.1, 20, 33.3, 50, 99.9, 100):
        expected = np.percentile(np.abs(x), percentile, method=method)
        assert reference.percentile_threshold([x[:400], x[400:]], percentile, method) == expected


def test_percentile_of_nothing():
    assert reference.percentile_threshold([], 50, "linear") == 0
    assert reference.percentile_threshold([np.zeros(0)], 50, "linear") == 0


@given(floats64, st.sampled_from([np.float32, np.float64]))
def test_round_down(value, dtype):
    got = reference.round_down(value, dtype)
    assert dtype(got) == got
    assert got <= value
    assert next_up(got, dtype) > value


# --- masks --------------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.bool_, st.integers(0, 100)))
def test_masks_are_bits_from_the_least_significant_up(mask):
    number = sum(1 << i for i, bit in enumerate(mask) if bit)
    packed = reference.pack_mask(mask)
    assert packed.tobytes() == number.to_bytes((mask.size + 7) // 8, "little")
    assert np.array_equal(reference.unpack_mask(packed, mask.size), mask)


@given(arrays32(1))
def test_masked_out_is_plus_zero_and_kept_is_unchanged(x):
    mask = np.arange(x.size) % 3 == 0
    out = reference.apply_mask(x, mask)
    assert out[mask].tobytes() == x[mask].tobytes()
    assert not out[~mask].view(np.uint32).any()


# --- symmetric integers -------------------------------------------------------------------------------------------


def toward_zero(exact: Fraction) -> float:
    nearest = np.float32(float(exact))
    if Fraction(float(nearest)) > exact:
        nearest = np.nextafter(nearest, np.float32(0))
    return float(nearest)


@given(arrays32(1), st.integers(2, 8), st.integers(1, 20))
def test_scales_are_exact_quotients_rounded_toward_zero(x, bits, block):
    levels = 2 ** (bits - 1) - 1
    channels = -(-x.size // block)
    _, scales = reference.quantize(x, bits, block, channels)
    for i in range(channels):
        largest = float(np.abs(x[i * block : (i + 1) * block]).max())
        exact = max(toward_zero(Fraction(largest) / levels), 2.0**-126) if largest else 0.0
        assert float(scales[i]) == exact


@given(arrays32(1), st.integers(2, 8), st.integers(1, 20))
def test_nearest_rounding_leaves_an_exact_residual(x, bits, block):
    grid = (block, -(-x.size // block))
    codes, scales = reference.quantize(x, bits, *grid)
    assert np.abs(codes.astype(int)).max() <= 2 ** (bits - 1) - 1
    decoded = reference.dequantize(codes, scales, bits, *grid)
    assert np.isfinite(decoded).all()
    residual = x - decoded
    assert (decoded.astype(np.float64) + residual.astype(np.float64) == x).all()
    assert np.array_equal(decoded + residual, x)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("largest", [F32_MAX, 1.0, 127.0, 1.7, 3e-38, 2.0**-126, 1e-44, TINY])
def test_residual_is_exact_around_every_half_scale(bits, largest):
    levels = 2 ** (bits - 1) - 1
    scale = reference.quantize(np.array([largest], np.float32), bits, 1, 1)[1][0]
    near = [largest, 0.0, TINY]
    for half in range(1, 2 * levels):
        value = min(float(scale) * half / 2, largest)
        for step in range(-4, 5):
            bits_of = struct.unpack("<i", struct.pack("<f", value))[0] + step
            near.append(struct.unpack("<f", struct.pack("<i", max(0, bits_of)))[0])
    x = np.array([v for v in near if v <= largest], np.float32)
    x = np.concatenate([x, -x])
    codes, scales = reference.quantize(x, bits, x.size, 1)
    decoded = reference.dequantize(codes, scales, bits, x.size, 1)
    residual = (x - decoded).astype(np.float64)
    assert (decoded.astype(np.float64) + residual == x).all()
    # Half a scale, and what rounding scale and inverse toward zero may add for the largest codes.
    assert (np.abs(residual) <= float(scale) / 2 * (1 + 2.0**-22 * 2 * levels)).all()


def test_error_is_at_most_half_a_scale():
    x = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    for bits in range(2, 9):
        grid = (1024, -(-x.size // 1024))
        codes, scales = reference.quantize(x, bits, *grid)
        error = np.abs(reference.dequantize(codes, scales, bits, *grid).astype(np.float64) - x)
        slack = 1 + 2.0 ** (bits - 24)
        assert (error <= np.repeat(scales, 1024)[: x.size].astype(np.float64) / 2 * slack).all()


def test_zero_blocks_have_scale_zero():
    x = np.array([0, -0.0, 0, 5], np.float32)
    codes, scales = reference.quantize(x, 8, 2, 2)
    assert scales[0] == 0
    assert codes.tolist() == [0, 0, 0, 127]
    assert not reference.dequantize(codes, scales, 8, 2, 2)[:2].view(np.uint32).any()


@given(arrays32(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_channels_take_turns(x, inner, channels):
    codes, scales = reference.quantize(x, 8, inner, channels)
    for channel in range(channels):
        mine = [i for i in range(x.size) if i // inner % channels == channel]
        alone, scale = reference.quantize(x[mine], 8, max(1, len(mine)), 1)
        assert scale[0] == scales[channel]
        assert np.array_equal(codes[mine], alone)


def test_quantize_nothing():
    codes, scales = reference.quantize(np.zeros(0, np.float32), 8, 1024, 0)
    assert (codes.size, scales.size) == (0, 0)


@given(arrays32(1), st.integers(2, 8), st.integers(0, 2**64 - 1))
def test_stochastic_rounding_goes_to_a_neighbour(x, bits, seed):
    levels = 2 ** (bits - 1) - 1
    codes, scales = reference.quantize(x, bits, x.size, 1, (seed, 1, 5))
    inverse = (
        np.float32(toward_zero(Fraction(1) / Fraction(float(scales[0]))))
        if scales[0]
        else np.float32(0)
    )
    words = reference.philox(seed, 1, 5, x.size)
    for i in range(x.size):
        y = np.float32(x[i] * inverse)
        floor = math.floor(y)
        up = Fraction(int(words[i]) >> 8, 2**24) < Fraction(
            float(np.float32(y - np.float32(floor)))
        )
        assert codes[i] == min(max(floor + up, -levels), levels)


def test_stochastic_rounding_is_unbiased():
    n = 200_000
    fraction = np.float32(0.3)
    x = np.full(n, 10 + fraction, np.float32)
    x[0] = 127
    codes, scales = reference.quantize(x, 8, n, 1, (3, 4, 0))
    assert scales[0] == 1
    # Six standard deviations of the mean of n draws.
    assert abs(codes[1:].mean() - 10.3) < 6 * math.sqrt(0.3 * 0.7 / n)
    assert set(codes[1:].tolist()) == {10, 11}


def test_stochastic_rounding_depends_on_the_number_of_the_value_only():
    x = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    whole, _ = reference.quantize(x, 8, 1, 1000, (1, 2, 7))
    for cut in (1, 2, 3, 4, 501):
        part, _ = reference.quantize(x[cut:], 8, 1, 1000 - cut, (1, 2, 7 + cut))
        assert np.array_equal(whole[cut:], part)


@given(st.integers(2, 7), st.data())
def test_codes_are_packed_as_one_long_number(bits, data):
    end = 2 ** (bits - 1)
    codes = np.array(data.draw(st.lists(st.integers(-end, end - 1), max_size=40)), np.int8)
    number = sum((int(code) & (2**bits - 1)) << bits * i for i, code in enumerate(codes))
    packed = reference.pack_codes(codes, bits)
    assert packed.tobytes() == number.to_bytes((codes.size * bits + 7) // 8, "little")
    assert np.array_equal(reference.unpack_codes(packed, bits, codes.size), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_most_negative_code_reads_as_its_successor(bits):
    end = 2 ** (bits - 1)
    codes = np.array([-end, 1 - end], np.int8)
    decoded = reference.dequantize(codes, np.array([0.5], np.float32), bits, 2, 1)
    assert decoded.tolist() == [(1 - end) / 2] * 2


# --- sign and magnitude -------------------------------------------------------------------------------------------


@given(arrays32(1))
def test_the_mean_of_magnitudes_has_no_order(x):
    mean = reference.mean_magnitude(x)
    assert reference.mean_magnitude(np.sort(x)) == mean
    assert reference.mean_magnitude(-x[::-1]) == mean
    largest = float(np.abs(x).max())
    if largest == 0:
        assert mean == 0
        return
    unit = Fraction(2) ** (math.frexp(largest)[1] - 32)
    total = sum(round(Fraction(abs(float(v))) / unit) for v in x)
    exact = float(total) / x.size * float(unit)
    assert mean == float(np.float32(exact))


def test_the_mean_of_equal_magnitudes_is_theirs():
    for value in (F32_MAX, 1.1, 2.0**-126, TINY):
        value = float(np.float32(value))
        assert reference.mean_magnitude(np.array([value, -value] * 50, np.float32)) == value
    assert reference.mean_magnitude(np.zeros(0, np.float32)) == 0


@given(arrays32())
def test_signs(x):
    bits = reference.pack_signs(x)
    assert reference.unpack_mask(bits, x.size).tolist() == [bool(v < 0) for v in x]
    decoded = reference.unpack_signs(bits, 0.5, x.size)
    assert decoded.dtype == np.float32
    assert decoded.tolist() == [-0.5 if v < 0 else 0.5 for v in x]


# --- conversions --------------------------------------------------------------------------------------------------


def nearest_even(value: float, precision: int, least: int, overflow: float) -> float:
    """Round by rational arithmetic to `precision` bits, or to the multiple of 2**least."""
    if value == 0 or abs(value) >= overflow:
        return value if value == 0 else math.copysign(math.inf, value)
    unit = Fraction(2) ** max(math.frexp(value)[1] - precision, least)
    return math.copysign(float(round(Fraction(value) / unit) * unit), value)


@given(arrays32(1) | arrays64(1) | hnp.arrays(np.float64, 20, elements=st.floats(-1e5, 1e5)))
def test_narrowing_rounds_once(x):
    forms = {
        "float16": (11, -24, 65520.0, lambda b: b.view(np.float16)),
        "bfloat16": (8, -133, float.fromhex("0x1.FFp127"), lambda b: b.view(ml_dtypes.bfloat16)),
        "float32": (24, -149, float.fromhex("0x1.FFFFFFp127"), lambda b: b),
    }
    for name, (precision, least, overflow, view) in forms.items():
        got = view(reference.narrow(x, name)).astype(np.float64)
        expected = np.array([nearest_even(float(v), precision, least, overflow) for v in x])
        assert got.tobytes() == expected.tobytes()


def test_narrowing_from_float64_does_not_round_twice():
    # Just above the middle between 1 and the next bfloat16 (float16): through float32 both would fall to even.
    for name, step in (("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
        x = np.array([1 + step / 2 + 2.0**-40, -(1 + step / 2 + 2.0**-40)])
        assert reference.widen(reference.narrow(x, name), name).tolist() == [1 + step, -1 - step]


def test_all_sixteen_bit_floats_survive_a_round_trip():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for name, infinity in (("float16", 0x7C00), ("bfloat16", 0x7F80)):
        finite = bits[(bits & 0x7FFF) < infinity]
        for dtype in (np.float32, np.float64):
            wide = reference.widen(finite, name).astype(dtype)
            assert np.array_equal(reference.narrow(wide, name), finite)
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert reference.widen(bits, "bfloat16").tobytes() == expected.tobytes()


# --- random words and positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors for philox4x32-10
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    expected = [int(word, 16) for word in words.split()]
    first = (counter[0] | counter[1] << 32) << 2
    if first < 2**63:
        call_seed = counter[2] | counter[3] << 32
        assert reference.philox(key[0] | key[1] << 32, call_seed, first, 4).tolist() == expected
    got = reference._philox4x32(key[0] | key[1] << 32, np.array(counter, np.uint64)[:, None])
    assert got[:, 0].tolist() == expected


def philox_by_hand(key: int, counter: list[int]) -> list[int]:
    low = 0xFFFFFFFF
    k0, k1 = key & low, key >> 32
    c = list(counter)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k0, b & low, a >> 32 ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 9)
)
def test_words_are_numbered(codec_seed, call_seed, first, n):
    expected = []
    for i in range(first, first + n):
        block = i >> 2
        counter = [block & 0xFFFFFFFF, block >> 32, call_seed & 0xFFFFFFFF, call_seed >> 32]
        expected.append(philox_by_hand(codec_seed, counter)[i & 3])
    assert reference.philox(codec_seed, call_seed, first, n).tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_draw_seed(codec_seed, call_seed, group):
    words = philox_by_hand(codec_seed, [group, 0x52414E44, call_seed & 0xFFFFFFFF, call_seed >> 32])
    assert reference.draw_seed(codec_seed, call_seed, group) == words[0] | words[1] << 32


def permuted_by_hand(n: int, k: int, seed: int) -> list[int]:
    low = 0xFFFFFFFF

    def mix(v):
        v &= low
        v = (v ^ v >> 16) * 0x85EBCA6B & low
        v = (v ^ v >> 13) * 0xC2B2AE35 & low
        return v ^ v >> 16

    b = 2
    while 2**b < n:
        b += 2
    h = b // 2
    keys = philox_by_hand(seed, [0, 0, 0, 0]) + philox_by_hand(seed, [1, 0, 0, 0])
    found = []
    for x in range(k):
        while True:
            left, right = x >> h, x % 2**h
            for key in keys:
                left, right = right, left ^ mix(right + key) % 2**h
            x = left << h | right
            if x < n:
                break
        found.append(x)
    return sorted(found)


@given(st.integers(0, 300) | st.integers(1 << 31, (1 << 63) - 1), st.data())
def test_random_positions(n, data):
    k = data.draw(st.integers(0, min(n, 40)))
    seed = data.draw(st.integers(0, 2**64 - 1))
    positions = reference.random_positions(n, k, seed)
    assert positions.dtype == np.int64
    assert positions.tolist() == permuted_by_hand(n, k, seed)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 16, 17, 1000, 65536])
def test_random_positions_are_a_permutation(n):
    assert np.array_equal(reference.random_positions(n, n, n), np.arange(n))


def test_random_positions_are_uniform():
    hits = np.zeros(100)
    for seed in range(2000):
        hits[reference.random_positions(100, 10, seed)] += 1
    # Each is kept 200 times on average, with a standard deviation of 13.4.
    assert abs(hits - 200).max() < 6 * 13.4


# --- sums and checksum --------------------------------------------------------------------------------------------


@given(arrays32(1, 20), st.floats(0, 1e6, width=32), st.data())
def test_sums_round_every_operation(values, weight, data):
    values = values / np.float32(2**24)
    start = data.draw(hnp.arrays(np.float32, values.size, elements=st.floats(-1e6, 1e6, width=32)))
    total = start.copy()
    reference.accumulate(total, values, weight)
    by_hand = [
        np.float32(a + np.float32(np.float32(weight) * v))
        for a, v in zip(start, values, strict=True)
    ]
    assert total.tobytes() == np.array(by_hand, np.float32).tobytes()

    total = start.astype(np.float64)
    reference.accumulate(total, values, weight)
    by_hand = [float(a) + weight * float(v) for a, v in zip(start, values, strict=True)]
    assert total.tobytes() == np.array(by_hand).tobytes()

    positions = np.arange(0, values.size, 2)
    sparse = start.copy()
    reference.accumulate_sparse(sparse, positions, values[positions], weight)
    total = start.copy()
    reference.accumulate(total, values, weight)
    assert sparse[positions].tobytes() == total[positions].tobytes()
    assert sparse[1::2].tobytes() == start[1::2].tobytes()


def test_summing_codes_is_decoding_and_summing():
    x = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    codes, scales = reference.quantize(x, 8, 64, 16)
    for dtype in (np.float32, np.float64):
        one, two = np.ones(1000, dtype), np.ones(1000, dtype)
        reference.accumulate_codes(one, codes, scales, 8, 64, 16, 0.3)
        reference.accumulate(two, reference.dequantize(codes, scales, 8, 64, 16), 0.3)
        assert one.tobytes() == two.tobytes()


@given(st.binary(), st.binary())
def test_crc32_is_zlibs(one, two):
    assert reference.crc32(two, reference.crc32(one)) == zlib.crc32(one + two)


# --- the public wrappers ------------------------------------------------------------------------------------------

READ_ONLY = np.zeros(1, np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: ops.topk_threshold(np.ones(3, np.int32), 1), TypeError),
        (lambda: ops.topk_threshold(np.ones(3), 4), ValueError),
        (lambda: ops.topk_threshold(np.ones(3), -1), ValueError),
        (lambda: ops.topk_threshold(np.ones(3), 1.5), TypeError),
        (lambda: ops.topk_threshold([np.ones(3), np.array([np.inf])], 1), NonFiniteError),
        (lambda: ops.percentile_threshold(np.ones(3), 101), ValueError),
        (lambda: ops.percentile_threshold(np.ones(3), math.nan), ValueError),
        (lambda: ops.percentile_threshold(np.ones(3), 5, "midpoint"), ValueError),
        (lambda: ops.compact(np.ones(3), -1), ValueError),
        (lambda: ops.apply_mask(np.ones(3), [True]), ValueError),
        (lambda: ops.unpack_mask(b"", 1), ValueError),
        (lambda: ops.random_positions(3, 4, 0), ValueError),
        (lambda: ops.random_positions(3, 2, 2**64), ValueError),
        (lambda: ops.quantize_int8(np.array([1e300])), NonFiniteError),
        (lambda: ops.quantize_int8(np.array([np.nan], np.float32)), NonFiniteError),
        (lambda: ops.quantize_int8(np.ones(3, np.float32), block_size=0), ValueError),
        (lambda: ops.quantize_kbit(np.ones(3, np.float32), 9), ValueError),
        (lambda: ops.dequantize_int8(np.ones(3, np.int8), np.ones(2, np.float32)), ValueError),
        (lambda: ops.dequantize_int8(np.ones(1, np.int8), -np.ones(1, np.float32)), ValueError),
        (
            lambda: ops.dequantize_int8(np.full(1, 9, np.int8), np.full(1, 3e38, np.float32)),
            NonFiniteError,
        ),
        (
            lambda: ops.dequantize_kbit(np.full(1, 9, np.int8), np.ones(1, np.float32), 4),
            ValueError,
        ),
        (lambda: ops.pack_codes(np.ones(1, np.int8), 8), ValueError),
        (lambda: ops.unpack_signs(b"\0", -1.0, 1), ValueError),
        (lambda: ops.unpack_signs(b"\0", 0.1, 1), ValueError),
        (lambda: ops.narrow(np.array([65520.0]), "float16"), NonFiniteError),
        (lambda: ops.narrow(np.ones(1), "float8"), ValueError),
        (lambda: ops.widen(np.ones(1, np.uint16), "float32"), ValueError),
        (lambda: ops.pack_sparse([1, 1], 5), ValueError),
        (lambda: ops.pack_sparse([5], 5), ValueError),
        (lambda: ops.pack_sparse([-1], 5), ValueError),
        (lambda: ops.pack_sparse([0.5], 5), TypeError),
        (lambda: ops.scatter([0], np.ones(1), np.ones(2, np.float32)), TypeError),
        (lambda: ops.scatter([0, 1], np.ones(1), np.ones(2)), ValueError),
        (lambda: ops.scatter([0, 2**63 - 1, -2, 5], np.ones(4), np.ones(9)), ValueError),
        (
            lambda: ops.accumulate_sparse(np.ones(9), [0, 2**63 - 1, -2, 5], np.ones(4), 1.0),
            ValueError,
        ),
        (lambda: ops.pack_sparse([], 2**63 - 1), ValueError),
        (lambda: ops.accumulate(np.ones((2, 2)).T[:1], np.ones(2), 1.0), ValueError),
        (lambda: ops.accumulate(np.ones(2), np.ones(2), math.inf), ValueError),
        (lambda: ops.accumulate(np.ones(2, np.float32), np.ones(2), 1e39), ValueError),
        (lambda: ops.accumulate([1.0], np.ones(1), 1.0), TypeError),
        (lambda: ops.pack_mask([True], out=np.zeros(2, np.uint8)), ValueError),
        (lambda: ops.pack_mask([True], out=[0]), ValueError),
        (lambda: ops.philox(0, 0, 0, 2, out=np.zeros(4, np.uint32)[::2]), ValueError),
        (lambda: ops.widen(np.ones(1, np.uint16), "float16", out=READ_ONLY), ValueError),
        (lambda: ops.use("sse9"), BackendError),
    ],
)
def test_wrong_arguments_are_refused(call, error):
    with pytest.raises(error):
        call()


def test_a_threshold_between_floats_has_no_ties():
    x = np.array([1, 2], np.float32)
    between = 1 + 1e-12
    assert ops.compact(x, between, ties=1)[0].tolist() == [1]
    assert ops.compact(x, 1.0, ties=1)[0].tolist() == [0, 1]


def test_out_is_filled_and_returned():
    x = np.array([[1, -2], [3, 4]], np.float32)
    out = np.empty_like(x)
    assert ops.apply_mask(x, x > 0, out=out) is out
    assert out.tolist() == [[1, 0], [3, 4]]
    codes, scales = ops.quantize_int8(x, axis=0)
    assert codes.shape == x.shape
    assert scales.shape == (2,)
    assert ops.dequantize_int8(codes, scales, axis=0, out=out) is out
    flat = ops.dequantize_int8(codes.ravel(), scales, axis=0, shape=(2, 2))
    assert np.array_equal(flat, out)
    outs = np.empty_like(codes), np.empty_like(scales)
    filled = ops.quantize_int8(x, axis=0, out=outs)
    assert filled[0] is outs[0]
    assert filled[1] is outs[1]
    assert np.array_equal(outs[0], codes)
    assert np.array_equal(outs[1], scales)


def test_out_may_be_an_input():
    x = np.arange(-5000, 5000, dtype=np.float32)
    expected = np.packbits(x < 0, bitorder="little")
    masked = np.where(x > 0, x, 0)
    assert np.array_equal(ops.pack_signs(x, out=x.view(np.uint8)[: expected.size]), expected)
    x = np.arange(-5000, 5000, dtype=np.float32)
    assert np.array_equal(ops.apply_mask(x, x > 0, out=x), masked)


def test_what_is_added_may_share_memory_with_the_sum(isa):
    values = np.arange(1, 12, dtype=np.float32)
    shared = values.copy()
    ops.accumulate(shared[1:], shared[:-1], 0.5)
    np.testing.assert_array_equal(shared[1:], values[1:] + 0.5 * values[:-1])
    shared = values.copy()
    ops.accumulate_sparse(shared, np.arange(1, 11), shared[:-1], 2)
    np.testing.assert_array_equal(shared[1:], values[1:] + 2 * values[:-1])
    shared = values.copy()
    ops.scatter(np.arange(1, 11), shared[:-1], shared)
    np.testing.assert_array_equal(shared[1:], values[:-1])
    shared = values.copy()
    ops.accumulate_codes(shared[:4], np.ones(4, np.int8), shared[3:4], 8, 4, 1, 1)
    np.testing.assert_array_equal(shared[:4], values[:4] + 4)


def test_an_unusable_backend_named_from_outside(monkeypatch):
    monkeypatch.setattr(ops, "_backend", None)
    monkeypatch.setenv("FEDCODEC_ISA", "sse9")
    with pytest.raises(BackendError, match=r"sse9.*reference"):
        ops.crc32(b"")
    monkeypatch.setenv("FEDCODEC_ISA", "reference")
    assert ops.active() == "reference"


@settings(max_examples=20)
@given(arrays32(1), st.booleans())
def test_inputs_stay_as_they_are(x, stochastic):
    before = x.tobytes()
    ops.topk_threshold([x], x.size // 2)
    ops.percentile_threshold([x], 50)
    ops.quantize_int8(x, stochastic=stochastic)
    ops.mean_magnitude(x)
    ops.compact(x, 0.0)
    assert x.tobytes() == before
