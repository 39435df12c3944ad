"""Lossless compression of what the other stages leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import zstandard

from ..codec import Lossless
from ..reader import Reader
from ..registry import WireStage, builtin
from . import _check


def _read(reader: Reader) -> WireStage:
    return WireStage("lossless", "zstd", Zstd())


@builtin(id_50=_read)
@dataclass(frozen=True, repr=False)
class Zstd(Lossless):
    """Compress a segment with Zstandard; where that gains nothing, the bytes travel as they are.

    Parameters
    ----------
    level : int
        From 1 (fast) to 22 (small).

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> len((fc.Raw() | fc.Zstd()).encode(np.zeros(10_000, np.float32))) < 100
    True
    """

    level: int = 3
    name: ClassVar[str] = "zstd"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.integer("level", self.level, 1, 22)

    def wire(self) -> tuple[int, bytes]:
        """Return the id; the level is the encoder's matter."""
        return 0x50, b""

    def compress(self, data: bytes) -> bytes:
        """Return one Zstandard frame."""
        return zstandard.ZstdCompressor(level=self.level).compress(data)

    def decompress(self, data: bytes, size: int) -> bytes:
        """Return the content of one frame, which must be `size` bytes."""
        if zstandard.get_frame_parameters(data).content_size != size:
            raise ValueError("the frame's content size is not the declared one")
        decompressor = zstandard.ZstdDecompressor()
        return decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
