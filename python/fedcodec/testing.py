"""Tests for codecs, yours too: Hypothesis strategies for updates and hostile payloads, and the contract of a codec.

>>> import fedcodec as fc
>>> from fedcodec.testing import check_codec
>>> check_codec(fc.TopK(0.1) | fc.Int8(), examples=2)
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import ops, pipeline
from .codec import Codec, Draws, Pipeline, Quantize, Select, Stage
from .codecs import (
    Cast,
    Int8,
    KBit,
    Mask,
    RandomK,
    Raw,
    Residual,
    Sign,
    Structured,
    Ternary,
    Threshold,
    TopK,
)
from .dtypes import BY_NAME
from .errors import DecodeError, NonFiniteError
from .limits import Limits
from .ops.reference import kept_channels
from .reader import varint
from .registry import from_config
from .shared import Shared
from .spec import Spec, TensorSpec
from .text import parse

try:
    import ml_dtypes
except ImportError:
    _BFLOAT16: np.dtype[Any] | None = None
else:
    _BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

__all__ = [
    "DTYPES",
    "Bound",
    "check_codec",
    "check_update",
    "corpus",
    "hostile_payloads",
    "reseal",
    "same",
    "seal",
    "updates",
    "updates_of",
]

Array: TypeAlias = npt.NDArray[Any]
Bound: TypeAlias = Callable[[list[npt.NDArray[np.float64]]], Sequence[Any]]

DTYPES: tuple[str, ...] = tuple(
    name for name in BY_NAME if name != "bfloat16" or _BFLOAT16 is not None
)
"""Names of all dtypes that NumPy can hold here: bfloat16 needs ml_dtypes."""

_PATTERNS = ("normal", "heavy", "sparse", "levels", "equal", "zeros", "subnormal")
_LAYOUTS = ("plain", "strided", "reversed", "transposed", "swapped", "read-only")
_LIMITS = Limits(max_bytes=1 << 24)


# --- updates --------------------------------------------------------------------------------------


def updates(
    *,
    dtypes: Sequence[str] = DTYPES,
    structures: Sequence[str] = ("dict", "list", "array"),
    max_tensors: int = 4,
    max_size: int = 400,
    extreme: bool = False,
) -> st.SearchStrategy[Any]:
    """Generate updates of NumPy arrays.

    Shapes are 0-d, empty, odd and up to four-dimensional; layouts contiguous, strided, reversed, transposed, of the
    other byte order and read-only; values normal, heavy-tailed, sparse, of few magnitudes (so that they tie), all
    equal, all zero (of both signs) and subnormal; some tensors are tied.

    Parameters
    ----------
    dtypes : sequence of str
        From `DTYPES`.
    structures : sequence of {"dict", "list", "array"}
    max_tensors, max_size : int
        Most tensors of a dict or list, and most elements of a tensor.
    extreme : bool
        Whether magnitudes go up to the dtype's largest; otherwise they fit into float16, and their sums too.

    Returns
    -------
    hypothesis.strategies.SearchStrategy

    Examples
    --------
    >>> from fedcodec.testing import updates
    >>> updates(dtypes=["float32"], structures=["list"]).validate()
    """
    tensor = _tensors(tuple(dtypes), max_size, extreme)
    many = st.lists(tensor, max_size=max_tensors).flatmap(_tied)
    choices = {
        "dict": many.map(lambda values: {_name(i): value for i, value in enumerate(values)}),
        "list": many,
        "array": tensor,
    }
    return st.one_of([choices[structure] for structure in structures])


def updates_of(spec: Spec, *, extreme: bool = False) -> st.SearchStrategy[Any]:
    """Generate updates of one spec, as for a codec that is made for one model.

    Parameters
    ----------
    spec : Spec
    extreme : bool
        As for `updates`.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> from fedcodec.testing import check_codec, updates_of
    >>> mask = {"weight": np.array([True, False, True])}
    >>> spec = fc.Spec.of({"weight": np.zeros(3, np.float32)})
    >>> check_codec(fc.Mask.of(mask), updates=updates_of(spec), examples=2)
    """

    def build(values: tuple[Array, ...]) -> Any:
        found: list[Array] = []
        for tensor, value in zip(spec.tensors, values, strict=True):
            found.append(value if tensor.tied_to is None else found[tensor.tied_to])
        if spec.structure == "dict":
            return {tensor.name: value for tensor, value in zip(spec.tensors, found, strict=True)}
        return found if spec.structure == "list" else found[0]

    arrays = [
        st.builds(
            _array,
            st.just(tensor.dtype),
            st.just(tensor.shape),
            st.sampled_from(_PATTERNS),
            st.sampled_from(_LAYOUTS),
            st.integers(0, 2**32 - 1),
            st.just(extreme),
        )
        for tensor in spec.tensors
    ]
    return st.tuples(*arrays).map(build)


def corpus() -> list[Any]:
    """Return fixed updates at the edges: empty ones, 0-d, odd sizes, views, ties, every dtype.

    Examples
    --------
    >>> from fedcodec.testing import corpus
    >>> {type(update).__name__ for update in corpus()} == {"dict", "list", "ndarray"}
    True
    """
    grid = np.linspace(-3, 3, 600, dtype=np.float32).reshape(20, 30)
    everything = {
        name: _array(name, (3, 5, 7), "normal", "plain", number, False)
        for number, name in enumerate(DTYPES)
    }
    return [
        {},
        [],
        np.zeros(0, np.float32),
        np.array(2.5, np.float32),
        [np.array(-1, np.float64), np.array(True), np.array(-7, np.int64)],
        {"": np.zeros((2, 0, 3), np.float16), "\u00e9": np.ones(1, np.float32)},
        np.zeros((7, 11), np.float32),
        np.full(129, -0.5, np.float32),
        np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38], np.float32),
        [grid.T, grid[::2, ::3], grid[::-1], grid[3:4, 5:], grid],
        {"embedding": grid, "counter": np.arange(9), "head": grid},
        everything,
        np.repeat(np.array([1, -1, 2, -2, 0], np.float32), 101),
        _array("float32", (4099,), "heavy", "plain", 1, False),
    ]


def same(left: Any, right: Any) -> bool:
    """Return whether two updates are equal to the bit: structure, names, order, dtypes, shapes and bytes.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec.testing import same
    >>> same([np.float32([0.0])], [np.float32([-0.0])])
    False
    """
    ours, theirs = _items(left), _items(right)
    return (
        type(left) is type(right)
        and len(ours) == len(theirs)
        and all(
            a == b and x.dtype.name == y.dtype.name and x.shape == y.shape and _bits(x) == _bits(y)
            for (a, x), (b, y) in zip(ours, theirs, strict=True)
        )
    )


def _items(update: Any) -> list[tuple[Any, Array]]:
    if isinstance(update, dict):
        return [(name, np.asarray(value)) for name, value in update.items()]
    values = update if isinstance(update, (list, tuple)) else [update]
    return [(number, np.asarray(value)) for number, value in enumerate(values)]


def _bits(array: Array) -> bytes:
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return native.tobytes()


def _name(number: int) -> str:
    return f"layer.{number}.{'bias' if number % 2 else 'weight'}"


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        if _BFLOAT16 is None:
            raise ValueError("bfloat16 needs ml_dtypes")
        return _BFLOAT16
    return np.dtype(name)


def _shapes(max_size: int) -> st.SearchStrategy[tuple[int, ...]]:
    small = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    flat = st.tuples(st.integers(0, max_size))
    wide = st.tuples(st.integers(1, 5), st.integers(1, max(1, max_size // 5)))
    return st.one_of(flat, wide, small.filter(lambda shape: math.prod(shape) <= max_size))


def _tensors(dtypes: tuple[str, ...], max_size: int, extreme: bool) -> st.SearchStrategy[Array]:
    return st.builds(
        _array,
        st.sampled_from(dtypes),
        _shapes(max_size),
        st.sampled_from(_PATTERNS),
        st.sampled_from(_LAYOUTS),
        st.integers(0, 2**32 - 1),
        st.just(extreme),
    )


def _tied(values: list[Array]) -> st.SearchStrategy[list[Array]]:
    ties = st.lists(st.sampled_from(values), max_size=2) if values else st.just([])
    return ties.map(lambda again: values + again)


def _array(
    dtype: str, shape: tuple[int, ...], pattern: str, layout: str, seed: int, extreme: bool
) -> Array:
    """Make one array; the elements come from a seed, which is what Hypothesis shrinks."""
    rng = np.random.default_rng(seed)
    kind, n = _numpy_dtype(dtype), math.prod(shape)
    if BY_NAME[dtype].is_float:
        flat = _floats(rng, n, kind, pattern, extreme)
    elif dtype == "bool":
        flat = rng.random(n) < 0.5
    else:
        info = np.iinfo(dtype)
        flat = rng.integers(info.min, info.max, n, kind, endpoint=True)
    return _laid_out(flat.reshape(shape), layout)


def _floats(
    rng: np.random.Generator, n: int, kind: np.dtype[Any], pattern: str, extreme: bool
) -> Array:
    signs = rng.choice([-1.0, 1.0], n)
    values: npt.NDArray[Any]
    tiny, largest = _range(kind)
    if pattern == "zeros":
        values = signs * 0.0
    elif pattern == "equal":
        values = np.full(n, rng.choice([-1.0, 1.0]) * (largest if extreme else 0.3))
    elif pattern == "subnormal":
        values = signs * rng.integers(0, 9, n) * tiny
    elif pattern == "levels":
        values = signs * rng.choice([0.0, 0.5, 0.5, 2.0, 3.0], n)
    elif extreme:
        values = signs * rng.random(n) ** 8 * largest
    elif pattern == "normal":
        values = rng.standard_normal(n)
    else:
        values = signs * np.exp(rng.standard_normal(n) * 2) / 50
        if pattern == "sparse":
            values[rng.random(n) < 0.9] = 0
    return np.clip(values, -largest, largest).astype(kind)


def _range(kind: np.dtype[Any]) -> tuple[float, float]:
    """Return the smallest and the largest magnitude."""
    if kind.name == "bfloat16":
        return 2.0**-133, float.fromhex("0x1.fep127")
    info = np.finfo(kind)
    return float(info.smallest_subnormal), float(info.max)


def _laid_out(array: Array, layout: str) -> Array:
    """Return an equal array with other strides or flags."""
    if layout == "strided":
        wide = np.zeros((*array.shape, 2), array.dtype)
        wide[..., 0] = array
        return wide[..., 0]
    if layout == "reversed" and array.ndim:
        return array[::-1].copy()[::-1]
    if layout == "transposed":
        return array.T.copy().T
    if layout == "swapped" and array.dtype.name != "bfloat16":
        return array.astype(array.dtype.newbyteorder())
    if layout == "read-only":
        array.flags.writeable = False
    return array


# --- hostile payloads -----------------------------------------------------------------------------


def seal(data: bytes) -> bytes:
    """Append the checksum that makes bytes pass for a whole payload.

    Examples
    --------
    >>> from fedcodec.testing import seal
    >>> seal(b"FC").hex(" ")
    '46 43 56 ea 2f 08'
    """
    return data + zlib.crc32(data).to_bytes(4, "little")


def reseal(payload: bytes) -> bytes:
    """Repair the checksum of a payload, so that a change elsewhere reaches the checks inside.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> from fedcodec.testing import reseal
    >>> payload = fc.Raw().encode(np.ones(3, np.float32))
    >>> reseal(payload) == payload
    True
    """
    return seal(payload[:-4])


_LARGE = [0x7F, 0x80, 2**14 - 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**56, 2**63 - 1, 2**63, 2**64 - 1]


def hostile_payloads(payload: bytes) -> st.SearchStrategy[bytes]:
    """Generate what a stranger may make of a payload.

    Truncations, flipped bits, the largest values in place of a few bytes, bytes inserted, repeated or taken out, and
    random bytes; most with the checksum repaired. Nothing may come of them but `DecodeError` or a valid update.

    Parameters
    ----------
    payload : bytes
        A valid payload.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> from hypothesis import given
    >>> from fedcodec.testing import hostile_payloads
    >>> @given(hostile_payloads(fc.Int8().encode(np.ones(9, np.float32))))
    ... def test(data):
    ...     try:
    ...         fc.decode(data)
    ...     except fc.DecodeError:
    ...         pass
    >>> test()
    """
    content = payload[:-4]
    place = st.integers(0, len(content))
    large = st.sampled_from(_LARGE).map(varint)
    noise = st.binary(max_size=12)
    flips = st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=8)
    inside = st.one_of(
        place.map(lambda n: content[:n]),
        flips.map(partial(_flipped, content)),
        st.builds(partial(_spliced, content), place, st.integers(0, 3), large),
        st.builds(partial(_spliced, content), place, st.integers(0, 12), noise),
        st.builds(lambda a, b: content[: max(a, b)] + content[min(a, b) :], place, place),
        noise.map(lambda tail: content[:4] + tail),
        st.binary(max_size=64),
    )
    sealed = inside.map(seal)
    unsealed = st.one_of(
        inside,
        st.integers(0, len(payload)).map(lambda n: payload[:n]),
        noise.map(lambda tail: payload + tail),
    )
    return st.one_of(sealed, sealed, sealed, unsealed)


def _flipped(data: bytes, bits: Iterable[int]) -> bytes:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _spliced(data: bytes, place: int, taken: int, instead: bytes) -> bytes:
    return data[:place] + instead + data[place + taken :]


# --- the contract ---------------------------------------------------------------------------------


def check_codec(
    codec: Codec,
    *,
    bound: Bound | None = None,
    idempotent: bool | None = None,
    updates: st.SearchStrategy[Any] | None = None,
    examples: int = 25,
) -> None:
    """Check the contract of a codec, a registered one of your own too.

    - What is decoded has the structure, names, shapes and dtypes of the update; integers and bools are exact, floats
      within the error that the codec declares, in both framings; tied tensors come back tied.
    - Equal inputs give equal bytes, on every backend here and from four threads at once, unless it declares "none".
    - Decoding twice gives the same; where the codec is idempotent, coding what was decoded changes nothing.
    - The update is not changed; empty, 0-d, odd and non-contiguous arrays are taken.
    - config, text, pickle and deepcopy give an equal codec that gives equal bytes.
    - Truncated, flipped and forged payloads raise `DecodeError` or decode to finite values of their own spec, and leave
      `out` alone when they raise. Not-a-number and infinity are refused with the tensor's name.

    Parameters
    ----------
    codec : Codec
        A stage, a pipeline or rules.
    bound : callable, optional
        Given the float tensors as a list of float64 arrays, the largest allowed |decoded - value| of each, as a number
        or an array of its shape. For this library's own stages it is derived from docs/numerics.md.
    idempotent : bool, optional
        Whether coding what was decoded changes nothing; derived as well.
    updates : strategy, optional
        By default `fedcodec.testing.updates()`, and `corpus()`; `updates_of` for a codec made for one spec.
    examples : int
        How many updates and how many hostile payloads are tried.

    Raises
    ------
    AssertionError
        If it breaks a promise; the message says which.
    ValueError
        If it has a transform, or a quantizer of somebody else's, and `bound` is missing.

    Examples
    --------
    >>> import fedcodec as fc
    >>> from fedcodec.testing import check_codec
    >>> check_codec(fc.parse("threshold(percentile=90) | ternary"), examples=2)
    """
    foreign = [stage for stage in _stages(codec) if type(stage) not in _OWN_QUANTIZERS]
    if bound is None and foreign:
        raise ValueError(f"pass bound=: the error of {foreign[0]} is not known")
    _check_forms(codec)
    run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )

    @run
    @given(_updates() if updates is None else updates, st.integers(0, 2**64 - 1))
    def check_some(update: Any, seed: int) -> None:
        check_update(codec, update, seed=seed, bound=bound, idempotent=idempotent)

    check_some()
    fixed = corpus() if updates is None else [_example(updates)]
    for update in fixed:
        check_update(codec, update, bound=bound, idempotent=idempotent)
    _check_refusals(codec, fixed)
    _check_threads(codec, fixed[-1])

    small = {"a": np.linspace(-1, 1, 75, dtype=np.float32), "n": np.arange(3), "b": np.ones((2, 3))}
    subject = small if updates is None else fixed[0]
    for framing in ("inline", "reference"):
        _check_damage(codec, subject, framing, examples)
    shared, payload = _shared(codec, subject), codec.encode(subject)

    @run
    @given(hostile_payloads(payload))
    def check_hostile(data: bytes) -> None:
        _check_hostile(data, shared)

    check_hostile()


_updates = updates  # check_codec has a parameter of that name
_OWN_QUANTIZERS = (Cast, Int8, KBit, Raw, Sign, Ternary)


def _example(strategy: st.SearchStrategy[Any]) -> Any:
    found: list[Any] = []

    @settings(max_examples=1, database=None, derandomize=True, deadline=None)
    @given(strategy)
    def first(update: Any) -> None:
        found.append(update)

    first()
    return found[0]


def _stages(codec: Codec) -> list[Stage]:
    """Return all transforms and quantizers of a codec, those inside residuals too."""
    found: list[Stage] = []
    for one in codec.pipelines():
        for stage in one.stages:
            if isinstance(stage, Residual):
                found += [inner for part in stage.parts for inner in _stages(part)]
            elif stage.kind in ("transform", "quantize"):
                found.append(stage)
    return found


def _shared(codec: Codec, update: Any) -> Shared:
    shared = Shared()
    codec.add_shared(shared)
    shared.add_rules(codec, Spec.of(update))
    return shared


@contextmanager
def _on(backend: str) -> Iterator[None]:
    before = ops.active()
    ops.use(backend)
    try:
        yield
    finally:
        ops.use(before)


def _check_forms(codec: Codec) -> None:
    text, config = str(codec), codec.config()
    again = from_config(json.loads(json.dumps(config)))
    for name, other in {
        "text": parse(text),
        "config": again,
        "text of the config": parse(str(again)),
        "pickle": pickle.loads(pickle.dumps(codec)),
        "deepcopy": copy.deepcopy(codec),
    }.items():
        assert other == codec, f"{name}: {other} is not {codec}"
        assert hash(other) == hash(codec), f"{name}: equal codecs with different hashes"
        assert str(other) == text, f"{name}: the text {other} is not {text}"
        assert other.config() == config, f"{name}: the config {other.config()} is not {config}"
        assert other.determinism == codec.determinism, f"{name}: another determinism"


def check_update(
    codec: Codec,
    update: Any,
    *,
    seed: int = 0,
    bound: Bound | None = None,
    idempotent: bool | None = None,
) -> None:
    """Check what the contract of `check_codec` says of one update.

    Parameters
    ----------
    codec : Codec
    update : dict, list or array
        Of NumPy arrays.
    seed : int
        The seed of the call.
    bound, idempotent
        As for `check_codec`.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> from fedcodec.testing import check_update
    >>> check_update(fc.Int8(), {"weight": np.linspace(-1, 1, 100, dtype=np.float32)})
    """
    before = copy.deepcopy(update)
    spec = Spec.of(update)
    payload = codec.encode(update, seed=seed)
    assert isinstance(payload, bytes), "a payload is bytes"
    assert same(update, before), "encode changed the update"
    assert Spec.of(update) == spec, "encode changed the update"

    assert codec.determinism == "none" or codec.encode(_plain(update), seed=seed) == payload, (
        "the bytes depend on the layout of the arrays"
    )

    shared = _shared(codec, update)
    restored = pipeline.decode(payload, shared=shared)
    _check_restored(spec, restored)
    _check_error(codec, spec, update, restored, seed, bound)
    assert same(restored, pipeline.decode(payload, shared=shared)), "decoding again differs"
    named = codec.encode(update, seed=seed, framing="reference")
    assert same(restored, pipeline.decode(named, like=spec, shared=shared)), (
        "decoding differs by reference"
    )
    if codec.determinism != "none":
        copies = [codec, pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec)]
        for other in copies:
            assert other.encode(update, seed=seed) == payload, f"{other!r}: the bytes differ"
        for backend in ops.available():
            with _on(backend):
                assert codec.encode(update, seed=seed) == payload, f"{backend}: the bytes differ"
                assert same(restored, pipeline.decode(payload, shared=shared)), (
                    f"{backend}: decoding differs"
                )
    if _is_idempotent(codec, spec) if idempotent is None else idempotent:
        again = pipeline.decode(codec.encode(restored, seed=seed), shared=shared)
        for (name, once), (_, twice) in zip(_items(restored), _items(again), strict=True):
            assert np.array_equal(once, twice), f"tensor {name!r}: coding it again changes it"


def _plain(update: Any) -> Any:
    """Return contiguous copies; what is tied stays tied."""
    copies: dict[int, Array] = {}
    plain = [
        copies.setdefault(id(array), array.astype(array.dtype.newbyteorder("="), "C"))
        for _, array in _items(update)
    ]
    if isinstance(update, dict):
        return dict(zip(update, plain, strict=True))
    return plain if isinstance(update, list) else plain[0]


def _check_restored(spec: Spec, restored: Any) -> None:
    found = {"dict": "dict", "list": "list"}.get(type(restored).__name__, "array")
    assert found == spec.structure, f"the structure is {found}, not {spec.structure}"
    items = _items(restored)
    assert len(items) == len(spec.tensors), f"{len(items)} tensors, not {len(spec.tensors)}"
    values = list(restored.values()) if isinstance(restored, dict) else restored
    for number, ((name, array), tensor) in enumerate(zip(items, spec.tensors, strict=True)):
        if spec.structure == "dict":
            assert name == tensor.name, f"tensor {name!r} is not {tensor.name!r}"
        held = "float32" if tensor.dtype == "bfloat16" and _BFLOAT16 is None else tensor.dtype
        assert array.dtype.name == held, f"tensor {name!r} is {array.dtype}, not {held}"
        assert array.shape == tensor.shape, f"tensor {name!r} is {array.shape}, not {tensor.shape}"
        if tensor.tied_to is not None:
            assert values[number] is values[tensor.tied_to], f"tensor {name!r} is not tied"


def _check_error(
    codec: Codec, spec: Spec, update: Any, restored: Any, seed: int, bound: Bound | None
) -> None:
    values, decoded, described = [], [], []
    for tensor, (_, old), (_, new) in zip(
        spec.tensors, _items(update), _items(restored), strict=True
    ):
        if not BY_NAME[tensor.dtype].is_float:
            assert np.array_equal(old, new), f"tensor {tensor.name!r} is not exact"
        elif tensor.tied_to is None:
            values.append(old.astype(np.float64))
            decoded.append(new.astype(np.float64))
            described.append(tensor)
    if bound is None:
        with np.errstate(over="ignore"):  # an infinite bound allows everything
            limits: Sequence[Any] = _bounds(codec, described, values, seed)
    else:
        limits = bound(values)
    for tensor, old, new, limit in zip(described, values, decoded, limits, strict=True):
        assert np.isfinite(new).all(), f"tensor {tensor.name!r} decodes to what is not finite"
        wrong = np.abs(new - old) > limit
        if wrong.any():
            i = int(wrong.argmax())
            allowed = float(np.broadcast_to(limit, old.shape).flat[i])
            raise AssertionError(
                f"tensor {tensor.name!r}, element {i}: {old.flat[i]!r} decodes to {new.flat[i]!r}, "
                f"{abs(new.flat[i] - old.flat[i])!r} off where {allowed!r} is allowed"
            )


def _check_refusals(codec: Codec, fixed: Sequence[Any]) -> None:
    for update in fixed:
        for tensor, (key, array) in zip(Spec.of(update).tensors, _items(update), strict=True):
            if not (BY_NAME[tensor.dtype].is_float and array.size):
                continue
            for bad in (np.nan, np.inf, -np.inf):
                wrong = array.astype(array.dtype.newbyteorder("="), copy=True)
                wrong.flat[wrong.size // 2] = bad
                spoiled: Any = wrong
                if isinstance(update, dict):
                    spoiled = {**update, key: wrong}
                elif isinstance(update, list):
                    spoiled = [*update[:key], wrong, *update[key + 1 :]]
                named = _refused(codec, spoiled)
                assert named == tensor.name, f"{bad} in tensor {tensor.name!r}: {named}"


def _refused(codec: Codec, update: Any) -> str | None:
    try:
        codec.encode(update)
    except NonFiniteError as error:
        return error.tensor
    return "was not refused"


def _check_threads(codec: Codec, update: Any) -> None:
    shared = _shared(codec, update)

    def work(_: int) -> tuple[bytes, Any]:
        payload = codec.encode(update, seed=5)
        return payload, pipeline.decode(payload, shared=shared)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(12)))
    if codec.determinism != "none":
        for payload, restored in results:
            assert payload == results[0][0], "the bytes differ between threads"
            assert same(restored, results[0][1]), "decoding differs between threads"


def _check_damage(codec: Codec, update: Any, framing: Any, examples: int) -> None:
    shared, spec = _shared(codec, update), Spec.of(update)
    payload = codec.encode(update, framing=framing)
    lengths = {*range(min(40, len(payload))), *range(0, len(payload), len(payload) // 40 + 1)}
    for n in sorted(lengths - {len(payload) - 4}):  # sealed, that one would be the payload itself
        for data in (payload[:n], seal(payload[:n])):
            _check_raises(data, spec, shared)
    bits = np.random.default_rng(len(payload)).integers(0, 8 * len(payload), 4 * examples)
    for bit in bits:
        _check_raises(_flipped(payload, [int(bit)]), spec, shared)
        _check_hostile(reseal(_flipped(payload, [int(bit)])), shared, spec)


def _check_raises(data: bytes, spec: Spec, shared: Shared) -> None:
    try:
        pipeline.decode(data, like=spec, shared=shared)
    except DecodeError:
        return
    raise AssertionError(f"a damaged payload of {len(data)} bytes was decoded")


def _check_hostile(data: bytes, shared: Shared, spec: Spec | None = None) -> None:
    try:
        restored = pipeline.decode(data, like=spec, limits=_LIMITS, shared=shared)
    except DecodeError:
        if spec is not None:
            _check_untouched(data, spec, shared)
        return
    for name, array in _items(restored):
        if array.dtype.kind not in "biu":
            finite = np.isfinite(array.astype(np.float64)).all()
            assert finite, f"tensor {name!r} decodes to what is not finite"


def _check_untouched(data: bytes, spec: Spec, shared: Shared) -> None:
    out = [np.full(tensor.shape, 1, _numpy_dtype(tensor.dtype)) for tensor in spec.tensors]
    if spec.structure == "list":
        target: Any = out
    elif spec.structure == "dict":
        target = {tensor.name: array for tensor, array in zip(spec.tensors, out, strict=True)}
    else:
        target = out[0]
    try:
        pipeline.decode(data, out=target, shared=shared)
    except DecodeError:
        assert all((array == 1).all() for array in out), "a failed decode wrote to out"


# --- the errors that our own codecs declare -------------------------------------------------------


def _is_idempotent(codec: Codec, spec: Spec) -> bool:
    kinds = {tensor.dtype for tensor in spec.untied if BY_NAME[tensor.dtype].is_float}
    return all(_pipeline_is_idempotent(one, len(kinds) <= 1) for one in codec.pipelines())


def _pipeline_is_idempotent(one: Pipeline, alike: bool) -> bool:
    select, quantize = one.find("select"), one.find("quantize")
    if one.find("sum") or one.find("transform"):
        return False
    if quantize is None or isinstance(quantize, Raw):
        return True
    if isinstance(quantize, Cast):  # rounding may take a value below the threshold
        return not isinstance(select, Threshold)
    # Rounding of the mean to a narrower dtype would move the mean of a mixed group.
    return isinstance(quantize, (Sign, Ternary)) and alike and not isinstance(select, Threshold)


def _bounds(
    codec: Codec, tensors: list[TensorSpec], values: list[npt.NDArray[np.float64]], seed: int
) -> list[Array]:
    """Return the largest allowed error of every element."""
    limits = [np.zeros_like(value) for value in values]
    draws = Draws(seed)
    for number, one in enumerate(codec.pipelines()):
        mine = [i for i, t in enumerate(tensors) if codec.pipeline_of(t.name) == number]
        parts = [(tensors[i], values[i]) for i in mine]
        for i, limit in zip(mine, _pipeline_bounds(one, parts, draws), strict=True):
            limits[i] = limit
    return limits


_Parts: TypeAlias = list[tuple[TensorSpec, npt.NDArray[np.float64]]]

# Half a unit in the last place, relative and at the smallest.
_ROUNDING = {
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-133),
    "float32": (2.0**-24, 2.0**-149),
    "float64": (2.0**-53, 0.0),
}


def _pipeline_bounds(one: Pipeline, parts: _Parts, draws: Draws) -> list[Array]:
    whole = one.find("sum")
    if isinstance(whole, Residual):
        # No codec errs by more than the largest value that it is given.
        first, second = whole.parts
        missed = _pipeline_bounds(first, parts, draws)
        _pipeline_bounds(second, parts, draws)  # for the numbers of its random groups
        largest = max((float(limit.max(initial=0.0)) for limit in missed), default=0.0)
        return [
            np.full(value.shape, 1.01 * largest)
            + _rounded(value, tensor.dtype)
            + _rounded(value, "float32")
            for tensor, value in parts
        ]
    select, quantize = one.find("select"), one.find("quantize")
    assert isinstance(select, Select | None)
    assert isinstance(quantize, Quantize | None)
    together = select is not None and not select.by_tensor
    groups = [parts] if together and parts else [[part] for part in parts]
    sizes = [sum(value.size for _, value in group) for group in groups]
    limits: list[Array] = []
    for group, n in zip(groups, sizes, strict=True):
        flat = np.concatenate([value.ravel() for _, value in group])
        kept = _kept(select, quantize, flat, group[0][0].shape, draws)
        errors = np.abs(flat)
        if n:
            errors[kept] = _quantized(quantize, flat[kept], group[0][0])
        start = 0
        for tensor, value in group:
            error = errors[start : start + value.size].reshape(value.shape)
            start += value.size
            if not (quantize is None or isinstance(quantize, Raw)):
                rounding = _rounded(value, tensor.dtype) + _rounded(error, tensor.dtype)
                error = error + rounding
            limits.append(error)
    return limits


def _rounded(values: Array, dtype: str) -> Array:
    relative, absolute = _ROUNDING[dtype]
    return np.abs(values) * relative + absolute


def _kept(
    select: Select | None, quantize: Stage | None, flat: Array, shape: tuple[int, ...], draws: Draws
) -> Array:
    """Return the mask of kept values, by sorting."""
    n, magnitudes = flat.size, np.abs(flat)
    kept = np.zeros(n, np.bool_)
    if select is None:
        kept[:] = True
    elif isinstance(select, TopK):
        k = max(1, round(select.density * n)) if n else 0
        kept[np.argsort(-magnitudes, kind="stable")[:k]] = True
    elif isinstance(select, RandomK):
        _, _, (k,), (seed,) = select.coder([n], draws)
        kept[ops.random_positions(n, k, seed)] = True
    elif isinstance(select, Mask):
        assert select.bits is not None
        kept[:] = ops.unpack_mask(np.frombuffer(select.bits.bits, np.uint8), n)
    elif isinstance(select, Structured):
        kept[:] = _in_channels(select, flat, shape, zeros=not isinstance(quantize, Ternary))
    elif isinstance(select, Threshold) and select.percentile is not None:
        if n:
            kept = magnitudes > _percentile(select, np.sort(magnitudes))
    else:
        kept = magnitudes > (select.value or 0.0 if isinstance(select, Threshold) else 0.0)
    if isinstance(quantize, Ternary) and not isinstance(select, (Mask, RandomK, Structured)):
        kept &= magnitudes > 0
    return kept


def _in_channels(select: Structured, flat: Array, shape: tuple[int, ...], *, zeros: bool) -> Array:
    if not flat.size or select.axis >= len(shape):
        return np.ones(flat.size, np.bool_)
    channels, inner = shape[select.axis], math.prod(shape[select.axis + 1 :])
    kept = kept_channels(flat, inner, channels, select.density, select.order, zeros)
    return kept[np.arange(flat.size) // inner % channels]


def _percentile(select: Threshold, ordered: Array) -> float:
    place = (ordered.size - 1) * float(select.percentile or 0) / 100
    low = math.floor(place)
    a, b = float(ordered[low]), float(ordered[min(low + 1, ordered.size - 1)])
    if select.interpolation == "linear":
        return a + (b - a) * (place - low)
    return b if select.interpolation == "higher" and place > low else a


def _quantized(quantize: Stage | None, kept: Array, tensor: TensorSpec) -> Any:
    """Return the errors of the kept values of a group, before the rounding to the tensor's dtype."""
    if quantize is None or isinstance(quantize, Raw):
        return 0.0
    if isinstance(quantize, Cast):
        return _rounded(kept, quantize.dtype)
    magnitudes = np.abs(kept)
    if isinstance(quantize, (Sign, Ternary)):
        mean = math.fsum(magnitudes) / max(1, kept.size)
        return np.abs(magnitudes - mean) + _rounded(mean + magnitudes, "float32") * 2
    assert isinstance(quantize, (Int8, KBit))
    largest = np.zeros_like(kept)
    for scope in _scopes(quantize, kept.size, tensor.shape):
        largest[scope] = magnitudes[scope].max(initial=0.0)
    scale = np.where(
        largest > 0, np.maximum(largest / (2 ** (quantize.bits - 1) - 1), 2.0**-126), 0
    )
    # A little more than a half: x times inverse is rounded, and the inverse too.
    step = (1.0 if quantize.stochastic else 0.5) + 2.0**-14
    return scale * step + _rounded(magnitudes, "float32") * 3


def _scopes(quantize: Int8 | KBit, n: int, shape: tuple[int, ...]) -> Iterator[Any]:
    """Yield the indices of the values that share a scale."""
    if quantize.axis is not None and quantize.axis < len(shape):
        places = np.arange(n).reshape(shape)
        for channel in range(shape[quantize.axis]):
            yield np.take(places, channel, quantize.axis).ravel()
    elif quantize.axis is not None or quantize.block_size is None:
        yield slice(None)
    else:
        for start in range(0, n, quantize.block_size):
            yield slice(start, start + quantize.block_size)
