"""Selection of whole channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..codec import Draws, Select
from ..errors import DecodeError
from ..reader import Reader, varint
from ..registry import WireStage, builtin
from . import _check

_MAX_AXIS = 31


def _read(reader: Reader) -> WireStage:
    axis = reader.varint()
    if axis > _MAX_AXIS:
        raise DecodeError(f"axis={axis} is too large", offset=reader.offset)
    return WireStage("select", str(Structured(axis=axis)), ("structured", 1, axis))


@builtin(id_25=_read)
@dataclass(frozen=True, repr=False)
class Structured(Select):
    """Keep whole channels of each tensor: they travel dense, with a bit for each channel.

    A channel is what has one index of `axis`; on axis 0, the default, of a convolution or linear layer it is a filter
    or neuron. A tensor without that axis is kept whole. One of a single dimension has channels of one value: rules such
    as `for_names({"*.bias": Raw()})` leave biases out.

    Parameters
    ----------
    density : float, optional
        Share of each tensor's channels that is kept, those of the largest norms, above 0 and at most 1:
        max(1, round-half-even(density * channels)); ties go to the lower channel. By default the channels that are
        not all zero: what pruning by any criterion has left.
    axis : int
        From 0 to 31.
    order : {1, 2}
        Of the norm, L1 or L2.

    References
    ----------
    Jeurkar et al., section 3.3, structured pruning of each layer: `torch.nn.utils.prune.ln_structured`.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> filters = np.array([[1, -2], [0, 0], [3, 0]], np.float32)
    >>> fc.decode(fc.Structured(0.4, order=1).encode(filters))
    array([[ 1., -2.],
           [ 0.,  0.],
           [ 0.,  0.]], dtype=float32)
    >>> str(fc.Structured() | fc.Int8())
    'structured | int8'
    """

    density: float | None = None
    axis: int = field(default=0, kw_only=True)
    order: int = field(default=2, kw_only=True)
    name: ClassVar[str] = "structured"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None:
            _check.density(self.density)
        _check.integer("axis", self.axis, 0, _MAX_AXIS)
        _check.integer("order", self.order, 1, 2)

    @property
    def by_tensor(self) -> bool:
        """Each tensor has channels of its own."""
        return True

    def _text(self, name: str) -> str:
        text = super()._text(name)
        return text.replace("density=", "", 1)  # the first, as it may be given without its name

    def wire(self) -> tuple[int, bytes]:
        """Return the id and the axis; nothing else is needed to decode."""
        return 0x25, varint(self.axis)

    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe it to the body coder."""
        return "structured", 1, self.axis, self.density, self.order
