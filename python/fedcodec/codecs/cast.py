"""Narrower floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .. import dtypes
from ..codec import Draws, Quantize
from ..reader import Reader
from ..registry import WireReader, WireStage, builtin

_IDS = {"float16": 0x37, "bfloat16": 0x38}


def _read(dtype: str) -> WireReader:
    def read(reader: Reader) -> WireStage:
        return WireStage("quantize", f'cast("{dtype}")', ("cast", dtypes.BY_NAME[dtype].id))

    return read


@builtin(id_37=_read("float16"), id_38=_read("bfloat16"))
@dataclass(frozen=True, repr=False)
class Cast(Quantize):
    """Send values as float16 or bfloat16, rounded to the nearest, ties to even.

    A value beyond the dtype's largest is refused (`NonFiniteError`), never sent as infinity.

    Parameters
    ----------
    dtype : {"float16", "bfloat16"}

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.Cast("bfloat16").encode(np.array([1.001, 3.14159] * 2, np.float32)))[:2]
    array([1.      , 3.140625], dtype=float32)
    """

    dtype: Literal["float16", "bfloat16"]
    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in _IDS:
            raise ValueError(f"dtype is {self.dtype!r}, it must be 'float16' or 'bfloat16'")

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the dtype."""
        return _IDS[self.dtype], b""

    def coder(self, draws: Draws) -> Any:
        """Describe it to the body coder."""
        return "cast", dtypes.BY_NAME[self.dtype].id
