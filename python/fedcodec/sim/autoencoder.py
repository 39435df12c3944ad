"""Updates as the latents of an autoencoder (paper 004): how well they keep what a classifier has learned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fedcodec as fc

from .data import Dataset, load_dataset, partition_iid
from .models import FlatModel, Update, build_paper_model


@dataclass(frozen=True)
class Task:
    """A classifier of paper 004, its training, and the autoencoder of its weights.

    Attributes
    ----------
    model, dataset : str
        See `fedcodec.sim.models.build_paper_model` and `fedcodec.sim.data.load_dataset`.
    latents : int
    epochs : int
        Of the pre-pass, in which a collaborator trains alone and keeps its weights.
    snapshots : int
        That it keeps in each epoch, at equal distances. The last, at its end, the autoencoder never sees.
    autoencoder_epochs : int
        At most.
    rounds : int
        Of the federation of two collaborators that follows.
    train_images : int, optional
        A random part of the training set; all of it by default.
    """

    model: str
    dataset: str
    latents: int
    epochs: int
    snapshots: int
    autoencoder_epochs: int
    rounds: int
    train_images: int | None = None
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9


TASKS = {
    "mnist": Task("mnist-classifier", "mnist", 32, 10, 40, 200, 10),
    "cifar10": Task("cifar10-classifier", "cifar10", 320, 40, 10, 50, 10),
}
# What can be had on processors in half an hour.
SMALL_TASKS = TASKS | {"cifar10": replace(TASKS["cifar10"], train_images=10_000, rounds=5)}
QUICK_TASKS = {"digits": Task("mnist-classifier", "digits", 8, 10, 10, 50, 5, batch_size=16)}


@dataclass
class Curve:
    """A network's accuracy (0 to 1) and loss on the test set, one of each for every point in time."""

    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def add(self, network: FlatModel, weights: Update, data: Dataset) -> None:
        """Measure the network with these weights."""
        network.load(weights)
        accuracy, loss = network.evaluate(data.test_images, data.test_labels)
        self.accuracy.append(accuracy)
        self.loss.append(loss)


def prepass(
    task: Task,
    network: FlatModel,
    data: Dataset,
    part: NDArray[np.int64],
    seed: Sequence[int],
    keep: Callable[[Update, bool], None],
) -> None:
    """Train on a collaborator's samples alone (paper 004, section 3).

    Parameters
    ----------
    keep : callable
        Called with the weights ``task.snapshots`` times in an epoch, and with whether it ends with them.
    """
    generator = np.random.default_rng(seed)
    batches = -(-len(part) // task.batch_size)
    moments = {round(share * batches / task.snapshots) for share in range(1, task.snapshots)}
    step = 0

    def on_batch() -> None:
        nonlocal step
        step += 1
        place = step % batches
        if place in moments or place == 0:
            keep(network.named(network.weights), place == 0)

    network.train(
        data.train_images,
        data.train_labels,
        (torch.from_numpy(generator.permutation(part)) for _ in range(task.epochs)),
        task.batch_size,
        task.learning_rate,
        task.momentum,
        on_batch=on_batch,
    )


def follow(
    task: Task,
    seed: int,
    data_dir: Path | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fit an autoencoder to a collaborator's weights, and measure what it makes of those that it has not seen.

    These are the weights at the end of each epoch of the pre-pass, between those that it was fitted to; and, with the
    decoder as it is, those of a federation with another collaborator that starts anew, in which nothing is compressed.
    Principal components of the same snapshots and as many latents stand beside it.

    Parameters
    ----------
    task : Task
    seed : int
        Of samples, weights and batches.
    data_dir : Path, optional
    device : str
        Of torch.
    on_step : callable
        Called ``steps(task)`` times.

    Returns
    -------
    dict
        As JSON has it: "values" of the network, "parameters" of the autoencoder; "decoder_bytes" and "payload_bytes"
        by method; "epochs" and "rounds": of "original" weights and of each method's a `Curve`; "fit", a list of the
        training's and the validation's loss after each epoch; "seconds" of "prepass", "fit", "encode" and "decode".

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.
    NonFiniteError
        If training diverges.

    Examples
    --------
    >>> task = Task("mnist-classifier", "digits", 4, epochs=2, snapshots=5, autoencoder_epochs=3, rounds=1)
    >>> found = follow(task, seed=0)
    >>> found["values"], len(found["epochs"]["original"]["accuracy"])
    (1510, 2)
    """
    data = load_dataset(task.dataset, data_dir)
    chosen = np.random.default_rng([seed, 0]).permutation(len(data.train_labels))
    chosen = chosen[: task.train_images]
    parts = [
        chosen[part] for part in partition_iid(len(chosen), 2, np.random.default_rng([seed, 1]))
    ]
    data = data.to(device)
    network = FlatModel(build_paper_model(task.model, data, seed), device)
    initial = network.named(network.weights)
    seconds, logged = {}, []
    with tempfile.TemporaryDirectory() as folder:
        kept = [
            fc.Snapshots(Path(folder) / name, len(network.weights))
            for name in ("training", "validation")
        ]

        def keep(weights: Update, ends_epoch: bool) -> None:
            if ends_epoch:
                logged.append(weights)
                on_step()
            else:
                kept[len(kept[0]) >= 9 * (len(kept[1]) + 1)].add(weights)

        start = perf_counter()
        prepass(task, network, data, parts[0], [seed, 2, 0], keep)
        seconds["prepass"] = perf_counter() - start
        training, validation = (of.array() for of in kept)
        start = perf_counter()
        funnel = fc.Funnel(len(network.weights), task.latents, seed=seed)
        history = funnel.fit(
            training,
            validation=validation,
            epochs=task.autoencoder_epochs,
            patience=20,
            device=device,
            seed=seed,
        )
        seconds["fit"] = perf_counter() - start
        on_step()
        codecs = {
            "autoencoder": fc.AutoEncoder.of(funnel),
            "autoencoder, int8 decoder": fc.AutoEncoder.of(funnel, decoder=fc.Int8()),
            "principal components": fc.AutoEncoder.of(
                fc.Funnel.principal(training, min(task.latents, len(training)))
            ),
        }
        on_step()
    epochs = _curves(codecs, network, data, logged)
    encode, decode = _timed(codecs["autoencoder"], logged[-1])
    mine = []
    for weights in _federation(task, network, data, parts, initial, seed):
        mine.append(weights)
        on_step()
    return {
        "values": len(network.weights),
        "parameters": funnel.parameters,
        "decoder_bytes": {name: len(codec.decoder_payload) for name, codec in codecs.items()},
        "payload_bytes": {
            name: len(codec.encode(initial, framing="reference")) for name, codec in codecs.items()
        },
        "epochs": epochs,
        "rounds": _curves(codecs, network, data, mine),
        "fit": [list(epoch) for epoch in history],
        "seconds": seconds | {"encode": encode, "decode": decode},
    }


def steps(task: Task) -> int:
    """Return how often `follow` calls back."""
    return task.epochs + 2 + task.rounds


def _curves(
    codecs: Mapping[str, fc.AutoEncoder],
    network: FlatModel,
    data: Dataset,
    points: Sequence[Update],
) -> dict[str, dict[str, list[float]]]:
    curves = {"original": Curve(), **{name: Curve() for name in codecs}}
    shared = fc.Shared()
    for codec in codecs.values():
        codec.add_shared(shared)
    for weights in points:
        curves["original"].add(network, weights, data)
        for name, codec in codecs.items():
            payload = codec.encode(weights, framing="reference")
            curves[name].add(network, fc.decode(payload, like=weights, shared=shared), data)
    return {name: vars(curve) for name, curve in curves.items()}


def _federation(
    task: Task,
    network: FlatModel,
    data: Dataset,
    parts: Sequence[NDArray[np.int64]],
    weights: Update,
    seed: int,
) -> Iterator[Update]:
    """Average the collaborators' weights for some rounds, and give those that the first of them sends."""
    for number in range(1, task.rounds + 1):
        server = fc.Aggregator(like=weights)
        for client, part in enumerate(parts):
            order = np.random.default_rng([seed, 3, number, client]).permutation(part)
            network.load(weights)
            network.train(
                data.train_images,
                data.train_labels,
                [torch.from_numpy(order)],
                task.batch_size,
                task.learning_rate,
                task.momentum,
            )
            update = network.named(network.weights)
            server.add(fc.Raw().encode(update), weight=len(part))
            if client == 0:
                yield update
        weights = server.mean()


def _timed(codec: fc.AutoEncoder, update: Update) -> tuple[float, float]:
    """Return the medians of the seconds that encoding and decoding take."""
    shared = fc.Shared()
    codec.add_shared(shared)
    taken: list[tuple[float, float]] = []
    for _ in range(5):
        start = perf_counter()
        payload = codec.encode(update, framing="reference")
        encoded = perf_counter()
        fc.decode(payload, like=update, shared=shared)
        taken.append((encoded - start, perf_counter() - encoded))
    encoding, decoding = zip(*taken, strict=True)
    return median(encoding), median(decoding)
