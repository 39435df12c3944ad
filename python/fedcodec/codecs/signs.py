"""One bit a value and one magnitude for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..codec import Draws, Quantize
from ..reader import Reader
from ..registry import WireStage, builtin


def _read(reader: Reader) -> WireStage:
    return WireStage("quantize", "sign", ("sign",))


class _Signs(Quantize):
    def wire(self) -> tuple[int, bytes]:
        """Return the id; nothing else is needed to decode."""
        return 0x36, b""

    def coder(self, draws: Draws) -> Any:
        """Describe it to the body coder."""
        return ("sign",)


@builtin(id_36=_read)
@dataclass(frozen=True, repr=False)
class Sign(_Signs):
    """Send every value's sign, and the mean magnitude of each tensor: 1 bit a value.

    Zeros count as positive, so they decode to the magnitude: meant for updates without structure zeros, and for
    `ErrorFeedback`, which sends the difference later.

    References
    ----------
    Sprenger, binary quantization.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.Sign().encode(np.array([1, -3, 2, -2] * 3, np.float32)))[:4]
    array([ 2., -2.,  2., -2.], dtype=float32)
    """

    name: ClassVar[str] = "sign"
    _needs_all: ClassVar[str] = (
        "the signs of the kept values are ternary, such as topk(0.01) | ternary"
    )

    @property
    def needs_select(self) -> bool:
        """After a select stage it is `Ternary`."""
        return False


@builtin()
@dataclass(frozen=True, repr=False)
class Ternary(_Signs):
    """Send the sign of each kept value, and their mean magnitude: sparse ternary compression.

    The mean is over the kept values only, free of their order. Zeros are not kept, even where a select stage would.

    References
    ----------
    Sprenger, ternary quantization.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> values = np.array([0.1, -3, 2, 0, 0.2, 0, 0, 0, -4, 3], np.float32)
    >>> fc.decode((fc.TopK(0.4) | fc.Ternary()).encode(values))
    array([ 0., -3.,  3.,  0.,  0.,  0.,  0.,  0., -3.,  3.], dtype=float32)
    """

    name: ClassVar[str] = "ternary"

    @property
    def needs_select(self) -> bool:
        """Without a select stage it is `Sign`."""
        return True
