"""Arrays in a GPU's memory, as coders see them; what has no kernel there goes by the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import dtypes, ops

_T = TypeVar("_T")
# The default stream of the calling thread: for memory that no framework has work on.
OWN_STREAM = 2


def is_on_gpu(array: Any) -> bool:
    """Tell whether it is storage on a GPU, or values to be filled there and what they are the sum of."""
    array = array[0] if isinstance(array, tuple) else array
    return not isinstance(array, np.ndarray)


def backend_of(storage: Sequence[Any]) -> Any:
    """Return the module whose coders take such storage."""
    return ops.cuda_backend() if storage and is_on_gpu(storage[0]) else ops.backend()


def new(n: int, dtype: int, device: int, *, zeros: bool = False) -> Any:
    """Return new memory on a device for `n` elements of a dtype, by its id."""
    cuda = ops.cuda_backend()
    memory = cuda.Memory(n * dtypes.BY_ID[dtype].itemsize, device, OWN_STREAM, zeros)
    return cuda.DeviceArray(memory.pointer, n, dtype, device, OWN_STREAM, memory)


def moved(array: npt.NDArray[Any], device: int) -> Any:
    """Copy an array of float32 or float64 to a device."""
    made = new(array.size, dtypes.BY_NAME[array.dtype.name].id, device)
    ops.cuda_backend().from_host(made, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return made


def restored(data: bytes, n: int, dtype: int, device: int) -> Any:
    """Make an array on a device of its bytes: what a pickle of one calls."""
    made = new(n, dtype, device)
    ops.cuda_backend().from_host(made, data)
    return made


def to_host(array: Any) -> npt.NDArray[Any]:
    """Copy to an array as coders of the CPU see it."""
    storage = dtypes.BY_ID[array.dtype].storage
    host: npt.NDArray[Any] = np.frombuffer(ops.cuda_backend().to_host(array), storage).copy()
    return host


def by_host(arrays: Sequence[Any], run: Callable[[list[Any]], _T], *, filled: bool) -> _T:
    """Run what takes the CPU's arrays on copies; with `filled`, and of tuples the first, copy back what it wrote."""
    copies: list[Any] = [
        tuple(map(to_host, array)) if isinstance(array, tuple) else to_host(array)
        for array in arrays
    ]
    result = run(copies)
    for array, copy in zip(arrays, copies, strict=True):
        if isinstance(array, tuple):
            ops.cuda_backend().from_host(array[0], copy[0].view(np.uint8))
        elif filled:
            ops.cuda_backend().from_host(array, copy.view(np.uint8))
    return result


class HostDecoder:
    """A decoder of the CPU, for arrays on a GPU."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.check = decoder.check

    def opened(self, payload: Any, start: int, stop: int) -> HostDecoder:
        """As `fedcodec.body.Decoder` does; itself where its decoder computes the same again."""
        opened = getattr(self._decoder, "opened", None)
        return self if opened is None else HostDecoder(opened(payload, start, stop))

    def decode(self, payload: Any, start: int, stop: int, arrays: Sequence[Any]) -> Any:
        """As the native one."""
        by_host(
            arrays,
            lambda copies: self._decoder.decode(payload, start, stop, copies),
            filled=True,
        )
        return arrays

    def accumulate(
        self, payload: Any, start: int, stop: int, accumulators: Sequence[Any], *options: Any
    ) -> Any:
        """As the native one."""
        return by_host(
            accumulators,
            lambda copies: self._decoder.accumulate(payload, start, stop, copies, *options),
            filled=True,
        )
