"""Selection by a mask that both sides hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..codec import Draws, Select
from ..digests import DIGEST_BYTES
from ..reader import Reader
from ..registry import WireStage, builtin
from ..shared import MaskBits

if TYPE_CHECKING:
    from ..shared import Shared


def _read(reader: Reader) -> WireStage:
    digest = bytes(reader.take(DIGEST_BYTES))
    return WireStage("select", f'mask("{digest.hex()}")', ("mask", digest))


@builtin(id_24=_read)
@dataclass(frozen=True, repr=False)
class Mask(Select):
    """Keep the values under a mask that the decoder holds too, so that no positions travel.

    Parameters
    ----------
    digest : str
        Digest of the mask in hexadecimal; `Mask.of` makes it from the mask.
    bits : MaskBits, optional
        The mask itself; encoding needs it.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> shared = fc.Shared()
    >>> codec = fc.Mask.of({"weight": np.array([True, False])})
    >>> codec.add_shared(shared)
    >>> payload = codec.encode({"weight": np.array([1, 2], np.float32)})
    >>> fc.decode(payload, shared=shared)["weight"]
    array([1., 0.], dtype=float32)
    """

    digest: str
    bits: MaskBits | None = field(default=None, init=True, compare=False)
    name: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.digest, str):
            raise TypeError(f"digest is a {type(self.digest).__name__}: use Mask.of(mask)")
        if len(self.digest) != 2 * DIGEST_BYTES or not set(self.digest) <= set("0123456789abcdef"):
            raise ValueError(f"digest is {self.digest!r}, it must be 16 hexadecimal digits")
        if self.bits is not None and self.bits.digest.hex() != self.digest:
            raise ValueError(f"digest is {self.digest}, the mask's is {self.bits.digest.hex()}")

    @classmethod
    def of(cls, mask: Any) -> Mask:
        """Make the codec from a mask: bools in the structure of the update's float tensors, or `MaskBits`.

        Tied tensors count once, in the mask as in the update: give tensors that are not tied arrays of their own.
        """
        bits = mask if isinstance(mask, MaskBits) else MaskBits.of(mask)
        return cls(bits.digest.hex(), bits)

    def add_shared(self, shared: Shared) -> None:
        """Put the mask into a store."""
        if self.bits is not None:
            shared.add_mask(self.bits)

    def config(self) -> dict[str, Any]:
        """Return the name and the digest."""
        return {"stage": self.name, "digest": self.digest}

    def _text(self, name: str) -> str:
        return f'{name}("{self.digest}")'

    def wire(self) -> tuple[int, bytes]:
        """Return the id and the digest."""
        return 0x24, bytes.fromhex(self.digest)

    def coder(self, sizes: Sequence[int], draws: Draws) -> tuple[Any, ...]:
        """Describe it to the body coder."""
        if self.bits is None:
            raise ValueError(f"{self} is only a digest: make the codec by Mask.of(mask)")
        if self.bits.n != sum(sizes):
            raise ValueError(
                f"the mask has {self.bits.n} values, the float tensors {sum(sizes)}, tied ones counted once"
            )
        return "mask", self.bits.bits, self.bits.n
