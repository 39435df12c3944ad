"""Threads: the same bytes for any number of them, no more than are wanted, and none that a fork leaves behind."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fedcodec as fc
from fedcodec import ops, testing

pytest.importorskip("fedcodec._native", reason="only native kernels have threads")
pytestmark = pytest.mark.native
native_backend = pytest.mark.skipif(
    ops.active() == "reference", reason="the reference backend uses the caller's thread only"
)
TASKS = Path("/proc/self/task")
linux = pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = fc.get_num_threads()
    yield
    fc.set_num_threads(before)


def large(seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Tensors that ranges cut in the middle, small ones between them."""
    rng = np.random.default_rng(seed)
    sizes = {"w": 700_001, "b.bias": 5, "empty": 0, "v": 333_333, "u": 270_000}
    return {
        name: (rng.standard_t(4, size) * 0.01).astype(dtype) for name, size in sizes.items()
    } | {"conv": (rng.standard_t(4, (30, 9, 1000)) * 0.01).astype(dtype)}


def on_threads(run):
    """What it gives on one thread, on two and on seven."""
    outcomes = []
    for number in (1, 2, 7):
        fc.set_num_threads(number)
        outcomes.append(run())
    return outcomes


CODECS = [
    "raw",
    "int8",
    "int8(block_size=None)",
    "int8(block_size=300000)",
    "int8(block_size=100)",
    "int8(stochastic=True)",
    "kbit(4)",
    "kbit(3, block_size=1000)",
    "kbit(5, block_size=None, stochastic=True)",
    "sign",
    'cast("bfloat16")',
    "topk(0.01) | int8",
    "topk(0.001)",
    'topk(0.1, scope="tensor") | kbit(2)',
    "topk(0.6) | ternary",
    "topk(1e-6)",
    "threshold(value=0.02)",
    "threshold(percentile=95) | ternary",
    "randomk(0.05) | int8",
    "structured(0.3)",
    "structured(0.7, axis=1, order=1) | int8",
    "structured",
    "structured(0.5) | ternary",
    "residual(sign; topk(0.01) | int8)",
    "topk(0.01) | int8 | zstd",
]


CASES = [(text, np.float32) for text in CODECS] + [
    (text, dtype)
    for text in ("raw", "int8", "sign", "topk(0.01) | int8", "structured(0.4, axis=1)")
    for dtype in (np.float64, np.float16)
]


@native_backend
@pytest.mark.parametrize(("text", "dtype"), CASES)
def test_any_number_of_threads_gives_the_same_bytes(text, dtype):
    update, codec = large(dtype=dtype), fc.parse(text)

    def run():
        payload = codec.encode(update, seed=5)
        restored = fc.decode(payload)
        total = fc.Aggregator(like=update)
        total.add(payload, weight=0.3)
        return payload, restored, total.mean()

    one, *others = on_threads(run)
    for payload, restored, mean in others:
        assert payload == one[0]
        assert testing.same(restored, one[1])
        assert testing.same(mean, one[2])


@native_backend
@pytest.mark.parametrize(
    "text",
    [
        'rules(topk(0.1); "w" = int8)',
        'rules(randomk(0.1); "w" = raw)',
        'threshold(value=0.5, scope="tensor") | ternary',
        'residual(topk(0.02, scope="tensor"); int8)',
        'rules(residual(topk(0.1); sign); "w" = topk(0.2))',
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_small_group_before_a_large_one(text, dtype):
    rng = np.random.default_rng(2)
    sizes = {"tiny": 1000, "small": 200_000, "w": 400_000}
    update = {name: rng.standard_t(4, size).astype(dtype) for name, size in sizes.items()}

    def run():
        feedback = fc.ErrorFeedback(text)
        payload = feedback.encode(update)
        feedback.accept()
        total = fc.Aggregator(like=update)
        total.add(payload)
        return [payload, fc.decode(payload), fc.decode(payload, like=update), total.mean()]

    one, *others = on_threads(run)
    for other in others:
        assert other[0] == one[0]
        assert all(map(testing.same, other[1:], one[1:]))


@native_backend
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_of_any_axis(axis):
    update = {"conv": large()["conv"]}
    one, *others = on_threads(lambda: fc.Int8(axis=axis).encode(update))
    assert others == [one, one]


@native_backend
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_error_feedback(dtype):
    def run():
        feedback = fc.ErrorFeedback("topk(0.01) | int8")
        payloads = []
        for seed in range(3):
            payloads.append(feedback.encode(large(seed, dtype)))
            feedback.accept()
        return payloads, feedback.state_dict()["residual"]

    (payloads, residual), *others = on_threads(run)
    for other, left in others:
        assert other == payloads
        assert testing.same(left, residual)


N = 1_500_000
SHAPES = {
    "all equal": lambda rng: np.ones(N, np.float32),
    "all zero": lambda rng: np.zeros(N, np.float32),
    "rising": lambda rng: np.arange(N, dtype=np.float32),
    "falling": lambda rng: np.arange(N, dtype=np.float32)[::-1].copy(),
    "few values": lambda rng: rng.integers(-3, 4, N).astype(np.float32),
    "ties at the end": lambda rng: np.repeat(np.float32([1, 2]), N // 2),
    "ties at the start": lambda rng: np.repeat(np.float32([2, 1]), N // 2),
    "sparse": lambda rng: np.where(rng.random(N) < 1e-4, 1, 0).astype(np.float32),
}


@native_backend
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.3])
def test_selection_of_ties_and_of_ordered_values(shape, density):
    values = SHAPES[shape](np.random.default_rng(1))
    k = int(density * values.size)
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    for positions, kept in on_threads(lambda: ops.topk(values, k)):
        np.testing.assert_array_equal(positions, np.sort(order))
        np.testing.assert_array_equal(kept, values[positions])
    expected = np.percentile(np.abs(values), 99, method="lower")
    assert (
        on_threads(lambda: ops.percentile_threshold(values, 99, interpolation="lower"))
        == [expected] * 3
    )


@native_backend
@pytest.mark.parametrize("text", ["int8", "topk(0.01) | int8", "sign", "raw"])
def test_the_first_of_several_wrong_elements_is_named(text):
    update = np.ones(2_000_000, np.float32)
    update[[300_001, 900_000, 1_999_999]] = np.nan

    def run():
        with pytest.raises(fc.NonFiniteError) as caught:
            fc.parse(text).encode(update)
        return str(caught.value)

    messages = on_threads(run)
    assert "300001" in messages[0].replace(",", "")
    assert messages[1:] == messages[:1] * 2


@native_backend
def test_a_flipped_bit_is_found_by_any_number_of_threads():
    payload = bytearray(fc.Int8().encode(large()))
    payload[len(payload) // 2] ^= 1
    target = large()

    def run():
        with pytest.raises(fc.DecodeError, match="checksum"):
            fc.decode(payload, out=target)

    on_threads(run)
    assert testing.same(target, large())


@native_backend
@pytest.mark.parametrize("at", [0, 1_000_001, 1_999_999])
def test_a_value_that_is_not_finite_is_found_by_any_number_of_threads(at):
    payload = bytearray(
        fc.parse("raw").encode([np.ones(9, np.float32), np.ones(2_000_000, np.float32)])
    )
    start = len(payload) - 4 - 8_000_000
    payload[start + 4 * at : start + 4 * at + 4] = np.float32(np.inf).tobytes()
    payload[-4:] = ops.crc32(bytes(payload[:-4])).to_bytes(4, "little")

    def run():
        with pytest.raises(fc.DecodeError, match=f"a value is not finite \\(at byte {start}\\)"):
            fc.decode(payload)

    on_threads(run)


# --- how many -------------------------------------------------------------------------------------


def report(code: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NUMBER = "import fedcodec; print(fedcodec.get_num_threads())"


def test_the_environment_says_how_many():
    assert report(NUMBER, FEDCODEC_NUM_THREADS="3", OMP_NUM_THREADS="5") == "3"
    assert report(NUMBER, OMP_NUM_THREADS="5") == "5"
    assert report(NUMBER, OMP_NUM_THREADS="4,2") == "4"


@linux
def test_it_is_as_many_as_processors_otherwise():
    processors = str(len(os.sched_getaffinity(0)))
    assert report(NUMBER) == processors
    assert report(NUMBER, OMP_NUM_THREADS="many") == processors
    bound = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {NUMBER}"
    assert report(bound) == "1"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1025", "3x", " "])
def test_nonsense_in_the_environment_is_named(text):
    code = """
import numpy, fedcodec
for call in (fedcodec.get_num_threads, lambda: fedcodec.Int8().encode(numpy.ones(9, numpy.float32))):
    try:
        call()
    except fedcodec.BackendError as error:
        print(error)
"""
    lines = report(code, FEDCODEC_NUM_THREADS=text).splitlines()
    expected = f"FEDCODEC_NUM_THREADS must be a number from 1 to 1024, not '{text}'"
    if ops.active() == "reference":
        assert lines[0] == expected
    else:
        assert lines == [expected] * 2


def test_the_call_says_how_many():
    fc.set_num_threads(5)
    assert fc.get_num_threads() == 5
    assert fc.info()["threads"] == 5
    fc.set_num_threads(np.int64(2))
    assert fc.get_num_threads() == 2


@pytest.mark.parametrize("number", [0, -1, 1025])
def test_a_number_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match="number"):
        fc.set_num_threads(number)


@pytest.mark.parametrize("number", [1.5, "2", None])
def test_what_is_no_number_is_refused(number):
    with pytest.raises(TypeError):
        fc.set_num_threads(number)


@linux
@native_backend
def test_no_thread_starts_before_there_is_work():
    code = f"""
import os, numpy as np, fedcodec as fc
count = lambda: len(os.listdir({str(TASKS)!r}))
start = count()
small, large = np.ones(1000, np.float32), np.ones(2_000_000, np.float32)
fc.decode(fc.Int8().encode(small))
after_small = count() - start
fc.decode(fc.Int8().encode(large))
print(after_small, count() - start)
"""
    assert report(code, FEDCODEC_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1") == "0 0"
    assert report(code, FEDCODEC_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1") == "0 2"


@linux
@native_backend
def test_calls_at_the_same_time_share_the_threads():
    code = f"""
import os, numpy as np, fedcodec as fc
from concurrent.futures import ThreadPoolExecutor
codec, update = fc.parse("topk(0.01) | int8"), np.random.default_rng(0).normal(size=2_000_000)
expected = codec.encode(update)
with ThreadPoolExecutor(4) as callers:
    assert set(callers.map(lambda _: codec.encode(update), range(40))) == {{expected}}
    print(len(os.listdir({str(TASKS)!r})) - 5)
"""
    assert report(code, FEDCODEC_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1") == "2"


@native_backend
def test_callers_of_many_threads_get_their_own_results():
    fc.set_num_threads(3)
    updates = [large(seed) for seed in range(4)]
    codec = fc.parse("topk(0.01) | int8")
    expected = [codec.encode(update) for update in updates]
    stop = threading.Event()

    def change_the_number():
        while not stop.is_set():
            for number in (1, 2, 5):
                fc.set_num_threads(number)

    changing = threading.Thread(target=change_the_number)
    changing.start()
    try:
        with ThreadPoolExecutor(4) as callers:
            for _ in range(10):
                assert list(callers.map(codec.encode, updates)) == expected
    finally:
        stop.set()
        changing.join()


@linux
@native_backend
def test_idle_threads_sleep():
    code = f"""
import os, time, numpy as np, fedcodec as fc
fc.Int8().encode(np.ones(2_000_000, np.float32))
time.sleep(0.5)
tasks = [open(os.path.join({str(TASKS)!r}, task, "stat")).read() for task in os.listdir({str(TASKS)!r})]
print(*sorted(task.rpartition(")")[2].split()[0] for task in tasks))
"""
    assert report(code, FEDCODEC_NUM_THREADS="4", OPENBLAS_NUM_THREADS="1") == "R S S S"


# --- forks ----------------------------------------------------------------------------------------


def in_a_fork(run) -> None:
    """Run it in a forked process, which may neither hang nor fail."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            run()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@native_backend
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_threads_of_its_own():
    fc.set_num_threads(3)
    update, codec = large(), fc.parse("topk(0.01) | int8")
    payload = codec.encode(update)

    def child():
        before = len(os.listdir(TASKS)) if TASKS.exists() else 0
        assert codec.encode(update) == payload
        fc.decode(payload)
        if TASKS.exists():
            assert (before, len(os.listdir(TASKS))) == (1, 3)

    in_a_fork(child)
    in_a_fork(lambda: in_a_fork(child))
    assert codec.encode(update) == payload


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the sanitizer's allocator does not survive a fork while others allocate",
)
@native_backend
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_another_threads_call():
    fc.set_num_threads(3)
    update, codec = large(), fc.parse("topk(0.01) | int8")
    payload = codec.encode(update)
    stop = threading.Event()

    def encode():
        while not stop.is_set():
            assert codec.encode(update) == payload

    def child():
        assert fc.parse("topk(0.01) | int8").encode(update) == payload

    with ThreadPoolExecutor(2) as callers:
        busy = [callers.submit(encode) for _ in range(2)]
        try:
            for _ in range(10):
                in_a_fork(child)
        finally:
            stop.set()
        for call in busy:
            call.result()


# --- beside torch ---------------------------------------------------------------------------------


@linux
@native_backend
def test_torchs_threads_stay_torchs():
    pytest.importorskip("torch")
    code = f"""
import os, torch, fedcodec as fc
count = lambda: len(os.listdir({str(TASKS)!r}))
torch.set_num_threads(2)
update = torch.randn(1500, 1500)
update @ update
before = count()
payload = fc.Int8().encode(update)
after = count()
for _ in range(3):
    update @ update
    assert fc.Int8().encode(update) == payload
print(after - before, count() - before, torch.get_num_threads())
"""
    assert report(code, FEDCODEC_NUM_THREADS="3") == "2 2 2"


# --- the kernels one by one -----------------------------------------------------------------------

X = np.random.default_rng(3).standard_t(4, 600_001).astype(np.float32)
MASK = X > 0.5
PLACES = np.flatnonzero(MASK)
KERNELS = {
    "apply_mask": lambda: ops.apply_mask(X, MASK),
    "pack_mask": lambda: ops.pack_mask(MASK),
    "unpack_mask": lambda: ops.unpack_mask(ops.pack_mask(MASK), X.size),
    "quantize_int8": lambda: ops.quantize_int8(X, block_size=1000),
    "dequantize_int8": lambda: ops.dequantize_int8(
        *ops.quantize_int8(X, block_size=1000), block_size=1000
    ),
    "quantize_kbit": lambda: ops.quantize_kbit(X, 3, block_size=None),
    "pack_codes": lambda: ops.pack_codes(ops.quantize_kbit(X, 5)[0], 5),
    "unpack_codes": lambda: ops.unpack_codes(
        ops.pack_codes(ops.quantize_kbit(X, 5)[0], 5), 5, X.size
    ),
    "mean_magnitude": lambda: ops.mean_magnitude(X),
    "pack_signs": lambda: ops.pack_signs(X),
    "unpack_signs": lambda: ops.unpack_signs(ops.pack_signs(X), 0.25, X.size),
    "narrow": lambda: ops.narrow(X, "float16"),
    "widen": lambda: ops.widen(ops.narrow(X, "bfloat16"), "bfloat16"),
    "philox": lambda: ops.philox(1, 2, 3, X.size),
    "crc32": lambda: ops.crc32(X, 7),
    "pack_sparse": lambda: ops.pack_sparse(PLACES, X.size),
    "pack_sparse, most": lambda: ops.pack_sparse(np.flatnonzero(X < 1), X.size),
    "compact": lambda: ops.compact([X[:5], X[5:]], 0.5),
    "compact, with ties": lambda: ops.compact(np.round(X), 1.0, 123_456),
    "random_positions": lambda: ops.random_positions(X.size, 100_000, seed=7),
    "random_positions, few": lambda: ops.random_positions(2**40, 100_000, seed=7),
    "unpack_sparse": lambda: ops.unpack_sparse(ops.pack_sparse(PLACES, X.size), X.size),
    "scatter": lambda: _sum(lambda total: ops.scatter(PLACES, X[PLACES], total)),
    "accumulate_sparse": lambda: _sum(
        lambda total: ops.accumulate_sparse(total, PLACES, X[PLACES], 0.3)
    ),
    "accumulate": lambda: _sum(lambda total: ops.accumulate(total, X, 0.3)),
    "accumulate_codes": lambda: _sum(
        lambda total: ops.accumulate_codes(
            total, *ops.quantize_int8(X), 8, 1024, -(-X.size // 1024), 0.3
        )
    ),
}


def _sum(add):
    total = np.zeros(X.size, np.float32)
    add(total)
    return total


@native_backend
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_same_on_any_number(name):
    def bits():
        result = KERNELS[name]()
        return [
            np.asarray(part).tobytes()
            for part in (result if isinstance(result, tuple) else (result,))
        ]

    one, *others = on_threads(bits)
    assert others == [one, one]


@native_backend
@pytest.mark.parametrize(
    "call",
    [
        ops.pack_signs,
        ops.quantize_int8,
        lambda x: ops.narrow(x, "float16"),
        lambda x: ops.compact(x, 0.5),
        lambda x: ops.compact(x, np.inf),
        lambda x: ops.scatter(np.arange(x.size), x, np.zeros_like(x)),
    ],
)
def test_kernels_name_the_first_wrong_element(call):
    values = X.copy()
    values[[400_000, 599_999]] = np.inf

    def run():
        with pytest.raises(fc.NonFiniteError, match="400000"):
            call(values)

    on_threads(run)


@native_backend
@pytest.mark.parametrize("swapped", [1000, 131_071, 400_000, 599_999])
def test_positions_that_do_not_increase_are_refused_by_any_number(swapped):
    for values in ((swapped + 1, swapped), (swapped, swapped), (swapped, 2**40)):
        positions = np.arange(600_001)
        positions[[swapped, swapped + 1]] = values

        def run(positions=positions):
            with pytest.raises(ValueError, match="increase strictly, from 0 to below 600001"):
                ops.backend().pack_sparse(positions, 600_001)

        on_threads(run)


@linux
@native_backend
def test_daemon_threads_at_work_do_not_spoil_the_exit():
    code = """
import threading, time, numpy as np, fedcodec as fc
update, codec = np.ones(900_000, np.float32), fc.parse("topk(0.05) | int8")
def encode():
    while True:
        codec.encode(update)
for _ in range(4):
    threading.Thread(target=encode, daemon=True).start()
time.sleep(0.2)
print("end")
"""
    for number in "13":
        assert report(code, FEDCODEC_NUM_THREADS=number) == "end"
