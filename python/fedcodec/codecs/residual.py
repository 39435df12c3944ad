"""Sums of two codings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..codec import Codec, Stage, as_pipeline, weakest
from ..reader import Reader
from ..registry import WireStage, builtin

if TYPE_CHECKING:
    from ..codec import Determinism, Pipeline
    from ..shared import Shared


def _read(reader: Reader) -> WireStage:
    from ..frame import read_pipeline

    first, second = (read_pipeline(reader, inside=True) for _ in range(2))
    coder = ("residual", first.coder, second.coder)
    return WireStage("sum", f"residual({first.text}; {second.text})", coder)


@builtin(id_40=_read)
@dataclass(frozen=True, repr=False)
class Residual(Stage):
    """Code twice: what the first codec missed goes through the second, and the decoder adds both.

    Parameters
    ----------
    first, second : Codec
        Pipelines without lossless stages, which go after the residual, and without residuals.

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
        for part in self.parts:
            if part.find("lossless"):
                raise ValueError(f"{part}: put the lossless stage after residual(...), not inside")
            if part.find("sum"):
                raise ValueError(f"{part} cannot stand inside another residual(...)")

    @property
    def parts(self) -> tuple[Pipeline, Pipeline]:
        """Both pipelines."""
        return as_pipeline(self.first), as_pipeline(self.second)

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
