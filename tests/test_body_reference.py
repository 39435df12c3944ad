"""Bodies on the oracle: bytes worked out by hand, round trips, sums, and hostile bytes."""

from __future__ import annotations

import math
import struct
import tracemalloc
import zlib
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from bodies import Bodies
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcodec import body
from fedcodec.errors import DecodeError
from fedcodec.ops import reference

BODIES = Bodies(body, ops=reference)
F32, F16, BF16, F64, I8, I32, I64, U64, BOOL = 1, 2, 3, 4, 8, 10, 11, 15, 16
ITEM = {F32: 4, F16: 2, BF16: 2, F64: 8, I8: 1, I32: 4, I64: 8, U64: 8, BOOL: 1}
F32_MAX = float(np.finfo(np.float32).max)
RAW = ("coder", None, None)
BLOCK = ("integer", 8, "block", 1024)
NEAREST = (False, 0, 0)


def f32(*values):
    return np.array(values, np.float32)


def tensor(array, dtype=None, shape=None):
    """A tensor for encoding, from a NumPy array of its own dtype or of work values."""
    ids = {
        "float32": F32,
        "float16": F16,
        "bfloat16": BF16,
        "float64": F64,
        "int8": I8,
        "int32": I32,
    }
    ids |= {"int64": I64, "uint64": U64, "bool": BOOL}
    own = ids[array.dtype.name]
    flat = np.ascontiguousarray(array).reshape(-1)
    if own in (F16, BF16):
        flat = flat.view(np.uint16)
    elif own > F64:
        flat = flat.view(np.uint8)
    return flat, dtype or own, array.shape if shape is None else shape


def blank(tensors, fill=None):
    """Arrays to decode to, with bytes that show whether they were written."""
    storage = {F32: np.float32, F64: np.float64, F16: np.uint16, BF16: np.uint16}
    result = []
    for _, dtype, shape in tensors:
        nbytes = math.prod(shape) * ITEM[dtype]
        raw = np.full(nbytes, 0xAB if fill is None else fill, np.uint8)
        result.append((raw.view(storage.get(dtype, np.uint8)), dtype, shape))
    return result


def contents(tensors):
    return [array.tobytes() for array, _, _ in tensors]


def for_decoding(coder):
    """What a decoder knows of a coder."""
    if coder[0] == "residual":
        return ("residual", for_decoding(coder[1]), for_decoding(coder[2]))
    _, select, quantize = coder
    if select is not None and select[0] == "structured":
        select = select[:3]
    elif select is not None and select[0] != "mask":
        select = ("random" if select[0] == "random" else "sparse", select[1])
    if quantize is not None:
        quantize = quantize[: {"integer": 4, "python": 2}.get(quantize[0], 9)]
    return ("coder", select, quantize)


def encode(tensors, coder, first=0, indices=None):
    indices = list(range(len(tensors))) if indices is None else indices
    return BODIES.encode(b"", tensors, [(indices, coder)], False, first)


def decode(payload, tensors, coder, start=0, stop=None):
    out = blank(tensors)
    stop = len(payload) if stop is None else stop
    segments = [(list(range(len(tensors))), for_decoding(coder))]
    BODIES.decode(payload, start, stop, out, segments)
    return [array for array, _, _ in out]


def toward_zero(a, b):
    quotient = np.float32(a / b)
    return (
        np.nextafter(quotient, np.float32(0))
        if Fraction(float(quotient)) > Fraction(a, b)
        else quotient
    )


# --- bytes --------------------------------------------------------------------------------------------------------

X = f32(1, -4, 0, 2)


@pytest.mark.parametrize(
    ("tensors", "coder", "expected"),
    [
        ([X], RAW, struct.pack("<4f", *X)),
        ([np.zeros(0, np.float32)], ("coder", ("topk", 0, [0]), BLOCK + NEAREST), b""),
        ([np.float32(3).reshape(())], RAW, struct.pack("<f", 3)),
        # floats first, then the others as they are, in order
        (
            [np.array([True, False]), X, np.array([-1, 2], np.int32)],
            RAW,
            struct.pack("<4f", *X) + b"\1\0" + struct.pack("<2i", -1, 2),
        ),
        # top-2: one tile, a bitmap of 4 bits; 2 values of 4 bytes against a scale and 2 codes
        (
            [X],
            ("coder", ("topk", 0, [2]), BLOCK + NEAREST),
            bytes([16, 0, 2, 0b1010]) + struct.pack("<f2b", toward_zero(4, 127), -127, 64),
        ),
        # top-1: 4 bytes as they are against 5 coded
        (
            [X],
            ("coder", ("topk", 0, [1]), BLOCK + NEAREST),
            bytes([16, 0, 1, 0b10]) + struct.pack("<f", -4),
        ),
        # 3-bit codes 1, -3, 0, 2 (L = 3, scale 4/3), one scale a group
        (
            [X],
            ("coder", None, ("integer", 3, "group", 0, *NEAREST)),
            struct.pack("<f", toward_zero(4, 3)) + (0b010_000_101_001).to_bytes(2, "little"),
        ),
        # a scale for each of 2 channels of 3 values
        (
            [f32(127, 0, 1, 254, 2, -2).reshape(2, 3)],
            ("coder", None, ("integer", 8, "channel", 0, *NEAREST)),
            struct.pack("<2f6b", 1, 2, 127, 0, 1, 127, 1, -1),
        ),
        # sign of all; the mean of 1, 4, 0, 2
        ([X], ("coder", None, ("sign",)), struct.pack("<fB", 1.75, 0b0010)),
        # ternary: zeros are not kept, so 3 are; mean 7/3
        (
            [X],
            ("coder", ("topk", 0, [4]), ("sign",)),
            bytes([16, 0, 3, 0b1011]) + struct.pack("<fB", np.float32(7 / 3), 0b010),
        ),
        ([X], ("coder", None, ("cast", F16)), struct.pack("<4e", *X)),
        ([X], ("coder", None, ("cast", BF16)), X.astype(ml_dtypes.bfloat16).tobytes()),
        # threshold and percentile: strictly above
        (
            [X],
            ("coder", ("threshold", 0, 2.0), None),
            bytes([16, 0, 1, 0b10]) + struct.pack("<f", -4),
        ),
        (
            [X],
            ("coder", ("percentile", 0, 50, "linear"), None),
            bytes([16, 0, 2, 0b1010]) + struct.pack("<2f", -4, 2),
        ),
        # nothing is above: an empty list, no values
        ([X], ("coder", ("threshold", 0, 4.0), BLOCK + NEAREST), bytes([16, 1, 0])),
        # everything: the complement of nothing
        (
            [f32(1, 2)],
            ("coder", ("threshold", 0, 0.5), None),
            bytes([16, 5, 0]) + struct.pack("<2f", 1, 2),
        ),
        # each tensor its own index set
        (
            [f32(1, 2), f32(3, 4)],
            ("coder", ("topk", 1, [1, 1]), None),
            bytes([16, 0, 1, 2])
            + struct.pack("<f", 2)
            + bytes([16, 0, 1, 2])
            + struct.pack("<f", 4),
        ),
        # one flat space of float16 and float32: values as float32
        (
            [np.array([1, 5], np.float16), f32(7, 4)],
            ("coder", ("topk", 0, [2]), None),
            bytes([16, 0, 2, 0b0110]) + struct.pack("<2f", 5, 7),
        ),
        # with a float64 among them: as float64
        (
            [np.array([1, 5], np.float16), np.array([7, 4.0])],
            ("coder", ("topk", 0, [2]), None),
            bytes([16, 0, 2, 0b0110]) + struct.pack("<2d", 5, 7),
        ),
        # a mask needs no positions
        ([X], ("coder", ("mask", b"\x05", 4), None), struct.pack("<2f", 1, 0)),
        # of 2 columns the one with the larger norm, -4 and 2 against 1 and 0
        (
            [X.reshape(2, 2)],
            ("coder", ("structured", 1, 1, 0.5, 2), None),
            bytes([0b10]) + struct.pack("<2f", -4, 2),
        ),
        # random: k, seed, values in the order of the positions; all four are kept
        (
            [X],
            ("coder", ("random", 0, [4], [0x0102030405060708]), None),
            b"\4" + bytes(range(8, 0, -1)) + struct.pack("<4f", *X),
        ),
        # residual: the largest as it is, then what it missed as one scale and codes
        (
            [X],
            (
                "residual",
                ("coder", ("topk", 0, [1]), None),
                ("coder", None, ("integer", 8, "group", 0, *NEAREST)),
            ),
            bytes([16, 0, 1, 0b10])
            + struct.pack("<f", -4)
            + struct.pack("<f4b", toward_zero(2, 127), 64, 0, 0, 127),
        ),
    ],
)
def test_bytes_worked_out_by_hand(tensors, coder, expected):
    given_tensors = [tensor(array) for array in tensors]
    assert encode(given_tensors, coder).hex(" ") == expected.hex(" ")
    decode(expected, given_tensors, coder)


def test_header_seal_and_segments():
    tensors = [tensor(X), tensor(np.array([1], np.int8)), tensor(X * 2)]
    segments = [([2], RAW), ([0, 1], ("coder", None, ("cast", F16)))]
    payload = BODIES.encode(b"head", tensors, segments, True)
    plain = b"head" + (X * 2).tobytes() + X.astype(np.float16).tobytes() + b"\1"
    assert payload == plain + zlib.crc32(plain).to_bytes(4, "little")
    out = blank(tensors)
    BODIES.decode(payload, 4, len(payload) - 4, out, segments)
    assert contents(out) == contents(tensors)


def test_a_bool_of_any_byte_travels_as_one():
    odd = np.array([0, 1, 7], np.uint8).view(np.bool_)
    assert encode([tensor(odd)], RAW) == b"\0\1\1"


# --- round trips --------------------------------------------------------------------------------------------------


def quantizers():
    return [
        None,
        ("sign",),
        ("cast", F16),
        ("cast", BF16),
        *(
            ("integer", bits, *grain, *rounding)
            for bits in (2, 5, 8)
            for grain in (("block", 3), ("group", 0))
            for rounding in (NEAREST, (True, 3, 4))
        ),
    ]


def selects(sizes, seed=5):
    whole, each = [sum(sizes) // 3], [n // 3 for n in sizes]
    bits = np.packbits(np.arange(sum(sizes)) % 3 == 0, bitorder="little").tobytes()
    return [
        None,
        ("topk", 0, whole),
        ("topk", 1, each),
        ("threshold", 0, 0.5),
        ("percentile", 1, 70.0, "lower"),
        ("random", 0, whole, [seed]),
        ("random", 1, each, [seed + i for i in range(len(sizes))]),
        ("mask", bits, sum(sizes)),
        ("structured", 1, 0, 0.4, 1),
        ("structured", 1, 1, None, 2),
    ]


def update(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape) * scale

    return [
        tensor(normal(3, 5).astype(np.float32)),
        tensor(rng.integers(-9, 9, 4, dtype=np.int32)),
        tensor(normal(7).astype(np.float16)),
        tensor(normal(2, 0).astype(np.float32)),
        tensor(normal(4, 3).astype(ml_dtypes.bfloat16)),
        tensor(normal(6)),
        tensor(rng.integers(0, 2, 5).astype(np.bool_)),
        tensor(normal().astype(np.float32).reshape(())),
    ]


FLOATS = [0, 2, 3, 4, 5, 7]


def coders(tensors):
    sizes = [math.prod(tensors[i][2]) for i in FLOATS]
    plain = [("coder", select, quantize) for select in selects(sizes) for quantize in quantizers()]
    plain += [
        ("coder", None, ("integer", bits, "channel", axis, *NEAREST))
        for bits in (3, 8)
        for axis in (0, 1)
    ]
    sums = [
        ("residual", plain[15], plain[0]),
        ("residual", plain[20], plain[31]),
        ("residual", plain[16], plain[40]),
    ]
    return plain + sums


ALL = list(range(len(coders(update()))))


def as_float64(array, dtype):
    if dtype in (F16, BF16):
        array = array.view(np.float16 if dtype == F16 else ml_dtypes.bfloat16)
    return array.astype(np.float64)


@pytest.mark.parametrize("number", ALL)
def test_round_trip_of_every_coder(number):
    tensors = update()
    coder = coders(tensors)[number]
    before = contents(tensors)
    payload = encode(tensors, coder)
    assert contents(tensors) == before
    assert encode(tensors, coder) == payload
    out = decode(payload, tensors, coder)
    assert out[1].tobytes() == tensors[1][0].tobytes()
    assert out[6].tobytes() == tensors[6][0].tobytes()
    if coder == RAW:
        assert [array.tobytes() for array in out] == before
    if coder[0] == "coder" and coder[2] is None:
        for i in FLOATS:
            kept = out[i] != 0
            assert np.array_equal(out[i][kept], tensors[i][0][kept])
    segments = [(list(range(len(tensors))), for_decoding(coder))]
    BODIES.check(payload, 0, len(payload), tensors, segments)


@pytest.mark.parametrize("number", ALL)
def test_summing_is_decoding_and_summing(number):
    tensors = update(1)
    coder = coders(tensors)[number]
    payload = encode(tensors, coder)
    out = decode(payload, tensors, coder)
    segments = [(list(range(len(tensors))), for_decoding(coder))]
    described = [(None, dtype, shape) for _, dtype, shape in tensors]
    for kind in (np.float32, np.float64):
        kinds = [kind if dtype <= F64 else np.float64 for _, dtype, _ in tensors]
        sums = [np.full(math.prod(t[2]), 0.5, k) for t, k in zip(tensors, kinds, strict=True)]
        bounds = BODIES.accumulate(
            payload, 0, len(payload), described, segments, sums, 0.7, (0.0, 0.0)
        )
        for got, array, (_, dtype, _), k in zip(sums, out, tensors, kinds, strict=True):
            values = (
                as_float64(array, dtype)
                if dtype <= F64
                else array.view({I32: "<i4", BOOL: "u1"}[dtype])
            )
            expected = k(0.5) + k(0.7) * values.astype(k)
            assert got.tobytes() == expected.tobytes()
        for bound, k in zip(bounds, (np.float32, np.float64), strict=True):
            mine = [i for i in FLOATS if kinds[i] is k]
            largest = max(
                (np.abs(as_float64(out[i], tensors[i][1])).max(initial=0) for i in mine), default=0
            )
            assert bound >= k(0.7) * k(largest)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_decoded_plus_residual_is_the_input(values, data):
    tensors = [tensor(np.array(v, np.float32)) for v in values]
    sizes = [len(v) for v in values]
    select = data.draw(st.sampled_from(selects(sizes)))
    bits, block = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 9))
    quantize = data.draw(st.sampled_from([None, ("integer", bits, "block", block, *NEAREST)]))
    coder = ("coder", select, quantize)
    out = decode(encode(tensors, coder), tensors, coder)
    for (x, _, _), decoded in zip(tensors, out, strict=True):
        residual = x - decoded
        assert (decoded.astype(np.float64) + residual == x).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38]), max_size=40), st.integers(0, 40)
)
def test_topk_on_the_wire_keeps_the_lowest_of_equals(values, k):
    x = np.array(values, np.float32)
    k = min(k, x.size)
    coder = ("coder", ("topk", 0, [k]), None)
    (out,) = decode(encode([tensor(x)], coder), [tensor(x)], coder)
    kept = sorted(range(x.size), key=lambda i: (-abs(x[i]), i))[:k]
    expected = np.zeros_like(x)
    expected[kept] = x[kept]
    assert out.tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0, 1e-45]), min_size=1, max_size=30),
    st.integers(0, 30),
)
def test_ternary_never_keeps_a_zero(values, k):
    x = np.array(values, np.float32)
    for select in (("topk", 0, [min(k, x.size)]), ("threshold", 0, 0.0)):
        coder = ("coder", select, ("sign",))
        (out,) = decode(encode([tensor(x)], coder), [tensor(x)], coder)
        assert not out[x == 0].any()
        # Either one magnitude (0 if the mean falls below half of the least float), or few enough to travel raw.
        assert ((np.sign(out) == np.sign(x)) | (out == 0)).all()


def test_raw_keeps_minus_zero_and_subnormals():
    x = f32(-0.0, 1e-45, -1e-45, 0.0)
    for coder in (RAW, ("coder", ("topk", 0, [4]), None)):
        (out,) = decode(encode([tensor(x)], coder), [tensor(x)], coder)
        assert out.tobytes() == x.tobytes()


def test_work_values_of_a_narrower_dtype():
    work = f32(1.0001, -2.5, 70.3, 1e-9)
    bits = work.astype(np.float16)
    for coder in (RAW, ("coder", ("topk", 0, [3]), None)):
        assert encode([tensor(work, F16)], coder) == encode([tensor(bits)], coder)
    coder = ("coder", None, ("integer", 8, "block", 2, *NEAREST))
    # Two 16-bit values a block of one scale and two codes: raw is not larger.
    assert len(encode([tensor(work, F16)], coder)) == 8
    coder = ("coder", None, ("integer", 2, "group", 0, *NEAREST))
    values = np.repeat(work, 3)
    payload = encode([tensor(values, F16)], coder)
    codes, scales = reference.quantize(values, 2, 12, 1)
    assert payload == scales.tobytes() + reference.pack_codes(codes, 2).tobytes()
    (out,) = decode(payload, [tensor(values, F16)], coder)
    expected = reference.dequantize(codes, scales, 2, 12, 1).astype(np.float16)
    assert out.tobytes() == expected.tobytes()


def test_stochastic_values_are_numbered_through_groups_and_residuals():
    rounding = (True, 11, 12)
    quantize = ("integer", 8, "block", 4, *rounding)
    a, b = (np.random.default_rng(i).standard_normal(9).astype(np.float32) for i in range(2))
    short = f32(1)  # travels raw and is not counted
    payload = encode([tensor(a), tensor(short), tensor(b)], ("coder", None, quantize), first=100)
    expected = b""
    for values, first in ((a, 100), (None, 0), (b, 109)):
        if values is None:
            expected += short.tobytes()
            continue
        codes, scales = reference.quantize(values, 8, 4, 3, (11, 12, first))
        expected += scales.tobytes() + codes.tobytes()
    assert payload == expected

    payload = encode(
        [tensor(a)], ("residual", ("coder", None, quantize), ("coder", None, quantize)), first=7
    )
    codes, scales = reference.quantize(a, 8, 4, 3, (11, 12, 7))
    missed = a - reference.dequantize(codes, scales, 8, 4, 3)
    again, finer = reference.quantize(missed, 8, 4, 3, (11, 12, 16))
    assert payload == b"".join(part.tobytes() for part in (scales, codes, finer, again))


def test_a_residual_is_added_in_the_tensors_float_type():
    x = np.array([1.0, 2.0**-40, 3.0])
    coder = ("residual", ("coder", ("topk", 0, [1]), None), RAW)
    (out,) = decode(encode([tensor(x)], coder), [tensor(x)], coder)
    assert out.tobytes() == x.tobytes()
    half = np.array([1, 2.0**-11 * 3, 2.0**-24], np.float16)
    (out,) = decode(encode([tensor(half)], coder), [tensor(half)], coder)
    assert out.tobytes() == half.tobytes()
    # 1 + (2^-11 + 2^-24) is above the middle of two float16: a first term rounded early would lose the tie.
    first, second = struct.pack("<f", 1), struct.pack("<f", 2.0**-11 + 2.0**-23)
    coder = ("residual", ("coder", ("mask", b"\1", 2), None), ("coder", ("mask", b"\1", 2), None))
    described = [tensor(np.zeros(1, np.float16)), tensor(f32(0))]
    out = decode(first + second, described, coder)
    assert out[0].view(np.float16)[0] == 1 + 2.0**-10


# --- values that may not travel -----------------------------------------------------------------------------------


def non_finite(tensors, coder):
    with pytest.raises(body.NonFinite) as caught:
        encode(tensors, coder)
    return caught.value.args


def test_what_is_not_finite_is_named():
    for bad in (math.nan, math.inf, -math.inf):
        for array in (f32(0, bad, 1), np.array([0, bad, 1]), np.array([0, bad, 1], np.float16)):
            for select in (None, ("topk", 0, [1]), ("mask", b"\x10", 5)):
                tensors = [tensor(np.ones(2, array.dtype)), tensor(array)]
                found = non_finite(tensors, ("coder", select, ("sign",)))
                assert found[:2] == (1, 1)
                assert str(found[2]) == str(bad)
                assert found[3] == 0


@pytest.mark.parametrize(
    ("array", "dtype", "coder", "expected"),
    [
        # where values travel, or decode, in a narrower dtype
        (f32(1, 65520), F16, RAW, (0, 1, 65520, F16)),
        (f32(1, -3.4e38), BF16, RAW, (0, 1, float(np.float32(-3.4e38)), BF16)),
        (f32(1, 65520), None, ("coder", None, ("cast", F16)), (0, 1, 65520, F16)),
        (np.array([1, 1e39]), None, ("coder", None, ("sign",)), (0, 1, 1e39, F32)),
        (
            np.array([1, 1e39]),
            None,
            ("coder", ("topk", 0, [1]), ("cast", BF16)),
            (0, 1, 1e39, BF16),
        ),
        (
            f32(*[1] * 9, 70000),
            F16,
            ("coder", None, ("integer", 8, "group", 0, *NEAREST)),
            (0, 9, 70000, F16),
        ),
    ],
)
def test_overflow_is_named(array, dtype, coder, expected):
    assert non_finite([tensor(array, dtype)], coder) == expected


def test_a_shared_scale_may_not_carry_a_narrow_value_beyond_its_dtype():
    # The scale is 1e5: 60000 rounds up to it, which float16 cannot hold.
    tensors = [tensor(np.full(3, 60000, np.float16)), tensor(f32(*[127e5] * 9))]
    coder = ("coder", ("topk", 0, [12]), ("integer", 8, "group", 0, *NEAREST))
    assert non_finite(tensors, coder) == (0, 0, 60000, F16)


def test_a_residual_may_not_leave_the_range():
    class High:
        def encode_values(self, values, seed):
            return b""

        def decode_values(self, data, n):
            return np.full(n, F32_MAX, np.float32)

    coder = ("residual", ("coder", None, ("python", High(), 0)), RAW)
    assert non_finite([tensor(f32(1, -F32_MAX))], coder)[:2] == (0, 1)
    coder = (
        "residual",
        ("coder", None, ("python", High(), 0)),
        ("coder", None, ("python", High(), 0)),
    )
    assert non_finite([tensor(f32(1))], coder) == (0, 0, 1.0, F32)


def test_float64_that_travels_raw_needs_no_narrower_range():
    x = np.array([1e300, -1e-300])
    coder = ("coder", ("topk", 0, [1]), ("integer", 8, "block", 1, *NEAREST))
    # One scale and one code are 5 bytes, fewer than 8: coded, so refused.
    assert non_finite([tensor(x)], coder)[3] == F32
    coder = ("coder", ("topk", 0, [1]), None)
    (out,) = decode(encode([tensor(x)], coder), [tensor(x)], coder)
    assert out.tolist() == [1e300, 0]


def test_wrong_mask_is_the_callers_mistake():
    with pytest.raises(ValueError, match="mask"):
        encode([tensor(X)], ("coder", ("mask", b"\1", 3), None))


# --- Python's own quantizers --------------------------------------------------------------------------------------


class Halves:
    """A quantizer in the way of third parties, which misbehaves on request."""

    def __init__(self, result=None):
        self.result = result
        self.seeds = []

    def encode_values(self, values, seed):
        assert values.dtype == np.float32
        self.seeds.append(seed)
        return values.astype(np.float16).tobytes()

    def decode_values(self, data, n):
        if self.result is not None:
            return self.result(n)
        values = np.frombuffer(data, np.float16).astype(np.float32)
        if values.size != n:
            raise RuntimeError("wrong size")
        return values


def test_a_quantizer_in_python():
    coder = ("coder", ("topk", 0, [2]), ("python", Halves(), 42))
    payload = encode([tensor(X)], coder)
    assert payload == bytes([16, 0, 2, 0b1010, 4]) + struct.pack("<2e", -4, 2)
    assert coder[2][1].seeds == [42]
    (out,) = decode(payload, [tensor(X)], coder)
    assert out.tolist() == [0, -4, 0, 2]
    wide = np.array([1.5, 0, -2.5])
    (out,) = decode(encode([tensor(wide)], coder), [tensor(wide)], coder)
    assert out.dtype == np.float64
    assert out.tolist() == [1.5, 0, -2.5]


def refuse(n):
    raise MemoryError


@pytest.mark.parametrize(
    "result",
    [
        lambda n: [0.0] * n,
        lambda n: np.zeros(n),
        lambda n: np.zeros(n + 1, np.float32),
        lambda n: np.zeros((n, 1), np.float32),
        lambda n: np.full(n, np.nan, np.float32),
        refuse,
    ],
)
def test_a_quantizer_that_misbehaves_is_a_decode_error(result):
    payload = encode([tensor(X)], ("coder", None, ("python", Halves(), 0)))
    with pytest.raises(DecodeError) as caught:
        decode(payload, [tensor(X)], ("coder", None, ("python", Halves(result), 0)))
    assert caught.value.offset == 0


# --- hostile bytes ------------------------------------------------------------------------------------------------


def refused(payload, tensors, coder):
    """The error of decoding; nothing is written, added or said to be valid."""
    out = blank(tensors)
    before = contents(out)
    segments = [(list(range(len(tensors))), for_decoding(coder))]
    with pytest.raises(DecodeError) as caught:
        BODIES.decode(payload, 0, len(payload), out, segments)
    assert contents(out) == before
    sums = [np.ones(math.prod(shape), np.float64) for _, _, shape in tensors]
    with pytest.raises(DecodeError):
        BODIES.accumulate(payload, 0, len(payload), out, segments, sums, 1.0, (0.0, 0.0))
    assert all((total == 1).all() for total in sums)
    with pytest.raises(DecodeError):
        BODIES.check(payload, 0, len(payload), out, segments)
    return caught.value


@pytest.mark.parametrize(
    ("payload", "array", "coder", "offset"),
    [
        (b"", X, RAW, 0),
        (X.tobytes() + b"\0", X, RAW, 16),
        (f32(1, 2, math.inf, 4).tobytes(), X, RAW, 8),
        (f32(1, 2, 3, math.nan).tobytes(), X, RAW, 12),
        (struct.pack("<4H", 0, 0x7C00, 0, 0), X.astype(np.float16), RAW, 2),
        (struct.pack("<4H", 0, 0, 0xFF80, 0), X.astype(ml_dtypes.bfloat16), RAW, 4),
        (struct.pack("<f4b", -1, 0, 0, 0, 0), X, ("coder", None, BLOCK), 0),
        (struct.pack("<f4b", -0.0, 0, 0, 0, 0), X, ("coder", None, BLOCK), 0),
        (struct.pack("<f4b", math.inf, 0, 0, 0, 0), X, ("coder", None, BLOCK), 0),
        (struct.pack("<f4b", 3e38, 0, 0, 0, 2), X, ("coder", None, BLOCK), 0),
        (struct.pack("<f4b", 1, 0, 0, 0, 0)[:-1], X, ("coder", None, BLOCK), 4),
        (struct.pack("<f", 1) + b"\0\x10", X, ("coder", None, ("integer", 3, "group", 0)), 5),
        (struct.pack("<fB", -1, 0), X, ("coder", None, ("sign",)), 0),
        (struct.pack("<fB", 1, 0x10), X, ("coder", None, ("sign",)), 4),
        (struct.pack("<fB", 65520, 0), np.zeros(4, np.float16), ("coder", None, ("sign",)), 0),
        (b"\2", np.array([True]), RAW, 0),
        (b"\5" + bytes(8), X, ("coder", ("random", 0), None), 0),
        (b"\x81\0" + bytes(8), X, ("coder", ("random", 0), None), 0),
        (b"\1" + bytes(7), X, ("coder", ("random", 0), None), 1),
        (b"", X, ("coder", ("mask", b"\1", 3), None), 0),
        (b"", X, ("coder", ("structured", 1, 0), None), 0),
        (b"\x10" + X.tobytes(), X, ("coder", ("structured", 1, 0), None), 0),
        (b"\x0f" + X.tobytes()[:-1], X, ("coder", ("structured", 1, 0), None), 1),
        (b"\x0f", X, ("coder", ("sparse", 0), None), 0),
        (bytes([16, 0, 1, 3]), X, ("coder", ("sparse", 0), None), 3),
        (bytes([16, 0, 1, 2]), X, ("coder", ("sparse", 0), None), 4),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\1", X, ("coder", None, ("python", Halves())), 10),
    ],
)
def test_bytes_that_are_no_body(payload, array, coder, offset):
    if array.dtype == np.float16 and coder[2] == ("sign",):
        array = np.zeros(100, np.float16)
        payload = payload[:4] + bytes(13)
    assert refused(payload, [tensor(array)], coder).offset == offset


def test_offsets_count_from_the_beginning_of_the_payload():
    payload = b"header" + bytes([16, 0, 1, 3]) + b"seal"
    with pytest.raises(DecodeError) as caught:
        decode(payload, [tensor(X)], ("coder", ("topk", 0, [1]), None), 6, 10)
    assert caught.value.offset == 9
    for start, stop in ((7, 6), (0, 15), (-1, 3)):
        with pytest.raises(DecodeError):
            decode(payload, [tensor(X)], RAW, start, stop)


def test_infinity_that_only_the_narrower_dtype_has():
    tensors = [tensor(np.zeros(1, np.float16)), tensor(f32(0))]
    coder = ("coder", ("mask", b"\3", 2), None)
    refused(struct.pack("<2f", 65520, 0), tensors, coder)
    out = decode(struct.pack("<2f", 65519, 65520), tensors, coder)
    assert out[0].view(np.float16)[0] == 65504


def test_a_sum_of_finite_terms_that_is_infinite():
    refused(struct.pack("<2f", 3e38, 3e38), [tensor(f32(0))], ("residual", RAW, RAW))
    described = [tensor(f32(0)), tensor(np.zeros(1))]
    both = ("coder", ("mask", b"\3", 2), None)
    refused(struct.pack("<4d", 1e300, 0, -1e300, 0), described, ("residual", both, both))


def error_of(call, *arguments):
    try:
        call(*arguments)
    except DecodeError as error:
        return error
    return None


@pytest.mark.parametrize("number", ALL)
def test_damage_is_refused_or_decodes(number):
    tensors = update(2)
    coder = coders(tensors)[number]
    payload = encode(tensors, coder)
    segments = [(list(range(len(tensors))), for_decoding(coder))]
    # Every coder meets other places of a layout that all share.
    for cut in range(number % 3, len(payload), 3):
        out = blank(tensors)
        before = contents(out)
        with pytest.raises(DecodeError):
            BODIES.decode(payload[:cut], 0, cut, out, segments)
        assert contents(out) == before
    for flip in range(number % 29, 8 * len(payload), 29):
        damaged = bytearray(payload)
        damaged[flip // 8] ^= 1 << flip % 8
        out = blank(tensors)
        before = contents(out)
        error = error_of(BODIES.decode, damaged, 0, len(damaged), out, segments)
        if error is not None:
            assert contents(out) == before
            assert 0 <= error.offset <= len(payload)
            continue
        for array, dtype, _ in out:
            if dtype <= F64:
                assert np.isfinite(as_float64(array, dtype)).all()
            elif dtype == BOOL:
                assert (array <= 1).all()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.sampled_from(ALL))
def test_noise_raises_nothing_but_decode_errors(payload, number):
    tensors = update()
    segments = [(list(range(len(tensors))), for_decoding(coders(tensors)[number]))]
    error = error_of(BODIES.check, payload, 0, len(payload), tensors, segments)
    assert error is None or 0 <= error.offset <= len(payload)


@pytest.mark.parametrize(
    ("payload", "coder"),
    [
        (bytes([16, 0]) + b"\xff" * 9 + b"\1", ("coder", ("sparse", 0), None)),
        (bytes([16, 2, 1]) + b"\xff" * 9 + b"\1", ("coder", ("sparse", 0), None)),
        (
            bytes([31, 2]) + b"\xff" * 4 + b"\7" + b"\xff" * 4 + b"\7",
            ("coder", ("sparse", 0), None),
        ),
        (b"\xff" * 9 + b"\1", ("coder", ("random", 0), None)),
        (b"\xff" * 9 + b"\1", ("coder", None, ("python", Halves()))),
    ],
)
def test_the_smallest_message_with_the_largest_claim_takes_no_memory(payload, coder):
    tensors = [(np.zeros(4, np.float32), F32, (4,))]
    tracemalloc.start()
    try:
        refused(payload, tensors, coder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_residual_takes_two_copies_beside_its_result():
    array = np.zeros(1 << 18, np.float32)
    half = ("coder", ("topk", 0, [100]), None)
    payload = encode([tensor(array)], ("residual", half, half))
    tracemalloc.start()
    try:
        decode(payload, [tensor(array)], ("residual", half, half))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * array.nbytes


# --- sums ---------------------------------------------------------------------------------------------------------


def test_a_sum_that_could_leave_float32_adds_nothing():
    payload = struct.pack("<f", 3e38)
    described, segments = [(None, F32, (1,))], [([0], RAW)]
    total = f32(7)
    for weight, bound in ((2.0, 0.0), (-2.0, 0.0), (1.0, 1e38), (1.0, math.inf)):
        with pytest.raises(DecodeError):
            BODIES.accumulate(payload, 0, 4, described, segments, [total], weight, (bound, 0.0))
        assert total.tolist() == [7]
    wide = np.ones(1)
    arguments = (payload, 0, 4, described, segments, [wide], 2.0, (F32_MAX, 1.0))
    bounds = BODIES.accumulate(*arguments)
    assert bounds == (F32_MAX, wide[0])
    assert wide[0] == 1 + 2 * float(np.float32(3e38))
    # Infinite in float32 before the weight makes it small.
    with pytest.raises(DecodeError):
        BODIES.accumulate(
            struct.pack("<d", 1e39),
            0,
            8,
            [(None, F64, (1,))],
            segments,
            [total],
            1e-9,
            (0.0, 0.0),
        )
    assert total.tolist() == [7]
    huge = struct.pack("<d", 1e308)
    with pytest.raises(DecodeError):
        BODIES.accumulate(huge, 0, 8, [(None, F64, (1,))], segments, [wide], 10.0, (0.0, 0.0))


def test_integers_and_bools_are_summed_in_float64():
    arrays = [
        np.array([-(2**63), 2**63 - 1], np.int64),
        np.array([2**64 - 1, 1], np.uint64),
        np.array([True, False]),
    ]
    tensors = [tensor(array) for array in arrays]
    sums = [np.ones(2) for _ in arrays]
    payload = encode(tensors, RAW)
    segments = [([0, 1, 2], RAW)]
    arguments = (payload, 0, len(payload), tensors, segments, sums, 0.5, (0.0, 0.0))
    assert BODIES.accumulate(*arguments) == (0, 0)
    for total, array in zip(sums, arrays, strict=True):
        assert total.tolist() == [1 + 0.5 * float(int(v)) for v in array]
