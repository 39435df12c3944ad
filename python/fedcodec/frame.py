"""The frame of a payload: everything of constant or small size, checked before any tensor-sized work.

docs/format.md, sections 1 and 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import ops
from .codec import ORDER, Framing, Lossless, RuleTable
from .digests import DIGEST_BYTES
from .errors import DecodeError, SpecMismatch
from .limits import Limits
from .reader import Reader, varint
from .registry import WireStage, wire_reader
from .shared import Shared
from .spec import Spec

MAGIC = b"FC"
VERSION = 1
CHECKSUM_BYTES = 4
_RESIDUAL = 0x40  # refused inside itself before it is read, or hostile bytes could recurse
_BY_REFERENCE, _HAS_BASE = 1, 2
_ONE_PIPELINE, _TABLE, _TABLE_BY_REFERENCE = 0, 4, 8


class WirePipeline(NamedTuple):
    """A pipeline as a decoder sees it."""

    text: str
    coder: tuple[Any, ...]  # of the body coder
    lossless: Lossless | None


class Frame(NamedTuple):
    """The parts of a payload before its body, and where the body is."""

    version: int
    spec: Spec | None  # None by reference
    spec_digest: bytes
    base: bytes | None
    table: memoryview | None  # bytes of the rule table, None by reference
    one_pipeline: bool
    table_digest: bytes | None
    start: int
    stop: int


def header(spec: Spec, table: RuleTable, framing: Framing, base: bytes | None) -> bytes:
    """Return what stands before the body."""
    flags = _HAS_BASE if base is not None else 0
    if len(table.pipelines) == 1:
        pipelines = table.pipelines[0].encoded
    elif framing == "reference":
        flags |= _TABLE_BY_REFERENCE
        pipelines = table.digest
    else:
        flags |= _TABLE
        pipelines = table.encoded
    if framing == "reference":
        flags |= _BY_REFERENCE
        described = spec.digest
    else:
        described = varint(len(spec.encoded)) + spec.encoded
    return MAGIC + bytes([VERSION, flags]) + described + (base or b"") + pipelines


def open_frame(payload: memoryview, *, max_tensors: int, like: Spec | None = None) -> Frame:
    """Read the frame; the checksum is `verify`'s matter. A spec that is `like` is not read again."""
    require_magic(payload)
    reader = Reader(payload, len(MAGIC), max(len(MAGIC), len(payload) - CHECKSUM_BYTES))
    version, flags = reader.byte(), reader.byte()
    if version != VERSION:
        raise DecodeError(f"version {version} of the format, this library reads {VERSION}", 2)
    kind = flags & ~(_BY_REFERENCE | _HAS_BASE)
    if kind not in (_ONE_PIPELINE, _TABLE, _TABLE_BY_REFERENCE):
        raise DecodeError(f"unknown flags {flags:#04x}", 3)
    spec: Spec | None = None
    if flags & _BY_REFERENCE:
        spec_digest = bytes(reader.take(DIGEST_BYTES))
    else:
        spec = _read_spec(reader, like, max_tensors)
        spec_digest = spec.digest
    base = bytes(reader.take(DIGEST_BYTES)) if flags & _HAS_BASE else None
    table_digest = bytes(reader.take(DIGEST_BYTES)) if kind == _TABLE_BY_REFERENCE else None
    stop = len(payload) - CHECKSUM_BYTES
    return Frame(
        version,
        spec,
        spec_digest,
        base,
        payload if table_digest is None else None,
        kind == _ONE_PIPELINE,
        table_digest,
        reader.offset,
        stop,
    )


def require_magic(payload: memoryview) -> None:
    """Raise unless it begins as payloads do, however short it is."""
    if payload[: len(MAGIC)] != MAGIC:
        raise DecodeError("not a fedcodec payload: it does not begin with 'FC'", 0)


# Of what strangers sent too, so few and small: reading one takes longer than the values of a small update.
_specs: dict[bytes, Spec] = {}
_MOST_SPECS = 8
_MOST_ENCODED = 1 << 16
_MOST_TENSORS = 1 << 10


def _read_spec(reader: Reader, like: Spec | None, max_tensors: int) -> Spec:
    size = reader.varint()
    start = reader.offset
    encoded = bytes(reader.take(size))
    if like is not None and encoded == like.encoded:
        return like
    spec = _specs.get(encoded)
    if spec is None or len(spec.tensors) > max_tensors:
        spec = Spec.read(Reader(reader.payload, start, reader.offset), max_tensors=max_tensors)
        if len(encoded) <= _MOST_ENCODED and len(spec.tensors) <= _MOST_TENSORS:
            if len(_specs) >= _MOST_SPECS:
                _specs.clear()
            _specs[encoded] = spec
    return spec


def verify(payload: memoryview) -> None:
    """Raise unless it is a payload whose checksum is right."""
    require_magic(payload)
    stop = len(payload) - CHECKSUM_BYTES
    if stop < 0:
        raise DecodeError(f"a payload of {len(payload)} bytes is too short", 0)
    found, stated = ops.backend().crc32(payload[:stop], 0), int.from_bytes(payload[stop:], "little")
    if found != stated:
        raise DecodeError(f"the checksum is {found:08x}, the payload states {stated:08x}", stop)


def read_table(
    frame: Frame, count: int | None, shared: Shared | None
) -> tuple[list[WirePipeline], list[int], int]:
    """Return the pipelines, which of them codes each of `count` tensors, and where the body starts.

    Without a count only the pipelines are read.
    """
    if frame.table is None:
        assert frame.table_digest is not None
        reader = Reader(_look_up(shared, frame.table_digest, "rules"))
    else:
        reader = Reader(frame.table, frame.start, frame.stop)
    if frame.one_pipeline:
        return [read_pipeline(reader)], [0] * (count or 0), reader.offset
    number = reader.varint()
    if number == 0:
        raise DecodeError("a rule table without pipelines", reader.offset)
    most = Limits().max_tensors if count is None else count
    if number > max(1, most):
        raise DecodeError(f"{number} pipelines for {most} tensors", reader.offset)
    pipelines = [read_pipeline(reader) for _ in range(number)]
    assignment = [0] * (count or 0)
    if number > 1 and count is not None:
        assignment = [reader.varint() for _ in range(count)]
        if max(assignment) >= number:
            raise DecodeError(f"a tensor has a pipeline beyond the {number}", reader.offset)
        if len(set(assignment)) < number:
            raise DecodeError("a pipeline codes no tensor", reader.offset)
    if frame.table is None:
        reader.end()
        return pipelines, assignment, frame.start
    return pipelines, assignment, reader.offset


# Of our own stages, which are the same in payload after payload, by their few bytes.
_known: dict[bytes, WirePipeline] = {}
_MOST_KNOWN = 64
_MOST_BYTES = 32


def read_pipeline(reader: Reader, *, inside: bool = False) -> WirePipeline:
    """Read one pipeline; `inside` a residual there is no lossless stage and no other residual."""
    key = _select_and_quantize(bytes(reader.rest()[:_MOST_BYTES]))
    if key is None:
        return _read_pipeline(reader, inside=inside)
    found = _known.get(key)
    if found is not None:
        reader.take(len(key))
        return found
    found = _read_pipeline(reader, inside=inside)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = found
    return found


def _select_and_quantize(head: bytes) -> bytes | None:
    """Return the bytes of a pipeline of such stages alone, of ours, at the beginning of `head`."""
    end = 1
    for _ in range(head[0] if head else 0):
        if end + 1 >= len(head) or head[end] >= _RESIDUAL:
            return None
        end += 2 + head[end + 1]
    return head[:end] if end <= len(head) else None


def _read_pipeline(reader: Reader, *, inside: bool) -> WirePipeline:
    stages: list[WireStage] = []
    for _ in range(reader.varint()):
        wire_id = reader.byte()
        parameters = reader.part(reader.varint())
        if inside and wire_id == _RESIDUAL:
            raise DecodeError("a residual inside a residual", reader.offset)
        read = wire_reader(wire_id)
        if read is None:
            raise DecodeError(
                f"unknown stage {wire_id:#04x}; is its codec registered?", reader.offset
            )
        stage = read(parameters)
        parameters.end()
        if stages and ORDER.index(stage.kind) <= ORDER.index(stages[-1].kind):
            raise DecodeError(f"{stages[-1].text} stands before {stage.text}", reader.offset)
        stages.append(stage)
    found = {stage.kind: stage.coder for stage in stages}
    if "sum" in found and found.keys() - {"sum", "lossless"}:
        raise DecodeError("a residual stands beside a stage that is not lossless", reader.offset)
    if inside and "lossless" in found:
        raise DecodeError("a lossless stage inside a residual", reader.offset)
    select, quantize = found.get("select"), found.get("quantize")
    by_channel = quantize is not None and quantize[0] == "integer" and quantize[2] == "channel"
    if select is not None and by_channel:
        raise DecodeError("scales per channel after a select stage", reader.offset)
    text = " | ".join(stage.text for stage in stages) or "raw"
    coder = found.get("sum") or ("coder", select, quantize)
    if "transform" in found:
        coder = ("transform", found["transform"], coder)
    return WirePipeline(text, coder, found.get("lossless"))


def settle_spec(frame: Frame, like: Spec | None, limits: Limits) -> Spec:
    """Return the spec of a payload: its own within the limits, or the expected one that it matches."""
    if like is None:
        if frame.spec is None:
            raise DecodeError(
                f"the payload names the spec {frame.spec_digest.hex()} by reference: pass like="
            )
        if frame.spec.nbytes > limits.max_bytes:
            raise DecodeError(
                f"the update takes {frame.spec.nbytes} bytes, the limit is {limits.max_bytes}"
            )
        return frame.spec
    if frame.spec is not None:
        frame.spec.require(like)
    elif frame.spec_digest != like.digest:
        raise SpecMismatch(
            f"the payload's spec is {frame.spec_digest.hex()}, the expected one {like.digest.hex()}"
        )
    return like


def resolve(coder: tuple[Any, ...], shared: Shared | None) -> tuple[Any, ...]:
    """Replace the digests of masks and decoders by what they name."""
    if coder[0] == "residual":
        return (coder[0], *(resolve(inner, shared) for inner in coder[1:]))
    if coder[0] == "transform":
        decoder = _look_up(shared, coder[1], "decoder")
        return coder[0], decoder, resolve(coder[2], shared)
    _, select, quantize = coder
    if select is not None and select[0] == "mask":
        mask = _look_up(shared, select[1], "mask")
        select = ("mask", mask.bits, mask.n)
    return "coder", select, quantize


def require_base(frame: Frame, shared: Shared | None) -> None:
    """Raise unless the base that a payload names is held."""
    if frame.base is not None:
        _look_up(shared, frame.base, "base")


def _look_up(shared: Shared | None, key: bytes, kind: str) -> Any:
    if shared is None:
        raise DecodeError(f"the payload names the {kind} {key.hex()}: pass shared=")
    return shared.get(key, kind)
