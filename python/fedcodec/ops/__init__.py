"""The kernels of fedcodec as public functions: one name each, whatever runs them.

Every function checks its arguments and calls the backend in use: the best native instruction set of this processor, or
the NumPy oracle where nothing is compiled. All backends give the same bits (docs/numerics.md). `use` chooses one,
`active` and `available` name them; the environment variable ``FEDCODEC_ISA`` chooses from outside.

Arrays of any shape are taken in row-major order. float16 and bfloat16 travel between functions as their bits in uint16
(`narrow`, `widen`). Not-a-number and infinity raise `NonFiniteError`, a wrong dtype `TypeError`, a wrong size or range
`ValueError`. An `out` must be contiguous; what is in it after an error is not defined.

Functions of arrays take a GPU's too (torch, CuPy, any ``__cuda_array_interface__``), all of one device: they run there,
with the same bits and errors, and give arrays of that framework. What the kernels there do not take goes by the CPU.

>>> import numpy as np
>>> from fedcodec import ops
>>> update = np.array([0.5, -3, 0.25, 2], np.float32)
>>> positions, values = ops.topk(update, 2)
>>> codes, scales = ops.quantize_int8(values)
>>> restored = np.zeros_like(update)
>>> ops.scatter(positions, ops.dequantize_int8(codes, scales), restored)
>>> restored
array([ 0.      , -3.      ,  0.      ,  2.007874], dtype=float32)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import operator
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, NonFiniteError
from . import reference
from .gpu_arrays import GpuArray, is_on_gpu
from .reference import (
    Array,
    Bits,
    Codes,
    Draw,
    Float32,
    Interpolation,
    Mask,
    Narrow,
    Positions,
    Words,
)

__all__ = [
    "accumulate",
    "accumulate_codes",
    "accumulate_sparse",
    "active",
    "apply_mask",
    "available",
    "backend",
    "compact",
    "crc32",
    "cuda_backend",
    "cuda_missing",
    "dequantize",
    "dequantize_int8",
    "dequantize_kbit",
    "draw_seed",
    "get_num_threads",
    "mean_magnitude",
    "narrow",
    "pack_codes",
    "pack_mask",
    "pack_signs",
    "pack_sparse",
    "percentile_threshold",
    "philox",
    "quantize",
    "quantize_int8",
    "quantize_kbit",
    "random_positions",
    "scatter",
    "set_num_threads",
    "topk",
    "topk_threshold",
    "unpack_codes",
    "unpack_mask",
    "unpack_signs",
    "unpack_sparse",
    "use",
    "widen",
]

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_MAX_SIZE = (1 << 63) - 1
_MOST_THREADS = 1024
_MOST_SPARSE = 1 << 48  # even empty, every 2^31 elements take two bytes

_P = ParamSpec("_P")
_R = TypeVar("_R")


# --- backends -----------------------------------------------------------------------------------------------------

_backend: ModuleType | None = None


def _native() -> ModuleType | None:
    # Looked for, not tried: a native module that is there but broken must not pass for an absent one.
    if importlib.util.find_spec("fedcodec._native") is None:
        return None
    return importlib.import_module("fedcodec._native")


def _cores() -> list[Any]:
    """Return the loaded modules that have kernels and threads of the CPU, each its own."""
    return [core for core in (_native(), sys.modules.get("fedcodec._cuda")) if core is not None]


def available() -> tuple[str, ...]:
    """Name the backends that can be used here, the default last.

    Returns
    -------
    tuple of str
        "reference" and, where compiled and supported by this processor, "baseline", "avx2", "avx512", "neon".

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.available()[0]
    'reference'
    """
    native = _native()
    names = [] if native is None else [name for name, usable in native.isas() if usable]
    return ("reference", *names)


def use(name: str) -> None:
    """Make a backend the one that all calls of this process run on.

    Parameters
    ----------
    name : str
        One of `available`.

    Raises
    ------
    BackendError
        If there is no such backend here.

    Examples
    --------
    >>> from fedcodec import ops
    >>> before = ops.active()
    >>> ops.use("reference")
    >>> ops.active()
    'reference'
    >>> ops.use(before)
    """
    global _backend
    names = available()
    if name not in names:
        raise BackendError(f"backend {name!r} cannot be used here; available: {', '.join(names)}")
    if name == "reference":
        _backend = reference
    else:
        for core in _cores():
            core.set_isa(name)
        _backend = importlib.import_module("fedcodec.ops.cpu")


def backend() -> ModuleType:
    """Return the module in use, with these functions less the checks: for callers that made them.

    Raises
    ------
    BackendError
        If ``FEDCODEC_ISA`` names none that can be used here, or ``FEDCODEC_NUM_THREADS`` is no number of threads.

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.backend().crc32(b"123456789") == 0xCBF43926
    True
    """
    if _backend is None:
        get_num_threads()
        use(os.environ.get("FEDCODEC_ISA") or available()[-1])
    return cast(ModuleType, _backend)


def cuda_backend() -> ModuleType:
    """Return the module for arrays in a GPU's memory.

    Raises
    ------
    BackendError
        If it is not built, or finds no driver or no device; the message says which.

    Examples
    --------
    >>> from fedcodec import ops
    >>> if ops.cuda_missing() is None:
    ...     arrays = ops.cuda_backend().DeviceArray
    """
    reason = cuda_missing()
    if reason is not None:
        raise BackendError(reason)
    return importlib.import_module("fedcodec.ops.cuda")


def cuda_missing() -> str | None:
    """Say what keeps arrays in a GPU's memory from being encoded; None if nothing does.

    Examples
    --------
    >>> from fedcodec import ops
    >>> reason = ops.cuda_missing()
    >>> reason is None or "CUDA" in reason or "driver" in reason
    True
    """
    if not _cuda_checks:
        _cuda_checks.append(_check_cuda())
    return _cuda_checks[0]


_cuda_checks: list[str | None] = []  # one, once it was made


def _check_cuda() -> str | None:
    if importlib.util.find_spec("fedcodec._cuda") is None:
        return "the CUDA module is not built"
    try:
        module: Any = importlib.import_module("fedcodec._cuda")
    except ImportError as error:
        return f"the CUDA module cannot be loaded: {error}"
    module.set_num_threads(get_num_threads())
    name = active()
    module.set_isa(available()[-1] if name == "reference" else name)
    driver, runtime = (f"{version // 1000}.{version % 1000 // 10}" for version in module.versions())
    if driver == "0.0":
        return "no NVIDIA driver is installed"
    try:
        count = module.device_count()
    except BackendError as error:
        return f"{error} (the driver supports CUDA {driver}, fedcodec was built with {runtime})"
    return None if count else "there is no CUDA device"


def active() -> str:
    """Return the name of the backend in use.

    Raises
    ------
    BackendError
        If ``FEDCODEC_ISA`` names none that can be used here.

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.active() in ops.available()
    True
    """
    if backend() is reference:
        return "reference"
    return str(cast(ModuleType, _native()).isa())


def get_num_threads() -> int:
    """Return how many threads a call may use, the caller's counted.

    Unless `set_num_threads` has said otherwise, it is what the environment variable ``FEDCODEC_NUM_THREADS`` says, else
    ``OMP_NUM_THREADS``, else the number of processors that this process may run on. Without a native module it is 1.

    Raises
    ------
    BackendError
        If ``FEDCODEC_NUM_THREADS`` is not a number from 1 to 1024.

    Examples
    --------
    >>> import fedcodec as fc
    >>> fc.get_num_threads() >= 1
    True
    """
    native = _native()
    if native is None:
        return 1
    try:
        return int(native.num_threads())
    except ValueError as error:
        raise BackendError(str(error)) from None


def set_num_threads(number: int) -> None:
    """Set how many threads a call may use, the caller's counted; every number gives the same bytes.

    The threads are one pool of the process. They start with the first call that has work for them, from some hundred
    thousand values on, sleep between calls, and are shared by calls made at the same time, so that no more than this
    number run unless more threads call. A forked process starts its own. The reference backend uses the caller's only.

    Parameters
    ----------
    number : int
        From 1, all work in the calling thread, to 1024.

    Raises
    ------
    TypeError
        If the number is not an integer.
    ValueError
        If it is out of range.

    Examples
    --------
    >>> import fedcodec as fc
    >>> before = fc.get_num_threads()
    >>> fc.set_num_threads(2)
    >>> fc.set_num_threads(before)
    """
    count = _integer("number", number, 1, _MOST_THREADS)
    for core in _cores():
        core.set_num_threads(count)


# --- arrays on a GPU ----------------------------------------------------------------------------------------------


def _anywhere(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function take a GPU's arrays, which it then sees as `GpuArray`s, and give its caller their framework's."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not any(map(_has_gpu, args)) and not any(map(_has_gpu, kwargs.values())):
            return function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs)
        module = cuda_backend()
        seen = {name: _seen(name, value) for name, value in arguments.arguments.items()}
        _require_one_device(seen)
        try:
            arguments.arguments.update(seen)
            result = function(*arguments.args, **arguments.kwargs)
        except module.Refused:
            arguments.arguments.update(
                {name: _mapped(GpuArray.host, to) for name, to in seen.items()}
            )
            result = function(*arguments.args, **arguments.kwargs)
            for name in {"out", "accumulator"}.intersection(seen):
                _copy_back(arguments.arguments[name], seen[name])
            result = _put(result, seen.get("out"), _gpu_arrays(seen)[0][1])
        return cast(_R, _mapped(GpuArray.unwrapped, result))

    return call


# The parameters that are arrays, or several; some are numbers in other functions.
_ARRAYS = frozenset(
    {
        *("values", "mask", "bits", "codes", "scales", "packed", "positions"),
        *("out", "accumulator"),
    }
)


def _has_gpu(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(is_on_gpu, value[:2]))
    return is_on_gpu(value)


def _seen(name: str, value: Any) -> Any:
    if name not in _ARRAYS or value is None or isinstance(value, (int, np.integer)):
        return value
    if is_on_gpu(value):
        return GpuArray(value, name)
    if isinstance(value, (list, tuple)) and _has_gpu(value):
        items = [_seen(name, item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{name} is not on a GPU, another array is: move all to one device")


def _gpu_arrays(seen: dict[str, Any]) -> list[tuple[str, GpuArray]]:
    items = [
        (name, item)
        for name, value in seen.items()
        for item in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return [(name, item) for name, item in items if isinstance(item, GpuArray)]


def _require_one_device(seen: dict[str, Any]) -> None:
    (_, first), *others = _gpu_arrays(seen)
    for name, array in others:
        if array.device != first.device:
            raise TypeError(f"{name} is on GPU {array.device}, another array on {first.device}")


def _mapped(call: Callable[[GpuArray], Any], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(call, item) for item in value)
    if isinstance(value, list):
        return [_mapped(call, item) for item in value]
    return call(value) if isinstance(value, GpuArray) else value


def _copy_back(host: Any, array: Any) -> None:
    if isinstance(array, (list, tuple)):
        for part, to in zip(host, array, strict=True):
            _copy_back(part, to)
    elif isinstance(array, GpuArray):
        array.fill(host)


def _put(result: Any, out: Any, beside: GpuArray) -> Any:
    """Return what the CPU gave, on the GPU: in `out`, as far as that is there."""
    if isinstance(result, tuple):
        outs = (None,) * len(result) if out is None else out
        return tuple(_put(*both, beside) for both in zip(result, outs, strict=True))
    if not isinstance(result, np.ndarray):
        return result
    return beside.new(result.shape, result.dtype).fill(result) if out is None else out


def _backend_of(array: Any) -> ModuleType:
    array = array[0] if isinstance(array, list) and array else array
    return cuda_backend() if isinstance(array, GpuArray) else backend()


def _share_memory(one: Any, other: Any) -> bool:
    if isinstance(one, GpuArray):
        return one.shares_memory(other)
    return bool(np.may_share_memory(one, other))


# --- arguments ----------------------------------------------------------------------------------------------------


def _integer(name: str, value: Any, least: int, most: int = _MAX_SIZE) -> int:
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}, it must be from {least} to {most}")
    return number


def _flat(name: str, array: Any, *kinds: npt.DTypeLike) -> Any:
    held = array if isinstance(array, GpuArray) else np.ascontiguousarray(array)
    flat = held.reshape(-1)
    if flat.dtype not in kinds:
        names = " or ".join(np.dtype(kind).name for kind in kinds)
        raise TypeError(f"{name} has dtype {flat.dtype}, it must be {names}")
    return flat


def _finite(name: str, values: Array) -> Array:
    # The extremes show what is not finite, at a fraction of the cost of looking at each.
    with np.errstate(invalid="ignore"):
        extremes = (values.min(), values.max()) if values.size else ()
    if not all(map(math.isfinite, extremes)):
        place = int((~np.isfinite(values)).argmax())
        raise NonFiniteError(f"{name}: element {place} is {values[place]}")
    return values


def _floats(values: Any) -> Any:
    return _flat("values", values, np.float32, np.float64)


def _singles(values: npt.ArrayLike) -> Float32:
    flat: Float32 = _floats(values)
    if flat.dtype == np.float32:
        return flat
    single: Float32 = _backend_of(flat).narrow(flat, "float32", None, True)
    return single


def _parts(values: Any) -> list[Any]:
    parts = [_floats(part) for part in (values if isinstance(values, (list, tuple)) else [values])]
    if any(part.dtype == np.float64 for part in parts) and not isinstance(parts[0], GpuArray):
        return [part.astype(np.float64, copy=False) for part in parts]
    return parts


def _bits(bits: npt.ArrayLike | bytes, n: int) -> Bits:
    raw = (
        np.frombuffer(bits, np.uint8) if isinstance(bits, (bytes, bytearray, memoryview)) else bits
    )
    flat: Bits = _flat("bits", raw, np.uint8)
    if flat.size != (n + 7) // 8:
        raise ValueError(f"{n} bits take {(n + 7) // 8} bytes, not {flat.size}")
    return flat


def _integers(positions: npt.ArrayLike) -> Positions:
    if isinstance(positions, GpuArray):
        if positions.dtype != np.int64 and positions.dtype.kind in "iu":
            raise cuda_backend().Refused
        return cast(Positions, _flat("positions", positions, np.int64))
    array = np.asarray(positions)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"positions have dtype {array.dtype}, it must be an integer one")
    return np.ascontiguousarray(array, np.int64).reshape(-1)


def _positions(positions: npt.ArrayLike, n: int) -> Positions:
    flat = _integers(positions)
    if not isinstance(flat, GpuArray):  # its kernels look by themselves
        reference.require_increasing(flat, n)
    return flat


def _target(name: str, array: Any) -> Array:
    if not isinstance(array, (np.ndarray, GpuArray)) or array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be a float32 or float64 array")
    if not _is_writable(array):
        raise ValueError(f"{name} must be contiguous and writable")
    return cast(Array, array.reshape(-1))


def _is_writable(array: Any) -> bool:
    if isinstance(array, GpuArray):
        return array.writable
    return bool(array.flags.c_contiguous and array.flags.writeable)


def _sized(name: str, array: Array, n: int) -> None:
    if array.size != n:
        raise ValueError(f"{name} has {array.size} elements, it must have {n}")


def _weight(weight: float, accumulator: Array) -> float:
    with np.errstate(over="ignore"):
        usable = math.isfinite(accumulator.dtype.type(weight))
    if not usable:
        raise ValueError(f"weight is {weight}, it must be finite in {accumulator.dtype}")
    return float(weight)


def _values_for(accumulator: Array, values: npt.ArrayLike) -> Array:
    return _singles(values) if accumulator.dtype == np.float32 else _floats(values)


def _target_of(
    out: Any, dtype: npt.DTypeLike, shape: tuple[int, ...], *inputs: Array
) -> Array | None:
    """Check `out` and return it flat; None where a kernel must not write to it while it reads."""
    if out is None:
        return None
    if not isinstance(out, (np.ndarray, GpuArray)) or out.dtype != dtype or out.shape != shape:
        raise ValueError(f"out must be an array of dtype {np.dtype(dtype)} and shape {shape}")
    if not _is_writable(out):
        raise ValueError("out must be contiguous and writable")
    apart = not any(_share_memory(out, array) for array in inputs)
    return cast(Array, out.reshape(-1)) if apart else None


def _apart(target: Array, values: Array) -> Array:
    """Return values that a kernel may read while it writes to the target."""
    return values.copy() if _share_memory(target, values) else values


def _deliver(result: Array, out: Array | None, target: Array | None) -> Array:
    if out is None:
        return result
    if target is not None:
        return out
    if isinstance(out, GpuArray):
        out.copy_from(cast(Any, result))
    else:
        np.copyto(out, result.reshape(out.shape))
    return out


# --- selection ----------------------------------------------------------------------------------------------------


@_anywhere
def topk(values: npt.ArrayLike | Sequence[npt.ArrayLike], k: int) -> tuple[Positions, Array]:
    """Keep the k largest magnitudes: `compact` by `topk_threshold`, in about one pass over the values.

    Parameters
    ----------
    values : float32 or float64 array, or list of them
        A list counts as one flat space; float64 if one of them is.
    k : int
        From 0 to the number of values.

    Returns
    -------
    positions : int64 array of k
        In the flat space, ascending; of equal magnitudes those of the lowest positions.
    values : array of k
        Those kept, in this order.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.topk(np.array([1, -2, 2, 3], np.float32), 2)
    (array([1, 3]), array([-2.,  3.], dtype=float32))
    """
    parts = _parts(values)
    positions, kept = _backend_of(parts).topk(
        parts, _integer("k", k, 0, sum(part.size for part in parts))
    )
    return positions, kept


@_anywhere
def topk_threshold(values: npt.ArrayLike | Sequence[npt.ArrayLike], k: int) -> tuple[float, int]:
    """Find the k-th largest magnitude.

    Parameters
    ----------
    values : float32 or float64 array, or list of them
        A list counts as one flat space; float64 if one of them is.
    k : int
        From 0 to the number of values.

    Returns
    -------
    threshold : float
        The k-th largest magnitude; infinity for k = 0.
    ties : int
        How many of the values equal to it belong to the k, those of the lowest positions first.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.topk_threshold(np.array([1, -2, 2, 3], np.float32), 2)
    (2.0, 1)
    """
    parts = _parts(values)
    k = _integer("k", k, 0, sum(part.size for part in parts))
    threshold, ties = _backend_of(parts).topk_threshold(parts, k)
    return threshold, ties


@_anywhere
def percentile_threshold(
    values: npt.ArrayLike | Sequence[npt.ArrayLike],
    percentile: float,
    interpolation: Interpolation = "linear",
) -> float:
    """Find the percentile of all magnitudes, to keep what is strictly above it.

    Parameters
    ----------
    values : float32 or float64 array, or list of them
        A list counts as one flat space; float64 if one of them is.
    percentile : float
        From 0 to 100.
    interpolation : {"linear", "lower", "higher"}
        Between the two order statistics that the percentile falls between.

    Returns
    -------
    float
        Rounded down to the float type of the values; 0.0 of no values.

    References
    ----------
    Yan, eq. 1: threshold = percentile(abs(W), p).

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.percentile_threshold(np.array([1, -2, 3, 4], np.float32), 50)
    2.5
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}, it must be from 0 to 100")
    if interpolation not in ("linear", "lower", "higher"):
        raise ValueError(
            f"interpolation is {interpolation!r}, it must be 'linear', 'lower' or 'higher'"
        )
    parts = _parts(values)
    return float(_backend_of(parts).percentile_threshold(parts, float(percentile), interpolation))


@_anywhere
def compact(
    values: npt.ArrayLike | Sequence[npt.ArrayLike], threshold: float, ties: int = 0
) -> tuple[Positions, Array]:
    """Keep the magnitudes above a threshold.

    Parameters
    ----------
    values : float32 or float64 array, or list of them
        A list counts as one flat space; float64 if one of them is.
    threshold : float
        Not negative.
    ties : int
        How many of those equal to the threshold are kept too, those of the lowest positions.

    Returns
    -------
    positions : int64 array
        Of those kept in the flat space, ascending.
    values : array
        Those kept, in this order.

    References
    ----------
    Yan, eq. 2 and 3: mask = abs(w) > threshold.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.compact(np.array([1, -2, 2, 3], np.float32), 2.0, ties=1)
    (array([1, 3]), array([-2.,  3.], dtype=float32))
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}, it must not be negative")
    parts = _parts(values)
    ties = _integer("ties", ties, 0)
    wide = any(part.dtype == np.float64 for part in parts)  # as they are all on the CPU, by now
    limit = reference.round_down(threshold, np.float64 if wide else np.float32)
    positions, kept = _backend_of(parts).compact(parts, limit, ties if limit == threshold else 0)
    return positions, kept


def random_positions(n: int, k: int, seed: int) -> Positions:
    """Draw k of n positions, by a permutation that the seed keys.

    Parameters
    ----------
    n, k : int
        0 <= k <= n < 2**63.
    seed : int
        From 0 to 2**64 - 1; see `draw_seed`.

    Returns
    -------
    int64 array of k
        Ascending.

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.random_positions(5, 5, seed=7)
    array([0, 1, 2, 3, 4])
    """
    n = _integer("n", n, 0)
    k, seed = _integer("k", k, 0, n), _integer("seed", seed, 0, _U64)
    positions: Positions = backend().random_positions(n, k, seed)
    return positions


# --- masks --------------------------------------------------------------------------------------------------------


@_anywhere
def apply_mask(values: npt.ArrayLike, mask: npt.ArrayLike, *, out: Array | None = None) -> Array:
    """Zero what a mask does not keep.

    Parameters
    ----------
    values : float32 or float64 array
    mask : bool array
        Of as many elements.
    out : array, optional
        Of the shape and dtype of the values; filled and returned.

    Returns
    -------
    array
        The values where the mask is True, +0 elsewhere.

    References
    ----------
    Yan, eq. 3.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.apply_mask(np.array([1, 2], np.float32), [True, False])
    array([1., 0.], dtype=float32)
    """
    flat, kept = _floats(values), _flat("mask", mask, np.bool_)
    _sized("mask", kept, flat.size)
    shape = np.shape(values)
    target = _target_of(out, flat.dtype, shape, flat, kept)
    return _deliver(_backend_of(flat).apply_mask(flat, kept, target).reshape(shape), out, target)


@_anywhere
def pack_mask(mask: npt.ArrayLike, *, out: Bits | None = None) -> Bits:
    """Pack bools to bits, the first into the least significant bit of the first byte.

    Parameters
    ----------
    mask : bool array of n
    out : uint8 array of ceil(n / 8), optional
        Filled and returned.

    Returns
    -------
    uint8 array of ceil(n / 8)
        The bits that pad the last byte are zero.

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.pack_mask([True, False, True])
    array([5], dtype=uint8)
    """
    flat = _flat("mask", mask, np.bool_)
    target = _target_of(out, np.uint8, ((flat.size + 7) // 8,), flat)
    return _deliver(_backend_of(flat).pack_mask(flat, target), out, target)


@_anywhere
def unpack_mask(bits: npt.ArrayLike | bytes, n: int, *, out: Mask | None = None) -> Mask:
    r"""Undo `pack_mask`.

    Parameters
    ----------
    bits : uint8 array of ceil(n / 8), or bytes
    n : int
        Number of bools.
    out : bool array of n, optional
        Filled and returned.

    Returns
    -------
    bool array of n

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.unpack_mask(b"\x05", 3)
    array([ True, False,  True])
    """
    n = _integer("n", n, 0)
    flat = _bits(bits, n)
    target = _target_of(out, np.bool_, (n,), flat)
    return _deliver(_backend_of(flat).unpack_mask(flat, n, target), out, target)


# --- symmetric integers -------------------------------------------------------------------------------------------


def _draw(draw: Draw | None) -> Draw | None:
    if draw is None:
        return None
    codec_seed, call_seed, first = draw
    return (
        _integer("codec_seed", codec_seed, 0, _U64),
        _integer("call_seed", call_seed, 0, _U64),
        _integer("first", first, 0),
    )


def _grid(inner: int, channels: int, n: int) -> tuple[int, int]:
    return _integer("inner", inner, 1), _integer("channels", channels, 1 if n else 0)


def _grid_of(shape: tuple[int, ...], block_size: int | None, axis: int | None) -> tuple[int, int]:
    n = math.prod(shape)
    if axis is not None:
        axis = _integer("axis", axis, 0)
        if n and axis < len(shape):
            return math.prod(shape[axis + 1 :]), shape[axis]
    elif block_size is not None:
        block_size = _integer("block_size", block_size, 1)
        return block_size, -(-n // block_size)
    return max(1, n), min(1, n)


def _codes(codes: npt.ArrayLike, bits: int) -> Codes:
    bits = _integer("bits", bits, 2, 8)
    flat: Codes = _flat("codes", codes, np.int8)
    end = 1 << (bits - 1)
    if isinstance(flat, GpuArray):  # its kernels look by themselves
        return flat
    if bits < 8 and flat.size and not -end <= flat.min() <= flat.max() < end:
        raise ValueError(f"codes of {bits} bits are from {-end} to {end - 1}")
    return flat


def _scales(scales: npt.ArrayLike, bits: int, channels: int) -> Float32:
    flat: Float32 = _flat("scales", scales, np.float32)
    on_gpu = isinstance(flat, GpuArray)
    _sized("scales", flat if on_gpu else _finite("scales", flat), channels)
    if on_gpu:
        return flat
    if np.signbit(flat).any():
        raise ValueError("a scale is negative")
    largest = float(flat.max(initial=0)) * ((1 << (bits - 1)) - 1)
    if largest > float(np.finfo(np.float32).max):
        raise NonFiniteError(f"scales: the largest times the largest code is {largest}")
    return flat


@_anywhere
def quantize(
    values: npt.ArrayLike,
    bits: int,
    inner: int,
    channels: int,
    draw: Draw | None = None,
    *,
    out: tuple[Codes, Float32] | None = None,
) -> tuple[Codes, Float32]:
    """Quantize to symmetric integers; value i has the scale of channel (i / inner) mod channels.

    Parameters
    ----------
    values : float32 or float64 array of n
        float64 is rounded to float32 first.
    bits : int
        From 2 to 8.
    inner, channels : int
        At least 1.
    draw : (codec seed, call seed, number of the first value), optional
        Round stochastically by the words of `philox`; without it, to nearest even.
    out : (int8 array of n, float32 array of channels), optional
        Filled and returned.

    Returns
    -------
    codes : int8 array of n
        From -L to L = 2**(bits - 1) - 1.
    scales : float32 array of channels
        With nearest rounding, value - code * scale is exact in float32.

    References
    ----------
    Sprenger, uniform symmetric quantizer; Yan, eq. 4 to 6, with L in the place of 2**bits - 1.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.quantize(np.array([2, -254, 1, 0], np.float32), bits=8, inner=2, channels=2)
    (array([   1, -127,  127,    0], dtype=int8), array([2.        , 0.00787402], dtype=float32))
    """
    flat = _singles(values)
    return _quantize(flat, bits, _grid(inner, channels, flat.size), _draw(draw), out, flat.shape)


def _quantize(
    flat: Float32,
    bits: int,
    grid: tuple[int, int],
    draw: Draw | None,
    out: tuple[Codes, Float32] | None,
    shape: tuple[int, ...],
) -> tuple[Codes, Float32]:
    bits = _integer("bits", bits, 2, 8)
    codes_out, scales_out = (None, None) if out is None else out
    targets = (
        _target_of(codes_out, np.int8, shape, flat),
        _target_of(scales_out, np.float32, grid[1:], flat),
    )
    codes, scales = _backend_of(flat).quantize(flat, bits, *grid, draw, *targets)
    return (
        _deliver(codes.reshape(shape), codes_out, targets[0]),
        _deliver(scales, scales_out, targets[1]),
    )


@_anywhere
def dequantize(
    codes: npt.ArrayLike,
    scales: npt.ArrayLike,
    bits: int,
    inner: int,
    channels: int,
    *,
    out: Float32 | None = None,
) -> Float32:
    """Undo `quantize`.

    Parameters
    ----------
    codes : int8 array of n
        The most negative reads as its successor.
    scales : float32 array of channels
    bits, inner, channels : int
        As for `quantize`.
    out : float32 array of n, optional
        Filled and returned.

    Returns
    -------
    float32 array of n
        code * scale, rounded to float32.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.dequantize(np.array([1, -127], np.int8), np.array([2], np.float32), 8, 2, 1)
    array([   2., -254.], dtype=float32)
    """
    flat = _codes(codes, bits)
    return _dequantize(flat, scales, bits, _grid(inner, channels, flat.size), out, flat.shape)


def _dequantize(
    flat: Codes,
    scales: npt.ArrayLike,
    bits: int,
    grid: tuple[int, int],
    out: Float32 | None,
    shape: tuple[int, ...],
) -> Float32:
    factors = _scales(scales, bits, grid[1])
    target = _target_of(out, np.float32, shape, flat, factors)
    values = _backend_of(flat).dequantize(flat, factors, bits, *grid, target)
    return _deliver(values.reshape(shape), out, target)


@_anywhere
def quantize_kbit(
    values: npt.ArrayLike,
    bits: int,
    *,
    block_size: int | None = 1024,
    axis: int | None = None,
    stochastic: bool = False,
    seed: int = 0,
    out: tuple[Codes, Float32] | None = None,
) -> tuple[Codes, Float32]:
    """Quantize to symmetric integers with a scale per block, per channel or for all.

    Parameters
    ----------
    values : float32 or float64 array
        float64 is rounded to float32 first.
    bits : int
        From 2 to 8.
    block_size : int or None
        Number of values that share a scale; None for one scale for all.
    axis : int, optional
        One scale for each index of this axis instead; an array without the axis has one scale.
    stochastic : bool
        Round up or down at random so that the expected value is right, instead of to nearest even.
    seed : int
        From 0 to 2**64 - 1, for stochastic rounding.
    out : (int8 array of the shape of the values, float32 array), optional
        Filled and returned.

    Returns
    -------
    codes : int8 array of the shape of the values
    scales : float32 array

    References
    ----------
    Sprenger, uniform symmetric quantizer and its granularities.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.quantize_kbit(np.array([7, -3, 0.5], np.float32), 4)
    (array([ 7, -3,  0], dtype=int8), array([1.], dtype=float32))
    """
    shape = np.shape(values)
    draw = _draw((seed, 0, 0)) if stochastic else None
    return _quantize(_singles(values), bits, _grid_of(shape, block_size, axis), draw, out, shape)


@_anywhere
def dequantize_kbit(
    codes: npt.ArrayLike,
    scales: npt.ArrayLike,
    bits: int,
    *,
    block_size: int | None = 1024,
    axis: int | None = None,
    shape: tuple[int, ...] | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Undo `quantize_kbit`.

    Parameters
    ----------
    codes : int8 array
    scales : float32 array
    bits, block_size, axis
        As for `quantize_kbit`.
    shape : tuple of int, optional
        Of the values; by default that of the codes.
    out : float32 array of this shape, optional
        Filled and returned.

    Returns
    -------
    float32 array of this shape

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.dequantize_kbit(np.array([7, -3], np.int8), np.array([0.5], np.float32), 4)
    array([ 3.5, -1.5], dtype=float32)
    """
    shape = np.shape(codes) if shape is None else tuple(shape)
    flat = _codes(codes, bits)
    _sized("codes", flat, math.prod(shape))
    return _dequantize(flat, scales, bits, _grid_of(shape, block_size, axis), out, shape)


@_anywhere
def quantize_int8(
    values: npt.ArrayLike,
    *,
    block_size: int | None = 1024,
    axis: int | None = None,
    stochastic: bool = False,
    seed: int = 0,
    out: tuple[Codes, Float32] | None = None,
) -> tuple[Codes, Float32]:
    """Quantize to 8-bit integers from -127 to 127: `quantize_kbit` with 8 bits.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.quantize_int8(np.array([127, -63, 0.5], np.float32))
    (array([127, -63,   0], dtype=int8), array([1.], dtype=float32))
    """
    return quantize_kbit(
        values, 8, block_size=block_size, axis=axis, stochastic=stochastic, seed=seed, out=out
    )


@_anywhere
def dequantize_int8(
    codes: npt.ArrayLike,
    scales: npt.ArrayLike,
    *,
    block_size: int | None = 1024,
    axis: int | None = None,
    shape: tuple[int, ...] | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Undo `quantize_int8`: `dequantize_kbit` with 8 bits.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.dequantize_int8(np.array([127, -63], np.int8), np.array([0.5], np.float32))
    array([ 63.5, -31.5], dtype=float32)
    """
    return dequantize_kbit(codes, scales, 8, block_size=block_size, axis=axis, shape=shape, out=out)


@_anywhere
def pack_codes(codes: npt.ArrayLike, bits: int, *, out: Bits | None = None) -> Bits:
    """Pack codes as two's complement without gaps.

    Parameters
    ----------
    codes : int8 array of n
    bits : int
        From 2 to 7.
    out : uint8 array of ceil(n * bits / 8), optional
        Filled and returned.

    Returns
    -------
    uint8 array of ceil(n * bits / 8)

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.pack_codes(np.array([1, -1], np.int8), 4)
    array([241], dtype=uint8)
    """
    bits = _integer("bits", bits, 2, 7)
    flat: Codes = _flat("codes", codes, np.int8)
    target = _target_of(out, np.uint8, ((flat.size * bits + 7) // 8,), flat)
    return _deliver(_backend_of(flat).pack_codes(flat, bits, target), out, target)


@_anywhere
def unpack_codes(
    packed: npt.ArrayLike | bytes, bits: int, n: int, *, out: Codes | None = None
) -> Codes:
    r"""Undo `pack_codes`.

    Parameters
    ----------
    packed : uint8 array of ceil(n * bits / 8), or bytes
    bits : int
        From 2 to 7.
    n : int
        Number of codes.
    out : int8 array of n, optional
        Filled and returned.

    Returns
    -------
    int8 array of n

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.unpack_codes(b"\xf1", 4, 2)
    array([ 1, -1], dtype=int8)
    """
    bits, n = _integer("bits", bits, 2, 7), _integer("n", n, 0)
    flat = _bits(packed, n * bits)
    target = _target_of(out, np.int8, (n,), flat)
    return _deliver(_backend_of(flat).unpack_codes(flat, bits, n, target), out, target)


# --- sign and magnitude -------------------------------------------------------------------------------------------


@_anywhere
def mean_magnitude(values: npt.ArrayLike) -> float:
    """Take the mean of the magnitudes, the same for every order of the values.

    Parameters
    ----------
    values : float32 or float64 array
        float64 is rounded to float32 first.

    Returns
    -------
    float
        A float32 number; 0.0 of no values.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.mean_magnitude(np.array([1, -2, 3], np.float32))
    2.0
    """
    flat = _singles(values)
    return float(_backend_of(flat).mean_magnitude(flat))


@_anywhere
def pack_signs(values: npt.ArrayLike, *, out: Bits | None = None) -> Bits:
    """Pack the signs of values to bits, 1 where a value is below zero.

    Parameters
    ----------
    values : float32 or float64 array of n
        float64 is rounded to float32 first.
    out : uint8 array of ceil(n / 8), optional
        Filled and returned.

    Returns
    -------
    uint8 array of ceil(n / 8)

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.pack_signs(np.array([1, -2, -0.0], np.float32))
    array([2], dtype=uint8)
    """
    flat = _singles(values)
    target = _target_of(out, np.uint8, ((flat.size + 7) // 8,), flat)
    return _deliver(_backend_of(flat).pack_signs(flat, target), out, target)


@_anywhere
def unpack_signs(
    bits: npt.ArrayLike | bytes, magnitude: float, n: int, *, out: Float32 | None = None
) -> Float32:
    r"""Give every sign one magnitude.

    Parameters
    ----------
    bits : uint8 array of ceil(n / 8), or bytes
    magnitude : float
        A float32 number, finite and not negative.
    n : int
        Number of values.
    out : float32 array of n, optional
        Filled and returned.

    Returns
    -------
    float32 array of n

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.unpack_signs(b"\x02", 0.5, 3)
    array([ 0.5, -0.5,  0.5], dtype=float32)
    """
    n = _integer("n", n, 0)
    magnitude = float(magnitude)
    if not 0 <= magnitude <= float(np.finfo(np.float32).max) or magnitude != float(
        np.float32(magnitude)
    ):
        raise ValueError(
            f"magnitude is {magnitude}, it must be a float32 number, finite and not negative"
        )
    flat = _bits(bits, n)
    target = _target_of(out, np.float32, (n,), flat)
    return _deliver(_backend_of(flat).unpack_signs(flat, magnitude, n, target), out, target)


# --- conversions --------------------------------------------------------------------------------------------------


@_anywhere
def narrow(values: npt.ArrayLike, dtype: Narrow, *, out: Array | None = None) -> Array:
    """Round to a narrower float type, to nearest even in one step.

    Parameters
    ----------
    values : float32 or float64 array of n
    dtype : {"float16", "bfloat16", "float32"}
    out : array of n, optional
        Filled and returned.

    Returns
    -------
    uint16 array of n
        The bits of the 16-bit floats; a float32 array for "float32".

    Raises
    ------
    NonFiniteError
        If a value becomes infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.narrow(np.array([1, -2], np.float32), "bfloat16")
    array([16256, 49152], dtype=uint16)
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"dtype is {dtype!r}, it must be 'float16', 'bfloat16' or 'float32'")
    flat = _floats(values)
    target = _target_of(out, np.float32 if dtype == "float32" else np.uint16, flat.shape, flat)
    return _deliver(_backend_of(flat).narrow(flat, dtype, target, True), out, target)


@_anywhere
def widen(bits: npt.ArrayLike, dtype: str, *, out: Float32 | None = None) -> Float32:
    """Widen 16-bit floats, given as their bits, to float32.

    Parameters
    ----------
    bits : uint16 array of n
    dtype : {"float16", "bfloat16"}
    out : float32 array of n, optional
        Filled and returned.

    Returns
    -------
    float32 array of n
        Exact; infinity stays, and what is not a number stays none, whatever its bits.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> ops.widen(np.array([0x3F80, 0xC000], np.uint16), "bfloat16")
    array([ 1., -2.], dtype=float32)
    """
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}, it must be 'float16' or 'bfloat16'")
    flat = _flat("bits", bits, np.uint16)
    target = _target_of(out, np.float32, flat.shape, flat)
    return _deliver(_backend_of(flat).widen(flat, dtype, target), out, target)


# --- random words -------------------------------------------------------------------------------------------------


def philox(
    codec_seed: int, call_seed: int, first: int, n: int, *, out: Words | None = None
) -> Words:
    """Give the random words of stochastic rounding: Philox4x32-10.

    Parameters
    ----------
    codec_seed, call_seed : int
        From 0 to 2**64 - 1.
    first : int
        Number of the first value.
    n : int
        How many words.
    out : uint32 array of n, optional
        Filled and returned.

    Returns
    -------
    uint32 array of n

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.philox(0, 0, 0, 2)
    array([1713891541, 3781805453], dtype=uint32)
    """
    n = _integer("n", n, 0)
    target = _target_of(out, np.uint32, (n,))
    words: Words = backend().philox(
        _integer("codec_seed", codec_seed, 0, _U64),
        _integer("call_seed", call_seed, 0, _U64),
        _integer("first", first, 0),
        n,
        target,
    )
    return words if out is None else out


def draw_seed(codec_seed: int, call_seed: int, group: int) -> int:
    """Give the seed of the random positions of a call's group.

    Parameters
    ----------
    codec_seed, call_seed : int
        From 0 to 2**64 - 1.
    group : int
        Number of the group among the call's groups with random selection, below 2**32.

    Returns
    -------
    int
        From 0 to 2**64 - 1, for `random_positions`.

    Examples
    --------
    >>> from fedcodec import ops
    >>> 0 <= ops.draw_seed(1, 2, 3) < 2**64
    True
    """
    seed = backend().draw_seed(
        _integer("codec_seed", codec_seed, 0, _U64),
        _integer("call_seed", call_seed, 0, _U64),
        _integer("group", group, 0, _U32),
    )
    return int(seed)


# --- sparse index sets --------------------------------------------------------------------------------------------


@_anywhere
def pack_sparse(positions: npt.ArrayLike, n: int) -> bytes:
    """Pack positions as a sparse index set (docs/format.md, section 4).

    Parameters
    ----------
    positions : integer array
        Strictly increasing, from 0 to below `n`.
    n : int
        Number of elements that they are among.

    Returns
    -------
    bytes
        About as many bits as the entropy n * H(k / n), headers included.

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.pack_sparse([1, 3], 5).hex(" ")
    '10 00 02 0a'
    """
    n = _integer("n", n, 0, _MOST_SPARSE)
    places = _integers(positions)
    return bytes(_backend_of(places).pack_sparse(places, n))


def unpack_sparse(buffer: bytes | bytearray | memoryview, n: int) -> tuple[Positions, int]:
    """Unpack the sparse index set at the beginning of a buffer.

    Parameters
    ----------
    buffer : bytes-like
        Of any origin; longer than the set, perhaps.
    n : int
        Number of elements that the positions are among.

    Returns
    -------
    positions : int64 array
        Ascending.
    used : int
        Number of bytes that the set takes.

    Raises
    ------
    DecodeError
        If there is no valid index set.

    Examples
    --------
    >>> from fedcodec import ops
    >>> ops.unpack_sparse(bytes.fromhex("10 00 02 0a"), 5)
    (array([1, 3]), 4)
    """
    positions, used = backend().unpack_sparse(buffer, _integer("n", n, 0))
    return positions, used


@_anywhere
def scatter(positions: npt.ArrayLike, values: npt.ArrayLike, out: Array) -> None:
    """Write values to positions of an array; the rest of it stays as it is.

    Parameters
    ----------
    positions : integer array
        Strictly increasing.
    values : float32 or float64 array
        One for each position, of the dtype of `out`.
    out : float32 or float64 array
        Contiguous; changed in place.

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> target = np.ones(3, np.float32)
    >>> ops.scatter([1], np.array([5], np.float32), target)
    >>> target
    array([1., 5., 1.], dtype=float32)
    """
    target = _target("out", out)
    flat = _apart(target, _flat("values", values, target.dtype))
    places = _apart(target, _positions(positions, target.size))
    _sized("values", flat, places.size)
    _backend_of(target).scatter(places, flat, target)


# --- sums ---------------------------------------------------------------------------------------------------------


@_anywhere
def accumulate(accumulator: Array, values: npt.ArrayLike, weight: float) -> None:
    """Add weighted values to a sum, in place.

    Parameters
    ----------
    accumulator : float32 or float64 array
        Contiguous; every operation is rounded to its type.
    values : float32 or float64 array
        Of as many elements.
    weight : float

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> total = np.ones(2, np.float32)
    >>> ops.accumulate(total, np.array([1, 2], np.float32), 0.5)
    >>> total
    array([1.5, 2. ], dtype=float32)
    """
    target = _target("accumulator", accumulator)
    flat = _apart(target, _values_for(target, values))
    _sized("values", flat, target.size)
    _backend_of(target).accumulate(target, flat, _weight(weight, target))


@_anywhere
def accumulate_sparse(
    accumulator: Array, positions: npt.ArrayLike, values: npt.ArrayLike, weight: float
) -> None:
    """Add weighted values to positions of a sum, in place.

    Parameters
    ----------
    accumulator : float32 or float64 array
        Contiguous; every operation is rounded to its type.
    positions : integer array
        Strictly increasing.
    values : float32 or float64 array
        One for each position.
    weight : float

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> total = np.ones(3, np.float32)
    >>> ops.accumulate_sparse(total, [2], np.array([4], np.float32), 0.5)
    >>> total
    array([1., 1., 3.], dtype=float32)
    """
    target = _target("accumulator", accumulator)
    flat = _apart(target, _values_for(target, values))
    places = _apart(target, _positions(positions, target.size))
    _sized("values", flat, places.size)
    _backend_of(target).accumulate_sparse(target, places, flat, _weight(weight, target))


@_anywhere
def accumulate_codes(
    accumulator: Array,
    codes: npt.ArrayLike,
    scales: npt.ArrayLike,
    bits: int,
    inner: int,
    channels: int,
    weight: float,
) -> None:
    """Add weighted codes to a sum, in place: `accumulate` of what `dequantize` gives.

    Parameters
    ----------
    accumulator : float32 or float64 array
        Contiguous; every operation is rounded to its type.
    codes : int8 array
        Of as many elements.
    scales : float32 array of channels
    bits, inner, channels : int
        As for `quantize`.
    weight : float

    Examples
    --------
    >>> import numpy as np
    >>> from fedcodec import ops
    >>> total = np.ones(2, np.float32)
    >>> ops.accumulate_codes(total, np.array([1, -1], np.int8), np.array([2], np.float32), 8, 2, 1, 0.5)
    >>> total
    array([2., 0.], dtype=float32)
    """
    target = _target("accumulator", accumulator)
    bits = _integer("bits", bits, 2, 8)
    flat = _apart(target, _codes(codes, bits))
    _sized("codes", flat, target.size)
    inner, channels = _grid(inner, channels, flat.size)
    _backend_of(target).accumulate_codes(
        target,
        flat,
        _apart(target, _scales(scales, bits, channels)),
        bits,
        inner,
        channels,
        _weight(weight, target),
    )


# --- checksum -----------------------------------------------------------------------------------------------------


def crc32(data: Any, value: int = 0) -> int:
    """Compute zlib's CRC-32.

    Parameters
    ----------
    data : contiguous bytes-like
    value : int
        The checksum of the bytes before these.

    Returns
    -------
    int
        From 0 to 2**32 - 1.

    Examples
    --------
    >>> from fedcodec import ops
    >>> hex(ops.crc32(b"123456789"))
    '0xcbf43926'
    """
    return int(backend().crc32(memoryview(data).cast("B"), _integer("value", value, 0, _U32)))
