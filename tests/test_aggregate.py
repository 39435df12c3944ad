"""The aggregator, sentence by sentence: DESIGN.md section 1 and docs/numerics.md section 8."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import signal
import threading
import time
import tracemalloc
import zlib

import ml_dtypes
import numpy as np
import pytest
from codec_cases import (
    BFLOAT16,
    CODECS,
    FLOATS,
    assert_same,
    bits,
    is_float,
    mask_for,
    update,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import ops, pipeline

pytestmark = pytest.mark.native

LIMIT32 = float(np.finfo(np.float32).max)
LIMIT64 = float(np.finfo(np.float64).max)


class Slow:
    """Decode and add, in NumPy: what the aggregator must equal."""

    def __init__(self, dtype=np.float32):
        self.dtype = np.dtype(dtype)
        self.sums = None
        self.weight = 0.0

    def kind(self, x):
        return self.dtype if is_float(x) and x.dtype != np.float64 else np.dtype(np.float64)

    def add(self, decoded, weight):
        weight = float(np.float32(weight)) if self.dtype == np.float32 else float(weight)
        if self.sums is None:
            self.sums = {name: np.zeros(x.shape, self.kind(x)) for name, x in decoded.items()}
        for name, x in decoded.items():
            total = self.sums[name]
            value = (wide(x) if is_float(x) else x).astype(total.dtype)
            self.sums[name] = total + total.dtype.type(weight) * value
        self.weight += weight

    def mean(self, like):
        means = {}
        for name, total in self.sums.items():
            mean, dtype = total.astype(np.float64) / self.weight, like[name].dtype
            if dtype == BFLOAT16:
                means[name] = to_bfloat16(mean)
            elif is_float(like[name]):
                means[name] = mean.astype(dtype)
            elif dtype == np.bool_:
                means[name] = np.rint(mean) == 1
            else:
                whole = [int(v) for v in np.rint(mean).ravel()]
                limits = np.iinfo(dtype)
                clipped = [min(max(v, limits.min), limits.max) for v in whole]
                means[name] = np.array(clipped, dtype).reshape(total.shape)
        return means


def to_bfloat16(x):
    """Nearest even in one step from float64, on the bits."""
    single = x.astype(np.float32)
    toward_zero = np.abs(single.astype(np.float64)) > np.abs(x)
    word = single.view(np.uint32) - toward_zero.astype(np.uint32)
    word |= (word.view(np.float32).astype(np.float64) != x).astype(np.uint32)
    return ((word + 0x7FFF + (word >> 16 & 1)) >> 16).astype(np.uint16).view(BFLOAT16)


def sums_of(server):
    return [bits(total) for total in server.state_dict()["sums"]]


def assert_equal_state(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert_same(a.pop("sums"), b.pop("sums"))
    assert a == b


def sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


# --- equal to decode and add ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sum_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("text", CODECS)
def test_one_codec_equals_decode_and_add_bit_for_bit(text, dtype, sum_dtype):
    server, slow = fc.Aggregator(dtype=sum_dtype), Slow(sum_dtype)
    for number, weight in enumerate((1, 0.3, 600)):
        payload = fc.parse(text).encode(update(number, dtype), seed=number)
        server.add(payload, weight)
        slow.add(fc.decode(payload), weight)
    sums = server.state_dict()["sums"]
    for total, expected in zip(sums, slow.sums.values(), strict=True):
        assert total.dtype == expected.dtype
        assert bits(total) == bits(expected)
    assert server.count == 3
    assert server.weight == slow.weight
    assert_same(server.mean(), slow.mean(update(0, dtype)))


@settings(max_examples=40, deadline=None)
@given(
    adds=st.lists(
        st.tuples(
            st.sampled_from((*CODECS, "mask")),
            st.sampled_from(["inline", "reference"]),
            st.one_of(st.integers(0, 1000), st.floats(0, 1e6, width=32)),
        ),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from(FLOATS),
    sum_dtype=st.sampled_from(["float32", "float64"]),
)
def test_any_mix_of_codecs_and_framings_equals_decode_and_add(adds, dtype, sum_dtype):
    like, shared = update(0, dtype), fc.Shared()
    server, slow = fc.Aggregator(like, dtype=sum_dtype, shared=shared), Slow(sum_dtype)
    twin = fc.Aggregator(fc.Spec.of(like), dtype=sum_dtype, shared=shared)
    for number, (text, framing, weight) in enumerate(adds):
        codec = mask_for(like, number) | fc.Int8() if text == "mask" else fc.parse(text)
        codec.add_shared(shared)
        shared.add_rules(codec, fc.Spec.of(like))
        payload = codec.encode(update(number, dtype), framing=framing, seed=number)
        server.add(payload, weight)
        twin.add(memoryview(payload), weight)
        slow.add(fc.decode(payload, like=like, shared=shared), weight)
    for total, expected in zip(server.state_dict()["sums"], slow.sums.values(), strict=True):
        assert bits(total) == bits(expected)
    assert_equal_state(server, twin)
    if slow.weight:
        assert_same(server.mean(), slow.mean(like))
    else:
        with pytest.raises(ValueError, match="positive weight"):
            server.mean()


def test_with_and_without_like():
    values = update(0)
    payload = fc.TopK(0.3).encode(values)
    with_like, without = fc.Aggregator(values), fc.Aggregator()
    assert without.spec is None
    for server in (with_like, without):
        server.add(payload, 2)
        assert server.spec == fc.Spec.of(values)
    assert_equal_state(with_like, without)
    by_reference = fc.TopK(0.3).encode(values, framing="reference")
    with_like.add(by_reference)
    without.add(by_reference)  # the first payload has fixed the spec
    assert_equal_state(with_like, without)
    with pytest.raises(fc.DecodeError, match="like="):
        fc.Aggregator().add(by_reference)


@pytest.mark.parametrize(
    "values", [np.ones(3, np.float32), [np.ones(2, np.float16), np.array(7)], {}, []]
)
def test_structures(values):
    server = fc.Aggregator()
    server.add(fc.Raw().encode(values))
    assert type(server.mean()) is type(values)
    assert_same(server.mean(), values)


def test_tied_tensors_come_back_tied():
    weight = np.ones((2, 2), np.float32)
    server = fc.Aggregator({"a": weight, "b": weight})
    server.add(fc.Raw().encode({"a": weight, "b": weight}))
    mean = server.mean()
    assert mean["a"] is mean["b"]
    with pytest.raises(fc.SpecMismatch, match="tied"):
        server.add(fc.Raw().encode({"a": weight, "b": weight.copy()}))


def test_the_mean_is_a_copy_and_adding_goes_on():
    server = fc.Aggregator()
    server.add(fc.Raw().encode({"x": np.ones(3, np.float32), "y": np.ones(3)}))
    first = server.mean()
    for x in first.values():
        x[:] = 9
    server.add(fc.Raw().encode({"x": np.full(3, 3, np.float32), "y": np.full(3, 3.0)}))
    assert server.mean()["x"].tolist() == [2, 2, 2]
    assert server.mean()["y"].tolist() == [2, 2, 2]
    server.state_dict()["sums"][0][:] = 9
    assert server.mean()["x"].tolist() == [2, 2, 2]


# --- order ------------------------------------------------------------------------------------------------------------


def test_bit_equal_for_the_same_order_of_adds():
    payloads = [fc.parse(text).encode(update(n), seed=n) for n, text in enumerate(CODECS)]
    servers = [fc.Aggregator(update(0)) for _ in range(2)]
    for server in servers:
        for number, payload in enumerate(payloads):
            server.add(payload, number + 0.1)
    assert_equal_state(*servers)


def test_order_may_matter_so_bits_are_promised_for_one_order_only():
    values = [np.array([x], np.float32) for x in (1e8, 1, -1e8)]
    payloads = [fc.Raw().encode(x) for x in values]
    first, second = fc.Aggregator(), fc.Aggregator()
    for payload in payloads:
        first.add(payload)
    for payload in (payloads[0], payloads[2], payloads[1]):
        second.add(payload)
    assert first.mean() == [0]
    assert second.mean() == [np.float32(1 / 3)]


# --- meaning ----------------------------------------------------------------------------------------------------------


def test_zeros_of_sparse_payloads_count_as_zeros():
    server = fc.Aggregator()
    server.add(fc.TopK(0.25).encode(np.array([8, 1, 1, 1], np.float32)), 1)
    server.add(fc.TopK(0.25).encode(np.array([1, 1, 1, 4], np.float32)), 3)
    assert server.mean().tolist() == [2, 0, 0, 3]


def mean_of(values, weights, **arguments):
    server = fc.Aggregator(**arguments)
    for value, weight in zip(values, weights, strict=True):
        server.add(fc.Raw().encode(value), weight)
    return server.mean()


def test_integers_are_rounded_half_to_even():
    pairs = [(0, 1, 0), (1, 2, 2), (2, 3, 2), (-1, 0, 0), (-2, -1, -2), (5, 5, 5), (254, 255, 254)]
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64):
        limits = np.iinfo(dtype)
        fitting = [p for p in pairs if min(p) >= limits.min and max(p) <= limits.max]
        for a, b, expected in fitting:
            mean = mean_of([np.array([a], dtype), np.array([b], dtype)], [1, 1])
            assert (mean.dtype, mean.tolist()) == (dtype, [expected])
    assert mean_of([np.array(10), np.array(20)], [3, 1]).tolist() == 12
    assert mean_of([np.array(0, np.uint8), np.array(255, np.uint8)], [1, 3]).tolist() == 191


@pytest.mark.parametrize(
    "dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.uint64]
)
@pytest.mark.parametrize("weights", [[1], [0.1], [3, 0.7], [1e-30, 1e30], [1, 1, 1]])
def test_integer_extremes_are_clipped_and_never_wrap(dtype, weights):
    limits = np.iinfo(dtype)
    values = np.array([limits.min, limits.max, 0, 1], dtype)
    mean = mean_of([values] * len(weights), weights)
    assert mean.dtype == dtype
    assert mean[0] == limits.min
    assert mean[1] == limits.max
    assert mean[2:].tolist() == [0, 1]


def test_bools_are_a_weighted_majority():
    yes, no = np.array([True]), np.array([False])
    assert not mean_of([yes, no], [1, 1])[0]  # 0.5 rounds to 0
    assert mean_of([yes, no], [3, 2])[0]
    assert not mean_of([yes, no, no], [3, 2, 2])[0]
    mean = mean_of([np.array([True, False, True])], [5])
    assert (mean.dtype, mean.tolist()) == (np.bool_, [True, False, True])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mean_never_leaves_its_dtype(dtype):
    # The roundings of a sum can lift the mean above all values: it must not become infinite.
    largest = ml_dtypes.finfo(dtype).max
    values = np.array([largest, -largest, 1, 0], dtype)
    payload = fc.Raw().encode(values)
    rng = np.random.default_rng(0)
    for weights in ([1.0], [0.1], [1.2e-38], *rng.uniform(0, 0.03, (20, 30))):
        server = fc.Aggregator(values)
        for weight in weights:
            server.add(payload, weight)
        mean = server.mean()
        assert mean.dtype == dtype
        assert np.isfinite(mean.astype(np.float64)).all()
        assert mean[3] == 0
        if len(weights) == 1 and weights[0] == 1:
            assert_same(mean, values)


def test_weights_of_float32_sums_are_rounded_to_float32_and_so_cancel_out():
    server = fc.Aggregator()
    server.add(fc.Raw().encode({"x": np.array([1.5]), "n": np.array([7])}), 2**24 + 1)
    assert server.weight == 2**24
    assert server.mean()["x"].tolist() == [1.5]
    assert server.mean()["n"].tolist() == [7]
    exact = fc.Aggregator(dtype="float64")
    exact.add(fc.Raw().encode(np.array([1.5])), 2**24 + 1)
    assert exact.weight == 2**24 + 1


def test_weights_that_float32_cannot_hold_are_refused():
    payload = fc.Raw().encode(np.ones(1, np.float32))
    least = float(np.finfo(np.float32).tiny)
    server = fc.Aggregator()
    for weight in (1e-46, 1e-40, least * (1 - 2.0**-20)):
        with pytest.raises(ValueError, match=r"0 or from 1\.17549435e-38"):
            server.add(payload, weight)
    for weight in (0, least):
        server.add(payload, weight)
    assert server.weight == least
    exact = fc.Aggregator(dtype="float64")
    exact.add(payload, 1e-46)
    assert exact.weight == 1e-46
    assert exact.mean() == [1]


def test_numbers_of_every_kind_are_weights():
    from fractions import Fraction

    payload = fc.Raw().encode(np.array([2.0], np.float32))
    for weight in (
        2,
        2.0,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.uint8(2),
        Fraction(2),
        True,
    ):
        server = fc.Aggregator()
        server.add(payload, weight)
        assert server.weight == (1 if weight is True else 2)
        assert type(server.weight) is float


# --- merge, pickle, state ---------------------------------------------------------------------------------------------


def partial(numbers, **arguments):
    server = fc.Aggregator(**arguments)
    for number in numbers:
        text = CODECS[number % len(CODECS)]
        server.add(fc.parse(text).encode(update(number), seed=number), number + 1)
    return server


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merge_adds_the_sums(dtype):
    left, right = partial(range(4), dtype=dtype), partial(range(4, 9), dtype=dtype)
    before = right.state_dict()
    expected = [a + b for a, b in zip(left.state_dict()["sums"], before["sums"], strict=True)]
    left.merge(right)
    assert_same(left.state_dict()["sums"], expected)
    assert (left.count, left.weight) == (9, 45)
    assert_same(right.state_dict()["sums"], before["sums"])
    right.add(fc.Raw().encode(update(1)))
    assert_same(left.state_dict()["sums"], expected)


def test_merge_into_a_fresh_one_and_of_a_fresh_one():
    server, fresh = partial(range(3)), fc.Aggregator()
    fresh.merge(server)
    assert_same(fresh.state_dict()["sums"], server.state_dict()["sums"])
    assert_same(fresh.mean(), server.mean())
    before = server.state_dict()
    server.merge(fc.Aggregator())
    server.merge(fc.Aggregator(update(0)))
    assert_same(server.state_dict()["sums"], before["sums"])
    assert (server.count, server.weight) == (before["count"], before["weight"])
    fresh.add(fc.Raw().encode(update(3)))  # its sums are its own
    assert_same(server.state_dict()["sums"], before["sums"])


def test_merge_with_itself_doubles():
    server = partial(range(3))
    expected = [2 * total for total in server.state_dict()["sums"]]
    server.merge(server)
    assert_same(server.state_dict()["sums"], expected)
    assert (server.count, server.weight) == (6, 12)


def test_trees_of_merges_are_exact_on_integers():
    # Sums of small integers are exact, so every tree gives the flat sum's bits.
    rng = np.random.default_rng(3)
    updates = [
        {"x": rng.integers(-9, 10, 50).astype(np.float32), "n": rng.integers(0, 9, 3)}
        for _ in range(16)
    ]
    payloads = [(fc.TopK(0.5) | fc.Raw()).encode(u) for u in updates]
    flat = fc.Aggregator(updates[0])
    leaves = []
    for number, payload in enumerate(payloads):
        flat.add(payload, number + 1)
        leaves.append(fc.Aggregator(updates[0]))
        leaves[-1].add(payload, number + 1)
    while len(leaves) > 1:
        pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
        leaves = []
        for left, right in pairs:
            left = pickle.loads(pickle.dumps(left))  # from another machine
            left.merge(right)
            leaves.append(left)
    assert sums_of(leaves[0]) == sums_of(flat)
    assert (leaves[0].count, leaves[0].weight) == (flat.count, flat.weight)
    assert_same(leaves[0].mean(), flat.mean())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pickle_deepcopy_and_state_dict(dtype):
    server = partial(range(5), dtype=dtype)
    loaded = fc.Aggregator(dtype=dtype)
    loaded.load_state_dict(pickle.loads(pickle.dumps(server.state_dict())))
    for twin in (
        *(pickle.loads(pickle.dumps(server)), copy.copy(server), copy.deepcopy(server), loaded),
    ):
        assert_equal_state(twin, server)
        original = copy.deepcopy(server)
        payload = fc.parse("topk(0.2) | int8").encode(update(9))
        twin.add(payload, 2)
        assert_equal_state(server, original)
        original.add(payload, 2)
        assert_equal_state(twin, original)
        assert_same(twin.mean(), original.mean())
    fresh = fc.Aggregator(dtype=dtype)
    fresh.load_state_dict(fc.Aggregator(dtype=dtype).state_dict())
    assert fresh.spec is None


def test_a_loaded_state_keeps_the_base_and_the_bounds():
    model = update(0)
    shared = fc.Shared()
    base = shared.add_base(model)
    server = fc.Aggregator(shared=shared)
    server.add(fc.Raw().encode(np.full(2, 2e38, np.float32), base=base))
    twin = fc.Aggregator(shared=shared)
    twin.load_state_dict(server.state_dict())
    with pytest.raises(fc.SpecMismatch, match="base"):
        twin.add(fc.Raw().encode(np.ones(2, np.float32)))
    with pytest.raises(fc.DecodeError, match="range"):
        twin.add(fc.Raw().encode(np.full(2, 2e38, np.float32), base=base))


def test_a_state_does_not_replace_like():
    like = np.zeros(3, np.float32)
    server = fc.Aggregator(like)
    server.add(fc.Raw().encode(np.ones(3, np.float32)))
    before = copy.deepcopy(server)
    with pytest.raises(ValueError, match=r"state: .*shape"):
        server.load_state_dict(fc.Aggregator(np.zeros(4, np.float32)).state_dict())
    assert_equal_state(server, before)
    server.load_state_dict(fc.Aggregator().state_dict())
    assert_equal_state(server, fc.Aggregator(like))
    server.add(fc.Raw().encode(np.ones(3, np.float32)))
    assert_same(server.mean(), np.ones(3, np.float32))
    first = fc.Aggregator()
    first.add(fc.Raw().encode(np.ones(4, np.float32)))
    first.load_state_dict(server.state_dict())
    assert_equal_state(first, server)


def test_a_state_in_arrays_and_lists_is_read():
    server = partial(range(3))
    state = server.state_dict()
    state |= {key: np.array(state[key]) for key in ("version", "dtype", "framework", "count")}
    state |= {"weight": np.float64(server.weight), "spec": list(state["spec"])}
    twin = fc.Aggregator()
    twin.load_state_dict(state)
    assert_equal_state(twin, server)
    assert type(twin.count) is int
    assert type(twin.weight) is float


class NoArray:
    def __array__(self, *arguments, **named):
        raise RuntimeError("not today")


def test_a_bad_state_is_refused_and_changes_nothing():
    server = partial(range(2))
    before = copy.deepcopy(server)
    good = server.state_dict()
    wrong = [np.zeros(total.shape, np.float16) for total in good["sums"]]

    def spoiled(number, value):
        sums = [total.copy() for total in good["sums"]]
        sums[number][0] = value
        return sums

    for changes in (
        {"version": 2},
        {"dtype": "float64"},
        {"spec": b"\xff"},
        {"spec": None},
        {"spec": "text"},
        {"framework": "fortran"},
        {"framework": 3},
        {"base": b"short"},
        {"base": "12345678"},
        {"sums": good["sums"][1:]},
        {"sums": None},
        {"sums": [NoArray()] * len(good["sums"])},
        {"sums": 3},
        {"sums": spoiled(0, np.nan)},
        {"sums": spoiled(0, -np.inf)},
        {"sums": spoiled(0, 1.01 * good["bound"])},
        {"sums": spoiled(-1, np.inf)},
        {"sums": wrong},
        {"count": "many"},
        {"count": -1},
        {"count": 0},
        {"count": None},
        {"weight": "heavy"},
        {"weight": math.nan},
        {"weight": -1.0},
        {"weight": math.inf},
        {"weight": 10**400},
        {"weight": None},
        {"bound": "x"},
        {"bound": math.nan},
        {"bound": -1.0},
        {"bound": 1e39},
        {"wide_bound": math.inf},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            server.load_state_dict(good | changes)
        assert_equal_state(server, before)
    for name in good:
        with pytest.raises(ValueError, match=name):
            server.load_state_dict({k: v for k, v in good.items() if k != name})
    for no_dict in ([], None, "state", list(good)):
        with pytest.raises(TypeError, match="state is a"):
            server.load_state_dict(no_dict)
    assert_equal_state(server, before)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(server, payload, error, match, weight=1.0):
    """It raises, nothing changes, and later adds are still right."""
    before = copy.deepcopy(server)
    with pytest.raises(error, match=match):
        server.add(payload, weight)
    assert_equal_state(server, before)
    assert server.spec == before.spec
    if server.spec is not None and server.count:
        mean = server.mean()
        floats = [x for x in (mean.values() if isinstance(mean, dict) else [mean]) if is_float(x)]
        moderate = all((np.abs(x.astype(np.float64)) < 1e36).all() for x in floats)
        codec = fc.parse("topk(0.5) | int8" if moderate else "threshold(value=1e308)")
        good = codec.encode(mean, base=server.state_dict()["base"])
        clone = copy.deepcopy(server)
        clone.add(good, 0.5)
        before.add(good, 0.5)
        assert_equal_state(clone, before)


@pytest.mark.parametrize("framing", ["inline", "reference"])
@pytest.mark.parametrize(
    "change", ["shape", "dtype", "name", "order", "missing", "more", "structure"]
)
def test_a_mismatched_spec_is_refused(change, framing):
    values = update(0)
    other = {
        "shape": lambda: values | {"w1": np.ones((11, 7), np.float32)},
        "dtype": lambda: values | {"w1": np.ones((7, 11), np.float16)},
        "name": lambda: {("w2" if k == "w1" else k): v for k, v in values.items()},
        "order": lambda: dict(reversed(values.items())),
        "missing": lambda: {k: v for k, v in values.items() if k != "flags"},
        "more": lambda: values | {"more": np.ones(1, np.float32)},
        "structure": lambda: list(values.values()),
    }[change]()
    server = fc.Aggregator(values)
    server.add(fc.Raw().encode(values))
    payload = fc.Int8().encode(other, framing=framing)
    refused(server, payload, fc.SpecMismatch, None)
    refused(fc.Aggregator(values), payload, fc.SpecMismatch, None)


def test_a_mismatch_of_order_or_structure_says_so():
    one, two = np.ones(1, np.float32), np.ones(2, np.float32)
    payload = fc.Raw().encode({"b": one, "w": two})
    with pytest.raises(fc.SpecMismatch, match="same names in another order: 'b' where 'w' was exp"):
        fc.decode(payload, like={"w": two, "b": one})
    with pytest.raises(fc.SpecMismatch, match="is a dict, expected an array"):
        fc.decode(payload, like=one)


def test_another_base_is_refused():
    shared = fc.Shared()
    one, two = shared.add_base(update(1)), shared.add_base(update(2))
    values = update(0)
    server = fc.Aggregator(values, shared=shared)
    server.add(fc.Int8().encode(values, base=one))
    refused(server, fc.Int8().encode(values, base=two), fc.SpecMismatch, two.hex())
    refused(server, fc.Int8().encode(values), fc.SpecMismatch, "none")
    refused(server, fc.Int8().encode(values, base=b"\0" * 8), fc.DecodeError, "00000000")
    server.add(fc.Int8().encode(values, base=one))
    other = fc.Aggregator(values, shared=shared)
    other.add(fc.Int8().encode(values, base=two))
    before = copy.deepcopy(server)
    with pytest.raises(fc.SpecMismatch, match="base"):
        server.merge(other)
    assert_equal_state(server, before)


@pytest.mark.parametrize(
    "weight", [math.nan, math.inf, -math.inf, -1, -1e-300, 10**400, 3.5e38, np.float32(np.inf)]
)
def test_bad_weights_are_refused(weight):
    values = update(0)
    server = fc.Aggregator(values)
    server.add(fc.Raw().encode(values))
    refused(server, fc.Raw().encode(values), ValueError, "weight", weight)


@pytest.mark.parametrize("weight", ["3", b"3", None, [3], np.array([3.0]), 1j, {}])
def test_weights_that_are_no_numbers_are_refused(weight):
    values = update(0)
    server = fc.Aggregator(values)
    server.add(fc.Raw().encode(values))
    refused(server, fc.Raw().encode(values), TypeError, "weight", weight)


def test_weights_that_could_overflow_the_sums_are_refused():
    values = {"n": np.array([10**9]), "x": np.array([3e38], np.float32)}
    server = fc.Aggregator(values, dtype="float64")
    for _ in range(3):
        server.add(fc.Raw().encode(values), 3e38)
    assert server.mean()["n"].tolist() == [10**9]
    assert server.mean()["x"].tolist() == values["x"].tolist()
    for weight in (3.5e38, 1e300, LIMIT64):
        refused(server, fc.Raw().encode(values), ValueError, "weight", weight)


def hostile_floats():
    """Payloads whose values are infinite or not a number, in every place where floats travel."""
    words = {"nan": 0x7FC00000, "inf": 0x7F800000, "-inf": 0xFF800000, "signalling": 0x7F800001}
    n = 2000
    values = np.linspace(1, 2, n, dtype=np.float32)
    for text in (
        "raw",
        "topk(0.4)",
        "topk(0.4) | int8",
        "int8(block_size=None)",
        "kbit(4)",
        "sign",
        "topk(0.1) | ternary",
    ):
        payload = fc.parse(text).encode({"x": values}, framing="reference")
        for what, word in words.items():
            raw = bytearray(payload[:-4])
            decoded_at = {
                "raw": len(raw) - 4,
                "topk(0.4)": len(raw) - 4,
                "int8(block_size=None)": len(raw) - n - 4,
                "kbit(4)": len(raw) - n // 2 - 4,
                "topk(0.4) | int8": len(raw) - 800 - 4,
                "sign": len(raw) - n // 8 - 4,
                "topk(0.1) | ternary": len(raw) - 200 // 8 - 4,
            }[text]
            raw[decoded_at : decoded_at + 4] = word.to_bytes(4, "little")
            yield pytest.param(sealed(bytes(raw)), id=f"{text}-{what}")


@pytest.mark.parametrize("payload", list(hostile_floats()))
def test_non_finite_hostile_values_are_refused(payload):
    values = {"x": np.ones(2000, np.float32)}
    server = fc.Aggregator(values)
    server.add(fc.Raw().encode(values))
    refused(server, payload, fc.DecodeError, "finite|negative|infin")
    with pytest.raises(fc.DecodeError):
        fc.decode(payload, like=values)


def test_a_scale_that_decodes_to_infinity_is_refused():
    values = {"x": np.full(100, 127, np.float32)}
    raw = bytearray(fc.Int8().encode(values, framing="reference")[:-4])
    raw[-104:-100] = np.float32(3e38).tobytes()
    server = fc.Aggregator(values)
    server.add(fc.Raw().encode(values))
    refused(server, sealed(bytes(raw)), fc.DecodeError, "infin|finite")


# --- overflow of the sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "raw",
        "topk(0.5)",
        "int8",
        "sign",
        "raw | zstd",
        'rules(raw; "b" = int8)',
        'rules(raw | zstd; "b" = int8)',
        "residual(sign; int8)",
    ],
)
def test_a_sum_that_could_leave_float32_is_refused(text):
    values = {
        "a": np.linspace(1, 1.5, 64, dtype=np.float32) * np.float32(1e38),
        "b": np.ones(64, np.float32),
    }
    payload = fc.parse(text).encode(values)
    server = fc.Aggregator(values)
    server.add(payload)
    server.add(payload, 0.5)
    refused(server, payload, fc.DecodeError, "range|infinit", 2)
    refused(server, payload, fc.DecodeError, "range|infinit", 1e10)
    refused(server, payload, fc.DecodeError, "range|infinit", LIMIT32)
    assert np.isfinite(server.mean()["a"]).all()
    # The sums of float64 have room.
    server = fc.Aggregator(values, dtype="float64")
    for weight in (1, 0.5, 2, 1e10, LIMIT32):
        server.add(payload, weight)
    assert_same(server.mean()["a"], fc.decode(payload)["a"])


def test_the_largest_value_itself_can_be_summed():
    server = fc.Aggregator()
    payload = fc.Raw().encode(np.array([LIMIT32, -LIMIT32], np.float32))
    server.add(payload)
    assert server.mean().tolist() == [LIMIT32, -LIMIT32]
    refused(server, payload, fc.DecodeError, "range")
    refused(server, payload, fc.DecodeError, "range", 1e-3)
    server.add(payload, 0)
    assert server.count == 2


def test_the_bound_holds_against_roundings_of_the_sum():
    # Each add is 1.5 units in the last place and rounds to 2: the sum grows faster than what is added.
    server = fc.Aggregator()
    server.add(fc.Raw().encode(np.array([2.0**127], np.float32)))
    step = fc.Raw().encode(np.array([1.5 * 2.0**104], np.float32))
    for _ in range(300):
        server.add(step)
    assert float(server.state_dict()["sums"][0][0]) <= server.state_dict()["bound"]


@pytest.mark.parametrize("sum_dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "text", ["raw", "topk(1.0)", "raw | zstd", 'rules(raw | zstd; "n" = int8)']
)
def test_sums_of_float64_tensors_have_float64s_range(text, sum_dtype):
    values = {"d": np.array([1e300, -1.0, 0.0]), "n": np.array([3])}
    codec = fc.parse(text)
    server = fc.Aggregator(values, dtype=sum_dtype)
    payload = codec.encode(values)
    server.add(payload)
    server.add(payload, 3)
    assert_same(server.mean(), values)
    top = codec.encode(values | {"d": np.array([LIMIT64, 0, 0])})
    refused(server, top, fc.DecodeError, "range|infinit", 2)
    huge = codec.encode(values | {"d": np.array([1.7e308, 0, 0])})
    server.add(huge)
    refused(server, huge, fc.DecodeError, "range")
    assert np.isfinite(server.mean()["d"]).all()


@pytest.mark.parametrize("largest", [1e300, 2.0**127])
@pytest.mark.parametrize(
    "text",
    [
        "raw",
        "topk(1.0)",
        "raw | zstd",
        'rules(raw | zstd; "f" = int8)',
        'rules(topk(1.0) | zstd; "h" = raw)',
        "residual(topk(0.9); raw)",
    ],
)
def test_float64_beside_float32_does_not_use_up_its_range(text, largest):
    values = {"d": np.array([largest]), "f": np.ones(3, np.float32), "h": np.ones(2, np.float16)}
    server = fc.Aggregator(values)
    for _ in range(3):
        server.add(fc.parse(text).encode(values))
    assert_same(server.mean(), values)
    assert server.state_dict()["bound"] == 3


def test_sums_up_to_float32s_largest_are_not_refused():
    # The bound is rounded as the sum is, so what reaches the largest value exactly is no overflow.
    values = np.array([LIMIT32, -LIMIT32], np.float32)
    server = fc.Aggregator()
    for _ in range(2):
        server.add(fc.Raw().encode(values), 0.5)
    assert_same(server.mean(), values)
    refused(server, fc.Raw().encode(values), fc.DecodeError, "range", 1e-6)


def test_a_refused_add_of_several_segments_adds_none_of_them():
    values = {"a": np.ones(4, np.float32), "b": np.full(4, 3e38, np.float32)}
    payload = fc.parse('rules(raw | zstd; "b" = raw)').encode(values)
    server = fc.Aggregator(values)
    server.add(payload)
    refused(server, payload, fc.DecodeError, "float32's range")


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_the_bound_counts_the_rounding_to_the_tensors_dtype(dtype):
    # A scale of 1 + 2^-8 and a bit decodes to 1 + 2^-7 in bfloat16: more than the scale and the codes say.
    factor, step = (2.0**100, 2.0**-8) if dtype == BFLOAT16 else (1.0, 2.0**-11)
    c = np.full(9, factor * (1 + step * 1.001), np.float32)
    client = fc.ErrorFeedback("int8")
    part = c.astype(np.float16 if dtype == np.float16 else BFLOAT16)
    client.encode(np.zeros(9, dtype))
    client.reject()
    state = client.state_dict()
    state["residual"] = {"array": c - part.astype(np.float32)}
    client.load_state_dict(state)
    payload = client.encode(part)
    decoded = wide(fc.decode(payload))
    weight = LIMIT32 / float(c[0]) * (1 - 2.0**-20)
    assert (np.abs(decoded) * np.float64(weight) > LIMIT32).all()
    refused(fc.Aggregator(fc.decode(payload)), payload, fc.DecodeError, "range|infin", weight)


def test_merging_sums_that_could_overflow_is_refused():
    for values in (np.full(2, 2e38, np.float32), np.full(2, 1e308)):
        one, two = fc.Aggregator(), fc.Aggregator()
        one.add(fc.Raw().encode(values))
        two.add(fc.Raw().encode(values))
        before = copy.deepcopy(one)
        with pytest.raises(fc.DecodeError, match="range"):
            one.merge(two)
        assert_equal_state(one, before)


def test_merging_what_does_not_match_is_refused():
    server = partial(range(2))
    before = copy.deepcopy(server)
    with pytest.raises(fc.SpecMismatch, match="dtype"):
        server.merge(partial(range(2), dtype="float64"))
    other = fc.Aggregator()
    other.add(fc.Raw().encode(np.ones(3)))
    with pytest.raises(fc.SpecMismatch):
        server.merge(other)
    with pytest.raises(TypeError, match="Aggregator"):
        server.merge(server.state_dict())
    assert_equal_state(server, before)


# --- hostile bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "raw",
        "topk(0.3) | int8",
        "topk(0.2) | ternary",
        "residual(sign; topk(0.2))",
        'rules(int8 | zstd; "w1" = topk(0.1))',
        "randomk(0.2) | kbit(3)",
    ],
)
def test_hostile_bytes_raise_only_decode_error_and_touch_nothing(text):
    values = update(0)
    payload = fc.parse(text).encode(values, framing="reference")
    shared = fc.Shared()
    shared.add_rules(fc.parse(text), fc.Spec.of(values))
    server = fc.Aggregator(values, shared=shared)
    server.add(fc.Int8().encode(values))
    rng = np.random.default_rng(1)
    for number in range(300):
        raw = bytearray(payload[:-4])
        if number % 3 == 0:
            raw = raw[: rng.integers(0, len(raw) + 1)]
        else:
            for at in rng.integers(0, len(raw), 1 + number % 3):
                raw[at] = rng.integers(0, 256) if number % 2 else raw[at] ^ 1 << rng.integers(0, 8)
        before = sums_of(server), server.count, server.weight
        hostile = sealed(bytes(raw)) if number % 5 else bytes(raw)
        try:
            server.add(hostile)
        except fc.DecodeError:
            assert (sums_of(server), server.count, server.weight) == before
        else:
            fc.decode(hostile, like=values, shared=shared)  # a valid payload after all
            assert server.count == before[1] + 1
        assert all(np.isfinite(total).all() for total in server.state_dict()["sums"])
        if server.count > 20:
            server = fc.Aggregator(values, shared=shared)


@pytest.mark.parametrize(
    "payload", [b"", b"F", b"FC", b"FC\1\0", b"\0" * 100, sealed(b""), sealed(b"FC\1\0")]
)
def test_short_payloads(payload):
    refused(fc.Aggregator(update(0)), payload, fc.DecodeError, None)
    refused(fc.Aggregator(), payload, fc.DecodeError, None)


@pytest.mark.parametrize("payload", ["text", None, 7, [1, 2], np.ones((4, 4), np.float32)[:, ::2]])
def test_payloads_that_are_no_bytes(payload):
    with pytest.raises(TypeError, match="payload"):
        fc.Aggregator(update(0)).add(payload)


def test_a_first_payload_beyond_the_limits_is_refused():
    payload = fc.TopK(1e-6).encode(np.ones(1 << 20, np.float32))
    server = fc.Aggregator(limits=fc.Limits(max_bytes=1 << 20))
    refused(server, payload, fc.DecodeError, "limit")
    server.add(fc.TopK(0.1).encode(np.ones(100, np.float32)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="dtype"):
        fc.Aggregator(dtype="float16")
    with pytest.raises(fc.BackendError, match="cuda"):
        fc.Aggregator(device="cuda")
    with pytest.raises(TypeError, match="'x'"):
        fc.Aggregator({"x": "y"})
    for arguments in ({"limits": {}}, {"limits": 5}, {"shared": {}}, {"shared": 5}):
        with pytest.raises(TypeError, match=next(iter(arguments))):
            fc.Aggregator(**arguments)
    server = fc.Aggregator(update(0))
    with pytest.raises(ValueError, match="positive weight"):
        server.mean()
    server.add(fc.Raw().encode(update(0)))
    with pytest.raises(ValueError, match="framework"):
        server.mean("fortran")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_one_model_however_many_are_added():
    n = 1 << 18
    values = {"x": np.random.default_rng(0).standard_normal(n).astype(np.float32)}
    payloads = [
        fc.parse(text).encode(values)
        for text in ("topk(0.01) | int8", "int8", "topk(0.01) | ternary")
    ]
    server = fc.Aggregator(values)
    for payload in payloads:
        server.add(payload)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            for payload in payloads:
                server.add(payload)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024
    assert server.count == 63


def test_a_sparse_payload_costs_no_dense_memory():
    n = 1 << 20
    values = {"x": np.random.default_rng(0).standard_normal(n).astype(np.float32)}
    payload = fc.parse("topk(0.001) | int8").encode(values)
    server = fc.Aggregator(values)
    server.add(payload)
    tracemalloc.start()
    try:
        server.add(payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n / 2  # the dense update takes 4 n bytes, a dense mask n


def test_threads_lose_nothing():
    ones = np.ones(300_000, np.float32)
    payload = fc.Raw().encode(ones)
    for server in (fc.Aggregator(), fc.Aggregator(like=ones)):
        threads = [
            threading.Thread(target=lambda s=server: [s.add(payload) for _ in range(20)])
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.count == 120
        assert assert_same(server.mean(), ones) is None


def merged(server):
    whole = fc.Aggregator(server.spec)
    whole.merge(server)
    return whole


@pytest.mark.parametrize(
    "take", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), merged]
)
def test_what_is_taken_while_a_thread_adds_is_whole(monkeypatch, take):
    ones, accumulate = np.ones(8, np.float32), pipeline.accumulate
    payload, taken, threads = fc.Raw().encode(ones), [], []
    server = fc.Aggregator(like=ones)

    def amid(*args):
        accumulate(*args)
        if not threads:  # the sums are written, the weight is not
            threads.append(threading.Thread(target=lambda: taken.append(take(server))))
            threads[0].start()
            threads[0].join(0.2)

    monkeypatch.setattr(pipeline, "accumulate", amid)
    server.add(payload)
    threads[0].join()
    server.add(payload)
    assert (taken[0].count, taken[0].weight) == (1, 1.0)
    assert_same(taken[0].mean(), ones)


class Lingering:
    """A lock whose holder lets others run before it takes another one."""

    def __init__(self):
        self.lock = threading.RLock()

    def __enter__(self):
        self.lock.acquire()
        time.sleep(0.05)

    def __exit__(self, *error):
        self.lock.release()


def test_aggregators_that_merge_each_other_do_not_wait_for_ever():
    servers = [partial(range(2)), partial(range(2))]
    for server in servers:
        server._lock = Lingering()
    pairs = servers, servers[::-1]
    threads = [
        threading.Thread(target=fc.Aggregator.merge, args=pair, daemon=True) for pair in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_sums_without_like_stay_within_the_limits():
    payload = fc.parse("raw | zstd").encode(np.zeros(1 << 20, np.bool_))
    with pytest.raises(fc.DecodeError, match="the sums take 8388608 bytes"):
        fc.Aggregator(limits=fc.Limits(max_bytes=1 << 20)).add(payload)
    fc.Aggregator(limits=fc.Limits(max_bytes=1 << 23)).add(payload)


# --- interrupts: what a signal's handler raises while a payload is added ---------------------------

LOSSLESS = fc.parse('rules(int8 | zstd; "b" = raw | zstd)')
TWO = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("codec", "times"), [(fc.Raw(), 1), (LOSSLESS, 1), (LOSSLESS, 2)])
def test_an_add_that_is_interrupted_is_whole(monkeypatch, codec, times):
    payload, server, run, calls = codec.encode(TWO), fc.Aggregator(like=TWO), pipeline._Job.run, []

    def interrupted(job, name, *arguments):
        result = run(job, name, *arguments)
        if name == "accumulate" and arguments[3:4] != (True,):
            calls.append(name)
            if len(calls) == times:
                raise Interrupted
        return result

    monkeypatch.setattr(pipeline._Job, "run", interrupted)
    with pytest.raises(Interrupted):
        server.add(payload, weight=3)
    monkeypatch.undo()
    assert (server.count, server.weight) == (1, 3.0)
    server.add(codec.encode({name: 2 * x for name, x in TWO.items()}), weight=1)
    assert_same(server.mean()["a"], np.full(3, 1.25, np.float32))
    assert_same(server.mean()["b"], np.full(2, 1.25, np.float32))
    twin = fc.Aggregator(like=TWO)
    twin.load_state_dict(server.state_dict())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.skipif(
    ops.active() == "reference", reason="NumPy may be interrupted between two tensors"
)
def test_a_signal_leaves_no_add_half_done():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("handlers run in the main thread")

    def raises(*_):
        raise Interrupted

    ones = np.ones(2_000_000, np.float32)
    payload = fc.Raw().encode(ones)
    before = signal.signal(signal.SIGALRM, raises)
    try:
        for i in range(30):
            server = fc.Aggregator(like=ones)
            with contextlib.suppress(Interrupted):  # the handler may run up to the timer's end
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (i + 1))
                server.add(payload)
                signal.setitimer(signal.ITIMER_REAL, 0)
            sums = server.state_dict()["sums"][0]
            assert sums[0] == sums[-1] == server.count == server.weight
    finally:
        signal.signal(signal.SIGALRM, before)
