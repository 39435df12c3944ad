import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcodec.sim.data import Dataset, load_dataset
from fedcodec.sim.models import FlatModel, build_model

MODELS = ["mlp", "cnn"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


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
    for parameter_name, parameter in plain.named_parameters():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(trained[parameter_name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_network_in_torch_shapes(name, digits):
    module = build_model(name, digits, (20,), seed=1)
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    model = FlatModel(module)
    weights = model.named(model.weights)
    assert list(weights) == list(expected)
    for key, value in expected.items():
        assert weights[key].flags.c_contiguous
        assert np.array_equal(weights[key], value.numpy())
    changed = {key: 2 * value + 1 for key, value in weights.items()}
    model.load(changed)
    for key, value in module.state_dict().items():
        assert np.array_equal(value.numpy(), changed[key])


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


def test_the_network_of_the_study_has_109_386_parameters():
    images = torch.zeros(1, 1, 28, 28)
    dataset = Dataset(images, torch.zeros(1), images, torch.zeros(1), classes=10)
    module = build_model("mlp", dataset, (128, 64), seed=0)
    assert sum(parameter.numel() for parameter in module.parameters()) == 109_386
    linear = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (784, 128),
        (128, 64),
        (64, 10),
    ]


def test_unknown_models_are_refused(digits):
    with pytest.raises(ValueError, match="unknown model 'transformer'"):
        build_model("transformer", digits, (), seed=0)
