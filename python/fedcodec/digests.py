"""The bytes by which a payload names what both ends hold."""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 8
DECODER_DIGEST_BYTES = 16  # what they name may come from strangers


def is_digest(value: object) -> bool:
    """Whether this can name a mask, a base, a rule table or a spec."""
    return isinstance(value, bytes) and len(value) == DIGEST_BYTES


def digest(label: str, *parts: bytes | memoryview, size: int = DIGEST_BYTES) -> bytes:
    """Return the first bytes of SHA-256 over a label, a zero byte and the parts."""
    state = hashlib.sha256(label.encode("ascii") + b"\0")
    for part in parts:
        state.update(part)
    return state.digest()[:size]
