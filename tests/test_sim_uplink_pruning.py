import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedcodec as fc
from fedcodec.sim import models, pruning
from fedcodec.sim.data import hold_out, load_dataset, partition_iid
from fedcodec.sim.models import FlatModel, build_paper_model
from fedcodec.sim.sizes import binary_entropy
from fedcodec.sim.uplink_pruning import (
    PAPER_SETTINGS,
    payload_sizes,
    prune_cell,
    uplink_codec,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = replace(PAPER_SETTINGS, clients=12, rounds=3, average_last=1, batch_size=16)
KINDS = ["unstructured", "structured"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(models, "RESNET12_WIDTHS", (8, 10, 12))


def cell(amount, column, model="simple-nn", kind="unstructured", seed=3, **changes):
    settings = replace(SETTINGS, **changes)
    return prune_cell(settings, model, "digits", kind, amount, column, seed)


def by_hand(model, kind, amount, column, seed):
    """The same rounds with masks of `pruning` on plain arrays, and no codec."""
    data = load_dataset("digits")
    parts = partition_iid(
        len(data.train_labels), SETTINGS.clients, np.random.default_rng([seed, 0])
    )
    network = FlatModel(build_paper_model(model, data, seed))
    weights = network.named(network.weights)
    sampling, accuracies = np.random.default_rng([seed, 1]), []
    for number in range(1, SETTINGS.rounds + 1):
        updates, counts = [], []
        for client in sampling.choice(SETTINGS.clients, 2, replace=False):
            training, _ = hold_out(parts[client], np.random.default_rng([seed, 3, client]))
            batches = np.random.default_rng([seed, 2, number, client])
            network.load(weights)
            network.train(
                data.train_images,
                data.train_labels,
                [torch.from_numpy(batches.permutation(training))],
                *(16, 0.01, 0.9),
            )
            update = network.named(network.weights)
            if column == "delta":
                update = {name: update[name] - weights[name] for name in weights}
            tensors = {
                name: torch.from_numpy(update[name])
                for name in pruning.prunable_weights(network.module)
            }
            if kind == "unstructured":
                masks = pruning.magnitude_masks(tensors, amount)
            else:
                masks = pruning.channel_masks(tensors, pruning.channel_norms(tensors), amount)
            pruning.apply_masks(tensors, masks)
            updates.append(update)
            counts.append(len(training))
        mean = {
            name: np.average([update[name] for update in updates], axis=0, weights=counts)
            for name in weights
        }
        start = weights if column == "delta" else dict.fromkeys(weights, 0)
        weights = {name: np.float32(start[name] + mean[name]) for name in mean}
        network.load(weights)
        accuracies.append(network.evaluate(data.test_images, data.test_labels)[0])
    return accuracies


@pytest.mark.parametrize("column", ["weights", "delta"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model", "amount"), [("simple-nn", 0.5), ("resnet12", 0.25)])
def test_a_cell_is_pruned_federated_averaging(model, kind, amount, column):
    result = cell(amount, column, model, kind)
    expected = by_hand(model, kind, amount, column, seed=3)
    assert result["accuracy"] == pytest.approx(expected, abs=2.5 / 360)
    assert result["best_accuracy"] == max(result["accuracy"])
    assert result["accuracy"][result["best_round"] - 1] == result["best_accuracy"]


def test_a_cell_is_plain_data_and_the_same_on_every_run():
    result = cell(0.5, "delta")
    assert json.loads(json.dumps(result)) == result
    assert cell(0.5, "delta") == result
    assert cell(0.5, "delta", seed=4)["accuracy"] != result["accuracy"]
    per_round = ("payload_bytes", "int8_payload_bytes", "accuracy", "loss", "validation_accuracy")
    assert all(len(result[name]) == SETTINGS.rounds for name in per_round)
    assert all(0 <= share <= 1 for share in result["validation_accuracy"])


def test_nothing_pruned_is_the_same_in_both_columns():
    weights, delta = (cell(0.0, column) for column in ("weights", "delta"))
    assert weights["accuracy"] == pytest.approx(delta["accuracy"], abs=1.5 / 360)
    assert weights["codec"].startswith("rules(raw;")


def test_every_round_is_told():
    told = []
    prune_cell(
        SETTINGS, "simple-nn", "digits", "unstructured", 0.5, "delta", 0, lambda: told.append(1)
    )
    assert len(told) == SETTINGS.rounds


def test_a_part_of_the_test_set_is_enough():
    result = prune_cell(
        replace(SETTINGS, rounds=1), "simple-nn", "digits", "unstructured", 0.5, "delta", 0, None, 7
    )
    assert result["accuracy"][0] * 7 == pytest.approx(round(result["accuracy"][0] * 7))


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("column", ["weights", "delta"])
def test_unstructured_payloads_are_near_their_entropy(amount, column):
    result = cell(amount, column, "simple-nn", rounds=1)
    n, other = result["prunable_values"], result["other_bytes"]
    assert n == 64 * 128 + 128 * 64
    positions = binary_entropy(amount)
    for name, bits, most in (("payload_bytes", 32, 1.02), ("int8_payload_bytes", 8, 1.05)):
        values = n * bits * (1 - amount) / 8
        for size in result[name][0]:
            assert 0.99 * values < size - other <= most * (values + n * positions / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_biases_and_statistics_travel_whole(kind):
    data = load_dataset("digits")
    network = FlatModel(build_paper_model("resnet12", data, 0))
    update = network.named(network.weights)
    codec = uplink_codec(network.module, kind, 0.75)
    decoded = fc.decode(codec.encode(update), like=update)
    pruned = pruning.prunable_weights(network.module)
    for name in update.keys() - pruned.keys():
        assert np.array_equal(decoded[name], update[name]), name
    kept = [np.count_nonzero(decoded[name]) for name in pruned]
    total = sum(weight.numel() for weight in pruned.values())
    if kind == "unstructured":
        assert sum(kept) == round(total * 0.25)
    else:
        for name in pruned:
            channels = decoded[name].reshape(len(decoded[name]), -1).all(axis=1)
            assert channels.sum() == round(len(channels) * 0.25)


def test_sizes_are_those_of_the_first_payload_of_a_cell():
    sizes = payload_sizes(SETTINGS, "simple-nn", "digits", 3, ["unstructured"], [0.0, 0.6])
    assert [(entry["amount"], entry["column"]) for entry in sizes] == [
        *((0.0, "weights"), (0.0, "delta"), (0.6, "weights"), (0.6, "delta"))
    ]
    for entry in sizes:
        other = cell(entry["amount"], entry["column"], rounds=1)
        assert entry["values"] == other["values"]
        for name in ("payload_bytes", "int8_payload_bytes"):
            assert entry[name] == pytest.approx(other[name][0][0], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "random"}, "kind is 'random'"),
        ({"column": "gradient"}, "column is 'gradient'"),
        ({"model": "gpt"}, "unknown model 'gpt'"),
        ({"amount": 1.0}, "density"),
        ({"amount": -0.5}, "density"),
    ],
)
def test_impossible_cells_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cell(**{"amount": 0.5, "column": "delta"} | changes)
