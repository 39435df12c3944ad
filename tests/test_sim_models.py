import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcodec.sim import models
from fedcodec.sim.data import Dataset, load_dataset
from fedcodec.sim.models import FlatModel, build_model, build_paper_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ["mlp", "cnn", "resnet12"]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def narrow(monkeypatch):
    """Make ResNet-12 as small as a test wants it; digits are too low for its four poolings otherwise."""
    monkeypatch.setattr(models, "RESNET12_WIDTHS", (3, 4, 5))


def images_like(*shape):
    images = torch.zeros(1, *shape)
    return Dataset(images, torch.zeros(1), images, torch.zeros(1), classes=10)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_follows_torch_sgd(name, momentum, digits):
    plain = build_model(name, digits, (20,), seed=1)
    flat = FlatModel(build_model(name, digits, (20,), seed=1))
    images, labels = digits.train_images[:70], digits.train_labels[:70]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second training must not remember the velocity of the first
        orders = [torch.randperm(70, generator=generator) for _ in range(3)]
        optimiser = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=momentum)
        for order in orders:
            for batch in order.split(16):
                optimiser.zero_grad()
                functional.cross_entropy(plain(images[batch]), labels[batch]).backward()
                optimiser.step()
        flat.train(images, labels, orders, 16, 0.05, momentum)
    trained = flat.named(flat.weights)
    # Twelve layers and batch norm carry a rounding further than three layers do.
    atol = 1e-4 if name == "resnet12" else 1e-5
    for key, value in plain.state_dict().items():
        if value.is_floating_point():
            np.testing.assert_allclose(trained[key], value.numpy(), rtol=1e-3, atol=atol)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_network_in_torch_shapes(name, digits):
    module = build_model(name, digits, (20,), seed=1)
    expected = {
        key: value.clone()
        for key, value in module.state_dict().items()
        if value.is_floating_point()
    }
    model = FlatModel(module)
    weights = model.named(model.weights)
    assert list(weights) == list(expected)
    for key, value in expected.items():
        assert weights[key].flags.c_contiguous
        assert np.array_equal(weights[key], value.numpy())
    changed = {key: 2 * value + 1 for key, value in weights.items()}
    model.load(changed)
    state = module.state_dict()
    for key, value in changed.items():
        assert np.array_equal(state[key].numpy(), value)


def test_evaluation_counts_every_batch(digits, monkeypatch):
    model = FlatModel(build_model("mlp", digits, (8,), seed=1))
    whole = model.evaluate(digits.test_images, digits.test_labels)
    monkeypatch.setattr("fedcodec.sim.models.EVALUATION_BATCH", 7)
    assert model.evaluate(digits.test_images, digits.test_labels) == pytest.approx(whole, rel=1e-4)
    reference = build_model("mlp", digits, (8,), seed=1)
    logits = reference(digits.test_images)
    assert whole[0] == pytest.approx((logits.argmax(1) == digits.test_labels).float().mean().item())
    assert whole[1] == pytest.approx(functional.cross_entropy(logits, digits.test_labels).item())


def test_initial_weights_depend_on_the_seed_alone(digits):
    state = torch.random.get_rng_state()
    first = build_model("mlp", digits, (8,), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    again, other = (build_model("mlp", digits, (8,), seed=seed) for seed in (1, 2))
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


@pytest.mark.usefixtures("narrow")
def test_batch_norm_learns_its_statistics_in_training_alone(digits):
    model = FlatModel(build_model("resnet12", digits, (), seed=1))
    start = model.named(model.weights)
    assert model.evaluate(digits.test_images, digits.test_labels) == model.evaluate(
        digits.test_images, digits.test_labels
    )
    for key, value in model.named(model.weights).items():
        assert np.array_equal(value, start[key])
    model.train(digits.train_images, digits.train_labels, [torch.arange(100)], 20, 0.05, 0.9)
    trained = model.named(model.weights)
    statistics = [key for key in trained if "running" in key]
    assert len(statistics) == 2 * 3 * 4  # a mean and a variance; three blocks of four
    assert all((trained[key] != start[key]).any() for key in statistics)


@pytest.mark.usefixtures("narrow")
def test_averaged_statistics_are_used_in_evaluation(digits):
    clients = []
    for samples in (torch.arange(200), torch.arange(200, 600)):
        client = FlatModel(build_model("resnet12", digits, (), seed=1))
        client.train(digits.train_images, digits.train_labels, [samples], 20, 0.05, 0.9)
        clients.append(client.named(client.weights))
    mean = {key: (clients[0][key] + clients[1][key]) / 2 for key in clients[0]}
    server = FlatModel(build_model("resnet12", digits, (), seed=2))
    server.load(mean)
    reference = build_model("resnet12", digits, (), seed=3)
    reference.load_state_dict(
        {key: torch.from_numpy(value) for key, value in mean.items()}, strict=False
    )
    reference.eval()
    expected = functional.cross_entropy(reference(digits.test_images), digits.test_labels)
    found = server.evaluate(digits.test_images, digits.test_labels)[1]
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [("simple-nn", (1, 28, 28), 109_386), ("student", (1, 28, 28), 42_846)],
)
def test_networks_of_paper_000_have_its_numbers_of_parameters(name, shape, parameters):
    module = build_paper_model(name, images_like(*shape), seed=0)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [("mnist-classifier", (1, 28, 28), 15_910), ("cifar10-classifier", (3, 32, 32), 550_570)],
)
def test_networks_of_paper_004_have_its_numbers_of_parameters(name, shape, parameters):
    dataset = images_like(*shape)
    module = build_paper_model(name, dataset, seed=0)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert module(dataset.train_images).shape == (1, 10)


def test_simple_nn_is_784_128_64_10():
    module = build_paper_model("simple-nn", images_like(1, 28, 28), seed=0)
    linear = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (784, 128),
        (128, 64),
        (64, 10),
    ]


@pytest.mark.parametrize(
    ("name", "shape", "megabytes"),
    [
        ("simple-cnn", (1, 28, 28), 0.35),
        ("resnet12", (3, 32, 32), 155.75),
        ("resnet12", (1, 28, 28), 155.74),
    ],
)
def test_networks_of_paper_001_have_its_sizes(name, shape, megabytes):
    with torch.device("meta"):  # sizes alone: nothing of 156 MB is made
        module = build_paper_model(name, images_like(*shape), seed=0)
    state = [value for value in module.state_dict().values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in state)
    assert sum(value.numel() * 4 for value in state) == pytest.approx(megabytes * 1e6, rel=0.01)


def test_resnet12_has_twelve_layers_and_ends_small():
    with torch.device("meta"):
        dataset = images_like(3, 32, 32)
        module = build_paper_model("resnet12", dataset, seed=0)
        assert module(dataset.train_images).shape == (1, 10)
    kernels = [layer.kernel_size for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert kernels.count((3, 3)) == 12
    assert kernels.count((1, 1)) == 4


def test_unknown_models_are_refused(digits):
    with pytest.raises(ValueError, match="unknown model 'transformer'"):
        build_model("transformer", digits, (), seed=0)
    with pytest.raises(ValueError, match="unknown model 'mlp'; one of simple-nn"):
        build_paper_model("mlp", digits, seed=0)
