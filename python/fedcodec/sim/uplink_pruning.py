"""Pruning of what clients send (Jeurkar et al.): one cell of its study, and the payload sizes of all cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import fedcodec as fc

from .cells import Planned
from .data import Dataset, hold_out
from .federation import prepare
from .models import FlatModel, Update, build_paper_model
from .pruning import prunable_weights
from .settings import Settings
from .sizes import binary_entropy

Kind = Literal["unstructured", "structured"]
Column = Literal["weights", "delta"]

SELECTS: dict[Kind, str] = {"unstructured": "topk", "structured": "structured"}
COLUMNS: tuple[Column, ...] = ("weights", "delta")
AMOUNTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Jeurkar et al., section 3.4; its batch size is that of its published notebooks.
PAPER_SETTINGS = Settings(
    clients=100,
    clients_per_round=2,
    dirichlet=None,
    local_epochs=1,
    batch_size=32,
    learning_rate=0.01,
    momentum=0.9,
    rounds=25,
    error_feedback=False,
)


def uplink_codec(module: nn.Module, kind: Kind, amount: float, int8: bool = False) -> fc.Codec:
    """Return the codec that prunes convolutions and fully connected layers but the last; the rest travels raw.

    Parameters
    ----------
    module : torch.nn.Module
    kind : {"unstructured", "structured"}
        Weights of the least magnitudes of all these layers together, or of each layer the channels of the least norms.
    amount : float
        Share that is pruned, from 0 to below 1.
    int8 : bool
        Whether the values that are kept travel as int8.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> str(uplink_codec(network, "unstructured", 0.8))
    'rules(topk(0.2); "0.bias" = raw; "2.weight" = raw; "2.bias" = raw)'
    """
    if kind not in SELECTS:
        raise ValueError(f"kind is {kind!r}, it must be one of {', '.join(SELECTS)}")
    stages = [f"{SELECTS[kind]}({round(1 - amount, 9)})"] if amount else []
    codec = fc.parse(" | ".join([*stages, "int8"] if int8 else stages or ["raw"]))
    pruned = prunable_weights(module)
    return codec.for_names({name: fc.Raw() for name in module.state_dict() if name not in pruned})


def ideal_bytes(module: nn.Module, kind: Kind, amount: float, bits: int = 32) -> float:
    """Return what a payload of `uplink_codec` could ideally have: for kept values ``bits`` each, the rest in float32.

    Where values are pruned one by one, their positions add the entropy n H(amount); kept channels are for nothing.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> ideal_bytes(network, "structured", 0.3)  # of 12 weights 2 channels of 4, and 11 other values
    76.0
    """
    pruned = prunable_weights(module)
    other = sum(4 * value.numel() for name, value in _state(module).items() if name not in pruned)
    if kind == "unstructured":
        n = sum(weight.numel() for weight in pruned.values())
        return n * (bits * (1 - amount) + binary_entropy(amount)) / 8 + other
    kept = (
        max(1, round(round(1 - amount, 9) * len(weight))) * weight[0].numel()
        for weight in pruned.values()
    )
    return bits * sum(kept) / 8 + other


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}


def prune_cell(
    settings: Settings,
    model: str,
    dataset: str,
    kind: Kind,
    amount: float,
    column: Column,
    seed: int,
    on_round: Callable[[], None] | None = None,
    test_images: int | None = None,
) -> dict[str, Any]:
    """Train by federated averaging with a pruned uplink.

    Every round each sampled client trains the server's model on nine tenths of its samples and sends it through
    `uplink_codec`. What pruning leaves out is lost, as in the paper: there is no error feedback in either column. The
    downlink is dense and not counted. Partition, sampling, batches and initial weights depend on ``seed`` alone.

    Parameters
    ----------
    settings : Settings
        Clients, rounds, optimiser, device and folder of the data; `PAPER_SETTINGS` are the paper's.
    model : str
        See `fedcodec.sim.models.build_paper_model`.
    dataset : str
        See `fedcodec.sim.data.load_dataset`.
    kind, amount
        As for `uplink_codec`.
    column : {"weights", "delta"}
        What clients prune: their weights, of which the server takes the mean (the paper's way), or the change of
        their weights, whose mean the server adds to its dense model.
    seed : int
        Non-negative.
    on_round : callable, optional
        Called after each round.
    test_images : int, optional
        Size of the random part of the test set that is used; all of it by default.

    Returns
    -------
    dict
        As JSON has it. The arguments, and "codec"; "values" of the model, "prunable_values" among them, and
        "other_bytes", of the rest, in each payload; a list with an entry for each round of "payload_bytes" and
        "int8_payload_bytes" (of each client; the latter is how large the payload with int8 values would be),
        "accuracy" and "loss" of the server's model on the test set, and "validation_accuracy" on the samples that the
        round's clients hold out; "best_accuracy", and "best_round", the first that has it, counted from 1.

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.
    NonFiniteError
        If training diverges.
    ValueError
        If the settings do not fit the data set or this machine, or an argument is not as above.

    Examples
    --------
    >>> settings = replace(PAPER_SETTINGS, clients=10, rounds=2, average_last=1)
    >>> result = prune_cell(settings, "simple-nn", "digits", "unstructured", 0.5, "delta", seed=0)
    >>> result["prunable_values"], result["other_bytes"]
    (16384, 3368)
    >>> len(result["accuracy"])
    2
    """
    if column not in COLUMNS:
        raise ValueError(f"column is {column!r}, it must be one of {', '.join(COLUMNS)}")
    network, data, parts = _start(settings, model, dataset, seed)
    codec = uplink_codec(network.module, kind, amount)
    smaller = uplink_codec(network.module, kind, amount, int8=True)
    weights = network.named(network.weights)
    spec = fc.Spec.of(weights)
    shared = fc.Shared()
    shared.add_rules(codec, spec)
    chosen = torch.from_numpy(
        np.random.default_rng(0).permutation(len(data.test_labels))[:test_images]
    ).to(settings.device)
    test = data.test_images[chosen], data.test_labels[chosen]

    sampling = np.random.default_rng([seed, 1])
    rounds: dict[str, list[Any]] = {
        name: []
        for name in (
            *("payload_bytes", "int8_payload_bytes"),
            *("accuracy", "loss", "validation_accuracy"),
        )
    }
    for number in range(1, settings.rounds + 1):
        aggregator = fc.Aggregator(like=spec, shared=shared)
        sampled = sampling.choice(settings.clients, settings.clients_per_round, replace=False)
        sizes, int8_sizes, held_out = [], [], []
        for client in sampled.tolist():
            training, validation = _split(parts[client], seed, client)
            held_out.append(validation)
            trained = _train(settings, network, data, weights, training, [seed, 2, number, client])
            update = trained if column == "weights" else _minus(trained, weights)
            payload = codec.encode(update, framing="reference")
            aggregator.add(payload, weight=len(training))
            sizes.append(len(payload))
            int8_sizes.append(len(smaller.encode(update, framing="reference")))
        mean = aggregator.mean()
        weights = (
            mean if column == "weights" else {name: weights[name] + mean[name] for name in weights}
        )

        network.load(weights)
        accuracy, loss = network.evaluate(*test)
        samples = torch.from_numpy(np.concatenate(held_out)).to(settings.device)
        validated, _ = network.evaluate(data.train_images[samples], data.train_labels[samples])
        entries = (sizes, int8_sizes, accuracy, loss, validated)
        for entry, values in zip(entries, rounds.values(), strict=True):
            values.append(entry)
        if on_round is not None:
            on_round()
    best = max(rounds["accuracy"])
    return {
        "model": model,
        "dataset": dataset,
        "kind": kind,
        "amount": amount,
        "column": column,
        "seed": seed,
        "codec": str(codec),
        **_counts(network),
        **rounds,
        "best_accuracy": best,
        "best_round": rounds["accuracy"].index(best) + 1,
    }


def payload_sizes(
    settings: Settings,
    model: str,
    dataset: str,
    seed: int,
    kinds: Sequence[Kind] = ("unstructured", "structured"),
    amounts: Sequence[float] = AMOUNTS,
) -> list[dict[str, Any]]:
    """Measure the payloads of all cells of a model, of one client after its first local training.

    Sizes change little from client to client and from round to round: how much is kept is given, and where it is costs
    a few bits a value at most.

    Returns
    -------
    list of dict
        One for each kind, amount and column: these, the counts of `prune_cell`, "payload_bytes" and
        "int8_payload_bytes", which are numbers here, and the `ideal_bytes` of both.

    Examples
    --------
    >>> sizes = payload_sizes(PAPER_SETTINGS, "simple-nn", "digits", 0, kinds=["unstructured"], amounts=[0.5])
    >>> sizes[0]["payload_bytes"] < (sizes[0]["prunable_values"] * (32 * 0.5 + 1) / 8) * 1.02 + sizes[0]["other_bytes"]
    True
    """
    network, data, parts = _start(settings, model, dataset, seed)
    weights = network.named(network.weights)
    training, _ = _split(parts[0], seed, 0)
    trained = _train(settings, network, data, weights, training, [seed, 2, 1, 0])
    updates = {"weights": trained, "delta": _minus(trained, weights)}
    return [
        {
            "model": model,
            "dataset": dataset,
            "kind": kind,
            "amount": amount,
            "column": column,
            "seed": seed,
            **_counts(network),
            **{
                name: len(
                    uplink_codec(network.module, kind, amount, int8).encode(
                        update, framing="reference"
                    )
                )
                for name, int8 in (("payload_bytes", False), ("int8_payload_bytes", True))
            },
            "ideal_bytes": ideal_bytes(network.module, kind, amount),
            "int8_ideal_bytes": ideal_bytes(network.module, kind, amount, bits=8),
        }
        for kind in kinds
        for amount in amounts
        for column, update in updates.items()
    ]


@dataclass(frozen=True)
class Experiment:
    """A network and a data set of Jeurkar et al., and the accuracy that rounds and bytes are counted to."""

    model: str
    dataset: str
    target: float

    @property
    def slug(self) -> str:
        """Its name for a file."""
        return f"{self.model}-{self.dataset}"


EXPERIMENTS = (
    Experiment("simple-cnn", "mnist", 0.85),
    Experiment("resnet12", "mnist", 0.95),
    Experiment("resnet12", "cifar10", 0.35),
)
QUICK_EXPERIMENT = Experiment("simple-cnn", "digits", 0.85)
# What can be had of ResNet-12 on processors in minutes.
SMALL_ROUNDS, SMALL_TEST_IMAGES = 1, 1000


def study_cells(
    settings: Settings, seeds: Sequence[int], quick: bool = False
) -> dict[str, Planned]:
    """Return the cells of the study by name.

    On a GPU it is all of Jeurkar et al.'s table 1 in both columns. On processors ResNet-12 is trained on CIFAR-10 for
    one round only, unpruned and with 80 % of the weights pruned one by one, and looked at with 1,000 test images. The
    sizes of all payloads are measured in any case, of the first seed.

    A quick study is of SimpleCNN on scikit-learn's digits, at 0, 50 and 80 %.
    """
    whole = not settings.device.startswith("cpu")
    about = asdict(settings)
    about.pop("data_dir")  # not the device: a cell of processors is shorter
    experiments = (QUICK_EXPERIMENT,) if quick else EXPERIMENTS
    amounts = (0.0, 0.5, 0.8) if quick else AMOUNTS
    cells: dict[str, Planned] = {}
    for experiment in experiments:
        place = experiment.model, experiment.dataset
        sizes = partial(_sizes_cell, settings, *place, seeds[0])
        cells[f"sizes-{experiment.slug}-{seeds[0]}"] = Planned(sizes, 1, experiment.dataset, about)
        for kind, amount, column, seed in product(SELECTS, amounts, COLUMNS, seeds):
            run, images = settings, None
            if experiment.model == "resnet12" and not whole:
                if (experiment.dataset, kind, seed) != (
                    "cifar10",
                    "unstructured",
                    seeds[0],
                ) or amount not in (0.0, 0.8):
                    continue
                run = replace(settings, rounds=SMALL_ROUNDS, average_last=SMALL_ROUNDS)
                images = SMALL_TEST_IMAGES
            name = f"{experiment.slug}-{kind}-{round(100 * amount)}-{column}-{seed}"
            cell = partial(_accuracy_cell, run, *place, kind, amount, column, seed, images)
            cells[name] = Planned(cell, run.rounds, experiment.dataset, about)
    return cells


def _sizes_cell(
    settings: Settings, model: str, dataset: str, seed: int, on_step: Callable[[], None]
) -> list[dict[str, Any]]:
    sizes = payload_sizes(settings, model, dataset, seed)
    on_step()
    return sizes


def _accuracy_cell(
    settings: Settings,
    model: str,
    dataset: str,
    kind: Kind,
    amount: float,
    column: Column,
    seed: int,
    test_images: int | None,
    on_step: Callable[[], None],
) -> dict[str, Any]:
    result = prune_cell(settings, model, dataset, kind, amount, column, seed, on_step, test_images)
    return result | {"test_images": test_images}


def _start(
    settings: Settings, model: str, dataset: str, seed: int
) -> tuple[FlatModel, Dataset, list[NDArray[np.int64]]]:
    data, parts = prepare(replace(settings, dataset=dataset), seed)
    network = FlatModel(build_paper_model(model, data, seed), settings.device)
    return network, data.to(settings.device), parts


def _split(
    part: NDArray[np.int64], seed: int, client: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return hold_out(part, np.random.default_rng([seed, 3, client]))


def _train(
    settings: Settings,
    network: FlatModel,
    data: Dataset,
    weights: Update,
    training: NDArray[np.int64],
    seeds: list[int],
) -> Update:
    generator = np.random.default_rng(seeds)
    orders = [
        torch.from_numpy(generator.permutation(training)).to(settings.device)
        for _ in range(settings.local_epochs)
    ]
    network.load(weights)
    network.train(
        data.train_images,
        data.train_labels,
        orders,
        settings.batch_size,
        settings.learning_rate,
        settings.momentum,
    )
    return network.named(network.weights)


def _minus(trained: Update, weights: Update) -> Update:
    return {name: trained[name] - weights[name] for name in weights}


def _counts(network: FlatModel) -> dict[str, int]:
    values = network.weights.numel()
    prunable = sum(weight.numel() for weight in prunable_weights(network.module).values())
    return {"values": values, "prunable_values": prunable, "other_bytes": 4 * (values - prunable)}
