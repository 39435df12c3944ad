"""The 8 bytes by which a payload names what both ends hold."""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 8


def digest(label: str, *parts: bytes | memoryview) -> bytes:
    """Return the first 8 bytes of SHA-256 over a label, a zero byte and the parts."""
    state = hashlib.sha256(label.encode("ascii") + b"\0")
    for part in parts:
        state.update(part)
    return state.digest()[:DIGEST_BYTES]
