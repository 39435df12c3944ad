"""The calls for arrays in a GPU's memory; `ops.cuda_backend` imports it when the first such array comes."""

from __future__ import annotations

import importlib
from typing import Any

_cuda: Any = importlib.import_module("fedcodec._cuda")

body = _cuda  # encode, decode, accumulate and check of whole bodies, as the native module has them

DeviceArray = _cuda.DeviceArray
Memory = _cuda.Memory
Refused = _cuda.Refused
merge = _cuda.merge
mean = _cuda.mean
to_host = _cuda.to_host
from_host = _cuda.from_host
device_of = _cuda.device_of
