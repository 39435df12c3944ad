"""Weighted means of many payloads, straight from their bytes, in the memory of one model."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import numpy as np

from . import arrays, dtypes, gpu, ops, pipeline
from .arrays import Storage
from .digests import DIGEST_BYTES
from .errors import DecodeError, SpecMismatch
from .limits import Limits
from .shared import Shared
from .spec import Spec, TensorSpec
from .state import Locked, State, as_array, locked

_STATE_VERSION = 1
_PART = 1 << 16  # values of a mean at once, which stay in the processor's cache
_MAX = {
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float64": (2 - 2.0**-52) * 2.0**1023,
}
# Of the sums.
_FLOAT: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float64": np.float64}
_LEAST = {"float32": 2.0**-126, "float64": 2.0**-1022}


class Aggregator(Locked):
    """A streaming weighted mean of payloads of one spec, whatever their codecs and framings.

    Payloads are added as they arrive and never expanded beside the sum, but for residuals; the work grows with the
    values that a payload carries, not with the model.
    Zeros of sparse payloads count as zeros. The sum is the same, to the bit, for the same order of adds.

    Threads may share one; they take turns. A process that is forked while another thread is inside must not use its
    copy: that turn never ends there.

    Parameters
    ----------
    like : update or Spec, optional
        What payloads must match. Without it the first payload decides, so servers pass it.
    dtype : {"float32", "float64"}
        Of the sums of float tensors; those of float64 tensors are float64 always.
    shared : Shared, optional
        Masks, bases, rule tables and decoders that payloads name by digest.
    device : str, optional
        Where the sums live: "cpu", the default, "cuda" or "cuda:1".
    limits : Limits, optional
        What the first payload may ask for where there is no `like`.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> server = fc.Aggregator()
    >>> server.add(fc.Raw().encode(np.array([1, 2], np.float32)), weight=3)
    >>> server.add(fc.TopK(0.5).encode(np.array([0, 4], np.float32)), weight=1)
    >>> server.mean()
    array([0.75, 2.5 ], dtype=float32)
    """

    _written = ("_sums",)

    def __init__(
        self,
        like: Any = None,
        dtype: Literal["float32", "float64"] = "float32",
        shared: Shared | None = None,
        device: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype is {dtype!r}, it must be 'float32' or 'float64'")
        self._device = arrays.device_number(device)
        pipeline.require("limits", limits, Limits)
        pipeline.require("shared", shared, Shared)
        super().__init__()
        self.dtype = dtype
        self._shared = shared
        self._limits = limits
        self._framework = "numpy"
        self._spec: Spec | None = None
        self._sums: list[Any] = []
        if like is not None:
            if isinstance(like, Spec):
                self._spec = like
            else:
                self._spec, self._framework = arrays.spec_of(like)
            self._sums = self._zeros(self._spec)
        self._like = self._spec
        self.count = 0
        self.weight = 0.0
        # Of the magnitudes in float32 and in float64 sums: sums themselves, of what each payload adds at most.
        self._bounds = 0.0, 0.0
        self._raised: list[tuple[float, float]] = []  # what they have become since
        self._base: bytes | None = None

    @property
    def spec(self) -> Spec | None:
        """The spec of all payloads; None before the first where `like` was not given."""
        return self._spec

    @locked
    def add(self, payload: Any, weight: float = 1.0) -> None:
        """Add one payload, times its weight.

        Parameters
        ----------
        payload : bytes, bytearray, memoryview or uint8 array
        weight : float
            Such as the client's number of samples: 0, or from the least normal number of `dtype` to float32's largest.
            It is rounded to `dtype`.

        Raises
        ------
        DecodeError
            If the bytes are not a valid payload, or the largest magnitudes of all payloads, weighted, add up to more
            than the largest float of the sum; `SpecMismatch` if they have another spec or base than the others. The sum
            is as before.
        TypeError, ValueError
            If the weight is bad.
        """
        weight = self._checked(weight)
        self._settle()
        decoded = pipeline.prepare(
            payload,
            like=self._spec,
            limits=self._limits,
            shared=self._shared,
            backend=ops.backend() if self._device is None else ops.cuda_backend(),
        )
        if self.count and decoded.base != self._base:
            raise SpecMismatch(
                f"the payload's base is {_hex(decoded.base)}, not {_hex(self._base)}"
            )
        sums = self._sums if self._spec is not None else self._first_sums(decoded)
        ledger: list[tuple[float, float]] = []
        try:
            pipeline.accumulate(decoded, sums, weight, self._bounds, ledger)
        finally:  # whatever a signal's handler raises, what was added is counted: at calls and loops it could run again
            if ledger:
                self._spec, self._sums, self._base = decoded.spec, sums, decoded.base
                self.count += 1
                self.weight += weight
                self._raised = ledger

    def merge(self, other: Aggregator) -> None:
        """Add the sum of another aggregator, which stays as it is; threads may be adding to both.

        Raises
        ------
        SpecMismatch
            If it has another spec, dtype or base.
        DecodeError
            If the sums could overflow. The sum is as before.
        TypeError
            If it is no aggregator.
        """
        if not isinstance(other, Aggregator):
            raise TypeError(f"expected an Aggregator, got a {type(other).__name__}")
        # In one order, or two that merge each other would wait for ever.
        first, second = sorted((self, other), key=id)
        with first._lock, second._lock:
            self._merge(other)

    def _settle(self) -> None:
        """Raise the bounds by what the last payload made of them."""
        for narrow, wide in self._raised:
            self._bounds = max(self._bounds[0], narrow), max(self._bounds[1], wide)
        self._raised = []

    def _merge(self, other: Aggregator) -> None:
        if other._spec is None:
            return
        if other.dtype != self.dtype:
            raise SpecMismatch(f"the other's dtype is {other.dtype}, not {self.dtype}")
        if self._spec is not None:
            other._spec.require(self._spec)
        if self.count and other.count and other._base != self._base:
            raise SpecMismatch(f"the other's base is {_hex(other._base)}, not {_hex(self._base)}")
        self._settle()
        other._settle()
        bounds = _added(self._bounds, other._bounds)
        # All that may lack memory comes first.
        sums = self._sums if self._spec is not None else self._zeros(other._spec)
        others = other._sums
        if self._device != other._device:
            others = [self._placed(_on_host(total)) for total in others]
        if self._spec is None:
            self._spec, self._framework, self._sums = other._spec, other._framework, sums
        if other.count:
            self._base = other._base
        for ours, theirs in zip(sums, others, strict=True):
            if self._device is None:
                ops.backend().accumulate(ours, theirs, 1.0)
            else:
                ops.cuda_backend().merge(theirs, ours)
        self._bounds = bounds
        self.count += other.count
        self.weight += other.weight

    @locked
    def mean(self, framework: str | None = None) -> Any:
        """Return the weighted mean in the spec's structure, shapes and dtypes; the sum stays as it is.

        Floats are rounded to their dtype, to its largest value at most. Integers are rounded half to even and clipped;
        a bool is the weighted majority.

        Parameters
        ----------
        framework : {"numpy", "torch", "jax", "cupy"}, optional
            By default that of `like`; where the sums are on a GPU the mean is too, in torch or CuPy.

        Raises
        ------
        ValueError
            If nothing of positive weight was added, or the framework is unknown.
        BackendError
            If the framework cannot be imported.
        """
        if framework is not None:
            arrays.require_framework(framework)
        if self._spec is None or self.weight == 0:
            raise ValueError("nothing of positive weight was added")
        if self._device is not None:
            values, storage = arrays.empty_on_gpu(
                self._spec, framework, self._framework, self._device
            )
            for total, out in zip(self._sums, storage, strict=True):
                ops.cuda_backend().mean(total, self.weight, out)
            return arrays.tied(self._spec, values)
        means = []
        with np.errstate(over="ignore"):
            for total, tensor in zip(self._sums, self._spec.untied, strict=True):
                means.append(_mean(total, self.weight, tensor))
        return arrays.build(
            self._spec,
            arrays.shaped(means, self._spec),
            framework or arrays.host_framework(self._framework),
        )

    @locked
    def state_dict(self) -> dict[str, Any]:
        """Return the whole state but `shared` and `limits`: numbers, strings, bytes and copies of the sums."""
        self._settle()
        return {
            "version": _STATE_VERSION,
            "dtype": self.dtype,
            "framework": self._framework,
            "spec": None if self._spec is None else self._spec.encoded,
            "sums": [_on_host(total).copy() for total in self._sums],
            "count": self.count,
            "weight": self.weight,
            "bound": self._bounds[0],
            "wide_bound": self._bounds[1],
            "base": self._base,
        }

    @locked
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises
        ------
        TypeError
            If it is no dict.
        ValueError
            If it is of another version or dtype, does not match `like`, or no aggregator can have come to it; the
            state is as before.
        """
        found = State(state, {"version": _STATE_VERSION, "dtype": self.dtype})
        spec, count, weight = found.spec(), found.count("count"), found.number("weight")
        bounds = found.number("bound"), found.number("wide_bound")
        framework, base = found.scalar("framework"), found.data("base")
        known = framework in arrays.FRAMEWORKS
        found.require(known, "framework", f"one of {arrays.FRAMEWORKS}")
        found.require(
            base is None or len(base) == DIGEST_BYTES, "base", f"None or {DIGEST_BYTES} bytes"
        )
        found.require(bounds[0] <= _MAX["float32"], "bound", "a float32")
        empty = not (weight or any(bounds) or base)
        found.require(empty if count == 0 else spec is not None, "count", "that of the sums")
        sums, tensors = found["sums"], () if spec is None else spec.untied
        if not isinstance(sums, (list, tuple)) or len(sums) != len(tensors):
            raise ValueError("state: the sums are not those of the spec")
        sums = [
            self._placed(self._loaded(total, tensor, bounds))
            for total, tensor in zip(sums, tensors, strict=True)
        ]
        if self._like is not None:
            if spec is None:
                spec, sums, framework = self._like, self._zeros(self._like), self._framework
            try:
                spec.require(self._like)
            except SpecMismatch as error:
                raise ValueError(f"state: {error}") from None
        self._raised = []
        self._spec, self._sums, self._base, self._framework = spec, sums, base, framework
        self.count, self.weight, self._bounds = count, weight, bounds

    def _loaded(self, total: Any, tensor: TensorSpec, bounds: tuple[float, float]) -> Storage:
        found, dtype = as_array(total, f"the sum of {tensor.name!r}"), self._sum_dtype(tensor)
        if found.dtype != dtype or found.shape != (tensor.size,):
            raise ValueError(
                f"state: the sum of {tensor.name!r} is not {tensor.size} values of {dtype}"
            )
        bound = bounds[dtype == "float64"] if _is_float(tensor) else _MAX["float64"]
        if not np.abs(found).max(initial=0) <= bound:
            raise ValueError(f"state: the sum of {tensor.name!r} is beyond its bound")
        return found

    def _first_sums(self, decoded: pipeline.Decoded) -> list[Any]:
        # Nothing else vouches for the size: the payload must be whole, and the limits hold for the sums too.
        most = (self._limits or Limits()).max_bytes
        tensors = decoded.spec.untied
        wanted = sum(t.size * np.dtype(self._sum_dtype(t)).itemsize for t in tensors)
        if wanted > most:
            raise DecodeError(f"the sums take {wanted} bytes, the limit is {most}: pass like=")
        pipeline.check(decoded)
        try:
            return self._zeros(decoded.spec)
        except MemoryError:
            raise DecodeError("the sums need more memory than there is") from None

    def _zeros(self, spec: Spec) -> list[Any]:
        sums = [(tensor.size, self._sum_dtype(tensor)) for tensor in spec.untied]
        if self._device is None:
            return [np.zeros(size, dtype) for size, dtype in sums]
        ids = dtypes.BY_NAME
        return [gpu.new(size, ids[dtype].id, self._device, zeros=True) for size, dtype in sums]

    def _placed(self, total: Storage) -> Any:
        return total if self._device is None else gpu.moved(total, self._device)

    def _sum_dtype(self, tensor: TensorSpec) -> str:
        narrow = _is_float(tensor) and tensor.dtype != "float64"
        return self.dtype if narrow else "float64"

    def _checked(self, weight: float) -> float:
        if not isinstance(weight, numbers.Real):
            raise TypeError(f"weight is {weight!r}, it must be a number")
        try:
            value = float(weight)
        except OverflowError:
            value = math.inf
        # Up to float32's largest, sums of integers stay finite; subnormal weights would not be those that were meant.
        rounded = float(_FLOAT[self.dtype](value)) if value <= _MAX["float32"] else value
        least = _LEAST[self.dtype]
        if not (weight == 0 or least <= rounded <= _MAX["float32"]):
            raise ValueError(
                f"weight is {value}, it must be 0 or from {least:.9g} to {_MAX['float32']:.9g}"
            )
        return rounded


def _on_host(total: Any) -> Storage:
    return gpu.to_host(total) if gpu.is_on_gpu(total) else total


def _added(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    with np.errstate(over="ignore"):
        narrow = float(np.float32(first[0]) + np.float32(second[0]))
    wide = first[1] + second[1]
    for dtype, bound in (("float32", narrow), ("float64", wide)):
        if not math.isfinite(bound):
            raise DecodeError(f"the sum could leave {dtype}'s range")
    return narrow, wide


def _is_float(tensor: TensorSpec) -> bool:
    return dtypes.BY_NAME[tensor.dtype].is_float


def _mean(total: Storage, weight: float, tensor: TensorSpec) -> Storage:
    """Divide a sum in float64, a part at a time: the whole would be two more models."""
    means = np.empty(0, np.uint8)
    for start in range(0, max(1, total.size), _PART):
        part = total[start : start + _PART]
        mean = np.zeros(part.size)
        # Widens, in whatever mode the caller's thread is.
        ops.backend().accumulate(mean, part, 1.0)
        mean /= weight
        rounded = _rounded(mean, tensor)
        each = rounded.size // max(1, part.size)
        if start == 0:
            means = np.empty(each * total.size, rounded.dtype)
        means[each * start : each * (start + _PART)] = rounded
    return means


def _rounded(mean: Storage, tensor: TensorSpec) -> Storage:
    if _is_float(tensor):
        # A mean is within its values, but the roundings of its sum need not be. np.clip takes thrice as long for few.
        np.minimum(mean, _MAX[tensor.dtype], out=mean)
        np.maximum(mean, -_MAX[tensor.dtype], out=mean)
        return mean if tensor.dtype == "float64" else ops.backend().narrow(mean, tensor.dtype)
    whole = np.rint(mean)
    if tensor.dtype == "bool":
        return (whole > 0).view(np.uint8)
    limits = np.iinfo(tensor.dtype)
    # float(limits.max) may lie beyond the limit, where a cast is undefined.
    top = whole >= float(limits.max)
    result = np.where(top, 0, np.maximum(whole, limits.min)).astype(tensor.dtype)
    result[top] = limits.max
    return result.view(np.uint8)


def _hex(digest: bytes | None) -> str:
    return "none" if digest is None else digest.hex()
