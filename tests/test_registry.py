"""Third parties' stages: what they may do, what they may get wrong, and what a stranger can do to them."""

import itertools
import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import registry
from fedcodec.testing import check_codec, hostile_payloads, same, seal

UPDATE = {"w": np.linspace(-3, 3, 200, dtype=np.float32).reshape(20, 10), "n": np.arange(4)}


@fc.register(0xA0)
@dataclass(frozen=True, repr=False)
class Halves(fc.Quantizer):
    """Multiples of a step, as int16."""

    step: float = 0.5
    name = "halves"

    def wire(self):
        return 0xA0, np.float32(self.step).tobytes()

    @classmethod
    def from_wire(cls, parameters):
        (step,) = np.frombuffer(parameters, "<f4")
        return cls(step)

    def encode_values(self, values, seed):
        limit = np.float32(32767)
        return (
            np.clip(np.rint(values / np.float32(self.step)), -limit, limit).astype("<i2").tobytes()
        )

    def decode_values(self, data, n):
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(self.step)


@fc.register(0xA1)
@dataclass(frozen=True, repr=False)
class Deflate(fc.Lossless):
    name = "deflate_test"

    def compress(self, data):
        return zlib.compress(data)

    def decompress(self, data, size):
        return zlib.decompressobj().decompress(data, size)


@fc.register(0xA2)
@dataclass(frozen=True, repr=False)
class Liar(fc.Quantizer):
    """Returns what it is told to."""

    answer: object = None
    name = "liar"

    def encode_values(self, values, seed):
        return b"x"

    def decode_values(self, data, n):
        return LIES[data](n) if data in LIES else np.zeros(n, np.float32)


@fc.register(0xA3)
@dataclass(frozen=True, repr=False)
class LosslessLiar(fc.Lossless):
    name = "lossless_liar"

    def compress(self, data):
        return PACKED[0](data)

    def decompress(self, data, size):
        return UNPACKED[0](data, size)


def _raise(error):
    raise error


LIES = {}
PACKED = {0: lambda data: data[:1]}
UNPACKED = {0: lambda data, size: bytes(size)}


def step_bound(values):
    return [np.maximum(0.25, np.abs(v) - 32767 * 0.5) + np.abs(v) * 2.0**-7 for v in values]


@pytest.mark.parametrize("text", ["halves", "topk(0.2) | halves", "halves | zstd"])
def test_a_third_partys_quantizer_keeps_the_contract(text):
    def bound(values):
        return [
            np.maximum(b, np.abs(v) if "topk" in text else 0)
            for b, v in zip(step_bound(values), values, strict=True)
        ]

    check_codec(fc.parse(text), bound=bound, examples=10)


@pytest.mark.parametrize("text", ["raw | deflate_test", "topk(0.2) | int8 | deflate_test"])
def test_a_third_partys_lossless_stage_keeps_the_contract(text):
    check_codec(fc.parse(text), examples=10)


def test_check_codec_wants_the_bound_of_a_quantizer_that_it_does_not_know():
    with pytest.raises(ValueError, match=r"pass bound=.*halves"):
        check_codec(Halves())


def test_check_codec_finds_a_bound_that_does_not_hold():
    with pytest.raises(AssertionError, match="is allowed"):
        check_codec(Halves(), bound=lambda values: [0.1 for _ in values], updates=st.just(UPDATE))


def test_parameters_travel_only_where_the_class_sends_them():
    update = np.arange(8, dtype=np.float32)
    assert fc.inspect(Halves(0.25).encode(update)).codec == "halves(step=0.25)"
    assert fc.inspect(Deflate().encode(update)).codec == "deflate_test"
    assert Deflate().wire() == (0xA1, b"")


def test_parameters_for_a_stage_that_has_none_are_refused():
    payload = Deflate().encode(np.zeros(99, np.float32))
    stage = b"\x01\xa1\x00"
    assert payload.count(stage) == 1
    with pytest.raises(fc.DecodeError, match="has no parameters"):
        fc.decode(seal(payload[:-4].replace(stage, b"\x01\xa1\x01\x00")))


@pytest.mark.parametrize("parameters", [b"", b"\0\0", b"\0" * 8])
def test_parameters_that_from_wire_refuses_are_a_decode_error(parameters):
    payload = Halves().encode(np.zeros(99, np.float32))
    stage = b"\x01\xa0\x04" + np.float32(0.5).tobytes()
    assert payload.count(stage) == 1
    with pytest.raises(fc.DecodeError, match="halves"):
        fc.decode(seal(payload[:-4].replace(stage, bytes([1, 0xA0, len(parameters)]) + parameters)))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda n: np.full(n, np.nan, np.float32), "not finite"),
        (lambda n: np.full(n, -np.inf, np.float32), "not finite"),
        (lambda n: np.zeros(n + 1, np.float32), "returned no"),
        (lambda n: np.zeros(0, np.float32), "returned no"),
        (lambda n: np.zeros((n, 1), np.float32), "returned no"),
        (lambda n: np.zeros(n), "returned no"),
        (lambda n: [0.0] * n, "returned no"),
        (lambda n: None, "returned no"),
        (lambda n: _raise(ZeroDivisionError("oops")), "oops"),
        (lambda n: _raise(MemoryError()), "refuses"),
        (lambda n: _raise(RecursionError()), "refuses"),
    ],
)
def test_what_a_quantizer_gets_wrong_is_a_decode_error(lie, message):
    payload = Liar().encode(UPDATE)
    out = {"w": np.full((20, 10), 7, np.float32), "n": np.full(4, 7)}
    LIES[b"x"] = lie
    try:
        with pytest.raises(fc.DecodeError, match=message):
            fc.decode(payload)
        with pytest.raises(fc.DecodeError, match=message):
            fc.decode(payload, out=out)
        server = fc.Aggregator(UPDATE)
        with pytest.raises(fc.DecodeError, match=message):
            server.add(payload)
        with pytest.raises(fc.DecodeError, match=message):
            fc.Residual(Liar(), fc.Raw()).encode(
                UPDATE
            )  # the second codes what the first decodes to
    finally:
        LIES.clear()
    assert all((array == 7).all() for array in out.values())
    assert server.count == 0


@pytest.mark.parametrize(
    "lie",
    [
        lambda data, size: data,
        lambda data, size: bytes(size + 1),
        lambda data, size: bytes(size - 1),
        lambda data, size: bytearray(size),
        lambda data, size: "x" * size,
        lambda data, size: None,
        lambda data, size: _raise(KeyError("k")),
        lambda data, size: _raise(MemoryError()),
    ],
)
def test_what_a_lossless_stage_gets_wrong_is_a_decode_error(lie, monkeypatch):
    codec = fc.parse("raw | lossless_liar")
    payload = codec.encode(np.zeros(99, np.float32))
    assert same(fc.decode(payload), np.zeros(99, np.float32))
    monkeypatch.setitem(UNPACKED, 0, lie)
    with pytest.raises(fc.DecodeError, match="lossless_liar"):
        fc.decode(payload)


@pytest.mark.parametrize("packed", [lambda data: b"", lambda data: data + b"!", lambda data: data])
def test_what_a_lossless_stage_does_not_make_smaller_travels_as_it_is(packed, monkeypatch):
    monkeypatch.setitem(PACKED, 0, packed)
    update = np.linspace(0, 1, 99, dtype=np.float32)
    assert same(fc.decode(fc.parse("raw | lossless_liar").encode(update)), update)


@given(data=st.data())
def test_hostile_bytes_reach_third_parties_and_stay_decode_errors(data):
    text = data.draw(
        st.sampled_from(["halves", "topk(0.1) | halves | deflate_test", "raw | deflate_test"])
    )
    payload = fc.parse(text).encode(UPDATE)
    try:
        restored = fc.decode(data.draw(hostile_payloads(payload)), limits=fc.Limits(1 << 20))
    except fc.DecodeError:
        return
    assert restored is not None


@fc.register(0xA4)
@dataclass(frozen=True, repr=False)
class Changeling(fc.Lossless):
    """What it reads from the wire is no such stage."""

    name = "changeling"

    @classmethod
    def from_wire(cls, parameters):
        return FOUND[0]

    def compress(self, data):
        return data

    def decompress(self, data, size):
        return data


FOUND = {0: None}


@pytest.mark.parametrize("found", [None, 5, "changeling", fc.Zstd(), Halves(), Changeling])
def test_a_from_wire_that_gives_something_else_is_a_decode_error(found, monkeypatch):
    payload = (fc.Raw() | Changeling()).encode(np.zeros(9, np.float32))
    monkeypatch.setitem(FOUND, 0, found)
    for work in (fc.decode, fc.inspect):
        with pytest.raises(fc.DecodeError, match="changeling"):
            work(payload)
    monkeypatch.setitem(FOUND, 0, Changeling())
    assert same(fc.decode(payload), np.zeros(9, np.float32))


def test_an_unknown_id_names_itself():
    payload = Halves().encode(np.zeros(3, np.float32)).replace(b"\x01\xa0\x04", b"\x01\xbf\x04")
    with pytest.raises(fc.DecodeError, match=r"unknown stage 0xbf; is its codec registered\?"):
        fc.decode(seal(payload[:-4]))


def stage(name="fresh", base=fc.Lossless):
    made = type(
        "Fresh",
        (base,),
        {
            "name": name,
            "compress": lambda self, data: data,
            "decompress": lambda self, data, size: data,
        },
    )
    return dataclass(frozen=True, repr=False)(made)


@pytest.mark.parametrize("wire_id", [0, 0x20, 0x50, 0x7F, 0xC0, 0xFF, 0x100, -1])
def test_ids_of_this_library_and_beyond_are_refused(wire_id):
    with pytest.raises(ValueError, match="0x80 to 0xbf"):
        fc.register(wire_id)(stage())


def test_what_is_taken_is_refused():
    with pytest.raises(ValueError, match="taken"):
        fc.register(0xA0)(stage())
    with pytest.raises(ValueError, match="taken"):
        fc.register(0xB0)(stage("halves"))
    with pytest.raises(ValueError, match="taken"):
        fc.register(0xB0)(stage("topk"))
    assert registry.wire_reader(0xB0) is None
    assert "fresh" not in registry.stage_names()


@pytest.mark.parametrize("name", ["rules", "True", "None", "two words", "", "1st", None, 5])
def test_names_that_text_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match="cannot stand in a codec's text"):
        fc.register(0xB0)(stage(name))


def test_what_is_no_stage_is_refused():
    with pytest.raises(TypeError, match="neither a Quantizer nor a Lossless"):
        fc.register(0xB0)(fc.TopK)
    with pytest.raises(TypeError, match="not a frozen dataclass"):
        fc.register(0xB0)(type("Plain", (fc.Lossless,), {"name": "plain"}))
    with pytest.raises(TypeError, match="not a frozen dataclass"):
        fc.register(0xB0)(dataclass(type("Thawed", (fc.Lossless,), {"name": "thawed"})))


def test_a_stage_that_is_not_registered_says_so():
    with pytest.raises(ValueError, match=r"fedcodec\.register"):
        stage()().encode(np.zeros(3, np.float32))


def test_every_stage_says_what_it_promises():
    assert Halves().determinism == "backend"
    assert Deflate().determinism == "version"
    assert (fc.TopK(0.1) | Halves() | Deflate()).determinism == "version"
    for one, other in itertools.product([fc.TopK(0.1), fc.RandomK(0.1)], [Halves(), fc.Int8()]):
        assert (one | other).determinism == "backend"


@fc.register(0xA8)
@dataclass(frozen=True, repr=False)
class Level(fc.Lossless):
    name = "level"
    level: int = field(default=1, compare=False)

    def compress(self, data):
        return zlib.compress(data, self.level)

    def decompress(self, data, size):
        return zlib.decompressobj().decompress(data, size)


def test_codecs_that_compare_equal_stay_themselves():
    low, high = Level(1), Level(9)
    assert low == high
    update = np.tile(np.arange(100, dtype=np.float32), 50)
    sizes = [len(codec.encode(update)) for codec in (low, high, low, high)]
    assert sizes[0] == sizes[2] > sizes[1] == sizes[3]
