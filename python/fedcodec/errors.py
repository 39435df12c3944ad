"""The exceptions of fedcodec; every one is a `FedcodecError`."""

from __future__ import annotations

__all__ = ["BackendError", "DecodeError", "FedcodecError", "NonFiniteError", "SpecMismatch"]


def shortened(text: str, most: int = 80) -> str:
    """Return a text for a message, without its middle where it is longer than `most`."""
    return text if len(text) <= most else f"{text[: most - 20]} ... {text[-15:]}"


class FedcodecError(Exception):
    """The base of everything that fedcodec raises on its own account."""


class DecodeError(FedcodecError, ValueError):
    """Bytes that are not a valid payload.

    Parameters
    ----------
    message : str
        What is wrong.
    offset : int, optional
        The byte of the payload at which it is wrong, where one can be named.
    """

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.offset = offset

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.offset is None else f"{message} (at byte {self.offset})"


class SpecMismatch(DecodeError):
    """An update or payload whose names, order, shapes or dtypes are not those expected."""


class NonFiniteError(FedcodecError, ValueError):
    """A value that is not a number or infinite, or becomes infinite in a narrower dtype.

    Parameters
    ----------
    message : str
        What was found.
    tensor : str, optional
        The name of the tensor that holds it, where there is one.
    """

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


class BackendError(FedcodecError, RuntimeError):
    """An instruction set or device that is not known, not built or not present."""


class DeviceMemoryError(BackendError, MemoryError):
    """A device has not the memory that a call takes."""
