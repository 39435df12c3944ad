"""A named test for every defect found in other libraries that applies to this one."""

from __future__ import annotations

import ast
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from codec_cases import CODECS, FLOATS, assert_same, update, wide

import fedcodec as fc

SOURCES = Path(fc.__file__).parent


def body_of(payload: bytes) -> int:
    return fc.inspect(payload).body_nbytes


def entropy_bytes(n: int, k: int) -> float:
    p = k / n
    return n * (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / 8


# --- OpenFL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.001])
def test_openfl_stc_averages_over_the_zeros(density):
    # It decodes 10 times too small at 10 %, 1,000 times at 0.1 %.
    n = 10_000
    k = int(n * density)
    values = np.zeros(n, np.float32)
    kept = np.random.default_rng(0).permutation(n)[:k]
    values[kept] = np.where(np.arange(k) % 2, 3, -3)
    decoded = fc.decode((fc.TopK(density) | fc.Ternary()).encode(values))
    assert_same(decoded, values)


@pytest.mark.parametrize(
    "selection", ["topk(0.5)", "topk(1.0)", "randomk(0.9)", "threshold(percentile=10)"]
)
def test_openfl_stc_invents_non_zeros_on_near_zero_tensors(selection):
    values = np.zeros(1000, np.float32)
    values[[3, 500]] = 1e-30, -1e-30
    decoded = fc.decode(fc.parse(f"{selection} | ternary").encode(values))
    if "randomk" not in selection:
        assert_same(decoded, values)
    assert not fc.decode(
        fc.parse(f"{selection} | ternary").encode(np.zeros(1000, np.float32))
    ).any()
    for codec in (
        "topk(0.5)",
        "topk(0.5) | int8",
        "int8",
        "kbit(2)",
        "residual(topk(0.1) | ternary; int8)",
    ):
        assert not fc.decode(fc.parse(codec).encode(np.zeros(1000, np.float32))).any()


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 4096, 65535, 65536, 65537])
def test_openfl_eden_fails_where_the_size_equals_a_threshold(n):
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    for text in ("int8", "topk(0.1)", "topk(0.1) | kbit(4)", "sign"):
        decoded = fc.decode(fc.parse(text).encode(values))
        assert decoded.shape == (n,)


def test_openfl_eden_sends_sizes_above_2_24_as_float32():
    n = 2**24 + 1
    values = np.zeros(n, np.int8)
    values[-1] = 7
    payload = (fc.Raw() | fc.Zstd()).encode(
        {"x": values, "s": np.zeros((0, 2**33 + 1), np.float32)}
    )
    decoded = fc.decode(payload)
    assert decoded["x"].shape == (n,)
    assert decoded["x"][-1] == 7
    assert decoded["s"].shape == (0, 2**33 + 1)
    sparse = np.zeros(n, np.float32)
    sparse[[0, 2**24 - 1, 2**24]] = 1, 2, 3
    payload = fc.Sparse().encode(sparse)
    assert len(payload) < 100
    assert_same(fc.decode(payload), sparse)


def test_openfl_stc_payload_is_twice_its_entropy_bound():
    n, k = 1 << 20, 10_486
    values = np.zeros(n, np.float32)
    values[np.random.default_rng(1).permutation(n)[:k]] = 1
    payload = (fc.Sparse() | fc.Ternary()).encode({"x": values}, framing="reference")
    assert len(payload) <= 1.05 * entropy_bytes(n, k) + k / 8 + 4 + 32


# --- FedLab, DGC, STC reference ---------------------------------------------------------------------------------------


def test_fedlab_8_bit_is_larger_than_raw():
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32)  # 4,000 bytes
    assert body_of(fc.Int8().encode(values)) == 1000 + 4
    for bits in range(2, 8):
        assert body_of(fc.KBit(bits).encode(values)) == math.ceil(1000 * bits / 8) + 4
    assert body_of(fc.Sign().encode(values)) == 125 + 4


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 33, 1000])
def test_no_codec_is_larger_than_raw(text, n):
    values = {"w": np.random.default_rng(n).standard_normal(n).astype(np.float32)}
    payload = fc.parse(text).encode(values, framing="reference")
    assert len(payload) <= 4 * n * 1.001 + 64


def test_dgc_counts_index_bits_that_it_never_writes():
    # Everything that the decoder needs is in the bytes: another process has nothing else.
    values = {"w": np.random.default_rng(3).standard_normal((100, 100)).astype(np.float32)}
    dense, sparse = fc.Raw().encode(values), fc.TopK(0.01).encode(values)
    restored = fc.decode(bytes(sparse))
    kept = np.flatnonzero(restored["w"])
    assert kept.size == 100
    expected = np.sort(np.argsort(-np.abs(values["w"].ravel()), kind="stable")[:100])
    assert kept.tolist() == expected.tolist()
    assert len(sparse) > 400 + entropy_bytes(10_000, 100)  # 100 values, and where they are
    assert len(sparse) < len(dense) / 50
    # And none are written where a shared seed or mask stands for them.
    assert body_of(fc.RandomK(0.01).encode(values)) <= 400 + 8 + 10
    assert body_of(fc.Mask.of({"w": np.abs(values["w"]) > 2.5}).encode(values)) == 4 * int(
        (np.abs(values["w"]) > 2.5).sum()
    )


# --- APPFL, FedSZ, Plato ----------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "runpy",
    "code",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def imported(node):
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    return []


@pytest.mark.parametrize(
    "path", sorted(SOURCES.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCES))
)
def test_appfl_unpickles_the_clients_bytes(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # One pickles codecs to test them, and no other file may load it; one times pickle as a peer.
    if path in (SOURCES / "testing.py", SOURCES / "bench" / "peers.py"):
        return
    assert "testing" not in {part for node in ast.walk(tree) for part in imported(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, ast.unparse(node)
            if isinstance(node.func, ast.Attribute):
                on = ast.unparse(node.func)
                assert not on.startswith(("pickle.", "marshal.", "yaml.load")), on
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("allow_pickle", "False") == "False", on
                if on == "torch.load":
                    assert keywords.get("weights_only") == "True", on


def test_appfl_decodes_int64_buffers_as_float32():
    values = {
        "num_batches_tracked": np.array(2**53 + 1),
        "extremes": np.array([-(2**63), 2**63 - 1, 2**24 + 1]),
        "unsigned": np.array([2**64 - 1], np.uint64),
        "mask": np.array([True, False, True]),
        "weight": np.ones(8, np.float32),
    }
    for text in CODECS:
        decoded = fc.decode(fc.parse(text).encode(values))
        for name in ("num_batches_tracked", "extremes", "unsigned", "mask"):
            assert_same(decoded[name], values[name])


def test_a_pickle_bomb_is_only_bad_bytes():
    bomb = b"cos\nsystem\n(S'touch /tmp/fedcodec-was-here'\ntR."
    for payload in (
        bomb,
        b"FC\1\0" + bomb,
        b"FC\1\0" + bomb + zlib.crc32(b"FC\1\0" + bomb).to_bytes(4, "little"),
    ):
        with pytest.raises(fc.DecodeError):
            fc.decode(payload)
        with pytest.raises(fc.DecodeError):
            fc.inspect(payload)
    assert not Path("/tmp/fedcodec-was-here").exists()


# --- NVFLARE ----------------------------------------------------------------------------------------------------------


def test_nvflare_quantizer_raises_for_int64_tensors_and_needs_cuda():
    values = {"weight": np.ones((4, 4), np.float32), "num_batches_tracked": np.array(12)}
    for text in ("int8", "kbit(4)", "kbit(2)", "sign"):
        decoded = fc.decode(fc.parse(text).encode(values))
        assert decoded["num_batches_tracked"].tolist() == 12
        assert decoded["num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("text", CODECS)
def test_nvflare_filter_mutates_shared_data_so_the_second_client_is_quantized_twice(text):
    model = {
        name: x + x.dtype.type(0) for name, x in update(0).items()
    }  # without -0: -0 + residual is 0
    before = {name: x.copy() for name, x in model.items()}
    first = fc.parse(text).encode(model)
    assert_same(model, before)
    assert fc.parse(text).encode(model) == first  # the second client's
    feedback = fc.ErrorFeedback(text)
    assert feedback.encode(model, seed=0) == first
    assert_same(model, before)
    restored = fc.decode(first)
    server = fc.Aggregator(model)
    server.add(first)
    server.mean()
    assert_same(fc.decode(first), restored)


@pytest.mark.parametrize("text", ["int8", "kbit(4)", "kbit(7)", "int8(block_size=None)"])
def test_quantizing_what_was_quantized_changes_nothing_more(text):
    # Whole codes times a power of two: the same scale is found again.
    top = 2 ** ({"kbit(4)": 4, "kbit(7)": 7}.get(text, 8) - 1) - 1
    rng = np.random.default_rng(5)
    values = (rng.integers(-top, top + 1, 999) * np.float32(2.0**-9)).astype(np.float32)
    values[0] = top * 2.0**-9
    once = fc.decode(fc.parse(text).encode(values))
    assert_same(once, values)
    assert_same(fc.decode(fc.parse(text).encode(once)), once)


# --- bitsandbytes, pi-quant, DeMo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitsandbytes_reads_half_as_single_on_cpu(dtype):
    values = np.linspace(-2, 2, 257).astype(dtype)
    for text in ("raw", "topk(1.0)"):
        decoded = fc.decode(fc.parse(text).encode(values))
        assert_same(decoded, values)
    decoded = fc.decode(fc.Int8().encode(values))
    assert decoded.dtype == dtype
    assert np.abs(wide(decoded) - wide(values)).max() <= 2 / 127 / 2 + 2**-7


def test_bitsandbytes_reads_torch_half_as_single_on_cpu():
    torch = pytest.importorskip("torch")
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.linspace(-2, 2, 257, dtype=torch.float32).to(kind)
        assert torch.equal(fc.decode(fc.Raw().encode(x), framework="torch"), x)
        top = fc.decode(fc.TopK(2 / 257).encode(x), framework="torch")
        assert top.dtype == kind
        assert sorted(top[top != 0].tolist()) == [-2, 2]


def test_pi_quant_draws_once_per_call():
    # 0.5 of a step everywhere: with one draw a call all values would round alike.
    values = np.full(4096, 63.5, np.float32)
    values[0] = 127
    decoded = fc.decode(fc.Int8(block_size=None, stochastic=True).encode(values))[1:]
    up = np.count_nonzero(decoded == 64)
    assert set(np.unique(decoded).tolist()) == {63.0, 64.0}
    assert 1800 < up < 2300
    runs = np.count_nonzero(np.diff(decoded))
    assert 1800 < runs < 2300  # nor in stretches
    # Another seed of the call or of the codec is another draw; the same ones are the same.
    codec = fc.Int8(block_size=None, stochastic=True)
    same, other = codec.encode(values, seed=1), codec.encode(values, seed=2)
    assert same == codec.encode(values, seed=1) != other
    assert fc.Int8(block_size=None, stochastic=True, seed=9).encode(values, seed=1) != same


def test_pi_quant_draws_alike_for_every_tensor():
    values = {name: np.append(np.full(1000, 63.5), 127).astype(np.float32) for name in "ab"}
    decoded = fc.decode(fc.Int8(stochastic=True).encode(values))
    assert (decoded["a"] != decoded["b"]).any()


def test_stochastic_rounding_is_right_in_the_mean():
    values = np.linspace(-1, 1, 50, dtype=np.float32)
    total = np.zeros(50)
    for seed in range(200):
        total += fc.decode(fc.KBit(3, stochastic=True).encode(values, seed=seed))
    step = 1 / 3
    assert np.abs(total / 200 - values).max() < 5 * step / 2 / math.sqrt(200)


def test_pi_quant_tolerates_one_step_for_nearest():
    rng = np.random.default_rng(6)
    values = rng.standard_normal(5000).astype(np.float32)
    scale = quotient_toward_zero(np.abs(values).max(), np.float32(127))
    inverse = quotient_toward_zero(np.float32(1), scale)
    codes = np.rint(values * inverse).astype(np.int8)
    payload = fc.Int8(block_size=None).encode(values)
    body = payload[len(payload) - 4 - body_of(payload) : -4]
    assert body == scale.tobytes() + codes.tobytes()
    assert_same(fc.decode(payload), codes.astype(np.float32) * scale)


def quotient_toward_zero(a, b):
    quotient = np.float32(a / b)
    if float(quotient) * float(b) > float(a):
        quotient = np.nextafter(quotient, np.float32(0))
    return quotient


@pytest.mark.parametrize("text", CODECS)
def test_demo_decodes_differently_from_device_to_device(text):
    # What can be shown on one machine: the same bytes and values again and again, from any copy of the payload.
    values = update(7)
    payload = fc.parse(text).encode(values, seed=3)
    assert fc.parse(text).encode(values, seed=3) == payload
    decoded = fc.decode(payload)
    for copy in (
        bytearray(payload),
        memoryview(b"x" + payload)[1:],
        np.frombuffer(payload, np.uint8),
    ):
        assert_same(fc.decode(copy), decoded)


# --- templar, GRACE ---------------------------------------------------------------------------------------------------


def test_templar_is_crashed_by_one_bad_payload():
    values = update(0)
    good = [fc.parse(text).encode(update(n)) for n, text in enumerate(CODECS)]
    rng = np.random.default_rng(8)
    bad = [b"", b"FC", good[0][:-1], good[1] + b"\0", bytes(reversed(good[2])), rng.bytes(500)]
    bad += [
        fc.Int8().encode({"w1": np.ones(3, np.float32)}),
        fc.Raw().encode(values, base=b"12345678"),
    ]
    server, calm = fc.Aggregator(values), fc.Aggregator(values)
    refused = 0
    for number, payload in enumerate(good):
        try:
            server.add(bad[number % len(bad)])
        except fc.DecodeError:
            refused += 1
        server.add(payload, number + 1)
        calm.add(payload, number + 1)
    assert refused == len(good)
    assert server.count == calm.count
    assert_same(server.mean(), calm.mean())


@pytest.mark.parametrize("text", CODECS)
def test_grace_has_no_error_feedback_though_it_says_so(text):
    values = {"w": np.linspace(-1, 1, 401, dtype=np.float32) ** 3}
    client, sent = fc.ErrorFeedback(text), np.zeros(401)
    rounds = 40
    for _ in range(rounds):
        sent += fc.decode(client.encode(values))["w"]
        client.accept()
    if text in ("raw", "sparse", "raw | zstd"):
        assert not client.residual["w"].any()
        return
    # What is left does not grow with the rounds, so the mean of what was sent tends to the values.
    once = np.abs(fc.decode(fc.parse(text).encode(values))["w"] - values["w"]).max()
    error = np.abs(sent / rounds - values["w"]).max()
    if once:
        assert client.residual["w"].any()
        assert error < max(once, 0.02)
    np.testing.assert_allclose(sent + client.residual["w"], rounds * values["w"], atol=1e-3)


def test_nobody_looks_up_classes_or_dtypes_by_names_from_the_message():
    # The wire has ids; a name from a stranger is only ever a tensor's name.
    payload = fc.Raw().encode({"__class__": np.ones(1, np.float32), "os.system": np.array(1)})
    decoded = fc.decode(payload)
    assert list(decoded) == ["__class__", "os.system"]
    assert type(decoded) is dict
    assert b"float32" not in payload


def test_no_json_in_the_header():
    payload = fc.parse("topk(0.1) | int8").encode({"w": np.ones(100, np.float32)})
    header = payload[: len(payload) - 4 - body_of(payload)]
    assert b"{" not in header
    assert header[:4] == struct.pack("<2sBB", b"FC", 1, 0)
