"""Autoencoders: an update travels as latents, and the receiver holds the decoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from ..codec import Codec, Transform
from ..digests import DECODER_DIGEST_BYTES, digest
from ..errors import BackendError, DecodeError, shortened
from ..limits import Limits
from ..reader import Reader
from ..registry import WireStage, builtin
from .raw import Raw

if TYPE_CHECKING:
    import torch

    from ..shared import Shared
    from .funnel import Funnel

    # Weights of shape (outputs, inputs), and biases.
    Layers: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]

MOST_LAYERS = 16  # of a half
ACTIVATIONS = ("identity", "tanh", "relu", "sigmoid")  # by their ids on the wire
_LARGEST = float(np.finfo(np.float32).max)
_ROUNDINGS = 1.01  # more than a quantizer and the roundings of a sum can add

Values = npt.NDArray[np.float32]


def run(layers: Layers, rows: torch.Tensor, activation: str, *, last: bool) -> torch.Tensor:
    """Apply layers to rows, with the activation between them and, if asked, behind the last one."""
    import torch

    for number, (weight, bias) in enumerate(layers):
        if len(rows) == 1 and not torch.is_grad_enabled():
            rows = torch.addmv(bias, weight, rows[0])[None]  # a matrix product of one row is slower
        else:
            rows = torch.nn.functional.linear(rows, weight, bias)
        if activation != "identity" and (last or number + 1 < len(layers)):
            rows = getattr(torch, activation)(rows)
    return rows


def _tensor(values: Values) -> torch.Tensor:
    import torch

    # Of rows of `Snapshots.array()` too, which cannot be written to: torch warns of such.
    return torch.from_numpy(np.require(values, np.float32, ("C", "W")))


def require_torch() -> None:
    """Raise `BackendError` unless torch can be imported."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise BackendError("this needs torch: pip install 'fedcodec[torch]'") from None


def device_of(name: str) -> torch.device:
    """Return the device of torch that a text names, which must be one that computes."""
    require_torch()
    import torch

    try:
        found = torch.zeros(1, device=name)
        found.cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise BackendError(f"device {name!r}: {shortened(str(error))}") from None
    return found.device


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Multiply in float32, whatever precision the caller has set for its own networks."""
    import torch

    with torch.autocast(device.type, enabled=False):
        yield


class Decoder:
    """The half of an autoencoder that the receiver holds.

    Attributes
    ----------
    values : int
        How many values of float tensors it returns.
    outputs : int
        How many latents it takes.
    digest : bytes
        The 16 bytes that name it in payloads, of the payload that it came in.

    Examples
    --------
    >>> import fedcodec as fc
    >>> sent = fc.AutoEncoder.of(fc.Funnel(values=50, latents=2)).decoder_payload
    >>> fc.Decoder.read(sent).outputs
    2
    """

    def __init__(self, layers: Layers, activation: str, values: int, digest: bytes) -> None:
        self._layers = layers
        self._activation = activation
        self.values = values
        self.digest = digest
        chunks = -(-values // len(layers[-1][0]))
        self._shape = chunks, layers[0][0].shape[1]
        self.outputs = chunks * self._shape[1]

    @classmethod
    def read(cls, payload: bytes, *, device: str = "cpu", limits: Limits | None = None) -> Decoder:
        """Restore a decoder from its payload (docs/format.md, section 5), which may be a stranger's.

        Parameters
        ----------
        payload : bytes
            `AutoEncoder.decoder_payload` of the sender.
        device : str
            Of torch: where it computes.
        limits : Limits, optional
            As for `fedcodec.decode`.

        Raises
        ------
        DecodeError
            If it is no payload of a decoder, or takes more memory than there may be or is.
        BackendError
            If torch has no such device.
        """
        from ..pipeline import decode

        target = device_of(device)
        found = decode(payload, limits=limits, framework="torch")
        decoder = cls(*_checked(found), _digest(payload))
        most = (limits or Limits()).max_bytes
        if decoder.nbytes > most:  # tied layers count once in the payload
            raise DecodeError(f"a decoder of {decoder.nbytes} bytes, the limit is {most}")
        try:
            decoder._layers = [(w.to(target), b.to(target)) for w, b in decoder._layers]
        except RuntimeError as error:
            raise DecodeError(f"the decoder does not fit on device {device!r}: {error}") from None
        return decoder

    def inverse(self, outputs: Values) -> Values:
        """Return the values that latents stand for."""
        import torch

        device = self._layers[0][0].device
        if np.size(outputs) != self.outputs:
            raise ValueError(f"the decoder takes {self.outputs} latents, not {np.size(outputs)}")
        with torch.inference_mode(), in_float32(device):
            rows = _tensor(outputs).to(device).reshape(self._shape)
            rows = run(self._layers, rows, self._activation, last=False)
            values: Values = rows.reshape(-1)[: self.values].cpu().numpy()
        return values

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(4 * (weight.numel() + bias.numel()) for weight, bias in self._layers)

    def bound(self, magnitude: float) -> float:
        """Return what no value of any layer exceeds that is made of latents up to a magnitude."""
        largest = 0.0
        for number, (gain, offset) in enumerate(self._gains):
            if number and self._activation in ("tanh", "sigmoid"):
                magnitude = 1.0
            magnitude = _ROUNDINGS * (gain * magnitude + offset)
            largest = max(largest, magnitude)
        return largest

    @cached_property
    def _gains(self) -> list[tuple[float, float]]:
        import torch

        return [
            (float(torch.linalg.vector_norm(weight, 1, dim=1).max()), float(bias.abs().max()))
            for weight, bias in self._layers
        ]


def _digest(payload: bytes) -> bytes:
    return digest("fedcodec/decoder", memoryview(payload), size=DECODER_DIGEST_BYTES)


def _described(layers: Layers, activation: str, values: int) -> dict[str, Any]:
    """Return a decoder as an update."""
    described: dict[str, Any] = {
        "values": np.array(values, np.int64),
        "activation": np.array(ACTIVATIONS.index(activation), np.uint8),
    }
    for number, (weight, bias) in enumerate(layers):
        described[f"{number}.weight"] = weight.detach().cpu().numpy()
        described[f"{number}.bias"] = bias.detach().cpu().numpy()
    return described


def _checked(found: Any) -> tuple[Layers, str, int]:
    """Return the layers, the activation and the number of values of a decoder as an update."""
    import torch

    count = len(found) // 2 - 1 if isinstance(found, Mapping) else 0
    parts = [f"{number}.{part}" for number in range(count) for part in ("weight", "bias")]
    if count < 1 or list(found) != ["values", "activation", *parts]:
        raise DecodeError("not a decoder: its tensors are not 'values', 'activation' and layers")
    if count > MOST_LAYERS:
        raise DecodeError(f"a decoder of {count} layers, the most is {MOST_LAYERS}")
    values, activation = found["values"], found["activation"]
    for name, scalar, dtype in (
        ("values", values, torch.int64),
        ("activation", activation, torch.uint8),
    ):
        if scalar.dtype != dtype or scalar.ndim:
            raise DecodeError(
                f"not a decoder: {name!r} is {_form(scalar)}, expected {dtype} of shape ()"
            )
    if int(activation) >= len(ACTIVATIONS):
        raise DecodeError(f"a decoder with the unknown activation {int(activation)}")
    layers = [(found[f"{number}.weight"], found[f"{number}.bias"]) for number in range(count)]
    for number, (weight, bias) in enumerate(layers):
        floats = weight.dtype == bias.dtype == torch.float32
        if not floats or weight.ndim != 2 or bias.shape != weight.shape[:1] or not weight.numel():
            raise DecodeError(
                f"a decoder whose layer {number} is none: weight {_form(weight)}, bias "
                f"{_form(bias)}, expected float32 of shapes (outputs, inputs) and (outputs,)"
            )
        if len(weight) < weight.shape[1]:  # or few outputs could make work of any size
            raise DecodeError(f"a decoder whose layer {number} narrows")
    for (before, _), (after, _) in pairwise(layers):
        if len(before) != after.shape[1]:
            raise DecodeError("a decoder whose layers do not fit together")
    if len(layers[-1][0]) > int(values):
        raise DecodeError(f"a decoder of {len(layers[-1][0])} outputs for {int(values)} values")
    return layers, ACTIVATIONS[int(activation)], int(values)


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


@dataclass(frozen=True)
class _Networks:
    """What a sender holds of an autoencoder."""

    encoder: Layers
    activation: str
    chunk_size: int
    decoder: Decoder
    decoder_payload: bytes


def _read(reader: Reader) -> WireStage:
    name = bytes(reader.take(DECODER_DIGEST_BYTES))
    return WireStage("transform", f'autoencoder("{name.hex()}")', name)


@builtin(id_10=_read)
@dataclass(frozen=True, repr=False)
class AutoEncoder(Transform):
    """Send the latents of an autoencoder, whose decoder the receiver holds (Chandar et al., equations 1 and 2).

    Latents are float32 values like any: other stages code them further, as in ``AutoEncoder.of(funnel) | Int8()``, and
    what the autoencoder missed can follow, as in ``Residual(AutoEncoder.of(funnel) | Int8(), TopK(0.001) | Int8())``.

    Latents, and what they decode to, differ in their last bits between machines, so equal bytes are not promised. Of
    equal inputs no sum in a layer differs by more than n 2^-22 times the sum of its n magnitudes.

    Parameters
    ----------
    digest : str
        Digest of the decoder in hexadecimal; `AutoEncoder.of` makes it from what was trained.
    networks : optional
        Both halves; encoding needs them.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> snapshots = np.outer(np.linspace(-1, 1, 20), np.linspace(0, 1, 50)).astype(np.float32)
    >>> funnel = fc.Funnel(values=50, latents=2)
    >>> history = funnel.fit(snapshots, epochs=5)
    >>> codec = fc.AutoEncoder.of(funnel, decoder=fc.Int8()) | fc.Int8()
    >>> server = fc.Shared()
    >>> server.add_decoder(codec.stages[0].decoder_payload) in server
    True
    >>> payload = codec.encode({"weight": snapshots[0]})
    >>> fc.decode(payload, shared=server)["weight"].shape
    (50,)
    """

    digest: str
    networks: _Networks | None = field(default=None, compare=False)
    name: ClassVar[str] = "autoencoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.digest, str):
            raise TypeError(f"digest is a {type(self.digest).__name__}: use AutoEncoder.of(funnel)")
        if len(self.digest) != 2 * DECODER_DIGEST_BYTES or not set(self.digest) <= set(
            "0123456789abcdef"
        ):
            raise ValueError(f"digest is {self.digest!r}, it must be 32 hexadecimal digits")
        if self.networks is not None and self.networks.decoder.digest.hex() != self.digest:
            raise ValueError(
                f"digest is {self.digest}, the decoder's is {self.networks.decoder.digest.hex()}"
            )

    @classmethod
    def of(cls, funnel: Funnel, *, decoder: Codec | None = None) -> AutoEncoder:
        """Make the codec of a trained autoencoder.

        Parameters
        ----------
        funnel : Funnel
        decoder : Codec, optional
            What the decoder's weights are coded by on their way to the receiver, such as ``Int8()``; lossless by
            default. The sender uses the decoder as the receiver will have it.

        Raises
        ------
        TypeError
            If the funnel or the codec is none.
        ValueError
            If the codec names what is shared, such as a mask, or loses so much that no decoder is left.
        """
        from .funnel import Funnel

        if not isinstance(funnel, Funnel):
            raise TypeError(f"expected a Funnel, got a {type(funnel).__name__}")
        if decoder is not None and not isinstance(decoder, Codec):
            raise TypeError(f"decoder is a {type(decoder).__name__}, it must be a Codec")
        encoder, layers = funnel.folded()
        described = _described(layers, funnel.activation, funnel.values)
        payload = (Raw() if decoder is None else decoder).encode(described)
        own = Limits(max_bytes=sys.maxsize)
        try:
            restored = Decoder.read(payload, device=str(encoder[0][0].device), limits=own)
        except DecodeError as error:
            raise ValueError(f"decoder is {decoder}: {error}") from None
        networks = _Networks(encoder, funnel.activation, funnel.chunk_size, restored, payload)
        return cls(restored.digest.hex(), networks)

    @property
    def decoder_payload(self) -> bytes:
        """What the receiver's `Shared.add_decoder` takes; its length is what the decoder costs."""
        return self._held().decoder_payload

    @property
    def outputs(self) -> int:
        """How many latents an update has."""
        return self._held().decoder.outputs

    def forward(self, values: Values) -> Values:
        """Return the latents of the values."""
        import torch

        networks = self._held()
        if np.shape(values) != (networks.decoder.values,):
            raise ValueError(
                f"the autoencoder is for {networks.decoder.values} values, "
                f"the float tensors have {np.size(values)}, tied ones counted once"
            )
        device = networks.encoder[0][0].device
        with torch.inference_mode(), in_float32(device):
            rows = _tensor(values).to(device)
            rows = in_chunks(rows[None], networks.chunk_size)
            latents = run(networks.encoder, rows, networks.activation, last=True)
            found: Values = latents.reshape(-1).cpu().numpy()
        largest = float(np.abs(found).max())
        if not networks.decoder.bound(largest) < _LARGEST:
            raise ValueError(f"the update is too large for {self}: a latent is {largest}")
        return found

    def inverse(self, outputs: Values) -> Values:
        """Return what the receiver makes of latents."""
        return self._held().decoder.inverse(outputs)

    def add_shared(self, shared: Shared) -> None:
        """Put the decoder into a store."""
        if self.networks is not None:
            shared.add_decoder(self.networks.decoder)

    def config(self) -> dict[str, Any]:
        """Return the name and the digest."""
        return {"stage": self.name, "digest": self.digest}

    def _text(self, name: str) -> str:
        return f'{name}("{self.digest}")'

    def wire(self) -> tuple[int, bytes]:
        """Return the id and the digest."""
        return 0x10, bytes.fromhex(self.digest)

    def _held(self) -> _Networks:
        if self.networks is None:
            raise ValueError(f"{self} is only a digest: make the codec by AutoEncoder.of(funnel)")
        return self.networks


def in_chunks(snapshots: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Cut vectors into rows of one chunk each, the last of a vector filled up with zeros."""
    import torch

    missing = -snapshots.shape[1] % chunk_size
    if missing:
        snapshots = torch.nn.functional.pad(snapshots, (0, missing))
    return snapshots.reshape(-1, chunk_size)
