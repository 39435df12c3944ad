"""Error feedback, sentence by sentence: DESIGN.md section 1 and docs/numerics.md."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from fractions import Fraction

import numpy as np
import pytest
from codec_cases import (
    BFLOAT16,
    CODECS,
    EXACT,
    FLOATS,
    assert_same,
    is_float,
    mask_for,
    update,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import pipeline

LIMIT32 = float(np.finfo(np.float32).max)


def compensated(values, residual):
    """float32(input) + residual, rounded once; float64 in float64."""
    return {
        name: wide(x) + (np.zeros_like(wide(x)) if residual is None else residual[name])
        for name, x in values.items()
        if is_float(x)
    }


def missed(c, decoded):
    return {name: c[name] - wide(decoded[name]) for name in c}


def floats_of(residual):
    return {name: x for name, x in residual.items() if x is not None}


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("text", CODECS)
def test_residual_is_c_minus_decoded_bit_for_bit(text, dtype):
    client, residual = fc.ErrorFeedback(text), None
    for number in range(3):
        values = update(number, dtype)
        c = compensated(values, residual)
        decoded = fc.decode(client.encode(values, seed=number))
        client.accept()
        residual = missed(c, decoded)
        assert_same(floats_of(client.residual), residual)


@pytest.mark.parametrize("framing", ["inline", "reference"])
@pytest.mark.parametrize("text", ["mask", "residual", *CODECS[-3:]])
def test_masks_rules_bases_and_both_framings(text, framing):
    values = update(1)
    mask = mask_for(values)
    codec = {
        "mask": mask | fc.Int8(),
        "residual": fc.Residual(mask | fc.Int8(), fc.TopK(0.1)),
    }.get(text) or fc.parse(text)
    shared = fc.Shared()
    codec.add_shared(shared)
    shared.add_rules(codec, fc.Spec.of(values))
    base = shared.add_base(values)
    client, residual = fc.ErrorFeedback(codec), None
    for number in range(3):
        values = update(number)
        c = compensated(values, residual)
        payload = client.encode(values, framing=framing, base=base)
        assert fc.inspect(payload).framing == framing
        assert fc.inspect(payload).base == base
        decoded = fc.decode(payload, like=values, shared=shared)
        client.accept()
        residual = missed(c, decoded)
        assert_same(floats_of(client.residual), residual)


def test_the_payload_is_that_of_the_compensated_update():
    codec = fc.TopK(0.3) | fc.Int8()
    client = fc.ErrorFeedback(codec)
    first, second = update(0), update(1)
    assert client.encode(first, seed=3) == codec.encode(first, seed=3)
    client.accept()
    c = second | compensated(second, client.residual)
    assert client.encode(second, seed=4) == codec.encode(c, seed=4)


def test_the_sum_is_rounded_once_and_not_in_half_precision():
    # In float16 1 + 2^-12 is 1; the residual must carry it in float32.
    for dtype, small in ((np.float16, 2.0**-12), (BFLOAT16, 2.0**-9)):
        client = fc.ErrorFeedback(fc.TopK(0.5))
        big, little = np.array([1, 0], dtype), np.array([0, small], dtype)
        client.encode(np.array([0, 2], dtype) + little)
        client.reject()
        client.encode(big)
        client.accept()
        # Sent: 2 (rounded to the dtype); kept: 1 and what the rounding missed.
        assert client.residual.tolist() == [1.0, 0.0]
    client = fc.ErrorFeedback(fc.Raw())
    client.encode(np.array([1], np.float16))
    client.reject()
    decoded = fc.decode(client.encode(np.array([2.0**-12], np.float16)))
    client.accept()
    assert decoded.tolist() == [1.0]
    assert client.residual.tolist() == [2.0**-12]
    assert client.residual.dtype == np.float32


def test_float64_updates_are_kept_in_float64():
    client = fc.ErrorFeedback(fc.Int8())
    values = np.array([1.0, 1 / 3, 1e-40, -(2.0**-60), 127.0] * 3)
    decoded = fc.decode(client.encode(values))
    client.accept()
    assert client.residual.dtype == np.float64
    assert_same(client.residual, values - decoded)


@pytest.mark.parametrize("text", CODECS)
def test_input_is_not_changed(text):
    values, client = update(), fc.ErrorFeedback(text)
    before = copy.deepcopy(values)
    for _ in range(2):
        client.encode(values)
        client.accept()
        assert_same(values, before)


def test_the_residual_does_not_follow_the_input():
    values = np.ones(4, np.float32)
    client = fc.ErrorFeedback(fc.TopK(0.25))
    client.encode(values)
    values[:] = 100
    client.accept()
    assert client.residual.tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        client.residual[0] = 1


# --- exactness --------------------------------------------------------------------------------------------------------

NASTY32 = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-126), 2.0**-127, 1.0, 127.0, LIMIT32, -LIMIT32]),
    st.integers(-300, 300).map(float),
    # Close to the middle between two codes.
    st.tuples(st.integers(-127, 127), st.integers(-3, 3)).map(
        lambda q: float(np.float32(q[0] + 0.5) * np.float32(1 + q[1] * 2.0**-23))
    ),
)
NASTY64 = st.one_of(NASTY32, st.floats(-1e38, 1e38))


def pairs_of(dtype, elements, limit):
    """Two updates of one size."""
    return st.lists(elements.filter(lambda x: abs(x) <= limit), min_size=2, max_size=24).map(
        lambda x: np.array(x[: len(x) // 2 * 2]).astype(dtype).reshape(2, -1)
    )


def check_exact(codec, first, second):
    """Two rounds: in the first c is the input, in the second it has a residual in it."""
    client = fc.ErrorFeedback(codec)
    for values in (first, second):
        # Where c is beyond float32 nothing is sent: another test's matter.
        with np.errstate(over="ignore"):
            c = compensated({"x": values}, None if client.residual is None else client.residual)
        if not (np.abs(c["x"]) <= LIMIT32).all():
            return
        decoded = fc.decode(client.encode({"x": values}))
        client.accept()
        total = wide(decoded["x"]) + client.residual["x"]
        np.testing.assert_array_equal(total, c["x"], strict=True)


NO_CAST = [text for text in EXACT if "float16" not in text]


@pytest.mark.parametrize("text", NO_CAST)
@settings(max_examples=10, deadline=None)
@given(values=pairs_of(np.float32, NASTY32, LIMIT32))
def test_decoded_plus_residual_is_c_exactly_in_float32(text, values):
    check_exact(text, *values)


@pytest.mark.parametrize("text", NO_CAST)
@settings(max_examples=6, deadline=None)
@given(values=pairs_of(np.float64, NASTY64, 1e38))
def test_decoded_plus_residual_is_c_exactly_in_float64(text, values):
    check_exact(text, *values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ('cast("float16")', 30_000.0),
        ('topk(0.4) | cast("float16")', 30_000.0),
        ('cast("bfloat16")', 1e38),
    ],
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_decoded_plus_residual_is_c_exactly_for_casts(text, limit, dtype, data):
    elements = NASTY64 if dtype is np.float64 else NASTY32
    check_exact(text, *data.draw(pairs_of(dtype, elements, limit)))


@pytest.mark.parametrize(("dtype", "limit"), [(np.float16, 30_000.0), (BFLOAT16, 1e38)], ids=str)
@pytest.mark.parametrize("text", ["raw", "topk(0.4)", "randomk(0.5)", 'cast("bfloat16")'])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_decoded_plus_residual_is_c_exactly_for_half_tensors(text, dtype, limit, data):
    check_exact(text, *data.draw(pairs_of(dtype, NASTY32, limit)))


@pytest.mark.parametrize("text", NO_CAST)
def test_decoded_plus_residual_is_c_exactly_on_many_values(text):
    rng = np.random.default_rng(8)
    bits32 = rng.integers(0, 2**32, 6000, dtype=np.uint32).view(np.float32)
    bits32 = np.where(np.abs(bits32) <= 1e38, bits32, np.float32(1))
    bits32[2000:4000].sort()  # blocks of like magnitude
    smooth = rng.standard_normal(6000).astype(np.float32)
    halves = (rng.integers(-127, 127, 6000) + np.float32(0.5)) * np.float32(2.0**-20)
    halves = halves.astype(np.float32)
    halves = np.nextafter(halves, rng.choice([-1, 1], 6000).astype(np.float32))
    subnormal = rng.integers(0, 1 << 24, 6000, dtype=np.uint32).view(np.float32)
    tiny = smooth * np.float32(1e-6)
    for first, second in (
        (bits32, smooth),
        (smooth, halves),
        (halves, tiny),
        (subnormal, subnormal),
    ):
        check_exact(text, first, second)
        between = first * (1 + rng.integers(-4, 5, 6000) * 2.0**-50)  # float32 numbers
        check_exact(text, between, second.astype(np.float64) / 3)


def test_telescoping_sum_is_exact_where_every_step_is():
    # Small integers: every c is exact, so what was sent and what is left is what went in.
    rng = np.random.default_rng(5)
    for text in ("topk(0.05)", "randomk(0.1)", "threshold(percentile=90)", "raw | zstd"):
        client = fc.ErrorFeedback(text)
        went_in, sent = np.zeros(500), np.zeros(500)
        for _ in range(40):
            values = rng.integers(-50, 51, 500).astype(np.float32)
            sent += fc.decode(client.encode(values))
            client.accept()
            went_in += values
        np.testing.assert_array_equal(sent + client.residual, went_in)


@pytest.mark.parametrize(
    "text", ["int8", "topk(0.2) | int8", "topk(0.1) | kbit(3)", 'cast("bfloat16")']
)
def test_telescoping_sum_is_off_by_the_roundings_of_c_alone(text):
    rng = np.random.default_rng(6)
    client = fc.ErrorFeedback(text)
    total, allowed = [Fraction(0)] * 40, [Fraction(0)] * 40
    for _ in range(12):
        values = rng.standard_normal(40).astype(np.float32)
        left = np.zeros(40, np.float32) if client.residual is None else client.residual
        c = values + left
        decoded = fc.decode(client.encode(values))
        client.accept()
        for i in range(40):
            total[i] += Fraction(float(values[i])) - Fraction(float(decoded[i]))
            allowed[i] += abs(
                Fraction(float(c[i])) - Fraction(float(values[i])) - Fraction(float(left[i]))
            )
    for i in range(40):
        assert abs(total[i] - Fraction(float(client.residual[i]))) <= allowed[i]


def test_everything_is_sent_in_the_end():
    client = fc.ErrorFeedback(fc.TopK(0.1))
    values = np.arange(1, 101, dtype=np.float32)
    sent = fc.decode(client.encode(values))
    client.accept()
    for _ in range(9):
        sent += fc.decode(client.encode(np.zeros_like(values)))
        client.accept()
    assert_same(sent, values)
    assert not client.residual.any()


# --- pending, accept, reject ------------------------------------------------------------------------------------------


def test_accept_reject_and_drop():
    first, second = np.array([1, 3], np.float32), np.array([1, 1], np.float32)
    client = fc.ErrorFeedback(fc.TopK(0.5))
    assert client.residual is None
    assert not client.pending
    client.encode(first)
    assert client.pending
    assert client.residual is None  # nothing is kept before the outcome is known
    client.reject()
    assert client.residual.tolist() == [1, 3]
    assert fc.decode(client.encode(second)).tolist() == [0, 4]
    assert client.residual.tolist() == [1, 3]
    client.accept()
    assert client.residual.tolist() == [2, 0]
    client.encode(second)
    client.reject(drop=True)
    assert client.residual.tolist() == [2, 0]
    assert not client.pending


def test_reject_loses_nothing():
    for text in ("topk(0.2) | int8", "sign", "int8"):
        lossy, calm = fc.ErrorFeedback(text), fc.ErrorFeedback(text)
        first, second = update(0), update(1)
        lossy.encode(first)
        lossy.reject()
        c = compensated(second, lossy.residual)
        assert_same(floats_of(lossy.residual), compensated(first, None))
        both = second | c
        assert lossy.encode(second, seed=9) == calm.encode(both, seed=9)


def test_reject_with_drop_before_the_first_accept_leaves_no_residual():
    client = fc.ErrorFeedback(fc.TopK(0.5))
    client.encode(np.ones(2, np.float32))
    client.reject(drop=True)
    assert client.residual is None
    assert fc.decode(client.encode(np.ones(2, np.float32))).tolist() == [1, 0]


def test_a_second_encode_before_either_raises():
    client = fc.ErrorFeedback("int8")
    client.encode(update(0))
    state = client.state_dict()
    with pytest.raises(RuntimeError, match=r"accept\(\) or reject\(\)"):
        client.encode(update(1))
    assert_states(client.state_dict(), state)
    client.accept()
    for settle in (client.accept, client.reject, lambda: client.reject(drop=True)):
        with pytest.raises(RuntimeError, match="no payload is pending"):
            settle()


BAD_UPDATES = {
    "not a number": (lambda x: x | {"w1": np.full((7, 11), np.nan, np.float32)}, fc.NonFiniteError),
    "infinity": (lambda x: x | {"conv": x["conv"] - np.float32(np.inf)}, fc.NonFiniteError),
    "another shape": (lambda x: x | {"w1": np.zeros((11, 7), np.float32)}, fc.SpecMismatch),
    "another dtype": (lambda x: x | {"w1": np.zeros((7, 11), np.float64)}, fc.SpecMismatch),
    "a name missing": (lambda x: {k: v for k, v in x.items() if k != "conv"}, fc.SpecMismatch),
    "a name more": (lambda x: x | {"more": np.zeros(1, np.float32)}, fc.SpecMismatch),
    "another order": (lambda x: dict(reversed(x.items())), fc.SpecMismatch),
    "a list": (lambda x: list(x.values()), fc.SpecMismatch),
    "no array": (lambda x: x | {"w1": "w1"}, TypeError),
}


@pytest.mark.parametrize("pending_before", [False, True])
@pytest.mark.parametrize("what", BAD_UPDATES)
def test_a_failed_encode_leaves_the_state(what, pending_before):
    spoil, error = BAD_UPDATES[what]
    client = fc.ErrorFeedback("topk(0.3) | int8")
    client.encode(update(0))
    client.reject() if pending_before else client.accept()
    state = client.state_dict()
    with pytest.raises(error):
        client.encode(spoil(update(1)))
    assert_states(client.state_dict(), state)
    assert not client.pending
    twin = fc.ErrorFeedback("topk(0.3) | int8")
    twin.load_state_dict(state)
    assert client.encode(update(2)) == twin.encode(update(2))


def test_a_failed_first_encode_fixes_no_spec():
    client = fc.ErrorFeedback("int8")
    with pytest.raises(fc.NonFiniteError, match="'a'"):
        client.encode({"a": np.array([np.nan], np.float32)})
    assert client.sequence == 0
    client.encode({"b": np.ones(3, np.float64)})


def test_a_sum_beyond_float32_is_refused_by_name():
    client = fc.ErrorFeedback("topk(0.1)")
    values = {"big": np.full(10, LIMIT32, np.float32)}
    client.encode(values)
    client.accept()
    before = client.state_dict()
    with pytest.raises(fc.NonFiniteError, match="'big'"):
        client.encode(values)
    assert_states(client.state_dict(), before)
    assert fc.decode(client.encode({"big": -values["big"]}))["big"][0] == -LIMIT32


def test_reset_is_the_way_on_where_the_residual_does_not_fit():
    client = fc.ErrorFeedback("raw")
    with pytest.raises(fc.NonFiniteError) as caught:
        client.encode({"half": np.array([np.inf], np.float16)})
    assert "residual" not in str(caught.value)
    values = {"half": np.array([6e4], np.float16)}
    client.encode(values)
    client.reject()
    with pytest.raises(fc.NonFiniteError, match=r"'half'.*residual.*reset\(\)") as caught:
        client.encode(values)
    assert caught.value.tensor == "half"
    client.reset()
    assert client.residual is None
    assert_same(fc.decode(client.encode(values)), values)
    client.reset()  # of what is pending too
    assert not client.pending
    assert client.sequence == 2
    with pytest.raises(fc.SpecMismatch):
        client.encode({"other": values["half"]})
    assert_same(fc.decode(client.encode(values)), values)


@pytest.mark.parametrize("codec", [5, None, fc.TopK, b"int8"])
def test_what_is_no_codec_is_refused_at_once(codec):
    with pytest.raises(TypeError, match="codec is"):
        fc.ErrorFeedback(codec)


@pytest.mark.parametrize(
    "arguments", [{"framing": "by mail"}, {"base": b"short"}, {"seed": -1}, {"seed": 1 << 64}]
)
def test_bad_arguments_leave_the_state(arguments):
    client = fc.ErrorFeedback("int8")
    client.encode(update(0))
    client.accept()
    before = client.state_dict()
    with pytest.raises(ValueError, match=next(iter(arguments))):
        client.encode(update(1), **arguments)
    assert_states(client.state_dict(), before)


# --- other tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CODECS)
def test_integers_and_bools_are_lossless_and_have_no_residual(text):
    client = fc.ErrorFeedback(text)
    for number in range(3):
        values = update(number)
        decoded = fc.decode(client.encode(values))
        client.accept()
        for name, x in values.items():
            if not is_float(x):
                assert_same(decoded[name], x)
                assert client.residual[name] is None
                assert name not in client.state_dict()["residual"]


def test_tied_tensors_have_one_residual():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    client = fc.ErrorFeedback(fc.TopK(0.5))
    decoded = fc.decode(client.encode({"embed": weight, "head": weight}))
    client.accept()
    assert decoded["embed"] is decoded["head"]
    assert_same(client.residual["embed"], client.residual["head"])
    assert_same(client.residual["head"], weight - decoded["head"])
    assert list(client.state_dict()["residual"]) == ["embed"]
    with pytest.raises(fc.SpecMismatch, match="tied"):
        client.encode({"embed": weight, "head": weight.copy()})


@pytest.mark.parametrize("values", [{}, [], [np.zeros((0, 3), np.float32)], {"n": np.array(3)}])
def test_updates_without_floats(values):
    client = fc.ErrorFeedback("topk(0.1) | int8")
    for _ in range(2):
        decoded = fc.decode(client.encode(values))
        client.accept()
        assert type(decoded) is type(values)
    client.load_state_dict(client.state_dict())


def test_structures_of_the_residual():
    for values in (
        np.ones(3, np.float32),
        [np.ones(3, np.float32), np.array(1.5)],
        {"a": np.ones(1, np.float16)},
    ):
        client = fc.ErrorFeedback("topk(0.5)")
        client.encode(values)
        client.reject()
        expected = (
            wide(values)
            if isinstance(values, np.ndarray)
            else [wide(x) for x in values]
            if isinstance(values, list)
            else {name: wide(x) for name, x in values.items()}
        )
        assert_same(client.residual, expected)


# --- random draws -----------------------------------------------------------------------------------------------------


def test_no_two_rounds_draw_alike_by_default():
    client = fc.ErrorFeedback("randomk(0.1)")
    kept = set()
    for _ in range(5):
        decoded = fc.decode(client.encode(np.ones(1000, np.float32)))
        client.reject(drop=True)
        kept.add(tuple(np.flatnonzero(decoded)))
    assert len(kept) == 5


def test_the_default_seed_is_the_sequence_number_and_another_one_wins():
    codec = fc.parse("randomk(0.1) | kbit(4, stochastic=True)")
    client, values = fc.ErrorFeedback(codec), np.linspace(-1, 1, 500, dtype=np.float32)
    for number in range(3):
        assert client.sequence == number
        assert client.encode(values) == codec.encode(values, seed=number)
        client.reject(drop=True)
    assert client.encode(values, seed=7) == codec.encode(values, seed=7)


# --- state ------------------------------------------------------------------------------------------------------------


def assert_states(first, second):
    assert first.keys() == second.keys()
    for key in first:
        if isinstance(first[key], dict):
            assert_same(first[key], second[key])
        else:
            assert first[key] == second[key]


def through_torch(state):
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_torch_weights_only(state):
    torch = pytest.importorskip("torch")

    def convert(value):
        if isinstance(value, dict):
            return {name: torch.tensor(x) for name, x in value.items()}
        return list(value) if isinstance(value, bytes) else value

    file = io.BytesIO()
    torch.save({key: convert(value) for key, value in state.items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_savez(state):
    flat = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": x for name, x in value.items()}
        elif isinstance(value, bytes):
            flat[key] = np.frombuffer(value, np.uint8)
        elif value is not None:
            flat[key] = np.array(value)
    file = io.BytesIO()
    np.savez(file, **flat)
    file.seek(0)
    loaded = dict.fromkeys(state)
    with np.load(file, allow_pickle=False) as archive:
        for key in archive.files:
            if "/" in key:
                kind, name = key.split("/", 1)
                loaded[kind] = (loaded[kind] or {}) | {name: archive[key]}
            else:
                loaded[key] = archive[key]
    return loaded


WAYS = {
    "as it is": lambda state: state,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch,
    "torch.save, weights only": through_torch_weights_only,
    "np.savez": through_savez,
}


@pytest.mark.parametrize("settled", [None, "accept", "reject", "pending"])
@pytest.mark.parametrize("way", WAYS)
def test_state_dict_round_trip(way, settled):
    text = "topk(0.2) | int8(stochastic=True)"
    client = fc.ErrorFeedback(text)
    if settled is None and "savez" not in way and "weights" not in way:
        fresh = fc.ErrorFeedback(text)
        fresh.load_state_dict(WAYS[way](client.state_dict()))
        assert_states(fresh.state_dict(), client.state_dict())
    for number in range(2):
        client.encode(update(number, np.float64 if number < 0 else np.float32))
        client.accept()
    client.encode(update(2))
    if settled in ("accept", "reject"):
        getattr(client, settled)()
    twin = fc.ErrorFeedback(text)
    twin.load_state_dict(WAYS[way](client.state_dict()))
    assert_states(twin.state_dict(), client.state_dict())
    assert twin.sequence == client.sequence == 3
    assert twin.pending == client.pending == (settled in (None, "pending"))
    for one in (client, twin):
        if one.pending:
            one.accept()
    assert client.encode(update(3)) == twin.encode(update(3))
    client.accept()
    twin.accept()
    assert_same(client.residual, twin.residual)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_pickle_and_deepcopy_are_independent(clone, dtype):
    client = fc.ErrorFeedback("topk(0.2) | int8")
    client.encode(update(0, dtype))
    twin = clone(client)
    client.accept()
    assert twin.pending
    assert twin.residual is None
    twin.accept()
    assert_same(twin.residual, client.residual)
    assert twin.encode(update(1, dtype)) == client.encode(update(1, dtype))


def test_a_loaded_state_does_not_follow_its_source():
    client = fc.ErrorFeedback("topk(0.5)")
    client.encode(np.ones(4, np.float32))
    client.accept()
    state = copy.deepcopy(client.state_dict())
    state["residual"] = {name: x.copy() for name, x in state["residual"].items()}
    twin = fc.ErrorFeedback("topk(0.5)")
    twin.load_state_dict(state)
    state["residual"]["array"][:] = 7
    assert_same(twin.residual, client.residual)


def test_sequence_counts_the_payloads():
    client = fc.ErrorFeedback("int8")
    for number, settle in enumerate(
        [client.accept, client.reject, lambda: client.reject(drop=True)]
    ):
        assert client.sequence == number
        client.encode(update(number))
        assert client.sequence == number + 1
        settle()
        assert client.sequence == number + 1
    assert client.state_dict()["sequence"] == 3


def amid(monkeypatch, module, name, other):
    """Run `other` in a thread after the next call of a function, and go on when it is done or waits."""
    original, threads = getattr(module, name), []

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        if not threads:
            threads.append(threading.Thread(target=other))
            threads[0].start()
            threads[0].join(0.2)
        return result

    monkeypatch.setattr(module, name, call)
    return threads


def test_threads_that_encode_at_once_lose_nothing(monkeypatch):
    client, refused = fc.ErrorFeedback("topk(0.5)"), []
    one, two = np.array([1, 2], np.float32), np.array([3, 4], np.float32)

    def other():
        try:
            client.encode(two)
        except RuntimeError as error:
            refused.append(str(error))

    threads = amid(monkeypatch, pipeline, "encode", other)
    payload = client.encode(one)
    threads[0].join()
    assert ["pending" in message for message in refused] == [True]
    client.accept()
    assert_same(fc.decode(payload) + client.residual, one)


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, fc.ErrorFeedback.state_dict])
def test_what_is_taken_while_a_thread_settles_is_whole(monkeypatch, take):
    client, taken = fc.ErrorFeedback("topk(0.5)"), []
    client.encode(np.array([1, 2], np.float32))
    threads = amid(monkeypatch, pipeline, "accumulate", lambda: taken.append(take(client)))
    client.accept()
    threads[0].join()
    twin = taken[0]
    if isinstance(twin, dict):
        twin = fc.ErrorFeedback("topk(0.5)")
        twin.load_state_dict(taken[0])
    assert not twin.pending
    assert_same(twin.residual, client.residual)


def test_the_sequence_starts_again_after_2_to_the_64():
    client = fc.ErrorFeedback("raw")
    client.load_state_dict(client.state_dict() | {"sequence": 2**64 - 1})
    client.encode(np.ones(1, np.float32))
    client.accept()
    client.load_state_dict(client.state_dict())
    assert client.sequence == 0


class NoArray:
    def __array__(self, *arguments, **named):
        raise RuntimeError("not today")


def spoiled(state, **changes):
    return state | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version"),
        ({"codec": "int8"}, "codec"),
        ({"spec": b"\x07"}, "structure"),
        ({"spec": "text"}, "spec is 'text'"),
        ({"spec": None}, "not that of the spec"),
        ({"sequence": -1}, "sequence"),
        ({"sequence": "3"}, "sequence"),
        ({"sequence": 1 << 64}, "sequence"),
        ({"residual": [1, 2]}, "residual"),
        ({"compensated": {}}, "compensated of 'w1'"),
        ({"residual": {}}, "residual of 'w1'"),
        ({"payload": None}, "go together"),
        ({"payload": b"no payload"}, "payload: "),
        ({"payload": 5}, "payload is 5"),
        ({"payload": [1, 256]}, "payload is"),
        ({"payload": np.zeros(3)}, "payload is"),
        ({"payload": NoArray()}, "payload is no array: not today"),
        ({"sequence": np.float64(3)}, "sequence"),
        ({"compensated": None}, "go together"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(changes, message):
    client = fc.ErrorFeedback("topk(0.2) | int8")
    client.encode(update(0))
    client.accept()
    client.encode(update(1))
    before = client.state_dict()
    bad = [before | changes]
    key = next(iter(changes))
    if key == "residual":
        bad += [
            before | {"residual": before["residual"] | {"w1": before["residual"]["w1"].T}},
            before
            | {
                "residual": before["residual"] | {"w1": before["residual"]["w1"].astype(np.float64)}
            },
            before | {"residual": before["residual"] | {"w1": before["residual"]["w1"] * np.nan}},
            before | {"residual": before["residual"] | {"w1": NoArray()}},
        ]
    for state in bad:
        with pytest.raises(ValueError, match=message):
            client.load_state_dict(state)
        assert_states(client.state_dict(), before)
    for name in before:
        with pytest.raises(ValueError, match=name):
            client.load_state_dict({k: v for k, v in before.items() if k != name})
    with pytest.raises(TypeError, match="state is a list"):
        client.load_state_dict(list(before.items()))
    assert_states(client.state_dict(), before)


# --- what fails or is interrupted while it is settled ----------------------------------------------


@pytest.mark.parametrize("error", [fc.DecodeError("no memory"), KeyboardInterrupt()])
def test_an_accept_that_fails_leaves_the_payload_pending(monkeypatch, error):
    client, update = fc.ErrorFeedback("topk(0.5)"), np.array([1, 2], np.float32)

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        payload = client.encode(update)
        patch.setattr(pipeline, "accumulate", fails)
        with pytest.raises(type(error)):
            client.accept()
    assert client.pending
    client.accept()
    assert_same(fc.decode(payload) + client.residual, update)


def test_an_accept_that_is_interrupted_once_it_has_subtracted_is_done(monkeypatch):
    client, update = fc.ErrorFeedback("topk(0.5)"), np.array([1, 2], np.float32)
    accumulate = pipeline.accumulate

    def interrupted(*arguments):
        accumulate(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        payload = client.encode(update)
        patch.setattr(pipeline, "accumulate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.accept()
    assert not client.pending
    assert_same(fc.decode(payload) + client.residual, update)
