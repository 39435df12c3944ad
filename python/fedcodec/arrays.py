"""The only Python file that knows array frameworks; it imports none that is not loaded already.

`read` turns an update into a spec and 1-D storage arrays that share its memory where they can; `Target` is where a
decoded update goes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import dtypes
from .errors import BackendError
from .spec import MAX_DIMENSIONS, Spec, TensorSpec

Storage: TypeAlias = npt.NDArray[Any]
FRAMEWORKS = ("numpy", "torch", "jax")


class Update(NamedTuple):
    """An update as coders see it: `storage[i]` belongs to `spec.untied[i]`."""

    spec: Spec
    storage: list[Storage]
    framework: str


def read(update: Any) -> Update:
    """Describe an update and give access to its values, without a copy where memory is contiguous.

    Raises
    ------
    TypeError
        If it is not a dict, list or tuple of arrays, or one array, of supported dtypes.
    BackendError
        If an array lives on a GPU and the CUDA module is not built.
    """
    structure, items = _items(update)
    tensors: list[TensorSpec] = []
    storage: list[Storage] = []
    seen: dict[object, int] = {}
    alive: list[Storage] = []  # or the memory of a temporary could pass for a tie of the next
    framework = "numpy"
    for number, (name, value) in enumerate(items):
        array, dtype, framework = _host_array(value, name)
        if array.ndim > MAX_DIMENSIONS:
            raise TypeError(f"tensor {name!r} has {array.ndim} dimensions, not {MAX_DIMENSIONS}")
        alive.append(array)
        identity = (_start(array), array.shape, array.strides, dtype.name, array.dtype.isnative)
        tied_to = seen.setdefault(identity, number) if array.size else number
        if tied_to != number:
            tensors.append(TensorSpec(name, dtype.name, array.shape, tied_to))
            continue
        tensors.append(TensorSpec(name, dtype.name, array.shape))
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        flat = np.ascontiguousarray(array).reshape(-1)
        storage.append((flat if flat.flags.aligned else flat.copy()).view(dtype.storage))
    return Update(Spec(structure, tuple(tensors)), storage, framework)


def allocate(spec: Spec) -> list[Storage]:
    """Return uninitialised storage for the untied tensors of a spec."""
    found = []
    for tensor in spec.untied:
        dtype = dtypes.BY_NAME[tensor.dtype]
        found.append(np.empty(tensor.nbytes // dtype.storage.itemsize, dtype.storage))
    return found


def build(spec: Spec, storage: Sequence[Storage], framework: str) -> Any:
    """Return the update that a spec and its storage stand for; tied tensors come back tied.

    Raises
    ------
    ValueError
        If the framework is none of "numpy", "torch" and "jax".
    TypeError
        If it has no such dtype: 64-bit ones in JAX without ``jax_enable_x64``.
    ImportError
        If it is not installed.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"unknown framework {framework!r}: one of {FRAMEWORKS}")
    make = {"numpy": _numpy_array, "torch": _torch_tensor, "jax": _jax_array}[framework]
    untied = iter(storage)
    values: list[Any] = []
    for tensor in spec.tensors:
        if tensor.tied_to is None:
            values.append(make(next(untied), tensor))
        else:
            values.append(values[tensor.tied_to])
    return pack(spec, values)


def pack(spec: Spec, values: list[Any]) -> Any:
    """Put one value per tensor into the structure of a spec."""
    if spec.structure == "dict":
        return {tensor.name: value for tensor, value in zip(spec.tensors, values, strict=True)}
    return values if spec.structure == "list" else values[0]


def writable(update: Any, source: memoryview) -> Update:
    """Like `read`, for arrays to be filled from the bytes of `source`.

    Raises
    ------
    ValueError
        If an array is read-only, not contiguous, not aligned or of foreign byte order: it cannot be filled in place. Or
        if it shares memory with the source, or with another array that it is not tied to.
    """
    for name, value in _items(update)[1]:
        array, _, framework = _host_array(value, name)
        native = isinstance(value, np.ndarray) and value.dtype.isnative
        shared = not value.is_neg() if framework == "torch" else native
        if not (shared and array.flags.carray):  # contiguous, aligned and writable
            raise ValueError(f"out: tensor {name!r} is not a writable, contiguous array")
    target = read(update)
    spans = [(_start(source), source.nbytes, "the payload")]
    for tensor, storage in zip(target.spec.untied, target.storage, strict=True):
        spans.append((_start(storage), storage.nbytes, f"tensor {tensor.name!r}"))
    spans = sorted(span for span in spans if span[1])
    for (start, nbytes, name), (following, _, other) in itertools.pairwise(spans):
        if following < start + nbytes:
            raise ValueError(f"out: {name} and {other} share memory")
    return target


def _start(buffer: Storage | memoryview) -> int:
    address: int = np.asarray(buffer).__array_interface__["data"][0]
    return address


def _items(update: Any) -> tuple[Any, list[tuple[str, Any]]]:
    if isinstance(update, Mapping):
        for name in update:
            if not isinstance(name, str):
                raise TypeError(f"names of tensors are strings, not {type(name).__name__}")
        return "dict", list(update.items())
    if isinstance(update, (list, tuple)):
        return "list", [(str(number), value) for number, value in enumerate(update)]
    return "array", [("array", update)]


def _host_array(value: Any, name: str) -> tuple[Storage, dtypes.DType, str]:
    """Return an array in host memory whose bytes are the value's, its dtype and its framework."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return *_from_torch(torch, value, name), "torch"
    framework = "numpy"
    if not isinstance(value, (np.ndarray, np.generic)):
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(value, jax.Array):
            framework = "jax"
        elif hasattr(value, "__cuda_array_interface__"):
            raise BackendError(f"tensor {name!r} is on a GPU and the CUDA module is not built")
        else:
            raise TypeError(f"tensor {name!r} is a {type(value).__name__}, not an array")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(f"tensor {name!r} has masked elements: they have no values")
    array = np.asarray(value)
    dtype = dtypes.BY_NAME.get(array.dtype.name)
    if dtype is None:
        raise TypeError(f"tensor {name!r} has dtype {array.dtype}, which is not supported")
    return array, dtype, framework


def _from_torch(torch: Any, value: Any, name: str) -> tuple[Storage, dtypes.DType]:
    dtype = dtypes.BY_NAME.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided:
        raise TypeError(
            f"tensor {name!r} has dtype {value.dtype} and layout {value.layout}, which is not supported"
        )
    if value.is_meta:
        raise TypeError(f"tensor {name!r} is on the meta device: it has no values")
    if value.device.type != "cpu":
        raise BackendError(f"tensor {name!r} is on {value.device} and the CUDA module is not built")
    value = value.detach().resolve_neg()
    if dtype.name == "bfloat16":
        value = value.view(torch.int16)
    return value.numpy(), dtype


def _numpy_array(storage: Storage, tensor: TensorSpec) -> Storage:
    if tensor.dtype != "bfloat16":
        return storage.view(tensor.dtype).reshape(tensor.shape)
    try:
        import ml_dtypes
    except ImportError:
        wide = storage.astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(tensor.shape)
    narrow: Storage = storage.view(ml_dtypes.bfloat16)
    return narrow.reshape(tensor.shape)


def _torch_tensor(storage: Storage, tensor: TensorSpec) -> Any:
    import torch

    dtype = getattr(torch, tensor.dtype)
    if not storage.size:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.from_numpy(storage.view(np.uint8)).view(dtype).reshape(tensor.shape)


def _jax_array(storage: Storage, tensor: TensorSpec) -> Any:
    import jax.numpy as jnp

    array = _numpy_array(storage, tensor)
    if jnp.result_type(array) != array.dtype:
        raise TypeError(
            f"tensor {tensor.name!r} is {tensor.dtype}: JAX needs jax_enable_x64 for it"
        )
    return jnp.asarray(array)
