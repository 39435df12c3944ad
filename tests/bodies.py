"""Bodies coded by one call each, for tests that hold a tensor as (array, dtype id, shape)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Bodies:
    """The calls of a module's `Encoder` and `Decoder`."""

    def __init__(self, module: Any, **ops: Any) -> None:
        self._module = module
        self._ops = ops

    def _make(self, name: str, tensors: Any, segments: Any) -> Any:
        ids, shapes = [tensor[1] for tensor in tensors], [tensor[2] for tensor in tensors]
        return getattr(self._module, name)(ids, shapes, segments, **self._ops)

    def encode(self, header: bytes, tensors: Any, segments: Any, *rest: Any) -> bytes:
        encoded: bytes = self._make("Encoder", tensors, segments).encode(
            header, _arrays(tensors), *rest
        )
        return encoded

    def check(self, *arguments: Any) -> None:
        *place, tensors, segments = arguments
        self._make("Decoder", tensors, segments).check(*place)

    def decode(self, *arguments: Any) -> None:
        *place, tensors, segments = arguments
        arrays = _arrays(tensors)
        assert self._make("Decoder", tensors, segments).decode(*place, arrays) is arrays

    def accumulate(
        self, payload: Any, start: int, stop: int, tensors: Any, segments: Any, *rest: Any
    ) -> tuple[float, float]:
        decoder = self._make("Decoder", tensors, segments)
        bounds: tuple[float, float] = decoder.accumulate(payload, start, stop, *rest)
        return bounds


def _arrays(tensors: Sequence[tuple[Any, int, tuple[int, ...]]]) -> list[Any]:
    return [tensor[0] for tensor in tensors]
