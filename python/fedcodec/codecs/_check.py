"""Checks of parameters that several stages share."""

from __future__ import annotations

import math
import operator

from ..codec import SCOPES
from ..errors import DecodeError
from ..reader import Reader

MAX_SEED = (1 << 64) - 1


def number(name: str, value: object) -> None:
    """Raise unless it is an int or a float, whose text gives it back."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, it must be a number")


def density(value: float) -> None:
    """Raise unless 0 < value <= 1."""
    number("density", value)
    if not 0 < value <= 1:
        raise ValueError(f"density is {value}, it must be above 0 and at most 1")


def scope(value: str) -> None:
    """Raise unless it is a known scope."""
    if value not in SCOPES:
        raise ValueError(f"scope is {value!r}, it must be one of {', '.join(map(repr, SCOPES))}")


def integer(name: str, value: int, least: int, most: int = MAX_SEED) -> None:
    """Raise unless it is an integer from least to most."""
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, it must be an integer") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, it must be an integer")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, it must be from {least} to {most}")


def kept(n: int, share: float) -> int:
    """Return max(1, round-half-even(share * n)), and 0 for n = 0 (docs/numerics.md, section 2)."""
    return max(1, round(share * n)) if n else 0


def finite(name: str, value: float) -> None:
    """Raise unless it is a finite number that is not negative."""
    number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, it must be finite and not negative")


def positive(reader: Reader, what: str) -> int:
    """Read a varint that must not be zero."""
    value = reader.varint()
    if value == 0:
        raise DecodeError(f"{what} is zero", offset=reader.offset)
    return value
