"""Selection of values whose positions travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..codec import SCOPES, Draws, Scope, Select
from ..reader import Reader
from ..registry import WireStage, builtin
from . import _check


def _read(scope: Scope) -> Any:
    def read(reader: Reader) -> WireStage:
        return WireStage("select", str(Sparse(scope)), ("sparse", SCOPES.index(scope)))

    return read


@builtin(id_20=_read("update"), id_21=_read("tensor"))
@dataclass(frozen=True, repr=False)
class Sparse(Select):
    """Keep what is not zero: the uplink of a model that is pruned already (Jeurkar et al.).

    Parameters
    ----------
    scope : {"update", "tensor"}
        Whether all float tensors are one flat space, which is smaller on the wire, or each is one by itself.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> len(fc.Sparse().encode(np.eye(100, dtype=np.float32)))
    523
    """

    scope: Scope = "update"
    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.scope(self.scope)

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the scope; nothing else is needed to decode."""
        return 0x20 + SCOPES.index(self.scope), b""

    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe it to the body coder."""
        return "threshold", SCOPES.index(self.scope), 0.0


@builtin()
@dataclass(frozen=True, repr=False)
class TopK(Select):
    """Keep the share of values that are largest in magnitude, exactly; ties go to the lower index.

    Parameters
    ----------
    density : float
        Share that is kept, above 0 and at most 1: k = max(1, round-half-even(density * n)).
    scope : {"update", "tensor"}
        Over all float tensors as one flat space (global pruning), or in each tensor by itself.

    References
    ----------
    Jeurkar et al., global unstructured L1 pruning.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.TopK(0.5).encode(np.array([1, -3, 2, 0], np.float32)))
    array([ 0., -3.,  2.,  0.], dtype=float32)
    """

    density: float
    scope: Scope = "update"
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.density(self.density)
        _check.scope(self.scope)

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the scope; nothing else is needed to decode."""
        return Sparse(self.scope).wire()

    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe it to the body coder."""
        return (
            "topk",
            SCOPES.index(self.scope),
            [_check.kept(size, self.density) for size in sizes],
        )


@builtin()
@dataclass(frozen=True, repr=False)
class Threshold(Select):
    """Keep the values whose magnitude is strictly above a threshold.

    Parameters
    ----------
    value : float, optional
        The threshold itself.
    percentile : float, optional
        From 0 to 100: the threshold is this percentile of the magnitudes.
    interpolation : {"linear", "lower", "higher"}
        Of the percentile between two magnitudes, as NumPy names it.
    scope : {"update", "tensor"}
        Over what the percentile is taken.

    References
    ----------
    Yan, eq. 1 to 3.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.decode(fc.Threshold(percentile=50).encode(np.array([1, -3, 2], np.float32)))
    array([ 0., -3.,  0.], dtype=float32)
    """

    value: float | None = None
    percentile: float | None = None
    interpolation: Literal["linear", "lower", "higher"] = "linear"
    scope: Scope = "update"
    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.scope(self.scope)
        if (self.value is None) == (self.percentile is None):
            raise ValueError("threshold needs either value= or percentile=")
        if self.value is not None:
            _check.finite("value", self.value)
        if self.percentile is not None:
            _check.number("percentile", self.percentile)
            if not 0 <= self.percentile <= 100:
                raise ValueError(f"percentile is {self.percentile}, it must be from 0 to 100")
        if self.interpolation not in ("linear", "lower", "higher"):
            raise ValueError(f"interpolation is {self.interpolation!r}: linear, lower or higher")

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the scope; nothing else is needed to decode."""
        return Sparse(self.scope).wire()

    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe it to the body coder."""
        scope = SCOPES.index(self.scope)
        if self.percentile is None:
            return "threshold", scope, self.value
        return "percentile", scope, self.percentile, self.interpolation
