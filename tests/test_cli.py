import csv
import json
import os
import pickle
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner

import fedcodec as fc
from fedcodec import cli


@pytest.fixture
def invoke():
    def invoke(*arguments, code=0):
        result = CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        assert "Traceback" not in result.output
        if code:
            assert isinstance(result.exception, SystemExit)
        return result.output

    return invoke


SIMULATE = (
    *("simulate", "--rounds", 3, "--clients", 5, "--clients-per-round", 2, "--hidden", "8"),
    *("--jobs", 1, "--codec", "raw", "--codec", "randomk(0.1)|int8"),
)


def test_simulate_twice_gives_the_same_curves(invoke, tmp_path):
    reports = []
    for name in ("first", "second"):
        output = invoke(*SIMULATE, "--seeds", 2, "--first-seed", 3, "--output", tmp_path / name)
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    first, second = ([run["history"] for run in report["runs"]] for report in reports)
    assert first == second
    runs = [(run["codec"], run["seed"]) for run in reports[0]["runs"]]
    assert runs == [(codec, seed) for codec in ("raw", "randomk(0.1) | int8") for seed in (3, 4)]
    assert "randomk(0.1) | int8" in output
    assert f"{100 * reports[1]['summaries'][1]['accuracy']:.2f} ±" in output
    for path in (tmp_path / "first").iterdir():
        assert path.name in output
    with (tmp_path / "first" / "summary.csv").open() as file:
        assert len(list(csv.reader(file))) == 3


def test_simulate_passes_its_options_on(invoke, tmp_path):
    invoke(
        *SIMULATE,
        *("--iid", "--no-error-feedback", "--downlink-delta", "topk(0.1)|int8", "--link", "nb-iot"),
        *("--learning-rate", 0.1, "--momentum", 0.5, "--batch-size", 7, "--local-epochs", 2),
        *("--average-last", 2, "--evaluate-every", 2, "--model", "cnn", "--output", tmp_path),
    )
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings == {
        "dataset": "digits",
        "data_dir": None,
        "model": "cnn",
        "hidden": [8],
        "clients": 5,
        "clients_per_round": 2,
        "dirichlet": None,
        "local_epochs": 2,
        "batch_size": 7,
        "learning_rate": 0.1,
        "momentum": 0.5,
        "rounds": 3,
        "error_feedback": False,
        "downlink": "raw",
        "downlink_delta": "topk(0.1) | int8",
        "link": "nb-iot",
        "average_last": 2,
        "evaluate_every": 2,
        "engine": "built-in",
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--codec", "nope"), "nope"),
        (("--codec", "int8 | topk(0.1)"), "cannot stand before"),
        (("--clients-per-round", 6), "6 clients a round"),
        (("--average-last", 4), "last 4 rounds"),
        (("--hidden", "8,x"), "list of widths"),
        (("--link", "string"), "unknown link"),
        (("--dirichlet", "often"), "not a valid float"),
        (("--dirichlet", -1), "dirichlet must be above zero"),
        (("--dirichlet", "nan"), "dirichlet must be above zero"),
        (("--learning-rate", "inf"), "learning_rate must be above zero and finite"),
        (("--first-seed", 2**64), "--first-seed"),
    ],
)
def test_simulate_refuses_bad_options(options, message, invoke, tmp_path):
    assert message in invoke(*SIMULATE, *options, "--output", tmp_path / "new", code=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "mnist", "--data-dir", "."), "mnist not found"),
        (("--codec", "raw"), "the codec raw appears twice"),
        (("--clients", 1000), "fewer than 10"),
        (("--device", "abacus"), "cannot use the device 'abacus'"),
        (("--device", "meta"), "cannot use the device 'meta'"),
        (("--output", "file/folder"), "Not a directory"),
    ],
)
def test_simulate_explains_before_it_trains_what_it_cannot_run(
    options, message, invoke, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fedcodec.sim.data.MAXIMUM_DRAWS", 3)
    monkeypatch.setattr("fedcodec.sim.study.run_study", None)
    output = invoke(*SIMULATE, *options, code=1)
    assert output.startswith("Error: ")
    assert message in output
    assert output.count("\n") == 1


def test_simulate_says_where_training_diverged(invoke, tmp_path):
    output = invoke(
        *SIMULATE, "--first-seed", 7, "--learning-rate", 1e30, "--output", tmp_path, code=1
    )
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert "raw, seed 7, round 1, client " in line
    assert "is nan" in line
    assert "lower the learning rate" in line


LONG_STUDY = """
import sys
from fedcodec import cli
from fedcodec.sim import study

run = study.run_study
study.run_study = lambda *arguments, on_round: run(
    *arguments, on_round=lambda *cell: print("round", flush=True)
)
sys.argv[1:] = "simulate --rounds 1000000 --hidden 8 --clients 4 --clients-per-round 1".split()
sys.argv += "--codec raw --codec sign --jobs 2 --evaluate-every 1000000 --output out".split()
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_study_end_with_it(number, tmp_path):
    command = [sys.executable, "-c", LONG_STUDY]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as study:
        assert study.stdout.readline() == b"round\n"
        study.send_signal(number)
        try:
            # Every process of the study holds the pipe open.
            output, _ = study.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            pytest.fail("the study did not end")
    assert b"Traceback" not in output


def arrays():
    generator = np.random.default_rng(0)
    return {
        "layer/0.weight": generator.standard_normal((30, 40), dtype=np.float32),
        "file": generator.standard_normal(7),
        "half": np.float16([1.5, -2]),
        "allow_pickle": np.array([True, False]),
        "steps": np.array(123456789012, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def tensors():
    state = {name: torch.tensor(array) for name, array in arrays().items()}
    return state | {"narrow": torch.linspace(-1, 1, 50, dtype=torch.bfloat16).reshape(5, 10)}


def save(path):
    if path.suffix == ".npz":
        cli.write_npz(arrays(), path)
        return {name: torch.tensor(array) for name, array in arrays().items()}
    if path.stem == "plain":
        safetensors.numpy.save_file(arrays(), path)
        return {name: torch.tensor(array) for name, array in arrays().items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors(), path)
    else:
        torch.save(tensors(), path)
    return tensors()


def load(path):
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return {name: torch.tensor(array) for name, array in archive.items()}
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["a.npz", "plain.safetensors", "a.safetensors", "a.pt", "a.pth"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_files_come_back_as_they_were(name, suffix, invoke, tmp_path):
    source, payload, target = tmp_path / name, tmp_path / "payload", tmp_path / f"new{suffix}"
    expected = save(source)
    invoke("compress", source, payload, "--codec", "raw")
    if suffix == ".npz" and "narrow" in expected:
        assert "bfloat16" in invoke("decompress", payload, target, code=1)
        assert not target.exists()
        return
    invoke("decompress", payload, target)
    restored = load(target)
    assert set(restored) == set(expected)
    for key, value in expected.items():
        assert restored[key].dtype == value.dtype
        assert restored[key].shape == value.shape
        assert torch.equal(restored[key], value), key


def test_compress_uses_the_codec_and_says_what_it_saved(invoke, tmp_path):
    source, payload, target = tmp_path / "a.npz", tmp_path / "payload", tmp_path / "b.npz"
    weight = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    np.savez(source, weight=weight)
    output = invoke("compress", source, payload, "--codec", "topk(0.01)|int8")
    size = payload.stat().st_size
    assert f"40,000 bytes of tensors to {size:,}: {40_000 / size:.2f}x" in output
    invoke("decompress", payload, target)
    restored = load(target)["weight"].numpy()
    kept = np.flatnonzero(restored)
    assert set(kept) == set(np.argsort(-np.abs(weight))[:100])
    np.testing.assert_allclose(restored[kept], weight[kept], atol=0.02)


@pytest.mark.parametrize(
    ("update", "names"),
    [([np.ones(2, np.float32), np.zeros(1)], {"0", "1"}), (np.ones(3, np.float32), {"array"})],
)
def test_decompress_names_what_had_no_names(update, names, invoke, tmp_path):
    payload, target = tmp_path / "payload", tmp_path / "new.npz"
    payload.write_bytes(fc.parse("raw").encode(update))
    invoke("decompress", payload, target)
    assert set(load(target)) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_tensors_fit_into_every_format(dtype, invoke, tmp_path):
    weight = torch.ones(3, 2, dtype=dtype)
    torch.save({"a": weight, "b": weight}, tmp_path / "tied.pt")
    invoke("compress", tmp_path / "tied.pt", tmp_path / "payload", "--codec", "raw")
    suffixes = [".safetensors", ".pt"] + [".npz"] * (dtype == torch.float32)
    for suffix in suffixes:
        target = tmp_path / f"new{suffix}"
        invoke("decompress", tmp_path / "payload", target)
        assert torch.equal(load(target)["b"], weight)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_in_a_file_is_run(invoke, tmp_path):
    torch.save({"weight": Bomb(tmp_path / "boom")}, tmp_path / "bomb.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    np.savez(tmp_path / "bomb.npz", weight=np.array([Bomb(tmp_path / "boom")], object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for name in ("bomb.pt", "pickle.pt", "bomb.npz", "pickle.npz"):
        output = invoke("compress", tmp_path / name, tmp_path / "out", "--codec", "raw", code=1)
        assert f"{name}: " in output
        assert output.count("\n") == 1
        # What the libraries advise would run it.
        assert not {"allow_pickle", "weights_only", "unsafely"} & {
            *output.replace("`", " ").split()
        }
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pt"])
def test_damaged_files_are_one_line(name, invoke, tmp_path):
    source = tmp_path / name
    save(source)
    content = source.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2]):
        source.write_bytes(damaged)
        output = invoke("compress", source, tmp_path / "out", "--codec", "raw", code=1)
        assert output.startswith("Error: cannot read")
        assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "it holds a list"),
        ({"weight": torch.ones(2), "epoch": 3}, "under 'epoch' it holds a int"),
        ({1: torch.ones(2)}, "under 1 it holds a Tensor"),
        ({"model": {"a": torch.ones(2)}, "n": 3, "ema": {}}, "dicts under 'model', 'ema'"),
    ],
)
def test_only_state_dicts_are_taken_from_torch(content, message, invoke, tmp_path):
    source = tmp_path / "a.pt"
    torch.save(content, source)
    output = invoke("compress", source, tmp_path / "out", "--codec", "raw", code=1)
    assert "not a state dict" in output
    assert message in output


def test_names_that_are_no_text_are_named(invoke, tmp_path):
    torch.save({"a\ud800": torch.ones(2)}, tmp_path / "a.pt")
    output = invoke("compress", tmp_path / "a.pt", tmp_path / "out", "--codec", "raw", code=1)
    assert r"'a\ud800' holds half a surrogate pair" in output


def test_arrays_whose_names_differ_by_npy_are_kept_apart(invoke, tmp_path):
    update = {"x": np.ones(2), "x.npy": np.zeros(3)}
    np.savez(tmp_path / "a.npz", **update)
    invoke("compress", tmp_path / "a.npz", tmp_path / "payload", "--codec", "raw")
    restored = fc.decode((tmp_path / "payload").read_bytes())
    assert {name: array.tolist() for name, array in restored.items()} == {
        "x": [1, 1],
        "x.npy": [0, 0, 0],
    }


def test_values_that_are_not_numbers_are_named(invoke, tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.array([1, np.nan], np.float32))
    output = invoke("compress", tmp_path / "a.npz", tmp_path / "out", "--codec", "int8", code=1)
    assert "weight" in output


def test_dtypes_that_cannot_be_sent_are_one_line(invoke, tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.array(["text"]))
    output = invoke("compress", tmp_path / "a.npz", tmp_path / "out", "--codec", "raw", code=1)
    assert output.startswith("Error: ")
    assert "weight" in output


def test_bad_arguments_are_usage_errors(invoke, tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "payload").write_bytes(fc.parse("raw").encode(np.ones(3)))
    compress = ("compress", tmp_path / "a.npz", tmp_path / "out")
    assert "nope" in invoke(*compress, "--codec", "nope", code=2)
    assert "--codec" in invoke(*compress, code=2)
    assert "does not exist" in invoke(
        "compress", tmp_path / "b.npz", "out", "--codec", "raw", code=2
    )
    output = invoke("compress", tmp_path / "a.txt", tmp_path / "out", "--codec", "raw", code=2)
    assert ".safetensors" in output
    assert ".npz" in invoke("decompress", tmp_path / "payload", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_damaged_payloads_leave_the_target_as_it_was(invoke, tmp_path):
    target = tmp_path / "new.npz"
    target.write_text("earlier")
    payload = bytearray(fc.parse("raw").encode({"weight": np.ones(100, np.float32)}))
    payload[-20] ^= 1
    (tmp_path / "payload").write_bytes(payload)
    assert invoke("decompress", tmp_path / "payload", target, code=1).startswith("Error: ")
    assert target.read_text() == "earlier"


def test_decompress_refuses_more_than_it_may_allocate(invoke, tmp_path):
    (tmp_path / "payload").write_bytes(fc.parse("topk(0.01)").encode(np.ones(1000, np.float32)))
    decompress = ("decompress", tmp_path / "payload", tmp_path / "new.npz", "--max-bytes")
    assert "Error: " in invoke(*decompress, 3999, code=1)
    invoke(*decompress, 4000)


def test_decompress_says_that_names_are_elsewhere(invoke, tmp_path):
    payload = fc.parse("raw").encode(np.ones(3, np.float32), framing="reference")
    (tmp_path / "payload").write_bytes(payload)
    output = invoke("decompress", tmp_path / "payload", tmp_path / "new.npz", code=1)
    assert "by reference" in output


@pytest.mark.parametrize(
    ("suffix", "names", "message"),
    [
        (".npz", ["a\0b"], r"'a\x00b' does not fit into .npz: it has a NUL"),
        (".npz", ["ok", "x", "x.npy"], "'x' does not fit into .npz: numpy.load"),
        (".npz", ["/etc/x"], "'/etc/x' does not fit into .npz: it is a path"),
        (".npz", ["a/../../x"], "'a/../../x' does not fit into .npz: it is a path"),
        (".npz", ["..\\x"], "does not fit into .npz: it is a path"),
        (".npz", ["n" * 65532], "65,532 bytes are too many"),
        (".safetensors", ["__metadata__"], "'__metadata__' does not fit into .safetensors"),
    ],
)
def test_names_that_a_format_cannot_give_back_are_named(suffix, names, message, invoke, tmp_path):
    payload, target = tmp_path / "payload", tmp_path / f"new{suffix}"
    payload.write_bytes(fc.parse("raw").encode({name: np.ones(2) for name in names}))
    output = invoke("decompress", payload, target, code=1)
    assert message in output
    assert output.count("\n") == 1
    assert len(output) < 1000
    assert [*tmp_path.iterdir()] == [payload]
    invoke("decompress", payload, tmp_path / "new.pt")
    assert set(load(tmp_path / "new.pt")) == set(names)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_that_only_look_odd_come_back(suffix, invoke, tmp_path):
    names = {"n" * 65531, "a/b", "a..b", "x.npy", "", " "}
    (tmp_path / "payload").write_bytes(fc.parse("raw").encode({name: np.ones(2) for name in names}))
    invoke("decompress", tmp_path / "payload", tmp_path / f"new{suffix}")
    assert set(load(tmp_path / f"new{suffix}")) == names


def test_extensions_may_be_upper_case(invoke, tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    invoke("compress", tmp_path / "A.NPZ", tmp_path / "payload", "--codec", "raw")
    invoke("decompress", tmp_path / "payload", tmp_path / "B.NPZ")
    with np.load(tmp_path / "B.NPZ") as archive:
        assert archive["weight"].tolist() == [1, 1, 1]


def test_more_tensors_than_a_stranger_may_send_are_fine_in_a_file(invoke, tmp_path):
    count = fc.Limits().max_tensors + 1
    payload = fc.parse("raw").encode([np.empty(0, np.uint8)] * count)
    (tmp_path / "payload").write_bytes(payload)
    assert f"list of {count:,} tensors" in invoke("inspect", tmp_path / "payload")
    invoke("decompress", tmp_path / "payload", tmp_path / "new.safetensors")
    assert len(load(tmp_path / "new.safetensors")) == count


SUFFIXES = pytest.mark.parametrize("suffix", cli.SUFFIXES)


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(fc.parse("raw").encode({"weight": np.ones(10_000, np.float32)}))
    return path


@SUFFIXES
def test_a_new_file_has_the_mode_that_the_umask_leaves_and_an_old_one_keeps_its_own(
    suffix, payload, invoke, tmp_path
):
    target = tmp_path / f"new{suffix}"
    before = os.umask(0o027)
    try:
        invoke("decompress", payload, target)
        assert target.stat().st_mode & 0o777 == 0o640
        target.chmod(0o604)
        invoke("decompress", payload, target)
        assert target.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


@SUFFIXES
def test_links_are_written_through(suffix, payload, invoke, tmp_path):
    (tmp_path / "folder").mkdir()
    link, real = tmp_path / f"link{suffix}", tmp_path / "folder" / f"real{suffix}"
    link.symlink_to(real)
    for _ in range(2):  # a link to nothing, then to a file
        invoke("decompress", payload, link)
        assert link.is_symlink()
        assert set(load(real)) == {"weight"}
        assert [*(tmp_path / "folder").iterdir()] == [real]


@SUFFIXES
def test_the_longest_file_names_work(suffix, payload, invoke, tmp_path):
    target = tmp_path / ("n" * (255 - len(suffix)) + suffix)
    invoke("decompress", payload, target)
    assert set(load(target)) == {"weight"}


@SUFFIXES
def test_a_missing_folder_is_reported_by_the_name_that_was_given(
    suffix, payload, invoke, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = invoke("decompress", payload, f"nowhere/new{suffix}", code=1)
    assert output == f"Error: cannot write nowhere/new{suffix}: No such file or directory\n"


@SUFFIXES
def test_a_full_disk_is_one_line_and_leaves_the_target_as_it_was(suffix, payload, tmp_path):
    target = tmp_path / f"new{suffix}"
    target.write_text("earlier")
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import fedcodec.cli as cli, fedcodec as fc; import torch, safetensors.torch;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (5000, {resource.RLIM_INFINITY}));"
        f"cli.commands(['decompress', {str(payload)!r}, {str(target)!r}])"
    )
    result = run_python(code)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: cannot write {target}: ")
    assert result.stderr.count("\n") == 1
    assert target.read_text() == "earlier"
    assert {*tmp_path.iterdir()} == {payload, target}


def test_being_ended_while_writing_leaves_the_target_and_no_rubbish(payload, tmp_path):
    target = tmp_path / "new.npz"
    target.write_text("earlier")
    code = f"""
import os, signal, sys, time
from fedcodec import cli
def write(update, path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
cli.write_npz = write
sys.argv[1:] = ["decompress", {str(payload)!r}, {str(target)!r}]
cli.main()
"""
    result = run_python(code)
    assert (result.returncode, result.stderr) == (128 + signal.SIGTERM, "")
    assert target.read_text() == "earlier"
    assert {*tmp_path.iterdir()} == {payload, target}


def test_memory_that_is_not_there_is_one_line(invoke, tmp_path):
    (tmp_path / "payload").write_bytes(fc.parse("topk(0.1)").encode(np.ones(10)))
    payload = bytearray((tmp_path / "payload").read_bytes())
    assert payload.count(b"\x01\x0a") == 1
    huge = bytes(payload).replace(b"\x01\x0a", b"\x01" + fc.reader.varint(1 << 58))[:-4]
    (tmp_path / "payload").write_bytes(huge + fc.ops.crc32(huge).to_bytes(4, "little"))
    arguments = ("decompress", tmp_path / "payload", tmp_path / "new.npz", "--max-bytes", 1 << 62)
    output = invoke(*arguments, code=1)
    assert output.startswith("Error: ")
    assert output.count("\n") == 1


def test_long_texts_are_shortened(invoke, tmp_path):
    for options in (("--codec", "a" * 100_000), ("--link", "b" * 100_000)):
        output = invoke(*SIMULATE, *options, code=2)
        assert "..." in output
        assert len(output) < 1500


def test_inspect_tells_everything_in_the_header(invoke, tmp_path):
    weight = np.arange(1000, dtype=np.float32).reshape(10, 100)
    update = {"weight": weight, "tied": weight, "steps": np.array(3)}
    payload = (fc.TopK(0.1) | fc.Int8()).encode(update, base=b"01234567")
    (tmp_path / "payload").write_bytes(payload)
    info = fc.inspect(payload)
    output = invoke("inspect", tmp_path / "payload")
    for text in (
        f"format version  {info.version}\n",
        "inline",
        info.spec_digest.hex(),
        b"01234567".hex(),
        info.codec,
        f"{len(payload):,} bytes",
        "4,008 bytes",
        f"{4008 / len(payload):.2f}x",
        "dict of 3 tensors",
        "'weight'  float32 (10, 100)\n",
        "'tied'  float32 (10, 100), the memory of 'weight'\n",
        "'steps'  int64 ()\n",
    ):
        assert text in output, text


def test_inspect_reads_payloads_by_reference_and_refuses_others(invoke, tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(fc.parse("sign").encode(np.ones(3, np.float32), framing="reference"))
    output = invoke("inspect", path)
    assert "reference" in output
    assert "uncompressed" not in output
    path.write_bytes(b"something else entirely")
    assert invoke("inspect", path, code=1).startswith("Error: ")


def test_info_names_versions_and_backends(invoke):
    output = invoke("info")
    for text in (np.__version__, fc.info()["active"], fc.info()["cuda"]):
        assert text in output


def test_version(invoke):
    assert fc.__version__ in invoke("--version")


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_command_line_loads_no_torch_by_itself():
    code = (
        "import sys; import fedcodec.cli; print({'torch', 'matplotlib', 'rich'} & {*sys.modules})"
    )
    assert run_python(code).stdout == "set()\n"


def test_missing_packages_are_named():
    result = run_python("import sys; sys.modules['click'] = None; import fedcodec.cli")
    assert result.returncode == 1
    assert result.stderr == "the fedcodec command needs click: pip install 'fedcodec[cli]'\n"
    result = run_python(
        "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['simulate'];"
        "from fedcodec.cli import main; main()"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: this needs torch")


def test_help_shows_the_example_line_by_line(invoke):
    assert "\n    --batch-size 32 --rounds 300 --seeds 5\n" in invoke("simulate", "--help")


def test_input_and_output_must_differ(invoke, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, w=np.ones(10, np.float32))
    before = path.read_bytes()
    for command in (("compress", path, path, "--codec", "topk(0.1)"), ("decompress", path, path)):
        assert "is the input too" in invoke(*command, code=2)
    assert path.read_bytes() == before


def test_a_file_that_is_no_payload_is_called_so(invoke, tmp_path):
    (tmp_path / "short").write_bytes(b"hi")
    for command in (["inspect"], ["decompress", tmp_path / "out.npz"]):
        output = invoke(command[0], tmp_path / "short", *command[1:], code=1)
        assert "not a fedcodec payload" in output


def test_compress_names_the_file_of_a_nan(invoke, tmp_path):
    np.savez(tmp_path / "bad.npz", w=np.array([np.nan], np.float32))
    output = invoke("compress", tmp_path / "bad.npz", tmp_path / "out", "--codec", "raw", code=1)
    assert "bad.npz: tensor 'w'" in output


@pytest.mark.parametrize("option", ["--codec", "--downlink", "--downlink-delta"])
def test_a_mask_is_refused_before_the_simulation_starts(invoke, tmp_path, option):
    text = 'mask("0123456789abcdef") | int8'
    options = ["--codec", "raw"] if option != "--codec" else []
    output = invoke(
        *("simulate", "--rounds", 1, "--clients", 2, "--clients-per-round", 2, "--jobs", 1),
        *("--average-last", 1, "--output", tmp_path / "out", *options, option, text),
        code=1,
    )
    assert "names a mask by its digest alone" in output
    assert not (tmp_path / "out").exists()
