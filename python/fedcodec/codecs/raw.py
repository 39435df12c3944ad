"""Values as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..codec import Draws, Quantize
from ..registry import builtin


@builtin()
@dataclass(frozen=True, repr=False)
class Raw(Quantize):
    """Send the kept values as they are: lossless by itself.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.Raw().encode(np.array([0.1, -0.0], np.float32)))
    array([ 0.1, -0. ], dtype=float32)
    """

    name: ClassVar[str] = "raw"

    def wire(self) -> None:
        """Nothing travels: it is what a pipeline without a quantizer does."""
        return

    def coder(self, draws: Draws) -> None:
        """Describe it to the body coder."""
        return
