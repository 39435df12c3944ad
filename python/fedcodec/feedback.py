"""Error feedback: what a lossy codec did not send is added to the next update."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from . import arrays, dtypes, gpu, pipeline
from .arrays import Storage
from .codec import Codec, Framing
from .errors import DecodeError, NonFiniteError
from .limits import Limits
from .shared import Shared
from .spec import Spec, TensorSpec
from .state import Locked, State, as_array, locked
from .text import parse

_STATE_VERSION = 1
_OWN = Limits(max_decoders=sys.maxsize)  # nobody has to be kept from what is one's own

# One array for each float tensor, None for an integer or bool tensor; where the updates are, once one was encoded.
Floats = list[Any]


class _Pending(NamedTuple):
    compensated: Floats  # what was encoded: the update + the residual
    payload: bytes


class ErrorFeedback(Locked):
    """An encoder that keeps what was not sent, and sends it later.

    With c = float32(update) + residual (float64 for float64 tensors, rounded once) and decoded = what `decode` returns,
    `accept` makes the residual fl(c - decoded), bit for bit (where a codec's `determinism` is "none", decoded is what
    `decode` returns on this machine). Nothing is kept before `accept` or `reject` is called, so a payload that was lost
    loses nothing.

    Threads may share one; they take turns. One that encodes while the payload of another is pending gets the
    `RuntimeError` all the same. A process that is forked while another thread is inside must not use its copy: that
    turn never ends there.

    Parameters
    ----------
    codec : Codec or str
        The codec or its text.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> client = fc.ErrorFeedback(fc.TopK(0.5))
    >>> fc.decode(client.encode(np.array([1, 3], np.float32)))
    array([0., 3.], dtype=float32)
    >>> client.accept()
    >>> fc.decode(client.encode(np.array([1, 1], np.float32)))
    array([2., 0.], dtype=float32)
    """

    _written = ("_residual", "_pending")

    def __init__(self, codec: Codec | str) -> None:
        super().__init__()
        self.codec = parse(codec) if isinstance(codec, str) else codec
        if not isinstance(self.codec, Codec):
            raise TypeError(f"codec is {codec!r}, it must be a Codec or its text")
        self.codec.pipelines()  # a stage that cannot stand alone says so
        self.sequence = 0
        self._spec: Spec | None = None
        self._residual: Floats | None = None
        self._pending: _Pending | None = None
        self._spare: Floats | None = None  # written to by the next encode
        self._held: tuple[Spec, Shared] | None = (
            None  # what the codec's payloads of a spec name by digest
        )

    @locked
    def encode(
        self,
        update: Any,
        *,
        framing: Framing = "inline",
        base: bytes | None = None,
        seed: int | None = None,
    ) -> bytes:
        """Encode update + residual, and leave the outcome pending.

        Parameters
        ----------
        update, framing, base
            As for `Codec.encode`.
        seed : int, optional
            As for `Codec.encode`, but by default the sequence number, so that no two rounds draw alike. Pass a hash of
            round and client where clients should not draw alike either.

        Returns
        -------
        bytes

        Raises
        ------
        RuntimeError
            If the last payload was neither accepted nor rejected.
        SpecMismatch
            If names, shapes or dtypes are not those of the updates before.
        NonFiniteError, TypeError, ValueError
            As for `Codec.encode`; the state is as before. Where update + residual leaves its dtype for good, `reset`.
        """
        if self._pending is not None:
            raise RuntimeError("the last payload is pending: call accept() or reject() first")
        read = arrays.read(update)
        if self._spec is not None:
            read.spec.require(self._spec)
        residual = _placed(self._residual, read.device) or _empty(
            read.spec, read.device, zeros=True
        )
        compensated = _placed(self._spare, read.device) or _empty(read.spec, read.device)
        work: list[Storage | pipeline.Compensated] = [
            storage if values is None or kept is None else (values, storage, kept)
            for storage, values, kept in zip(read.storage, compensated, residual, strict=True)
        ]
        try:
            payload = pipeline.encode(
                self.codec,
                read.spec,
                work,
                framing=framing,
                base=base,
                seed=self.sequence if seed is None else seed,
            )
        except NonFiniteError as error:
            if self._residual is None:
                raise
            message = f"{error}: this is update + residual; reset() drops the residual"
            raise NonFiniteError(message, error.tensor) from None
        self._spec, self._spare = read.spec, None
        self._pending = _Pending(compensated, payload)
        self.sequence = (self.sequence + 1) % (1 << 64)  # seeds are of 64 bits
        return payload

    @locked
    def accept(self) -> None:
        """Keep what the pending payload missed as the residual: the receiver has it.

        Raises
        ------
        RuntimeError
            If nothing is pending.
        """
        pending = self._required()
        ledger: list[tuple[float, float]] = []
        try:
            self._subtract_sent(pending, ledger)
        finally:  # whatever a signal's handler raises, what was subtracted is settled
            if ledger:
                self._spare, self._residual = self._residual, pending.compensated
                self._pending = None

    @locked
    def reject(self, *, drop: bool = False) -> None:
        """Keep everything that the pending payload carried as the residual: the receiver does not have it.

        Parameters
        ----------
        drop : bool
            Drop the update instead and restore the residual from before.

        Raises
        ------
        RuntimeError
            If nothing is pending.
        """
        pending = self._required()
        if drop:
            self._spare = pending.compensated
        else:
            self._spare, self._residual = self._residual, pending.compensated
        self._pending = None

    @locked
    def reset(self) -> None:
        """Drop the residual and what is pending; spec and sequence number stay.

        It is the way on where update + residual no longer fits the update's dtype.
        """
        self._residual = self._pending = None

    @property
    def pending(self) -> bool:
        """Whether a payload waits for `accept` or `reject`."""
        return self._pending is not None

    @property
    @locked
    def residual(self) -> Any:
        """The residual as read-only NumPy float32 (float64) arrays in the structure of the update.

        None before the first, and in place of integers and bools.
        """
        if self._spec is None or self._residual is None:
            return None
        shaped, tensors = _shaped(self._residual, self._spec), self._spec.tensors
        owners = [t if t.tied_to is None else tensors[t.tied_to] for t in tensors]
        return arrays.pack(self._spec, [shaped.get(owner.name) for owner in owners])

    @locked
    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: numbers, strings, bytes and read-only NumPy arrays by tensor name.

        `load_state_dict` of another `ErrorFeedback` with the same codec goes on from it, pending payload included. For
        formats that know fewer types it takes tensors for arrays, lists or uint8 arrays for bytes, and 0-d arrays for
        numbers and strings: ``torch.load(..., weights_only=True)`` reads a state whose arrays were made tensors.

        Examples
        --------
        >>> import json, numpy as np, fedcodec as fc
        >>> client = fc.ErrorFeedback("topk(0.5)")
        >>> payload = client.encode(np.array([1, 3], np.float32))
        >>> client.accept()
        >>> plain = client.state_dict()
        >>> plain["spec"] = list(plain["spec"])
        >>> arrays = plain.pop("residual")  # for np.savez(file, **arrays)
        >>> twin = fc.ErrorFeedback("topk(0.5)")
        >>> twin.load_state_dict(json.loads(json.dumps(plain)) | {"residual": arrays})
        >>> twin.residual
        array([1., 0.], dtype=float32)
        """

        def shaped(floats: Floats | None) -> dict[str, Storage] | None:
            return None if floats is None or self._spec is None else _shaped(floats, self._spec)

        return {
            "version": _STATE_VERSION,
            "codec": str(self.codec),
            "sequence": self.sequence,
            "spec": None if self._spec is None else self._spec.encoded,
            "residual": shaped(self._residual),
            "compensated": shaped(self._pending.compensated) if self._pending else None,
            "payload": self._pending.payload if self._pending else None,
        }

    @locked
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises
        ------
        TypeError
            If it is no dict.
        ValueError
            If it is of another version or codec, or no feedback can have come to it; the state is as before.
        """
        found = State(state, {"version": _STATE_VERSION, "codec": str(self.codec)})
        spec, sequence = found.spec(), found.count("sequence")
        residual, compensated = (_flat(found, spec, key) for key in ("residual", "compensated"))
        payload = found.data("payload")
        if (compensated is None) != (payload is None):
            raise ValueError("state: compensated and payload go together")
        pending = None
        if compensated is not None and payload is not None and spec is not None:
            pending = _Pending(compensated, payload)
            try:
                pipeline.check(self._prepared(payload, spec, compensated))
            except DecodeError as error:
                raise ValueError(f"state: payload: {error}") from error
        self.sequence, self._spec, self._residual = sequence, spec, residual
        self._pending, self._spare = pending, None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_spare": None, "_held": None}

    def _prepared(self, payload: bytes, spec: Spec, floats: Floats) -> pipeline.Decoded:
        if self._held is None or self._held[0] is not spec:
            shared = Shared(max_bytes=sys.maxsize)
            self.codec.add_shared(shared)
            shared.add_rules(self.codec, spec)
            self._held = spec, shared
        backend = gpu.backend_of([array for array in floats if array is not None])
        return pipeline.prepare(
            payload,
            like=spec,
            limits=_OWN,
            shared=self._held[1],
            trust_base=True,
            backend=backend,
        )

    def _subtract_sent(self, pending: _Pending, ledger: list[tuple[float, float]]) -> None:
        """Subtract what the payload decodes to from what was encoded, in place."""
        floats = pending.compensated
        decoded = self._prepared(pending.payload, cast(Spec, self._spec), floats)
        device = next((values.device for values in floats if _is_on_gpu(values)), None)
        sums = [
            _new(tensor.size, "float64", device, zeros=True) if values is None else values
            for tensor, values in zip(decoded.spec.untied, floats, strict=True)
        ]
        pipeline.accumulate(decoded, sums, -1.0, (0.0, 0.0), ledger)

    def _required(self) -> _Pending:
        if self._pending is None:
            raise RuntimeError("no payload is pending")
        return self._pending


def _new(size: int, dtype: str, device: int | None, *, zeros: bool = False) -> Any:
    if device is not None:
        return gpu.new(size, dtypes.BY_NAME[dtype].id, device, zeros=zeros)
    return np.zeros(size, dtype) if zeros else np.empty(size, dtype)


def _empty(spec: Spec, device: int | None, *, zeros: bool = False) -> Floats:
    return [
        _new(tensor.size, _work(tensor), device, zeros=zeros)
        if dtypes.BY_NAME[tensor.dtype].is_float
        else None
        for tensor in spec.untied
    ]


def _work(tensor: TensorSpec) -> str:
    return "float64" if tensor.dtype == "float64" else "float32"


def _is_on_gpu(array: Any) -> bool:
    return array is not None and gpu.is_on_gpu(array)


def _placed(floats: Floats | None, device: int | None) -> Floats | None:
    """Copy to where the updates are now what is elsewhere."""
    here = None if floats is None else next((a for a in floats if a is not None), None)
    if here is None or (here.device if gpu.is_on_gpu(here) else None) == device:
        return floats
    placed = []
    for array in floats or ():
        host = gpu.to_host(array) if _is_on_gpu(array) else array
        placed.append(host if host is None or device is None else gpu.moved(host, device))
    return placed


def _shaped(floats: Floats, spec: Spec) -> dict[str, Storage]:
    shaped = {}
    for tensor, array in zip(spec.untied, floats, strict=True):
        if array is not None:
            # A copy: the arrays are written to again.
            host = gpu.to_host(array) if gpu.is_on_gpu(array) else array
            copy = host.reshape(tensor.shape).copy()
            copy.flags.writeable = False
            shaped[tensor.name] = copy
    return shaped


def _flat(state: State, spec: Spec | None, key: str) -> Floats | None:
    arrays_by_name = state[key]
    if arrays_by_name is None:
        return None
    if spec is None or not isinstance(arrays_by_name, Mapping):
        raise ValueError(f"state: {key} is not that of the spec")
    floats: Floats = []
    for tensor in spec.untied:
        if not dtypes.BY_NAME[tensor.dtype].is_float:
            floats.append(None)
            continue
        dtype = _work(tensor)
        array = as_array(arrays_by_name.get(tensor.name), f"{key} of {tensor.name!r}")
        if array.dtype != dtype or array.shape != tensor.shape or not np.isfinite(array).all():
            wanted = f"{tensor.shape} of finite {dtype}"
            raise ValueError(f"state: {key} of {tensor.name!r} is not {wanted}")
        floats.append(array.reshape(-1))
    return floats
