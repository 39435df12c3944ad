"""`fedcodec bench`: what it measures is right, in turn, and reported as it was; how fast is nobody's business here."""

import itertools
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import fedcodec as fc
from fedcodec import ops
from fedcodec.bench import data, measure, memory, peers, report, suite
from fedcodec.bench.cases import Case, rows
from fedcodec.bench.measure import Timed, on_isa, on_threads, time_in_turn
from fedcodec.cli import commands

native = pytest.importorskip("fedcodec._native", reason="roofs are compiled")
pytestmark = pytest.mark.native

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STORES = measure.STORES


# --- roofs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 0), (5000, 1), (70_001, 17_500), (3, 40_000)])
def test_a_roof_reads_and_writes_all_and_no_more(store, n, m):
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 256, size, np.uint8) for size in (n, m))
    around = np.zeros(m + 2, np.uint8)
    read = native.roof(a, b, around[1:-1], store)
    assert read == np.bitwise_xor.reduce(a) ^ np.bitwise_xor.reduce(b)
    assert (around[1:-1] == 0x5A).all()
    assert around[0] == around[-1] == 0


@pytest.mark.parametrize("store", STORES)
def test_a_roof_may_write_where_it_reads(store):
    a = np.arange(40_000, dtype=np.uint16)
    expected = np.bitwise_xor.reduce(a.view(np.uint8))
    assert native.roof(None, a, a, store) == expected
    assert (a == 0x5A5A).all()


def test_a_roof_refuses_what_it_cannot_do():
    kept = np.zeros(4)
    kept.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        native.roof(None, None, kept)
    with pytest.raises(ValueError, match="sideways"):
        native.roof(kept, store="sideways")
    with pytest.raises(TypeError, match="b must be"):
        native.roof(kept, np.zeros((2, 2)))


# --- measurement ----------------------------------------------------------------------------------


def test_all_are_timed_once_a_round_in_turn(monkeypatch):
    calls = []

    def slow(name):
        def run():
            calls.append(name)
            stop = measure.time.perf_counter() + 2 * measure.LEAST_SECONDS
            while measure.time.perf_counter() < stop:
                pass

        return run

    monkeypatch.setattr(measure, "SHORT_SECONDS", 0)
    timed = [Timed(slow("a")), Timed(slow("b"))]
    time_in_turn(timed, rounds=3)
    assert "".join(calls) == "aabb" + 3 * "ab"
    assert [len(one.seconds) for one in timed] == [3, 3]


def test_what_is_short_is_timed_by_many_calls(monkeypatch):
    calls = []
    each = measure.LEAST_SECONDS / 128  # of a clock that only calls move
    clock = SimpleNamespace(perf_counter=lambda: len(calls) * each)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "SHORT_SECONDS", 0)
    timed = Timed(lambda: calls.append(0))
    time_in_turn([timed], rounds=1)
    assert len(calls) == 2 + 129
    assert timed.seconds == pytest.approx([each])


def test_a_short_call_is_made_once_more_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0)
    monkeypatch.setattr(measure, "SHORT_SECONDS", 1e9)
    calls = []
    time_in_turn([Timed(lambda: calls.append("a")), Timed(lambda: calls.append("b"))], rounds=2)
    assert "".join(calls) == "aabb" + 2 * "aabb"


def test_variants_run_ours_where_they_say_and_leave_all_as_it_was():
    before = ops.active(), fc.get_num_threads()
    other = next(name for name in ops.available() if name != before[0])
    found = set()
    case = Case(
        np.ones(3, np.float32), lambda: found.add((ops.active(), fc.get_num_threads())) or b""
    )
    variants = {"3 threads": partial(on_threads, 3), other: partial(on_isa, other)}
    timing = measure.measure(case, 1, variants)
    assert found == {before, (before[0], 3), (other, before[1])}
    assert list(timing.variants) == list(variants)
    assert (ops.active(), fc.get_num_threads()) == before


@pytest.mark.parametrize("within", [partial(on_threads, 3), partial(on_isa, "reference")])
def test_a_variant_ends_with_an_error_too(within):
    before = ops.active(), fc.get_num_threads()
    with pytest.raises(ZeroDivisionError), within():
        1 / 0  # noqa: B018
    assert (ops.active(), fc.get_num_threads()) == before


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0)
    monkeypatch.setattr(measure, "SHORT_SECONDS", 0)
    seconds = itertools.count(0, 3)  # every call takes 3 s
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(seconds))
    calls = []
    all_timed = [Timed(partial(calls.append, patience), patience) for patience in (2, 5, 99)]
    time_in_turn(all_timed, rounds=4)
    assert [timed.seconds for timed in all_timed] == [[3], [3, 3], [3, 3, 3, 3]]
    assert [calls.count(patience) for patience in (2, 5, 99)] == [2, 4, 6]


def test_ratios_are_taken_within_a_round():
    ours, roof = Timed(lambda: None), Timed(lambda: None)
    ours.seconds, roof.seconds = [2.0, 20.0, 9.0], [1.0, 10.0, 3.0]
    assert ours.over(roof) == 2
    assert roof.median == 3


def test_a_wrong_result_is_no_benchmark():
    values = np.ones(3, np.float32)
    right = Case(values, lambda: (values, b"", 1.0))
    measure.check(right)
    calls = itertools.count()
    wrong = Case(values, lambda: [values, {"call": np.array(next(calls))}])
    with pytest.raises(AssertionError, match="than the reference"):
        measure.check(wrong)


def test_a_wrong_result_of_a_variant_is_no_benchmark():
    threaded = Case(np.ones(3, np.float32), lambda: float(fc.get_num_threads()))
    with on_threads(1):
        measure.check(threaded)
        with pytest.raises(AssertionError, match=r"threads: 3\) gives another result"):
            measure.check(threaded, {"3 threads": partial(on_threads, 3)})


def test_sums_are_checked_from_zero():
    (row,) = rows("int8 decode and add")
    case = row.build(data.values("student-t", 5000))
    case.run()
    measure.check(case)


# --- what is measured -----------------------------------------------------------------------------

SAME = [
    "top-k 1 %", "top-k 1 %: compaction alone",
    "mask: apply", "mask: pack", "mask: unpack", "signs: pack", "signs: unpack", "float16: narrow",
    "float16: widen", "4 bits: pack", "4 bits: unpack", "crc32", "positions: unpack",
]  # fmt: skip


@pytest.fixture
def no_library(monkeypatch):
    """Others are found, but only those that need no library: those may start threads."""

    def load(name):
        raise ModuleNotFoundError(f"no {name}")

    monkeypatch.setattr(peers, "enabled", True)
    monkeypatch.setattr(peers, "skipped", {})
    monkeypatch.setattr(peers, "load", load)


@pytest.mark.parametrize("name", SAME)
def test_others_do_the_same_job(name, no_library):
    (row,) = rows(f"^{name}$")
    case = row.build(data.values("student-t", 20_000))
    assert len(case.peers) == 1
    (theirs,) = (run() for run in case.peers.values())
    ours = case.run()
    if name == "positions: unpack":
        ours, _ = ours
    for mine, other in zip(*map(as_tuple, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(mine, other.view(mine.dtype) if "narrow" in name else other)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_missing_libraries_are_skipped_with_the_reason(no_library):
    values = data.values("normal", 1000)
    assert set(peers.find("top-k", values, 10)) == {"NumPy argpartition"}
    assert peers.skipped["torch.topk"] == "ModuleNotFoundError: no torch"


def test_deltas_are_what_training_changed():
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    delta = data.values("delta", 64_000)
    assert abs(delta.size - 64_000) < 640
    assert delta.dtype == np.float32
    assert 0 < np.abs(delta).max() < 1


def test_the_layouts():
    update = data.resnet50()
    assert len(update) == 161
    assert sum(array.size for array in update.values()) == 25_557_032
    assert [array.size for array in data.lora().values()] == 400 * [512]


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_memory_sees_what_native_code_allocates(threads):
    if not sys.platform.startswith("linux"):
        pytest.skip("read from /proc")
    extra, payload = memory.peak_extra("raw", 4_000_000, threads)
    assert payload > 16_000_000
    assert payload - 2**20 < extra < 3 * payload


def test_peak_memory_sees_what_is_allocated_from_freed_memory():
    if not sys.platform.startswith("linux"):
        pytest.skip("read from /proc")
    extra, payload = memory.peak_extra("topk(0.01) | int8", 8_000_000)
    assert extra > payload


# --- reports --------------------------------------------------------------------------------------

PATTERN = r"^(?!.*(ResNet|memory of encode (?!raw)))"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What one quick run of everything but the largest wrote, by suffix."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "fedcodec.cli", "bench", "--quick", "--no-peers"]
    command += ["--rows", PATTERN, "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in folder.iterdir()}


def test_a_quick_run_measures_every_row(quick):
    found = json.loads(quick[".json"].read_text(encoding="utf-8"))
    assert found["rounds"] == 1
    assert found["info"]["threads"] == 1
    assert found["threads"] == min(2, suite.processors())
    assert found["isa"] == ("avx2" if ops.active() == "avx512" else None)
    variants = [f"{found['threads']} threads"] if found["threads"] > 1 else []
    variants += [found["isa"]] if found["isa"] else []
    assert found["info"]["active"] == ops.active()
    assert [row["name"] for row in found["rows"]] == [row.name for row in rows(PATTERN)]
    for row in found["rows"]:
        assert row["values"] == 64_000 or row["kind"] == "layout"
        assert row["seconds"] > 0
        assert row["over_read"] > 0
        assert row["over_copy"] > 0
        assert row["peers"] == {}
        assert list(row["variants"]) == variants
        to_few_places = re.match("add (topk|.*(values|tensors))|positions: [sw]", row["name"])
        assert (row["roof_seconds"] is None) == (row["over_roof"] is None) == bool(to_few_places)
        for seconds, ratio in [*row["variants"].values(), *row["beside"].values()]:
            assert seconds > 0
            assert ratio > 0
    assert [row["threads"] for row in found["memory"]] == sorted({1, found["threads"]})
    assert all(row["payload_bytes"] > 0 for row in found["memory"])


def test_the_table_and_the_chart(quick):
    table = quick[".md"].read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in lines[:40]}) == 1
    found = json.loads(quick[".json"].read_text(encoding="utf-8"))
    assert (f"time/{found['threads']} threads" in lines[0]) == (found["threads"] > 1)
    assert (f"{found['isa']}/time" in lines[0]) == bool(found["isa"])
    for row in rows(PATTERN):
        assert f"| {report._cell(row.name)} |" in table
    assert quick[".png"].read_bytes()[:4] == b"\x89PNG"


def test_others_are_measured_on_the_first_distribution_only(monkeypatch):
    monkeypatch.setattr(peers, "hold_to_one_thread", lambda: None)
    found = suite.run([1000], ["normal", "equal"], "^mask: pack$", rounds=1)
    assert [(row["distribution"], set(row["peers"])) for row in found["rows"]] == [
        ("normal", {"NumPy"}),
        ("equal", set()),
    ]
    assert "NumPy" in report.markdown(found)


def test_threads_show_what_they_gain_and_instruction_sets_what_they_cost(monkeypatch):
    monkeypatch.setattr(suite, "processors", lambda: 8)
    monkeypatch.setattr(peers, "hold_to_one_thread", lambda: None)
    other = next(name for name in ops.available() if name != ops.active())
    before = ops.active(), fc.get_num_threads()
    found = suite.run([1000], ["equal"], "^mask: pack$", 1, threads=4, isa=other)
    assert (ops.active(), fc.get_num_threads()) == before
    (row,) = found["rows"]
    row["variants"] = {"4 threads": (1.0, 0.25), other: (1.0, 1.5)}
    row["peers"] = {"slow": (1.0, 1234.5), "quick": (1.0, 0.123)}
    *_, header, _, line = report.markdown(found).splitlines()
    assert f"| time/M | time/4 threads | {other}/time |" in header
    assert "| 4.00 | 1.50 | slow 1234x, quick 0.12x |" in line


def test_variants_that_are_none_are_left_out(monkeypatch):
    monkeypatch.setattr(suite, "processors", lambda: 1)
    monkeypatch.setattr(peers, "hold_to_one_thread", lambda: None)
    found = suite.run([1000], ["equal"], "^mask: pack$", 1, threads=4, isa=ops.active())
    assert (found["threads"], found["isa"]) == (1, None)
    assert found["rows"][0]["variants"] == {}


def test_an_instruction_set_that_is_not_there_ends_a_run_at_once():
    with pytest.raises(fc.BackendError, match="'mmx' cannot be used"):
        suite.run([1000], ["equal"], isa="mmx", on_row=pytest.fail)


def test_an_error_leaves_the_number_of_threads_as_it_was(monkeypatch):
    monkeypatch.setattr(peers, "hold_to_one_thread", lambda: None)

    def fail(row):
        assert fc.get_num_threads() == 1
        raise KeyboardInterrupt

    with on_threads(3):
        with pytest.raises(KeyboardInterrupt):
            suite.run([1000], ["equal"], on_row=fail)
        assert fc.get_num_threads() == 3


def test_the_chart_is_of_the_largest_size_of_the_first_distribution(monkeypatch, tmp_path):
    row = {"name": "crc32", "kind": "kernel", "roof_seconds": 1.0, "over_roof": 2.0, "peers": {}}
    sizes = [("student-t", 1000), ("delta", 1001), ("student-t", 2000), ("delta", 2002)]
    found = [{**row, "distribution": name, "values": size} for name, size in sizes]
    titles = []
    axes = pytest.importorskip("matplotlib.axes", reason="matplotlib is not installed").Axes
    monkeypatch.setattr(axes, "set_title", lambda self, title, **kwargs: titles.append(title))
    report.draw(tmp_path / "chart.png", {"machine": "m", "rows": found})
    assert titles == ["2,000 float32 values, m"]


def test_without_compiled_code_there_is_no_roof(monkeypatch):
    monkeypatch.setattr(ops, "available", lambda: ("reference",))
    with pytest.raises(fc.BackendError, match="roofs"):
        suite.run([1000], ["normal"])


@pytest.mark.parametrize(
    "arguments",
    [("--sizes", "1G"), ("--sizes", ""), ("--sizes", "0"), ("--sizes", "infM"), ("--rows", "(")],
)
def test_arguments_that_make_no_sense(arguments):
    done = CliRunner().invoke(commands, ["bench", *arguments])
    assert done.exit_code == 2
    assert arguments[0] in done.output


@pytest.mark.parametrize(
    ("text", "sizes"), [("64K,1M,25.6M", (64_000, 1_000_000, 25_600_000)), ("7", (7,))]
)
def test_sizes(text, sizes, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        suite, "run", lambda sizes, *rest, **more: seen.append(sizes) or {"skipped": {}}
    )
    monkeypatch.setattr(report, "write_report", lambda folder, run: [])
    assert CliRunner().invoke(commands, ["bench", "--sizes", text]).exit_code == 0
    assert seen == [sizes]


def test_the_benchmarks_of_pytest():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-k", "crc32"]
    done = subprocess.run(
        [*command, str(BENCHMARKS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCHMARKS.parent,
    )
    assert done.returncode == 0, done.stdout
