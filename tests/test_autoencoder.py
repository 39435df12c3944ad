"""Autoencoders: updates as latents, decoders as payloads, and the training of both halves."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import fedcodec as fc
import fedcodec.pipeline
from fedcodec.testing import check_codec, hostile_payloads, same, updates_of

torch = pytest.importorskip("torch")

UPDATE = {
    "weight": np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5),
    "steps": np.array([3, 4]),
    "bias": np.linspace(0, 1, 5).astype(np.float16),
    "gain": np.linspace(-2, 0, 4).astype(ml_dtypes.bfloat16),
    "offset": np.array(0.25),
}
VALUES = 45


def funnel(**options):
    """An autoencoder after some training: of UPDATE's size unless told otherwise."""
    made = fc.Funnel(**({"values": VALUES, "latents": 3, "seed": 1} | options))
    made.fit(snapshots(made.values), epochs=3)
    return made


def snapshots(values=VALUES, count=40, seed=0):
    """Points of a curve in a plane, far from the origin."""
    rng = np.random.default_rng(seed)
    plane, centre = rng.standard_normal((2, values)), 3 * rng.standard_normal(values)
    angle = np.linspace(0, 3, count)
    found = np.cos(angle)[:, None] * plane[0] + np.sin(angle)[:, None] * plane[1] + centre
    return found.astype(np.float32)


FUNNELS = {
    "one layer": {},
    "linear": {"activation": "identity"},
    "deep": {"hidden": (20, 8), "activation": "relu"},
    "chunks": {"chunk_size": 7, "latents": 2, "hidden": (5,), "activation": "sigmoid"},
}


def in_float64(layers, rows, activation, *, last):
    apply = {
        "identity": lambda x: x,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    }[activation]
    for number, (weight, bias) in enumerate(layers):
        rows = rows @ weight.numpy().T.astype(np.float64) + bias.numpy()
        if last or number + 1 < len(layers):
            rows = apply(rows)
    return rows


# --- the codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [None, "int8", "topk(0.5) | kbit(4) | zstd", "randomk(0.5)"])
@pytest.mark.parametrize("name", FUNNELS)
def test_it_keeps_the_contract_of_a_codec(name, behind):
    codec = fc.AutoEncoder.of(funnel(**FUNNELS[name]))
    check_codec(
        codec if behind is None else codec | fc.parse(behind),
        updates=updates_of(fc.Spec.of(UPDATE)),
        bound=lambda values: [np.inf] * len(values),
        examples=5,
    )


def test_what_it_missed_can_follow():
    codec = fc.Residual(fc.AutoEncoder.of(funnel()) | fc.Int8(), fc.TopK(0.2) | fc.Int8())
    check_codec(
        codec,
        updates=updates_of(fc.Spec.of(UPDATE)),
        bound=lambda values: [np.inf] * len(values),
        examples=5,
    )
    shared = fc.Shared()
    codec.add_shared(shared)
    exact = fc.Residual(codec.first, fc.Raw())
    update = {"weight": snapshots()[7]}
    decoded = fc.decode(exact.encode(update), shared=shared)["weight"]
    np.testing.assert_allclose(decoded, update["weight"], rtol=1e-6)


@pytest.mark.parametrize("name", FUNNELS)
def test_latents_and_values_are_those_of_the_papers_equations(name):
    made = funnel(**FUNNELS[name])
    codec = fc.AutoEncoder.of(made)
    encoder, decoder = made.folded()
    update = snapshots()[11]
    chunk = made.chunk_size
    rows = np.pad(update, (0, -VALUES % chunk)).reshape(-1, chunk).astype(np.float64)
    latents = in_float64(encoder, rows, made.activation, last=True)
    values = in_float64(decoder, latents, made.activation, last=False).ravel()[:VALUES]
    np.testing.assert_allclose(codec.forward(update), latents.ravel(), rtol=1e-5, atol=2e-6)
    shared = fc.Shared()
    codec.add_shared(shared)
    decoded = fc.decode(codec.encode(update), shared=shared)
    np.testing.assert_allclose(decoded, values, rtol=1e-5, atol=2e-6)


def test_a_payload_is_the_latents_and_35_bytes():
    made = fc.Funnel(values=15_910, latents=32)
    update = {"weight": np.linspace(-1, 1, 15_910, dtype=np.float32)}
    payload = fc.AutoEncoder.of(made).encode(update, framing="reference")
    assert len(payload) == 4 * 32 + 35
    assert 15_910 * 4 / len(payload) >= 370
    assert 15_910 / made.outputs == pytest.approx(497, abs=0.5)


@pytest.mark.slow
def test_the_papers_cifar_autoencoder():
    made = fc.Funnel(values=550_570, latents=320)
    assert made.parameters == 352_915_690
    codec = fc.AutoEncoder.of(made)
    update = {"weight": np.linspace(-1, 1, 550_570, dtype=np.float32)}
    payload = codec.encode(update, framing="reference")
    assert 550_570 * 4 / len(payload) >= 1650
    rounds = fc.break_even(4 * 550_570, len(payload), cost=len(codec.decoder_payload))
    assert rounds == pytest.approx(320.7, rel=0.01)
    shared = fc.Shared()
    shared.add_decoder(codec.decoder_payload)
    assert fc.decode(payload, like=update, shared=shared)["weight"].shape == (550_570,)


def test_error_feedback_keeps_what_the_senders_own_decode_missed():
    codec = fc.AutoEncoder.of(funnel(), decoder=fc.Int8()) | fc.Int8()
    shared = fc.Shared()
    codec.add_shared(shared)
    client = fc.ErrorFeedback(codec)
    update = snapshots()[5]
    decoded = fc.decode(client.encode(update), shared=shared)
    client.accept()
    assert np.array_equal(client.residual, update - decoded)
    decoded = fc.decode(client.encode(update), shared=shared)
    client.accept()
    twin = fc.ErrorFeedback(pickle.loads(pickle.dumps(codec)))
    twin.load_state_dict(client.state_dict())
    assert same(twin.residual, client.residual)


def test_the_aggregator_sums_what_is_decoded():
    codecs = [fc.AutoEncoder.of(funnel(seed=seed)) | fc.Int8() for seed in (1, 2)]
    shared = fc.Shared()
    for codec in codecs:
        shared.add_decoder(codec.stages[0].decoder_payload)
    assert len(shared) == 2
    server = fc.Aggregator(like={"w": snapshots()[0]}, shared=shared)
    decoded = []
    for codec, values in zip(codecs, snapshots()[::20], strict=True):
        payload = codec.encode({"w": values}, framing="reference")
        server.add(payload, weight=1)
        decoded.append(fc.decode(payload, like={"w": values}, shared=shared)["w"])
    assert np.array_equal(server.mean()["w"], (decoded[0] + decoded[1]) / 2)


def test_a_copy_that_is_only_a_digest_decodes_nothing_and_says_so():
    codec = fc.AutoEncoder.of(funnel())
    named = fc.parse(str(codec))
    assert named == codec
    with pytest.raises(ValueError, match=r"only a digest: make the codec by AutoEncoder\.of"):
        named.encode(snapshots()[0])
    with pytest.raises(ValueError, match="only a digest"):
        named.decoder_payload  # noqa: B018


@pytest.mark.parametrize("digest", ["", "12", "x" * 32, "A" * 32, 7])
def test_a_digest_is_32_hexadecimal_digits(digest):
    with pytest.raises((TypeError, ValueError), match="digest is"):
        fc.AutoEncoder(digest)


def test_an_update_of_another_size_is_refused_and_named():
    codec = fc.AutoEncoder.of(funnel())
    with pytest.raises(ValueError, match="is for 45 values, the float tensors have 46"):
        codec.encode(np.zeros(46, np.float32))


def test_an_update_beyond_what_the_decoder_can_hold_is_refused():
    codec = fc.AutoEncoder.of(funnel(activation="identity"))
    client = fc.ErrorFeedback(codec)
    with pytest.raises(ValueError, match="too large for autoencoder"):
        client.encode(np.full(VALUES, 3e38, np.float32))
    assert not client.pending
    client.encode(snapshots()[0])


def test_latents_that_a_cast_cannot_hold_are_refused():
    codec = fc.AutoEncoder.of(funnel(activation="identity")) | fc.Cast("float16")
    with pytest.raises(
        ValueError, match=r"autoencoder.*: output \d+ is .*beyond the largest float16"
    ):
        codec.encode(np.full(VALUES, 1e8, np.float32))


def test_there_is_no_float_to_encode():
    update = {"n": np.arange(3), "empty": np.zeros((0, 4), np.float32)}
    codec = fc.AutoEncoder.of(funnel()) | fc.Int8()
    assert same(fc.decode(codec.encode(update), shared=holding(codec.stages[0])), update)


def test_the_callers_precision_is_not_the_codecs():
    update = snapshots()[4]
    codec = fc.AutoEncoder.of(funnel(**FUNNELS["chunks"]))
    expected = codec.encode(update)
    values = fc.decode(expected, shared=holding(codec))
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.encode(update) == expected
        assert np.array_equal(fc.decode(expected, shared=holding(codec)), values)
    try:
        torch.set_default_dtype(torch.float64)
        assert fc.AutoEncoder.of(funnel(**FUNNELS["chunks"])).digest == codec.digest
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_layer_that_overflows_is_seen_before_one_that_scales_down():
    layers = {"0.weight": np.full((2, 1), 1e30, np.float32), "0.bias": np.zeros(2, np.float32)}
    layers |= {"1.weight": np.full((2, 2), 1e-35, np.float32), "1.bias": np.zeros(2, np.float32)}
    scalars = {"values": np.array(2, np.int64), "activation": np.array(0, np.uint8)}
    decoder = fc.Decoder.read(fc.Raw().encode(scalars | layers))
    largest = float(np.finfo(np.float32).max)
    assert decoder.bound(1e20) > largest
    assert np.isinf(decoder.inverse(np.array([1e20], np.float32))).all()
    assert decoder.bound(1e5) < largest


# --- what a receiver must hold --------------------------------------------------------------------


def holding(*stages):
    shared = fc.Shared()
    for stage in stages:
        shared.add_decoder(stage.decoder_payload)
    return shared


def test_an_unknown_decoder_is_named():
    codec = fc.AutoEncoder.of(funnel())
    payload = codec.encode(snapshots()[0])
    for shared, hint in ((None, "pass shared="), (fc.Shared(), "does not hold")):
        with pytest.raises(fc.DecodeError, match=f"the decoder {codec.digest}.*{hint}"):
            fc.decode(payload, shared=shared)
    assert fc.inspect(payload).codec == str(codec)


def test_a_decoder_for_another_size_is_refused():
    codec, other = fc.AutoEncoder.of(funnel()), fc.AutoEncoder.of(funnel(values=44))
    payload = bytearray(codec.encode(snapshots()[0]))
    place = payload.index(bytes.fromhex(codec.digest))
    payload[place : place + 16] = bytes.fromhex(other.digest)
    from fedcodec.testing import reseal

    out = np.ones(VALUES, np.float32)
    with pytest.raises(fc.DecodeError, match="is for 44 values, the tensors have 45"):
        fc.decode(reseal(bytes(payload)), out=out, shared=holding(other))
    assert (out == 1).all()


def test_a_decoder_that_fails_the_second_time_leaves_nothing_half_done(monkeypatch):
    first, second = (fc.AutoEncoder.of(funnel(seed=seed)) for seed in (1, 2))
    codec = (first | fc.Zstd()).for_names({"b": second | fc.Zstd()})
    shared = fc.Shared()
    codec.add_shared(shared)
    update = {"a": snapshots()[0], "b": snapshots()[1]}
    payload = codec.encode(update)
    expected = fc.decode(payload, shared=shared)
    inverse, calls = fc.Decoder.inverse, []

    def once(self, latents):
        calls.append(self.digest)
        if calls.count(self.digest) > 1:
            raise RuntimeError("out of memory")
        return inverse(self, latents)

    monkeypatch.setattr(fc.Decoder, "inverse", once)
    out = {name: np.zeros_like(values) for name, values in update.items()}
    assert same(fc.decode(payload, out=out, shared=shared), expected)
    calls.clear()
    server = fc.Aggregator(like=update, shared=shared)
    server.add(payload)
    assert same(server.mean(), expected)


def test_the_decoders_digest_is_of_its_payload():
    made = funnel()
    plain, coded = fc.AutoEncoder.of(made), fc.AutoEncoder.of(made, decoder=fc.Int8())
    assert plain.digest != coded.digest
    assert len(coded.decoder_payload) < len(plain.decoder_payload)
    decoder = fc.Decoder.read(memoryview(coded.decoder_payload))
    assert decoder.digest.hex() == coded.digest
    assert (decoder.values, decoder.outputs) == (VALUES, 3)
    shared = holding(coded)
    # Both ends use the weights that travelled, not those that were trained.
    latents = coded.forward(snapshots()[3])
    assert np.array_equal(
        shared.get(decoder.digest, "decoder").inverse(latents), coded.inverse(latents)
    )
    assert not np.array_equal(plain.inverse(latents), coded.inverse(latents))


def test_bytes_that_are_frozen():
    """A layer of two latents for three values, in its payload, and the payload of the latents 1 and -2."""
    layer = {
        "values": np.array(3, np.int64),
        "activation": np.array(0, np.uint8),
        "0.weight": np.array([[1, 0], [0, 1], [2, 0.5]], np.float32),
        "0.bias": np.array([0, 0, 8], np.float32),
    }
    decoder = fc.Raw().encode(layer)
    shared = fc.Shared()
    digest = shared.add_decoder(decoder)
    assert digest.hex() == "3d6d51959863e6500087b8b7e338e437"
    payload = bytes.fromhex(
        "46430100 05 0001010103 01 10 10" + digest.hex() + "0000803f 000000c0 3fead366"
    )
    assert fc.decode(payload, shared=shared).tolist() == [1, -2, 9]


def described():
    return {
        "values": np.array(9, np.int64),
        "activation": np.array(1, np.uint8),
        "0.weight": np.ones((4, 2), np.float32),
        "0.bias": np.ones(4, np.float32),
        "1.weight": np.ones((5, 4), np.float32),
        "1.bias": np.ones(5, np.float32),
    }


WRONG = {
    "no dictionary": (lambda d: list(d.values()), "not a decoder"),
    "empty": (lambda d: {}, "not a decoder"),
    "no layer": (lambda d: {key: d[key] for key in ("values", "activation")}, "not a decoder"),
    "half a layer": (lambda d: {key: d[key] for key in list(d)[:-1]}, "not a decoder"),
    "another order": (lambda d: dict(reversed(d.items())), "not a decoder"),
    "another name": (lambda d: {key.replace("bias", "b"): d[key] for key in d}, "not a decoder"),
    "values unsigned": (
        lambda d: d | {"values": np.array(9, np.uint64)},
        "'values' is torch.uint64",
    ),
    "values of one dimension": (
        lambda d: d | {"values": np.array([9])},
        r"of shape \(1,\), expected",
    ),
    "no values": (lambda d: d | {"values": np.array(0)}, "5 outputs for 0 values"),
    "negative values": (lambda d: d | {"values": np.array(-9)}, "5 outputs for -9 values"),
    "fewer values than outputs": (lambda d: d | {"values": np.array(4)}, "5 outputs for 4"),
    "activation": (lambda d: d | {"activation": np.array(4, np.uint8)}, "unknown activation 4"),
    "double": (lambda d: d | {"1.bias": np.ones(5)}, "layer 1 is none.*bias torch.float64"),
    "flat": (lambda d: d | {"0.weight": np.ones(8, np.float32)}, "layer 0 is none"),
    "no latents": (lambda d: d | {"0.weight": np.ones((4, 0), np.float32)}, "layer 0 is none"),
    "long bias": (lambda d: d | {"1.bias": np.ones(6, np.float32)}, "layer 1 is none"),
    "narrows": (
        lambda d: d | {"1.weight": np.ones((3, 4), np.float32), "1.bias": np.ones(3, np.float32)},
        "layer 1 narrows",
    ),
    "17 layers": (
        lambda d: (
            {key: d[key] for key in ("values", "activation")}
            | {f"{n}.{p}": d[f"0.{p}"][:2] for n in range(17) for p in ("weight", "bias")}
        ),
        "17 layers, the most is 16",
    ),
    "misfit": (lambda d: d | {"1.weight": np.ones((5, 3), np.float32)}, "do not fit together"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_decoder_is_refused(name):
    spoil, message = WRONG[name]
    shared = fc.Shared()
    shared.add_decoder(fc.Raw().encode(described()))
    with pytest.raises(fc.DecodeError, match=message):
        shared.add_decoder(fc.Raw().encode(spoil(described())))
    assert len(shared) == 1


def test_a_decoder_comes_whole():
    codec = fc.AutoEncoder.of(funnel())
    for payload, message in (
        (fc.Raw().encode(described(), framing="reference"), "pass like="),
        (fc.Raw().encode(described(), base=bytes(8)), "pass shared="),
        (codec.encode(snapshots()[0]), "pass shared="),
    ):
        with pytest.raises(fc.DecodeError, match=message):
            fc.Shared().add_decoder(payload)
    with pytest.raises(fc.DecodeError, match="limit"):
        fc.Decoder.read(codec.decoder_payload, limits=fc.Limits(max_bytes=100))


def test_a_decoder_too_large_for_the_store_is_a_strangers_fault():
    payload = fc.Raw().encode(described())
    nbytes = fc.Decoder.read(payload).nbytes
    store = fc.Shared(max_bytes=nbytes)
    store.add_decoder(payload)
    small = fc.Shared(max_bytes=nbytes - 1)
    with pytest.raises(fc.DecodeError, match=f"{nbytes} bytes, the store holds {nbytes - 1}"):
        small.add_decoder(payload)
    assert len(small) == 0


def test_tied_layers_count_each():
    square, bias = np.ones((20, 20), np.float32), np.ones(20, np.float32)
    layers = {
        f"{n}.{part}": array
        for n in range(16)
        for part, array in (("weight", square), ("bias", bias))
    }
    scalars = {"values": np.array(20, np.int64), "activation": np.array(1, np.uint8)}
    payload = fc.Raw().encode(scalars | layers)
    assert len(payload) < 4_000
    assert fc.Decoder.read(payload).nbytes == 16 * 4 * 420
    with pytest.raises(fc.DecodeError, match="a decoder of 26880 bytes, the limit is 4000"):
        fc.Decoder.read(payload, limits=fc.Limits(max_bytes=4_000))


def test_a_decoder_that_does_not_fit_on_its_device_is_refused(monkeypatch):
    def full(*arguments):
        raise RuntimeError("out of memory")

    payload = fc.Raw().encode(described())
    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(fc.DecodeError, match="does not fit on device 'cpu': out of memory"):
        fc.Shared().add_decoder(payload)


def test_a_device_that_is_not_there_is_named():
    payload = fc.Raw().encode(described())
    with pytest.raises(fc.BackendError, match="device 'abacus'"):
        fc.Shared().add_decoder(payload, device="abacus")
    for device in ("abacus", "meta"):
        with pytest.raises(fc.BackendError, match=f"device '{device}'"):
            fc.Funnel(values=VALUES, latents=3).fit(snapshots(), device=device)
    with pytest.raises(fc.BackendError, match="device 'meta'"):
        fc.Shared().add_decoder(payload, device="meta")


def test_values_and_latents_of_another_size_are_named():
    codec = fc.AutoEncoder.of(funnel())
    with pytest.raises(ValueError, match="is for 45 values"):
        codec.forward(snapshots()[:1])
    with pytest.raises(ValueError, match="takes 3 latents, not 2"):
        codec.inverse(np.zeros(2, np.float32))
    own = fc.AutoEncoder.of(fc.Funnel(4 * VALUES, 3))  # as large as a decoder of the first
    with pytest.raises(ValueError, match=r"decoder is autoencoder.*pass shared="):
        fc.AutoEncoder.of(funnel(), decoder=own)


@settings(max_examples=200, deadline=None)
@given(hostile_payloads(fc.Raw().encode(described())))
def test_no_bytes_raise_anything_but_decode_error(data):
    shared = fc.Shared()
    try:
        shared.add_decoder(data)
    except fc.DecodeError:
        assert len(shared) == 0


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNNELS)
def test_training_lowers_the_error_on_others_too(name):
    made = fc.Funnel(**({"values": VALUES, "latents": 3} | FUNNELS[name]))
    data = snapshots()
    history = made.fit(data[::2], validation=data[1::2], epochs=60)
    assert history[-1].training_loss < 0.5 * history[0].training_loss
    assert min(epoch.validation_loss for epoch in history) < 0.5 * history[0].validation_loss


def test_the_best_epoch_remains_and_training_stops_early():
    data, noise = snapshots(), np.random.default_rng(5).standard_normal((40, VALUES))
    made = fc.Funnel(values=VALUES, latents=40, seed=3)
    history = made.fit(
        data[::2] + noise[::2].astype(np.float32),
        validation=data[1::2],
        epochs=400,
        patience=5,
    )
    losses = [epoch.validation_loss for epoch in history]
    assert len(history) == losses.index(min(losses)) + 1 + 5 < 400
    codec = fc.AutoEncoder.of(made)
    decoded = np.array([codec.inverse(codec.forward(values)) for values in data[1::2]])
    deviation = (data[::2] + noise[::2].astype(np.float32)).std()
    loss = np.mean(np.square(decoded - data[1::2])) / deviation**2
    assert loss == pytest.approx(min(losses), rel=1e-3)


def test_equal_seeds_train_alike_from_disk_too(tmp_path, one_thread):
    data = snapshots()
    kept = fc.Snapshots(tmp_path / "weights", values=VALUES)
    assert kept.array().shape == (0, VALUES)
    for values in data:
        kept.add({"a": values[:40].reshape(8, 5), "n": np.arange(2), "b": values[40:]})
    again = fc.Snapshots(tmp_path / "weights", values=VALUES)
    assert len(again) == 40
    assert isinstance(again.array(), np.memmap)
    digests = set()
    for array in (data, data, again.array()):
        made = fc.Funnel(values=VALUES, latents=3, seed=7)
        made.fit(array, epochs=3, batch_size=8, seed=1)
        digests.add(fc.AutoEncoder.of(made).digest)
    assert len(digests) == 1
    made.fit(data, epochs=1)
    assert fc.AutoEncoder.of(made).digest not in digests


def test_training_calls_back_after_each_epoch_and_shows_a_bar(capfd):
    seen = []
    made = fc.Funnel(values=VALUES, latents=3)
    history = made.fit(snapshots(), epochs=4, on_epoch=seen.append, progress=True)
    assert seen == history
    assert len(seen) == 4
    assert seen[0].validation_loss is None
    assert "autoencoder" in capfd.readouterr().err


def test_mixed_precision_trains_too():
    made = fc.Funnel(values=VALUES, latents=3)
    history = made.fit(snapshots(), epochs=30, mixed_precision=True)
    assert history[-1].training_loss < 0.5 * history[0].training_loss


def test_values_that_are_all_alike_are_learned_at_once():
    made = fc.Funnel(values=VALUES, latents=3)
    made.fit(np.full((2, VALUES), 7, np.float32), epochs=1)
    codec = fc.AutoEncoder.of(made)
    np.testing.assert_allclose(
        codec.inverse(codec.forward(np.full(VALUES, 7, np.float32))), 7, atol=0.1
    )


def test_training_that_diverges_leaves_the_weights():
    made = funnel(activation="identity")
    before = fc.AutoEncoder.of(made).digest
    with pytest.raises(fc.NonFiniteError, match=r"diverged in epoch \d+: lower learning_rate"):
        made.fit(snapshots(), epochs=50, learning_rate=1e30)
    assert fc.AutoEncoder.of(made).digest == before


def test_a_last_step_that_diverges_is_seen():
    made = funnel()
    before = fc.AutoEncoder.of(made).digest
    with pytest.raises(fc.NonFiniteError, match="diverged in epoch 1"):
        made.fit(snapshots(), epochs=1, batch_size=40, learning_rate=1e300)
    assert fc.AutoEncoder.of(made).digest == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": -0.1}, r"learning_rate is -0\.1"),
        ({"patience": 3}, "patience needs a validation"),
        ({"learning_rate": "a"}, "learning_rate is 'a'"),
        ({"seed": None}, "seed is None"),
        ({"on_epoch": 5}, "on_epoch is 5"),
    ],
)
def test_numbers_that_training_cannot_use_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fc.Funnel(values=VALUES, latents=3).fit(snapshots(), **options)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (snapshots().astype(np.float64), "float64 of shape"),
        (snapshots(44), "expected float32 of"),
        (snapshots()[0], "expected float32 of"),
        (snapshots()[:0], "there are none"),
        (np.full((2, VALUES), np.inf, np.float32), "not finite"),
    ],
)
def test_wrong_snapshots_are_named(array, message):
    made = fc.Funnel(values=VALUES, latents=3)
    with pytest.raises(ValueError, match=f"snapshots: .*{message}"):
        made.fit(array)
    with pytest.raises(ValueError, match=f"validation: .*{message}"):
        made.fit(snapshots(), validation=array)


@pytest.mark.parametrize("latents", [1, 2, 5, 44])
def test_principal_components_are_those_of_the_singular_value_decomposition(latents):
    rng = np.random.default_rng(2)
    data = snapshots() + 0.1 * rng.standard_normal((40, VALUES)).astype(np.float32)
    centre = data.mean(0, np.float64)
    components = np.linalg.svd(data - centre, full_matrices=False)[2][:latents]
    expected = (data - centre) @ components.T @ components + centre
    codec = fc.AutoEncoder.of(fc.Funnel.principal(data, latents))
    decoded = np.array([codec.inverse(codec.forward(values)) for values in data])
    np.testing.assert_allclose(decoded, expected, atol=2e-5)
    trained = fc.Funnel(values=VALUES, latents=latents, activation="identity")
    trained.fit(data, epochs=30)
    other = fc.AutoEncoder.of(trained)
    errors = [np.square(c.inverse(c.forward(v)) - v).sum() for c in (codec, other) for v in data]
    assert sum(errors[:40]) <= sum(errors[40:]) * 1.0001


def test_models_that_both_ends_hold_make_a_decoder_that_needs_not_travel():
    models = snapshots()[::10]
    client = fc.AutoEncoder.of(fc.Funnel.spanning(models))
    server = fc.Shared()
    own = server.add_decoder(fc.AutoEncoder.of(fc.Funnel.spanning(models.copy())).decoder_payload)
    assert own.hex() == client.digest
    assert client.outputs == len(models) - 1
    inside = models[-1] + 0.5 * (models[0] - models[-1]) - 0.25 * (models[1] - models[-1])
    decoded = fc.decode(client.encode(inside), shared=server)
    np.testing.assert_allclose(decoded, inside, atol=1e-4)
    # Of what lies outside, the nearest point.
    outside = inside + np.random.default_rng(3).standard_normal(VALUES).astype(np.float32)
    decoded = fc.decode(client.encode(outside), shared=server)
    differences = (models[:-1] - models[-1]).astype(np.float64)
    missed = differences @ (outside - decoded).astype(np.float64)
    assert np.abs(missed).max() < 1e-3 * np.linalg.norm(differences)
    again = fc.AutoEncoder.of(fc.Funnel.spanning(np.repeat(models[:1], 3, axis=0)))
    assert np.array_equal(again.inverse(again.forward(outside)), models[0])
    with pytest.raises(ValueError, match="there is one, it takes two"):
        fc.Funnel.spanning(models[:1])


def test_principal_components_of_what_never_changes():
    codec = fc.AutoEncoder.of(fc.Funnel.principal(np.full((3, VALUES), 7, np.float32), 2))
    assert np.array_equal(
        codec.inverse(codec.forward(np.full(VALUES, 9, np.float32))), [7] * VALUES
    )


def test_wrong_snapshots_have_no_principal_components():
    for array, message in (
        (snapshots()[0], "expected float32 of"),
        (snapshots()[:0], "there are none"),
        (snapshots()[:, :0], "there are none"),
        (snapshots()[0, 0], "must be a NumPy array"),
        (torch.from_numpy(snapshots()), "snapshots is a Tensor, it must be a NumPy array"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fc.Funnel.principal(array, 1)
    with pytest.raises(TypeError, match="snapshots is a list"):
        fc.Funnel(values=VALUES, latents=3).fit([snapshots()[0]])
    with pytest.raises(ValueError, match="latents is 46, it must be from 1 to 45"):
        fc.Funnel.principal(snapshots(), VALUES + 1)
    with pytest.raises(TypeError, match="snapshots is a MaskedArray"):
        fc.Funnel.principal(np.ma.masked_invalid(snapshots()), 2)
    with pytest.raises(TypeError, match=r"snapshots is a Snapshots.*such as its array\(\)"):
        fc.Funnel.principal(fc.Snapshots("unused", VALUES), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": 0}, "values is 0"),
        ({"latents": 0}, "latents is 0, it must be from 1 to 45"),
        ({"latents": 2.0}, "latents is 2.0, it must be an integer"),
        ({"chunk_size": 46}, "chunk_size is 46, it must be from 1 to 45"),
        ({"chunk_size": 0}, "chunk_size is 0, it must be from 1 to 45"),
        ({"hidden": (2,)}, "latents is 3, it must be from 1 to 2"),
        ({"hidden": (9, 8.5)}, r"hidden\[1\] is 8.5, it must be an integer"),
        ({"hidden": 8}, "hidden is 8, it must be a sequence"),
        ({"latents": 46}, "latents is 46, it must be from 1 to 45"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"hidden": (9,) * 16}, "17 layers, the most is 16"),
        ({"activation": "gelu"}, "must be one of identity, tanh"),
    ],
)
def test_a_funnel_narrows(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fc.Funnel(**({"values": VALUES, "latents": 3} | options))


def test_the_papers_parameter_counts():
    assert fc.Funnel(values=15_910, latents=32).parameters == 1_034_182
    assert fc.Funnel(values=100, latents=3, hidden=(20,)).parameters == (
        100 * 20 + 20 + 20 * 3 + 3 + 3 * 20 + 20 + 20 * 100 + 100
    )


def test_chunks_keep_the_decoder_small():
    small, large = (
        fc.AutoEncoder.of(fc.Funnel(values=values, latents=2, chunk_size=64))
        for values in (1_000, 100_000)
    )
    assert abs(len(large.decoder_payload) - len(small.decoder_payload)) <= 8
    assert (small.outputs, large.outputs) == (2 * 16, 2 * 1563)


def test_of_takes_a_funnel_only():
    with pytest.raises(TypeError, match="expected a Funnel, got a dict"):
        fc.AutoEncoder.of({})
    with pytest.raises(TypeError, match="decoder is a str, it must be a Codec"):
        fc.AutoEncoder.of(funnel(), decoder="int8")


def test_the_limits_for_strangers_are_not_the_senders(monkeypatch):
    monkeypatch.setattr(fedcodec.pipeline, "_LIMITS", fc.Limits(max_bytes=100))
    payload = fc.AutoEncoder.of(funnel()).decoder_payload
    with pytest.raises(fc.DecodeError, match="the limit is 100"):
        fc.Decoder.read(payload)


def test_snapshots_of_another_size_are_refused(tmp_path):
    kept = fc.Snapshots(tmp_path / "weights", values=3)
    with pytest.raises(ValueError, match="the update has 2 values, expected 3"):
        kept.add(np.zeros(2, np.float32))
    kept.add(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="12 bytes are not snapshots of 2"):
        fc.Snapshots(tmp_path / "weights", values=2)


def test_rows_on_disk_go_through_a_codec(tmp_path):
    kept = fc.Snapshots(tmp_path / "weights", values=VALUES)
    kept.add(snapshots()[0])
    row = kept.array()[0]
    assert not row.flags.writeable
    codec = fc.AutoEncoder.of(funnel())
    latents = codec.forward(row)
    assert np.array_equal(latents, codec.forward(snapshots()[0]))
    assert np.array_equal(codec.inverse(latents), codec.inverse(np.float64(latents)))


def test_a_snapshot_that_was_written_in_part_is_written_over(tmp_path):
    kept = fc.Snapshots(tmp_path / "weights", values=3)
    kept.add(np.ones(3))
    with (tmp_path / "weights").open("ab") as file:
        file.write(b"12345")
    assert kept.array().tolist() == [[1, 1, 1]]
    kept.add(np.full(3, 2.0))
    assert kept.array().tolist() == [[1, 1, 1], [2, 2, 2]]
    with pytest.raises(ValueError, match="values is 0"):
        fc.Snapshots(tmp_path / "weights", values=0)


def test_threads_and_processes_may_add_to_one_file(tmp_path):
    path, values, many = tmp_path / "weights", 500, 60
    source = (
        "import sys, numpy as np, fedcodec as fc\n"
        f"kept = fc.Snapshots(sys.argv[1], {values})\n"
        f"for _ in range({many}): kept.add(np.full({values}, 7, np.float32))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", source, str(path)])
    kept = fc.Snapshots(path, values)

    def add(number):
        for _ in range(many):
            kept.add(np.full(values, number, np.float32))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(3)))
    assert child.wait() == 0
    rows = kept.array()
    assert len(rows) == 4 * many
    assert (rows == rows[:, :1]).all()
    assert [int((rows[:, 0] == number).sum()) for number in (0, 1, 2, 7)] == [many] * 4


def test_flatten_is_what_the_codec_sees():
    tied = np.ones((2, 2), np.float16)
    flat = fc.flatten([tied, np.arange(3), np.array(2.5), tied, torch.full((2,), 3.0)])
    assert flat.dtype == np.float32
    assert flat.tolist() == [1, 1, 1, 1, 2.5, 3, 3]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_flatten_takes_one_array_of_any_float(dtype):
    assert fc.flatten(np.arange(4, dtype=dtype).reshape(2, 2)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [np.float16(np.inf), np.float32(np.nan), 1e300])
def test_snapshots_take_finite_values_only(tmp_path, value):
    kept = fc.Snapshots(tmp_path / "weights", values=2)
    with pytest.raises(fc.NonFiniteError, match="tensor 'b': a value is not finite in float32"):
        kept.add({"a": np.ones(1), "b": np.array([value])})
    assert len(kept) == 0


def test_funnels_and_codecs_can_be_copied():
    made = funnel()
    assert fc.AutoEncoder.of(copy.deepcopy(made)).digest == fc.AutoEncoder.of(made).digest
    codec = fc.AutoEncoder.of(made)
    again = pickle.loads(pickle.dumps(codec))
    assert again.encode(snapshots()[0]) == codec.encode(snapshots()[0])


def test_the_callers_modes_are_not_those_of_training(one_thread):
    expected = fc.AutoEncoder.of(funnel())
    principal, spanning = made = [
        fc.AutoEncoder.of(fc.Funnel.principal(snapshots(), 2)),
        fc.AutoEncoder.of(fc.Funnel.spanning(snapshots()[:3])),
    ]
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        with mode:
            assert fc.AutoEncoder.of(funnel()) == expected
            again = fc.Funnel.principal(snapshots(), 2), fc.Funnel.spanning(snapshots()[:3])
            for codec, other in zip(made, map(fc.AutoEncoder.of, again), strict=True):
                assert np.array_equal(other.forward(snapshots()[0]), codec.forward(snapshots()[0]))
    assert principal.digest != spanning.digest


def test_the_loss_is_that_of_values_and_not_of_what_fills_chunks_up():
    wide = np.random.default_rng(0).normal(size=(20, 51)).astype(np.float32)
    made = fc.Funnel(51, 25, chunk_size=50, activation="identity")
    made.fit(wide, epochs=1)
    (epoch,) = made.fit(wide, epochs=1, learning_rate=0)
    codec = fc.AutoEncoder.of(made)
    missed = wide - [codec.inverse(codec.forward(row)) for row in wide]
    assert epoch.training_loss == pytest.approx(np.square(missed).mean() / wide.var(), rel=1e-4)


def test_training_on_never_ends_worse_than_it_began():
    made = funnel()
    (before,) = made.fit(snapshots(), validation=snapshots(seed=0), epochs=1, learning_rate=0)
    found = made.fit(snapshots(), validation=snapshots(), epochs=3, learning_rate=3, patience=1)
    assert min(epoch.validation_loss for epoch in found) > before.validation_loss
    (after,) = made.fit(snapshots(), validation=snapshots(), epochs=1, learning_rate=0)
    assert after.validation_loss == before.validation_loss


def test_a_payload_may_name_only_so_many_decoders():
    codec = fc.AutoEncoder.of(funnel(values=1, latents=1))
    rules = fc.Raw().for_names(
        {f"{number}": codec if number % 2 else codec | fc.Int8() for number in range(5)}
    )
    update = {f"{number}": np.ones(1, np.float32) for number in range(5)}
    server = fc.Shared()
    codec.add_shared(server)
    payload = rules.encode(update)
    assert set(fc.decode(payload, shared=server)) == set(update)
    for like in (None, update):
        with pytest.raises(fc.DecodeError, match="names decoders 5 times, the limit is 4"):
            fc.decode(payload, like=like, shared=server, limits=fc.Limits(max_decoders=4))
    client = fc.ErrorFeedback(rules)
    client.encode(update)
    client.accept()


@pytest.mark.parametrize("name", FUNNELS)
def test_a_funnel_goes_on_from_its_state(name, tmp_path, one_thread):
    trained, twin = funnel(**FUNNELS[name]), fc.Funnel(VALUES, **{"latents": 3} | FUNNELS[name])
    file = tmp_path / "funnel.npz"
    np.savez(file, **trained.state_dict())
    with np.load(file) as state:
        twin.load_state_dict(state)
    assert fc.AutoEncoder.of(twin) == fc.AutoEncoder.of(trained)
    again = [of.fit(snapshots(), epochs=2, seed=3) for of in (trained, twin)]
    assert again[0] == again[1]
    update = dict(UPDATE)
    assert fc.AutoEncoder.of(twin).encode(update) == fc.AutoEncoder.of(trained).encode(update)


def test_a_state_is_an_update_and_has_arrays_of_its_own():
    trained = funnel()
    state = trained.state_dict()
    restored = fc.decode(fc.Int8().encode(state))
    twin = fc.Funnel(VALUES, 3)
    twin.load_state_dict(restored)
    first, second = (of.folded()[0][0][0] for of in (trained, twin))
    assert 0 < (first - second).abs().max() < 0.01 * first.abs().max()
    state["encoder.0.weight"][:] = restored["encoder.0.weight"][:] = 7
    assert (trained.folded()[0][0][0] != 7).all()
    assert torch.equal(twin.folded()[0][0][0], second)
    twin.load_state_dict({key: torch.from_numpy(value) for key, value in restored.items()})
    assert twin.state_dict()["encoder.0.weight"][0, 0] == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", np.array(2), "version is array"),
        ("values", np.array(7), "values is array"),
        ("activation", np.array(0), "activation is array"),
        ("mean", np.array(np.nan), "mean is array.*it must be a finite float"),
        ("deviation", np.array(0.0), "deviation is array.*above 0"),
        ("encoder.0.weight", None, "encoder.0.weight: object"),
        (
            "encoder.0.bias",
            np.zeros(4, "f4"),
            r"encoder.0.bias.*\(4,\), expected float32 of \(3,\)",
        ),
        ("decoder.0.weight", np.full((VALUES, 3), np.inf, "f4"), "decoder.0.weight.*not finite"),
        ("decoder.0.bias", "gone", "decoder.0.bias not in it"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(key, value, message):
    state, kept = funnel(seed=2).state_dict(), fc.Funnel(VALUES, 3)
    before = fc.AutoEncoder.of(kept)
    state[key] = value
    if isinstance(value, str):
        del state[key]
    with pytest.raises(ValueError, match=message):
        kept.load_state_dict(state)
    with pytest.raises(TypeError, match="state is a list"):
        kept.load_state_dict([])
    assert fc.AutoEncoder.of(kept) == before


def test_naming_one_loads_no_torch():
    source = "import sys, fedcodec as fc; fc.parse('autoencoder(\"" + 32 * "0" + "\")'); "
    source += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.gpu
def test_on_a_gpu_it_trains_and_codes_as_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device here")
    data = snapshots()
    made = fc.Funnel(values=VALUES, latents=3)
    history = made.fit(data[::2], validation=data[1::2], epochs=60, device="cuda")
    assert history[-1].validation_loss < 0.5 * history[0].validation_loss
    codec = fc.AutoEncoder.of(made)
    on_host = fc.Decoder.read(codec.decoder_payload)
    latents = codec.forward(data[3])
    np.testing.assert_allclose(
        codec.inverse(latents), on_host.inverse(latents), rtol=1e-4, atol=1e-5
    )
    shared = fc.Shared()
    shared.add_decoder(codec.decoder_payload, device="cuda")
    update = {"w": torch.from_numpy(data[3]).cuda()}
    decoded = fc.decode((codec | fc.Int8()).encode(update), shared=shared)
    assert np.abs(decoded["w"] - data[3]).max() < 0.5 * np.abs(data[3]).max()
