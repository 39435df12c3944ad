"""The fused native calls against their Python twin on the oracle: the same bytes, values, sums and refusals."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from bodies import Bodies
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import body, dtypes
from fedcodec.errors import DecodeError
from fedcodec.ops import reference

pytestmark = pytest.mark.native
native = pytest.importorskip("fedcodec._native")
if os.environ.get("FEDCODEC_ISA") == "reference":
    pytest.skip("the native body is not used: FEDCODEC_ISA=reference", allow_module_level=True)

NATIVE, TWIN = Bodies(native), Bodies(body, ops=reference)
USABLE = [name for name, usable in native.isas() if usable]
FLOATS = (1, 2, 3, 4)
SIZES = (0, 1, 2, 7, 8, 9, 63, 300, 4097)
LARGE = (65536, 65537, 150_001)


@pytest.fixture(autouse=True, params=USABLE)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.isa()
    native.set_isa(request.param)
    yield
    native.set_isa(before)


# --- what is drawn ----------------------------------------------------------------------------------------------


def _values(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(n)
    if kind == "heavy":
        return rng.standard_t(2, n) * 10.0 ** rng.integers(-3, 3)
    if kind == "ties":
        return rng.integers(-2, 3, n).astype(np.float64)
    if kind == "zeros":
        return np.where(rng.random(n) < 0.5, 0.0, -0.0)
    if kind == "tiny":
        return rng.standard_normal(n) * 2.0**-140
    return rng.standard_normal(n) * 3e4  # some are beyond float16


def _tensor(dtype: int, shape: tuple[int, ...], kind: str, work: bool, seed: int) -> body.Tensor:
    rng = np.random.default_rng(seed)
    n = math.prod(shape)
    if dtype not in FLOATS:
        array = rng.integers(0, 256, n * dtypes.BY_ID[dtype].itemsize, dtype=np.uint8)
        return (array & 1 if dtype == 16 else array), dtype, shape
    values = _values(rng, kind, n)
    if dtype == 4:
        return values, dtype, shape
    narrow = values.astype(np.float32)
    if dtype == 1 or work:
        return narrow, dtype, shape
    with np.errstate(over="ignore"):
        return reference.narrow(np.clip(narrow, -6e4, 6e4), dtypes.BY_ID[dtype].name), dtype, shape


SHAPES = st.one_of(
    st.sampled_from(SIZES).map(lambda n: (n,)),
    st.lists(st.integers(1, 12), max_size=3).map(tuple),
)
TENSORS = st.lists(
    st.builds(
        _tensor,
        st.sampled_from([1, 1, 1, 2, 3, 4, 4, 8, 10, 11, 15, 16]),
        SHAPES,
        st.sampled_from(["normal", "normal", "heavy", "ties", "zeros", "tiny", "large"]),
        st.booleans(),
        st.integers(0, 2**32),
    ),
    min_size=1,
    max_size=5,
)
U64 = st.integers(0, 2**64 - 1)


@st.composite
def quantizers(draw: st.DrawFn, selected: bool) -> tuple[Any, ...] | None:
    kind = draw(st.sampled_from(["none", "integer", "integer", "sign", "cast"]))
    if kind == "none":
        return None
    if kind == "sign":
        return ("sign",)
    if kind == "cast":
        return ("cast", draw(st.sampled_from([2, 3])))
    granularity = draw(
        st.sampled_from(["block", "group"] if selected else ["block", "group", "channel"])
    )
    size = (
        draw(st.sampled_from([1, 3, 8, 64, 1000, 1 << 40]))
        if granularity == "block"
        else draw(st.integers(0, 3))
    )
    stochastic = draw(st.booleans())
    return ("integer", draw(st.integers(2, 8)), granularity, size, stochastic, draw(U64), draw(U64))


@st.composite
def coders(draw: st.DrawFn, sizes: list[int], inside: bool = False) -> tuple[Any, ...]:
    """A coder of float tensors of these sizes."""
    if not inside and draw(st.integers(0, 5)) == 0:
        return ("residual", draw(coders(sizes, True)), draw(coders(sizes, True)))
    kind = draw(
        st.sampled_from(["none", "topk", "threshold", "percentile", "random", "mask", "structured"])
    )
    scope = draw(st.integers(0, 1))
    groups = ([sum(sizes)] if sizes else []) if scope == 0 else sizes
    select: tuple[Any, ...] | None = None
    if kind in ("topk", "random"):
        density = draw(st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.9, 1.0]))
        counts = [round(density * n) for n in groups]
        select = (
            (kind, scope, counts, [draw(U64) for _ in groups])
            if kind == "random"
            else (kind, scope, counts)
        )
    elif kind == "threshold":
        select = (kind, scope, draw(st.sampled_from([0.0, 1e-300, 0.1, 1.0, 1e30])))
    elif kind == "percentile":
        interpolation = draw(st.sampled_from(["linear", "lower", "higher"]))
        select = (kind, scope, draw(st.floats(0, 100)), interpolation)
    elif kind == "mask":
        n = sum(sizes)
        mask = np.random.default_rng(draw(st.integers(0, 99))).random(n) < draw(
            st.sampled_from([0.0, 0.02, 0.7, 1.0])
        )
        select = (kind, reference.pack_mask(mask).tobytes(), n)
    elif kind == "structured":
        density = draw(st.sampled_from([None, 1e-9, 0.3, 0.5, 1.0]))
        select = (kind, 1, draw(st.integers(0, 2)), density, draw(st.integers(1, 2)))
    return ("coder", select, draw(quantizers(select is not None)))


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[body.Tensor], list[body.Segment]]:
    tensors = draw(TENSORS)
    owners = [draw(st.integers(0, 1)) for _ in tensors]
    segments = []
    for owner in range(max(owners) + 1):
        indices = [i for i, mine in enumerate(owners) if mine == owner]
        sizes = [math.prod(tensors[i][2]) for i in indices if tensors[i][1] in FLOATS]
        segments.append((indices, draw(coders(sizes))))
    return tensors, segments


# --- what is compared ---------------------------------------------------------------------------------------------


def to_decode(coder: tuple[Any, ...]) -> tuple[Any, ...]:
    kind, one, two = coder
    if kind == "residual":
        return kind, to_decode(one), to_decode(two)
    if one is not None and one[0] == "structured":
        one = one[:3]
    elif one is not None and one[0] != "mask":
        one = ("random" if one[0] == "random" else "sparse", one[1])
    return kind, one, two[:4] if two is not None and two[0] == "integer" else two


def result(call: Any, *arguments: Any) -> tuple[str, Any]:
    try:
        return "done", call(*arguments)
    except (body.NonFinite, native.NonFinite) as error:
        return "non-finite", error.args[:2]
    except (DecodeError, native.Malformed):
        return "malformed", None


def storage(tensors: list[body.Tensor]) -> list[body.Tensor]:
    def empty(dtype: int, shape: tuple[int, ...]) -> np.ndarray:
        itemsize = dtypes.BY_ID[dtype].itemsize
        size = math.prod(shape) * (1 if dtype in FLOATS else itemsize)
        return np.full(size, 3, dtypes.BY_ID[dtype].storage if dtype in FLOATS else np.uint8)

    return [(empty(dtype, shape), dtype, shape) for _, dtype, shape in tensors]


def accumulators(tensors: list[body.Tensor], wide: bool) -> list[np.ndarray]:
    return [
        np.full(
            math.prod(shape),
            0.5,
            np.float64 if wide or dtype == 4 or dtype not in FLOATS else np.float32,
        )
        for _, dtype, shape in tensors
    ]


def raw(arrays: list[np.ndarray]) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def compare_decoding(
    payload: bytes, start: int, tensors: list[body.Tensor], segments: list[body.Segment]
) -> str:
    """Decode, check and add natively and by the twin; return the outcome."""
    where = (payload, start, len(payload))
    shapes = [(None, dtype, shape) for _, dtype, shape in tensors]
    ours, twins = storage(tensors), storage(tensors)
    untouched = raw([array for array, _, _ in ours])
    outcome, _ = result(NATIVE.decode, *where, ours, segments)
    assert outcome == result(TWIN.decode, *where, twins, segments)[0]
    assert raw([array for array, _, _ in ours]) == raw([array for array, _, _ in twins])
    if outcome == "malformed":
        assert raw([array for array, _, _ in ours]) == untouched

    assert result(NATIVE.check, *where, shapes, segments)[0] == outcome
    assert result(TWIN.check, *where, shapes, segments)[0] == outcome

    for wide, dry in ((False, True), (False, False), (True, False)):
        mine, theirs = accumulators(tensors, wide), accumulators(tensors, wide)
        before = raw(mine)
        arguments = (-1.7, (0.5, 0.25), dry)
        added = result(NATIVE.accumulate, *where, shapes, segments, mine, *arguments)
        assert added == result(TWIN.accumulate, *where, shapes, segments, theirs, *arguments)
        assert raw(mine) == raw(theirs)
        if dry or added[0] == "malformed":
            assert raw(mine) == before
        assert outcome == "done" or added[0] == "malformed"
    return outcome


def compare(
    tensors: list[body.Tensor], segments: list[body.Segment], first: int = 0
) -> bytes | None:
    """Encode natively and by the twin, then compare what comes back; return the body."""
    ours = result(NATIVE.encode, b"head", tensors, segments, True, first)
    assert ours == result(TWIN.encode, b"head", tensors, segments, True, first)
    if ours[0] != "done":
        return None
    payload = ours[1][:-4]
    decoders = [(indices, to_decode(coder)) for indices, coder in segments]
    assert compare_decoding(payload, 4, tensors, decoders) == "done"
    return bytes(payload[4:])


# --- the tests ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(updates(), st.integers(0, 2**40))
def test_native_and_twin_agree(update: Any, first: int) -> None:
    compare(*update, first)


QUANTIZERS = [
    None,
    ("integer", 8, "block", 1024, False, 0, 0),
    ("integer", 8, "block", 100, True, 1, 2**63),
    ("integer", 8, "group", 0, False, 0, 0),
    ("integer", 5, "group", 0, True, 2**64 - 1, 3),
    ("integer", 3, "block", 7, False, 0, 0),
    ("sign",),
    ("cast", 2),
    ("cast", 3),
]


@pytest.mark.parametrize("quantize", QUANTIZERS, ids=str)
@pytest.mark.parametrize("scope", [0, 1])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.4, 0.97])
def test_large_sparse_tensors(quantize: Any, scope: int, density: float) -> None:
    tensors = [_tensor(1, (n,), "heavy", False, n) for n in LARGE] + [
        _tensor(4, (70_000,), "ties", False, 5)
    ]
    sizes = [math.prod(shape) for _, _, shape in tensors]
    groups = [sum(sizes)] if scope == 0 else sizes
    counts = [max(1, round(density * n)) for n in groups]
    compare(tensors, [(range(4), ("coder", ("topk", scope, counts), quantize))])
    compare(
        tensors[:3],
        [
            (
                range(3),
                ("coder", ("random", scope, counts if scope else [100], [9, 8, 7, 6]), quantize),
            )
        ],
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantize", [*QUANTIZERS, *(("integer", b, "channel", a, s, 1, 1) for b, a, s in [
    (8, 0, False), (8, 1, True), (4, 1, False), (6, 2, False), (8, 9, False)])], ids=str)  # fmt: skip
def test_large_dense_tensors(dtype: int, quantize: Any) -> None:
    tensors = [
        _tensor(dtype, shape, "normal", False, 1) for shape in [(70_001,), (33, 70, 30), (3,)]
    ]
    compare(
        tensors, [([0, 2], ("coder", None, quantize)), ([1], ("coder", None, quantize))], first=6
    )


@pytest.mark.parametrize(
    "second", [("integer", 3, "block", 64, True, 1, 2), ("sign",)], ids=["3 bits", "sign"]
)
def test_residuals_of_every_float_dtype(second: Any) -> None:
    coder = ("residual", ("coder", ("topk", 0, [5000]), None), ("coder", None, second))
    tensors = [_tensor(dtype, (40_000,), "heavy", False, dtype) for dtype in (1, 2, 3, 4)]
    compare(tensors, [(range(4), coder)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "select",
    [None, ("topk", 0, [1]), ("topk", 0, [0]), ("threshold", 0, 2.0), ("percentile", 0, 50.0, "linear"),
     ("random", 0, [1], [0]), ("mask", b"\1\0\0", 24),
     ("structured", 1, 0, 0.1, 1), ("structured", 1, 1, None, 2)],
)  # fmt: skip
@pytest.mark.parametrize(
    "quantize", [None, QUANTIZERS[1], QUANTIZERS[4], ("sign",), ("cast", 2)], ids=str
)
def test_non_finite_values_are_refused(bad: float, select: Any, quantize: Any) -> None:
    array = np.ones(24, np.float32)
    array[[17, 20]] = bad
    tensors = [(array[:12], 1, (12,)), (array[12:], 1, (3, 4))]
    with pytest.raises(native.NonFinite) as error:
        NATIVE.encode(b"", tensors, [([0, 1], ("coder", select, quantize))], True)
    assert (error.value.args[:2], error.value.args[3]) == ((1, 5), 0)
    assert not math.isfinite(error.value.args[2])


def test_overflow_in_a_narrower_dtype_is_refused() -> None:
    large = np.array([1, 7e4, 2], np.float32)
    for dtype, coder in [(2, None), (2, ("integer", 8, "group", 0, False, 0, 0)), (1, ("cast", 2))]:
        with pytest.raises(native.NonFinite) as error:
            NATIVE.encode(b"", [(large, dtype, (3,))], [([0], ("coder", None, coder))], True)
        assert error.value.args == (0, 1, 7e4, 2)
    # A scale shared with a float32 tensor takes a float16 one beyond its range.
    tensors = [
        (np.array([2e7], np.float32), 1, (1,)),
        (reference.narrow(np.float32([6e4] * 20), "float16"), 2, (20,)),
    ]
    compare(
        tensors, [([0, 1], ("coder", ("topk", 0, [21]), ("integer", 2, "group", 0, False, 0, 0)))]
    )
    compare(tensors, [([0, 1], ("coder", ("topk", 0, [21]), ("sign",)))])


def hostile(valid: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Everything that is nearly, or not at all, a valid body."""
    yield from (
        valid[:stop]
        for stop in {*range(min(len(valid), 40)), *rng.integers(0, len(valid) + 1, 20).tolist()}
    )
    yield valid + b"\0"
    for place in {*range(min(len(valid), 30)), *rng.integers(0, max(1, len(valid)), 60).tolist()}:
        if place < len(valid):
            flipped = bytearray(valid)
            flipped[place] ^= 1 << int(rng.integers(8))
            yield bytes(flipped)
            for number in (b"\xff" * 9 + b"\1", b"\xff\xff\xff\xff\7", b"\x80\0", b"\xff" * 10):
                yield valid[:place] + number + valid[place + 1 :]
    yield rng.bytes(len(valid))


@settings(deadline=None, max_examples=25)
@given(updates(), st.integers(0, 2**32))
def test_hostile_bodies(update: Any, seed: int) -> None:
    tensors, segments = update
    valid = compare(tensors, segments)
    if valid is None:
        return
    decoders = [(indices, to_decode(coder)) for indices, coder in segments]
    for data in hostile(valid, np.random.default_rng(seed)):
        compare_decoding(data, 0, tensors, decoders)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.integers(0, 2**32), st.integers(0, 3))
def test_tiles_of_any_kind_decode(n: int, seed: int, scale: int) -> None:
    """Index sets made of random valid or nearly valid tiles, which our encoder would not choose."""
    rng = np.random.default_rng(seed)
    length = n * (1, 9, 700, 1001)[scale]
    t = int(rng.choice([16, 17, 31]))
    headers, data = b"", b""
    for start in range(0, length, 1 << t):
        size = min(1 << t, length - start)
        positions = np.flatnonzero(rng.random(size) < rng.choice([0, 0.01, 0.6, 1]))
        header, rest = tile(rng, positions, size)
        headers, data = headers + header, data + rest
    packed = bytes([t]) + headers + data
    assert_unpacks_alike(packed + b"rest", length)


def tile(rng: np.random.Generator, positions: np.ndarray, length: int) -> tuple[bytes, bytes]:
    mode = int(rng.integers(3))
    count = len(positions) + (rng.random() < 0.05)
    flag = 4 if mode and rng.random() < 0.5 else 0
    if mode == 0:
        mask = np.zeros(length, bool)
        mask[positions] = True
        return bytes([0]) + body.varint(count), reference.pack_mask(mask).tobytes()
    if mode == 1:
        return bytes([1 | flag]) + body.varint(count), positions.astype("<u2").tobytes()
    r = int(rng.integers(0, 12))
    gaps = np.diff(positions, prepend=-1) - 1
    unary = int(len(positions) + (gaps >> r).sum())
    ones = np.zeros(unary, bool)
    ones[np.cumsum((gaps >> r) + 1) - 1] = True
    header = (
        bytes([2 | flag | r << 3]) + body.varint(count) + (body.varint(unary) if count else b"")
    )
    return header, reference._pack_fields(gaps, r).tobytes() + reference.pack_mask(ones).tobytes()


def assert_unpacks_alike(packed: bytes, n: int) -> None:
    ours = result(native.unpack_sparse, packed, n)
    twin = result(reference.unpack_sparse, packed, n)
    assert ours[0] == twin[0]
    if ours[0] == "done":
        assert ours[1][0].dtype == np.int64
        assert np.array_equal(ours[1][0], twin[1][0])
        assert ours[1][1] == twin[1][1]


@pytest.mark.parametrize("n", [0, 1, 65535, 65536, 65537, 131072, 1 << 20, 3_000_001])
@pytest.mark.parametrize("kept", [0, 1, 5, 0.0005, 0.01, 0.3, 0.6, 0.999, 1.0])
@pytest.mark.parametrize("clustered", [False, True])
def test_index_sets(n: int, kept: float, clustered: bool) -> None:
    rng = np.random.default_rng(n)
    count = min(n, kept) if isinstance(kept, int) else round(kept * n)
    positions = (
        np.arange(n - count, n) if clustered else np.sort(rng.choice(n, count, replace=False))
    )
    positions = positions.astype(np.int64)
    packed = native.pack_sparse(positions, n)
    assert packed == reference.pack_sparse(positions, n)
    assert_unpacks_alike(packed, n)
    for stop in {*range(min(20, len(packed))), len(packed) - 1}:
        assert_unpacks_alike(packed[:stop], n)


X = np.zeros(4, np.float32)
PLAIN = [([0], ("coder", None, None))]


@pytest.mark.parametrize(
    ("tensors", "segments"),
    [
        ([(X, 1, 4)], PLAIN),
        ([(X, 5, (4,))], PLAIN),
        ([(X, 4, (4,))], PLAIN),
        ([(X, 10, (4,))], PLAIN),
        ([(X, 1, (5,))], PLAIN),
        ([(X, 1, (-4,))], PLAIN),
        ([(X, 1, (2**32, 2**32, 2**32))], PLAIN),
        ([(X[::2], 1, (2,))], PLAIN),
        ([(X.astype(">f4"), 1, (4,))], PLAIN),
        ([(X.astype(np.float64), 1, (4,))], PLAIN),
        ([(X.astype(np.float64), 2, (4,))], PLAIN),
        ([(np.frombuffer(bytes(17), np.uint8)[1:].view(np.float32), 1, (4,))], PLAIN),
        ([([1.0], 1, (1,))], PLAIN),
        ([(X, 1, (4,))], None),
        ([(X, 1, (4,))], [([1], ("coder", None, None))]),
        ([(X, 1, (4,))], [([-1], ("coder", None, None))]),
        ([(X, 1, (4,))], [([0, 0], ("coder", None, None))]),
        ([(X, 1, (4,))], [([0], ("coder", None))]),
        ([(X, 1, (4,))], [([0], ("codec", None, None))]),
        *(
            ([(X, 1, (4,))], [([0], ("coder", select, None))])
            for select in [
                "topk", (), ("topk",), ("topk", 0), ("topk", 2, [1]), ("topk", 0, []), ("topk", 0, [5]),
                ("topk", 0, [-1]), ("topk", 0, [1.0]), ("threshold", 0, -1.0), ("threshold", 0, math.nan),
                ("threshold", 0, "1"), ("percentile", 0, 101.0, "linear"), ("percentile", 0, 1.0, "cubic"),
                ("random", 0, [1], []), ("random", 0, [5], [1]), ("random", 0, [1], [2**64]), ("sparse", 0),
                ("mask", b"", 4), ("mask", b"\0\0", 4), ("mask", b"\x10", 4), ("mask", b"\0", 5), ("mask", 3, 4),
                ("structured", 1, 0), ("structured", 0, 0, 0.5, 2), ("structured", 1, -1, 0.5, 2),
                ("structured", 1, 0, 0.0, 2), ("structured", 1, 0, 1.5, 2), ("structured", 1, 0, math.nan, 2),
                ("structured", 1, 0, 0.5, 3), ("structured", 1, 0, None, None),
            ]
        ),
        *(
            ([(X, 1, (4,))], [([0], ("coder", None, quantize))])
            for quantize in [
                "sign", (), ("sign", 1), ("cast",), ("cast", 1), ("cast", 99), ("python", None, 0), ("integer", 8),
                ("integer", 8, "block", 4), ("integer", 1, "group", 0, False, 0, 0),
                ("integer", 9, "group", 0, False, 0, 0), ("integer", 8, "block", 0, False, 0, 0),
                ("integer", 8, "rows", 1, False, 0, 0), ("integer", 8, "group", 0, False, -1, 0),
            ]
        ),
        ([(X, 1, (4,))], [([0], ("coder", ("topk", 0, [1]), ("integer", 8, "channel", 0, False, 0, 0)))]),
    ],
)  # fmt: skip
def test_wrong_arguments_of_encode(tensors: Any, segments: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        NATIVE.encode(b"", tensors, segments, False)


@pytest.mark.parametrize(
    ("ids", "shapes", "arrays"),
    [
        (None, [(4,)], [X]), ([1], None, [X]), ([1], [(4,)], None),
        ([1], [], [X]), ([1], [(4,)], []), ([1], [(4,)], [X, X]),
    ],
)  # fmt: skip
def test_one_id_one_shape_and_one_array_for_each_tensor(ids: Any, shapes: Any, arrays: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        native.Encoder(ids, shapes, PLAIN).encode(b"", arrays, False)


@pytest.mark.parametrize("dtype", [*FLOATS, 10, 15, 16])
def test_arrays_may_have_any_shape_and_their_own_dtype(dtype: int) -> None:
    flat, _, _ = _tensor(dtype, (2, 3, 4), "normal", False, 7)
    own = flat.view(dtypes.BY_ID[dtype].host)
    expected = native.Encoder([dtype], [(24,)], PLAIN).encode(b"", [flat], False)
    for make, ops in ((native, {}), (body, {"ops": reference})):
        for shape in ((24,), (2, 3, 4), (2, 1, 12)):
            array = own.reshape(shape)
            encoder = make.Encoder([dtype], [shape], PLAIN, **ops)
            assert encoder.encode(b"", [array], False) == expected
            decoder = make.Decoder([dtype], [shape], PLAIN, **ops)
            (new,) = decoder.decode(expected, 0, len(expected))
            assert (new.dtype, new.shape, new.flags.owndata) == (own.dtype, shape, True)
            assert raw([new]) == raw([own])
            out = np.empty_like(array)
            decoder.decode(expected, 0, len(expected), [out])
            assert raw([out]) == raw([own])


def test_a_change_of_the_backend_reaches_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, update = fc.TopK(0.5), np.ones(4, np.float32)
    payload = codec.encode(update)
    fc.decode(payload)
    calls = []

    def counted(made: Any, *arguments: Any) -> Any:
        calls.append(made.__name__)
        return made(*arguments)

    for made in (body._Encoder, body._Decoder):
        monkeypatch.setattr(body, made.__name__, partial(counted, made))
    before = fc.ops.active()
    fc.ops.use("reference")
    try:
        assert codec.encode(update) == payload
        fc.decode(payload)
    finally:
        fc.ops.use(before)
    assert calls == ["_Encoder", "_Decoder"]
    codec.encode(update)
    fc.decode(payload)
    assert len(calls) == 2


def test_wrong_arguments_of_decode() -> None:
    payload = bytes(16)
    frozen, text = np.zeros(4, np.float32), "text"
    frozen.flags.writeable = False
    shared = np.frombuffer(bytearray(16), np.float32)
    for arguments in [
        (text, 0, 16, [(X, 1, (4,))], PLAIN),
        (memoryview(bytes(32))[::2], 0, 16, [(X, 1, (4,))], PLAIN),
        (payload, -1, 16, [(X, 1, (4,))], PLAIN),
        (payload, 3, 2, [(X, 1, (4,))], PLAIN),
        (payload, 0, 17, [(X, 1, (4,))], PLAIN),
        (payload, 0, 16, [(frozen, 1, (4,))], PLAIN),
        (payload, 0, 16, [(None, 1, (4,))], PLAIN),
        (payload, 0, 8, [(X, 2, (4,))], PLAIN),
        (payload, 0, 16, [(X, 1, (4,))], [([0], ("coder", ("topk", 0, [1]), None))]),
        (shared.data, 0, 16, [(shared, 1, (4,))], PLAIN),
    ]:
        with pytest.raises((TypeError, ValueError, BufferError)):
            NATIVE.decode(*arguments)
    for sums, weight in [
        ([], 1.0), ([X.astype(np.float16)], 1.0), ([X[:3]], 1.0), ([frozen], 1.0), ([X], math.nan), ([X], 1e300)
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            NATIVE.accumulate(payload, 0, 16, [(None, 1, (4,))], PLAIN, sums, weight, (0.0, 0.0))
    one = ("coder", None, None)
    for nested in [
        ("residual", ("residual", one, one), one),
        ("residual", one, ("residual", one, one)),
    ]:
        with pytest.raises(ValueError, match="nested"):
            NATIVE.check(payload, 0, 16, [(None, 1, (4,))], [([0], nested)])


def test_a_sum_that_could_overflow_is_refused_and_adds_nothing() -> None:
    largest = np.array([3e38, 1], np.float32)
    payload = NATIVE.encode(b"", [(largest, 1, (2,))], PLAIN, False)
    sums = [np.zeros(2, np.float32)]
    shapes = [(None, 1, (2,))]
    bounds = NATIVE.accumulate(payload, 0, 8, shapes, PLAIN, sums, 1.0, (0.0, 0.0))
    assert bounds == (largest[0], 0.0)
    with pytest.raises(native.Malformed):
        NATIVE.accumulate(payload, 0, 8, shapes, PLAIN, sums, 1.0, bounds)
    assert np.array_equal(sums[0], largest)
    wide = [np.full(2, 1e39)]
    bounds = NATIVE.accumulate(payload, 0, 8, shapes, PLAIN, wide, 1.0, bounds)
    assert bounds == (largest[0], largest[0])
    assert np.array_equal(wide[0], 1e39 + largest.astype(np.float64))


def test_huge_claims_cost_no_memory() -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    huge = 2**40
    for coder, payload in [
        (("coder", ("sparse", 0), None), bytes([31]) + b"\7\0" * 4),
        (("coder", ("random", 0), ("sign",)), body.varint(huge) + bytes(8) + bytes(100)),
        (("coder", None, ("integer", 8, "block", 1)), bytes(100)),
        (("coder", None, ("integer", 2, "channel", 0)), bytes(100)),
        (("coder", None, None), bytes(100)),
    ]:
        tracemalloc.start()
        with pytest.raises(native.Malformed):
            NATIVE.check(payload, 0, len(payload), [(None, 1, (huge,))], [([0], coder)])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
