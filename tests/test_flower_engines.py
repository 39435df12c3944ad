"""fedcodec inside Flower's own processes: SuperLink, SuperNodes, simulation."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from flower_app.engine_app import SHAPES, initial, step
from flower_engine import Engine, free_port, marked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with Engine(tmp_path_factory.mktemp("deployment")) as engine:
        yield engine
    assert marked(engine.mark) == []


def measured(engine, **config):
    """Run one round; return what the links of all nodes counted for each, and what was written."""
    before = [link.counts() for link in engine.links]
    output, log = engine.run(rounds=1, **config)
    assert (output / "result.json").exists(), log
    after = [link.counts() for link in engine.links]
    counted = np.subtract(after, before)
    return counted, np.load(output / "arrays.npz"), json.loads((output / "result.json").read_text())


def test_bytes_of_48_megabytes(deployment):
    raw, exact, _ = measured(deployment, model="48 MB")
    int8, coded, result = measured(deployment, model="48 MB", uplink="int8", downlink="int8")
    sparse, _, _ = measured(deployment, model="48 MB", uplink="topk(0.01) | int8")
    for node in range(2):
        up = raw[node, 0] / int8[node, 0]
        print(
            f"node {node}: int8: uplink {up:.2f}x, both {raw[node, :2].sum() / int8[node, :2].sum():.2f}x"
        )
        print(f"node {node}: top-k 1 % + int8: uplink {raw[node, 0] / sparse[node, 0]:.1f}x")
        assert up >= 3.9
        assert raw[node, :2].sum() / int8[node, :2].sum() >= 3.8
        assert raw[node, 0] / sparse[node, 0] >= 90
        # The metrics say what the link saw, but for HTTP.
        metrics = result["metrics"][0]
        assert (
            metrics["fedcodec.uplink-bytes"]
            <= int8[node, 0]
            <= metrics["fedcodec.uplink-bytes"] + 200_000
        )
    for name in exact.files:
        assert np.abs(exact[name] - coded[name]).max() <= 2 * 9.5 / 254  # half a step each way
        wanted = (
            initial("48 MB")[name] + (step("48 MB", 0, 1)[name] + step("48 MB", 1, 1)[name]) / 2
        )
        assert np.array_equal(exact[name], wanted)


def test_requests_of_81_tensors(deployment):
    assert len(SHAPES["81 tensors"]) == 81
    raw, _, _ = measured(deployment, model="81 tensors")
    coded, _, _ = measured(deployment, model="81 tensors", uplink="int8", downlink="int8")
    for node in range(2):
        print(f"node {node}: {raw[node, 2]} requests raw, {coded[node, 2]} by payloads")
        assert raw[node, 2] >= 10 * coded[node, 2]


def test_a_killed_node_goes_on_where_it_was(tmp_path):
    pause = tmp_path / "pause"
    pause.mkdir()
    (pause / "0-2").touch()  # partition 0, round 2
    with Engine(tmp_path / "engine", state=True) as engine:
        run, output = engine.begin(
            uplink="topk(0.05)",
            rounds=3,
            flush=True,
            evaluate=False,
            timeout=15.0,
            pause=str(pause),
        )
        end = time.monotonic() + 120
        while not (pause / "reached").exists():
            assert time.monotonic() < end
            assert run.poll() is None, engine.log("run")
            time.sleep(0.1)
        engine.kill_node(0)
        engine.start_node(0)
        run.wait(240)
        log = engine.log("run")
        assert (output / "result.json").exists(), log
    # Round 2 of the killed node never was; all else arrived, once, the residual from before included.
    for partition, rounds in [(0, (1, 3, 1)), (1, (1, 2, 3, 1))]:
        arrived = np.load(output / f"arrived-{partition}.npz")["weight"]
        wanted = sum(step("1 kB", partition, number)["weight"] for number in rounds)
        assert np.array_equal(arrived, wanted)


def test_simulation(tmp_path):
    with Engine(tmp_path, nodes=0) as engine:
        output, log = engine.run(
            federation="num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2",
            uplink="topk(0.05)",
            downlink="raw",
            rounds=3,
            clients=4,
            flush=True,
        )
        assert (output / "result.json").exists(), log + engine.log("superlink")
    assert marked(engine.mark) == []
    for partition in range(4):
        arrived = np.load(output / f"arrived-{partition}.npz")["weight"]
        wanted = sum(step("1 kB", partition, number)["weight"] for number in (1, 2, 3, 1))
        assert np.array_equal(arrived, wanted)


def test_the_simulator_gives_the_same_curve_on_both_engines(tmp_path):
    histories = []
    for engine in ("built-in", "flower"):
        output = tmp_path / engine
        command = [sys.executable, "-m", "fedcodec.cli", "simulate", "--engine", engine]
        command += ["--clients", "6", "--clients-per-round", "4", "--rounds", "4"]
        command += ["--codec", "topk(0.1) | int8(stochastic=True)", "--jobs", "1"]
        command += ["--downlink", "int8(stochastic=True)", "--output", str(output)]
        subprocess.run(command, check=True, timeout=300)
        report = json.loads((output / "report.json").read_text())
        assert report["settings"]["engine"] == engine
        (run,) = report["runs"]
        histories.append(run["history"])
    for key in ("accuracy", "loss"):
        assert histories[0][key] == histories[1][key]
    assert len(set(histories[0]["accuracy"])) > 1
    for here, there in zip(*(history["uplink_bytes"] for history in histories), strict=True):
        assert there == here + 4 * 8  # the name of the model in each client's payload


@pytest.mark.parametrize("way", ["simulation", "deployment"])
def test_the_example(way):
    example = Path(__file__).parents[1] / "examples" / "flower"
    environment = os.environ | {"PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, example / "run.py", way],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=True,
    )
    accuracies = [float(text) for text in re.findall(r"'accuracy': '([0-9.e+-]+)'", done.stdout)]
    assert len(accuracies) == 5, done.stdout
    assert accuracies[-1] > 0.9
    assert max(map(float, re.findall(r"uplink-bytes': '([0-9.e+-]+)'", done.stdout))) < 600
