"""How much a payload may ask of its decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What `decode` allocates and computes at most on the word of a payload.

    Where the receiver says what it expects, by `like` or `out`, that stands in the place of the first two.

    Attributes
    ----------
    max_bytes : int
        Bytes of the decoded update, and of the terms of a residual, which are decoded before they are summed; 2 GiB by
        default.
    max_tensors : int
        Number of tensors.
    max_decoders : int
        How often the pipelines of a payload name a decoder of an autoencoder, each of which then computes.
    """

    max_bytes: int = 2 << 30
    max_tensors: int = 1 << 16
    max_decoders: int = 1 << 8

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_tensors", "max_decoders"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}, it must be an integer")
            if value < 0:
                raise ValueError(f"{name} is {value}, it must not be negative")
