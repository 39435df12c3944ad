"""Arrays on a GPU for tests: torch's on a real one, a stand-in for CuPy's where the CUDA module is the emulated one."""

import fake_cupy
import numpy as np

from fedcodec import ops

MISSING = ops.cuda_missing()
EMULATED = MISSING is None and ops.cuda_backend().body.emulated
FRAMEWORK = "cupy" if EMULATED else "torch"

if EMULATED:
    fake_cupy.install()


def put(value):
    """Copy an update to the GPU."""
    if isinstance(value, dict):
        return {name: put(item) for name, item in value.items()}
    if isinstance(value, list):
        return [put(item) for item in value]
    value = np.asarray(value)
    if EMULATED:
        return fake_cupy.ndarray(value.copy())
    import torch

    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16).cuda()
    return torch.from_numpy(value.copy()).cuda()


def get(value):
    """Copy it back to NumPy."""
    if isinstance(value, dict):
        return {name: get(item) for name, item in value.items()}
    if isinstance(value, list):
        return [get(item) for item in value]
    if EMULATED:
        return value.host
    import ml_dtypes
    import torch

    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return value.cpu().numpy()
