"""How much a payload may ask of its decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What `decode` allocates at most on the word of a payload; `like` and `out` replace them.

    Attributes
    ----------
    max_bytes : int
        Bytes of the decoded update, and of the terms of a residual, which are decoded before they are summed; 2 GiB by
        default.
    max_tensors : int
        Number of tensors.
    """

    max_bytes: int = 2 << 30
    max_tensors: int = 1 << 16

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_tensors"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}, it must be an integer")
            if value < 0:
                raise ValueError(f"{name} is {value}, it must not be negative")
