"""Arrays in a GPU's memory: where torch's, CuPy's and others' are, and new ones; it imports no framework by itself."""

from __future__ import annotations

import functools
import importlib
import math
import operator
import sys
from typing import Any, NamedTuple

import numpy as np

from .. import dtypes
from ..errors import BackendError, DeviceMemoryError


def _module() -> Any:
    return importlib.import_module("fedcodec._cuda")


def is_on_gpu(value: Any) -> bool:
    """Tell whether a value is an array in a GPU's memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_cuda)
    if isinstance(value, (np.ndarray, np.generic)):
        return False
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None and isinstance(value, cupy.ndarray):
        return True
    return hasattr(value, "__cuda_array_interface__")  # of JAX, only arrays that are on a GPU


class Located(NamedTuple):
    """One array in a GPU's memory, row by row."""

    pointer: int
    shape: tuple[int, ...]
    dtype: dtypes.DType
    device: int
    stream: int
    framework: str
    owner: Any
    identity: object  # of tied arrays
    in_place: bool  # it may be written to, and is not a copy


def located(value: Any, name: str, streams: dict[tuple[str, int], int]) -> Located:
    """Find the array that a value is, row by row; a copy of it where its elements lie otherwise.

    `streams`, empty at first, keeps the current ones of frameworks and devices: to ask takes as long as all the rest.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_located(torch, value, name, streams)
    cupy: Any = sys.modules.get("cupy")
    is_cupy = cupy is not None and isinstance(value, cupy.ndarray)
    if hasattr(value, "block_until_ready"):  # JAX's, whose streams nobody is told of
        value.block_until_ready()
    pointer, read_only, shape, strides, stream, dtype = _interface(value, name)
    identity = pointer, shape, strides, dtype.name
    plain = value
    if strides is not None:
        if not is_cupy:
            raise TypeError(f"tensor {name!r} is not contiguous")
        plain = cupy.ascontiguousarray(value)
        pointer = _interface(plain, name)[0]
    if pointer % dtype.itemsize:
        raise TypeError(f"tensor {name!r} is not aligned to its elements")
    device = 0
    if is_cupy:
        device = int(value.device.id)
        if ("cupy", device) not in streams:
            streams["cupy", device] = cupy.cuda.get_current_stream(device).ptr
        stream = streams["cupy", device]
    elif 0 not in shape:
        device = _module().device_of(pointer)
        if device < 0:
            raise TypeError(f"tensor {name!r} says that it is on a GPU, but its memory is on none")
    in_place = plain is value and not read_only
    return Located(pointer, shape, dtype, device, stream, "cupy", plain, identity, in_place)


def _interface(
    value: Any, name: str
) -> tuple[int, bool, tuple[int, ...], tuple[int, ...] | None, int, dtypes.DType]:
    """Read ``__cuda_array_interface__``: strides are None where elements lie row by row."""
    interface = value.__cuda_array_interface__
    try:
        pointer, read_only = interface["data"]
        shape = tuple(map(operator.index, interface["shape"]))
        host, dtype = _dtype(interface["typestr"])
        strides = interface.get("strides")
        strides = None if strides is None else tuple(map(operator.index, strides))
        stream = operator.index(interface.get("stream") or 1)  # the legacy default stream
        pointer = operator.index(pointer or 0)
        nbytes = math.prod(shape) * host.itemsize
        valid = (
            all(0 <= number < 1 << 63 for number in (*shape, nbytes))
            and all(0 <= number < 1 << 64 for number in (pointer, stream))
            and (pointer > 0 or nbytes == 0)
            and (strides is None or len(strides) == len(shape))
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        valid = False
    if not valid or interface.get("mask") is not None:
        raise TypeError(f"tensor {name!r} has a __cuda_array_interface__ that is none, or masked")
    if host.kind == "V":  # NumPy has no name for it, the array's own framework has
        dtype = dtypes.BY_NAME.get(str(getattr(value, "dtype", host)))
    if dtype is None or dtype.itemsize != host.itemsize or not host.isnative:
        raise TypeError(f"tensor {name!r} has dtype {host}, which is not supported")
    if strides is not None:
        dense = tuple(
            math.prod(shape[axis + 1 :]) * host.itemsize if shape[axis] != 1 else None
            for axis in range(len(shape))
        )
        if 0 in shape or all(
            wanted in (None, stride) for wanted, stride in zip(dense, strides, strict=True)
        ):
            strides = None
    return pointer, bool(read_only), shape, strides, stream, dtype


@functools.lru_cache(maxsize=64)
def _dtype(text: str) -> tuple[np.dtype[Any], dtypes.DType | None]:
    host = np.dtype(str(text))
    return host, dtypes.BY_NAME.get(host.name)


def _torch_located(
    torch: Any, value: Any, name: str, streams: dict[tuple[str, int], int]
) -> Located:
    dtype = dtypes.BY_NAME.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided:
        raise TypeError(
            f"tensor {name!r} has dtype {value.dtype} and layout {value.layout}, which is not supported"
        )
    plain = value
    if value.is_neg() or not value.is_contiguous():
        plain = value.detach().resolve_neg().contiguous()
    pointer = value.data_ptr()
    device = value.get_device()
    if ("torch", device) not in streams:
        streams["torch", device] = torch.cuda.current_stream(device).cuda_stream
    return Located(
        plain.data_ptr(),
        tuple(plain.shape),
        dtype,
        device,
        streams["torch", device],
        "torch",
        plain,
        (pointer, tuple(value.shape), value.stride(), value.is_neg(), dtype.name),
        plain.data_ptr() == pointer,
    )


def empty(framework: str, shape: tuple[int, ...], dtype: str, device: int) -> Any:
    """Make an array of torch or CuPy.

    Raises
    ------
    BackendError
        If the framework is not installed.
    DeviceMemoryError
        If the device lacks the memory.
    """
    try:
        module = importlib.import_module(framework)
    except ImportError as error:
        raise BackendError(
            f"results are {framework}'s, which cannot be imported: {error}"
        ) from error
    lacks = module.cuda.OutOfMemoryError if framework == "torch" else MemoryError
    try:
        if framework == "torch":
            return module.empty(shape, dtype=getattr(module, dtype), device=f"cuda:{device}")
        with module.cuda.Device(device):
            return module.empty(shape, dtype)
    except lacks as error:
        raise DeviceMemoryError(f"the result needs more memory than there is: {error}") from None


class GpuArray:
    """An array on a GPU as the functions of `fedcodec.ops` see it: in row-major order, of a shape."""

    def __init__(self, value: Any, name: str) -> None:
        found = located(value, name, {})
        if found.dtype.name == "bfloat16":
            raise TypeError(f"{name} has dtype bfloat16: pass its bits, as uint16")
        self.value, self.shape, self.dtype = value, found.shape, found.dtype.host
        self.size = math.prod(found.shape)
        self.framework, self.device, self.writable = found.framework, found.device, found.in_place
        torch = sys.modules.get("torch")
        if "cupy" not in sys.modules and torch is not None and torch.cuda.is_available():
            self.framework = "torch"  # of arrays that neither of the two has made
        self.storage = _module().DeviceArray(
            found.pointer, self.size, found.dtype.id, found.device, found.stream, found.owner
        )

    def reshape(self, *shape: Any) -> GpuArray:
        """As NumPy's, the elements being as many."""
        made = object.__new__(GpuArray)
        made.__dict__.update(self.__dict__)
        made.shape = (self.size,) if shape == (-1,) else shape[0]
        return made

    def new(self, shape: tuple[int, ...], dtype: Any) -> GpuArray:
        """Make an array beside it, of its framework."""
        name = np.dtype(dtype).name
        return GpuArray(empty(self.framework, shape, name, self.device), "result")

    def copy(self) -> GpuArray:
        """Return a copy beside it."""
        return self.new(self.shape, self.dtype).copy_from(self)

    def copy_from(self, other: GpuArray) -> GpuArray:
        """Copy the elements of another of its size and dtype."""
        _module().ops.copy(other.storage, self.storage)
        return self

    def shares_memory(self, other: GpuArray) -> bool:
        """Tell whether it has bytes in common with another."""
        (a, n), (b, m) = ((at.storage.pointer, at.storage.nbytes) for at in (self, other))
        return bool(n and m and a < b + m and b < a + n)

    def host(self) -> np.ndarray[Any, Any]:
        """Copy it to the host."""
        data = _module().to_host(self.storage)
        return np.frombuffer(data, self.dtype).reshape(self.shape).copy()

    def fill(self, host: np.ndarray[Any, Any]) -> GpuArray:
        """Copy values of its shape and dtype from the host."""
        _module().from_host(self.storage, np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        return self

    def unwrapped(self) -> Any:
        """Return the framework's own array."""
        return (
            self.value if self.shape == tuple(self.value.shape) else self.value.reshape(self.shape)
        )
