"""What an update is made of: structure, names, shapes and dtypes, but no values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from . import dtypes
from .digests import digest
from .errors import DecodeError, SpecMismatch, shortened
from .reader import Reader, varint

_STRUCTURES: tuple[Literal["array", "list", "dict"], ...] = ("array", "list", "dict")
_ARTICLE = {"array": "an array", "list": "a list", "dict": "a dict"}
_TIED = 0x7F
MAX_DIMENSIONS = 32  # NumPy's own limit before version 2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an update.

    Attributes
    ----------
    name : str
        Its key in a dictionary; in a list its number, for one array "array".
    dtype : str
        One of `fedcodec.dtypes.BY_NAME`.
    shape : tuple of int
    tied_to : int or None
        Index of the earlier tensor that shares its memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied_to: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values, uncompressed."""
        return self.size * dtypes.BY_NAME[self.dtype].itemsize


@dataclass(frozen=True)
class Spec:
    """Structure, names, order, shapes and dtypes of an update.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> spec = fc.Spec.of({"weight": np.zeros((3, 2), np.float32)})
    >>> spec.tensors[0].shape, spec.nbytes
    ((3, 2), 24)
    """

    structure: Literal["array", "list", "dict"]
    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, update: Any) -> Spec:
        """Return the spec of an update (dict, list or one array).

        Raises
        ------
        TypeError
            If something in the update is not an array of a known framework and dtype.
        """
        from . import arrays

        return arrays.spec_of(update)[0]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all values, uncompressed, tied tensors counted once."""
        return sum(tensor.nbytes for tensor in self.untied)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(tensor.name for tensor in self.tensors)

    @cached_property
    def dtype_ids(self) -> tuple[int, ...]:
        """The dtypes of untied tensors, as they travel."""
        return tuple(dtypes.BY_NAME[tensor.dtype].id for tensor in self.untied)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of untied tensors."""
        return tuple(tensor.shape for tensor in self.untied)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of elements of untied tensors."""
        return tuple(tensor.size for tensor in self.untied)

    @cached_property
    def untied(self) -> tuple[TensorSpec, ...]:
        """The tensors that are coded."""
        return tuple(tensor for tensor in self.tensors if tensor.tied_to is None)

    @cached_property
    def encoded(self) -> bytes:
        """The spec as it travels (docs/format.md, section 2)."""
        out = bytearray([_STRUCTURES.index(self.structure)])
        out += varint(len(self.tensors))
        for tensor in self.tensors:
            if self.structure == "dict":
                try:
                    name = tensor.name.encode()
                except UnicodeEncodeError:
                    what = f"the name {_brief(tensor.name)} holds half a surrogate pair"
                    raise ValueError(f"{what}, it has no UTF-8") from None
                out += varint(len(name)) + name
            if tensor.tied_to is not None:
                out.append(_TIED)
                out += varint(tensor.tied_to)
                continue
            out.append(dtypes.BY_NAME[tensor.dtype].id)
            out += varint(len(tensor.shape))
            for dimension in tensor.shape:
                out += varint(dimension)
        return bytes(out)

    @cached_property
    def digest(self) -> bytes:
        """The 8 bytes that stand for this spec in a payload framed by reference."""
        return digest("fedcodec/spec", self.encoded)

    @classmethod
    def read(cls, reader: Reader, *, max_tensors: int) -> Spec:
        """Read a spec from the bytes of a stranger.

        Raises
        ------
        DecodeError
            If they are not exactly one spec of at most `max_tensors` tensors.
        """
        encoded = bytes(reader.rest())
        structure = reader.byte()
        if structure >= len(_STRUCTURES):
            raise DecodeError(f"unknown structure {structure}", offset=reader.offset - 1)
        count = reader.varint()
        if count > max_tensors:
            raise DecodeError(f"{count} tensors, the limit is {max_tensors}", offset=reader.offset)
        if structure == 0 and count != 1:
            raise DecodeError(f"one array with {count} tensors", offset=reader.offset)
        kind = _STRUCTURES[structure]
        tensors: list[TensorSpec] = []
        names: set[str] = set()
        for number in range(count):
            tensor = _read_tensor(reader, kind, number, tensors)
            if tensor.name in names:
                raise DecodeError(
                    f"two tensors are named {_brief(tensor.name)}", offset=reader.offset
                )
            names.add(tensor.name)
            tensors.append(tensor)
        reader.end()
        spec = cls(kind, tuple(tensors))
        spec.__dict__["encoded"] = encoded  # each spec has one form: it need not be made again
        return spec

    def require(self, expected: Spec) -> None:
        """Raise `SpecMismatch` that names the first difference from `expected`."""
        if self == expected:
            return
        for difference in self._differences(expected):
            raise SpecMismatch(difference)

    def _names_beside(self, other: Spec) -> list[str]:
        known = {tensor.name for tensor in other.tensors}
        return [tensor.name for tensor in self.tensors if tensor.name not in known]

    def _differences(self, expected: Spec) -> Iterator[str]:
        if self.structure != expected.structure:
            found, wanted = _ARTICLE[self.structure], _ARTICLE[expected.structure]
            yield f"the update is {found}, expected {wanted}"
        if self.structure == "dict":
            missing, extra = expected._names_beside(self), self._names_beside(expected)
            if missing or extra:
                parts = [f"lacks {_listed(missing)}"] * bool(missing)
                parts += [f"has {_listed(extra)}, which is not expected"] * bool(extra)
                yield f"the update {' and '.join(parts)}"
            for found, wanted in zip(self.names, expected.names, strict=False):
                if found != wanted:
                    what = f"{_brief(found)} where {_brief(wanted)} was expected"
                    yield f"the same names in another order: {what}"
        for ours, theirs in zip(self.tensors, expected.tensors, strict=False):
            for field in ("name", "dtype", "shape", "tied_to"):
                found, wanted = getattr(ours, field), getattr(theirs, field)
                if found != wanted:
                    yield f"tensor {_brief(ours.name)}: {field} is {found!r}, expected {wanted!r}"
        yield f"the update has {len(self.tensors)} tensors, expected {len(expected.tensors)}"


def _brief(name: str) -> str:
    return shortened(repr(name))


def _listed(names: list[str], most: int = 3) -> str:
    listed = ", ".join(map(_brief, names[:most]))
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_tensor(
    reader: Reader, structure: str, number: int, earlier: list[TensorSpec]
) -> TensorSpec:
    name = "array" if structure == "array" else str(number)
    if structure == "dict":
        raw = reader.take(reader.varint())
        try:
            name = str(raw, "utf-8")
        except UnicodeDecodeError:
            raise DecodeError("a name is not UTF-8", offset=reader.offset) from None
    dtype_id = reader.byte()
    if dtype_id == _TIED:
        tied_to = reader.varint()
        if tied_to >= number or earlier[tied_to].tied_to is not None:
            raise DecodeError(
                f"tensor {_brief(name)} is tied to no earlier tensor", offset=reader.offset
            )
        return TensorSpec(name, earlier[tied_to].dtype, earlier[tied_to].shape, tied_to)
    dtype = dtypes.BY_ID.get(dtype_id)
    if dtype is None:
        raise DecodeError(f"unknown dtype {dtype_id}", offset=reader.offset - 1)
    count = reader.varint()
    if count > MAX_DIMENSIONS:
        raise DecodeError(f"{count} dimensions, the most is {MAX_DIMENSIONS}", offset=reader.offset)
    shape = tuple([reader.varint() for _ in range(count)])
    # Array libraries refuse such shapes even where another dimension is zero.
    if math.prod(filter(None, shape)) * dtype.itemsize >> 63:
        raise DecodeError(f"tensor {_brief(name)} has too many elements", offset=reader.offset)
    return TensorSpec(name, dtype.name, shape)
