"""Autoencoders in training: Chandar et al.'s funnel of fully connected layers, whole or shared by chunks."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from .. import arrays, dtypes, ops
from ..errors import NonFiniteError
from ..state import State, as_array
from . import _check
from .autoencoder import (
    ACTIVATIONS,
    MOST_LAYERS,
    device_of,
    in_chunks,
    in_float32,
    require_torch,
    run,
)

if TYPE_CHECKING:
    import torch

    from .autoencoder import Layers

_STATE_VERSION = 1
_BLOCK_BYTES = 1 << 26  # of snapshots that are looked at together


def flatten(update: Any) -> npt.NDArray[np.float32]:
    """Return the values of an update's float tensors, as an autoencoder sees them.

    Parameters
    ----------
    update : dict of str to array, list of arrays, or array
        As for `Codec.encode`.

    Returns
    -------
    array of float32, shape (values,)
        In the order of the tensors, each row-major; tied tensors once, integers and bools not at all.

    Raises
    ------
    NonFiniteError
        If a float is infinite or not a number, or becomes infinite in float32.

    Examples
    --------
    >>> import numpy as np, fedcodec as fc
    >>> fc.flatten({"weight": np.ones((2, 2)), "steps": np.array(7)})
    array([1., 1., 1., 1.], dtype=float32)
    """
    read = arrays.read_on_host(update)
    parts = [np.empty(0, np.float32)]
    for tensor, part in zip(read.spec.untied, read.storage, strict=True):
        dtype = dtypes.BY_NAME[tensor.dtype]
        if dtype.is_float:
            flat = part.reshape(-1).view(dtype.storage)
            wide = ops.widen(flat, tensor.dtype) if tensor.dtype.endswith("float16") else flat
            with np.errstate(over="ignore"):
                parts.append(wide.astype(np.float32, copy=False))
            if not np.isfinite(parts[-1]).all():
                raise NonFiniteError(
                    f"tensor {tensor.name!r}: a value is not finite in float32", tensor.name
                )
    return np.concatenate(parts)


class Snapshots:
    """Updates on disk, as many as there is room for, to train an autoencoder on (Chandar et al.'s pre-pass round).

    Threads and processes may add to one file at the same time.

    Parameters
    ----------
    path : str or Path
        A file of float32 values, little-endian; one that is there is gone on with.
    values : int
        Values of each.

    Examples
    --------
    >>> import tempfile, numpy as np, fedcodec as fc
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     snapshots = fc.Snapshots(f"{folder}/weights", values=3)
    ...     snapshots.add({"weight": np.ones(3, np.float32)})
    ...     snapshots.array().shape
    (1, 3)
    """

    def __init__(self, path: str | Path, values: int) -> None:
        _check.integer("values", values, 1)
        self._path = Path(path)
        self._values = values
        size = self._path.stat().st_size if self._path.exists() else 0
        if size % (4 * values):
            raise ValueError(f"{path}: {size} bytes are not snapshots of {values} float32 values")

    def add(self, update: Any) -> None:
        """Append an update, as `flatten` sees it.

        Raises
        ------
        ValueError
            If it has another number of values.
        NonFiniteError
            As for `flatten`.
        """
        import fcntl

        values = flatten(update)
        if values.size != self._values:
            raise ValueError(f"the update has {values.size} values, expected {self._values}")
        size = 4 * self._values
        with self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.truncate(
                os.fstat(file.fileno()).st_size // size * size
            )  # what was written in part
            file.write(values.astype("<f4", copy=False).tobytes())

    def __len__(self) -> int:
        return self._path.stat().st_size // (4 * self._values) if self._path.exists() else 0

    def array(self) -> npt.NDArray[np.float32]:
        """Return all, read from disk where they are looked at; shape (snapshots, values)."""
        if not len(self):
            return np.empty((0, self._values), np.float32)
        return np.memmap(self._path, "<f4", "r", shape=(len(self), self._values))


class Epoch(NamedTuple):
    """Mean squared errors after an epoch, in squares of the snapshots' standard deviation."""

    training_loss: float
    validation_loss: float | None


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _with_gradients(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a method train, whatever the caller has set for its own networks."""

    @functools.wraps(method)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import torch

        with torch.inference_mode(False), torch.enable_grad():
            return method(*args, **kwargs)

    return inner


class Funnel:
    """An autoencoder of fully connected layers that narrow to the latents and widen again.

    Values are standardised by two scalars, which are folded into the layers of the codec, so they cost no parameters.
    The activation follows every layer but the last one.

    Parameters
    ----------
    values : int
        Values of an update's float tensors.
    latents : int
        Of each chunk.
    hidden : sequence of int
        Widths between values and latents, the widest first, 15 at most; the decoder has them in reverse.
    chunk_size : int, optional
        Cut the values into chunks of this size, which all go through the same layers, so that the decoder stays small
        (what Chandar et al., section 4.3, leaves open: a convolution whose stride is its width). By default the values
        are one chunk.
    activation : {"tanh", "relu", "sigmoid", "identity"}
    seed : int
        Of the first weights.

    Raises
    ------
    ValueError
        If the widths make no funnel, or the activation is unknown.

    Examples
    --------
    >>> import fedcodec as fc
    >>> fc.Funnel(values=15_910, latents=32).parameters
    1034182
    """

    def __init__(
        self,
        values: int,
        latents: int,
        hidden: Sequence[int] = (),
        *,
        chunk_size: int | None = None,
        activation: str = "tanh",
        seed: int = 0,
    ) -> None:
        require_torch()
        import torch

        _check.integer("values", values, 1)
        self.values = values
        self.chunk_size = values if chunk_size is None else chunk_size
        _check.integer("chunk_size", self.chunk_size, 1, values)
        if not isinstance(hidden, Sequence):
            raise TypeError(f"hidden is {hidden!r}, it must be a sequence of integers")
        most = self.chunk_size
        named = [(f"hidden[{place}]", width) for place, width in enumerate(hidden)]
        for name, width in (*named, ("latents", latents)):
            _check.integer(name, width, 1, most)  # each at most the one before, or it is no funnel
            most = width
        _check.integer("seed", seed, 0)
        widths = (self.chunk_size, *hidden, latents)
        if len(hidden) + 1 > MOST_LAYERS:
            raise ValueError(f"{len(hidden) + 1} layers, the most is {MOST_LAYERS}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}, it must be one of {', '.join(ACTIVATIONS)}"
            )
        self.activation = activation
        generator = torch.Generator().manual_seed(seed)
        both = [*pairwise(widths), *pairwise(reversed(widths))]
        layers = [_layer(inputs, outputs, generator) for inputs, outputs in both]
        self._layers, self._encoders = layers, len(widths) - 1
        self._mean, self._deviation = 0.0, 1.0
        self._fitted = False

    @classmethod
    def principal(cls, snapshots: npt.NDArray[np.float32], latents: int) -> Funnel:
        """Make the linear autoencoder of least squared error on snapshots: their principal components.

        It needs no training, and none that has no activation and one chunk can do better on these snapshots.

        Parameters
        ----------
        snapshots : array of float32, shape (snapshots, values)
            As for `fit`.
        latents : int
            Those beyond what the snapshots span are always 0.

        Raises
        ------
        ValueError
            As for `fit`, and if there are more latents than values.

        Examples
        --------
        >>> import numpy as np, fedcodec as fc
        >>> snapshots = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
        >>> codec = fc.AutoEncoder.of(fc.Funnel.principal(snapshots, latents=3))
        >>> bool(np.allclose(codec.inverse(codec.forward(snapshots[1])), snapshots[1], atol=1e-5))
        True
        """
        require_torch()
        import torch

        _require_snapshots("snapshots", snapshots)
        made = cls(snapshots.shape[1], latents, activation="identity")
        centre = _centre(snapshots)
        columns = max(1, _BLOCK_BYTES // (8 * len(snapshots)))
        pieces = [slice(start, start + columns) for start in range(0, made.values, columns)]
        products = np.zeros((len(snapshots), len(snapshots)))
        for piece in pieces:
            centred = snapshots[:, piece] - centre[piece]
            products += centred @ centred.T
        squares, vectors = np.linalg.eigh(products)
        squares, vectors = squares[::-1][:latents], vectors[:, ::-1][:, :latents]
        spanned = squares > squares[0] * len(snapshots) * np.finfo(np.float64).eps
        vectors = vectors[:, spanned] / np.sqrt(squares[spanned])
        components = np.zeros((latents, made.values), np.float32)
        for piece in pieces:
            components[: vectors.shape[1], piece] = vectors.T @ (
                snapshots[:, piece] - centre[piece]
            )
        weight, middle = torch.from_numpy(components), torch.from_numpy(centre.astype(np.float32))
        made._layers = [(weight, _against(weight, middle)), (weight.T.contiguous(), middle)]
        made._fitted = True
        return made

    @classmethod
    def spanning(cls, models: npt.NDArray[np.float32]) -> Funnel:
        """Make an autoencoder whose decoder needs not be sent: of models that both ends hold, such as past averages.

        It returns the last model plus multiples of how the others differ from it. The differences are the same on every
        machine, so a receiver with equal models makes the decoder of the same digest by itself. The encoder is that of
        least squares.

        Parameters
        ----------
        models : array of float32, shape (models, values)
            Two at least, as `flatten` sees them. There is a latent for each but the last one.

        Raises
        ------
        ValueError
            If there is one only, and as for `fit`.

        Examples
        --------
        >>> import numpy as np, fedcodec as fc
        >>> models = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
        >>> client = fc.AutoEncoder.of(fc.Funnel.spanning(models))
        >>> server = fc.Shared()
        >>> server.add_decoder(fc.AutoEncoder.of(fc.Funnel.spanning(models)).decoder_payload).hex() == client.digest
        True
        >>> between = models[2] + 0.25 * (models[0] - models[2])
        >>> decoded = fc.decode(client.encode(between), shared=server)
        >>> bool(np.allclose(decoded, between, atol=1e-5))
        True
        """
        require_torch()
        import torch

        _require_snapshots("models", models)
        if len(models) < 2:
            raise ValueError("models: there is one, it takes two")
        last = models[-1]
        differences = models[:-1] - last
        wide = differences.astype(np.float64)
        products = wide @ wide.T
        lengths = np.sqrt(np.diag(products))
        lengths[lengths == 0] = 1
        scales = np.outer(lengths, lengths)
        # What depends on the others but for their rounding to float32 must not be inverted.
        precision = float(np.finfo(np.float32).eps)
        inverse = np.linalg.pinv(products / scales, precision, hermitian=True) / scales @ wide
        made = cls(models.shape[1], len(differences), activation="identity")
        weight, middle = torch.from_numpy(inverse.astype(np.float32)), torch.from_numpy(last.copy())
        made._layers = [
            (weight, _against(weight, middle)),
            (torch.from_numpy(np.ascontiguousarray(differences.T)), middle),
        ]
        made._fitted = True
        return made

    @property
    def parameters(self) -> int:
        """Number of weights and biases of both halves."""
        return sum(weight.numel() + bias.numel() for weight, bias in self._layers)

    @property
    def outputs(self) -> int:
        """How many latents an update has: those of all chunks."""
        return -(-self.values // self.chunk_size) * len(self._layers[self._encoders - 1][1])

    @_with_gradients
    def fit(
        self,
        snapshots: npt.NDArray[np.float32],
        *,
        validation: npt.NDArray[np.float32] | None = None,
        epochs: int = 100,
        batch_size: int = 32,
        learning_rate: float = 0.3,
        patience: int | None = None,
        device: str | None = None,
        mixed_precision: bool | None = None,
        seed: int = 0,
        on_epoch: Callable[[Epoch], None] | None = None,
        progress: bool = False,
    ) -> list[Epoch]:
        """Train on updates, by Adam on the mean squared error (Chandar et al., equation 3).

        A funnel that was trained before goes on from its weights, with an Adam that begins anew.

        Parameters
        ----------
        snapshots : array of float32, shape (snapshots, values)
            Updates as `flatten` sees them; of an array on disk (`Snapshots`) a batch at a time is read.
        validation : array of float32, shape (snapshots, values), optional
            Others, whose error is measured after each epoch. The weights of the best epoch are what remains, or those
            from before where they were trained and better.
        epochs, batch_size : int
            Passes, and snapshots of a step.
        learning_rate : float
            Of weights of a layer with one input; each has it divided by the number of its inputs, biases by 10.
        patience : int, optional
            Stop once the validation's error has not fallen for so many epochs; there must be a validation then.
        device : str, optional
            Of torch; by default where the layers are.
        mixed_precision : bool, optional
            Multiply in bfloat16; on a GPU by default.
        seed : int
            Of the order of the snapshots.
        on_epoch : callable, optional
            Called after each epoch.
        progress : bool
            Show a progress bar on standard error; needs rich.

        Returns
        -------
        list of Epoch

        Raises
        ------
        NonFiniteError
            If training diverges; the weights are as before.
        ValueError
            If the snapshots are none, not of the right shape or not finite, or a number is out of its range.
        BackendError
            If torch has no such device.
        """
        import torch

        _check.integer("epochs", epochs, 0)
        _check.integer("batch_size", batch_size, 1)
        _check.finite("learning_rate", learning_rate)
        _check.integer("seed", seed, 0)
        if on_epoch is not None and not callable(on_epoch):
            raise TypeError(f"on_epoch is {on_epoch!r}, it must be callable")
        if patience is not None:
            _check.integer("patience", patience, 0)
            if validation is None:
                raise ValueError("patience needs a validation")
        for name, array in (("snapshots", snapshots), ("validation", validation)):
            if array is not None:
                _require_snapshots(name, array, self.values)
        if self._fitted:
            mean, deviation, layers = self._mean, self._deviation, self._layers
        else:
            mean, deviation = _moments(snapshots)
            layers = self._centred(snapshots, mean, deviation)
        target = layers[0][0].device if device is None else device_of(device)
        layers = [
            (weight.to(target, copy=True), bias.to(target, copy=True)) for weight, bias in layers
        ]
        groups = []
        for weight, bias in layers:
            rate = learning_rate / weight.shape[1]
            groups += [{"params": weight.requires_grad_(), "lr": rate}]
            groups += [{"params": bias.requires_grad_(), "lr": learning_rate / 10}]
        optimizer = torch.optim.Adam(groups, fused=True)
        mixed = target.type != "cpu" if mixed_precision is None else mixed_precision
        precision = torch.autocast(target.type, torch.bfloat16, enabled=mixed)

        def cut(
            rows: torch.Tensor,
        ) -> torch.Tensor:  # what fills the last chunk up has no part in it
            per_snapshot = self.values + -self.values % self.chunk_size
            return rows.reshape(-1, per_snapshot)[:, : self.values]

        def loss_of(array: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64]) -> torch.Tensor:
            rows = torch.from_numpy(np.ascontiguousarray(array[chosen])).to(target)
            rows = (in_chunks(rows, self.chunk_size) - mean) / deviation
            with precision:
                latents = run(layers[: self._encoders], rows, self.activation, last=True)
                found = run(layers[self._encoders :], latents, self.activation, last=False)
            return torch.nn.functional.mse_loss(cut(found.float()), cut(rows))

        def loss_on(array: npt.NDArray[np.float32]) -> float:
            batches = _batches(np.arange(len(array)), batch_size)
            with torch.no_grad():
                total = sum(len(batch) * float(loss_of(array, batch)) for batch in batches)
            return total / len(array)

        generator = np.random.default_rng(seed)
        history: list[Epoch] = []
        best, best_epoch, best_layers = math.inf, 0, None
        if validation is not None and self._fitted:
            best, best_layers = loss_on(validation), self._layers
        for number in _shown(range(1, epochs + 1), progress):
            total = 0.0
            for batch in _batches(generator.permutation(len(snapshots)), batch_size):
                loss = loss_of(snapshots, np.sort(batch))
                optimizer.zero_grad()
                with in_float32(target):
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                total += len(batch) * float(loss.detach())
            training_loss = total / len(snapshots)
            validation_loss = None if validation is None else loss_on(validation)
            judged = training_loss if validation_loss is None else validation_loss
            if not math.isfinite(judged) or not all(map(_is_finite, layers)):
                raise NonFiniteError(f"training diverged in epoch {number}: lower learning_rate")
            history.append(Epoch(training_loss, validation_loss))
            if on_epoch is not None:
                on_epoch(history[-1])
            if validation is None:
                continue
            if judged < best:
                best, best_epoch = judged, number
                best_layers = [
                    (weight.detach().clone(), bias.detach().clone()) for weight, bias in layers
                ]
            elif patience is not None and number - best_epoch >= patience:
                break
        self._layers = best_layers or [(weight.detach(), bias.detach()) for weight, bias in layers]
        self._mean, self._deviation, self._fitted = mean, deviation, True
        return history

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that was trained, as NumPy arrays: for `numpy.savez`, or for a payload to those who have none.

        `load_state_dict` of another `Funnel` of the same widths goes on from it.

        Examples
        --------
        >>> import fedcodec as fc
        >>> funnel = fc.Funnel(values=50, latents=2)
        >>> payload = fc.Raw().encode(funnel.state_dict())  # `Int8()` takes a quarter
        >>> twin = fc.Funnel(values=50, latents=2, seed=1)
        >>> twin.load_state_dict(fc.decode(payload))
        >>> fc.AutoEncoder.of(twin) == fc.AutoEncoder.of(funnel)
        True
        """
        state: dict[str, npt.NDArray[Any]] = {
            "version": np.array(_STATE_VERSION, np.int64),
            "values": np.array(self.values, np.int64),
            "chunk_size": np.array(self.chunk_size, np.int64),
            "activation": np.array(ACTIVATIONS.index(self.activation), np.int64),
            "fitted": np.array(self._fitted, np.int64),
            "mean": np.array(self._mean),
            "deviation": np.array(self._deviation),
        }
        for name, part in zip(self._names(), chain(*self._layers), strict=True):
            state[name] = part.detach().cpu().numpy().copy()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Parameters
        ----------
        state : mapping of str to array
            Of NumPy or torch, on the CPU.

        Raises
        ------
        TypeError
            If it is no dict.
        ValueError
            If it is of another version, shape or activation, or not finite; the layers are as before.
        """
        import torch

        activation = ACTIVATIONS.index(self.activation)
        fixed = {"values": self.values, "chunk_size": self.chunk_size, "activation": activation}
        found = State(state, {"version": _STATE_VERSION, **fixed})
        mean, deviation, fitted = (found.scalar(key) for key in ("mean", "deviation", "fitted"))
        finite = isinstance(mean, float) and math.isfinite(mean)
        found.require(finite, "mean", "a finite float")
        positive = isinstance(deviation, float) and 0 < deviation < math.inf
        found.require(positive, "deviation", "a finite float above 0")
        parts = []
        for name, part in zip(self._names(), chain(*self._layers), strict=True):
            array = as_array(found[name], name)
            if array.dtype != np.float32 or array.shape != part.shape:
                expected = f"float32 of {tuple(part.shape)}"
                raise ValueError(
                    f"state: {name}: {array.dtype} of shape {array.shape}, expected {expected}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"state: {name}: a value is not finite")
            parts.append(torch.from_numpy(array).to(part.device))
        self._layers = list(zip(parts[::2], parts[1::2], strict=True))
        self._mean, self._deviation, self._fitted = mean, deviation, fitted == 1

    def _names(self) -> list[str]:
        depths = (self._encoders, len(self._layers) - self._encoders)
        return [
            f"{half}.{number}.{part}"
            for half, depth in zip(("encoder", "decoder"), depths, strict=True)
            for number in range(depth)
            for part in ("weight", "bias")
        ]

    def _centred(
        self, snapshots: npt.NDArray[np.float32], mean: float, deviation: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the first layers with biases by which the mean snapshot has latents of 0 and is what 0 decodes to.

        Snapshots differ little from each other, and the biases would take long to learn what they share.
        """
        import torch

        rows = in_chunks(torch.from_numpy(_centre(snapshots))[None], self.chunk_size)
        centre = ((rows.mean(0) - mean) / deviation).float()
        layers = list(self._layers)
        weight, _ = layers[0]
        layers[0] = weight, _against(weight, centre.to(weight.device))
        layers[-1] = layers[-1][0], centre.to(weight.device)
        return layers

    def folded(self) -> tuple[Layers, Layers]:
        """Return the layers of the encoder and of the decoder, standardisation folded in."""
        layers = [(weight.detach(), bias.detach()) for weight, bias in self._layers]
        encoder, decoder = layers[: self._encoders], layers[self._encoders :]
        weight, bias = encoder[0]
        shift = self._mean / self._deviation
        encoder[0] = weight / self._deviation, bias - shift * weight.sum(1)
        weight, bias = decoder[-1]
        decoder[-1] = weight * self._deviation, bias * self._deviation + self._mean
        return encoder, decoder


def _require_snapshots(name: str, array: object, values: int | None = None) -> None:
    # Subclasses, such as masked arrays, mean other things.
    if not isinstance(array, np.ndarray) or type(array) not in (np.ndarray, np.memmap):
        hint = ", such as its array()" if isinstance(array, Snapshots) else ""
        raise TypeError(f"{name} is a {type(array).__name__}, it must be a NumPy array{hint}")
    if array.dtype != np.float32 or array.ndim != 2 or values not in (None, array.shape[1]):
        expected = f"float32 of (any, {values or 'any'})"
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, expected {expected}")
    if not array.size:
        raise ValueError(f"{name}: there are none")
    if not all(np.isfinite(block).all() for block in _blocks(array)):
        raise ValueError(f"{name}: a value is not finite")


def _layer(
    inputs: int, outputs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    most = math.sqrt(6 / (inputs + outputs))
    weight = torch.empty(outputs, inputs, dtype=torch.float32, device="cpu")
    return weight.uniform_(-most, most, generator=generator), torch.zeros_like(weight[:, 0])


def _against(weight: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Return the biases by which a centre comes to 0."""
    with in_float32(weight.device):
        return -(weight @ centre)


def _is_finite(layer: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(bool(part.isfinite().all()) for part in layer)


def _blocks(array: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    rows = max(1, _BLOCK_BYTES // (4 * array.shape[1]))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _centre(snapshots: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = sum(block.sum(0, np.float64) for block in _blocks(snapshots))
    return total / len(snapshots)


def _moments(snapshots: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean and the standard deviation of all values; 1 for the latter where it is 0."""
    mean = sum(float(block.sum(dtype=np.float64)) for block in _blocks(snapshots)) / snapshots.size
    squares = sum(
        float(np.square(block - mean, dtype=np.float64).sum()) for block in _blocks(snapshots)
    )
    return mean, math.sqrt(squares / snapshots.size) or 1.0


def _batches(order: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _shown(epochs: range, progress: bool) -> Iterable[int]:
    if not progress:
        return epochs
    from rich.console import Console
    from rich.progress import track

    return track(epochs, "autoencoder", console=Console(stderr=True))
