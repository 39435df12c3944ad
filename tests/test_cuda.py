"""What runs on a GPU against the CPU, byte for byte; without one on an emulation of it (CONTRIBUTING.md)."""

import copy
import os
import pickle
import subprocess
import sys

import fake_cupy
import gpu_arrays
import numpy as np
import pytest
from codec_cases import BFLOAT16, CODECS, assert_same, mask_for, update
from gpu_arrays import FRAMEWORK, get, put
from hypothesis import given
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import arrays, dtypes, gpu, ops, pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_arrays.MISSING is not None, reason=str(gpu_arrays.MISSING)),
]
emulated = pytest.mark.skipif(
    not gpu_arrays.EMULATED, reason="needs memory that passes for a GPU's"
)
DTYPES = (np.float32, np.float16, np.float64, BFLOAT16)


def mixed(seed=0):
    """Float tensors of several dtypes beside each other."""
    values = update(seed)
    for name, dtype in zip(values, (np.float16, np.float32, np.float32, np.float64), strict=False):
        values[name] = values[name].astype(dtype)
    return values


def large(seed=0, n=70_000):
    """More than one tile, and than one chunk."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_t(4, (n // 100, 100)).astype(np.float32),
        "b": rng.standard_normal(137).astype(np.float32),
    }


# --- payloads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_payloads_are_the_cpus(text, dtype):
    codec, values = fc.parse(text), update(dtype=dtype)
    assert codec.encode(put(values), seed=7) == codec.encode(values, seed=7)


@pytest.mark.parametrize("text", CODECS)
def test_payloads_of_mixed_dtypes_are_the_cpus(text):
    codec, values = fc.parse(text), mixed()
    assert codec.encode(put(values), seed=7) == codec.encode(values, seed=7)


@pytest.mark.parametrize("text", CODECS)
def test_payloads_of_large_tensors_are_the_cpus(text):
    codec, values = fc.parse(text), large()
    assert codec.encode(put(values), seed=7) == codec.encode(values, seed=7)


def test_payloads_of_masks_are_the_cpus():
    values = mixed()
    codec = mask_for(values) | fc.Int8()
    assert codec.encode(put(values)) == codec.encode(values)


densities = st.sampled_from((1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0))
texts = st.one_of(
    st.sampled_from(CODECS),
    densities.map("topk({0!r}) | int8".format),
    densities.map('topk({0!r}, scope="tensor") | kbit(5)'.format),
    densities.map("topk({0!r}) | ternary".format),
    densities.map("randomk({0!r})".format),
)


@given(
    st.integers(0, 2**32),
    texts,
    st.lists(st.sampled_from((0, 1, 8, 31, 1023, 1024, 4095, 4097, 65_535, 65_537)), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(("normal", "heavy", "two values", "sparse", "equal")),
    st.booleans(),
)
def test_any_payload_is_the_cpus_and_decodes_to_the_same(seed, text, sizes, dtype, kind, by_name):
    rng = np.random.default_rng(seed)
    draw = {
        "normal": rng.standard_normal,
        "heavy": lambda n: rng.standard_t(2, n),
        "two values": lambda n: rng.choice([-0.5, 0.25], n),
        "sparse": lambda n: rng.standard_normal(n) * (rng.random(n) < 0.01),
        "equal": lambda n: np.full(n, -3.0),
    }[kind]
    values = [np.clip(draw(n), -1e4, 1e4).astype(dtype) for n in sizes]
    if by_name:
        values = {f"w{i}": value for i, value in enumerate(values)}
    codec = fc.parse(text)
    payload = codec.encode(values, seed=seed)
    assert codec.encode(put(values), seed=seed) == payload
    if sizes:
        out = put(values)
        assert fc.decode(payload, out=out) is out
        assert_same(get(out), fc.decode(payload, out=copy.deepcopy(values)))


def strided(array):
    """A GPU array's transpose, without a copy."""
    if not gpu_arrays.EMULATED:
        return array.T
    return fake_cupy.ndarray(array.host.T)


@pytest.mark.parametrize("way", [lambda x: x, strided], ids=["plain", "strided"])
def test_tied_tensors_are_sent_once(way):
    shared = way(put(np.arange(12, dtype=np.float32).reshape(3, 4)))
    host = get(shared)
    payload = fc.Int8().encode({"a": shared, "b": shared})
    assert payload == fc.Int8().encode({"a": host, "b": host})
    assert fc.Int8().encode(shared) == fc.Int8().encode(host)


def test_digests_and_masks_of_arrays_on_a_gpu():
    values = mixed()
    assert fc.digest(put(values)) == fc.digest(values)
    shared = fc.Shared()
    assert shared.add_base(put(values)) == fc.digest(values)
    mask = {"w": np.array([True, False, True])}
    assert shared.add_mask(put(mask)) == fc.Shared().add_mask(mask)


def test_what_is_kept_between_calls_is_found_again():
    first, second = arrays.read(put(mixed())), arrays.read(put(mixed(1)))
    assert first.spec is second.spec


@emulated
def test_the_stream_is_asked_for_once(monkeypatch):
    asked = []
    cuda = sys.modules["cupy"].cuda
    stream = cuda.get_current_stream
    monkeypatch.setattr(cuda, "get_current_stream", lambda at: asked.append(at) or stream(at))
    seen = arrays.read(put(mixed()))
    assert asked == [0]
    assert {array.stream for array in seen.storage} == {fake_cupy.STREAM}


def test_layouts_that_differ_in_names_or_ties_alone_do_not_pass_for_each_other():
    one, other = put(np.ones(3, np.float32)), put(np.ones(3, np.float32))
    updates = [{"a": one, "b": other}, {"a": one, "c": other}, {"a": one, "b": one}, [one, other]]
    hosts = [get(update) for update in updates[:2]]
    hosts += [dict.fromkeys("ab", hosts[0]["a"]), list(hosts[0].values())]
    for _ in range(2):
        assert [arrays.read(update).spec for update in updates] == list(map(fc.Spec.of, hosts))


def test_positions_of_more_than_32_bits_are_decoded_by_the_cpu():
    cuda = ops.cuda_backend()
    segments = [([0], ("coder", ("sparse", 0), None))]
    large, small = (
        pipeline._body_coder("Decoder", [1], [(n,)], segments, cuda) for n in (2**32, 2**20)
    )
    dense, signs = (
        pipeline._body_coder("Decoder", [1], [(2**32,)], [([0], ("coder", None, quantize))], cuda)
        for quantize in (None, ("sign",))
    )
    assert isinstance(signs, gpu.HostDecoder)
    assert isinstance(large, gpu.HostDecoder)
    assert isinstance(small, cuda.body.Decoder)
    assert isinstance(dense, cuda.body.Decoder)
    values, out = large_enough(), put(np.zeros(5, np.float32))
    payload = fc.parse("sparse").encode(values)
    host = gpu.HostDecoder(pipeline._body_coder("Decoder", [1], [(5,)], segments, ops.backend()))
    start = len(payload) - fc.inspect(payload).body_nbytes - 4
    host.decode(payload, start, len(payload) - 4, arrays.read(out).storage)
    assert_same(get(out), values)


def test_channels_go_by_the_cpu():
    cuda = ops.cuda_backend()
    segments = [([0], ("coder", ("structured", 1, 0), None))]
    decoder = pipeline._body_coder("Decoder", [1], [(2, 3)], segments, cuda)
    assert isinstance(decoder, gpu.HostDecoder)
    segments = [([0], ("coder", ("structured", 1, 0, 0.5, 2), None))]
    encoder = cuda.body.Encoder([1], [(2, 3)], segments)
    with pytest.raises(cuda.Refused):
        encoder.encode(b"", arrays.read(put(np.ones((2, 3), np.float32))).storage, True)


def large_enough():
    return np.array([0, 1, 0, -2, 3], np.float32)


# --- decoding and sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("values", [mixed(), large()], ids=["mixed", "large"])
def test_decodes_to_what_the_cpu_does(text, values):
    payload = fc.parse(text).encode(values, seed=3)
    on_gpu = fc.decode(payload, device="cuda", framework=FRAMEWORK)
    assert_same(get(on_gpu), fc.decode(payload))


def test_a_mask_decodes_to_what_the_cpu_does():
    values = mixed()
    codec = mask_for(values) | fc.Int8()
    shared = fc.Shared()
    codec.add_shared(shared)
    payload = codec.encode(values)
    assert_same(
        get(fc.decode(payload, device="cuda", framework=FRAMEWORK, shared=shared)),
        fc.decode(payload, shared=shared),
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_and_means_are_the_cpus(dtype):
    here, there = fc.Aggregator(dtype=dtype), fc.Aggregator(dtype=dtype, device="cuda")
    for i, text in enumerate(CODECS):
        payload = fc.parse(text).encode(mixed(i), seed=i)
        for aggregator in (here, there):
            aggregator.add(payload, weight=i + 0.5)
    assert_same(there.state_dict()["sums"], here.state_dict()["sums"])
    assert_same(get(there.mean(FRAMEWORK)), here.mean())


@pytest.mark.parametrize("text", CODECS)
def test_sums_of_large_tensors_are_the_cpus(text):
    values = large()
    here, there = fc.Aggregator(like=values), fc.Aggregator(like=values, device="cuda")
    for seed in range(2):
        payload = fc.parse(text).encode(large(seed), seed=seed)
        here.add(payload, 0.3)
        there.add(payload, 0.3)
    assert_same(there.state_dict()["sums"], here.state_dict()["sums"])


def test_aggregators_merge_and_travel():
    values = mixed()
    payload = fc.parse("topk(0.3) | int8").encode(values)
    here, there = fc.Aggregator(), fc.Aggregator(device="cuda")
    here.add(payload, 2)
    there.add(payload, 3)
    both = copy.deepcopy(there)
    both.merge(here)
    back = copy.deepcopy(here)
    back.merge(there)
    assert_same(both.state_dict()["sums"], back.state_dict()["sums"])
    assert_same(get(pickle.loads(pickle.dumps(both)).mean(FRAMEWORK)), back.mean())
    loaded = fc.Aggregator(device="cuda")
    loaded.load_state_dict(back.state_dict())
    assert_same(get(loaded.mean(FRAMEWORK)), back.mean())


# --- error feedback -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CODECS)
def test_feedback_is_the_cpus(text):
    here, there = fc.ErrorFeedback(text), fc.ErrorFeedback(text)
    for turn in range(4):
        values = mixed(turn)
        assert there.encode(put(values)) == here.encode(values)
        for feedback in (here, there):
            feedback.reject() if turn == 1 else feedback.accept()
        assert_same(there.residual, here.residual)


def test_feedback_moves_between_devices():
    here, there = fc.ErrorFeedback("topk(0.2) | int8"), fc.ErrorFeedback("topk(0.2) | int8")
    for turn in range(6):
        values = mixed(turn)
        payload = there.encode(put(values) if turn % 2 else values)
        assert payload == here.encode(values)
        there = pickle.loads(pickle.dumps(there))
        loaded = fc.ErrorFeedback(there.codec)
        loaded.load_state_dict(there.state_dict())
        there = loaded
        here.accept()
        there.accept()
        assert_same(there.residual, here.residual)


# --- benchmarks ---------------------------------------------------------------------------------------------------


class EmulatedGpu:
    """A framework's part in a benchmark, over what passes for a GPU's memory."""

    name = "emulated GPU"
    put, get = staticmethod(put), staticmethod(get)

    def copy(self, target, values):
        target.host[...] = values.host

    def read(self, values):
        values.host.sum()

    def synchronize(self):
        pass

    def topk_peers(self, values, k):
        return {"np.partition": lambda: np.partition(values.host, k)}

    def block_peers(self, values, total):
        look = {"np.abs": lambda: np.abs(values.host)}
        return {"quantize": look, "dequantize": look, "add": look}


@emulated
def test_benchmarks_on_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    from fedcodec.bench import gpu as bench
    from fedcodec.bench.report import write_report

    record = bench.run(EmulatedGpu(), [5000], ["student-t"], rounds=1)
    assert [row["name"] for row in record["rows"]] == list(bench.rows())
    assert {row["kind"] for row in record["rows"]} == {"call", "kernel"}
    for row in record["rows"]:
        assert row["seconds"] > 0
        assert row["over_copy"] > 0
        assert row["peers"]
    paths = write_report(tmp_path, record)
    assert "emulated GPU" in paths[1].read_text()


@emulated
def test_a_wrong_result_on_a_gpu_is_no_benchmark(monkeypatch):
    from fedcodec.bench import gpu as bench

    monkeypatch.setattr(bench, "CODECS", ("int8",))
    monkeypatch.setattr(EmulatedGpu, "put", staticmethod(lambda values: put(2 * values)))
    with pytest.raises(AssertionError, match="another result"):
        bench.run(EmulatedGpu(), [100], ["normal"], "^encode", 1)


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int8", "topk(0.1)", "sign", "topk(0.1) | ternary", "raw"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_values_are_named_as_on_the_cpu(text, bad):
    values = mixed()
    values["conv"].reshape(-1)[3] = bad
    with pytest.raises(fc.NonFiniteError) as expected:
        fc.parse(text).encode(values)
    with pytest.raises(fc.NonFiniteError) as found:
        fc.parse(text).encode(put(values))
    assert str(found.value) == str(expected.value)


def test_values_beyond_a_narrower_dtype_are_named():
    values = [np.array([1.0, 1e300]), np.array([1e6], np.float32)]
    for text in ("int8", 'cast("float16")'):
        with pytest.raises(fc.NonFiniteError) as expected:
            fc.parse(text).encode(values)
        with pytest.raises(fc.NonFiniteError) as found:
            fc.parse(text).encode(put(values))
        assert str(found.value) == str(expected.value)


def test_a_failed_decode_leaves_its_target():
    values = large()
    payload = bytearray(fc.parse("topk(0.01) | int8").encode(values))
    out = put(values)
    for at in range(100, len(payload), 397):
        broken = bytearray(payload)
        broken[at] ^= 0x55
        broken[-4:] = ops.crc32(bytes(broken[:-4])).to_bytes(4, "little")
        before = copy.deepcopy(get(out))
        try:
            fc.decode(broken, out=out)
        except fc.DecodeError:
            assert_same(get(out), before)


@pytest.mark.parametrize("text", ["topk(0.01) | int8", "topk(0.5)", "residual(sign; topk(0.1))"])
def test_wrong_bytes_are_refused_in_the_cpus_words(text):
    values = large()
    payload = fc.parse(text).encode(values)
    out, here = put(values), copy.deepcopy(values)
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(payload)
        for at in rng.integers(60, len(payload) - 4, rng.integers(1, 4)):
            broken[at] ^= int(rng.integers(1, 256))
        broken[-4:] = ops.crc32(bytes(broken[:-4])).to_bytes(4, "little")
        assert refusal(broken, out) == refusal(broken, here)
        assert_same(get(out), here)


def refusal(payload, out):
    """What is said of a payload, if it is refused."""
    try:
        fc.decode(payload, out=out)
    except fc.DecodeError as error:
        return str(error)
    return None


class Odd:
    """An array of some framework with another idea of the interface."""

    def __init__(self, **changes):
        self.memory = np.arange(6, dtype=np.float32)
        plain = {
            "shape": (2, 3),
            "typestr": "<f4",
            "data": (self.memory.ctypes.data, False),
            "version": 3,
        }
        self.__cuda_array_interface__ = plain | changes


@emulated
def test_other_frameworks_arrays():
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert fc.Raw().encode(Odd()) == fc.Raw().encode(host)
    assert fc.Raw().encode(Odd(strides=(12, 4), stream=2)) == fc.Raw().encode(host)
    empty = Odd(shape=(0, 3), data=(0, False))
    assert fc.Raw().encode(empty) == fc.Raw().encode(np.empty((0, 3), np.float32))


@emulated
def test_arrays_that_are_still_computed_are_waited_for():
    class Late(Odd):
        def block_until_ready(self):
            self.memory[:] = 7

    assert fc.Raw().encode(Late()) == fc.Raw().encode(np.full((2, 3), 7, np.float32))


@emulated
@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (-1, 3)},
        {"shape": (2.5,)},
        {"shape": 3},
        {"shape": (2**62, 2**62)},
        {"data": None},
        {"data": (-5, False)},
        {"typestr": "what"},
        {"typestr": ">f4"},
        {"typestr": "<c8"},
        {"strides": (4, 8)},
        {"data": (4097, False)},
        {"mask": object()},
        {"stream": "x"},
        {"typestr": None},
        {"typestr": "|V2"},
        {"strides": ()},
        {"data": (2**64, False)},
        {"data": (0, False)},
        {"shape": (2**70, 0)},
        {"stream": 2**64},
    ],
)
def test_interfaces_that_are_none(changes):
    with pytest.raises(TypeError, match="'odd'"):
        fc.Raw().encode({"odd": Odd(**changes)})


def test_results_on_the_cpu_for_updates_on_a_gpu():
    values = mixed()
    payload = fc.Raw().encode(values)
    if gpu_arrays.EMULATED:
        assert_same(fc.decode(payload, like=put(values)), values)
        here, there = fc.Aggregator(like=values), fc.Aggregator(like=put(values))
        for aggregator in (here, there):
            aggregator.add(payload)
        assert_same(there.mean(), here.mean())


def test_devices_do_not_mix():
    values = {"a": put(np.ones(3, np.float32)), "b": np.ones(3, np.float32)}
    with pytest.raises(TypeError, match="'b' is not on the GPU"):
        fc.Int8().encode(values)
    with pytest.raises(TypeError, match="'a' is on a GPU"):
        fc.Int8().encode(dict(reversed(values.items())))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x"])
def test_devices_that_are_not_there(device):
    payload = fc.Int8().encode(np.ones(3, np.float32))
    with pytest.raises(fc.BackendError, match=device):
        fc.decode(payload, device=device)
    with pytest.raises(fc.BackendError, match=device):
        fc.Aggregator(device=device)


def test_threads_and_instructions_of_its_core_are_the_cpus():
    code = """
import fedcodec as fc
from fedcodec import ops

fc.set_num_threads(3)
ops.use("baseline")
body = ops.cuda_backend().body
print(body.num_threads(), body.isa())
fc.set_num_threads(2)
ops.use(ops.available()[-1])
print(body.num_threads(), body.isa() == ops.active())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "baseline", "2", "True"]


@pytest.mark.parametrize("isa", ["reference", "baseline"])
def test_the_environment_chooses_the_instructions_of_its_core(isa):
    code = """
from fedcodec import ops

native = ops.available()[-1] if ops.active() == "reference" else ops.active()
print(ops.active(), ops.cuda_backend().body.isa() == native)
"""
    environment = os.environ | {"FEDCODEC_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [isa, "True"]


@emulated
def test_a_call_makes_no_context_on_another_device():
    code = """
import numpy as np
from fedcodec import gpu, ops

array = gpu.moved(np.ones(9, np.float32), 1)
assert (gpu.to_host(array) == 1).all()
body = ops.cuda_backend().body
print(body.has_context(0), body.has_context(1))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]


def test_frameworks_without_arrays_on_a_gpu():
    payload = fc.Int8().encode(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="numpy"):
        fc.decode(payload, device="cuda", framework="numpy")
    with pytest.raises(ValueError, match="device='cuda'"):
        fc.decode(payload, framework="cupy") if gpu_arrays.EMULATED else fc.decode(
            payload, framework=_cupy()
        )


def _cupy():
    pytest.importorskip("cupy")
    return "cupy"


@pytest.fixture
def memory():
    """Sets how many bytes the emulated GPU has left."""
    if not gpu_arrays.EMULATED:
        pytest.skip("a true GPU's memory cannot be set")
    body = ops.cuda_backend().body
    yield body.set_memory
    body.set_memory((1 << 64) - 1)


@pytest.mark.parametrize(
    "text",
    [
        "topk(0.3) | int8",
        "residual(sign; topk(0.2))",
        "raw",
        'rules(int8; "*.bias" = topk(0.5))',
        'rules(int8 | zstd; "*.bias" = topk(0.5) | zstd; "w*" = sign | zstd)',
    ],
)
def test_out_of_memory_leaves_everything_as_it_was(memory, text):
    values, others = mixed(), mixed(1)
    payload = fc.parse(text).encode(values)
    server, once, twice = fc.Aggregator(device="cuda"), fc.Aggregator(), fc.Aggregator()
    for aggregator in (server, once, twice, twice):
        aggregator.add(payload)
    client, waiting, here = (fc.ErrorFeedback(text) for _ in range(3))
    for feedback in (client, waiting):
        feedback.encode(put(values))
    client.accept()
    here.encode(values)
    here.accept()
    out = put(others)
    before, residual = copy.deepcopy(get(out)), client.residual

    def server_is_unchanged():
        assert_same(server.state_dict()["sums"], once.state_dict()["sums"])
        assert server.count == 1

    # What each call changes, and what is so before.
    calls = [
        (lambda: fc.parse(text).encode(put(values)), lambda: None),
        (lambda: client.encode(put(others)), lambda: assert_same(client.residual, residual)),
        (lambda: waiting.accept(), lambda: waiting.pending or pytest.fail("accepted")),
        (lambda: server.add(payload), server_is_unchanged),
        (lambda: fc.decode(payload, out=out), lambda: assert_same(get(out), before)),
    ]
    for number, (call, _) in enumerate(calls):
        for nbytes in range(0, 1_000_000, 256):
            memory(nbytes)
            try:
                call()
                break
            except (fc.BackendError, fc.DecodeError) as error:
                assert "memory" in str(error)  # noqa: PT017
            finally:
                memory((1 << 64) - 1)
            for _, check in calls[number:]:
                check()
        else:
            pytest.fail("there was enough memory")
    assert_same(get(out), fc.decode(payload))
    assert_same(server.state_dict()["sums"], twice.state_dict()["sums"])
    assert server.count == 2
    assert_same(waiting.residual, here.residual)


@emulated
def test_what_outlives_a_call_has_a_pool_that_keeps_nothing():
    def in_use():
        pools = ops.cuda_backend().body.in_use()
        return [sum(used for kept, used in pools if bool(kept) == keeps) for keeps in (False, True)]

    fc.Int8().encode(put(mixed()))
    before, calls = in_use()
    assert calls == 0
    array = gpu.new(1000, dtypes.BY_NAME["float64"].id, 0)
    assert in_use() == [before + array.nbytes, 0]
    del array
    assert in_use() == [before, 0]


@emulated
def test_results_that_a_gpu_has_no_room_for(monkeypatch):
    def full(shape, dtype):
        raise MemoryError("out of memory")

    values = mixed()
    payload = fc.Raw().encode(values)
    server = fc.Aggregator(device="cuda")
    server.add(payload)
    monkeypatch.setattr(sys.modules["cupy"], "empty", full)
    with pytest.raises(fc.DecodeError, match="memory"):
        fc.decode(payload, device="cuda", framework="cupy")
    with pytest.raises(fc.BackendError, match="memory"):
        server.mean("cupy")
