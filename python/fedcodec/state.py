"""State that threads take turns with, and saved states, read with the care that a stranger's bytes get."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .errors import shortened
from .reader import Reader
from .spec import Spec

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="Locked")


def locked(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Let threads take turns in a method: the GIL is released while values are written."""

    @functools.wraps(method)
    def inner(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._lock:
            return method(self, *args, **kwargs)

    return inner


class Locked:
    """What `locked` methods are for; copies and pickles are made between two of them and have arrays of their own."""

    _written: ClassVar[tuple[str, ...]]  # the attributes whose arrays are written in place

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {key: value for key, value in self.__dict__.items() if key != "_lock"}
            return state | {key: copy.deepcopy(state[key]) for key in self._written}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


class State:
    """A state that someone saved: every look at it checks what is found.

    Parameters
    ----------
    state : mapping of str to anything
    fixed : dict
        What must be in it as it is.
    """

    def __init__(self, state: Any, fixed: dict[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}, not a dict")
        self._state = state
        for key, wanted in fixed.items():
            if type(self.scalar(key)) is not type(wanted) or self.scalar(key) != wanted:
                raise ValueError(f"state: {key} is {self[key]!r}, not {wanted!r}")

    def __getitem__(self, key: str) -> Any:
        if key not in self._state:
            raise ValueError(f"state: {key} not in it")
        return self._state[key]

    def require(self, holds: bool, key: str, what: str) -> None:
        """Raise `ValueError` that says what `key` must be, unless it holds."""
        if not holds:
            found = shortened(repr(self._state.get(key)))
            raise ValueError(f"state: {key} is {found}, it must be {what}")

    def scalar(self, key: str) -> Any:
        """Return what is there, out of its array where a format knows only arrays."""
        value = self[key]
        boxed = hasattr(value, "item") and getattr(value, "ndim", None) == 0
        return value.item() if boxed else value

    def count(self, key: str) -> int:
        """Return an integer from 0 to 2^64 - 1."""
        value = self.scalar(key)
        valid = isinstance(value, int) and 0 <= value < 1 << 64
        self.require(valid, key, "an integer from 0 to 2^64 - 1")
        return int(value)

    def number(self, key: str) -> float:
        """Return a finite number that is not negative."""
        value = self.scalar(key)
        valid = isinstance(value, (int, float)) and 0 <= value <= sys.float_info.max
        self.require(valid, key, "a finite number from 0 on")
        return float(value)

    def data(self, key: str) -> bytes | None:
        """Return bytes, or None; they may be there as a list or as an array of uint8."""
        value = found = self[key]
        if isinstance(value, list):
            with contextlib.suppress(TypeError, ValueError):
                found = bytes(value)
        elif hasattr(value, "__array__"):
            array = as_array(value, key)
            found = array.tobytes() if array.dtype == np.uint8 and array.ndim == 1 else value
        valid = found is None or isinstance(found, bytes)
        self.require(valid, key, "None or bytes")
        return cast("bytes | None", found)

    def spec(self) -> Spec | None:
        """Return the spec, if there is one."""
        data = self.data("spec")
        return None if data is None else Spec.read(Reader(data), max_tensors=len(data))


def as_array(value: Any, what: str) -> npt.NDArray[Any]:
    """Return a copy of an array that someone saved."""
    try:
        return np.asarray(value).copy()
    except Exception as error:  # anything at all may call itself an array
        raise ValueError(f"state: {what} is no array: {error}") from error
