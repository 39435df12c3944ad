"""Symmetric integers: 8 bits, or 2 to 7."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..codec import Draws, Quantize
from ..errors import DecodeError
from ..reader import Reader, varint
from ..registry import WireReader, WireStage, builtin
from . import _check

Granularity = Literal["block", "group", "channel"]
_GRANULARITIES: tuple[Granularity, ...] = ("block", "group", "channel")
_MAX_BLOCK = 1 << 40
_MAX_AXIS = 31


class _Integers(Quantize):
    """What both stages share; their fields are declared below."""

    bits: int
    block_size: int | None
    axis: int | None
    stochastic: bool
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis is not None:
            _check.integer("axis", self.axis, 0, _MAX_AXIS)
        if self.block_size is not None:
            _check.integer("block_size", self.block_size, 1, _MAX_BLOCK)
        _check.integer("seed", self.seed, 0)
        if not isinstance(self.stochastic, bool):
            raise TypeError(f"stochastic is {self.stochastic!r}, it must be True or False")

    @property
    def needs_select(self) -> bool | None:
        """Channels exist only where every value of a tensor is there."""
        return None if self.axis is None else False

    def _granularity(self) -> tuple[Granularity, int]:
        if self.axis is not None:
            return "channel", self.axis
        return ("group", 0) if self.block_size is None else ("block", self.block_size)

    def _wire(self, first_id: int, head: bytes) -> tuple[int, bytes]:
        granularity, size = self._granularity()
        tail = b"" if granularity == "group" else varint(size)
        return first_id + _GRANULARITIES.index(granularity), head + tail

    def coder(self, draws: Draws) -> Any:
        """Describe it to the body coder."""
        return (
            "integer",
            self.bits,
            *self._granularity(),
            self.stochastic,
            self.seed,
            draws.call_seed if self.stochastic else 0,
        )


def _readers(first_id: int, read_bits: Callable[[Reader], int]) -> dict[str, WireReader]:
    def reader_of(granularity: Granularity) -> WireReader:
        def read(reader: Reader) -> WireStage:
            bits, size = read_bits(reader), 0
            arguments = [] if bits == 8 else [str(bits)]
            if granularity == "block":
                size = _check.positive(reader, "block size")
                arguments.append(f"block_size={size}")
            elif granularity == "channel":
                size = reader.varint()
                arguments.append(f"axis={size}")
            else:
                arguments.append("block_size=None")
            if size > (_MAX_AXIS if granularity == "channel" else _MAX_BLOCK):
                raise DecodeError(f"{arguments[-1]} is too large", offset=reader.offset)
            text = f"{'int8' if bits == 8 else 'kbit'}({', '.join(arguments)})"
            return WireStage("quantize", text, ("integer", bits, granularity, size))

        return read

    return {
        f"id_{first_id + number:x}": reader_of(granularity)
        for number, granularity in enumerate(_GRANULARITIES)
    }


def _read_bits(reader: Reader) -> int:
    bits = reader.byte()
    if not 2 <= bits <= 7:
        raise DecodeError(f"{bits} bits, from 2 to 7 are possible", offset=reader.offset - 1)
    return bits


@builtin(**_readers(0x30, lambda reader: 8))
@dataclass(frozen=True, repr=False)
class Int8(_Integers):
    """Symmetric 8-bit integers, -127 to 127, times a float32 scale.

    Parameters
    ----------
    block_size : int or None
        Number of (kept) values that share a scale; None for one scale a tensor, or one for all that a select stage over
        the whole update keeps.
    axis : int, optional
        One scale for each channel of this axis instead; tensors without the axis get one scale. Not after a select
        stage.
    stochastic : bool
        Round up or down at random so that the mean is right, instead of to the nearest integer.
    seed : int
        From 0 to 2^64 - 1, for stochastic rounding.

    References
    ----------
    Sprenger, uniform symmetric quantizer and its granularities. Yan, eq. 4 to 6.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.Int8().encode(np.array([1, 0.5, -127, 0, 2, 3], np.float32)))
    array([   1.,    0., -127.,    0.,    2.,    3.], dtype=float32)
    """

    block_size: int | None = 1024
    axis: int | None = None
    stochastic: bool = False
    seed: int = 0
    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8  # type: ignore[misc]

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the granularity and its size."""
        return self._wire(0x30, b"")


@builtin(**_readers(0x33, _read_bits))
@dataclass(frozen=True, repr=False)
class KBit(_Integers):
    """Symmetric integers of 2 to 7 bits, packed without gaps, times a float32 scale.

    Parameters
    ----------
    bits : int
        From 2 (-1, 0, 1) to 7 (-63 to 63).
    block_size, axis, stochastic, seed
        As for `Int8`.

    References
    ----------
    Sprenger, uniform symmetric quantizer.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.KBit(4).encode(np.arange(-7, 8, dtype=np.float32)))
    array([-7., -6., -5., -4., -3., -2., -1.,  0.,  1.,  2.,  3.,  4.,  5.,
            6.,  7.], dtype=float32)
    """

    bits: int
    block_size: int | None = 1024
    axis: int | None = None
    stochastic: bool = False
    seed: int = 0
    name: ClassVar[str] = "kbit"

    def __post_init__(self) -> None:
        _check.integer("bits", self.bits, 2, 7)
        super().__post_init__()

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the granularity, the bits and the size."""
        return self._wire(0x33, bytes([self.bits]))
