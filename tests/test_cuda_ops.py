"""The functions of `fedcodec.ops` on a GPU's arrays against the CPU's; without a GPU on an emulation of it."""

import gpu_arrays
import numpy as np
import pytest
from gpu_arrays import get, put
from hypothesis import given
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_arrays.MISSING is not None, reason=str(gpu_arrays.MISSING)),
]

SIZES = (0, 1, 7, 8, 9, 31, 255, 1000, 4095, 4096, 4097, 65_536, 65_537)


def on_gpu(call, *arguments, **options):
    """Call with every array on the GPU, and copy what comes back."""

    def there(value):
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], np.ndarray):
            return type(value)(map(there, value))
        return put(value) if isinstance(value, np.ndarray) else value

    moved = [there(value) for value in arguments]
    options = {name: there(value) for name, value in options.items()}
    result = call(*moved, **options)

    def back(value):
        if isinstance(value, tuple):
            return tuple(map(back, value))
        return get(value) if hasattr(value, "__cuda_array_interface__") else value

    arrays = [back(value) for value in moved]
    return back(result), arrays


def assert_as_on_cpu(call, *arguments, **options):
    copies = [value.copy() if isinstance(value, np.ndarray) else value for value in arguments]
    expected = call(*copies, **options)
    result, moved = on_gpu(call, *arguments, **options)
    assert_equal(result, expected)
    assert_equal(tuple(moved), tuple(copies))  # sums in place, the rest as it was


def assert_equal(found, expected):
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray):
        found = np.asarray(get(found) if hasattr(found, "__cuda_array_interface__") else found)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    else:
        assert found == expected


def draw(seed, n, dtype=np.float32, kind="heavy"):
    rng = np.random.default_rng(seed)
    values = {
        "heavy": lambda: rng.standard_t(2, n),
        "two values": lambda: rng.choice([-0.5, 0.25], n),
        "sparse": lambda: rng.standard_normal(n) * (rng.random(n) < 0.01),
        "zeros": lambda: np.where(rng.random(n) < 0.5, -0.0, 0.0),
    }[kind]()
    return values.astype(dtype)


arrays = st.builds(
    draw,
    st.integers(0, 2**32),
    st.sampled_from(SIZES),
    st.sampled_from((np.float32, np.float64)),
    st.sampled_from(("heavy", "two values", "sparse", "zeros")),
)
shares = st.sampled_from((0.0, 1e-3, 0.01, 0.1, 0.5, 1.0))


@given(st.lists(arrays, min_size=1, max_size=3), shares, st.booleans())
def test_selection(parts, share, one):
    values = parts[0] if one else parts
    n = parts[0].size if one else sum(part.size for part in parts)
    k = round(share * n)
    assert_as_on_cpu(ops.topk, values, k)
    assert_as_on_cpu(ops.topk_threshold, values, k)
    assert_as_on_cpu(ops.compact, values, *ops.topk_threshold(values, k))
    assert_as_on_cpu(ops.compact, values, 0.25, 3)
    for interpolation in ("linear", "lower", "higher"):
        assert_as_on_cpu(ops.percentile_threshold, values, 100 * share, interpolation)


@given(arrays, st.integers(0, 2**32), shares)
def test_masks(values, seed, share):
    mask = np.random.default_rng(seed).random(values.size) < share
    assert_as_on_cpu(ops.apply_mask, values, mask)
    assert_as_on_cpu(ops.pack_mask, mask)
    assert_as_on_cpu(ops.unpack_mask, ops.pack_mask(mask), mask.size)


@given(arrays, st.integers(2, 8), st.sampled_from((1, 3, 64, 1024, None)), st.booleans())
def test_codes(values, bits, block_size, stochastic):
    options = {"block_size": block_size}
    assert_as_on_cpu(
        ops.quantize_kbit, values, bits, **options, stochastic=stochastic, seed=2**63 + 5
    )
    codes, scales = ops.quantize_kbit(values, bits, **options)
    if codes.size:
        codes[:3] = -(2 ** (bits - 1))  # reads as its successor
    assert_as_on_cpu(ops.dequantize_kbit, codes, scales, bits, **options)
    inner, channels = block_size or max(1, codes.size), scales.size
    for dtype in (np.float32, np.float64):
        total = np.ones(codes.size, dtype)
        assert_as_on_cpu(ops.accumulate_codes, total, codes, scales, bits, inner, channels, -0.3)
    if bits < 8:
        assert_as_on_cpu(ops.pack_codes, codes, bits)
        assert_as_on_cpu(ops.unpack_codes, ops.pack_codes(codes, bits), bits, codes.size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1, 2, 5])
def test_channels_and_shapes(bits, axis):
    values = draw(1, 24 * 35).reshape(24, 5, 7)
    assert_as_on_cpu(ops.quantize_kbit, values, bits, axis=axis)
    codes, scales = ops.quantize_kbit(values, bits, axis=axis)
    assert_as_on_cpu(ops.dequantize_kbit, codes, scales, bits, axis=axis)


def test_int8():
    values = draw(2, 5000).reshape(50, 100)
    assert_as_on_cpu(ops.quantize_int8, values)
    assert_as_on_cpu(ops.dequantize_int8, *ops.quantize_int8(values))


@given(arrays)
def test_signs(values):
    assert_as_on_cpu(ops.mean_magnitude, values)
    assert_as_on_cpu(ops.pack_signs, values)
    assert_as_on_cpu(ops.unpack_signs, ops.pack_signs(values), 0.75, values.size)


@given(arrays)
def test_conversions(values):
    values = np.clip(values, -6e4, 6e4)
    for dtype in ("float16", "bfloat16", "float32"):
        assert_as_on_cpu(ops.narrow, values, dtype)
    for dtype in ("float16", "bfloat16"):
        assert_as_on_cpu(ops.widen, ops.narrow(values, dtype), dtype)


@given(arrays, shares, st.sampled_from((np.float32, np.float64)))
def test_sparse_sets_and_sums(values, share, dtype):
    positions, kept = ops.topk(values, round(share * values.size))
    assert_as_on_cpu(ops.pack_sparse, positions, values.size)
    total = np.linspace(-1, 1, values.size, dtype=dtype)
    assert_as_on_cpu(ops.accumulate, total, values, 0.7)
    assert_as_on_cpu(ops.accumulate_sparse, total, positions, kept, 0.7)
    assert_as_on_cpu(ops.scatter, positions, kept.astype(dtype), total)


# --- arguments ----------------------------------------------------------------------------------------------------


def test_out_is_filled_and_returned():
    values = put(draw(3, 5000))
    codes, scales = put(np.zeros(5000, np.int8)), put(np.zeros(5, np.float32))
    found = ops.quantize_int8(values, out=(codes, scales))
    assert found[0] is codes
    assert found[1] is scales
    expected = ops.quantize_int8(draw(3, 5000))
    assert_equal((get(codes), get(scales)), expected)
    restored = put(np.zeros(5000, np.float32))
    assert ops.dequantize_int8(codes, scales, out=restored) is restored
    assert_equal(get(restored), ops.dequantize_int8(*expected))


def test_out_that_shares_memory_is_right_too():
    values = put(draw(4, 5000))
    mask = np.random.default_rng(0).random(5000) < 0.5
    assert ops.apply_mask(values, put(mask), out=values) is values
    assert_equal(get(values), ops.apply_mask(draw(4, 5000), mask))


def test_empty_arrays_with_an_out():
    out = put(np.zeros(0, np.uint8))
    assert ops.pack_mask(put(np.zeros(0, np.bool_)), out=out) is out


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: ops.topk(bad, 3),
        lambda bad: ops.topk(bad, 0),
        lambda bad: ops.topk_threshold(bad, 3),
        lambda bad: ops.percentile_threshold(bad, 50),
        lambda bad: ops.compact(bad, 0.5),
        lambda bad: ops.quantize_int8(bad),
        lambda bad: ops.quantize_kbit(bad, 4),
        lambda bad: ops.mean_magnitude(bad),
        lambda bad: ops.pack_signs(bad),
        lambda bad: ops.narrow(bad, "float16"),
    ],
)
@pytest.mark.parametrize("worst", [np.nan, np.inf])
def test_what_is_not_finite_is_named_as_on_the_cpu(call, worst):
    values = draw(5, 5000)
    values[4321] = worst
    with pytest.raises(fc.NonFiniteError) as there:
        call(put(values))
    with pytest.raises(fc.NonFiniteError) as here:
        call(values)
    assert str(there.value) == str(here.value)
    assert "4321" in str(there.value)


def bad_scales(scale):
    return lambda move: ops.dequantize_int8(
        move(np.ones(3, np.int8)), move(np.array([scale], np.float32))
    )


@pytest.mark.parametrize(
    "call",
    [
        bad_scales(np.nan),
        bad_scales(-1),
        bad_scales(-0.0),
        bad_scales(3e38),
        lambda move: ops.dequantize_kbit(
            move(np.full(3, 8, np.int8)), move(np.ones(1, np.float32)), 4
        ),
        lambda move: ops.pack_codes(move(np.full(9, -3, np.int8)), 2),
        lambda move: ops.pack_sparse(move(np.array([1, 1])), 5),
        lambda move: ops.pack_sparse(move(np.array([-1, 1])), 5),
        lambda move: ops.pack_sparse(move(np.array([1, 5])), 5),
        lambda move: ops.topk(move(np.ones(3, np.int32)), 1),
        lambda move: ops.topk(move(np.ones(3, np.float16)), 1),
        lambda move: ops.topk(move(np.ones(3, np.float32)), 4),
        lambda move: ops.apply_mask(move(np.ones(3, np.float32)), move(np.ones(4, np.bool_))),
        lambda move: ops.unpack_mask(move(np.ones(3, np.uint8)), 40),
    ],
)
def test_wrong_arguments_are_refused_as_on_the_cpu(call):
    with pytest.raises((TypeError, ValueError)) as here:
        call(np.asarray)
    with pytest.raises(type(here.value)) as there:
        call(put)
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda total: ops.accumulate(total, put(np.array([1, np.nan, 2], np.float32)), 1),
        lambda total: ops.accumulate_sparse(
            total, put(np.array([0, 1])), put(np.array([1, np.inf], np.float32)), 1
        ),
        lambda total: ops.accumulate_sparse(
            total, put(np.array([0, 3])), put(np.ones(2, np.float32)), 1
        ),
        lambda total: ops.accumulate_codes(
            total, put(np.ones(3, np.int8)), put(np.array([-1], np.float32)), 8, 3, 1, 1.0
        ),
        lambda total: ops.scatter(
            put(np.array([0, 1])), put(np.array([1, np.nan], np.float32)), total
        ),
        lambda total: ops.scatter(put(np.array([2, 1])), put(np.ones(2, np.float32)), total),
    ],
)
def test_a_refused_sum_is_as_it_was(call):
    total = put(np.array([5, 6, 7], np.float32))
    with pytest.raises(ValueError, match=r"values|positions|scale"):
        call(total)
    assert get(total).tolist() == [5, 6, 7]


def test_float32_and_float64_in_one_space_have_one_threshold():
    parts = [np.array([1], np.float32), np.array([0.1, 0.0999999999])]
    for values in (parts, parts[::-1], [np.zeros(0, np.float32), *parts]):
        assert_as_on_cpu(ops.compact, values, 0.1)


def test_numpys_numbers_are_numbers():
    values = draw(7, 100)
    assert_as_on_cpu(ops.topk, values, np.int64(3))
    assert_as_on_cpu(ops.compact, values, np.float32(0.5), ties=np.int8(1))
    assert_as_on_cpu(ops.percentile_threshold, values, np.float64(50.0))
    assert_as_on_cpu(ops.quantize, values, 8, 10, 10, [1, 2, 3])


def test_a_mask_keeps_where_a_byte_is_not_zero():
    mask = np.array([2, 1, 0, 255, 128], np.uint8).view(np.bool_)
    assert_as_on_cpu(ops.pack_mask, mask)


@pytest.mark.parametrize("n", [0, 5])
def test_out_of_one_of_two_results(n):
    values = draw(8, n)
    for which in (0, 1):
        out = [np.zeros(n, np.int8), np.zeros(3, np.float32)]
        expected = ops.quantize(values, 8, 2, 3)
        there = put(out[which])
        both = (there, None) if which == 0 else (None, there)
        found = ops.quantize(put(values), 8, 2, 3, out=both)
        assert found[which] is there
        assert_equal(tuple(map(get, found)), expected)
        filled = list(map(put, out))
        found = ops.quantize(put(values), 8, 2, 3, out=filled)
        assert [one is other for one, other in zip(found, filled, strict=True)] == [True, True]
        assert_equal(tuple(map(get, filled)), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32, np.uint64])
def test_positions_of_other_integer_dtypes(dtype):
    positions, values = np.array([1, 3], dtype), np.array([5, 6], np.float32)
    assert_as_on_cpu(ops.pack_sparse, positions, 5)
    total = put(np.zeros(5, np.float32))
    ops.scatter(put(positions), put(values), total)
    assert get(total).tolist() == [0, 5, 0, 6, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda v: ops.scatter((1,), put(v[:1]), put(v)),
        lambda v: ops.scatter(range(1, 2), put(v[:1]), put(v)),
        lambda v: ops.accumulate(put(v[:1]), 1.0, 1.0),
        lambda v: ops.unpack_mask(memoryview(b"\5"), 3, out=put(np.zeros(3, np.bool_))),
        lambda v: ops.topk([put(v), 1.0], 2),
        lambda v: ops.topk([put(v), v], 2),
    ],
)
def test_whatever_is_not_on_the_gpu_is_named(call):
    with pytest.raises(TypeError, match=r"(positions|values|bits) is not on a GPU"):
        call(draw(9, 20))


def test_arrays_on_the_host_beside_others_are_named():
    with pytest.raises(TypeError, match="mask is not on a GPU"):
        ops.apply_mask(put(np.ones(3, np.float32)), np.ones(3, np.bool_))
    with pytest.raises(TypeError, match="positions is not on a GPU"):
        ops.scatter([1], put(np.ones(1, np.float32)), put(np.ones(3, np.float32)))


def test_positions_of_more_than_32_bits_go_by_the_cpu():
    positions = np.array([3, 2**32, 2**33 - 1])
    assert ops.pack_sparse(put(positions), 2**33) == ops.pack_sparse(positions, 2**33)


def test_results_are_of_the_arguments_framework():
    values = put(draw(6, 100))
    positions, kept = ops.topk(values, 5)
    assert type(positions) is type(kept) is type(values)
