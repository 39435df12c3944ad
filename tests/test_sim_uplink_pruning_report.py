"""The study of Jeurkar et al. in small."""

import csv
import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fedcodec import cli
from fedcodec.sim import uplink_pruning
from fedcodec.sim.settings import Settings
from fedcodec.sim.uplink_pruning import EXPERIMENTS, PAPER_SETTINGS, study_cells
from fedcodec.sim.uplink_pruning_report import PUBLISHED, accuracies, sizes, write_report


def cell(seed, amount, accuracy, column="delta"):
    return {
        "model": "simple-cnn",
        "dataset": "mnist",
        "kind": "unstructured",
        "amount": amount,
        "column": column,
        "seed": seed,
        "payload_bytes": [[100, 120], [100, 100], [90, 110]],
        "accuracy": accuracy,
        "best_accuracy": max(accuracy),
        "best_round": accuracy.index(max(accuracy)) + 1,
        "test_images": None,
    }


RESULTS = {
    "simple-cnn-mnist-unstructured-0-delta-0": cell(0, 0.0, [0.5, 0.9, 0.8]),
    "simple-cnn-mnist-unstructured-0-delta-1": cell(1, 0.0, [0.5, 0.7, 0.9]),
    "simple-cnn-mnist-unstructured-80-delta-0": cell(0, 0.8, [0.4, 0.86, 0.89]),
    "simple-cnn-mnist-unstructured-80-delta-1": cell(1, 0.8, [0.4, 0.6, 0.8]),
    "sizes-simple-cnn-mnist-0": [
        {
            "kind": "unstructured",
            "amount": 0.8,
            "column": column,
            "payload_bytes": 70_000 + extra,
            "int8_payload_bytes": 20_000 + extra,
            "ideal_bytes": 69_000.0,
            "int8_ideal_bytes": 19_900.0,
        }
        for column, extra in (("weights", 10), ("delta", 20))
    ],
}


def test_the_papers_table_is_whole():
    assert set(PUBLISHED) == {
        (experiment.model, experiment.dataset, kind)
        for experiment in EXPERIMENTS
        for kind in ("unstructured", "structured")
    }
    for row in PUBLISHED.values():
        assert [len(row.accuracy), len(row.megabytes), len(row.best_round)] == [10, 10, 10]


def test_seeds_are_summarised_and_compared_in_pairs():
    dense, pruned = accuracies(RESULTS)
    assert (dense.amount, pruned.amount) == (0.0, 0.8)
    assert dense.best_accuracy == pytest.approx(0.9)
    assert dense.best_round == 2.5
    assert dense.rounds_to_target == 2.5  # two rounds and three
    assert dense.bytes_to_target == pytest.approx((420 + 620) / 2)
    assert pruned.difference == pytest.approx((-0.01 - 0.1) / 2)
    assert pruned.final_difference == pytest.approx((0.09 - 0.1) / 2)
    assert pruned.rounds_to_target is None  # the second seed never gets there
    assert pruned.paper_accuracy == 0.87


def test_sizes_take_the_larger_payload_over_the_ideal():
    (size,) = sizes(RESULTS)
    assert size.over_ideal == pytest.approx(70_020 / 69_000)
    assert size.int8_over_ideal == pytest.approx(20_020 / 19_900)
    assert size.paper_bytes == 80_000


def test_a_page_has_ours_and_the_papers(tmp_path):
    paths = write_report(
        tmp_path, PAPER_SETTINGS, range(2), RESULTS, "JPEG <here>", {"mnist": "MNIST & more"}
    )
    assert [path.name for path in paths] == [
        "accuracy.csv",
        "pruning.html",
        "pruning.json",
        "sizes.csv",
    ]
    page = (tmp_path / "pruning.html").read_text()
    for text in (
        "JPEG &lt;here&gt;",
        "MNIST &amp; more",
        "84.50",
        "0.070",
        "1.0148",
        "2 of 100 clients",
        "-5.50",
    ):
        assert text in page, text
    with (tmp_path / "accuracy.csv").open() as file:
        assert [row["amount"] for row in csv.DictReader(file)] == ["0.0", "0.8"]
    assert json.loads((tmp_path / "pruning.json").read_text())["cells"] == RESULTS


def test_all_cells_are_trained_on_a_gpu_and_those_that_can_be_on_processors():
    whole = study_cells(Settings(device="cuda", rounds=25), range(3))
    assert len(whole) == 3 + 60 * 2 * 3
    here = study_cells(PAPER_SETTINGS, range(3))
    large = [name for name in here if name.startswith("resnet12")]
    assert large == [
        f"resnet12-cifar10-unstructured-{amount}-{column}-0"
        for amount in (0, 80)
        for column in ("weights", "delta")
    ]
    assert len(here) == 3 + 20 * 2 * 3 + 4
    assert set(here) == set(study_cells(replace(PAPER_SETTINGS, device="cpu:0"), range(3)))
    assert here[large[0]][1] == 1
    assert here["simple-cnn-mnist-structured-30-delta-2"][1] == 25


def test_a_round_on_processors_is_not_taken_for_a_gpus_cell(tmp_path, monkeypatch):
    kept_by = []

    def run_kept(output, cells, *_):
        kept_by.append(next(iter(cells.values())).about)
        return {}

    monkeypatch.setattr(cli, "run_kept", run_kept)
    monkeypatch.setattr("fedcodec.sim.federation.require_device", lambda device: None)
    for device in ("cpu", "cuda"):
        command = ["study", "pruning", "--device", device, "--output", str(tmp_path)]
        result = CliRunner().invoke(cli.commands, command)
        assert result.exit_code == 0, result.output
    assert kept_by[0] != kept_by[1]


@pytest.mark.slow
def test_the_quick_study(tmp_path):
    result = CliRunner().invoke(
        cli.commands, ["study", "pruning", "--quick", "--jobs", "1", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("weights", "delta"):
            assert int(row[f"{name}_bytes"]) <= 1.02 * float(row["ideal_bytes"]) + 32, row
    assert {row["kind"] for row in rows} == {"unstructured", "structured"}


def test_cells_can_be_picked_and_are_not_done_again(tmp_path, monkeypatch):
    trained = []
    prune_cell = uplink_pruning.prune_cell
    monkeypatch.setattr(
        uplink_pruning, "prune_cell", lambda *cell: trained.append(cell[4]) or prune_cell(*cell)
    )
    command = [
        "study",
        "pruning",
        "--quick",
        "--rounds",
        "1",
        "--jobs",
        "1",
        "--output",
        str(tmp_path),
    ]
    for _ in range(2):
        result = CliRunner().invoke(
            cli.commands, [*command, "--cells", "unstructured-(0|80)-delta"]
        )
        assert result.exit_code == 0, result.output
    assert trained == [0.0, 0.8]
    assert "10 clients a round" in (tmp_path / "pruning.html").read_text()
    refused = CliRunner().invoke(cli.commands, [*command, "--cells", "no such cell"])
    assert refused.exit_code == 2
    assert re.search("no cell", refused.output)
