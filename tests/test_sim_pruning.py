import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fedcodec.sim import models, pruning
from fedcodec.sim.data import load_dataset
from fedcodec.sim.models import FlatModel, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

AMOUNTS = [0.0, 0.1, 0.37, 0.8, 1.0]


@pytest.fixture
def digits():
    return load_dataset("digits")


@pytest.fixture(params=["mlp", "cnn", "resnet12"])
def network(request, digits, monkeypatch):
    monkeypatch.setattr(models, "RESNET12_WIDTHS", (3, 4, 5))
    return build_model(request.param, digits, (20, 13), seed=1)


def by_torch(network, choose):
    """The masks that torch's own functions make of a copy of the network."""
    copied = copy.deepcopy(network)
    layers = [
        (name, layer)
        for name, layer in copied.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ][:-1]
    choose([(layer, "weight") for _, layer in layers])
    return {f"{name}.weight": layer.weight_mask.bool() for name, layer in layers}


def assert_equal(masks, expected):
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected[name]), name


def test_all_layers_but_the_last_are_pruned(digits, monkeypatch):
    monkeypatch.setattr(models, "RESNET12_WIDTHS", (3, 4, 5))
    names = {
        name: list(pruning.prunable_weights(build_model(name, digits, (20,), seed=1)))
        for name in ("mlp", "cnn", "resnet12")
    }
    assert names["mlp"] == ["1.weight"]
    assert names["cnn"] == ["0.weight", "3.weight", "7.weight"]
    assert len(names["resnet12"]) == 3 * 4 + 1
    assert "0.shortcut.0.weight" in names["resnet12"]
    whole = pruning.prunable_weights(build_model("mlp", digits, (20,), seed=1), last=True)
    assert list(whole) == ["1.weight", "3.weight"]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_global_masks_are_those_of_torch(network, amount):
    def choose(parameters):
        prune.global_unstructured(parameters, prune.L1Unstructured, amount=amount)

    masks = pruning.magnitude_masks(pruning.prunable_weights(network), amount)
    assert_equal(masks, by_torch(network, choose))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_masks_per_layer_are_those_of_torch(network, amount):
    def choose(parameters):
        for parameter in parameters:
            prune.l1_unstructured(*parameter, amount=amount)

    masks = pruning.magnitude_masks(pruning.prunable_weights(network), amount, "tensor")
    assert_equal(masks, by_torch(network, choose))


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("n", [1, 2])
def test_channel_masks_by_norm_are_those_of_torch(network, amount, n):
    def choose(parameters):
        for parameter in parameters:
            prune.ln_structured(*parameter, amount=amount, n=n, dim=0)

    weights = pruning.prunable_weights(network)
    masks = pruning.channel_masks(weights, pruning.channel_norms(weights, n), amount)
    assert_equal(masks, by_torch(network, choose))


@pytest.mark.parametrize("scope", ["tensor", "update"])
def test_percentile_masks_keep_what_is_above_the_percentile(network, scope):
    weights = pruning.prunable_weights(network)
    masks = pruning.percentile_masks(weights, 0.2, scope)
    magnitudes = {name: weight.detach().abs().double().numpy() for name, weight in weights.items()}
    everything = np.concatenate([part.ravel() for part in magnitudes.values()])
    for name, part in magnitudes.items():
        threshold = np.percentile(part if scope == "tensor" else everything, 20)
        np.testing.assert_array_equal(masks[name].numpy(), part > threshold)


def test_percentile_masks_prune_ties():
    weights = {"a": torch.tensor([0.0, 0.0, 0.0, -1.0])}
    assert pruning.percentile_masks(weights, 0.2)["a"].tolist() == [False, False, False, True]
    assert pruning.magnitude_masks(weights, 0.25)["a"].sum() == 3


def test_batch_norm_scales_are_those_of_the_norm_behind_each_convolution(digits, monkeypatch):
    monkeypatch.setattr(models, "RESNET12_WIDTHS", (3, 4, 5))
    network = build_model("resnet12", digits, (), seed=1)
    for number, layer in enumerate(network.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -number, number)
    scores = pruning.batch_norm_scales(network)
    weights = pruning.prunable_weights(network)
    assert list(scores) == list(weights)
    assert torch.equal(scores["1.body.3.weight"], network[1].body[4].weight.abs())
    assert torch.equal(scores["2.shortcut.0.weight"], network[2].shortcut[1].weight.abs())
    masks = pruning.channel_masks(weights, scores, 0.5)
    kept = masks["1.body.3.weight"].flatten(1).all(1)
    assert kept.sum() == 2
    norm = network[1].body[4].weight.detach().abs()
    assert norm[kept].min() > norm[~kept].max()


def test_networks_without_batch_norm_have_no_scales(digits):
    with pytest.raises(ValueError, match="no convolution"):
        pruning.batch_norm_scales(build_model("cnn", digits, (), seed=1))


def test_the_geometric_median_goes_before_the_small():
    filters = torch.tensor([[9.0, 9.0], [1.0, 0.0], [9.0, 10.0], [10.0, 9.0]])
    weights = {"a": filters.view(4, 2, 1, 1)}
    by_median = pruning.channel_masks(weights, pruning.geometric_median_distances(weights), 0.25)
    by_norm = pruning.channel_masks(weights, pruning.channel_norms(weights), 0.25)
    assert by_median["a"].flatten(1).all(1).tolist() == [False, True, True, True]
    assert by_norm["a"].flatten(1).all(1).tolist() == [True, False, True, True]
    distances = (filters[:, None] - filters[None]).norm(dim=-1).sum(1)
    torch.testing.assert_close(pruning.geometric_median_distances(weights)["a"], distances)


CHOICES = {
    "global": lambda weights, amount, kept: pruning.magnitude_masks(weights, amount, previous=kept),
    "per layer": lambda weights, amount, kept: pruning.magnitude_masks(
        weights, amount, "tensor", kept
    ),
    "percentile": lambda weights, amount, kept: pruning.percentile_masks(
        weights, amount, previous=kept
    ),
    "channels": lambda weights, amount, kept: pruning.channel_masks(
        weights, pruning.channel_norms(weights), amount, previous=kept
    ),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_iterative_masks_cumulate_and_reach_the_amount(choose):
    generator = torch.Generator().manual_seed(0)
    masks, one_go = None, None
    for amount in pruning.amounts_to(0.6, steps=3):
        weights = {  # other ones each time, as after training
            "a": torch.randn(10, 8, 3, 3, generator=generator),
            "b": torch.randn(20, 10, generator=generator),
        }
        before, masks = masks, choose(weights, amount, masks)
        one_go = choose(weights, amount, None)
        for name, mask in masks.items():
            assert mask.float().mean() == pytest.approx(1 - amount, abs=0.2)
            assert before is None or not (mask & ~before[name]).any()
        total = sum(mask.sum() for mask in masks.values()) / (720 + 200)
        assert total == pytest.approx(1 - amount, abs=0.01)
    assert any((masks[name] != one_go[name]).any() for name in masks)


def test_with_recovery_pruned_weights_come_back():
    dense = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    first = pruning.magnitude_masks(dense, 0.5)
    dense["a"][0] = 9
    assert pruning.magnitude_masks(dense, 0.5)["a"].tolist() == [True, False, False, True]
    assert pruning.magnitude_masks(dense, 0.5, previous=first)["a"].tolist() == [
        *(False, False, True, True)
    ]


def test_steps_are_equal_and_end_at_the_amount():
    assert pruning.amounts_to(0.6, 3) == pytest.approx([0.2, 0.4, 0.6])
    with pytest.raises(ValueError, match="a step at least"):
        pruning.amounts_to(0.5, 0)


def test_applied_masks_change_values_alone(network, digits):
    names = list(network.state_dict())
    model = FlatModel(network)
    before = model.named(model.weights)
    weights = pruning.prunable_weights(network)
    masks = pruning.magnitude_masks(weights, 0.8)
    pruning.apply_masks(weights, masks)
    after = model.named(model.weights)
    assert list(network.state_dict()) == names
    for name in before:
        mask = masks[name].numpy() if name in masks else np.ones(before[name].shape, bool)
        np.testing.assert_array_equal(after[name], before[name] * mask)


def test_what_is_kept_pruned_stays_zero_in_training_and_only_then(digits):
    network = build_model("cnn", digits, (20,), seed=1)
    model = FlatModel(network)
    weights = pruning.prunable_weights(network)
    masks = pruning.magnitude_masks(weights, 0.7)
    start = model.named(model.weights)

    def train():
        orders = [torch.arange(60)] * 2
        model.train(digits.train_images, digits.train_labels, orders, 20, 0.05, 0.9)
        return model.named(model.weights)

    with pruning.keep_pruned(weights, masks):
        kept = train()
    for name, mask in masks.items():
        assert not kept[name][~mask.numpy()].any()
        assert (kept[name] != start[name])[mask.numpy()].mean() > 0.5  # not behind dead units
    free = train()
    assert all(free[name][~mask.numpy()].any() for name, mask in masks.items())


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan"), 3])
def test_impossible_amounts_are_refused(amount):
    weights = {"a": torch.ones(4)}
    for choose in (pruning.magnitude_masks, pruning.percentile_masks):
        with pytest.raises(ValueError, match="from 0 to 1"):
            choose(weights, amount)


def test_an_amount_is_a_share_even_if_it_is_an_integer():
    assert not pruning.magnitude_masks({"a": torch.ones(4)}, 1)["a"].any()


def test_unknown_scopes_are_refused():
    with pytest.raises(ValueError, match="'layer', it must be"):
        pruning.magnitude_masks({"a": torch.ones(4)}, 0.5, "layer")


@pytest.mark.parametrize("scope", ["update", "tensor"])
def test_what_stays_pruned_counts_where_weights_are_zero_too(scope):
    weights = {"a": torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 5, 6, 7])}
    previous = {"a": torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1, 1]).bool()}
    masks = pruning.magnitude_masks(weights, 0.3, scope, previous=previous)
    assert torch.equal(masks["a"], previous["a"])
    masks = pruning.magnitude_masks(weights, 0.5, scope, previous=previous)
    assert int((~masks["a"]).sum()) == 5
    assert not masks["a"][3:6].any()
    assert masks["a"][6:].all()


def test_batch_norms_that_scale_nothing_are_passed_over():
    fitting = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)]
    for after in (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(7)):
        module = nn.Sequential(*fitting, nn.Conv2d(2, 4, 3), after)
        assert list(pruning.batch_norm_scales(module)) == ["0.weight"]
        with pytest.raises(ValueError, match="followed by a batch norm with scales"):
            pruning.batch_norm_scales(module[2:])
