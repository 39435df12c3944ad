"""The one cursor over untrusted bytes, and the varints of docs/format.md."""

from __future__ import annotations

from .errors import DecodeError

__all__ = ["Reader", "varint"]


def varint(value: int) -> bytes:
    """`value` (0 to 2**64 - 1) as an unsigned LEB128 integer in its shortest form."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Hands out bytes ``[start, stop)`` of `payload` in order; refuses to go past the end.

    Offsets, those of the errors too, count from the beginning of `payload`.
    """

    __slots__ = ("_stop", "offset", "payload")

    def __init__(
        self, payload: bytes | bytearray | memoryview, start: int = 0, stop: int | None = None
    ) -> None:
        self.payload = memoryview(payload).cast("B")
        self._stop = len(self.payload) if stop is None else stop
        if not 0 <= start <= self._stop <= len(self.payload):
            raise DecodeError(f"[{start}, {stop}) is not inside {len(self.payload)} bytes")
        self.offset = start

    @property
    def remaining(self) -> int:
        """How many bytes are left."""
        return self._stop - self.offset

    def part(self, n: int) -> Reader:
        """Return a reader of the next `n` bytes."""
        start = self.offset
        self.take(n)
        return Reader(self.payload, start, self.offset)

    def rest(self) -> memoryview:
        """Return everything left, without moving."""
        return self.payload[self.offset : self._stop]

    def take(self, n: int) -> memoryview:
        """Return the next `n` bytes."""
        if n > self.remaining:
            raise DecodeError(f"{n} bytes expected, {self.remaining} left", self.offset)
        self.offset += n
        return self.payload[self.offset - n : self.offset]

    def byte(self) -> int:
        """Return the next byte."""
        at = self.offset
        if at == self._stop:
            raise DecodeError("1 bytes expected, 0 left", at)
        self.offset = at + 1
        return self.payload[at]

    def varint(self) -> int:
        """Return the next varint, which must be in its shortest form and below 2**64."""
        start = self.offset
        if start < self._stop and (first := self.payload[start]) < 0x80:
            self.offset = start + 1  # without a call: most are short, and a header holds millions
            return first
        value = 0
        for shift in range(0, 64, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0:
                    raise DecodeError("a varint is not in its shortest form", start)
                if value >> 64:
                    raise DecodeError("a varint is above 64 bits", start)
                return value
        raise DecodeError("a varint is above 64 bits", start)

    def end(self) -> None:
        """Refuse bytes that are left over."""
        if self.remaining:
            raise DecodeError(f"{self.remaining} bytes left over", self.offset)
