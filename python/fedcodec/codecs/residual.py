"""Sums of two codings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..codec import Codec, Stage, as_pipeline, weakest
from ..errors import DecodeError
from ..reader import Reader
from ..registry import WireStage, builtin

if TYPE_CHECKING:
    from ..codec import Determinism, Pipeline
    from ..shared import Shared

_MAX_DEPTH = 4


def _read(reader: Reader) -> WireStage:
    from ..frame import read_pipeline

    first, second = (read_pipeline(reader, inside=True) for _ in range(2))
    coder = ("residual", first.coder, second.coder)
    if _depth(coder) > _MAX_DEPTH:
        raise DecodeError(f"residuals are nested more than {_MAX_DEPTH} deep", offset=reader.offset)
    return WireStage("sum", f"residual({first.text}; {second.text})", coder)


def _depth(coder: tuple[object, ...]) -> int:
    if coder[0] != "residual":
        return 0
    return 1 + max(_depth(inner) for inner in coder[1:] if isinstance(inner, tuple))


@builtin(id_40=_read)
@dataclass(frozen=True, repr=False)
class Residual(Stage):
    """Code twice: what the first codec missed goes through the second, and the decoder adds both.

    Parameters
    ----------
    first, second : Codec
        Pipelines without lossless stages; put one after the residual.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> codec = fc.parse("residual(sign; topk(0.01) | int8) | zstd")
    >>> str(codec)
    'residual(sign; topk(0.01) | int8) | zstd'
    """

    first: Codec
    second: Codec
    name: ClassVar[str] = "residual"
    kind = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in (self.first, self.second):
            if as_pipeline(part).find("lossless"):
                raise ValueError(f"{part}: put the lossless stage after residual(...), not inside")
        if self.depth > _MAX_DEPTH:
            raise ValueError(f"residuals are nested {self.depth} deep, at most {_MAX_DEPTH} work")

    @property
    def parts(self) -> tuple[Pipeline, Pipeline]:
        """Both pipelines."""
        return as_pipeline(self.first), as_pipeline(self.second)

    @property
    def depth(self) -> int:
        """How deep residuals are nested, this one counted."""
        inner = (part.find("sum") for part in self.parts)
        return 1 + max(stage.depth if isinstance(stage, Residual) else 0 for stage in inner)

    @property
    def determinism(self) -> Determinism:
        """The weaker promise of both."""
        return weakest([part.determinism for part in self.parts])

    def add_shared(self, shared: Shared) -> None:
        """Put what either pipeline's decoder must hold into a store."""
        for part in self.parts:
            part.add_shared(shared)

    def wire(self) -> tuple[int, bytes]:
        """Return the id and both pipelines."""
        return 0x40, b"".join(part.encoded for part in self.parts)

    def _text(self, name: str) -> str:
        form = repr if name[0].isupper() else str
        separator = ", " if form is repr else "; "
        return f"{name}({form(self.first)}{separator}{form(self.second)})"
