"""What is measured: every kernel and every whole call, with the memory that it has to read and write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import fedcodec as fc
from fedcodec import ops
from fedcodec.ops.reference import Narrow

from . import data, peers
from .data import Float32

Array = npt.NDArray[Any]
Run = Callable[[], Any]

CODECS = ("topk(0.01) | int8", "int8", "topk(0.01) | ternary", "kbit(4)", "raw")
SPARSE_CODEC = CODECS[0]
BLOCK = 1024
DENSITY = 0.01
CHECKED = "with arguments checked"


def _nothing() -> None:
    return None


def _same(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    values : array
        The float32 values that it is about; a pass that reads them is R, one that copies them M.
    run : callable
        What is timed.
    reads, writes : sequence of at most two arrays, array or None
        The memory that it cannot do without; the roof's. Nothing where no pass over memory compares.
    beside, peers : mapping of str to callable
        What shows where its time goes, by what it is; what others have for the same job, by who.
    rate : amount and unit, optional
        What one run gets through, if that is not the bytes that it reads and writes.
    reset, outcome : callable
        What to do before a run whose outcome is looked at, and the outcome, from what ``run`` returns.
    """

    values: Float32
    run: Run
    reads: Sequence[Array] = ()
    writes: Array | None = None
    peers: Mapping[str, Run] = field(default_factory=dict)
    beside: Mapping[str, Run] = field(default_factory=dict)
    rate: tuple[float, str] | None = None
    reset: Callable[[], None] = _nothing
    outcome: Callable[[Any], Any] = _same


Kind = Literal["kernel", "call", "layout"]


@dataclass(frozen=True)
class Row:
    """A name for a case, and how to build it; a layout's is built of no values."""

    name: str
    kind: Kind
    build: Callable[..., Case]


def _room(nbytes: int) -> Array:
    return np.ones(nbytes, np.uint8)


def _allocation(like: Array) -> dict[str, Run]:
    return {"allocate and fill": lambda: np.full(like.size, 1, like.dtype)}


def _bytes(payload: bytes) -> Array:
    return np.frombuffer(payload, np.uint8)


# --- kernels --------------------------------------------------------------------------------------


# Where the public function looks at every element of an argument, the kernel is run without it, as codecs run it.


def _kept(values: Float32, density: float = DENSITY) -> int:
    return max(1, round(density * values.size))


def _topk(values: Float32, density: float) -> Case:
    k = _kept(values, density)
    positions, kept = ops.topk(values, k)
    return Case(
        values,
        lambda: ops.topk(values, k),
        (values,),
        _room(positions.nbytes + kept.nbytes),
        peers.find("top-k", values, k),
    )


def _threshold(values: Float32) -> Case:
    k = _kept(values)
    found = peers.find("threshold", values, k)
    return Case(values, lambda: ops.topk_threshold(values, k), (values,), None, found)


def _compact(values: Float32) -> Case:
    threshold, ties = ops.topk_threshold(values, _kept(values))
    positions, kept = ops.compact(values, threshold, ties)
    return Case(
        values,
        lambda: ops.compact(values, threshold, ties),
        (values,),
        _room(positions.nbytes + kept.nbytes),
        peers.find("compact", values, threshold),
    )


def _random_positions(values: Float32) -> Case:
    n, k = values.size, _kept(values)
    return Case(
        values,
        lambda: ops.random_positions(n, k, seed=7),
        (),
        np.zeros(k, np.int64),
        peers.find("random positions", n, k),
        rate=(k, "positions"),
    )


def _percentile(values: Float32) -> Case:
    found = peers.find("percentile", values, 90)
    return Case(values, lambda: ops.percentile_threshold(values, 90), (values,), None, found)


def _quantize(values: Float32, bits: int, stochastic: bool) -> Case:
    out = ops.quantize_kbit(values, bits)
    return Case(
        values,
        lambda: ops.quantize_kbit(values, bits, stochastic=stochastic, out=out),
        (values,),
        out[0],
        {} if stochastic else peers.find(f"quantize {bits}", values, BLOCK),
    )


def _dequantize(values: Float32, bits: int) -> Case:
    codes, scales = ops.quantize_kbit(values, bits)
    out, grid = np.zeros_like(values), (BLOCK, scales.size)
    return Case(
        values,
        lambda: ops.backend().dequantize(codes, scales, bits, *grid, out),
        (codes,),
        out,
        peers.find(f"dequantize {bits}", values, codes, scales, BLOCK),
        {CHECKED: lambda: ops.dequantize_kbit(codes, scales, bits, out=out)},
    )


def _add_codes(values: Float32) -> Case:
    codes, scales = ops.quantize_int8(values)
    total = np.zeros_like(values)
    return Case(
        values,
        lambda: ops.accumulate_codes(total, codes, scales, 8, BLOCK, scales.size, 3.0),
        (codes, total),
        total,
        peers.find("add codes", values, codes, scales, BLOCK),
        reset=lambda: total.fill(0),
        outcome=lambda _: total,
    )


def _pack_codes(values: Float32) -> Case:
    codes, _ = ops.quantize_kbit(values, 4)
    packed = ops.pack_codes(codes, 4)
    return Case(
        values,
        lambda: ops.backend().pack_codes(codes, 4, packed),
        (codes,),
        packed,
        peers.find("pack codes", codes),
        {CHECKED: lambda: ops.pack_codes(codes, 4, out=packed)},
    )


def _unpack_codes(values: Float32) -> Case:
    codes, _ = ops.quantize_kbit(values, 4)
    packed = ops.pack_codes(codes, 4)
    return Case(
        values,
        lambda: ops.unpack_codes(packed, 4, codes.size, out=codes),
        (packed,),
        codes,
        peers.find("unpack codes", packed, codes.size),
    )


def _pack_signs(values: Float32) -> Case:
    bits = ops.pack_signs(values)
    found = peers.find("pack signs", values)
    return Case(values, lambda: ops.pack_signs(values, out=bits), (values,), bits, found)


def _unpack_signs(values: Float32) -> Case:
    bits, out = ops.pack_signs(values), np.zeros_like(values)
    return Case(
        values,
        lambda: ops.unpack_signs(bits, 0.5, values.size, out=out),
        (bits,),
        out,
        peers.find("unpack signs", bits, values.size),
    )


def _mean_magnitude(values: Float32) -> Case:
    found = peers.find("mean magnitude", values)
    return Case(values, lambda: ops.mean_magnitude(values), (values,), None, found)


def _apply_mask(values: Float32) -> Case:
    mask, out = values > 0, np.zeros_like(values)
    found = peers.find("apply mask", values, mask)
    return Case(values, lambda: ops.apply_mask(values, mask, out=out), (values, mask), out, found)


def _pack_mask(values: Float32) -> Case:
    mask = values > 0
    bits = ops.pack_mask(mask)
    found = peers.find("pack mask", mask)
    return Case(values, lambda: ops.pack_mask(mask, out=bits), (mask,), bits, found)


def _unpack_mask(values: Float32) -> Case:
    mask = values > 0
    bits = ops.pack_mask(mask)
    return Case(
        values,
        lambda: ops.unpack_mask(bits, mask.size, out=mask),
        (bits,),
        mask,
        peers.find("unpack mask", bits, mask.size),
    )


def _pack_sparse(values: Float32) -> Case:
    n, (positions, _) = values.size, ops.topk(values, _kept(values))
    payload = ops.pack_sparse(positions, n)
    return Case(
        values,
        lambda: ops.backend().pack_sparse(positions, n),
        (positions,),
        _room(len(payload)),
        peers.find("pack sparse", positions),
        {CHECKED: lambda: ops.pack_sparse(positions, n)},
        rate=(positions.size, "positions"),
    )


def _unpack_sparse(values: Float32) -> Case:
    n, (positions, _) = values.size, ops.topk(values, _kept(values))
    payload = ops.pack_sparse(positions, n)
    return Case(
        values,
        lambda: ops.unpack_sparse(payload, n),
        (_bytes(payload),),
        np.zeros_like(positions),
        peers.find("unpack sparse", positions),
        rate=(positions.size, "positions"),
    )


# A pass over memory is no measure of what writes to few places.


def _scatter(values: Float32) -> Case:
    positions, kept = ops.topk(values, _kept(values))
    out = np.zeros_like(values)
    return Case(
        values,
        lambda: ops.backend().scatter(positions, kept, out),
        peers=peers.find("scatter", positions, kept, values.size),
        beside={CHECKED: lambda: ops.scatter(positions, kept, out)},
        rate=(positions.size, "positions"),
        reset=lambda: out.fill(0),
        outcome=lambda _: out,
    )


def _add_sparse(values: Float32) -> Case:
    positions, kept = ops.topk(values, _kept(values))
    total = np.zeros_like(values)
    return Case(
        values,
        lambda: ops.backend().accumulate_sparse(total, positions, kept, 3.0),
        peers=peers.find("add sparse", positions, kept, values.size),
        beside={CHECKED: lambda: ops.accumulate_sparse(total, positions, kept, 3.0)},
        rate=(positions.size, "positions"),
        reset=lambda: total.fill(0),
        outcome=lambda _: total,
    )


def _add_values(values: Float32) -> Case:
    total = np.zeros_like(values)
    return Case(
        values,
        lambda: ops.accumulate(total, values, 3.0),
        (values, total),
        total,
        peers.find("add", values),
        reset=lambda: total.fill(0),
        outcome=lambda _: total,
    )


def _narrow(values: Float32, dtype: Narrow) -> Case:
    out = ops.narrow(values, dtype)
    return Case(
        values,
        lambda: ops.backend().narrow(values, dtype, out),
        (values,),
        out,
        peers.find(f"narrow {dtype}", values),
        {CHECKED: lambda: ops.narrow(values, dtype, out=out)},
    )


def _widen(values: Float32, dtype: Narrow) -> Case:
    bits, out = ops.narrow(values, dtype), np.zeros_like(values)
    found = peers.find(f"widen {dtype}", bits)
    return Case(values, lambda: ops.widen(bits, dtype, out=out), (bits,), out, found)


def _random_words(values: Float32) -> Case:
    words = ops.philox(0, 0, 0, values.size)
    found = peers.find("random words", words.size)
    return Case(values, lambda: ops.philox(1, 2, 0, words.size, out=words), (), words, found)


def _crc32(values: Float32) -> Case:
    found = peers.find("crc32", values)
    return Case(values, lambda: ops.crc32(values.view(np.uint8)), (values,), None, found)


# --- whole calls ----------------------------------------------------------------------------------


def _encode(values: Float32, text: str) -> Case:
    codec = fc.parse(text)
    room = _room(len(codec.encode(values)))
    found = peers.find(f"encode {text}", values)
    return Case(values, lambda: codec.encode(values), (values,), room, found, _allocation(room))


def _decode(values: Float32, text: str) -> Case:
    payload, out = fc.parse(text).encode(values), np.zeros_like(values)
    found = peers.find(f"decode {text}", values)
    return Case(values, lambda: fc.decode(payload, out=out), (_bytes(payload),), out, found)


def _decode_fresh(values: Float32, text: str) -> Case:
    payload = fc.parse(text).encode(values)
    return Case(
        values,
        lambda: fc.decode(payload),
        (_bytes(payload),),
        np.zeros_like(values),
        beside=_allocation(values),
    )


def _add(values: Float32, text: str) -> Case:
    payload, spec = fc.parse(text).encode(values), fc.Spec.of(values)
    servers = [fc.Aggregator(spec)]
    total, decoded = np.zeros_like(values), fc.decode(payload)
    case = Case(
        values,
        lambda: servers[0].add(payload, 3.0),
        (_bytes(payload), total),
        total,
        reset=lambda: servers.__setitem__(0, fc.Aggregator(spec)),
        outcome=lambda _: servers[0].mean(),
    )
    if not text.startswith("topk"):
        return replace(case, peers=peers.find("add", decoded))
    positions = np.flatnonzero(decoded)
    kept = decoded[positions]
    return replace(
        case,
        reads=(),
        writes=None,
        peers=peers.find("add sparse", positions, kept, values.size),
        beside={
            "our scatter-add of ready positions": lambda: ops.backend().accumulate_sparse(
                total, positions, kept, 3.0
            )
        },
    )


def _feedback(values: Float32, whole: bool) -> Case:
    client = fc.ErrorFeedback(SPARSE_CODEC)
    residual, pending = np.ones_like(values), np.ones_like(values)
    roof = import_module("fedcodec._native").roof
    in_place = partial(roof, values, residual, residual, "prefetched")
    settle = client.accept if whole else partial(client.reject, drop=True)

    def reset() -> None:
        client.reset()
        client.encode(values, seed=0)
        client.accept()

    def run() -> bytes:
        payload = client.encode(values, seed=0)
        settle()
        return payload

    return Case(
        values,
        run,
        (values, residual),
        pending,  # an array of its own: `reject` may have the residual back
        peers.find("feedback", values, _kept(values)) if whole else {},
        {"a pass that writes over the residual": in_place},
        reset=reset,
        outcome=lambda payload: (payload, client.residual),
    )


# --- the cost of a call ---------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[], Any]] = {
    "1,000 values": partial(data.values, "student-t", 1000),
    "400 small tensors": data.lora,
    "161 tensors like ResNet-50": data.resnet50,
}
Framework = Literal["numpy", "torch"]
FRAMEWORKS: dict[str, Framework] = {"NumPy": "numpy", "torch": "torch"}


def _tensors(layout: str, framework: Framework) -> tuple[Any, Float32]:
    """Return the update, and its values in one array."""
    update = LAYOUTS[layout]()
    if not isinstance(update, dict):
        return (peers.load("torch").from_numpy(update) if framework == "torch" else update), update
    flat = np.concatenate([array.reshape(-1) for array in update.values()])
    if framework == "torch":
        torch = peers.load("torch")
        update = {name: torch.from_numpy(array) for name, array in update.items()}
    return update, flat


def _encode_layout(layout: str, framework: Framework) -> Case:
    codec, (update, flat) = fc.parse(SPARSE_CODEC), _tensors(layout, framework)
    room = _room(len(codec.encode(update)))
    found = peers.find("encode tensors", update)
    return Case(flat, lambda: codec.encode(update), (flat,), room, found)


def _decode_layout(layout: str, framework: Framework, fresh: bool) -> Case:
    update, flat = _tensors(layout, framework)
    payload = fc.parse(SPARSE_CODEC).encode(update)
    kwargs: Any = {"out": update}
    if fresh:
        kwargs = {} if framework == "numpy" else {"framework": framework}
    return Case(
        flat,
        lambda: fc.decode(payload, **kwargs),
        (_bytes(payload),),
        np.zeros_like(flat),
        peers.find("decode tensors", update) if fresh else {},
    )


def _add_layout(layout: str) -> Case:
    update, flat = _tensors(layout, "numpy")
    payload, spec = fc.parse(SPARSE_CODEC).encode(update), fc.Spec.of(update)
    servers = [fc.Aggregator(spec)]
    return Case(
        flat,
        lambda: servers[0].add(payload, 3.0),
        reset=lambda: servers.__setitem__(0, fc.Aggregator(spec)),
        outcome=lambda _: servers[0].mean(),
    )


def _bound(build: Callable[..., Case], *given: Any) -> Callable[..., Case]:
    return lambda *values: build(*values, *given)


def rows(pattern: str = "") -> list[Row]:
    """Return the rows whose names the regular expression finds.

    Examples
    --------
    >>> [row.name for row in rows("quantize")]
    ['int8 quantize', 'int8 quantize, stochastic', 'int8 dequantize', '4 bits: quantize', '4 bits: dequantize']
    """
    all_rows = [
        *(
            Row(f"top-k {100 * density:g} %", "kernel", _bound(_topk, density))
            for density in (0.001, 0.01, 0.1)
        ),
        Row("top-k 1 %: threshold alone", "kernel", _threshold),
        Row("top-k 1 %: compaction alone", "kernel", _compact),
        Row("percentile threshold", "kernel", _percentile),
        Row("random 1 %", "kernel", _random_positions),
        Row("int8 quantize", "kernel", _bound(_quantize, 8, False)),
        Row("int8 quantize, stochastic", "kernel", _bound(_quantize, 8, True)),
        Row("int8 dequantize", "kernel", _bound(_dequantize, 8)),
        Row("int8 decode and add", "kernel", _add_codes),
        Row("4 bits: quantize", "kernel", _bound(_quantize, 4, False)),
        Row("4 bits: dequantize", "kernel", _bound(_dequantize, 4)),
        Row("4 bits: pack", "kernel", _pack_codes),
        Row("4 bits: unpack", "kernel", _unpack_codes),
        Row("signs: pack", "kernel", _pack_signs),
        Row("signs: unpack", "kernel", _unpack_signs),
        Row("mean magnitude", "kernel", _mean_magnitude),
        Row("mask: apply", "kernel", _apply_mask),
        Row("mask: pack", "kernel", _pack_mask),
        Row("mask: unpack", "kernel", _unpack_mask),
        Row("positions: pack", "kernel", _pack_sparse),
        Row("positions: unpack", "kernel", _unpack_sparse),
        Row("positions: scatter", "kernel", _scatter),
        Row("positions: weighted add", "kernel", _add_sparse),
        Row("weighted add", "kernel", _add_values),
        *(
            Row(f"{dtype}: {name}", "kernel", _bound(build, dtype))
            for dtype in ("float16", "bfloat16")
            for name, build in (("narrow", _narrow), ("widen", _widen))
        ),
        Row("random words", "kernel", _random_words),
        Row("crc32", "kernel", _crc32),
        *(
            Row(f"{name} {text}", "call", _bound(build, text))
            for name, build in (
                ("encode", _encode),
                ("decode into arrays", _decode),
                ("decode", _decode_fresh),
                ("add", _add),
            )
            for text in CODECS
        ),
        Row(f"error feedback {SPARSE_CODEC}", "call", _bound(_feedback, True)),
        Row(f"error feedback, encode alone {SPARSE_CODEC}", "call", _bound(_feedback, False)),
        *(
            Row(f"{name} {layout}, {library}", "layout", _bound(build, layout, framework, *fresh))
            for layout in LAYOUTS
            for library, framework in FRAMEWORKS.items()
            for name, build, *fresh in (
                ("encode", _encode_layout),
                ("decode", _decode_layout, True),
                ("decode into arrays", _decode_layout, False),
            )
        ),
        *(Row(f"add {layout}", "layout", _bound(_add_layout, layout)) for layout in LAYOUTS),
    ]
    return [row for row in all_rows if re.search(pattern, row.name)]
