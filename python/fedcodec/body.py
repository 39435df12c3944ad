"""Bodies of payloads in Python: docs/format.md section 4, the twin of csrc/body.cc.

An `Encoder` and a `Decoder` are made once of the dtype ids, the shapes and the segments of a body, and run on the
kernels of `ops`: `fedcodec.ops.reference` or another backend with the same functions. Every call takes one array for
each tensor: contiguous, of any shape, of its dtype or of its bytes (uint16 for the 16-bit floats, else uint8).

A *segment* is ``(tensor indices, coder)``, a coder ``("coder", select, quantize)``, such a one behind a transform,
``("transform", transform, coder)``, or, of two of those, ``("residual", coder, coder)``:

========  =======================================================================================================
select    None, ``("mask", bits, n)``; to encode ``("topk", scope, [k])``, ``("threshold", scope, value)``,
          ``("percentile", scope, p, interpolation)``, ``("random", scope, [k], [seed])``, with one k and seed a group;
          ``("structured", 1, axis, density or None, order)``;
          to decode ``("sparse", scope)``, ``("random", scope)``, ``("structured", 1, axis)``. Scope 0 is one flat
          space, 1 each tensor.
quantize  None, ``("integer", bits, granularity, size)``, to encode followed by ``(stochastic, codec seed, call seed)``;
          ``("sign",)``; ``("cast", dtype id)``; ``("python", quantizer)``, to encode followed by a seed.
========  =======================================================================================================

A Python quantizer has ``encode_values(values, seed) -> bytes`` and ``decode_values(data, n) -> float32 array``; its
values travel as varint length and bytes, whatever their size. A transform has ``forward(values) -> float32 array`` to
encode, to decode ``values`` and ``outputs``, the sizes before and behind it, and ``inverse(outputs)``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate as running_sum
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import dtypes
from .errors import DecodeError
from .ops.reference import kept_channels, round_down
from .reader import Reader, varint

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview
Tensor = tuple[Any, int, tuple[int, ...]]
Coder = tuple[Any, ...]
Segment = tuple[Sequence[int], Coder]

FLOAT32, FLOAT16, BFLOAT16, FLOAT64, BOOL = 1, 2, 3, 4, 16
_ROUNDINGS = 1 + 2.0**-20  # more than the rounding of a sum can add
_ALL = ("all", 0)  # in the place of a select stage: one flat space
_EXACT = {
    8: "i1",
    9: "<i2",
    10: "<i4",
    11: "<i8",
    12: "u1",
    13: "<u2",
    14: "<u4",
    15: "<u8",
    16: "u1",
}


class NonFinite(Exception):
    """A value that may not travel: (tensor index, element index, value, dtype id it overflows in, or 0)."""


class _Group(NamedTuple):
    members: list[int]
    ends: list[int]  # of the members in the flat space
    dtype: int  # of values that travel as they are
    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def work(self) -> npt.DTypeLike:
        return _work(self.dtype)

    def locate(self, position: int) -> tuple[int, int]:
        """Find the tensor and its element at a position of the flat space."""
        member = int(np.searchsorted(self.ends, position, side="right"))
        return self.members[member], position - (self.ends[member - 1] if member else 0)


class _Piece(NamedTuple):
    """What one tensor gets of a coding: values of all its elements, or those at `positions`; the rest is zero."""

    tensor: int
    positions: Array | None
    values: Array


class _Coded(NamedTuple):
    """What a group or a sum decodes to, and a bound of its magnitudes before they are rounded to a narrower dtype."""

    pieces: list[_Piece]
    bound: float


def _size(tensor: Tensor) -> int:
    return math.prod(tensor[2])


def _flat(array: Array, dtype: int) -> Array:
    """The same memory as the wire's storage, or as work values."""
    flat = array.reshape(-1)
    return (
        flat if flat.dtype in (np.float32, np.float64) else flat.view(dtypes.BY_ID[dtype].storage)
    )


def _work(dtype: int) -> npt.DTypeLike:
    return np.float64 if dtype == FLOAT64 else np.float32


def _floats(tensors: Sequence[Tensor], indices: Sequence[int]) -> list[int]:
    return [i for i in indices if dtypes.BY_ID[tensors[i][1]].is_float]


def _groups(tensors: Sequence[Tensor], floats: Sequence[int], select: Any) -> list[_Group]:
    if select is not None and (select[0] == "mask" or select[1] == 0):
        kinds = {tensors[i][1] for i in floats}
        dtype = kinds.pop() if len(kinds) == 1 else FLOAT64 if FLOAT64 in kinds else FLOAT32
        ends = list(running_sum(_size(tensors[i]) for i in floats))
        return [_Group(list(floats), ends, dtype, (ends[-1] if ends else 0,))]
    return [_Group([i], [_size(tensors[i])], tensors[i][1], tensors[i][2]) for i in floats]


def _grid(quantize: Any, group: _Group, m: int) -> tuple[int, int]:
    _, _, granularity, size, *_ = quantize
    if granularity == "block":
        return size, -(-m // size)
    if granularity == "channel":
        return _channels(size, group) or (m, 1)
    return m, 1


def _channels(axis: int, group: _Group) -> tuple[int, int] | None:
    """The elements of a channel that lie together, and how many channels there are; None without that axis."""
    if axis >= len(group.shape):
        return None
    return math.prod(group.shape[axis + 1 :]), group.shape[axis]


def _elements(kept: Array, inner: int, group: _Group) -> Array:
    """The positions of the elements of the kept channels."""
    return np.flatnonzero(
        np.broadcast_to(kept[:, None], (group.n // inner // kept.size, kept.size, inner))
    )


def _travels_raw(quantize: Any, group: _Group, m: int) -> bool:
    if quantize is None:
        return True
    kind = quantize[0]
    if kind == "python":
        return False
    if kind == "integer":
        coded = 4 * _grid(quantize, group, m)[1] + (m * quantize[1] + 7) // 8
    else:
        coded = 4 + (m + 7) // 8 if kind == "sign" else 2 * m
    return bool(m * dtypes.BY_ID[group.dtype].itemsize <= coded)


def _drops_zeros(quantize: Any) -> bool:
    # Ternary keeps no zeros: they would decode to the magnitude.
    return quantize is not None and quantize[0] == "sign"


def _pieces(group: _Group, positions: Array | None, values: Array) -> Iterator[_Piece]:
    starts = [0, *group.ends[:-1]]
    if positions is None:
        for tensor, start, end in zip(group.members, starts, group.ends, strict=True):
            yield _Piece(tensor, None, values[start:end])
        return
    cuts = np.searchsorted(positions, [0, *group.ends])
    for tensor, start, low, high in zip(group.members, starts, cuts[:-1], cuts[1:], strict=True):
        yield _Piece(tensor, positions[low:high] - start, values[low:high])


def _dense(
    tensors: Sequence[Tensor], floats: Sequence[int], pieces: Iterable[_Piece]
) -> dict[int, Array]:
    """The pieces as whole tensors in the type that their sums are made in."""
    whole = {i: np.zeros(_size(tensors[i]), _work(tensors[i][1])) for i in floats}
    with np.errstate(over="ignore"):
        for piece in pieces:
            where = slice(None) if piece.positions is None else piece.positions
            whole[piece.tensor][where] = piece.values
    return whole


def _sum(first: dict[int, Array], second: dict[int, Array]) -> list[_Piece]:
    with np.errstate(over="ignore", invalid="ignore"):
        return [_Piece(i, None, np.add(first[i], second[i], out=first[i])) for i in first]


def _cast(values: Array, dtype: int, ops: ModuleType) -> tuple[Array, int | None]:
    """Values in a dtype's storage, and where the first of them is not finite."""
    if dtype in (FLOAT32, FLOAT64):
        with np.errstate(over="ignore"):
            cast = values.astype(_work(dtype), copy=False)
        return cast, _first(~np.isfinite(cast))
    bits: Array = ops.narrow(values, dtypes.BY_ID[dtype].name)
    infinity = 0x7C00 if dtype == FLOAT16 else 0x7F80
    return bits, _first((bits & 0x7FFF) >= infinity)


def _first(wrong: Array) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


# --- encoding -----------------------------------------------------------------------------------------------------


def _work_values(tensors: Sequence[Tensor], i: int, ops: ModuleType) -> Array:
    array, dtype, _ = tensors[i]
    values: Array = (
        ops.widen(array, dtypes.BY_ID[dtype].name) if array.dtype == np.uint16 else array
    )
    wrong = _first(~np.isfinite(values))
    if wrong is not None:
        raise NonFinite(i, wrong, float(values[wrong]), 0)
    return values


class _Encoder:
    def __init__(self, tensors: Sequence[Tensor], first: int, ops: ModuleType) -> None:
        self.tensors = tensors
        self.drawn = first
        self.decodes = False
        self.ops = ops
        self.out: list[Any] = []

    def segment(self, indices: Sequence[int], coder: Coder) -> None:
        floats = _floats(self.tensors, indices)
        work = {i: _work_values(self.tensors, i, self.ops) for i in floats}
        # Only a sum, or a scale that tensors share, can take a value that fits out of its dtype.
        narrow = any(self.tensors[i][1] in (FLOAT16, BFLOAT16) for i in floats)
        self.decodes = narrow or coder[0] == "residual"
        pieces = self.coder(coder, floats, work)
        for piece in pieces if self.decodes else ():
            dtype = self.tensors[piece.tensor][1]
            _, wrong = _cast(piece.values, dtype, self.ops)
            if wrong is not None:
                element = wrong if piece.positions is None else int(piece.positions[wrong])
                raise NonFinite(piece.tensor, element, float(work[piece.tensor][element]), dtype)
        for i in indices:
            if i not in work:
                array, dtype, _ = self.tensors[i]
                self.out.append(array != 0 if dtype == BOOL else array)

    def coder(self, coder: Coder, floats: list[int], work: dict[int, Array]) -> list[_Piece]:
        """Write a coding and return what it decodes to, where `decodes`."""
        kind, one, two = coder
        if kind == "transform":
            return self.transformed(one, two, floats, work)
        if kind == "residual":
            first = _dense(self.tensors, floats, self.coder(one, floats, work))
            with np.errstate(over="ignore"):
                missed = {i: work[i] - first[i] for i in floats}
            for i, values in missed.items():
                wrong = _first(~np.isfinite(values))
                if wrong is not None:
                    raise NonFinite(i, wrong, float(work[i][wrong]), self.tensors[i][1])
            return _sum(first, _dense(self.tensors, floats, self.coder(two, floats, missed)))
        pieces: list[_Piece] = []
        for number, group in enumerate(_groups(self.tensors, floats, one)):
            if group.n == 0:
                continue
            parts = [work[i].astype(group.work, copy=False) for i in group.members]
            positions, values = self.select(one, number, group, parts, two)
            if values.size:
                values = self.values(two, group, positions, values)
            pieces.extend(_pieces(group, positions, values))
        return pieces

    def transformed(
        self, transform: Any, coder: Coder, floats: list[int], work: dict[int, Array]
    ) -> list[_Piece]:
        (group,) = _groups(self.tensors, floats, _ALL)
        if group.n == 0:
            return []
        values = np.concatenate([work[i] for i in floats])
        outputs = transform.forward(self.fitted(values, FLOAT32, group, None))
        inner = _Encoder([(outputs, FLOAT32, outputs.shape)], self.drawn, self.ops)
        inner.out, inner.decodes = self.out, self.decodes
        try:
            pieces = inner.coder(coder, [0], {0: outputs})
        except NonFinite as error:
            _, element, value, dtype = error.args
            beyond = f"beyond the largest {dtypes.BY_ID[dtype].name}"
            raise ValueError(f"{transform}: output {element} is {value}, {beyond}") from None
        self.drawn = inner.drawn
        if not self.decodes:
            return []
        decoded = transform.inverse(_dense(inner.tensors, [0], pieces)[0])
        return list(_pieces(group, None, decoded))

    def select(
        self, select: Any, number: int, group: _Group, parts: list[Array], quantize: Any
    ) -> tuple[Array | None, Array]:
        if select is None:
            return None, parts[0]
        kind = select[0]
        if kind == "mask":
            _, bits, n = select
            if n != group.n:
                raise ValueError(f"a mask over {n} values for {group.n}")
            positions = np.flatnonzero(self.ops.unpack_mask(np.frombuffer(bits, np.uint8), n))
            return positions, np.concatenate(parts)[positions]
        if kind == "random":
            k, seed = select[2][number], select[3][number]
            self.out.append(varint(k) + seed.to_bytes(8, "little"))
            positions = self.ops.random_positions(group.n, k, seed)
            return positions, np.concatenate(parts)[positions]
        if kind == "structured":
            return self.structured(select, group, parts[0], quantize)
        ties = 0
        if kind == "topk":
            k = select[2][number]
            if _drops_zeros(quantize):
                k = min(k, sum(int(np.count_nonzero(part)) for part in parts))
            threshold, ties = self.ops.topk_threshold(parts, k)
        elif kind == "threshold":
            threshold = round_down(select[2], group.work)
        else:
            threshold = self.ops.percentile_threshold(parts, select[2], select[3])
        positions, values = self.ops.compact(parts, threshold, ties)
        self.out.append(self.ops.pack_sparse(positions, group.n))
        return positions, values

    def structured(
        self, select: Any, group: _Group, values: Array, quantize: Any
    ) -> tuple[Array | None, Array]:
        _, _, axis, density, order = select
        found = _channels(axis, group)
        if found is None:
            return None, values
        kept = kept_channels(values, *found, density, order, zeros=not _drops_zeros(quantize))
        self.out.append(self.ops.pack_mask(kept))
        positions = _elements(kept, found[0], group)
        return positions, values[positions]

    def values(self, quantize: Any, group: _Group, positions: Array | None, values: Array) -> Array:
        """Write the kept values of a group, at least one, and return what they decode to, where `decodes`."""
        ops = self.ops
        raw = _travels_raw(quantize, group, values.size)
        if raw or quantize[0] == "cast":
            dtype = group.dtype if raw else quantize[1]
            storage = self.fitted(values, dtype, group, positions)
            self.out.append(storage)
            return _widened(storage, dtype, ops)
        values = self.fitted(values, FLOAT32, group, positions)
        if quantize[0] == "integer":
            _, bits, _, _, stochastic, codec_seed, call_seed = quantize
            grid = _grid(quantize, group, values.size)
            draw = (codec_seed, call_seed, self.drawn) if stochastic else None
            codes, scales = ops.quantize(values, bits, *grid, draw)
            self.drawn += values.size if stochastic else 0
            self.out += [scales, codes if bits == 8 else ops.pack_codes(codes, bits)]
            if self.decodes:
                values = ops.dequantize(codes, scales, bits, *grid)
        elif quantize[0] == "sign":
            magnitude = ops.mean_magnitude(values)
            signs = ops.pack_signs(values)
            self.out += [np.float32(magnitude).tobytes(), signs]
            if self.decodes:
                values = ops.unpack_signs(signs, magnitude, values.size)
        else:
            _, quantizer, seed = quantize
            data = quantizer.encode_values(values, seed)
            self.out += [varint(len(data)), data]
            if self.decodes:
                values = _decode_python(quantizer, data, values.size, None)
        return values

    def fitted(self, values: Array, dtype: int, group: _Group, positions: Array | None) -> Array:
        storage, wrong = _cast(values, dtype, self.ops)
        if wrong is not None:
            place = wrong if positions is None else int(positions[wrong])
            raise NonFinite(*group.locate(place), float(values[wrong]), dtype)
        return storage


def _widened(storage: Array, dtype: int, ops: ModuleType) -> Array:
    wide: Array = (
        ops.widen(storage, dtypes.BY_ID[dtype].name) if dtype in (FLOAT16, BFLOAT16) else storage
    )
    return wide


def _compensated(tensor: Tensor, ops: ModuleType) -> Tensor:
    arrays, dtype, shape = tensor
    if not isinstance(arrays, tuple):
        return _flat(arrays, dtype), dtype, shape
    values, update, residual = (_flat(array, dtype) for array in arrays)
    values[:] = ops.widen(update, dtypes.BY_ID[dtype].name) if update.dtype == np.uint16 else update
    with np.errstate(over="ignore"):
        ops.accumulate(values, residual, 1.0)
    return values, dtype, shape


class Encoder:
    """What encodes the bodies of tensors of these dtypes and shapes."""

    def __init__(
        self,
        dtypes: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        segments: Sequence[Segment],
        *,
        ops: ModuleType,
    ) -> None:
        self._about = dtypes, shapes
        self._segments = segments
        self._ops = ops

    def encode(self, header: bytes, arrays: Sequence[Any], seal: bool, first: int = 0) -> bytes:
        """Return `header`, the body and, with `seal`, the CRC-32 of both.

        `first` is how many values the call has quantized stochastically before. In the place of a float tensor's array
        may stand (values, update, residual): the values are filled with update + residual. Raises `NonFinite`.
        """
        tensors = zip(arrays, *self._about, strict=True)
        encoder = _Encoder(
            [_compensated(tensor, self._ops) for tensor in tensors], first, self._ops
        )
        encoder.out.append(header)
        for indices, coder in self._segments:
            encoder.segment(indices, coder)
        payload = b"".join(encoder.out)
        return payload + self._ops.crc32(payload).to_bytes(4, "little") if seal else payload


# --- decoding -----------------------------------------------------------------------------------------------------


def _decode_python(quantizer: Any, data: bytes, n: int, offset: int | None) -> Array:
    try:
        values: Any = quantizer.decode_values(data, n)
    except Exception as error:
        raise DecodeError(f"the quantizer refuses its values: {error!r}", offset) from error
    if not isinstance(values, np.ndarray) or values.shape != (n,) or values.dtype != np.float32:
        raise DecodeError(f"the quantizer returned no {n} float32 values", offset)
    if not np.isfinite(values).all():
        raise DecodeError("the quantizer returned a value that is not finite", offset)
    return values


class _Decoder:
    def __init__(
        self, payload: Buffer, start: int, stop: int, tensors: Sequence[Tensor], ops: ModuleType
    ) -> None:
        self.reader = Reader(payload, start, stop)
        self.tensors = tensors
        self.ops = ops

    def array(self, n: int, dtype: npt.DTypeLike) -> Array:
        kind = np.dtype(dtype)
        return np.frombuffer(self.reader.take(n * kind.itemsize), kind)

    def floats(self, dtype: int, n: int) -> Array:
        """`n` finite values of a float dtype, widened."""
        start = self.reader.offset
        values = _widened(self.array(n, dtypes.BY_ID[dtype].storage), dtype, self.ops)
        wrong = _first(~np.isfinite(values))
        if wrong is not None:
            raise DecodeError("a value is not finite", start + wrong * dtypes.BY_ID[dtype].itemsize)
        return values

    def magnitudes(self, n: int) -> Array:
        start = self.reader.offset
        values = self.floats(FLOAT32, n)
        wrong = _first(np.signbit(values))
        if wrong is not None:
            raise DecodeError("a scale or magnitude is negative", start + 4 * wrong)
        return values

    def bits(self, n: int) -> Array:
        bits = self.array((n + 7) // 8, np.uint8)
        if n % 8 and bits[-1] >> n % 8:
            raise DecodeError("padding bits are not zero", self.reader.offset - 1)
        return bits

    def body(self, segments: Sequence[Segment]) -> _Body:
        """Read everything: the floats' pieces in their storage, and the other tensors' elements."""
        coded: list[_Coded] = []
        exact: dict[int, Array] = {}
        for indices, coder in segments:
            floats = _floats(self.tensors, indices)
            start = self.reader.offset
            for pieces, bound in self.coder(coder, floats):
                coded.append(_Coded([self.stored(piece, start) for piece in pieces], bound))
            in_coding = set(floats)
            for i in indices:
                if i not in in_coding:
                    exact[i] = self.exact(self.tensors[i])
        self.reader.end()
        return coded, exact

    def stored(self, piece: _Piece, start: int) -> _Piece:
        dtype = self.tensors[piece.tensor][1]
        values, wrong = _cast(piece.values, dtype, self.ops)
        if wrong is not None:
            raise DecodeError(f"a value decodes to infinity in {dtypes.BY_ID[dtype].name}", start)
        return piece._replace(values=values)

    def exact(self, tensor: Tensor) -> Array:
        start = self.reader.offset
        elements = self.array(_size(tensor), _EXACT[tensor[1]])
        wrong = _first(elements > 1) if tensor[1] == BOOL else None
        if wrong is not None:
            raise DecodeError("a bool is neither 0 nor 1", start + wrong)
        return elements

    def coder(self, coder: Coder, floats: list[int]) -> list[_Coded]:
        kind, one, two = coder
        if kind == "transform":
            return self.transformed(one, two, floats)
        if kind == "residual":
            terms = [self.coder(term, floats) for term in (one, two)]
            first, second = (
                _dense(self.tensors, floats, (piece for coded in term for piece in coded.pieces))
                for term in terms
            )
            bound = sum(max((coded.bound for coded in term), default=0.0) for term in terms)
            return [_Coded(_sum(first, second), bound * _ROUNDINGS)]
        coded = []
        for group in _groups(self.tensors, floats, one):
            if group.n == 0:
                continue
            if group.n >> 63:
                raise DecodeError("a group of 2^63 elements or more", self.reader.offset)
            positions = self.positions(one, two, group)
            m = group.n if positions is None else positions.size
            values, bound = self.values(two, group, m) if m else (np.zeros(0, np.float32), 0.0)
            coded.append(_Coded(list(_pieces(group, positions, values)), bound))
        return coded

    def transformed(self, transform: Any, coder: Coder, floats: list[int]) -> list[_Coded]:
        (group,) = _groups(self.tensors, floats, _ALL)
        if group.n == 0:
            return []
        start = self.reader.offset
        if group.n != transform.values:
            expected = f"{transform.values} values, the tensors have {group.n}"
            raise DecodeError(f"the decoder is for {expected}", start)
        inner = copy.copy(self)  # of the same reader
        inner.tensors = [(None, FLOAT32, (transform.outputs,))]
        pieces = [piece for coded in inner.coder(coder, [0]) for piece in coded.pieces]
        try:
            values: Array = transform.inverse(_dense(inner.tensors, [0], pieces)[0])
        except Exception as error:
            raise DecodeError(f"the decoder refuses its input: {error!r}", start) from error
        if not np.isfinite(values).all():
            raise DecodeError("the decoder returned a value that is not finite", start)
        return [_Coded(list(_pieces(group, None, values)), _magnitude(values))]

    def positions(self, select: Any, quantize: Any, group: _Group) -> Array | None:
        if select is None:
            return None
        start = self.reader.offset
        if select[0] == "mask":
            _, bits, n = select
            if n != group.n:
                raise DecodeError(f"the mask is over {n} values, the group has {group.n}", start)
            return np.flatnonzero(self.ops.unpack_mask(np.frombuffer(bits, np.uint8), n))
        if select[0] == "structured":
            found = _channels(select[2], group)
            if found is None:
                return None
            inner, channels = found
            kept = self.ops.unpack_mask(self.bits(channels), channels)
            return _elements(kept, inner, group)
        positions: Array
        if select[0] == "random":
            k = self.reader.varint()
            if k > group.n:
                raise DecodeError(f"{k} positions out of {group.n}", start)
            # A value takes a bit at least, but for Python's: nothing is drawn for what cannot follow.
            if k // 8 > self.reader.remaining and not (quantize and quantize[0] == "python"):
                raise DecodeError(f"{k} values do not follow", start)
            positions = self.ops.random_positions(
                group.n, k, int.from_bytes(self.reader.take(8), "little")
            )
            return positions
        try:
            positions, used = self.ops.unpack_sparse(self.reader.rest(), group.n)
        except DecodeError as error:
            raise DecodeError(str(error.args[0]), start + (error.offset or 0)) from None
        self.reader.take(used)
        return positions

    def values(self, quantize: Any, group: _Group, m: int) -> tuple[Array, float]:
        """Read the values of a group, and bound them: of codes by what their scales allow."""
        ops = self.ops
        if _travels_raw(quantize, group, m):
            values = self.floats(group.dtype, m)
        elif quantize[0] == "cast":
            values = self.floats(quantize[1], m)
        elif quantize[0] == "integer":
            bits = quantize[1]
            grid = _grid(quantize, group, m)
            scales = self.magnitudes(grid[1])
            codes = (
                self.array(m, np.int8)
                if bits == 8
                else ops.unpack_codes(self.bits(m * bits), bits, m)
            )
            with np.errstate(over="ignore"):
                bound = scales.max(initial=0.0) * np.float32((1 << (bits - 1)) - 1)
            return ops.dequantize(codes, scales, bits, *grid), float(bound)
        elif quantize[0] == "sign":
            magnitude = float(self.magnitudes(1)[0])
            return ops.unpack_signs(self.bits(m), magnitude, m), magnitude
        else:
            start = self.reader.offset
            data = bytes(self.reader.take(self.reader.varint()))
            values = _decode_python(quantize[1], data, m, start)
        return values, _magnitude(values)


_Body = tuple[list[_Coded], dict[int, Array]]


def _magnitude(values: Array) -> float:
    return float(np.abs(values).max(initial=0.0))


def _largest(
    coded: _Coded, tensors: Sequence[Tensor], sums: Sequence[Array], ops: ModuleType
) -> list[tuple[np.dtype[Any], float]]:
    """Bound what goes to each sum, with the sum's dtype.

    One bound for several tensors serves where it is finite in all of them and their sums are of one dtype.
    """
    kinds = [sums[piece.tensor].dtype for piece in coded.pieces]

    def fitted(piece: _Piece, magnitude: float) -> float:
        dtype = tensors[piece.tensor][1]
        storage, _ = _cast(np.array([magnitude]), dtype, ops)
        with np.errstate(over="ignore"):
            return float(_widened(storage, dtype, ops).astype(sums[piece.tensor].dtype)[0])

    bounds = [fitted(piece, coded.bound) for piece in coded.pieces]
    if len(set(kinds)) > 1 or not all(map(math.isfinite, bounds)):
        bounds = [
            fitted(piece, _magnitude(_widened(piece.values, tensors[piece.tensor][1], ops)))
            for piece in coded.pieces
        ]
    return list(zip(kinds, bounds, strict=True))


class Decoder:
    """What reads the bodies of tensors of these dtypes and shapes.

    A body is ``payload[start:stop]``; every call validates it wholly before it writes, or raises `DecodeError`.
    """

    def __init__(
        self,
        dtypes: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        segments: Sequence[Segment],
        *,
        ops: ModuleType,
    ) -> None:
        self._tensors = [(None, *about) for about in zip(dtypes, shapes, strict=True)]
        self._segments = segments
        self._ops = ops

    def check(self, payload: Buffer, start: int, stop: int) -> None:
        """Validate only."""
        self._open(payload, start, stop)

    def opened(self, payload: Buffer, start: int, stop: int) -> Decoder:
        """Return a decoder of this one body that has read it: stages in Python need not give the same twice."""
        return _Opened(self, self._open(payload, start, stop))

    def _open(self, payload: Buffer, start: int, stop: int) -> _Body:
        return _Decoder(payload, start, stop, self._tensors, self._ops).body(self._segments)

    def decode(
        self, payload: Buffer, start: int, stop: int, arrays: list[Array] | None = None
    ) -> list[Array]:
        """Write into the arrays, or into new ones, and return them."""
        coded, exact = self._open(payload, start, stop)
        if arrays is None:
            arrays = [
                np.empty(shape, dtypes.BY_ID[dtype].host) for _, dtype, shape in self._tensors
            ]
        flat = [_flat(a, dtype) for a, (_, dtype, _) in zip(arrays, self._tensors, strict=True)]
        for i, positions, values in (piece for pieces, _ in coded for piece in pieces):
            if positions is None:
                flat[i][...] = values
            else:
                flat[i].fill(0)
                flat[i][positions] = values
        for i, elements in exact.items():
            flat[i][...] = elements.view(np.uint8)
        return arrays

    def accumulate(
        self,
        payload: Buffer,
        start: int,
        stop: int,
        accumulators: Sequence[Array],
        weight: float,
        bounds: tuple[float, float],
        dry: bool = False,
        ledger: list[tuple[float, float]] | None = None,
    ) -> tuple[float, float]:
        """Add `weight` times the decoded body to the accumulators.

        `bounds` are what the magnitudes in float32 and in float64 accumulators cannot exceed so far; the result is the
        same after this call. Tensors that are no floats go to float64 accumulators, which they cannot overflow, and are
        not counted. `dry` adds nothing. The result is also put at the end of `ledger` once all is added, where the
        caller finds it if the handler of a signal raises before this returns.
        """
        tensors, ops = self._tensors, self._ops
        coded, exact = self._open(payload, start, stop)
        largest = [found for part in coded for found in _largest(part, tensors, accumulators, ops)]
        after = []
        for name, bound in zip(("float32", "float64"), bounds, strict=True):
            kind = np.dtype(name).type
            most = max((magnitude for dtype, magnitude in largest if dtype == kind), default=0.0)
            # In the arithmetic of the sums themselves: rounding keeps order, so a bound stays one.
            with np.errstate(over="ignore", invalid="ignore"):
                after.append(float(kind(bound) + kind(abs(weight)) * kind(most)))
            if not math.isfinite(after[-1]):
                raise DecodeError(f"the sum could leave {name}'s range", start)
        if dry:
            return after[0], after[1]
        for i, positions, storage in (piece for pieces, _ in coded for piece in pieces):
            values = _widened(storage, tensors[i][1], ops)
            if values.dtype == np.float64 and accumulators[i].dtype == np.float32:
                values = ops.narrow(values, "float32")
            if positions is None:
                ops.accumulate(accumulators[i], values, weight)
            else:
                ops.accumulate_sparse(accumulators[i], positions, values, weight)
        for i, elements in exact.items():
            ops.accumulate(accumulators[i], elements.astype(np.float64), weight)
        if ledger is not None:
            ledger.append((after[0], after[1]))
        return after[0], after[1]


class _Opened(Decoder):
    def __init__(self, decoder: Decoder, body: _Body) -> None:
        self.__dict__.update(vars(decoder))
        self._body = body

    def _open(self, payload: Buffer, start: int, stop: int) -> _Body:
        return self._body
