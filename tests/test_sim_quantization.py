import numpy as np
import pytest
import torch

import fedcodec as fc
from fedcodec.sim.data import load_dataset
from fedcodec.sim.models import FlatModel, build_model
from fedcodec.sim.pruning import prunable_weights
from fedcodec.sim.quantization import fake_quantize, int8_quantize, quantize_weights


@pytest.fixture
def values():
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_fake_quantization_is_the_papers(values, bits):
    found = fake_quantize(values, bits)
    exact = values.double().numpy()
    scale = (2**bits - 1) / np.abs(exact).max()
    np.testing.assert_array_equal(found.numpy(), (np.round(exact * scale) / scale).astype("f4"))
    assert found.dtype == torch.float32


def test_printed_eight_bits_need_nine():
    assert len(fake_quantize(torch.linspace(-5, 5, 10_000), 8).unique()) == 511


@pytest.mark.parametrize("largest", [0.0, 1e-45, 3e38])
def test_fake_quantization_knows_no_overflow(largest):
    values = torch.tensor([largest, -largest, 0.0])
    assert torch.equal(fake_quantize(values), values)


def test_no_values_are_quantized_to_none():
    assert fake_quantize(torch.empty(0, 3)).shape == (0, 3)


def test_impossible_fake_quantization_is_refused(values):
    with pytest.raises(ValueError, match="bits is 0"):
        fake_quantize(values, 0)
    values[3, 3] = torch.inf
    with pytest.raises(fc.NonFiniteError):
        fake_quantize(values)


@pytest.mark.parametrize("block_size", [1024, 7, None])
def test_int8_is_what_the_codec_decodes_in_an_update(values, block_size):
    update = {"matrix": values, "bias": values[0, :10].clone(), "single": values[0, :1].clone()}
    codec = fc.Int8(block_size=block_size)
    decoded = fc.decode(codec.encode(update), like=update)
    for name, tensor in update.items():
        assert torch.equal(int8_quantize(tensor, block_size), decoded[name])


def test_int8_by_channel_is_what_the_codec_decodes(values):
    decoded = fc.decode(fc.Int8(axis=0).encode(values), like=values)
    assert torch.equal(int8_quantize(values, axis=0), decoded)


def test_int8_has_127_steps_each_way(values):
    found = int8_quantize(values, block_size=None)
    codes = found / found.abs().max() * 127
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert (found - values).abs().max() <= values.abs().max() / 127 / 2 * 1.001


@pytest.mark.parametrize("quantize", [fake_quantize, int8_quantize])
def test_weights_of_a_network_are_quantized_in_place(quantize):
    network = build_model("mlp", load_dataset("digits"), (20,), seed=1)
    model = FlatModel(network)  # whose matrices lie transposed
    before = model.named(model.weights)
    quantize_weights(prunable_weights(network), quantize)
    after = model.named(model.weights)
    for name, tensor in before.items():
        chosen = name == "1.weight"
        expected = quantize(torch.from_numpy(tensor)).numpy() if chosen else tensor
        np.testing.assert_array_equal(after[name], expected)
        assert np.array_equal(after[name], tensor) != chosen
