"""What goes in and comes out: arrays of every framework, dtype, layout and structure."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, UserDict

import ml_dtypes
import numpy as np
import pytest
from codec_cases import BFLOAT16, CODECS, assert_same, bits, update
from numpy.lib.stride_tricks import as_strided

import fedcodec as fc
from fedcodec import arrays

RAW = fc.Raw()
EVERY_DTYPE = [
    "float32", "float16", "float64", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool",
]  # fmt: skip


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


def lossless(value, **arguments):
    return fc.decode(RAW.encode(value), **arguments)


# --- NumPy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*EVERY_DTYPE, "bfloat16"])
def test_every_dtype_round_trips_bit_for_bit(dtype):
    words = np.arange(256, dtype=np.uint8)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    if kind == np.bool_:
        values = words.astype(bool)
    elif kind.kind in "iu":
        limits = np.iinfo(kind)
        values = np.array([limits.min, limits.max, 0, 1, limits.max - 1], kind)
    else:
        finfo = ml_dtypes.finfo(kind)
        values = np.array(
            [0.0, -0.0, 1, -1.5, finfo.max, finfo.min, finfo.tiny, finfo.smallest_subnormal], kind
        )
    assert_same(
        lossless({"x": values, "y": values[:0], "z": values[1]}),
        {"x": values, "y": values[:0], "z": values[1]},
    )


LAYOUTS = {
    "strided": lambda x: x[::2, ::3],
    "negative strides": lambda x: x[::-1, ::-1],
    "transposed": lambda x: x.T,
    "Fortran": np.asfortranarray,
    "broadcast": lambda x: np.broadcast_to(x[0], (5, x.shape[1])),
    "overlapping windows": lambda x: as_strided(x, (4, 4), x.strides),
    "0-d of an array": lambda x: x[2, 3, ...],
    "one element": lambda x: x[:1, :1],
    "no element": lambda x: x[:0],
    "five dimensions": lambda x: x.reshape(2, 1, 3, 2, -1).swapaxes(0, 3),
    "matrix": np.asmatrix,
    "offset by a byte": lambda x: (
        np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    ),
    "memory map": lambda x: x.view(np.memmap),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, BFLOAT16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_as_its_contiguous_copy(layout, dtype):
    whole = (np.arange(12 * 15) - 90).reshape(12, 15).astype(dtype)
    view = LAYOUTS[layout](whole)
    plain = np.array(view, order="C", copy=True)
    before = bits(whole)
    for text in ("raw", "topk(0.3)", "int8(axis=1)", "topk(0.4) | int8"):
        codec = fc.parse(text)
        assert codec.encode({"x": view}) == codec.encode({"x": plain})
    assert_same(lossless(view), plain)
    assert bits(whole) == before


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "u8"])
def test_big_endian_arrays_are_read_by_value(dtype):
    native = np.array([1, 100, 0, 7], dtype)
    foreign = native.astype(">" + dtype)
    assert RAW.encode(foreign) == RAW.encode(native)
    decoded = lossless(foreign)
    assert decoded.dtype.isnative
    assert_same(decoded, native)


def test_read_only_arrays_are_read():
    values = np.ones(5, np.float32)
    values.flags.writeable = False
    assert_same(lossless(values), values)
    assert_same(lossless(np.frombuffer(b"\0\0\x80\x3f", np.float32)), np.array([1], np.float32))


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_0_d_arrays_and_scalars(dtype):
    scalar = np.dtype(dtype).type(1)
    assert_same(lossless(scalar), np.array(1, dtype))
    assert_same(lossless(np.array(1, dtype)), np.array(1, dtype))
    assert_same(lossless([scalar, scalar])[1], np.array(1, dtype))
    assert lossless(scalar).shape == ()


def test_scalars_of_equal_value_are_not_tied():
    spec = fc.Spec.of([np.float32(1)] * 3 + [np.array([1], np.float32) for _ in range(20)])
    assert all(tensor.tied_to is None for tensor in spec.tensors[3:])


def test_decoded_arrays_are_writable_and_their_own():
    payload = RAW.encode({"x": np.ones(3, np.float32), "y": np.ones(3, np.int32)})
    first, second = fc.decode(payload), fc.decode(payload)
    for x in first.values():
        x[:] = 5
    assert_same(second, fc.decode(payload))


def test_bfloat16_without_ml_dtypes_is_exact_float32_and_the_spec_still_says_bfloat16(monkeypatch):
    values = np.array([1.5, -0.0, 3.14, 1e-40, 3e38], BFLOAT16)
    payload = RAW.encode({"x": values})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    decoded = fc.decode(payload)["x"]
    monkeypatch.undo()
    assert decoded.dtype == np.float32
    assert_same(decoded, values.astype(np.float32))
    assert fc.inspect(payload).spec.tensors[0].dtype == "bfloat16"


def test_import_loads_no_framework():
    code = (
        "import sys, numpy as np, fedcodec as fc\n"
        "fc.decode(fc.parse('topk(0.5) | int8').encode({'x': np.ones(9, np.float32)}))\n"
        "found = {'torch', 'jax', 'cupy', 'ml_dtypes', 'scipy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- structures -------------------------------------------------------------------------------------------------------


class Named(dict):
    pass


@pytest.mark.parametrize("make", [dict, OrderedDict, Named, UserDict])
def test_mappings_decode_to_a_dict_in_the_same_order(make):
    values = make([("b", np.ones(2, np.float32)), ("a", np.zeros(1)), ("", np.array(3))])
    decoded = lossless(values)
    assert type(decoded) is dict
    assert_same(decoded, dict(values))


def test_lists_tuples_and_single_arrays():
    arrays = [np.ones(2, np.float32), np.array(3)]
    assert_same(lossless(tuple(arrays)), arrays)
    assert type(lossless(tuple(arrays))) is list
    assert isinstance(lossless(arrays[0]), np.ndarray)
    assert lossless({}) == {}
    assert lossless([]) == []


def test_names_of_any_text():
    values = {name: np.ones(1, np.float32) for name in ("a.b", "ü", "日本", "a\0b", "x" * 500, " ")}
    assert_same(lossless(values), values)


def test_a_layout_that_came_before_hides_no_change():
    x, y = np.arange(4, dtype=np.float32), np.arange(4, 8, dtype=np.float32)
    updates = [
        x, [x], {"array": x}, {"0": x}, [x, y], {"a": x, "b": y}, {"b": x, "a": y}, {"a": y, "b": x},
        {"a": x, "b": x}, {"a": x[:3], "b": x[1:]}, {"a": x[:2], "b": x[2:]}, {"a": x.reshape(2, 2), "b": y},
        {"a": x.astype(">f4"), "b": y}, {"a": x[::-1], "b": y}, {"a": x.view(np.int32), "b": y},
        {"a": x.view(np.uint32), "b": y}, {"a": x > 1, "b": y}, {"a": x.astype(np.float16), "b": y},
        {"a": x.astype(BFLOAT16), "b": y}, {"a": x[0], "b": y}, {"a": x[:0], "b": x[:0]},
    ]  # fmt: skip
    before = fc.ops.active()
    fc.ops.use("reference")
    try:
        expected = [RAW.encode(update) for update in updates]
    finally:
        fc.ops.use(before)
    for _ in range(2):
        assert [RAW.encode(update) for update in updates] == expected


def test_ties_are_the_same_memory_and_nothing_less():
    x = np.arange(6, dtype=np.float32)
    payload = RAW.encode(
        {"a": x, "b": x, "c": x.copy(), "d": x[:3], "e": x.reshape(2, 3), "f": x.view(np.int32)}
    )
    assert [t.tied_to for t in fc.inspect(payload).spec.tensors] == [
        None,
        0,
        None,
        None,
        None,
        None,
    ]
    decoded = fc.decode(payload)
    assert decoded["a"] is decoded["b"]
    assert decoded["a"] is not decoded["c"]
    with_tie = len(RAW.encode({"a": x, "b": x}))
    assert len(RAW.encode({"a": x, "b": x.copy()})) >= with_tie + x.nbytes
    # A transposed square is another tensor though it starts at the same byte.
    square = np.arange(4, dtype=np.float32).reshape(2, 2)
    assert_same(lossless([square, square.T]), [square, np.array(square.T, order="C")])


UNSUPPORTED = {
    "complex": np.ones(2, np.complex64),
    "object": np.array([1, None], object),
    "text": np.array(["a"]),
    "bytes": np.array([b"a"]),
    "date": np.array(["2020-01-01"], "M8[D]"),
    "record": np.zeros(2, [("a", "f4")]),
    "long double": np.ones(2, np.longdouble),
    "float8": np.ones(2, ml_dtypes.float8_e4m3fn),
    "int4": np.ones(2, ml_dtypes.int4),
    "str": "weights",
    "float": 1.5,
    "int": 1,
    "None": None,
    "list": [1.0, 2.0],
    "dict": {"a": np.ones(1, np.float32)},
    "bytes object": b"abc",
    "set": {1},
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_no_array_is_a_type_error_that_names_the_tensor(what):
    good = np.ones(2, np.float32)
    with pytest.raises(TypeError, match=r"'layer\.weight'"):
        RAW.encode({"good": good, "layer.weight": UNSUPPORTED[what]})
    with pytest.raises(TypeError, match="'1'"):
        RAW.encode([good, UNSUPPORTED[what]])
    with pytest.raises(TypeError, match=r"'layer\.weight'"):
        fc.ErrorFeedback(RAW).encode({"layer.weight": UNSUPPORTED[what]})
    with pytest.raises(TypeError, match=r"'layer\.weight'"):
        fc.Aggregator({"layer.weight": UNSUPPORTED[what]})


def test_masked_elements_are_refused_and_unmasked_arrays_are_read():
    values = np.ma.MaskedArray(np.arange(3, dtype=np.float32), [False, True, False])
    for masked in (values, values[1:2], np.ma.masked):
        with pytest.raises(TypeError, match="'x' has masked elements"):
            RAW.encode({"x": masked})
    values.mask = False
    assert_same(lossless(values), np.arange(3, dtype=np.float32))
    out = np.ma.MaskedArray(np.zeros(3, np.float32), [True] * 3)
    with pytest.raises(TypeError, match="masked"):
        fc.decode(RAW.encode(values), out=out)


@pytest.mark.parametrize("text", ["raw", "int8 | zstd", 'rules(int8; "n" = raw)'])
def test_any_byte_but_zero_is_true(isa, text):
    words = np.array([0, 1, 2, 128, 255] * 30, np.uint8)
    odd, plain = words.view(np.bool_), words != 0
    codec = fc.parse(text)
    assert codec.encode({"n": odd}) == codec.encode({"n": plain})
    assert fc.ErrorFeedback(codec).encode({"n": odd}) == codec.encode({"n": plain})
    assert fc.digest({"n": odd}) == fc.digest({"n": plain})
    assert fc.Mask.of(odd) == fc.Mask.of(plain)
    out = words[::-1].copy().view(np.bool_)
    assert_same(fc.decode(codec.encode({"n": odd}), out={"n": out}), {"n": plain})


def test_a_mask_is_tied_where_the_update_is():
    shared = fc.Shared()
    chosen, other = np.array([True, False]), np.array([False, True])
    weight = np.array([1, 2], np.float32)
    tied = {"a": weight, "b": weight}
    untied = {"a": weight, "b": weight.copy()}
    for values, mask in (
        (tied, {"a": chosen, "b": chosen}),
        (tied, {"a": chosen}),
        (untied, {"a": chosen, "b": other}),
    ):
        codec = fc.Mask.of(mask)
        codec.add_shared(shared)
        decoded = fc.decode(codec.encode(values), shared=shared)
        assert_same(decoded, {k: values[k] * mask.get(k, chosen) for k in values})
    for values, mask, found, wanted in (
        (tied, {"a": chosen, "b": other}, 4, 2),
        (untied, {"a": chosen, "b": chosen}, 2, 4),
    ):
        message = f"mask has {found} values, the float tensors {wanted}, tied ones counted once"
        with pytest.raises(ValueError, match=message):
            fc.Mask.of(mask).encode(values)


@pytest.mark.parametrize("name", ["limits", "shared"])
@pytest.mark.parametrize("value", [{}, [], 5, "text", object()])
def test_arguments_of_another_type_are_named(name, value):
    with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}"):
        fc.decode(RAW.encode(np.ones(1)), **{name: value})


def test_the_framework_is_checked_before_the_payload(monkeypatch):
    server = fc.Aggregator(like=np.ones(1, np.float32))
    server.add(RAW.encode(np.ones(1, np.float32)))
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not installed
    for framework, error in (("fortran", ValueError), ("jax", fc.BackendError)):
        with pytest.raises(error, match=framework):
            fc.decode(b"no payload", framework=framework)
        with pytest.raises(error, match=framework):
            server.mean(framework)


@pytest.mark.parametrize(("bits", "n"), [(b"\x01", 1000), (b"\x01", 0), (b"", 1), (b"\0\0", 8)])
def test_a_mask_whose_bits_do_not_fit_its_size_is_refused_when_added(bits, n):
    shared = fc.Shared()
    with pytest.raises(ValueError, match=f"not those of {n} positions"):
        shared.add_mask(fc.MaskBits(bits, n))
    assert len(shared) == 0


@pytest.mark.parametrize("name", ["max_bytes", "max_tensors"])
def test_limits_are_integers_and_not_negative(name):
    with pytest.raises(TypeError, match=name):
        fc.Limits(**{name: "many"})
    with pytest.raises(ValueError, match=name):
        fc.Limits(**{name: -1})


def test_names_must_be_text():
    with pytest.raises(TypeError, match="int"):
        RAW.encode({1: np.ones(1, np.float32)})


def test_too_many_dimensions_are_refused():
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("NumPy has no more than 32 dimensions")
    with pytest.raises(TypeError, match="'deep' has 33 dimensions"):
        RAW.encode({"deep": np.ones((1,) * 33, np.float32)})
    values = np.ones((1,) * 32, np.float32)
    assert_same(lossless(values), values)


# --- decode(out=...) --------------------------------------------------------------------------------------------------


def test_out_is_filled_in_place_and_returned():
    values = update(0) | {"half": np.ones(3, np.float16), "brain": np.ones(3, BFLOAT16)}
    out = {name: np.empty_like(x) for name, x in values.items()}
    own = dict(out)
    assert fc.decode(RAW.encode(values), out=out) is out
    assert all(out[name] is own[name] for name in own)
    assert_same(out, values)
    array = np.full(3, 7, np.float32)
    assert fc.decode(fc.TopK(0.3).encode(np.array([1, 5, 2], np.float32)), out=array) is array
    assert array.tolist() == [0, 5, 0]  # what is not kept is written too


@pytest.mark.parametrize("text", CODECS)
def test_out_equals_a_fresh_decode(text):
    values = update(3)
    payload = fc.parse(text).encode(values, seed=1)
    out = {name: np.ones_like(x) for name, x in values.items()}
    assert_same(fc.decode(payload, out=out), fc.decode(payload))


def test_out_may_be_part_of_something_larger():
    whole = np.zeros((3, 4), np.float32)
    fc.decode(RAW.encode(np.ones(4, np.float32)), out=whole[1])
    assert whole.tolist() == [[0] * 4, [1] * 4, [0] * 4]
    zero_d = np.zeros((), np.float64)
    fc.decode(RAW.encode(np.array(2.5)), out=zero_d)
    assert zero_d == 2.5


def test_out_names_the_tensors_of_a_payload_by_reference():
    values = update(0)
    out = {name: np.empty_like(x) for name, x in values.items()}
    fc.decode(RAW.encode(values, framing="reference"), out=out)
    assert_same(out, values)


def test_a_tied_out():
    x = np.arange(3, dtype=np.float32)
    out = np.zeros(3, np.float32)
    fc.decode(RAW.encode({"a": x, "b": x}), out={"a": out, "b": out})
    assert_same(out, x)
    with pytest.raises(fc.SpecMismatch, match="tied"):
        fc.decode(RAW.encode({"a": x, "b": x}), out={"a": out, "b": out.copy()})
    with pytest.raises(fc.SpecMismatch, match="tied"):
        fc.decode(RAW.encode({"a": x, "b": x.copy()}), out={"a": out, "b": out})


def read_only(x):
    x.flags.writeable = False
    return x


NOT_TO_BE_FILLED = {
    "read-only": read_only(np.zeros((2, 2), np.float32)),
    "strided": np.zeros((2, 4), np.float32)[:, ::2],
    "Fortran": np.zeros((2, 2), np.float32, order="F"),
    "big-endian": np.zeros((2, 2), ">f4"),
    "bytes": np.frombuffer(bytes(16), np.float32).reshape(2, 2),
    "offset by a byte": np.zeros(17, np.uint8)[1:].view(np.float32).reshape(2, 2),
}


@pytest.mark.parametrize("what", NOT_TO_BE_FILLED)
def test_out_that_cannot_be_filled_in_place_is_a_value_error(what):
    bad = NOT_TO_BE_FILLED[what]
    first = np.full(2, 9, np.float32)
    payload = RAW.encode({"first": np.ones(2, np.float32), "x": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="'x'"):
        fc.decode(payload, out={"first": first, "x": bad})
    assert not bad.any()
    assert first.tolist() == [9, 9]


def test_a_scalar_cannot_be_filled():
    with pytest.raises(ValueError, match="'array'"):
        fc.decode(RAW.encode(np.float32(3)), out=np.float32(0))


def test_out_of_another_spec_or_against_like():
    payload = RAW.encode({"x": np.ones(4, np.float32)})
    for out in (
        {"x": np.zeros(5, np.float32)},
        {"x": np.zeros(4)},
        {"y": np.zeros(4, np.float32)},
        [np.zeros(4, np.float32)],
    ):
        with pytest.raises(fc.SpecMismatch):
            fc.decode(payload, out=out)
        values = out.values() if isinstance(out, dict) else out
        assert not any(x.any() for x in values)
    with pytest.raises(ValueError, match="differ"):
        fc.decode(payload, out={"x": np.zeros(4, np.float32)}, like={"x": np.zeros(5, np.float32)})
    with pytest.raises(TypeError, match="'x'"):
        fc.decode(payload, out={"x": [0, 0, 0, 0]})


OVERLAPPING = {
    "by half": lambda x: (x[:4], x[2:6]),
    "one in the other": lambda x: (x[:4], x[1:2]),
    "as another shape": lambda x: (x[:4], x[:4].reshape(2, 2)),
    "as another dtype": lambda x: (x[:4], x[:4].view(np.int32)),
    "by a byte": lambda x: (x[:1], x.view(np.uint8)[3:4]),
}


@pytest.mark.parametrize("how", OVERLAPPING)
def test_arrays_of_out_that_overlap_are_refused_by_name(how):
    memory = np.zeros(9, np.float32)
    first, second = OVERLAPPING[how](memory)
    payload = RAW.encode([np.ones(3), np.ones_like(first), np.ones_like(second)])
    with pytest.raises(ValueError, match="tensor '1' and tensor '2' share memory"):
        fc.decode(payload, out=[np.zeros(3), first, second])
    assert not memory.any()
    beside = [memory[:3], memory[3:3], memory[3:6], memory[6:]]
    fc.decode(RAW.encode([np.ones_like(x) for x in beside]), out=beside)
    assert memory.all()


@pytest.mark.parametrize("text", ["raw", "int8", "raw | zstd"])
def test_out_in_the_memory_of_the_payload_is_refused(isa, text):
    values = np.ones(400, np.float32)
    payload = fc.parse(text).encode(values)
    memory = np.zeros(4000, np.uint8)
    memory[: len(payload)] = np.frombuffer(payload, np.uint8)
    source = memory[: len(payload)]
    with pytest.raises(ValueError, match="the payload and tensor 'array' share memory"):
        fc.decode(source, out=memory[8:1608].view(np.float32))
    assert bytes(source) == payload
    out = memory[2000:3600].view(np.float32)
    fc.decode(source, out=out)
    assert_same(out, values)


@pytest.mark.parametrize("text", CODECS)
def test_a_failed_decode_leaves_out_untouched(text):
    import zlib

    values = update(4)
    shared = fc.Shared()
    shared.add_rules(fc.parse(text), fc.Spec.of(values))
    payload = fc.parse(text).encode(values, framing="reference")
    out = {name: np.ones_like(x) for name, x in values.items()}
    before = {name: x.copy() for name, x in out.items()}
    rng = np.random.default_rng(4)
    failed = 0
    for number in range(40):
        raw = bytearray(payload[:-4])
        if number % 2:
            raw = raw[: rng.integers(len(raw))]
        else:
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        hostile = bytes(raw) + zlib.crc32(raw).to_bytes(4, "little")
        try:
            fc.decode(hostile, out=out, shared=shared)
        except fc.DecodeError:
            failed += 1
            assert_same(out, before)
        else:
            out = {name: x.copy() for name, x in before.items()}
    assert failed >= 10


# --- torch ------------------------------------------------------------------------------------------------------------


def test_torch_dtypes_round_trip(torch):
    kinds = [getattr(torch, name) for name in [*EVERY_DTYPE, "bfloat16"]]
    values = {str(kind): torch.tensor([0, 1, 1, 0, 1]).to(kind) for kind in kinds}
    decoded = lossless(values, framework="torch")
    for name, x in values.items():
        assert decoded[name].dtype == x.dtype
        assert torch.equal(decoded[name].view(torch.uint8), x.view(torch.uint8))
    numpy = lossless(values)
    assert numpy["torch.bfloat16"].dtype == BFLOAT16
    assert {str(x.dtype) for x in numpy.values()} == {*EVERY_DTYPE, "bfloat16"}


def test_torch_and_numpy_give_the_same_bytes(torch):
    values = update(0)
    tensors = {name: torch.from_numpy(np.asarray(x).copy()) for name, x in values.items()}
    for text in CODECS:
        codec = fc.parse(text)
        assert codec.encode(tensors, seed=5) == codec.encode(values, seed=5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_layouts(torch, dtype):
    whole = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5).to(getattr(torch, dtype))
    views = {
        "transposed": whole.transpose(0, 2),
        "strided": whole[:, ::2, 1::3],
        "expanded": whole[:1].expand(6, 4, 5),
        "0-d": whole[1, 2, 3],
        "empty": whole[:0],
        "flipped": whole.flip(0),
        "grad": whole.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(whole.clone()),
        "result": whole.clone().requires_grad_() * 1,
        "channels last": whole[None].to(memory_format=torch.channels_last),
    }
    decoded = lossless(views, framework="torch")
    for name, x in views.items():
        assert decoded[name].dtype == x.dtype
        assert decoded[name].shape == x.shape
        assert torch.equal(decoded[name], x.detach()), name
        assert not decoded[name].requires_grad


def test_a_header_that_came_before_hides_no_change():
    like = fc.Spec.of({"a": np.zeros(4, np.float32), "b": np.zeros(3, np.float32)})
    update = {"a": np.arange(4, dtype=np.float32), "b": np.ones(3, np.float32)}
    mask = fc.Mask.of({"a": update["a"] > 1, "b": update["b"] > 0})
    rules = RAW.for_names({"b": fc.Sign()})
    shared = fc.Shared()
    mask.add_shared(shared)
    shared.add_rules(rules, like)
    payloads = [
        codec.encode(update, framing=framing)
        for codec in (RAW, fc.TopK(0.5), fc.parse("int8 | zstd"), rules, mask)
        for framing in ("inline", "reference")
    ]
    expected = [fc.decode(payload, like=update, shared=shared) for payload in payloads]
    for _ in range(2):
        for payload, values in zip(payloads * 2, expected * 2, strict=True):
            assert_same(fc.decode(payload, like=like, shared=shared), values)
        for payload in (payloads[-1], RAW.encode(update, base=bytes(8))):
            with pytest.raises(fc.DecodeError, match="pass shared="):
                fc.decode(payload, like=like)
    with pytest.raises(fc.SpecMismatch):
        fc.decode(payloads[0], like=fc.Spec(like.structure, like.tensors[::-1]))


def test_a_torch_layout_that_came_before_hides_no_change(torch):
    x = torch.arange(4, dtype=torch.float32)
    kinds = [torch.float16, torch.bfloat16, torch.int16, torch.uint8, torch.bool]
    updates = [[x.to(kind)] for kind in kinds] + [[x], [x, x.clone()], [x, x], [x.requires_grad_()]]
    expected = [
        [str(tensor.dtype).removeprefix("torch.") for tensor in update] for update in updates
    ]
    for _ in range(2):
        for given, names in zip(updates, expected, strict=True):
            decoded = lossless(given, framework="torch")
            assert [t.dtype for t in fc.Spec.of(given).tensors] == names
            assert all(map(torch.equal, decoded, given))
    assert [t.tied_to for t in fc.Spec.of([x, x]).tensors] == [None, 0]


def test_the_memory_of_torch_outlives_the_update_it_was_read_from(torch):
    read = arrays.read([torch.full((1000,), 7.0) for _ in range(50)])
    others = [torch.full((1000,), 9.0) for _ in range(50)]
    assert all((values == 7).all() for values in read.storage)
    assert len({values.data_ptr() for values in others}) == 50


def test_decoded_torch_tensors_share_no_memory(torch):
    decoded = lossless({str(i): torch.ones(5) for i in range(20)}, framework="torch")
    assert len({x.untyped_storage().data_ptr() for x in decoded.values()}) == 20


def test_a_negated_view_is_read_by_value_and_not_filled(torch):
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert negated.is_neg()
    assert lossless(negated).tolist() == [-2, 4]
    one = torch.tensor([1 + 2j]).conj().imag
    with pytest.raises(ValueError, match="'array'"):
        fc.decode(RAW.encode(np.ones(1, np.float32)), out=one)


class Tied:
    @staticmethod
    def model(torch):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(13, 6)
                self.norm = torch.nn.BatchNorm1d(6)
                self.mixer = torch.nn.Linear(6, 6).to(torch.bfloat16)
                self.head = torch.nn.Linear(6, 13, bias=False)
                self.head.weight = self.embed.weight
                self.register_buffer("seen", torch.tensor([True, False, True]))

            def forward(self, x):
                return self.head(self.norm(self.embed(x)))

        torch.manual_seed(0)
        return Model()


def test_a_state_dict_with_tied_embeddings_and_counters(torch):
    model = Tied.model(torch)
    for _ in range(3):
        model(torch.arange(5))
    with torch.no_grad():
        model.norm.num_batches_tracked += 2**53  # beyond what floats hold
    state = model.state_dict()
    payload = (fc.TopK(0.5) | fc.Int8()).encode(state)
    decoded = fc.decode(payload, like=state)
    assert list(decoded) == list(state)
    assert decoded["head.weight"] is decoded["embed.weight"]
    assert decoded["norm.num_batches_tracked"].item() == 2**53 + 3
    assert decoded["norm.num_batches_tracked"].dtype == torch.int64
    assert decoded["norm.num_batches_tracked"].shape == ()
    assert torch.equal(decoded["seen"], state["seen"])
    assert decoded["mixer.weight"].dtype == torch.bfloat16
    exact = fc.decode(RAW.encode(state), framework="torch")
    assert all(torch.equal(exact[name], state[name]) for name in state)
    assert fc.Spec.of(state) == fc.Spec.of(dict(model.state_dict()))
    fresh = Tied.model(torch)
    fresh.load_state_dict(exact)
    assert fresh.head.weight is fresh.embed.weight
    assert all(torch.equal(x, state[name]) for name, x in fresh.state_dict().items())


def test_out_fills_a_models_parameters_in_place(torch):
    source, target = Tied.model(torch), Tied.model(torch)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(3)
        source.norm.num_batches_tracked += 7
    addresses = [p.data_ptr() for p in target.parameters()]
    payload = RAW.encode(source.state_dict())
    fc.decode(payload, out=target.state_dict())
    assert [p.data_ptr() for p in target.parameters()] == addresses
    assert all(torch.equal(x, source.state_dict()[n]) for n, x in target.state_dict().items())
    assert target.embed.weight.requires_grad
    # Parameters themselves, and their .data.
    named = dict(target.named_parameters())
    smaller = RAW.encode({name: p.detach() * 2 for name, p in named.items()})
    for out in (named, {name: p.data for name, p in named.items()}):
        with torch.no_grad():
            for p in named.values():
                p.zero_()
        fc.decode(smaller, out=out)
        for name, p in source.named_parameters():
            assert torch.equal(named[name].detach(), p.detach() * 2)


def test_torch_out_that_does_not_fit(torch):
    payload = RAW.encode({"x": np.ones((2, 3), np.float32)})
    with pytest.raises(fc.SpecMismatch, match="'x'"):
        fc.decode(payload, out={"x": torch.zeros(3, 2)})
    with pytest.raises(fc.SpecMismatch, match="bfloat16"):
        fc.decode(payload, out={"x": torch.zeros(2, 3, dtype=torch.bfloat16)})
    turned = torch.zeros(3, 2).T
    with pytest.raises(ValueError, match="'x'"):
        fc.decode(payload, out={"x": turned})
    assert not turned.any()


def test_like_and_framework_choose_the_result(torch):
    values = {"x": np.ones(3, np.float32), "n": np.array(3)}
    tensors = {name: torch.tensor(x) for name, x in values.items()}
    for source in (values, tensors):
        payload = RAW.encode(source, framing="reference")
        assert isinstance(fc.decode(payload, like=values)["x"], np.ndarray)
        assert isinstance(fc.decode(payload, like=tensors)["x"], torch.Tensor)
        assert isinstance(fc.decode(payload, like=tensors, framework="numpy")["x"], np.ndarray)
        assert isinstance(fc.decode(payload, like=values, framework="torch")["n"], torch.Tensor)
        assert isinstance(fc.decode(payload, like=fc.Spec.of(tensors))["x"], np.ndarray)
    assert isinstance(lossless(tensors)["x"], np.ndarray)  # bytes know no framework
    with pytest.raises(ValueError, match="fortran"):
        lossless(values, framework="fortran")
    server = fc.Aggregator(tensors)
    server.add(RAW.encode(values))
    assert isinstance(server.mean()["x"], torch.Tensor)
    assert isinstance(server.mean("numpy")["x"], np.ndarray)


def test_torch_feedback_has_a_numpy_residual(torch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        client = fc.ErrorFeedback("topk(0.25)")
        client.encode({"x": torch.tensor([1, 2, 3, 4], dtype=dtype, requires_grad=True)})
        client.accept()
        assert client.residual["x"].tolist() == [1, 2, 3, 0]
        assert client.residual["x"].dtype == np.float32


def test_what_torch_has_and_we_do_not(torch):
    dense = torch.eye(3)
    unsupported = {
        "sparse": dense.to_sparse(),
        "sparse half": dense.to(torch.bfloat16).to_sparse(),
        "complex": dense.to(torch.complex64),
        "float8": dense.to(torch.float8_e4m3fn),
        "meta": torch.empty(3, device="meta"),
    }
    for what, x in unsupported.items():
        with pytest.raises(TypeError, match=r"'layer\.w'") as error:
            RAW.encode({"layer.w": x})
        if what == "meta":
            assert "meta" in str(error.value)


def test_another_device_is_a_backend_error(torch):
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda:0")

    x = torch.ones(3).as_subclass(Elsewhere)
    with pytest.raises(fc.BackendError, match=r"'x' is on cuda:0"):
        RAW.encode({"x": x})
    with pytest.raises(fc.BackendError, match="cuda"):
        fc.decode(RAW.encode(np.ones(1)), device="cuda")

    class OnGpu:
        __cuda_array_interface__ = {}  # noqa: RUF012

    with pytest.raises(fc.BackendError, match="'x'"):
        RAW.encode({"x": OnGpu()})


# --- JAX --------------------------------------------------------------------------------------------------------------


def test_jax_arrays(jax):
    jnp = jax.numpy
    values = {
        "f": jnp.linspace(-1, 1, 7),
        "b": jnp.arange(5, dtype=jnp.bfloat16),
        "h": jnp.ones((2, 2), jnp.float16),
        "n": jnp.arange(3),
        "flag": jnp.array([True, False]),
        "0-d": jnp.float32(2),
        "empty": jnp.zeros((0, 3)),
    }
    payload = RAW.encode(values)
    assert payload == RAW.encode({name: np.asarray(x) for name, x in values.items()})
    decoded = fc.decode(payload, framework="jax")
    for name, x in values.items():
        assert isinstance(decoded[name], jax.Array)
        assert_same(decoded[name], x)
    assert isinstance(fc.decode(payload, like=values)["b"], jax.Array)
    assert_same(fc.decode(payload), {name: np.asarray(x) for name, x in values.items()})


def test_jax_dtypes_that_it_would_narrow_are_refused(jax):
    for x in (np.array([2**40]), np.array([1.1]), np.array([2**40], np.uint64)):
        with pytest.raises(TypeError, match="jax_enable_x64"):
            fc.decode(RAW.encode({"x": x}), framework="jax")


def test_jax_arrays_cannot_be_filled(jax):
    payload = RAW.encode(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="'array'"):
        fc.decode(payload, out=jax.numpy.zeros(3))


def test_jax_arrays_of_equal_value_are_not_tied_and_the_same_one_is(jax):
    x, y = jax.numpy.ones(100), jax.numpy.ones(100)
    assert [t.tied_to for t in fc.Spec.of([x, y, x]).tensors] == [None, None, 0]
