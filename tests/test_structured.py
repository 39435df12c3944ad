"""Channels that are kept whole: which ones, as torch chooses them too, and how few bytes they take."""

import numpy as np
import pytest

import fedcodec as fc

pytestmark = pytest.mark.native


def kept(decoded: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(a for a in range(decoded.ndim) if a != axis)
    return (decoded != 0).any(axis=others)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (128, 784), (10, 64)])
@pytest.mark.parametrize("pruned", [0.1, 0.5, 0.9])
def test_the_channels_are_those_of_torchs_ln_structured(shape, axis, order, pruned):
    torch = pytest.importorskip("torch")
    prune = pytest.importorskip("torch.nn.utils.prune")
    rng = np.random.default_rng(7)
    spread = [shape[axis] if a == axis else 1 for a in range(len(shape))]
    # Norms far apart, in no order: no rounding could exchange two.
    scales = rng.permutation(np.geomspace(1, 1e4, shape[axis])).reshape(spread)
    weights = rng.standard_normal(shape) * scales
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.from_numpy(weights.astype(np.float32)))
    prune.ln_structured(layer, "weight", amount=pruned, n=order, dim=axis)
    count = int(layer.weight_mask.any(dim=[a for a in range(len(shape)) if a != axis]).sum())
    masked = layer.weight.detach().numpy()
    # torch rounds how many are pruned, we how many are kept: the share is given exactly.
    codec = fc.Structured(count / shape[axis], axis=axis, order=order)
    payload = codec.encode(layer.weight_orig.detach())
    assert np.array_equal(fc.decode(payload), masked)
    # What torch has left is found again by itself.
    assert fc.Structured(axis=axis).encode(masked) == payload


def resnet_like():
    rng = np.random.default_rng(0)
    shapes = {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.weight": (128, 64, 3, 3),
        "layer2.weight": (256, 128, 3, 3),
        "shortcut.weight": (256, 64, 1, 1),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_little_travels_but_the_kept_channels(density):
    update = resnet_like()
    dense = sum(round(density * len(w)) * w[0].nbytes for w in update.values())
    payload = fc.Structured(density).encode(update, framing="reference")
    assert dense < len(payload) <= 1.03 * dense
    coded = (fc.Structured(density) | fc.Int8()).encode(update, framing="reference")
    assert len(coded) <= 1.03 * dense / 4


def test_norms_of_both_orders_differ_and_ties_go_to_the_lower_channel():
    rows = np.array([[3, 0, 0], [1, 1.5, 1.5], [2, 2, 0], [2, 0, 2]], np.float32)
    for order, of_one, of_two in ((1, [1], [1, 2]), (2, [0], [0, 2])):
        for density, expected in ((0.25, of_one), (0.5, of_two)):
            restored = fc.decode(fc.Structured(density, order=order).encode(rows))
            assert np.flatnonzero(kept(restored, 0)).tolist() == expected


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 9, 50, 300])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.25, 0.5, 0.9, 1])
def test_as_many_are_kept_as_asked_for_and_one_at_least(channels, density):
    k = max(1, round(density * channels))
    equal = np.full((channels, 3, 2), -2, np.float32)
    for axis in (0, 1):
        update = np.swapaxes(equal, 0, axis)
        restored = fc.decode(fc.Structured(density, axis=axis).encode(update))
        assert kept(restored, axis).tolist() == [c < k for c in range(channels)]


@pytest.mark.parametrize("scale", [2.0**-149, 1e-40, 1e-20, 1, 1e20, 2.0**127])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [1, 2])
def test_scale_changes_no_choice(scale, dtype, order):
    """Nothing overflows or is lost in a sum of squares, however large or small the values are."""
    small = np.array([[1, 0], [1, 1], [0, 0], [1.5, 1]], np.float64).astype(int)
    extreme = scale**7 if dtype == np.float64 and 1e-40 < scale < 1e30 else scale
    update = (small * dtype(extreme)).astype(dtype)
    restored = fc.decode(fc.Structured(0.5, order=order).encode(update))
    assert kept(restored, 0).tolist() == [False, True, False, True]


def test_before_signs_channels_of_zeros_are_not_kept():
    rows = np.zeros((5, 40), np.float32)
    rows[3], rows[4, 7] = 1e-30, -8
    for codec, expected in (
        (fc.Structured(0.8), [3, 4]),
        (fc.Structured(0.2), [4]),
        (fc.Structured(), [3, 4]),
    ):
        restored = fc.decode((codec | fc.Ternary()).encode(rows))
        assert np.flatnonzero(kept(restored, 0)).tolist() == expected
    # A zero of a kept channel decodes to the magnitude, as under a mask.
    assert np.count_nonzero(restored) == 80
    nothing = (fc.Structured(0.5) | fc.Ternary()).encode(0 * rows)
    assert not fc.decode(nothing).any()


def test_what_is_pruned_elsewhere_travels_as_channels():
    update = resnet_like()
    for w in update.values():
        w[::3] = 0
    dense = sum(w.nbytes for w in update.values()) * 2 // 3
    payload = fc.Structured().encode(update)
    assert len(payload) < 1.03 * dense
    assert fc.inspect(payload).codec == "structured"
    restored = fc.decode(payload)
    assert all(np.array_equal(restored[name], w) for name, w in update.items())


def test_a_tensor_without_the_axis_is_kept_whole():
    update = {"w": np.eye(8, dtype=np.float32), "b": np.ones(8, np.float32), "s": np.float32(3)}
    restored = fc.decode(fc.Structured(0.25, axis=1).encode(update))
    assert np.count_nonzero(restored["w"]) == 2
    assert restored["b"].all()
    assert restored["s"] == 3


@pytest.mark.parametrize("where", [(0, 0), (5, 3)])
@pytest.mark.parametrize("codec", ["structured(0.1)", "structured(0.1, axis=1)", "structured"])
def test_a_value_that_is_not_finite_is_named_though_its_channel_is_not_kept(codec, where):
    update = np.ones((6, 4), np.float32)
    update[where] = np.nan
    with pytest.raises(fc.NonFiniteError, match=f"element {4 * where[0] + where[1]}, is nan"):
        fc.parse(codec).encode(update)


@pytest.mark.parametrize("shape", [(7, 300, 200), (500, 900), (40, 9000, 1), (3, 5, 20_000)])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("density", [None, 0.3])
def test_large_tensors_are_coded_as_by_the_oracle(shape, axis, density):
    rng = np.random.default_rng(1)
    update = rng.standard_t(3, shape).astype(np.float32)
    if axis < len(shape):
        np.moveaxis(update, axis, 0)[::2] = 0
    codec = fc.Structured(density, axis=axis)
    payloads, decoded, sums = set(), set(), set()
    before = fc.ops.active()
    try:
        for backend in ("reference", before):
            fc.ops.use(backend)
            payload = codec.encode(update)
            server = fc.Aggregator(like=update)
            server.add(payload, weight=0.3)
            payloads.add(payload)
            decoded.add(fc.decode(payload).tobytes())
            sums.add(server.mean().tobytes())
    finally:
        fc.ops.use(before)
    assert [len(found) for found in (payloads, decoded, sums)] == [1, 1, 1]


def test_a_truth_value_is_no_axis():
    with pytest.raises(TypeError, match="axis is True, it must be an integer"):
        fc.Structured(axis=True)
