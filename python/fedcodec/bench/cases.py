"""What is measured: every kernel and every whole call, with the memory that it has to read and write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import fedcodec as fc
from fedcodec import ops

from . import data, peers
from .data import Float32

Array = npt.NDArray[Any]
Run = Callable[[], Any]

CODECS = ("topk(0.01) | int8", "int8", "topk(0.01) | ternary", "kbit(4)", "raw")
SPARSE_CODEC = CODECS[0]
BLOCK = 1024


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


def _select(values: Float32, k: int) -> tuple[Array, Array]:
    fused = getattr(ops, "topk", None)
    if fused is not None:
        selected: tuple[Array, Array] = fused(values, k)
        return selected
    return ops.compact(values, *ops.topk_threshold(values, k))


def _kept(values: Float32, density: float) -> int:
    return max(1, round(density * values.size))


def _topk(values: Float32, density: float) -> Case:
    k = _kept(values, density)
    positions, kept = _select(values, k)
    return Case(
        values,
        lambda: _select(values, k),
        (values,),
        _room(positions.nbytes + kept.nbytes),
        peers.find("top-k", values, k),
    )


def _percentile(values: Float32) -> Case:
    found = peers.find("percentile", values, 90)
    return Case(values, lambda: ops.percentile_threshold(values, 90), (values,), None, found)


def _quantize(values: Float32) -> Case:
    codes, scales = ops.quantize_int8(values)
    return Case(
        values,
        lambda: ops.quantize_int8(values, out=(codes, scales)),
        (values,),
        codes,
        peers.find("quantize", values, BLOCK),
    )


def _dequantize(values: Float32) -> Case:
    codes, scales = ops.quantize_int8(values)
    out = np.zeros_like(values)
    return Case(
        values,
        lambda: ops.dequantize_int8(codes, scales, out=out),
        (codes,),
        out,
        peers.find("dequantize", values, codes, scales, BLOCK),
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
    found = peers.find("pack codes", codes)
    return Case(values, lambda: ops.pack_codes(codes, 4, out=packed), (codes,), packed, found)


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
    positions, _ = _select(values, _kept(values, 0.01))
    payload = ops.pack_sparse(positions, values.size)
    return Case(
        values,
        lambda: ops.pack_sparse(positions, values.size),
        (positions,),
        _room(len(payload)),
        peers.find("pack sparse", positions),
        rate=(positions.size, "positions"),
    )


def _unpack_sparse(values: Float32) -> Case:
    positions, _ = _select(values, _kept(values, 0.01))
    payload = ops.pack_sparse(positions, values.size)
    return Case(
        values,
        lambda: ops.unpack_sparse(payload, values.size),
        (_bytes(payload),),
        np.zeros_like(positions),
        peers.find("unpack sparse", positions),
        rate=(positions.size, "positions"),
    )


def _narrow(values: Float32) -> Case:
    out = ops.narrow(values, "float16")
    found = peers.find("narrow", values)
    return Case(values, lambda: ops.narrow(values, "float16", out=out), (values,), out, found)


def _widen(values: Float32) -> Case:
    half, out = ops.narrow(values, "float16").view(np.uint16), np.zeros_like(values)
    found = peers.find("widen", half)
    return Case(values, lambda: ops.widen(half, "float16", out=out), (half,), out, found)


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
    decoded = fc.decode(payload)
    sparse = text.startswith("topk")
    total = np.zeros_like(values)
    positions = np.flatnonzero(decoded)
    kept = decoded[positions]
    scatter = partial(ops.accumulate_sparse, total, positions, kept, 3.0)
    return Case(
        values,
        lambda: servers[0].add(payload, 3.0),
        # A pass over memory is no measure of what writes to few places.
        () if sparse else (_bytes(payload), total),
        None if sparse else total,
        peers.find("add sparse" if sparse else "add", decoded),
        {"our scatter-add of ready positions": scatter} if sparse else {},
        reset=lambda: servers.__setitem__(0, fc.Aggregator(spec)),
        outcome=lambda _: servers[0].mean(),
    )


def _feedback(values: Float32) -> Case:
    client = fc.ErrorFeedback(SPARSE_CODEC)
    residual = np.zeros_like(values)

    def run() -> bytes:
        payload = client.encode(values, seed=0)
        client.accept()
        return payload

    return Case(
        values,
        run,
        (values, residual),
        residual,
        peers.find("feedback", values, _kept(values, 0.01)),
        reset=client.reset,
        outcome=lambda payload: (payload, client.residual),
    )


# --- the cost of a call ---------------------------------------------------------------------------


def _tensors(layout: str) -> Any:
    if layout == "1,000 values":
        return data.values("student-t", 1000)
    if layout == "161 tensors like ResNet-50":
        return data.resnet50()
    update = data.lora()
    if layout.endswith("torch"):
        torch = peers.load("torch")
        return {name: torch.from_numpy(array) for name, array in update.items()}
    return update


def _flat(update: Any) -> Float32:
    arrays = update.values() if isinstance(update, dict) else [update]
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])


def _encode_layout(layout: str) -> Case:
    codec, update = fc.parse(SPARSE_CODEC), _tensors(layout)
    flat = _flat(update)
    room = _room(len(codec.encode(update)))
    found = peers.find("encode tensors", update)
    return Case(flat, lambda: codec.encode(update), (flat,), room, found)


def _decode_layout(layout: str) -> Case:
    update = _tensors(layout)
    payload, flat = fc.parse(SPARSE_CODEC).encode(update), _flat(update)
    framework: Any = "torch" if layout.endswith("torch") else "numpy"
    return Case(
        flat,
        lambda: fc.decode(payload, framework=framework),
        (_bytes(payload),),
        np.zeros_like(flat),
        peers.find("decode tensors", update),
    )


LAYOUTS = (
    "1,000 values",
    "400 small tensors, NumPy",
    "400 small tensors, torch",
    "161 tensors like ResNet-50",
)


def _bound(build: Callable[..., Case], *given: Any) -> Callable[..., Case]:
    return lambda *values: build(*values, *given)


def rows(pattern: str = "") -> list[Row]:
    """Return the rows whose names the regular expression finds.

    Examples
    --------
    >>> [row.name for row in rows("quantize")]
    ['int8 quantize', 'int8 dequantize']
    """
    all_rows = [
        *(
            Row(f"top-k {100 * density:g} %", "kernel", _bound(_topk, density))
            for density in (0.001, 0.01, 0.1)
        ),
        Row("percentile threshold", "kernel", _percentile),
        Row("int8 quantize", "kernel", _quantize),
        Row("int8 dequantize", "kernel", _dequantize),
        Row("int8 decode and add", "kernel", _add_codes),
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
        Row("float16: narrow", "kernel", _narrow),
        Row("float16: widen", "kernel", _widen),
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
        Row(f"error feedback {SPARSE_CODEC}", "call", _feedback),
        *(
            Row(f"{name} {layout}", "layout", _bound(build, layout))
            for layout in LAYOUTS
            for name, build in (("encode", _encode_layout), ("decode", _decode_layout))
        ),
    ]
    return [row for row in all_rows if re.search(pattern, row.name)]
