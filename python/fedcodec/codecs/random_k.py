"""Selection at random, by a seed that travels in place of the positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..codec import SCOPES, Draws, Scope, Select
from ..reader import Reader
from ..registry import WireStage, builtin
from . import _check


def _read(scope: Scope) -> Any:
    def read(reader: Reader) -> WireStage:
        return WireStage("select", "randomk", ("random", SCOPES.index(scope)))

    return read


@builtin(id_22=_read("update"), id_23=_read("tensor"))
@dataclass(frozen=True, repr=False)
class RandomK(Select):
    """Keep a share of the values, chosen at random; 8 bytes of seed stand for all positions.

    The choice follows from the seeds of codec and call, the same on every machine (docs/numerics.md, section 6).

    Parameters
    ----------
    density : float
        Share that is kept, above 0 and at most 1.
    scope : {"update", "tensor"}
        From all float tensors as one flat space, or from each tensor by itself.
    seed : int
        From 0 to 2^64 - 1. Vary the seed of `encode` from round to round, or the same positions are kept for ever.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> values = fc.decode(fc.RandomK(0.5).encode(np.ones(10, np.float32), seed=1))
    >>> int(values.sum())
    5
    """

    density: float
    scope: Scope = "update"
    seed: int = 0
    name: ClassVar[str] = "randomk"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.density(self.density)
        _check.scope(self.scope)
        _check.integer("seed", self.seed, 0)

    def wire(self) -> tuple[int, bytes]:
        """Return the id of the scope; count and seed travel in the body."""
        return 0x22 + SCOPES.index(self.scope), b""

    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe it to the body coder."""
        counts = [_check.kept(size, self.density) for size in sizes]
        return "random", SCOPES.index(self.scope), counts, [draws.group(self.seed) for _ in sizes]
