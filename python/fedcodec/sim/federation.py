"""Federated averaging of one codec with one seed, every byte counted as ``len(payload)``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import fedcodec as fc

from .data import Dataset, load_dataset, partition_dirichlet, partition_iid
from .links import parse_link
from .models import FlatModel, Update, build_model
from .settings import Settings
from .sizes import ideal_bytes


@dataclass
class History:
    """What happened in each round; the same on every run with the same settings and seed, on one machine.

    Attributes
    ----------
    accuracy, loss : list of float or None
        On the test set, after the round; None in rounds that were not evaluated.
    uplink_bytes, downlink_bytes : list of int
        Payload bytes of all sampled clients together.
    largest_payload_bytes : list of int
        Of the sampled clients' uplink payloads.
    transfer_seconds : list of float
        Simulated: a synchronous round waits for the slowest of the sampled clients, all on the same link.
    """

    accuracy: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    uplink_bytes: list[int] = field(default_factory=list)
    downlink_bytes: list[int] = field(default_factory=list)
    largest_payload_bytes: list[int] = field(default_factory=list)
    transfer_seconds: list[float] = field(default_factory=list)


@dataclass
class Timing:
    """Measured wall-clock seconds of each round, over all its payloads.

    Attributes
    ----------
    encode_seconds : list of float
        From a client's delta to its payload, error feedback included.
    decode_seconds : list of float
        From the payloads to their weighted mean.
    round_seconds : list of float
        The whole round: local training and evaluation too.
    """

    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)


@dataclass
class Run:
    """One codec with one seed.

    Attributes
    ----------
    ideal_bytes : float or None
        See `fedcodec.sim.sizes.ideal_bytes`.
    """

    codec: str
    seed: int
    parameters: int
    ideal_bytes: float | None
    history: History
    timing: Timing


def encode_seed(*parts: int | str) -> int:
    """Return a 64-bit seed that depends on nothing but the parts, such as (run seed, round, client).

    Examples
    --------
    >>> encode_seed(0, 12, 3) == encode_seed(0, 12, 3) != encode_seed(0, 1, 23)
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def require_device(device: str) -> None:
    """Raise `ValueError` unless torch computes on a device."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"torch cannot use the device {device!r}: {error}") from error


def prepare(settings: Settings, seed: int) -> tuple[Dataset, list[NDArray[np.int64]]]:
    """Return the data set and each client's samples: all that can fail for want of something on this machine.

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.
    ValueError
        If the settings do not fit the data set or this machine.
    """
    require_device(settings.device)
    data = load_dataset(settings.dataset, settings.data_dir)
    labels, generator = data.train_labels.numpy(), np.random.default_rng([seed, 0])
    if settings.dirichlet is None:
        return data, partition_iid(len(labels), settings.clients, generator)
    return data, partition_dirichlet(labels, settings.clients, settings.dirichlet, generator)


def simulate(
    settings: Settings, codec: str, seed: int, on_round: Callable[[], None] | None = None
) -> Run:
    """Train by federated averaging (McMahan et al. 2017, algorithm 1) with compressed uplink deltas.

    Initial weights, partition, sampling and batches depend on ``seed`` alone, so runs of different codecs differ by
    their codec only.

    Parameters
    ----------
    settings : Settings
    codec : str
        Text of the uplink codec.
    seed : int
        Non-negative.
    on_round : callable, optional
        Called after each round.

    Returns
    -------
    Run

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.
    NonFiniteError
        If training diverges.
    ValueError
        If the settings do not fit the data set or this machine, or the codec's text is not one.
    """
    data, parts = prepare(settings, seed)
    exchange = _InProcess(settings, codec, seed, data.to(settings.device), parts)
    return federate(settings, codec, seed, data, exchange, on_round)


class Exchange(NamedTuple):
    """What one round brought the server.

    Attributes
    ----------
    mean : dict of str to array
        Of the clients' deltas, weighted by their numbers of samples.
    uplink_bytes, downlink_bytes : list of int
        Of each sampled client.
    encode_seconds, decode_seconds : float
        See `Timing`.
    """

    mean: Update
    uplink_bytes: list[int]
    downlink_bytes: list[int]
    encode_seconds: float
    decode_seconds: float


def federate(
    settings: Settings,
    codec: str,
    seed: int,
    data: Dataset,
    exchange: Callable[[int, list[int], Update], Exchange],
    on_round: Callable[[], None] | None = None,
) -> Run:
    """Run the server's side of `simulate`, whatever engine runs the clients.

    Parameters
    ----------
    settings, codec, seed, on_round
        As for `simulate`.
    data : Dataset
        For the evaluation.
    exchange : callable
        Takes the round's number, the sampled clients and the weights, and returns what came back.

    Returns
    -------
    Run
    """
    data = data.to(settings.device)
    model = FlatModel(build_model(settings.model, data, settings.hidden, seed), settings.device)
    sampling = np.random.default_rng([seed, 1])
    weights = model.named(model.weights)
    link = parse_link(settings.link)
    history, timing = History(), Timing()

    for number in range(1, settings.rounds + 1):
        round_start = perf_counter()
        sampled = sampling.choice(
            settings.clients, settings.clients_per_round, replace=False
        ).tolist()
        came = exchange(number, sampled, weights)
        weights = {name: weights[name] + came.mean[name] for name in weights}

        accuracy, loss = None, None
        counts = number > settings.rounds - settings.average_last
        if counts or number % settings.evaluate_every == 0:
            model.load(weights)
            accuracy, loss = model.evaluate(data.test_images, data.test_labels)
        history.accuracy.append(accuracy)
        history.loss.append(loss)
        history.uplink_bytes.append(sum(came.uplink_bytes))
        history.downlink_bytes.append(sum(came.downlink_bytes))
        history.largest_payload_bytes.append(max(came.uplink_bytes))
        history.transfer_seconds.append(
            max(map(link.seconds, came.downlink_bytes, came.uplink_bytes))
        )
        timing.encode_seconds.append(came.encode_seconds)
        timing.decode_seconds.append(came.decode_seconds)
        timing.round_seconds.append(perf_counter() - round_start)
        if on_round is not None:
            on_round()
    sizes = [array.size for array in weights.values()]
    return Run(codec, seed, sum(sizes), ideal_bytes(fc.parse(codec), sizes), history, timing)


class _InProcess:
    """The exchange of the built-in loop: one client after another, on one copy of the network."""

    def __init__(
        self,
        settings: Settings,
        codec: str,
        seed: int,
        data: Dataset,
        parts: Sequence[NDArray[np.int64]],
    ) -> None:
        self._settings, self._codec, self._seed = settings, codec, seed
        self._training = LocalTraining(settings, seed, data, parts)
        self._clients = Clients(settings, codec, seed)
        delta = settings.downlink_delta
        self._broadcast = Dense(settings.downlink) if delta is None else Delta(delta)

    def __call__(self, number: int, sampled: list[int], weights: Update) -> Exchange:
        place = f"{self._codec}, seed {self._seed}, round {number}"
        server_seed = encode_seed(self._seed, number, "server")
        with _explained(f"{place}, server"):
            received, downlink_bytes = self._broadcast.send(weights, sampled, server_seed)
        aggregator = fc.Aggregator(like=fc.Spec.of(weights))
        uplink_bytes, encode_seconds, decode_seconds = [], 0.0, 0.0
        for client in sampled:
            trained = self._training(client, number, received)
            before_encode = perf_counter()
            delta = {name: trained[name] - received[name] for name in received}
            with _explained(f"{place}, client {client}"):
                payload = self._clients.encode(client, delta, number)
            before_decode = perf_counter()
            aggregator.add(payload, weight=self._training.samples(client))
            decode_seconds += perf_counter() - before_decode
            encode_seconds += before_decode - before_encode
            self._clients.accept(client)
            uplink_bytes.append(len(payload))
        before_mean = perf_counter()
        mean = aggregator.mean()
        decode_seconds += perf_counter() - before_mean
        return Exchange(mean, uplink_bytes, downlink_bytes, encode_seconds, decode_seconds)


@contextmanager
def _explained(place: str) -> Iterator[None]:
    try:
        yield
    except fc.NonFiniteError as error:
        raise fc.NonFiniteError(
            f"{place}: {error}; the training diverged, lower the learning rate", error.tensor
        ) from error


class Clients:
    """The encoders of all clients, each with its own error feedback if there is any."""

    def __init__(self, settings: Settings, codec: str, seed: int) -> None:
        self._codec = fc.parse(codec)
        self._error_feedback = settings.error_feedback
        self._seed = seed
        self._feedback: dict[int, fc.ErrorFeedback] = {}

    def encode(self, client: int, delta: Update, number: int) -> bytes:
        """Return the payload that a client sends in the round of this number."""
        seed = encode_seed(self._seed, number, client)
        if not self._error_feedback:
            return self._codec.encode(delta, framing="reference", seed=seed)
        feedback = self._feedback.setdefault(client, fc.ErrorFeedback(self._codec))
        return feedback.encode(delta, framing="reference", seed=seed)

    def accept(self, client: int) -> None:
        """Note that the server took the client's last payload."""
        if self._error_feedback:
            self._feedback[client].accept()


class Dense:
    """The server sends its whole weights to every sampled client."""

    def __init__(self, codec: str) -> None:
        self._codec = fc.parse(codec)

    def send(self, weights: Update, clients: Sequence[int], seed: int) -> tuple[Update, list[int]]:
        """Return the weights that clients end up with, and the bytes that each of them received."""
        payload = self._codec.encode(weights, framing="reference", seed=seed)
        return _decode(payload, weights), [len(payload)] * len(clients)


class Delta:
    """The server sends what changed; what it left out is part of the next change, so nothing is lost."""

    def __init__(self, codec: str) -> None:
        self._codec = fc.parse(codec)
        self._raw = fc.parse("raw")
        self._public: Update = {}
        self._sizes: list[int] = []
        self._versions: dict[int, int] = {}

    def send(self, weights: Update, clients: Sequence[int], seed: int) -> tuple[Update, list[int]]:
        """Return the weights that clients end up with, and the bytes that each of them received.

        A client that holds an older version is charged every payload since or one of the whole weights, whichever is
        less; one that holds none, the whole weights.
        """
        if not self._public:
            self._public = weights
        else:
            change = {name: weights[name] - self._public[name] for name in weights}
            payload = self._codec.encode(change, framing="reference", seed=seed)
            decoded = _decode(payload, weights)
            self._public = {name: self._public[name] + decoded[name] for name in weights}
            self._sizes.append(len(payload))
        whole = len(self._raw.encode(self._public, framing="reference"))
        costs = []
        for client in clients:
            held = self._versions.get(client)
            costs.append(whole if held is None else min(whole, sum(self._sizes[held:])))
            self._versions[client] = len(self._sizes)
        return self._public, costs


class LocalTraining:
    """What clients do with the weights that they get, in every engine: batches depend on seed, round and client."""

    def __init__(
        self,
        settings: Settings,
        seed: int,
        data: Dataset,
        parts: Sequence[NDArray[np.int64]],
    ) -> None:
        self._settings, self._seed, self._data, self._parts = settings, seed, data, parts
        network = build_model(settings.model, data, settings.hidden, seed)
        self._model = FlatModel(network, settings.device)

    def samples(self, client: int) -> int:
        """Return the number of a client's samples."""
        return len(self._parts[client])

    def __call__(self, client: int, number: int, weights: Update) -> Update:
        """Return the weights that a client has trained in the round of this number."""
        settings, model = self._settings, self._model
        generator = np.random.default_rng([self._seed, 2, number, client])
        orders = [
            torch.from_numpy(generator.permutation(self._parts[client])).to(settings.device)
            for _ in range(settings.local_epochs)
        ]
        model.load(weights)
        model.train(
            self._data.train_images,
            self._data.train_labels,
            orders,
            settings.batch_size,
            settings.learning_rate,
            settings.momentum,
        )
        return model.named(model.weights)


def _decode(payload: bytes, like: Update) -> Update:
    decoded: Update = fc.decode(payload, like=like)
    return decoded
