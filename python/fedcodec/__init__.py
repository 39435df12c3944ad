"""fedcodec: model updates to small, verified bytes and back, and sums straight from those bytes.

>>> import numpy as np, fedcodec as fc
>>> codec = fc.TopK(0.01) | fc.Int8()
>>> payload = codec.encode({"weight": np.linspace(-1, 1, 1000, dtype=np.float32)})
>>> restored = fc.decode(payload)
>>> int(np.count_nonzero(restored["weight"]))
10
"""

from . import ops
from .accounting import break_even, savings_ratio
from .aggregate import Aggregator
from .codec import Codec, Lossless, Quantizer
from .codecs import (
    AutoEncoder,
    Cast,
    Decoder,
    Funnel,
    Int8,
    KBit,
    Mask,
    RandomK,
    Raw,
    Residual,
    Sign,
    Snapshots,
    Sparse,
    Structured,
    Ternary,
    Threshold,
    TopK,
    Zstd,
    flatten,
)
from .errors import BackendError, DecodeError, FedcodecError, NonFiniteError, SpecMismatch
from .feedback import ErrorFeedback
from .information import info
from .limits import Limits
from .ops import get_num_threads, set_num_threads
from .pipeline import PayloadInfo, decode, inspect
from .registry import from_config, register
from .shared import MaskBits, Shared
from .shared import digest_of as digest
from .spec import Spec, TensorSpec
from .text import parse

__version__ = "0.1.0.dev0"

__all__ = [
    "Aggregator",
    "AutoEncoder",
    "BackendError",
    "Cast",
    "Codec",
    "DecodeError",
    "Decoder",
    "ErrorFeedback",
    "FedcodecError",
    "Funnel",
    "Int8",
    "KBit",
    "Limits",
    "Lossless",
    "Mask",
    "MaskBits",
    "NonFiniteError",
    "PayloadInfo",
    "Quantizer",
    "RandomK",
    "Raw",
    "Residual",
    "Shared",
    "Sign",
    "Snapshots",
    "Sparse",
    "Spec",
    "SpecMismatch",
    "Structured",
    "TensorSpec",
    "Ternary",
    "Threshold",
    "TopK",
    "Zstd",
    "break_even",
    "decode",
    "digest",
    "flatten",
    "from_config",
    "get_num_threads",
    "info",
    "inspect",
    "ops",
    "parse",
    "register",
    "savings_ratio",
    "set_num_threads",
]
