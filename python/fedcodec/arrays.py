"""The only Python file that knows array frameworks; it imports none that is not loaded already.

`read` turns an update into a spec and contiguous arrays that share its memory where they can; `writable` does so for
where a decoded update goes.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import dtypes, gpu, ops
from .errors import BackendError, shortened
from .ops import gpu_arrays
from .spec import MAX_DIMENSIONS, Spec, TensorSpec

Storage: TypeAlias = npt.NDArray[Any]
Structure: TypeAlias = Literal["array", "list", "dict"]
FRAMEWORKS = ("numpy", "torch", "jax", "cupy")

_BFLOAT16 = dtypes.BY_NAME["bfloat16"].id
# By what `_see` sees of an update: the same layout comes round by round.
_specs: dict[object, Spec] = {}
_MOST_SPECS = 64


class Update(NamedTuple):
    """An update as coders see it: `storage[i]`, contiguous, has the values of `spec.untied[i]` or their bits."""

    spec: Spec
    storage: list[Any]
    framework: str
    device: int | None = None  # the number of a GPU; None for the CPU


def read(update: Any) -> Update:
    """Describe an update and give access to its values, without a copy where memory is contiguous.

    Raises
    ------
    TypeError
        If it is not a dict, list or tuple of arrays, or one array, of supported dtypes.
    BackendError
        If an array lives on a GPU and the CUDA module cannot be used.
    """
    parts = _parts(update)
    plain = _see(*parts)
    return _read(*parts) if plain is None else _opened(plain)


def read_on_host(update: Any) -> Update:
    """Do `read`, with copies of what is on a GPU."""
    seen = read(update)
    return (
        seen if seen.device is None else seen._replace(storage=list(map(gpu.to_host, seen.storage)))
    )


def spec_of(update: Any) -> tuple[Spec, str]:
    """Return the spec of an update and its framework: `read`, without access to the values."""
    parts = _parts(update)
    seen = _see(*parts) or _read(*parts)
    return seen.spec, seen.framework


def _parts(update: Any) -> tuple[Structure, tuple[Any, ...], list[Any]]:
    """Return the structure, the keys of a dictionary and the values."""
    if isinstance(update, (dict, Mapping)):  # to ask the abstract class takes longer
        return "dict", tuple(update), list(update.values())
    if isinstance(update, (list, tuple)):
        return "list", (), list(update)
    return "array", (), [update]


class _Plain(NamedTuple):
    """An update of plain arrays: NumPy's own, or DLPack's capsules."""

    spec: Spec
    items: list[Any]
    framework: str


def _see(
    structure: Structure,
    keys: tuple[Any, ...],
    values: list[Any],
    source: memoryview | None = None,
    *,
    writable: bool = False,
) -> _Plain | None:
    """Look at an update by one native call; None where that cannot be or something needs a closer look."""
    native = getattr(ops.backend(), "body", None)
    if native is None:
        return None
    framework = "numpy"
    items = values
    torch = sys.modules.get("torch")
    if torch is not None and values and isinstance(values[0], torch.Tensor):
        if values[0].is_cuda:
            return None
        framework = "torch"
        try:
            items = _capsules(torch, values)
        except (BufferError, RuntimeError, TypeError):
            return None
    described = native.describe(items, source, writable)
    if described is None:
        return None
    key = structure, keys, described
    spec = _specs.get(key)
    if spec is None:
        spec = _read(structure, keys, values).spec
        if len(_specs) >= _MOST_SPECS:
            _specs.clear()
        _specs[key] = spec
    return _Plain(spec, items, framework)


def _opened(plain: _Plain) -> Update:
    storage = plain.items
    if plain.framework == "torch":
        storage = ops.backend().body.arrays_over(storage)
    return Update(plain.spec, storage, plain.framework)


def _capsules(torch: Any, values: list[Any]) -> list[Any]:
    """Export tensors by DLPack, which takes a third of the time of `numpy()`."""
    # Subclasses may have no memory, and DLPack has no word for a pending negation.
    if not {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, values)):
        raise TypeError
    if any(map(torch.Tensor.is_neg, values)):
        raise TypeError
    return list(map(torch.utils.dlpack.to_dlpack, values))


def _read(structure: Structure, keys: tuple[Any, ...], values: list[Any]) -> Update:
    if values and gpu_arrays.is_on_gpu(values[0]):
        return _read_gpu(structure, keys, values, None)
    tensors: list[TensorSpec] = []
    storage: list[Storage] = []
    seen: dict[object, int] = {}
    alive: list[Storage] = []  # or the memory of a temporary could pass for a tie of the next
    framework = "numpy"
    for number, (name, value) in enumerate(
        zip(_names(structure, keys, len(values)), values, strict=True)
    ):
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


def shaped(storage: Sequence[Storage], spec: Spec) -> list[Storage]:
    """Return storage in the shapes and dtypes that `build` takes: the same memory."""
    return [
        array.view(dtypes.BY_ID[number].host).reshape(shape)
        for array, number, shape in zip(storage, spec.dtype_ids, spec.shapes, strict=True)
    ]


def build(spec: Spec, arrays: Sequence[Storage], framework: str) -> Any:
    """Return the update of a spec whose untied tensors are such arrays as a decoder makes; tied ones come back tied.

    Raises
    ------
    TypeError
        If the framework has no such dtype: 64-bit ones in JAX without ``jax_enable_x64``.
    """
    makers = {"numpy": _numpy_arrays, "torch": _torch_tensors, "jax": _jax_arrays}
    if framework not in makers:
        raise ValueError(f"framework {framework!r} is for results on a GPU: pass device='cuda'")
    return tied(spec, makers[framework](spec, arrays))


def tied(spec: Spec, untied: list[Any]) -> Any:
    """Return the update of a spec, with its tied tensors, from one value for each of the others."""
    if len(untied) == len(spec.tensors):
        return pack(spec, untied)
    following = iter(untied)
    values: list[Any] = []
    for tensor in spec.tensors:
        values.append(next(following) if tensor.tied_to is None else values[tensor.tied_to])
    return pack(spec, values)


def require_framework(framework: str) -> None:
    """Refuse a framework that is unknown or not installed, before the work is done.

    Raises
    ------
    ValueError
        If it is none of "numpy", "torch" and "jax".
    BackendError
        If it cannot be imported.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"unknown framework {framework!r}: one of {FRAMEWORKS}")
    try:
        importlib.import_module(framework)
    except ImportError as error:
        raise BackendError(f"framework {framework!r} cannot be imported: {error}") from error


def pack(spec: Spec, values: list[Any]) -> Any:
    """Put one value per tensor into the structure of a spec."""
    if spec.structure == "dict":
        return dict(zip(spec.names, values, strict=True))
    return values if spec.structure == "list" else values[0]


def writable(update: Any, source: memoryview) -> Update:
    """Like `read`, for arrays to be filled from the bytes of `source`.

    Raises
    ------
    ValueError
        If an array is read-only, not contiguous, not aligned or of foreign byte order: it cannot be filled in place. Or
        if it shares memory with the source, or with another array that it is not tied to.
    """
    structure, keys, values = parts = _parts(update)
    if values and gpu_arrays.is_on_gpu(values[0]):
        return _read_gpu(*parts, source)
    plain = _see(*parts, source, writable=True)
    if plain is not None:
        return _opened(plain)
    for name, value in zip(_names(structure, keys, len(values)), values, strict=True):
        array, _, framework = _host_array(value, name)
        native = isinstance(value, np.ndarray) and value.dtype.isnative
        shared = not value.is_neg() if framework == "torch" else native
        if not (shared and array.flags.carray):  # contiguous, aligned and writable
            raise ValueError(f"out: tensor {name!r} is not a writable, contiguous array")
    target = _read(*parts)
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


def _names(structure: Structure, keys: tuple[Any, ...], number: int) -> Sequence[str]:
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"names of tensors are strings, not {type(key).__name__}")
    return (
        keys
        if structure == "dict"
        else ["array"]
        if structure == "array"
        else list(map(str, range(number)))
    )


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
        elif gpu_arrays.is_on_gpu(value):
            raise TypeError(
                f"tensor {name!r} is on a GPU, the first is not: move all to one device"
            )
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
    if value.is_cuda:
        raise TypeError(f"tensor {name!r} is on a GPU, the first is not: move all to one device")
    if value.device.type != "cpu":
        raise BackendError(f"tensor {name!r} is on {value.device}, which no backend is for")
    value = value.detach().resolve_neg()
    if dtype.name == "bfloat16":
        value = value.view(torch.int16)
    return value.numpy(), dtype


def _numpy_arrays(spec: Spec, arrays: Sequence[Storage]) -> list[Any]:
    if _BFLOAT16 not in spec.dtype_ids:
        return list(arrays)
    return [
        _bfloat16(array) if number == _BFLOAT16 else array
        for array, number in zip(arrays, spec.dtype_ids, strict=True)
    ]


def _bfloat16(bits: Storage) -> Storage:
    try:
        import ml_dtypes
    except ImportError:
        wide = bits.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    narrow: Storage = bits.view(ml_dtypes.bfloat16)
    return narrow


def _torch_tensors(spec: Spec, arrays: Sequence[Storage]) -> list[Any]:
    import torch

    if _BFLOAT16 not in spec.dtype_ids:
        return list(map(torch.from_numpy, arrays))
    return [
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if number == _BFLOAT16
        else torch.from_numpy(array)
        for array, number in zip(arrays, spec.dtype_ids, strict=True)
    ]


def _jax_arrays(spec: Spec, arrays: Sequence[Storage]) -> list[Any]:
    import jax.numpy as jnp

    arrays = _numpy_arrays(spec, arrays)
    for array, tensor in zip(arrays, spec.untied, strict=True):
        if jnp.result_type(array) != array.dtype:
            raise TypeError(
                f"tensor {tensor.name!r} is {tensor.dtype}: JAX needs jax_enable_x64 for it"
            )
    return [jnp.asarray(array) for array in arrays]


# --- GPUs ---------------------------------------------------------------------------------------------------------


def device_number(device: Any) -> int | None:
    """Return the number of the GPU that a text names; None for the CPU.

    Raises
    ------
    BackendError
        If it names neither, or the GPU is not there.
    """
    text = str(device)
    if device is None or text == "cpu":
        return None
    found = re.fullmatch(r"cuda(?::(\d{1,4}))?", text)
    if found is None:
        raise BackendError(f"device {shortened(text)!r} is none of 'cpu', 'cuda' and 'cuda:N'")
    try:
        count = ops.cuda_backend().body.device_count()
    except BackendError as error:
        raise BackendError(f"device {text!r}: {error}") from None
    number = int(found[1] or 0)
    if number >= count:
        raise BackendError(f"device {text!r} is not there: there are {count}")
    return number


def _read_gpu(
    structure: Structure, keys: tuple[Any, ...], values: list[Any], source: memoryview | None
) -> Update:
    """Do `_read`'s work for arrays on one GPU; with a source, `writable`'s."""
    names = _names(structure, keys, len(values))
    try:
        cuda = ops.cuda_backend()
    except BackendError as error:
        raise BackendError(f"tensor {names[0]!r} is on a GPU: {error}") from None
    layout: list[tuple[str, tuple[int, ...], int | None]] = []
    storage: list[Any] = []
    seen: dict[object, int] = {}
    streams: dict[tuple[str, int], int] = {}
    device, framework = None, ""
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        if not gpu_arrays.is_on_gpu(value):
            raise TypeError(
                f"tensor {name!r} is not on the GPU of the first: move all to one device"
            )
        found = gpu_arrays.located(value, name, streams)
        device, framework = found.device if device is None else device, found.framework
        if found.device != device:
            raise TypeError(f"tensor {name!r} is on GPU {found.device}, the first on {device}")
        if len(found.shape) > MAX_DIMENSIONS:
            raise TypeError(
                f"tensor {name!r} has {len(found.shape)} dimensions, not {MAX_DIMENSIONS}"
            )
        if source is not None and not found.in_place:
            raise ValueError(f"out: tensor {name!r} is not a writable, contiguous array")
        size = math.prod(found.shape)
        tied_to = seen.setdefault(found.identity, number) if size else number
        if tied_to != number:
            layout.append((found.dtype.name, found.shape, tied_to))
            continue
        layout.append((found.dtype.name, found.shape, None))
        storage.append(
            cuda.DeviceArray(found.pointer, size, found.dtype.id, device, found.stream, found.owner)
        )
    # The same object for the same layout: what is kept between calls goes by it.
    key = structure, keys, tuple(layout)
    spec = _specs.get(key)
    if spec is None:
        described = zip(names, layout, strict=True)
        spec = Spec(structure, tuple(TensorSpec(name, *how) for name, how in described))
        if len(_specs) >= _MOST_SPECS:
            _specs.clear()
        _specs[key] = spec
    if source is not None:
        spans = sorted(
            (array.pointer, array.nbytes, tensor.name)
            for array, tensor in zip(storage, spec.untied, strict=True)
            if array.n
        )
        for (start, nbytes, name), (following, _, other) in itertools.pairwise(spans):
            if following < start + nbytes:
                raise ValueError(f"out: tensor {name!r} and tensor {other!r} share memory")
    return Update(spec, storage, framework, device)


def host_framework(framework: str) -> str:
    """Return the framework of results on the CPU that nobody named one for."""
    return "numpy" if framework == "cupy" else framework


def empty_on_gpu(
    spec: Spec, framework: str | None, source: str, device: int
) -> tuple[list[Any], list[Any]]:
    """Return new arrays of a spec's untied tensors on a GPU, and their storage.

    Without a framework it is the source's where that has arrays there, else torch where it is imported, else CuPy.

    Raises
    ------
    ValueError
        If the framework has no arrays on a GPU that can be filled.
    TypeError
        If it has no such dtype.
    BackendError
        If there is no such GPU for the framework, or it lacks the memory.
    """
    if framework is None:
        torch = sys.modules.get("torch")
        can = torch is not None and torch.cuda.is_available()
        framework = source if source in ("torch", "cupy") else "torch" if can else "cupy"
        require_framework(framework)
    if framework not in ("torch", "cupy"):
        raise ValueError(
            f"framework {framework!r} has no arrays on a GPU to be filled: use 'torch' or 'cupy'"
        )
    module = importlib.import_module(framework)
    if framework == "torch" and not module.cuda.is_available():
        raise BackendError("torch finds no GPU: this build of it may have no CUDA")
    values = []
    for tensor in spec.untied:
        if framework == "cupy" and tensor.dtype == "bfloat16":
            raise TypeError(f"tensor {tensor.name!r} is bfloat16, which CuPy lacks: use 'torch'")
        values.append(gpu_arrays.empty(framework, tensor.shape, tensor.dtype, device))
    streams: dict[tuple[str, int], int] = {}
    found = [
        gpu_arrays.located(value, tensor.name, streams)
        for value, tensor in zip(values, spec.untied, strict=True)
    ]
    array = ops.cuda_backend().DeviceArray
    storage = [
        array(at.pointer, tensor.size, at.dtype.id, device, at.stream, at.owner)
        for at, tensor in zip(found, spec.untied, strict=True)
    ]
    return values, storage
