"""One call per direction: compile to a plan, run it in one native call, seal or check the frame.

Four hops down, none back up: this file, then body.cc (or its twin body.py), then kernels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from . import arrays, body, dtypes, frame, gpu, ops
from .arrays import Storage
from .codec import (
    Codec,
    Draws,
    Framing,
    Lossless,
    Pipeline,
    Quantize,
    RuleTable,
    Select,
    Stage,
    Transform,
)
from .codecs.raw import Raw
from .codecs.residual import Residual
from .digests import DIGEST_BYTES, is_digest
from .errors import DecodeError, NonFiniteError
from .limits import Limits
from .reader import Reader, varint
from .shared import Shared
from .spec import Spec, TensorSpec

_T = TypeVar("_T")
# Values to be filled with the sum of an update and a residual, and those two.
Compensated = tuple[Any, Any, Any]
Segment = tuple[Sequence[int], tuple[Any, ...]]

_FRAMINGS: tuple[Framing, ...] = ("inline", "reference")
_FLOATS = {dtype.id for dtype in dtypes.BY_ID.values() if dtype.is_float}
_LIMITS = Limits()
_RAW = Raw()
# Where a segment's stochastic rounding starts to count (docs/numerics.md, section 5).
_DRAWS_PER_SEGMENT = 1 << 40


def encode(
    codec: Codec,
    spec: Spec,
    storage: Sequence[Storage | Compensated],
    *,
    framing: Framing,
    base: bytes | None,
    seed: int | None,
) -> bytes:
    """Encode storage arrays; values to be filled are of float32 (float64 for float64 tensors).

    Where the codec would make a payload larger than the update, the values travel as they are.
    """
    if framing not in _FRAMINGS:
        raise ValueError(f"framing is {framing!r}, it must be 'inline' or 'reference'")
    if base is not None and not is_digest(base):
        raise ValueError(f"base must be {DIGEST_BYTES} bytes: fedcodec.digest(model)")
    call_seed = operator.index(0 if seed is None else seed)
    if not 0 <= call_seed < 1 << 64:
        raise ValueError(f"seed is {seed}, it must be from 0 to 2^64 - 1")
    backend = gpu.backend_of(storage)
    try:
        return _encode(codec, spec, storage, backend, framing, base, call_seed)
    except _errors(backend, "Refused"):

        def on_host(copies: list[Any]) -> bytes:
            return encode(codec, spec, copies, framing=framing, base=base, seed=seed)

        return gpu.by_host(storage, on_host, filled=False)


def _encode(
    codec: Codec,
    spec: Spec,
    storage: Sequence[Storage | Compensated],
    backend: ModuleType,
    framing: Framing,
    base: bytes | None,
    seed: int,
) -> bytes:
    plan = _plan(codec, spec, backend)
    head = plan.heads[framing] if base is None else frame.header(spec, plan.table, framing, base)
    encoders = plan.encoders or _encoders(plan, Draws(seed), backend)
    lossless = plan.lossless
    if not any(lossless) and len(encoders) == 1:
        whole = _encoded(encoders[0], backend, spec.untied, head, storage, True, 0)
        if len(whole) - len(head) <= _largest_body(spec):
            return whole
        return _encode(_RAW, spec, storage, backend, framing, base, seed)
    parts = []
    for number, (mine, encoder) in enumerate(zip(plan.tensors, encoders, strict=True)):
        tensors, arrays = [spec.untied[i] for i in mine], [storage[i] for i in mine]
        first = number * _DRAWS_PER_SEGMENT
        parts.append(_encoded(encoder, backend, tensors, b"", arrays, False, first))
    if any(lossless):
        lengths = zip(parts, plan.tensors, strict=True)
        if any(len(part) > _longest(spec, mine) for part, mine in lengths):
            return _encode(_RAW, spec, storage, backend, framing, base, seed)
        parts = [_packed(part, stage) for part, stage in zip(parts, lossless, strict=True)]
    if sum(map(len, parts)) > _largest_body(spec):
        return _encode(_RAW, spec, storage, backend, framing, base, seed)
    payload = b"".join([head, *parts])
    return payload + ops.crc32(payload).to_bytes(frame.CHECKSUM_BYTES, "little")


def _encoded(
    encoder: Any, backend: ModuleType, tensors: Sequence[TensorSpec], *arguments: Any
) -> bytes:
    try:
        encoded: bytes = encoder.encode(*arguments)
    except _errors(backend, "NonFinite", body.NonFinite) as error:
        raise _non_finite(error, tensors) from None
    return encoded


def _largest_body(spec: Spec) -> int:
    # The header by reference has the other half of the 64 bytes that a payload may have over its update.
    return spec.nbytes + spec.nbytes // 1000 + 32


def _longest(spec: Spec, tensors: Sequence[int]) -> int:
    """Return how many plain bytes a packed segment may have (docs/format.md, section 3)."""
    return 2 * sum(spec.untied[index].nbytes for index in tensors) + 64 * (len(tensors) + 1)


class Decoded(NamedTuple):
    """What `prepare` found: enough to write, add or check without another look at the frame."""

    spec: Spec
    base: bytes | None
    jobs: list[_Job]


class _Job(NamedTuple):
    """One stretch of plain bytes, and what decodes it."""

    source: Any
    start: int
    stop: int
    decoder: Any
    backend: ModuleType
    indices: Sequence[int] | None  # of the decoder's tensors; None for all

    def own(self, of_tensors: Sequence[_T]) -> Sequence[_T]:
        """Return what belongs to the tensors of this stretch."""
        return of_tensors if self.indices is None else [of_tensors[i] for i in self.indices]

    def run(self, name: str, *arguments: Any) -> Any:
        """Call a method of the decoder."""
        try:
            return getattr(self.decoder, name)(self.source, self.start, self.stop, *arguments)
        except _errors(self.backend, "Malformed") as error:
            raise DecodeError(*error.args) from None
        except MemoryError:
            raise DecodeError("the payload needs more memory than there is") from None

    def opened(self) -> _Job:
        """Return a job that need not read its bytes again where that could end otherwise."""
        return (
            self._replace(decoder=self.run("opened")) if hasattr(self.decoder, "opened") else self
        )

    def run_checked(self, name: str, arrays: Sequence[Any], *options: Any, begun: bool) -> None:
        """Call it for bytes that are known to be valid, of which some stretches may be written already.

        Then only a GPU's memory can be too small, and the CPU goes on: nothing is left half done.
        """
        try:
            self.run(name, arrays, *options)
        except DecodeError:
            if not begun or not hasattr(self.decoder, f"{name}_on_host"):
                raise

            def on_host(copies: list[Any]) -> None:
                self.run(f"{name}_on_host", copies, *options)

            gpu.by_host(arrays, on_host, filled=True)


def prepare(
    payload: Any,
    *,
    like: Spec | None,
    limits: Limits | None = None,
    shared: Shared | None = None,
    trust_base: bool = False,
    backend: ModuleType | None = None,
) -> Decoded:
    """Check all of a payload but the inside of its body; `backend` is that of the arrays that it is for."""
    backend = backend or ops.backend()
    view = _bytes(payload)
    frame.verify(view)
    stop = len(view) - frame.CHECKSUM_BYTES
    limits = limits or _LIMITS
    known = _headers.get((id(like), backend))
    if (
        known is not None
        and bytes(view[: min(stop, len(known.encoded))]) == known.encoded
        and (like is not None or _within(known.spec, limits))
    ):
        job = _Job(view, len(known.encoded), stop, known.decoder, backend, None)
        return Decoded(known.spec, None, [job])
    most = limits.max_tensors if like is None else max(limits.max_tensors, len(like.tensors))
    opened = frame.open_frame(view, max_tensors=most, like=like)
    spec = frame.settle_spec(opened, like, limits)
    if not trust_base:
        frame.require_base(opened, shared)
    pipelines, assignment, start = frame.read_table(opened, len(spec.untied), shared)
    coders = [frame.resolve(pipeline.coder, shared) for pipeline in pipelines]
    terms = [
        term for coder in coders for term in (coder[1:] if coder[0] == "residual" else [coder])
    ]
    decoders = sum(term[0] == "transform" for term in terms)
    if decoders > limits.max_decoders:
        raise DecodeError(
            f"the payload names decoders {decoders} times, the limit is {limits.max_decoders}"
        )
    segments = list(zip(_dealt(assignment, len(pipelines)), coders, strict=True))
    if like is None:
        _limit_work(spec, segments, limits)
    if not any(pipeline.lossless for pipeline in pipelines):
        decoder = _body_coder("Decoder", spec.dtype_ids, spec.shapes, segments, backend)
        by_itself = opened.base is None and opened.table is not None and _builtin(coders)
        small = start <= _MOST_HEADER and len(spec.tensors) <= _MOST_TENSORS
        if by_itself and small:
            if len(_headers) >= _MOST_PLANS:
                _headers.clear()
            header = _Header(like, spec, bytes(view[:start]), decoder)
            _headers[id(like), backend] = header
        job = _Job(view, start, opened.stop, decoder, backend, None)
        return Decoded(spec, opened.base, [job])
    reader = Reader(view, start, opened.stop)
    jobs = [
        _unpacked(reader, segment, pipeline.lossless, spec, backend)
        for segment, pipeline in zip(segments, pipelines, strict=True)
    ]
    reader.end()
    return Decoded(spec, opened.base, jobs)


def _within(spec: Spec, limits: Limits) -> bool:
    return spec.nbytes <= limits.max_bytes and len(spec.tensors) <= limits.max_tensors


def _limit_work(spec: Spec, segments: Sequence[Segment], limits: Limits) -> None:
    """Count the two terms of residuals and what a transform returns, which are whole before they are written."""
    indirect = [index for own, coder in segments if coder[0] != "coder" for index in own]
    work = sum(
        2 * max(4, spec.untied[i].nbytes // max(1, spec.sizes[i])) * spec.sizes[i] for i in indirect
    )
    if spec.nbytes + work > limits.max_bytes:
        raise DecodeError(
            f"decoding takes {spec.nbytes + work} bytes, the limit is {limits.max_bytes}"
        )


class _Header(NamedTuple):
    """The bytes before a body, and what they say to someone who expects the spec, or none."""

    like: Spec | None  # held, for nothing else has its identity then
    spec: Spec
    encoded: bytes
    decoder: Any


# The last of each spec that is expected, by its identity; senders change little between rounds.
_headers: dict[tuple[int, ModuleType], _Header] = {}
_MOST_HEADER = 1 << 18  # bytes
_MOST_TENSORS = 1 << 12


def _builtin(coders: Sequence[tuple[Any, ...]]) -> bool:
    # A mask comes from `shared`, a third party's quantizer from its own code: neither is the header's alone.
    return all(
        coder[0] == "coder" and (coder[1] or ("",))[0] != "mask" and not _in_python(coder)
        for coder in coders
    )


def decode_into(decoded: Decoded, storage: Sequence[Storage]) -> None:
    """Write the values of a prepared payload into arrays, or raise `DecodeError` and write none."""
    decoded = _opened(decoded)
    if len(decoded.jobs) > 1:
        check(decoded)
    for number, job in enumerate(decoded.jobs):
        job.run_checked("decode", job.own(storage), begun=number > 0)


def decode_new(decoded: Decoded) -> list[Storage]:
    """Return the values of a prepared payload in new arrays, bfloat16 as float16."""
    found: dict[int, Storage] = {}
    for job in decoded.jobs:
        arrays: list[Storage] = job.run("decode")
        if job.indices is None:
            return arrays
        found.update(zip(job.indices, arrays, strict=True))
    return [found[i] for i in range(len(decoded.spec.untied))]


def _opened(decoded: Decoded) -> Decoded:
    if len(decoded.jobs) == 1:
        return decoded
    return decoded._replace(jobs=[job.opened() for job in decoded.jobs])


def check(decoded: Decoded) -> None:
    """Check the body wholly."""
    for job in decoded.jobs:
        job.run("check")


def accumulate(
    decoded: Decoded,
    accumulators: Sequence[Storage],
    weight: float,
    bounds: tuple[float, float],
    ledger: list[tuple[float, float]],
) -> None:
    """Add weight * values, or raise `DecodeError` and add nothing.

    `bounds` are what the magnitudes in float32 and in float64 sums cannot exceed. If anything is in `ledger` then, all
    was added, and its bounds hold for some of the sums each, even if the handler of a signal raised.
    """

    def add(job: _Job, *options: Any) -> None:
        job.run("accumulate", job.own(accumulators), weight, bounds, *options)

    def add_checked(job: _Job) -> None:
        options = weight, bounds, False, ledger
        job.run_checked("accumulate", job.own(accumulators), *options, begun=bool(ledger))

    decoded = _opened(decoded)
    if len(decoded.jobs) > 1:
        for job in decoded.jobs:
            add(job, True)
    try:
        for job in decoded.jobs:
            add_checked(job)
    except BaseException:
        for job in decoded.jobs[len(ledger) :] if ledger else ():
            add_checked(job)
        raise


def decode(
    payload: Any,
    *,
    like: Any = None,
    out: Any = None,
    framework: str | None = None,
    device: str | None = None,
    limits: Limits | None = None,
    shared: Shared | None = None,
) -> Any:
    """Restore the update of a payload.

    Parameters
    ----------
    payload : bytes, bytearray, memoryview or uint8 array
        What `Codec.encode` returned, or anything a stranger sent instead.
    like : update or Spec, optional
        What the payload must match; it names the tensors of a payload framed by reference.
    out : update, optional
        Writable, contiguous NumPy, torch or CuPy arrays to fill, apart from each other unless tied; returned. Untouched
        if decoding fails.
    framework : {"numpy", "torch", "jax", "cupy"}, optional
        Of the result: by default that of `out`, else of `like`, else "numpy", or on a GPU torch where it is imported,
        else CuPy. bfloat16 becomes `ml_dtypes.bfloat16` in NumPy where that can be imported, else exact float32.
    device : str, optional
        Where the result lives: "cpu", "cuda" or "cuda:1". By default where `out` is, else on the CPU.
    limits : Limits, optional
        What may be computed on the payload's word and, where neither `like` nor `out` is given, allocated.
    shared : Shared, optional
        Masks, bases, rule tables and decoders that the payload names by digest.

    Returns
    -------
    dict of str to array, list of arrays, or array
        Same structure, names, shapes and dtypes as were encoded. A payload that names a base gives the delta.

    Raises
    ------
    DecodeError
        If the bytes are not a valid payload; `SpecMismatch`, a kind of it, if they do not match `like` or `out`.
    BackendError
        If the device is not there, or the framework cannot be imported.
    TypeError, ValueError
        If an argument is not as above.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> payload = fc.Int8().encode([np.array([3, -127], np.float32)], framing="reference")
    >>> fc.decode(payload, like=[np.zeros(2, np.float32)])
    [array([   3., -127.], dtype=float32)]
    """
    number = arrays.device_number(device)
    require("limits", limits, Limits)
    require("shared", shared, Shared)
    if framework is not None:
        arrays.require_framework(framework)
    target = None if out is None else arrays.writable(out, _bytes(payload))
    expected, source = None, "numpy"
    if like is not None:
        expected, source = _spec_of(like)
    if target is not None:
        if expected is not None and target.spec != expected:
            raise ValueError("out and like differ")
        expected, source = target.spec, target.framework
    backend = ops.backend() if number is None else ops.cuda_backend()
    if target is not None:
        if device is not None and target.storage and target.device != number:
            raise ValueError(f"out is not on device {device!r}")
        backend = gpu.backend_of(target.storage)
    decoded = prepare(payload, like=expected, limits=limits, shared=shared, backend=backend)
    if target is not None:
        decode_into(decoded, target.storage)
        return out
    if number is not None:
        try:
            values, fresh = arrays.empty_on_gpu(decoded.spec, framework, source, number)
        except MemoryError as error:
            raise DecodeError(str(error)) from None
        decode_into(decoded, fresh)
        return arrays.tied(decoded.spec, values)
    return arrays.build(
        decoded.spec, decode_new(decoded), framework or arrays.host_framework(source)
    )


@dataclass(frozen=True)
class PayloadInfo:
    """What the header of a payload says; the body and the checksum are not looked at.

    Attributes
    ----------
    version : int
    framing : {"inline", "reference"}
    spec : Spec or None
        None by reference.
    spec_digest, base, table_digest : bytes or None
        Digests; `table_digest` only where a rule table is named by it.
    codec : str or None
        Text of the pipelines as the decoder sees them, one a line; None where the table is named by digest.
    nbytes, body_nbytes : int
        Size of the payload and of its body. Without the spec the table's assignment, a byte or more a tensor, counts as
        body.
    """

    version: int
    framing: Framing
    spec: Spec | None
    spec_digest: bytes
    base: bytes | None
    table_digest: bytes | None
    codec: str | None
    nbytes: int
    body_nbytes: int


def inspect(payload: Any, *, limits: Limits | None = None) -> PayloadInfo:
    """Read the header of a payload only.

    Parameters
    ----------
    payload : bytes, bytearray, memoryview or uint8 array
    limits : Limits, optional
        Of which `max_tensors` counts: no values are decoded.

    Returns
    -------
    PayloadInfo

    Raises
    ------
    DecodeError
        If it is not a payload's header, or names more tensors than the limit.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> info = fc.inspect(fc.parse("topk(0.5) | int8").encode(np.ones(4, np.float32)))
    >>> info.codec, info.framing
    ('sparse | int8(block_size=1024)', 'inline')
    """
    view = _bytes(payload)
    opened = frame.open_frame(view, max_tensors=(limits or Limits()).max_tensors)
    text, start = None, opened.start
    if opened.table is not None:
        count = None if opened.spec is None else len(opened.spec.untied)
        pipelines, _, start = frame.read_table(opened, count, None)
        text = "\n".join(pipeline.text for pipeline in pipelines)
    return PayloadInfo(
        opened.version,
        "reference" if opened.spec is None else "inline",
        opened.spec,
        opened.spec_digest,
        opened.base,
        opened.table_digest,
        text,
        len(view),
        opened.stop - start,
    )


class _Plan(NamedTuple):
    """What a codec makes of a spec in every call."""

    codec: Codec
    spec: Spec
    table: RuleTable
    tensors: list[list[int]]  # of each pipeline
    lossless: list[Stage | None]
    heads: dict[Framing, bytes]  # of payloads without a base
    encoders: list[Any] | None  # of each pipeline; None where they depend on the seed of the call


# By identity, for equal codecs need not be the same; while a plan holds both, nothing else has their ids.
_plans: dict[tuple[int, int, ModuleType], _Plan] = {}
_MOST_PLANS = 16


def _plan(codec: Codec, spec: Spec, backend: ModuleType) -> _Plan:
    key = id(codec), id(spec), backend
    plan = _plans.get(key)
    if plan is None:
        table = codec.table(spec)
        tensors = _dealt(table.assignment, len(table.pipelines))
        lossless = [pipeline.find("lossless") for pipeline in table.pipelines]
        heads = {framing: frame.header(spec, table, framing, None) for framing in _FRAMINGS}
        draws = Draws(0)
        plan = _Plan(codec, spec, table, tensors, lossless, heads, None)
        encoders = _encoders(plan, draws, backend)
        if not draws.asked:
            plan = plan._replace(encoders=encoders)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _encoders(plan: _Plan, draws: Draws, backend: ModuleType) -> list[Any]:
    encoders = []
    for pipeline, mine in zip(plan.table.pipelines, plan.tensors, strict=True):
        sizes = [plan.spec.sizes[i] for i in mine if plan.spec.dtype_ids[i] in _FLOATS]
        segment = mine, _coder(pipeline, sizes, draws)
        encoders.append(_segment_coder("Encoder", plan.spec, segment, backend))
    return encoders


def _dealt(assignment: Sequence[int], number: int) -> list[list[int]]:
    """Return the tensors of each pipeline."""
    if number == 1:
        return [list(range(len(assignment)))]
    indices: list[list[int]] = [[] for _ in range(number)]
    for index, pipeline in enumerate(assignment):
        indices[pipeline].append(index)
    return indices


def _coder(pipeline: Pipeline, sizes: list[int], draws: Draws) -> tuple[Any, ...]:
    """Describe a pipeline to the body coder, given the sizes of its float tensors."""
    whole = pipeline.find("sum")
    if isinstance(whole, Residual):
        return ("residual", *(_coder(part, sizes, draws) for part in whole.parts))
    transform = pipeline.find("transform")
    select, quantize = pipeline.find("select"), pipeline.find("quantize")
    groups = [transform.outputs] if isinstance(transform, Transform) else sizes
    if isinstance(select, Select) and not select.by_tensor:
        groups = [sum(groups)] if groups else []
    coder = (
        "coder",
        select.coder(groups, draws) if isinstance(select, Select) else None,
        quantize.coder(draws) if isinstance(quantize, Quantize) else None,
    )
    return coder if transform is None else ("transform", transform, coder)


def _body_coder(
    name: str,
    ids: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    segments: Sequence[Segment],
    backend: ModuleType,
) -> Any:
    """Make a native body coder, or its Python twin where a stage or the whole backend is Python."""
    host = ops.backend()
    if backend is not host:
        sizes = [math.prod(shape) for shape in shapes]
        if not any(_is_for_cpu(sizes, *segment) for segment in segments):
            return getattr(backend.body, name)(ids, shapes, segments)
        if name == "Encoder":
            raise backend.Refused
        return gpu.HostDecoder(_body_coder(name, ids, shapes, segments, host))
    native = getattr(host, "body", None)
    if native is None or any(_in_python(coder) for _, coder in segments):
        return getattr(body, name)(ids, shapes, segments, ops=host)
    return getattr(native, name)(ids, shapes, segments)


def _is_for_cpu(sizes: Sequence[int], mine: Sequence[int], coder: tuple[Any, ...]) -> bool:
    """Tell what no GPU does: stages in Python, channels, and selection and mean magnitudes of 2^32 values or more."""
    if coder[0] == "residual":
        return any(_is_for_cpu(sizes, mine, term) for term in coder[1:])
    if _in_python(coder):
        return True
    _, select, quantize = coder
    counts = select is not None or (quantize is not None and quantize[0] == "sign")
    structured = select is not None and select[0] == "structured"
    return structured or (counts and sum(sizes[i] for i in mine) >> 32 > 0)


def _segment_coder(name: str, spec: Spec, segment: Segment, backend: ModuleType) -> Any:
    """Make the coder of one segment by itself, or the work would grow with segments times tensors."""
    mine, coder = segment
    ids, shapes = [spec.dtype_ids[i] for i in mine], [spec.shapes[i] for i in mine]
    return _body_coder(name, ids, shapes, [(range(len(mine)), coder)], backend)


def _in_python(coder: tuple[Any, ...]) -> bool:
    if coder[0] == "residual":
        return any(_in_python(inner) for inner in coder[1:])
    if coder[0] == "transform":
        return True
    return coder[2] is not None and coder[2][0] == "python"


def _errors(
    backend: ModuleType, name: str, *errors: type[Exception]
) -> tuple[type[Exception], ...]:
    """Return an exception of the body coders that a backend may use, where there is one, beside others."""
    bodies = (getattr(module, "body", None) for module in (backend, ops.backend()))
    found = [getattr(coders, name) for coders in bodies if hasattr(coders, name)]
    return (*errors, *found)


def _packed(plain: bytes, stage: Any) -> bytes:
    packed = stage.compress(plain) if stage is not None else plain
    if stage is None or not 0 < len(packed) < len(plain):
        return varint(len(plain)) + varint(0) + plain
    return varint(len(plain)) + varint(len(packed)) + packed


def _unpacked(
    reader: Reader,
    segment: Segment,
    lossless: Lossless | None,
    spec: Spec,
    backend: ModuleType,
) -> _Job:
    plain_size, packed_size = reader.varint(), reader.varint()
    if plain_size > _longest(spec, segment[0]):
        raise DecodeError(f"a segment of {plain_size} bytes is too long", reader.offset)
    start = reader.offset
    decoder = _segment_coder("Decoder", spec, segment, backend)
    if packed_size == 0:
        source: Any = reader.take(plain_size)
        return _Job(source, 0, plain_size, decoder, backend, segment[0])
    if plain_size == 0:
        raise DecodeError("an empty segment is packed", start)
    if lossless is None:
        raise DecodeError("a segment without lossless stage is packed", reader.offset)
    packed = bytes(reader.take(packed_size))
    try:
        source = lossless.decompress(packed, plain_size)
    except Exception as error:
        raise DecodeError(f"{lossless}: {error}", start) from error
    if not isinstance(source, bytes) or len(source) != plain_size:
        raise DecodeError(f"{lossless}: not the declared {plain_size} bytes", start)
    return _Job(source, 0, plain_size, decoder, backend, segment[0])


def require(name: str, value: object, kind: type) -> None:
    """Refuse an optional argument of another type."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, it must be a {kind.__name__}")


def _bytes(payload: Any) -> memoryview:
    try:
        return memoryview(payload).cast("B")
    except (TypeError, ValueError):
        raise TypeError(f"a payload is contiguous bytes, not {type(payload).__name__}") from None


def _spec_of(like: Any) -> tuple[Spec, str]:
    if isinstance(like, Spec):
        return like, "numpy"
    return arrays.spec_of(like)


def _non_finite(error: Exception, tensors: Sequence[TensorSpec]) -> NonFiniteError:
    tensor_index, element, value, narrow = error.args[:4]
    name = tensors[tensor_index].name
    place = f"tensor {name!r}, element {element}, is {value}"
    if narrow:
        place += f", beyond the largest {dtypes.BY_ID[narrow].name}"
    return NonFiniteError(place, name)
