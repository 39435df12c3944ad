"""The acceptance study in small, on the real data set where it is at hand."""

import json
import os
import subprocess
import sys

import pytest

CODECS = ["raw", "topk(0.05) | ternary", "topk(0.002) | ternary", "topk(0.01) | int8"]


@pytest.mark.slow
def test_compressed_uplinks_learn_and_are_as_small_as_promised(tmp_path):
    if "FEDCODEC_DATA_DIR" not in os.environ:
        pytest.skip("FEDCODEC_DATA_DIR is not set, and Fashion-MNIST does not come with fedcodec")
    command = [sys.executable, "-m", "fedcodec.cli", "simulate", "--dataset", "fashion-mnist"]
    command += ["--clients", "100", "--batch-size", "32", "--rounds", "30", "--average-last", "5"]
    command += ["--evaluate-every", "30", "--jobs", "2", "--output", str(tmp_path)]
    for codec in CODECS:
        command += ["--codec", codec]
    subprocess.run(command, check=True, timeout=900)
    runs = {run["codec"]: run for run in json.loads((tmp_path / "report.json").read_text())["runs"]}
    assert list(runs) == CODECS
    for codec, run in runs.items():
        largest = max(run["history"]["largest_payload_bytes"])
        assert largest <= 1.10 * run["ideal_bytes"] + 32, codec
        accuracy = sum(run["history"]["accuracy"][-5:]) / 5
        assert accuracy > 0.4, codec  # ten classes: chance is 0.1
