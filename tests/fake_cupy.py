"""As much of CuPy as fedcodec asks for, over host memory: where the CUDA module is the emulated one."""

import contextlib
import sys
import types

import numpy as np

STREAM = 7  # tests see it arrive


class ndarray:  # noqa: N801 (CuPy's name)
    """An array whose memory passes for a GPU's."""

    def __init__(self, host):
        self.host = host
        self.dtype = host.dtype
        self.shape = host.shape
        self.device = types.SimpleNamespace(id=0)

    def reshape(self, shape):
        return ndarray(self.host.reshape(shape))

    @property
    def __cuda_array_interface__(self):
        host = self.host
        plain = host.flags.c_contiguous
        return {
            "shape": host.shape,
            "typestr": host.dtype.str,
            "data": (host.ctypes.data, not host.flags.writeable),
            "strides": None if plain else host.strides,
            "version": 3,
        }


def module():
    """Make a module that can stand in for CuPy."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.empty = lambda shape, dtype: ndarray(np.empty(shape, dtype))
    cupy.ascontiguousarray = lambda array: (
        array if array.host.flags.c_contiguous else ndarray(np.ascontiguousarray(array.host))
    )
    cupy.cuda = types.SimpleNamespace(
        Device=lambda number: contextlib.nullcontext(number),
        get_current_stream=lambda device: types.SimpleNamespace(ptr=STREAM),
    )
    return cupy


def install():
    """Put it in CuPy's place."""
    sys.modules["cupy"] = module()
