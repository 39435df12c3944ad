"""The stages of this library, one file each."""

from .autoencoder import AutoEncoder, Decoder
from .cast import Cast
from .funnel import Funnel, Snapshots, flatten
from .integers import Int8, KBit
from .mask import Mask
from .random_k import RandomK
from .raw import Raw
from .residual import Residual
from .signs import Sign, Ternary
from .sparse import Sparse, Threshold, TopK
from .structured import Structured
from .zstd import Zstd

__all__ = [
    "AutoEncoder",
    "Cast",
    "Decoder",
    "Funnel",
    "Int8",
    "KBit",
    "Mask",
    "RandomK",
    "Raw",
    "Residual",
    "Sign",
    "Snapshots",
    "Sparse",
    "Structured",
    "Ternary",
    "Threshold",
    "TopK",
    "Zstd",
    "flatten",
]
