"""What both ends hold already, so that payloads only name it by its digest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import arrays, ops
from .digests import DIGEST_BYTES, digest, is_digest
from .errors import DecodeError
from .reader import varint

if TYPE_CHECKING:
    from .codec import Codec
    from .codecs.autoencoder import Decoder
    from .limits import Limits
    from .spec import Spec, TensorSpec


class MaskBits(NamedTuple):
    """A mask over n flat positions, bit i % 8 of byte i // 8."""

    bits: bytes
    n: int

    @property
    def digest(self) -> bytes:
        """The 8 bytes that stand for it on the wire."""
        return digest("fedcodec/mask", varint(self.n), self.bits)

    @classmethod
    def of(cls, mask: Any) -> MaskBits:
        """Flatten an update of bools, in order: those of the float tensors, tied where these are tied."""
        update = arrays.read_on_host(mask)
        for tensor in update.spec.tensors:
            if tensor.dtype != "bool":
                raise TypeError(f"mask: tensor {tensor.name!r} has dtype {tensor.dtype}, not bool")
        parts = [part.reshape(-1).view(np.bool_) for part in update.storage]
        flat = np.concatenate([np.empty(0, np.bool_), *parts])
        return cls(ops.pack_mask(flat).tobytes(), flat.size)


def digest_of(update: Any) -> bytes:
    """Return the 8 bytes by which a payload names the model that it is a delta against.

    Parameters
    ----------
    update : dict, list or array
        The model, as `encode` takes it.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.digest({"weight": np.zeros(2, np.float32)}).hex()
    'b874540c9d02dad9'
    """
    read = arrays.read_on_host(update)
    return digest(
        "fedcodec/base",
        read.spec.encoded,
        *(
            _plain(part, tensor)
            for part, tensor in zip(read.storage, read.spec.untied, strict=True)
        ),
    )


def _plain(part: arrays.Storage, tensor: TensorSpec) -> memoryview:
    # NumPy takes any byte but 0 for True: the digest is of the values.
    flat = part.reshape(-1)
    return (flat.view(np.uint8) != 0 if tensor.dtype == "bool" else flat).view(np.uint8).data


class Shared:
    """A bounded store of masks, bases, rule tables and decoders, by digest.

    Decoding looks up here whatever a payload names by digest. When `max_bytes` is exceeded the entries used longest
    ago are dropped.

    Parameters
    ----------
    max_bytes : int
        Bytes of all entries together, 1 GiB by default.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> shared = fc.Shared()
    >>> mask = {"weight": np.array([True, False, True])}
    >>> shared.add_mask(mask) in shared
    True
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}, it must not be negative")
        self.max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[str, Any, int]] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def add_mask(self, mask: Any) -> bytes:
        """Keep a mask (an update of bools, or `MaskBits`) and return its digest."""
        bits = mask if isinstance(mask, MaskBits) else MaskBits.of(mask)
        if len(bits.bits) != (bits.n + 7) // 8:
            raise ValueError(f"mask: {len(bits.bits)} bytes are not those of {bits.n} positions")
        return self._add(bits.digest, "mask", bits, len(bits.bits))

    def add_base(self, model: Any, *, key: bytes | None = None) -> bytes:
        """Keep a reference to the model that deltas are against and return its digest.

        Parameters
        ----------
        model : update
        key : bytes of length 8, optional
            What sender and receiver call it in place of its digest, such as the digest of the payload that it came in,
            which is made in less time.

        Raises
        ------
        ValueError
            If the key is of another length, or the model larger than the store.
        """
        if key is None:
            key = digest_of(model)
        elif not is_digest(key):
            raise ValueError(f"key is {key!r}, it must be {DIGEST_BYTES} bytes")
        return self._add(key, "base", model, arrays.spec_of(model)[0].nbytes)

    def add_rules(self, codec: Codec, spec: Spec) -> bytes:
        """Keep the rule table of a codec for one spec and return its digest."""
        table = codec.table(spec).encoded
        return self._add(digest("fedcodec/rules", table), "rules", table, len(table))

    def add_decoder(
        self, decoder: Decoder | bytes, *, device: str = "cpu", limits: Limits | None = None
    ) -> bytes:
        """Keep the decoder of an autoencoder and return its digest.

        Parameters
        ----------
        decoder : Decoder or bytes
            Or the payload that it comes in, which may be a stranger's.
        device : str
            Of torch: where a decoder that comes in a payload computes.
        limits : Limits, optional
            As for `fedcodec.decode`. Each pipeline of a payload that names a decoder costs passes over its weights.

        Raises
        ------
        DecodeError
            If the payload is not one of a decoder, or of one that does not fit in `max_bytes`.
        BackendError
            If torch has no such device.
        """
        from .codecs.autoencoder import Decoder

        if not isinstance(decoder, Decoder):
            decoder = Decoder.read(decoder, device=device, limits=limits)
            if decoder.nbytes > self.max_bytes:
                raise DecodeError(
                    f"a decoder of {decoder.nbytes} bytes, the store holds {self.max_bytes}"
                )
        return self._add(decoder.digest, "decoder", decoder, decoder.nbytes)

    def get(self, key: bytes, kind: str) -> Any:
        """Return the entry of a digest.

        Raises
        ------
        DecodeError
            If there is none of this kind ("mask", "base", "rules" or "decoder").
        """
        with self._lock:
            if key in self._entries and self._entries[key][0] == kind:
                self._entries.move_to_end(key)
                return self._entries[key][1]
        raise DecodeError(f"the payload names the {kind} {key.hex()}, which shared does not hold")

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, key: bytes, kind: str, value: Any, nbytes: int) -> bytes:
        if nbytes > self.max_bytes:
            raise ValueError(f"a {kind} of {nbytes} bytes does not fit in {self.max_bytes}")
        with self._lock:
            self._nbytes -= self._entries.pop(key, (kind, value, 0))[2]
            self._entries[key] = (kind, value, nbytes)
            self._nbytes += nbytes
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._entries.popitem(last=False)[1][2]
        return key

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
