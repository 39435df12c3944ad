"""Pruning, quantization and distillation, alone and one after the other, in federated averaging (Yan)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fedcodec as fc

from .cells import Planned
from .data import Dataset, load_dataset, partition_iid
from .distillation import train_student
from .federation import encode_seed
from .links import parse_link
from .models import FlatModel, Update, build_model

# Each single inference is timed this often, the models in turn.
TIMED = 200


@dataclass(frozen=True)
class Combination:
    """One row of Yan's table 5."""

    prune: bool
    quantize: bool
    distil: bool

    @property
    def name(self) -> str:
        """Its short name, such as "prune + int8"."""
        steps = {"prune": self.prune, "int8": self.quantize, "distil": self.distil}
        return " + ".join(name for name, taken in steps.items() if taken) or "none"

    @property
    def slug(self) -> str:
        """Its name for a file."""
        return self.name.replace(" + ", "-")

    def codec(self, settings: CascadeSettings) -> fc.Codec:
        """Return what does the pruning and the quantization, of weights on their way to the server."""
        stages = [f"threshold(percentile={settings.prune_percent!r})"] if self.prune else []
        return fc.parse(" | ".join([*stages, "int8"] if self.quantize else stages or ["raw"]))


COMBINATIONS = tuple(
    Combination(*steps)
    for steps in (
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, True, False),
        (True, False, True),
        (False, True, True),
        (True, True, True),
    )
)


@dataclass(frozen=True)
class CascadeSettings:
    """The study: Yan's table 4 and section 4.2.

    Attributes
    ----------
    models : int
        Trained side by side, each on its own share of the samples.
    hidden, student_hidden : tuple of int
        Widths of the hidden layers of SimpleNN, and of the student.
    prune_percent : float
        Of all weights, those of the smallest magnitudes.
    alpha, temperature : float
        See `fedcodec.sim.distillation.distillation_loss`.
    link : str
        Of a client; see `fedcodec.sim.links.parse_link`.
    """

    dataset: str = "fashion-mnist"
    data_dir: Path | None = None
    models: int = 3
    rounds: int = 20
    hidden: tuple[int, ...] = (128, 64)
    student_hidden: tuple[int, ...] = (52, 32)
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    prune_percent: float = 20.0
    alpha: float = 0.5
    temperature: float = 2.0
    link: str = "lte"


@dataclass
class CascadeRun:
    """One combination with one seed, a figure a round.

    Attributes
    ----------
    accuracy, loss : list of float
        Of the averaged model, pruned and quantized as it would be deployed, on the test set.
    train_accuracy, train_loss : list of float
        The same on all training samples.
    server_accuracy : list of float
        Of the averaged model as the server has it, on the test set.
    payload_bytes : list of float
        Mean of the models' payloads.
    encode_seconds, decode_seconds : list of float
        Medians over the models; decoding is adding to the mean.
    parameters : int
        Of the model that travels.
    """

    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    server_accuracy: list[float] = field(default_factory=list)
    payload_bytes: list[float] = field(default_factory=list)
    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    parameters: int = 0


def run_combination(
    settings: CascadeSettings,
    combination: Combination,
    seed: int,
    on_round: Callable[[], None] = lambda: None,
) -> CascadeRun:
    """Train one row of the table.

    Every round each model takes the server's weights, is trained for an epoch, and sends its weights, pruned by a mask
    that is made anew and quantized: what its codec leaves out is zero at the server, which averages. With distillation
    what travels is the student. Its teacher is the client's own, trained on the same samples, stays there, and is
    pruned and quantized too before it teaches.

    Parameters
    ----------
    settings : CascadeSettings
    combination : Combination
    seed : int
        Of shares, weights and batches, which are the same for all combinations.
    on_round : callable
        Called after each round.

    Returns
    -------
    CascadeRun

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.

    References
    ----------
    Yan, sections 3.1 to 3.4.
    """
    data = load_dataset(settings.dataset, settings.data_dir)
    parts = partition_iid(len(data.train_labels), settings.models, np.random.default_rng([seed, 0]))
    codec = combination.codec(settings)
    large = _model(settings, data, settings.hidden, seed)
    sent = _model(settings, data, settings.student_hidden, seed) if combination.distil else large
    teachers = [large.weights.clone() for _ in parts]
    weights, run = sent.named(sent.weights), CascadeRun(parameters=sent.weights.numel())
    for number in range(1, settings.rounds + 1):
        server = fc.Aggregator(like=weights)
        sizes, encoding, decoding = [], [], []
        for client, part in enumerate(parts):
            order = torch.from_numpy(
                np.random.default_rng([seed, number, client]).permutation(part)
            )
            if combination.distil:
                large.weights.copy_(teachers[client])
                _train(settings, large, data, order)
                teachers[client].copy_(large.weights)
                large.load(_compressed(codec, large.named(large.weights)))
                sent.load(weights)
                _distil(settings, large, sent, data, order)
            else:
                sent.load(weights)
                _train(settings, sent, data, order)
            update, start = sent.named(sent.weights), perf_counter()
            payload = codec.encode(
                update, framing="reference", seed=encode_seed(seed, number, client)
            )
            encoded = perf_counter()
            server.add(payload, weight=len(part))
            decoding.append(perf_counter() - encoded)
            encoding.append(encoded - start)
            sizes.append(len(payload))
        weights = server.mean()
        _evaluate(run, codec, sent, weights, data)
        run.payload_bytes.append(sum(sizes) / len(sizes))
        run.encode_seconds.append(median(encoding))
        run.decode_seconds.append(median(decoding))
        on_round()
    return run


def run_cell(
    settings: CascadeSettings, combination: Combination, seed: int, on_round: Callable[[], None]
) -> dict[str, Any]:
    """Do `run_combination`; the result is as JSON has it."""
    return asdict(run_combination(settings, combination, seed, on_round))


def study_cells(settings: CascadeSettings, seeds: Sequence[int]) -> dict[str, Planned]:
    """Return all combinations with all seeds, by name."""
    about = asdict(settings)
    for name in ("data_dir", "link"):  # transfers are simulated from what is kept
        about.pop(name)
    return {
        f"{combination.slug}-{seed}": Planned(
            partial(run_cell, settings, combination, seed),
            settings.rounds,
            settings.dataset,
            about,
        )
        for combination in COMBINATIONS
        for seed in seeds
    }


def _model(
    settings: CascadeSettings, data: Dataset, hidden: tuple[int, ...], seed: int
) -> FlatModel:
    return FlatModel(build_model("mlp", data, hidden, seed))


def _compressed(codec: fc.Codec, weights: Update) -> Update:
    decoded: Update = fc.decode(codec.encode(weights, framing="reference"), like=weights)
    return decoded


def _train(settings: CascadeSettings, model: FlatModel, data: Dataset, order: torch.Tensor) -> None:
    model.train(
        data.train_images,
        data.train_labels,
        [order],
        settings.batch_size,
        settings.learning_rate,
        settings.momentum,
    )


def _distil(
    settings: CascadeSettings,
    teacher: FlatModel,
    student: FlatModel,
    data: Dataset,
    order: torch.Tensor,
) -> None:
    train_student(
        student,
        teacher.module,
        data.train_images,
        data.train_labels,
        [order],
        settings.batch_size,
        settings.learning_rate,
        settings.momentum,
        settings.alpha,
        settings.temperature,
    )


def _evaluate(
    run: CascadeRun, codec: fc.Codec, model: FlatModel, weights: Update, data: Dataset
) -> None:
    model.load(weights)
    run.server_accuracy.append(model.evaluate(data.test_images, data.test_labels)[0])
    model.load(_compressed(codec, weights))
    accuracy, loss = model.evaluate(data.test_images, data.test_labels)
    run.accuracy.append(accuracy)
    run.loss.append(loss)
    accuracy, loss = model.evaluate(data.train_images, data.train_labels)
    run.train_accuracy.append(accuracy)
    run.train_loss.append(loss)


def inference_seconds(settings: CascadeSettings) -> dict[str, float]:
    """Time one image through each combination's compressed model, on one thread, in turn: medians in seconds.

    Pruned weights are zeros of dense matrices and int8 ones are dequantized before, so only a smaller model is faster.
    """
    data = load_dataset(settings.dataset, settings.data_dir)
    image, models = data.test_images[:1], {}
    for combination in COMBINATIONS:
        hidden = settings.student_hidden if combination.distil else settings.hidden
        model = _model(settings, data, hidden, 0)
        model.load(_compressed(combination.codec(settings), model.named(model.weights)))
        models[combination.name] = model
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    try:
        with torch.inference_mode():
            for _ in range(TIMED):
                for name, model in models.items():
                    model.module(image)  # the last model has taken the caches
                    start = perf_counter()
                    model.module(image)
                    seconds[name].append(perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: median(found) for name, found in seconds.items()}


def transfer_seconds(settings: CascadeSettings, payload_bytes: float) -> float:
    """Simulate the way of one payload to the server."""
    link = parse_link(settings.link)
    return link.latency + 8 * payload_bytes / link.uplink


def dense_bytes(settings: CascadeSettings) -> int:
    """Return the bytes of SimpleNN's float32 weights, which transmission ratios are of."""
    data = load_dataset(settings.dataset, settings.data_dir)
    found: Any = _model(settings, data, settings.hidden, 0).weights
    return int(found.nbytes)
