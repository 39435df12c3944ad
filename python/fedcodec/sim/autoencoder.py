"""Updates as the latents of an autoencoder (Chandar et al.): what is left of them, and what they cost beside others."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import fedcodec as fc

from .cells import Planned
from .data import Dataset, load_dataset, partition_iid
from .federation import encode_seed
from .models import FlatModel, Update, build_paper_model

COLLABORATORS = 2
TARGET = 0.99  # of the best accuracy without compression
PAST = (
    "past averages, then "  # begins a way to send: what follows codes what a decoder of them missed
)
# Ways to send that need no pre-pass. Those of text forms send what changed, with error feedback.
WAYS = (
    "raw",
    "kbit(4)",
    "topk(0.04) | ternary",
    "topk(0.01) | int8",
    "topk(0.002) | int8",
    PAST + "topk(0.01) | int8",
    PAST + "topk(0.03) | ternary",
)


@dataclass(frozen=True)
class Task:
    """A classifier of Chandar et al., its training, and the autoencoder of its weights.

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
        Of the federation of two collaborators that follows, an epoch each, in which nothing is compressed.
    train_images : int, optional
        A random part of the training set; all of it by default.
    colour_rounds, local_epochs : int
        Of the federation of a collaborator with colour images and one with greyscale ones; 0 rounds for none.
    ways : tuple of str
        To send that are compared, in a federation of two collaborators for each: those of `WAYS`.
    autoencoders : bool
        Whether they and principal components are compared too, ten federations more.
    compared_rounds : int
        Of these federations, an epoch each.
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
    colour_rounds: int = 0
    local_epochs: int = 5
    ways: tuple[str, ...] = WAYS
    autoencoders: bool = True
    compared_rounds: int = 40


TASKS = {
    "mnist": Task("mnist-classifier", "mnist", 32, 10, 40, 200, 40),
    "cifar10": Task(
        "cifar10-classifier", "cifar10", 320, 40, 10, 50, 40, batch_size=32, colour_rounds=40
    ),
}
# What processors can do in hours: a step of the autoencoder of 353 million parameters takes one some three seconds.
SMALL_TASKS = TASKS | {
    "cifar10": replace(
        TASKS["cifar10"],
        train_images=10_000,
        epochs=20,
        autoencoder_epochs=20,
        rounds=10,
        colour_rounds=4,
        local_epochs=2,
        ways=("raw", "topk(0.04) | ternary", "topk(0.01) | int8", PAST + "topk(0.03) | ternary"),
        autoencoders=False,
    )
}
QUICK_TASKS = {
    "digits": Task(
        "mnist-classifier",
        "digits",
        8,
        10,
        10,
        50,
        5,
        batch_size=16,
        colour_rounds=2,
        compared_rounds=5,
    )
}


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
    """Train on a collaborator's samples alone (Chandar et al., section 3).

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


# --- what is left of the weights ----------------------------------------------------------------------------------


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
        Called `follow_steps` times.

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
    start = _start(task, seed, data_dir, device)
    fitted = _fit(task, start, 0, seed, on_step)
    codecs = {
        "autoencoder": fc.AutoEncoder.of(fitted.funnel),
        "autoencoder, int8 decoder": fc.AutoEncoder.of(fitted.funnel, decoder=fc.Int8()),
        "principal components": fc.AutoEncoder.of(fitted.principal),
    }
    epochs = _curves(codecs, start, fitted.logged)
    encode, decode = _timed(codecs["autoencoder"], fitted.logged[-1])
    mine = []
    for _, weights in _federation(task, task.rounds, start, seed):
        mine.append(weights)
        on_step()
    return {
        "values": len(start.network.weights),
        "parameters": fitted.funnel.parameters,
        "decoder_bytes": {name: len(codec.decoder_payload) for name, codec in codecs.items()},
        "payload_bytes": {
            name: len(codec.encode(start.weights, framing="reference"))
            for name, codec in codecs.items()
        },
        "epochs": epochs,
        "rounds": _curves(codecs, start, mine),
        "fit": [list(epoch) for epoch in fitted.history],
        "seconds": fitted.seconds | {"encode": encode, "decode": decode},
    }


def follow_steps(task: Task) -> int:
    """Return how often `follow` calls back."""
    return _FIT_STEPS + task.epochs + task.rounds


# --- a federation of colour and greyscale -------------------------------------------------------------------------


def federate_colours(
    task: Task,
    seed: int,
    data_dir: Path | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train a collaborator with colour and one with greyscale images, who average after some epochs (figures 8 and 9).

    Each sends its weights through an autoencoder of its own, fitted in its own pre-pass, and once more uncompressed,
    for comparison. Greyscale is the mean of the standardised channels, in all of them.

    Parameters
    ----------
    task, seed, data_dir, device
        As for `follow`.
    on_step : callable
        Called `colour_steps` times.

    Returns
    -------
    dict
        As JSON has it: by "autoencoder" and "raw", the `Curve` of each collaborator after every local epoch, on test
        images like its own; and "payload_bytes" of a collaborator and round by both.

    Raises
    ------
    FileNotFoundError, NonFiniteError
        As for `follow`.
    """
    start = _start(task, seed, data_dir, device)
    starts = [start, start._replace(data=_grey(start.data))]
    fitted = [_fit(task, mine, client, seed, on_step) for client, mine in enumerate(starts)]
    ways: dict[str, list[fc.Codec]] = {
        "autoencoder": [fc.AutoEncoder.of(of.funnel) for of in fitted],
        "raw": [fc.Raw() for _ in starts],
    }
    curves: dict[str, list[dict[str, list[float]]]] = {}
    sizes = {}
    for way, codecs in ways.items():
        shared, weights = _holding(codecs), start.weights
        found = [Curve() for _ in starts]
        for number in range(1, task.colour_rounds + 1):
            server = fc.Aggregator(like=weights, shared=shared)
            for client, (mine, codec, curve) in enumerate(zip(starts, codecs, found, strict=True)):
                update = weights
                for epoch in range(task.local_epochs):
                    place = [seed, 4, number, client, epoch]
                    update = _epoch(task, mine, update, client, place)
                    curve.add(mine.network, update, mine.data)
                payload = codec.encode(update, framing="reference")
                sizes[way] = len(payload)
                server.add(payload, weight=len(start.parts[client]))
            weights = server.mean()
            on_step()
        curves[way] = [asdict(curve) for curve in found]
    return {**curves, "payload_bytes": sizes}


def colour_steps(task: Task) -> int:
    """Return how often `federate_colours` calls back."""
    return COLLABORATORS * (_FIT_STEPS + task.epochs) + 2 * task.colour_rounds


def _grey(data: Dataset) -> Dataset:
    train, test = (
        images.mean(1, keepdim=True).expand_as(images).contiguous()
        for images in (data.train_images, data.test_images)
    )
    return replace(data, train_images=train, test_images=test)


# --- what they cost -----------------------------------------------------------------------------------------------

REPAIR = "topk(0.01) | int8"  # of what a trained autoencoder missed
AVERAGES = 8  # of the past, the zeros before the first among them, whose differences are a decoder


@dataclass
class Spent:
    """A federation with one way to send updates.

    Attributes
    ----------
    before_bytes : int
        That travel before the first round: decoders to the server, and an encoder to who has none of its own.
    payload_bytes : list of int
        Of all collaborators, by round.
    accuracy : list of float
        Of the server's average on the test set, by round.
    """

    before_bytes: int
    payload_bytes: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def bytes_to(self, accuracy: float) -> int | None:
        """Return the bytes that have travelled when an accuracy is reached; None if it never is."""
        total = self.before_bytes
        for size, found in zip(self.payload_bytes, self.accuracy, strict=True):
            total += size
            if found >= accuracy:
                return total
        return None

    def best_within(self, budget: float) -> float | None:
        """Return the best accuracy by the time that so many bytes have travelled; None if no round was over then."""
        totals = self.before_bytes + np.cumsum(self.payload_bytes)
        return max(np.array(self.accuracy)[totals <= budget], default=None)


def send(
    task: Task,
    way: str,
    seed: int,
    data_dir: Path | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train a federation of two collaborators that send updates in a way of `WAYS`, and count every byte that goes up.

    Where the way begins with past averages, they are what both ends hold: a decoder that costs nothing. The broadcast
    average is not compressed and not counted.

    Parameters
    ----------
    task : Task
    way : str
    seed, data_dir, device
        As for `follow`.
    on_step : callable
        Called for each of ``task.compared_rounds``.

    Returns
    -------
    dict
        As JSON has it: "way", and of a `Spent`.

    Raises
    ------
    FileNotFoundError, NonFiniteError
        As for `follow`.

    Examples
    --------
    >>> task = Task("mnist-classifier", "digits", 4, 1, 1, 1, 1, compared_rounds=2)
    >>> len(send(task, "topk(0.01) | int8", seed=0)["accuracy"])
    2
    """
    start = _start(task, seed, data_dir, device)
    repair = way.removeprefix(PAST)
    if repair == way:
        sender = _changes(start, way, seed)
    else:
        sender = _weights(start, _past_averages(start.weights, fc.parse(repair)), feedback=True)
    return {"way": way, **asdict(_spend(task, start, seed, _Way(way, 0, sender), on_step))}


def compare(
    task: Task,
    seed: int,
    data_dir: Path | None = None,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Train the federation of `send` with trained autoencoders and with principal components, in several ways.

    They send weights, as in the paper: by decoders of each collaborator's own or by the first one's for both, whose
    other half then has to travel too; the decoders as float32 or int8. `REPAIR` follows once without
    error feedback: what an autoencoder always misses of weights would add up.

    Parameters
    ----------
    task, seed, data_dir, device
        As for `follow`.
    on_step : callable
        Called `compare_steps` times.

    Returns
    -------
    dict
        As JSON has it: a `Spent` by the name of each way.

    Raises
    ------
    FileNotFoundError, NonFiniteError
        As for `follow`.
    """
    start = _start(task, seed, data_dir, device)
    fitted = [_fit(task, start, client, seed, on_step) for client in range(COLLABORATORS)]
    return {
        way.name: asdict(_spend(task, start, seed, way, on_step)) for way in _ways(fitted, start)
    }


def compare_steps(task: Task) -> int:
    """Return how often `compare` calls back."""
    return _FITTED_WAYS * task.compared_rounds + COLLABORATORS * (_FIT_STEPS + task.epochs)


_FITTED_WAYS = 9


# Takes a collaborator, what it has trained, the average that it began with, and the round; gives the bytes of the
# payload and what the server makes of it.
_Sender = Callable[[int, Update, Update, int], tuple[int, Update]]


class _Way(NamedTuple):
    """A way to send updates."""

    name: str
    before_bytes: int
    send: _Sender


def _changes(start: _Start, text: str, seed: int) -> _Sender:
    """Send what changed, with error feedback."""
    feedbacks = [fc.ErrorFeedback(text) for _ in start.parts]

    def send(client: int, update: Update, base: Update, number: int) -> tuple[int, Update]:
        change = {name: update[name] - base[name] for name in update}
        payload = feedbacks[client].encode(
            change, framing="reference", seed=encode_seed(seed, number, client)
        )
        feedbacks[client].accept()
        decoded = fc.decode(payload, like=update)
        return len(payload), {name: base[name] + decoded[name] for name in update}

    return send


def _weights(
    start: _Start, codec: Callable[[int, Update, int], fc.Codec], *, feedback: bool
) -> _Sender:
    """Send weights by a codec of the collaborator, the average it began with and the round.

    With feedback, what is still missing is added to the next ones: for codecs that code what changed since the average.
    """
    missing = [{name: 0 * array for name, array in start.weights.items()} for _ in start.parts]

    def send(client: int, update: Update, base: Update, number: int) -> tuple[int, Update]:
        of = codec(client, base, number)
        wanted = {name: array + missing[client][name] for name, array in update.items()}
        payload = of.encode(wanted, framing="reference")
        decoded = fc.decode(payload, like=update, shared=_holding([of]))
        if feedback:
            missing[client] = {name: wanted[name] - decoded[name] for name in wanted}
        return len(payload), decoded

    return send


def _past_averages(first: Update, repair: fc.Codec) -> Callable[[int, Update, int], fc.Codec]:
    held = [0 * fc.flatten(first)]

    def codec(client: int, base: Update, number: int) -> fc.Codec:
        if len(held) == number + 1:  # the first to send in this round
            held.append(fc.flatten(base))
        models = np.array(held[-1 - AVERAGES :])
        return fc.Residual(fc.AutoEncoder.of(fc.Funnel.spanning(models)), repair)

    return codec


def _ways(fitted: Sequence[_Fitted], start: _Start) -> Iterator[_Way]:
    repair = fc.parse(REPAIR)
    for kind in ("autoencoder", "principal components"):
        funnels = [of.funnel if kind == "autoencoder" else of.principal for of in fitted]
        for sent in (fc.Raw(), fc.Int8()):
            codecs = [fc.AutoEncoder.of(funnel, decoder=sent) for funnel in funnels]
            form = "float32" if isinstance(sent, fc.Raw) else "int8"
            each = sum(len(codec.decoder_payload) for codec in codecs)
            both = len(codecs[0].decoder_payload) + len(sent.encode(_arrays(funnels[0])))
            for name, before, codec in (
                (f"{form} decoder each", each, lambda client, *_, of=codecs: of[client]),
                (f"one {form} decoder", both, lambda *_, of=codecs: of[0]),
            ):
                yield _Way(f"{kind}, {name}", before, _weights(start, codec, feedback=False))
            if kind == "autoencoder" and form == "int8":
                mended = [fc.Residual(codec | fc.Int8(), repair) for codec in codecs]
                yield _Way(
                    f"{kind}, int8 decoder each, then {REPAIR}",
                    each,
                    _weights(start, lambda client, *_, of=mended: of[client], feedback=False),
                )


def _arrays(funnel: fc.Funnel) -> list[NDArray[np.float32]]:
    """Return an encoder's layers as an update."""
    return [part.cpu().numpy() for layer in funnel.folded()[0] for part in layer]


def _spend(task: Task, start: _Start, seed: int, way: _Way, on_step: Callable[[], None]) -> Spent:
    spent, sizes, curve = Spent(way.before_bytes), list[int](), Curve()

    def sent(client: int, update: Update, base: Update) -> Update:
        size, received = way.send(client, update, base, len(spent.accuracy))
        sizes.append(size)
        return received

    for average, _ in _federation(task, task.compared_rounds, start, seed, sent):
        curve.add(start.network, average, start.data)
        spent.accuracy.append(curve.accuracy[-1])
        spent.payload_bytes.append(sum(sizes))
        sizes.clear()
        on_step()
    return spent


# --- all of the study ---------------------------------------------------------------------------------------------


# What only the cells of one kind depend on.
_OF_ONE_KIND = {
    "rounds": "follow",
    "colour_rounds": "colours",
    "local_epochs": "colours",
    "ways": "",  # each is a cell of its own
    "autoencoders": "",
    "compared_rounds": "compare",
}


def study_cells(
    tasks: Mapping[str, Task], seed: int, data_dir: Path | None, device: str
) -> dict[str, Planned]:
    """Return `follow`, `send` in each way, `compare` and `federate_colours` of each task, by name."""
    cells = {}

    def plan(cell: str, kind: str, task: Task, run: Callable[..., Any], steps: int) -> None:
        about = {"seed": seed, "device": device, **asdict(task)}
        for name, of in _OF_ONE_KIND.items():
            if of != kind:
                del about[name]
        cells[cell] = Planned(partial(run, seed, data_dir, device), steps, task.dataset, about)

    for name, task in tasks.items():
        plan(f"{name}-follow", "follow", task, partial(follow, task), follow_steps(task))
        for way in task.ways:
            cell = f"{name}-send-{re.sub(r'[^a-z0-9.]+', '-', way).strip('-')}"
            plan(cell, "compare", task, partial(send, task, way), task.compared_rounds)
        if task.autoencoders:
            plan(f"{name}-compare", "compare", task, partial(compare, task), compare_steps(task))
        if task.colour_rounds:
            run = partial(federate_colours, task)
            plan(f"{name}-colours", "colours", task, run, colour_steps(task))
    return cells


# --- what both begin with -----------------------------------------------------------------------------------------


class _Start(NamedTuple):
    """What every federation of a task and seed begins with."""

    data: Dataset
    parts: list[NDArray[np.int64]]  # samples of the collaborators
    network: FlatModel
    weights: Update


def _start(task: Task, seed: int, data_dir: Path | None, device: str) -> _Start:
    data = load_dataset(task.dataset, data_dir)
    chosen = np.random.default_rng([seed, 0]).permutation(len(data.train_labels))
    chosen = chosen[: task.train_images]
    parts = partition_iid(len(chosen), COLLABORATORS, np.random.default_rng([seed, 1]))
    network = FlatModel(build_paper_model(task.model, data, seed), device)
    weights = network.named(network.weights)
    return _Start(data.to(device), [chosen[part] for part in parts], network, weights)


class _Fitted(NamedTuple):
    """What a collaborator has after its pre-pass."""

    funnel: fc.Funnel
    principal: fc.Funnel
    logged: list[Update]  # at the ends of epochs
    history: Sequence[tuple[float, float | None]]
    seconds: dict[str, float]


_FIT_STEPS = 2  # beside those of the pre-pass


def _fit(task: Task, start: _Start, client: int, seed: int, on_step: Callable[[], None]) -> _Fitted:
    network, logged = start.network, list[Update]()
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
                kept[(len(kept[0]) + len(kept[1])) % 10 == 4].add(weights)

        began = perf_counter()
        network.load(start.weights)
        prepass(task, network, start.data, start.parts[client], [seed, 2, client], keep)
        trained = perf_counter()
        training, validation = (of.array() for of in kept)
        funnel = fc.Funnel(len(network.weights), task.latents, seed=seed)
        history = funnel.fit(
            training,
            validation=validation,
            epochs=task.autoencoder_epochs,
            patience=20,
            device=str(network.weights.device),
            seed=seed,
        )
        seconds = {"prepass": trained - began, "fit": perf_counter() - trained}
        on_step()
        principal = fc.Funnel.principal(training, min(task.latents, len(training)))
        on_step()
    return _Fitted(funnel, principal, logged, history, seconds)


def _curves(
    codecs: Mapping[str, fc.AutoEncoder], start: _Start, points: Sequence[Update]
) -> dict[str, dict[str, list[float]]]:
    curves = {"original": Curve(), **{name: Curve() for name in codecs}}
    shared = _holding(codecs.values())
    for weights in points:
        curves["original"].add(start.network, weights, start.data)
        for name, codec in codecs.items():
            payload = codec.encode(weights, framing="reference")
            decoded = fc.decode(payload, like=weights, shared=shared)
            curves[name].add(start.network, decoded, start.data)
    return {name: asdict(curve) for name, curve in curves.items()}


def _federation(
    task: Task,
    rounds: int,
    start: _Start,
    seed: int,
    sent: Callable[[int, Update, Update], Update] = lambda client, update, base: update,
) -> Iterator[tuple[Update, Update]]:
    """Average the collaborators' weights for some rounds; give the average, and what the first one had.

    ``sent`` is called with a collaborator's number, its weights and the average that it began with, and returns what
    the server gets of them.
    """
    weights = start.weights
    for number in range(1, rounds + 1):
        server = fc.Aggregator(like=weights)
        trained: list[Update] = []
        for client, part in enumerate(start.parts):
            trained.append(_epoch(task, start, weights, client, [seed, 3, number, client]))
            received = sent(client, trained[-1], weights)
            server.add(fc.Raw().encode(received), weight=len(part))
        weights = server.mean()
        yield weights, trained[0]


def _epoch(task: Task, start: _Start, weights: Update, client: int, seed: Sequence[int]) -> Update:
    """Return a collaborator's weights after an epoch from these."""
    order = np.random.default_rng(seed).permutation(start.parts[client])
    start.network.load(weights)
    start.network.train(
        start.data.train_images,
        start.data.train_labels,
        [torch.from_numpy(order)],
        task.batch_size,
        task.learning_rate,
        task.momentum,
    )
    return start.network.named(start.network.weights)


def _holding(codecs: Iterable[fc.Codec]) -> fc.Shared:
    """Return a store of all decoders: two of Chandar et al.'s larger ones are more than the default has room for."""
    shared = fc.Shared(max_bytes=sys.maxsize)
    for codec in codecs:
        codec.add_shared(shared)
    return shared


def _timed(codec: fc.AutoEncoder, update: Update) -> tuple[float, float]:
    """Return the medians of the seconds that encoding and decoding take."""
    shared = _holding([codec])
    taken: list[tuple[float, float]] = []
    for _ in range(5):
        start = perf_counter()
        payload = codec.encode(update, framing="reference")
        encoded = perf_counter()
        fc.decode(payload, like=update, shared=shared)
        taken.append((encoded - start, perf_counter() - encoded))
    encoding, decoding = zip(*taken, strict=True)
    return median(encoding), median(decoding)
