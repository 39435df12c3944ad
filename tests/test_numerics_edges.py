"""Edge cases of docs/numerics.md through the public API, for every codec."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import BFLOAT16, CODECS, EXACT, FLOATS, assert_same, bits, update, wide

import fedcodec as fc

LIMIT32 = np.finfo(np.float32).max
SMALLEST = np.float32(2.0**-149)

EDGES = {
    "empty": np.zeros(0, np.float32),
    "empty, two dimensions": np.zeros((3, 0), np.float32),
    "one": np.array([1.5], np.float32),
    "one zero": np.zeros(1, np.float32),
    "0-d": np.array(-2.5, np.float32),
    "all zero": np.zeros(37, np.float32),
    "all -0": -np.zeros(37, np.float32),
    "both zeros": np.array([0.0, -0.0] * 9, np.float32),
    "all equal": np.full(37, 0.7, np.float32),
    "all equal magnitude": np.array([0.7, -0.7] * 19, np.float32),
    "subnormal": np.arange(-18, 19, dtype=np.float32) * SMALLEST,
    "smallest": np.full(9, SMALLEST),
    "around the smallest normal": np.float32(2.0**-126)
    * np.array([1, -1, 0.5, 2, 1.5] * 4, np.float32),
    "largest": np.array([LIMIT32, -LIMIT32] * 9, np.float32),
    "largest and smallest": np.array([LIMIT32, SMALLEST, -SMALLEST, 0, -0.0, 1], np.float32),
    "one large": np.array([1e30] + [1.0] * 40, np.float32),
    "two blocks": np.concatenate([np.full(1024, 1e-30), np.full(3, 1e30)]).astype(np.float32),
}
ROOMY = [
    text for text in CODECS if "float16" not in text
]  # casts refuse what is too large for them


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("text", CODECS)
def test_edges_round_trip_finite_and_stable(text, edge):
    values = {"x": EDGES[edge]}
    codec = fc.parse(text)
    too_large = "float16" in text and np.abs(EDGES[edge]).max(initial=0) > (
        3e38 if "bfloat" in text else 65504
    )
    if too_large:
        with pytest.raises(fc.NonFiniteError, match=r"'x'.*beyond the largest b?float16"):
            codec.encode(values)
        return
    payload = codec.encode(values, seed=1)
    decoded = fc.decode(payload)["x"]
    assert decoded.shape == values["x"].shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    assert_same(fc.decode(payload)["x"], decoded)
    assert codec.encode(values, seed=1) == payload
    shared = fc.Shared()
    shared.add_rules(codec, fc.Spec.of(values))
    by_reference = codec.encode(values, framing="reference", seed=1)
    assert_same(fc.decode(by_reference, like=values, shared=shared)["x"], decoded)
    # The error feedback and the sum see the same numbers.
    client = fc.ErrorFeedback(codec)
    client.encode(values, seed=1)
    client.accept()
    assert_same(client.residual["x"], (values["x"] + np.float32(0)) - decoded)
    server = fc.Aggregator(values)
    server.add(payload)
    assert_same(server.mean()["x"], decoded + np.float32(0))


@pytest.mark.parametrize("text", [text for text in CODECS if "sign" not in text])
def test_zeros_decode_to_zeros(text):
    for edge in ("all zero", "all -0", "both zeros", "one zero"):
        assert not fc.decode(fc.parse(text).encode(EDGES[edge])).any()


@pytest.mark.parametrize("text", ["raw", "raw | zstd", "topk(1.0)", "randomk(1.0)"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minus_zero_keeps_its_sign_where_values_travel_as_they_are(text, dtype):
    values = np.array([-0.0, 0.0, 1.0, -0.0], dtype)
    assert_same(fc.decode(fc.parse(text).encode(values)), values)


def test_minus_zero_is_a_zero_to_a_selection():
    values = np.array([-0.0, 0.0, 1.0, -0.0], np.float32)
    for text in ("sparse", "threshold(value=0)", "topk(0.25)"):
        assert_same(fc.decode(fc.parse(text).encode(values)), np.array([0, 0, 1, 0], np.float32))


@pytest.mark.parametrize("text", ["raw", "sparse", "topk(1.0)", "raw | zstd", "randomk(1.0)"])
def test_subnormals_are_lossless_where_values_travel_as_they_are(text):
    for edge in ("subnormal", "smallest", "around the smallest normal", "largest and smallest"):
        values = EDGES[edge]
        if text != "sparse":
            assert_same(fc.decode(fc.parse(text).encode(values)), values)
        np.testing.assert_array_equal(fc.decode(fc.parse(text).encode(values)), values)


@pytest.mark.parametrize("bits_", range(2, 9))
def test_scales_of_subnormal_values_are_not_below_the_smallest_normal(bits_):
    codec = fc.Int8(block_size=None) if bits_ == 8 else fc.KBit(bits_, block_size=None)
    values = np.append(np.arange(-40, 41), [0] * 20).astype(np.float32) * SMALLEST
    decoded = fc.decode(codec.encode(values))
    assert not decoded.any()  # all are below half of 2^-126
    halves = np.full(64, 2.0**-126, np.float32)
    assert_same(fc.decode(codec.encode(halves)), halves)


@pytest.mark.parametrize("text", ROOMY)
def test_the_largest_float32_does_not_overflow(text):
    for values in (
        EDGES["largest"],
        np.full(40, LIMIT32),
        np.append(np.full(40, LIMIT32), 1).astype(np.float32),
    ):
        decoded = fc.decode(fc.parse(text).encode(values))
        assert np.isfinite(decoded).all()
        assert np.abs(decoded).max() <= LIMIT32


@pytest.mark.parametrize("value", [0.7, -3.0, 1e-30, float(LIMIT32), 2.0**-149])
def test_all_equal(value):
    values = np.full(100, value, np.float32)
    for text in ("sign", "topk(1.0) | ternary", "raw", "topk(1.0)"):
        decoded = fc.decode(fc.parse(text).encode(values))
        np.testing.assert_allclose(decoded, values, rtol=2.0**-23, atol=0)
    # Ties of top-k go to the lower index.
    assert np.flatnonzero(fc.decode(fc.TopK(0.13).encode(values))).tolist() == list(range(13))
    if abs(value) > 1e-30:
        decoded = fc.decode(fc.Int8().encode(values))
        assert len(set(decoded.tolist())) == 1
        np.testing.assert_allclose(decoded, values, rtol=2.0**-22)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_at_least_one_value_is_kept_and_never_more_than_there_are(n):
    values = np.arange(1, n + 1, dtype=np.float32)
    for density in (1e-9, 0.5, 1.0):
        k = max(1, round(density * n))
        for codec in (fc.TopK(density), fc.RandomK(density)):
            assert np.count_nonzero(fc.decode(codec.encode(values))) == k
    # Half to even.
    assert np.count_nonzero(fc.decode(fc.TopK(0.5).encode(np.ones(5, np.float32)))) == 2
    assert np.count_nonzero(fc.decode(fc.TopK(0.5).encode(np.ones(7, np.float32)))) == 4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", CODECS)
def test_not_a_number_and_infinity_are_refused_by_name(text, bad, dtype):
    values = update(0, dtype)
    values["conv"].reshape(-1)[17] = bad
    with pytest.raises(fc.NonFiniteError, match="'conv', element 17") as error:
        fc.parse(text).encode(values)
    assert error.value.tensor == "conv"


@pytest.mark.parametrize(
    "text", ["int8", "kbit(3)", "sign", "topk(0.5) | ternary", "topk(0.5) | int8"]
)
def test_float64_beyond_float32_is_refused_by_a_quantizer_and_not_by_raw(text):
    values = np.append(np.ones(40), 1e39)
    with pytest.raises(fc.NonFiniteError, match="'array', element 40"):
        fc.parse(text).encode(values)
    assert_same(fc.decode(fc.Raw().encode(values)), values)
    assert_same(fc.decode(fc.TopK(1.0).encode(values)), values)


def test_a_half_that_a_decoded_value_would_leave_is_refused_or_right():
    # A scale rounds; the tensor's own dtype must still hold what comes out.
    for dtype, top in ((np.dtype(np.float16), 65504.0), (BFLOAT16, 3.3895e38)):
        values = np.full(300, top).astype(dtype)
        for text in ("int8", "kbit(2)", "sign", "topk(0.9) | ternary", "residual(sign; int8)"):
            decoded = fc.decode(fc.parse(text).encode(values))
            assert np.isfinite(wide(decoded)).all()


def test_cast_rounds_once_from_float64():
    # Just above the middle of two float16 numbers, below what float32 can tell from the middle.
    values = np.full(8, 1 + 2.0**-11 + 2.0**-40)
    decoded = fc.decode(fc.Cast("float16").encode(values))
    assert decoded.tolist() == [1 + 2.0**-10] * 8
    values = np.full(8, 1 + 2.0**-8 + 2.0**-40)
    decoded = fc.decode(fc.Cast("bfloat16").encode(values))
    assert decoded.tolist() == [1 + 2.0**-7] * 8
    # And a tie goes to even.
    assert fc.decode(fc.Cast("float16").encode(np.full(8, 1 + 2.0**-11))).tolist() == [1.0] * 8


# --- the mode of the caller's thread ----------------------------------------------------------------------------------


@pytest.fixture
def flush_to_zero():
    torch = pytest.importorskip("torch")
    if fc.ops.active() == "reference":
        pytest.skip("NumPy follows the mode of its thread; the native kernels do not")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


def tiny(dtype):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 24, 500, dtype=np.uint32)
    words[::3] |= 1 << 31
    single = words.view(np.float32)
    return {"x": single if dtype != np.float64 else single.astype(np.float64)}


def everything(text, values):
    """Bytes of all that encoding, decoding, feedback and sums give."""
    codec = fc.parse(text)
    payload = codec.encode(values, seed=2)
    out = [payload, bits(fc.decode(payload)["x"])]
    client = fc.ErrorFeedback(codec)
    for _ in range(2):
        out.append(client.encode(values))
        client.accept()
        out.append(bits(client.residual["x"]))
    server = fc.Aggregator(values)
    server.add(payload, 0.25)
    server.add(payload, 0.25)
    other = fc.Aggregator(values)
    other.add(payload, 0.5)
    server.merge(other)
    return [*out, *(bits(total) for total in server.state_dict()["sums"]), bits(server.mean()["x"])]


@pytest.mark.native
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda t: t.__name__)
def test_flush_to_zero_changes_no_byte(flush_to_zero, dtype):
    import torch

    torch.set_flush_denormal(False)
    values = tiny(dtype)
    expected = {text: everything(text, values) for text in CODECS}
    torch.set_flush_denormal(True)
    assert np.float32(2.0**-149) * np.float32(1) == 0  # the mode is on
    found = {text: everything(text, values) for text in CODECS}
    torch.set_flush_denormal(False)
    for text in CODECS:
        assert found[text] == expected[text], text


@pytest.mark.native
def test_flush_to_zero_does_not_hide_values_from_a_selection(flush_to_zero):
    values = np.array([0, SMALLEST, 0, -SMALLEST], np.float32)
    decoded = fc.decode(fc.parse("sparse").encode(values))
    assert bits(decoded) == bits(values)


@pytest.mark.native
def test_the_mode_of_the_thread_is_left_as_it_was(flush_to_zero):
    fc.decode(fc.Int8().encode(np.ones(100, np.float32)))
    assert np.float32(2.0**-149) * np.float32(1) == 0


def test_exact_codecs_are_those_that_claim_it():
    assert set(EXACT) < set(CODECS)
