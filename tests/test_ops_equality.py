"""Every native instruction set gives the oracle's bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcodec.errors import NonFiniteError
from fedcodec.ops import reference

_native = pytest.importorskip("fedcodec._native", reason="nothing is compiled")
cpu = pytest.importorskip("fedcodec.ops.cpu")

pytestmark = pytest.mark.native

ISAS = [name for name, usable in _native.isas() if usable]
FLOAT_MAX = float(np.finfo(np.float32).max)

thorough = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


# --- inputs -------------------------------------------------------------------------------------------------------


@st.composite
def vectors(draw: st.DrawFn, dtype: type = np.float32, max_size: int = 300) -> np.ndarray:
    """Finite values: Hypothesis's own, or many of one awkward kind."""
    if draw(st.booleans()):
        width = np.dtype(dtype).itemsize * 8
        finite = st.floats(width=width, allow_nan=False, allow_infinity=False, allow_subnormal=True)
        return draw(hnp.arrays(dtype, st.integers(0, max_size), elements=finite))
    n = draw(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 257, 1000, 9001]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "heavy", "ties", "zeros", "tiny", "halves", "huge"]))
    signs = rng.choice([-1.0, 1.0], n)
    values = {
        "normal": lambda: rng.standard_normal(n),
        "heavy": lambda: rng.standard_normal(n) * np.exp(3 * rng.standard_normal(n)),
        "ties": lambda: rng.integers(-2, 3, n) * 0.1,
        "zeros": lambda: 0.0 * signs,
        "tiny": lambda: signs * rng.integers(0, 5, n) * 2.0**-149,
        "halves": lambda: rng.integers(-254, 255, n) / 2.0,
        "huge": lambda: signs * rng.choice([FLOAT_MAX, FLOAT_MAX / 3, 1.0], n),
    }[kind]()
    return values.astype(dtype)


either = st.one_of(vectors(np.float32), vectors(np.float64))
part_lists = st.sampled_from([np.float32, np.float64]).flatmap(
    lambda dtype: st.lists(vectors(dtype), max_size=4)
)
seeds = st.integers(0, 2**64 - 1)
grids = st.tuples(
    st.sampled_from([1, 2, 7, 31, 32, 64, 256, 1000]), st.sampled_from([1, 2, 3, 64, 300])
)


# --- comparison ---------------------------------------------------------------------------------------------------


def same(got: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert isinstance(got, tuple)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            same(a, b)
    elif isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()
    else:
        assert type(got) is type(expected)
        assert got == expected


def check(name: str, *arguments: Any) -> Any:
    """Call both backends; in-place targets are compared too, and no input may change."""
    mine = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    with np.errstate(all="ignore"):
        expected = getattr(reference, name)(*arguments)
    same(getattr(cpu, name)(*mine), expected)
    for a, b in zip(mine, arguments, strict=True):
        if isinstance(a, np.ndarray):
            same(a, b)
    return expected


# --- selection ----------------------------------------------------------------------------------------------------


@thorough
@given(part_lists, st.floats(0, 1))
def test_topk_and_compact(parts: list[np.ndarray], density: float) -> None:
    n = sum(part.size for part in parts)
    k = round(density * n)
    threshold, ties = check("topk_threshold", parts, k)
    positions, _ = check("compact", parts, threshold, ties)
    assert positions.size == k
    check("topk", parts, k)
    check("compact", parts, threshold)
    check("compact", parts, threshold, 2 * n)


def test_compact_beyond_32_bits() -> None:
    part = np.zeros((1 << 20) + 1, np.float32)
    part[[7, 99]] = 1, -1
    positions, values = cpu.compact([part] * 4097, 1.0, 8193)
    expected = np.add.outer(np.arange(4097) * part.size, [7, 99]).reshape(-1)
    assert np.array_equal(positions, expected[:8193])
    assert np.array_equal(values, np.resize([1, -1], 8193))


@thorough
@given(part_lists, st.floats(0, 100), st.sampled_from(["linear", "lower", "higher"]))
def test_percentiles(parts: list[np.ndarray], percentile: float, interpolation: str) -> None:
    check("percentile_threshold", parts, percentile, interpolation)


def test_selection_of_many_values() -> None:
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal(n).astype(np.float32) for n in (40_000, 3, 100_001)]
    for k in (1, 1400, 139_000):
        threshold, ties = check("topk_threshold", parts, k)
        check("compact", parts, threshold, ties)
    for percentile in (0, 12.5, 99.9, 100):
        check("percentile_threshold", parts, percentile, "linear")


@thorough
@given(st.integers(0, 5000), st.floats(0, 1), seeds)
def test_random_positions(n: int, density: float, seed: int) -> None:
    check("random_positions", n, round(density * n), seed)


def test_random_positions_of_a_large_space() -> None:
    check("random_positions", 2**62 + 12345, 999, 7)
    check("random_positions", 100_003, 50_000, 2**64 - 1)


@pytest.mark.parametrize("kind", ["heavy", "ties", "equal", "rising", "falling", "one"])
def test_topk_of_many(kind: str) -> None:
    n = 200_000
    rng = np.random.default_rng(3)
    x = {
        "heavy": lambda: rng.standard_t(2, n),
        "ties": lambda: rng.integers(-3, 4, n) * 0.5,
        "equal": lambda: np.full(n, -0.25),
        "rising": lambda: np.arange(n) - 100.0,
        "falling": lambda: 1.0 / (1 + np.arange(n)),
        "one": lambda: np.eye(1, n, n // 3)[0],
    }[kind]()
    for dtype in (np.float32, np.float64):
        values = x.astype(dtype)
        for k in (1, 20, 2_000, 20_001, n // 2, n - 1, n):
            check("topk", [values[:10], values[10:150_001], values[150_001:]], k)


# --- masks --------------------------------------------------------------------------------------------------------


@thorough
@given(either, seeds)
def test_masks(values: np.ndarray, seed: int) -> None:
    mask = np.random.default_rng(seed).random(values.size) < 0.4
    check("apply_mask", values, mask)
    bits = check("pack_mask", mask)
    check("unpack_mask", bits, mask.size)


# --- integers -----------------------------------------------------------------------------------------------------


@thorough
@given(vectors(), st.integers(2, 8), grids)
def test_quantize_by_grid(values: np.ndarray, bits: int, grid: tuple[int, int]) -> None:
    codes, scales = check("quantize", values, bits, *grid)
    check("dequantize", codes, scales, bits, *grid)


@thorough
@given(vectors(), st.integers(2, 8), st.sampled_from([1, 3, 64, 1000, 1024]))
def test_quantize_by_block(values: np.ndarray, bits: int, block: int) -> None:
    check("quantize", values, bits, block, -(-values.size // block))


@thorough
@given(vectors(), st.integers(2, 8), grids, seeds, seeds, st.integers(0, 2**63))
def test_quantize_stochastically(
    values: np.ndarray, bits: int, grid: tuple[int, int], codec: int, call: int, first: int
) -> None:
    check("quantize", values, bits, *grid, (codec, call, first))


@thorough
@given(hnp.arrays(np.int8, st.integers(0, 300)), vectors(max_size=3), st.integers(2, 8), grids)
def test_any_codes(codes: np.ndarray, some: np.ndarray, bits: int, grid: tuple[int, int]) -> None:
    scales = np.resize(np.abs(some), grid[1]) if some.size else np.ones(grid[1], np.float32)
    check("dequantize", codes, scales, bits, *grid)
    for dtype in (np.float32, np.float64):
        check("accumulate_codes", np.full(codes.size, 0.1, dtype), codes, scales, bits, *grid, 0.3)


@thorough
@given(hnp.arrays(np.int8, st.integers(0, 300)), st.integers(2, 7))
def test_packed_codes(codes: np.ndarray, bits: int) -> None:
    packed = check("pack_codes", codes >> (8 - bits), bits)
    check("unpack_codes", packed, bits, codes.size)


@pytest.mark.parametrize("wrong", [-9, 8, -128, 127])
def test_codes_of_more_bits_are_refused(wrong: int) -> None:
    codes = np.zeros(9000, np.int8)
    codes[8999] = wrong
    for ops in (reference, cpu):
        with pytest.raises(ValueError, match="codes of 4 bits are from -8 to 7"):
            ops.pack_codes(codes, 4)


# --- signs --------------------------------------------------------------------------------------------------------


@thorough
@given(vectors())
def test_signs(values: np.ndarray) -> None:
    magnitude = check("mean_magnitude", values)
    bits = check("pack_signs", values)
    check("unpack_signs", bits, magnitude, values.size)


# --- conversions --------------------------------------------------------------------------------------------------


@thorough
@given(either, st.sampled_from(["float16", "bfloat16", "float32"]))
def test_narrow(values: np.ndarray, dtype: str) -> None:
    check("narrow", values, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_where_rounding_twice_goes_wrong(dtype: str) -> None:
    bits = np.arange(0x7F80 if dtype == "bfloat16" else 0x7C00, dtype=np.uint16)
    values = reference.widen(bits, dtype).astype(np.float64)  # type: ignore[arg-type]
    middles = (values[:-1] + values[1:]) / 2
    near = np.concatenate([np.nextafter(middles, 0), middles, np.nextafter(middles, math.inf)])
    check("narrow", near, dtype)
    check("narrow", -near, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_widen_every_finite_value(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    largest = 0x7C00 if dtype == "float16" else 0x7F80
    check("widen", bits[(bits & 0x7FFF) <= largest], dtype)


# --- random words -------------------------------------------------------------------------------------------------


@thorough
@given(seeds, seeds, st.integers(0, 2**63), st.integers(0, 300))
def test_philox(codec_seed: int, call_seed: int, first: int, n: int) -> None:
    check("philox", codec_seed, call_seed, first, n)


@pytest.mark.parametrize("before", [1, 600, 1025])
def test_philox_where_the_counters_upper_half_changes(before: int) -> None:
    check("philox", 5, 7, 3 * 2**34 - before, 2000)


@thorough
@given(seeds, seeds, st.integers(0, 2**32 - 1))
def test_draw_seed(codec_seed: int, call_seed: int, group: int) -> None:
    check("draw_seed", codec_seed, call_seed, group)


# --- index sets ---------------------------------------------------------------------------------------------------


@thorough
@given(st.integers(0, 300_000), st.sampled_from([1e-4, 1e-3, 0.01, 0.2, 0.5, 0.9, 1.0]), seeds)
def test_sparse(n: int, density: float, seed: int) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(n) < density)
    packed = check("pack_sparse", positions, n)
    check("unpack_sparse", packed, n)


@pytest.mark.parametrize(
    "positions", [[1, 1], [2, 1], [5], [-1], [0, 2**63 - 1, -2, 4], [-(2**63), 2**63 - 1]]
)
def test_positions_that_do_not_increase_are_refused(positions: list[int]) -> None:
    for ops in (reference, cpu):
        with pytest.raises(ValueError, match="increase strictly, from 0 to below 5"):
            ops.pack_sparse(np.array(positions), 5)
        with pytest.raises(ValueError, match="increase strictly, from 0 to below 70000"):
            ops.pack_sparse(np.full(100_000, 1), 70_000)  # more than a tile has room for


@pytest.mark.parametrize("positions", [[], [5], [0, 2**43, 2**44 - 1]])
def test_few_positions_of_a_vast_range_take_little_memory(positions: list[int]) -> None:
    packed = check("pack_sparse", np.array(positions, np.int64), 2**44)
    check("unpack_sparse", packed, 2**44)


# --- at positions, sums -------------------------------------------------------------------------------------------

PAIRS = [(np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float64)]


@pytest.mark.parametrize(("dtype", "kind"), PAIRS)
@thorough
@given(st.data(), st.floats(-1e3, 1e3), seeds)
def test_sums(dtype: type, kind: type, data: st.DataObject, weight: float, seed: int) -> None:
    values = data.draw(vectors(dtype))
    rng = np.random.default_rng(seed)
    check("accumulate", rng.standard_normal(values.size).astype(kind), values, weight)
    n = 3 * values.size + 1
    positions = np.sort(rng.choice(n, values.size, replace=False)).astype(np.int64)
    check("accumulate_sparse", rng.standard_normal(n).astype(kind), positions, values, weight)
    check("scatter", positions, values, rng.standard_normal(n).astype(dtype))


# --- checksum -----------------------------------------------------------------------------------------------------


@thorough
@given(st.binary(max_size=2000), st.integers(0, 2**32 - 1))
def test_crc32(data: bytes, value: int) -> None:
    check("crc32", data, value)
    check("crc32", memoryview(data)[len(data) // 3 :], value)


# --- the caller's floating-point mode -----------------------------------------------------------------------------


def test_flush_to_zero_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    values = np.arange(-500, 500, dtype=np.float32) * np.float32(2.0**-149)
    wide = values.astype(np.float64)
    halves = np.arange(1024, dtype=np.uint16)
    calls: list[Callable[[], Any]] = [
        lambda: cpu.quantize(values, 8, 64, 16),
        lambda: cpu.quantize(values, 4, 1, 10, (1, 2, 3)),
        lambda: cpu.dequantize(np.arange(100, dtype=np.int8), values[600:601], 8, 100, 1),
        lambda: cpu.mean_magnitude(values),
        lambda: cpu.narrow(wide, "float32"),
        lambda: cpu.narrow(wide, "bfloat16"),
        lambda: cpu.widen(halves, "float16"),
        lambda: cpu.percentile_threshold([values], 33.3, "linear"),
        lambda: cpu.topk_threshold([values], 300),
        lambda: cpu.compact([values], 2.0**-142, 1),
        lambda: cpu.unpack_signs(np.zeros(2, np.uint8), 2.0**-142, 9),
        lambda: cpu.pack_signs(values),
    ]
    expected = [call() for call in calls]
    sums = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    cpu.accumulate(sums[0], values, 0.5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = [call() for call in calls]
        cpu.accumulate(sums[1], values, 0.5)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(got, expected, strict=True):
        same(a, b)
    same(sums[1], sums[0])


# --- the rules that all share -------------------------------------------------------------------------------------

PLACES = np.array([1, 4000, 8999])
KEPT = np.arange(9000) % 3 == 0
FLOAT_CALLS: dict[str, Callable[[Any, np.ndarray], Any]] = {
    "topk_threshold": lambda ops, x: ops.topk_threshold([x[:7], x[7:]], 5),
    "topk": lambda ops, x: ops.topk([x[:7], x[7:]], 1),
    "topk of none": lambda ops, x: ops.topk([x], 0),
    "topk_threshold of none": lambda ops, x: ops.topk_threshold([x], 0),
    "percentile_threshold": lambda ops, x: ops.percentile_threshold([x], 50.0, "linear"),
    "compact": lambda ops, x: ops.compact([x[:7], x[7:]], 1.0),
    "apply_mask": lambda ops, x: ops.apply_mask(x, KEPT),
    "quantize blocks": lambda ops, x: ops.quantize(x, 8, 1024, 9),
    "quantize channels": lambda ops, x: ops.quantize(x, 8, 10, 2),
    "quantize at random": lambda ops, x: ops.quantize(x, 8, 1024, 9, (1, 2, 3)),
    "mean_magnitude": lambda ops, x: ops.mean_magnitude(x),
    "pack_signs": lambda ops, x: ops.pack_signs(x),
    "narrow": lambda ops, x: ops.narrow(x, "float16", None, True),
    "narrow float64": lambda ops, x: ops.narrow(x.astype(np.float64), "float32", None, True),
    "scatter": lambda ops, x: ops.scatter(np.arange(9000), x, np.zeros_like(x)),
    "accumulate": lambda ops, x: ops.accumulate(np.zeros_like(x), x, 1.0),
    "accumulate_sparse": lambda ops, x: ops.accumulate_sparse(
        np.zeros_like(x), np.arange(9000), x, 1.0
    ),
}


@pytest.mark.parametrize("call", FLOAT_CALLS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_named(call: str, wrong: float) -> None:
    values = np.ones(9000, np.float32)
    for place in PLACES[::-1]:
        values[place] = wrong
        message = f"values: element {place} is {wrong}$"
        for ops in (reference, cpu):
            with pytest.raises(NonFiniteError, match=message):
                FLOAT_CALLS[call](ops, values)


@pytest.mark.parametrize(
    ("dtype", "wide", "beyond"),
    [
        ("float16", np.float32, 65520.0),
        ("float16", np.float64, -65520.0),
        ("bfloat16", np.float32, -FLOAT_MAX),
        ("bfloat16", np.float64, 1e39),
        ("float32", np.float64, -1e39),
    ],
)
def test_the_first_value_that_becomes_infinite_is_named(
    dtype: str, wide: type, beyond: float
) -> None:
    values = np.ones(9000, wide)
    for place in PLACES[::-1]:
        values[place] = beyond
        infinite = math.copysign(math.inf, beyond)
        message = f"values as {dtype}: element {place} is {infinite}$"
        for ops in (reference, cpu):
            with pytest.raises(NonFiniteError, match=message):
                ops.narrow(values, dtype, None, True)


@pytest.mark.parametrize("name", ["accumulate", "accumulate_sparse", "scatter"])
def test_a_sum_stays_as_it_is_when_values_are_refused(name: str) -> None:
    values = np.ones(9000, np.float32)
    values[-1] = math.nan
    for ops in (reference, cpu):
        total = np.zeros(9000, np.float32)
        places = np.arange(9000)
        arguments = {
            "accumulate": (total, values, 1.0),
            "accumulate_sparse": (total, places, values, 1.0),
            "scatter": (places, values, total),
        }[name]
        with pytest.raises(NonFiniteError):
            getattr(ops, name)(*arguments)
        assert not total.any()


def test_results_go_where_out_says() -> None:
    x = np.random.default_rng(0).standard_normal(9001).astype(np.float32)
    mask, signs = x > 0, reference.pack_signs(x)
    codes, scales = reference.quantize(x, 4, 1024, 9)
    halves = reference.narrow(x, "float16")
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("apply_mask", (x, mask)),
        ("apply_mask", (x.astype(np.float64), mask)),
        ("pack_mask", (mask,)),
        ("unpack_mask", (signs, x.size)),
        ("dequantize", (codes, scales, 4, 1024, 9)),
        ("pack_codes", (codes, 4)),
        ("unpack_codes", (reference.pack_codes(codes, 4), 4, x.size)),
        ("pack_signs", (x,)),
        ("unpack_signs", (signs, 0.5, x.size)),
        *(("narrow", (x, dtype)) for dtype in ("float16", "bfloat16", "float32")),
        ("widen", (halves, "float16")),
        ("philox", (1, 2, 3, 9001)),
    ]
    for name, arguments in calls:
        expected = getattr(reference, name)(*arguments)
        for ops in (reference, cpu):
            out = np.full_like(expected, 1)
            assert getattr(ops, name)(*arguments, out=out) is out
            same(out, expected)
    for ops in (reference, cpu):
        outs = np.ones_like(codes), np.ones_like(scales)
        found = ops.quantize(x, 4, 1024, 9, None, *outs)
        assert all(a is b for a, b in zip(found, outs, strict=True))
        same(outs, (codes, scales))
