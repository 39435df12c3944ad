"""The study of Yan in small."""

import csv
import json
from dataclasses import asdict, replace

import pytest
import torch
from click.testing import CliRunner

from fedcodec import cli
from fedcodec.sim import cascade
from fedcodec.sim.cascade import COMBINATIONS, CascadeRun, CascadeSettings, Combination
from fedcodec.sim.cascade_report import PUBLISHED, summarise, write_report
from fedcodec.sim.data import Dataset

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = CascadeSettings(dataset="digits", rounds=2, hidden=(16,), student_hidden=(8,))
NONE, PRUNE, INT8, DISTIL = COMBINATIONS[:4]
ALL = COMBINATIONS[-1]


def test_the_eight_combinations_are_the_papers():
    assert [combination.name for combination in COMBINATIONS] == list(PUBLISHED)
    assert len(set(COMBINATIONS)) == 8
    texts = {str(combination.codec(SMALL)) for combination in COMBINATIONS}
    pruned = "threshold(percentile=20.0)"
    assert texts == {"raw", pruned, "int8", f"{pruned} | int8"}


def test_the_networks_have_the_papers_numbers_of_weights(monkeypatch):
    images = torch.zeros(1, 1, 28, 28)
    data = Dataset(images, torch.zeros(1, dtype=torch.int64), images, torch.zeros(1), classes=10)
    monkeypatch.setattr(cascade, "load_dataset", lambda *place: data)
    settings = CascadeSettings()
    assert cascade.dense_bytes(settings) == 4 * 109_386
    assert cascade._model(settings, data, settings.student_hidden, 0).weights.numel() == 42_846


def test_without_compression_it_is_plain_averaging():
    """Each model's weights after an epoch, averaged: by hand, and without a codec."""
    run = cascade.run_combination(replace(SMALL, rounds=1), NONE, seed=3)
    data = cascade.load_dataset("digits")
    parts = cascade.partition_iid(len(data.train_labels), 3, cascade.np.random.default_rng([3, 0]))
    model = cascade._model(SMALL, data, SMALL.hidden, 3)
    start, total = model.weights.clone(), torch.zeros(model.weights.numel(), dtype=torch.float64)
    for client, part in enumerate(parts):
        model.weights.copy_(start)
        order = cascade.np.random.default_rng([3, 1, client]).permutation(part)
        cascade._train(SMALL, model, data, torch.from_numpy(order))
        total += model.weights.double() * len(part)
    model.weights.copy_((total / len(data.train_labels)).float())
    assert run.accuracy == [model.evaluate(data.test_images, data.test_labels)[0]]
    assert run.accuracy == run.server_accuracy


@pytest.mark.parametrize("combination", [PRUNE, DISTIL, ALL], ids=lambda found: found.slug)
def test_a_run_counts_the_payloads_of_what_travels_and_comes_out_the_same_again(combination):
    told = []
    run = cascade.run_combination(SMALL, combination, 0, lambda: told.append(1))
    assert len(told) == SMALL.rounds
    weights = 64 * 16 + 16 + 16 * 10 + 10
    if combination.distil:
        weights = 64 * 8 + 8 + 8 * 10 + 10
    assert run.parameters == weights
    kept = weights - -(-weights // 5) + 1 if combination.prune else weights
    for size in run.payload_bytes:
        assert kept * (1 if combination.quantize else 4) < size < 4 * weights + 64
    again = cascade.run_combination(SMALL, combination, 0)
    results = [asdict(run), asdict(again)]
    for found in results:
        del found["encode_seconds"], found["decode_seconds"]
    assert results[0] == results[1]


def test_a_student_learns_from_its_compressed_teacher(monkeypatch):
    """What teaches has the zeros of the pruning, and what travels is the student."""
    seen = []
    train_student = cascade.train_student

    def spy(student, teacher, *arguments):
        weights = torch.cat([parameter.detach().reshape(-1) for parameter in teacher.parameters()])
        seen.append(float((weights == 0).float().mean()))
        return train_student(student, teacher, *arguments)

    monkeypatch.setattr(cascade, "train_student", spy)
    cascade.run_combination(replace(SMALL, rounds=1), Combination(True, False, True), 0)
    assert seen == [pytest.approx(0.2, abs=0.01)] * 3


def made_run(accuracy, size):
    rounds = 2
    return CascadeRun(
        accuracy=[0.5, accuracy],
        loss=[1.0, 0.5],
        train_accuracy=[0.6, 0.875],
        train_loss=[0.9, 0.4],
        server_accuracy=[0.5, accuracy],
        payload_bytes=[size] * rounds,
        encode_seconds=[0.002] * rounds,
        decode_seconds=[0.001] * rounds,
        parameters=100,
    )


def test_a_report_has_the_runs_figures_beside_the_papers(tmp_path):
    runs = {
        name: [made_run(0.8 + 0.01 * seed - 0.001 * number, 1000 + number) for seed in range(2)]
        for number, name in enumerate(PUBLISHED)
    }
    inference = dict.fromkeys(runs, 0.003)
    rows = summarise(SMALL, runs, inference)
    assert [row.name for row in rows] == list(PUBLISHED)
    assert rows[0].difference is None
    assert rows[7].accuracy == pytest.approx(0.798)
    assert rows[7].difference == pytest.approx(-0.007)
    assert rows[7].difference_deviation == pytest.approx(0)
    assert rows[7].ratio == pytest.approx(1007 / cascade.dense_bytes(SMALL))
    assert rows[7].delay_milliseconds == pytest.approx(
        3 + 2 + 1 + 1e3 * cascade.transfer_seconds(SMALL, 1007)
    )
    paths = write_report(tmp_path, SMALL, range(2), runs, inference)
    assert [path.name for path in paths] == [
        "cascade.html",
        "cascade.json",
        "rounds.csv",
        "rows.csv",
    ]
    page = paths[0].read_text()
    for text in ("79.80 ± 0.71", "91.77", "no comparison", "1,007", "What differs", "digits"):
        assert text in page
    with paths[2].open() as file:
        assert len(list(csv.DictReader(file))) == 8 * 2 * 2
    report = json.loads(paths[1].read_text())
    assert report["settings"]["seeds"] == [0, 1]
    assert report["runs"]["prune"][1]["accuracy"][1] == runs["prune"][1].accuracy[1]


def test_another_link_trains_nothing_again():
    plans = [
        cascade.study_cells(cascade.CascadeSettings(link=link), [0]) for link in ("lte", "wifi")
    ]
    assert {name: cell.about for name, cell in plans[0].items()} == {
        name: cell.about for name, cell in plans[1].items()
    }


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch):
    arguments = [
        "study",
        "cascade",
        "--quick",
        "--rounds",
        "1",
        "--jobs",
        "1",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(cascade, "TIMED", 3)
    first = CliRunner().invoke(cli.commands, arguments)
    assert first.exit_code == 0, first.output
    assert "cascade.html" in first.output
    done = sorted(path.name for path in tmp_path.glob("cells/*/*"))
    assert done == sorted(f"{combination.slug}-0.json" for combination in COMBINATIONS)
    next(tmp_path.glob("cells/*/prune-0.json")).unlink()
    trained = []
    run_cell = cascade.run_cell
    monkeypatch.setattr(
        cascade, "run_cell", lambda *cell: trained.append(cell[1].name) or run_cell(*cell)
    )
    again = CliRunner().invoke(cli.commands, arguments)
    assert again.exit_code == 0, again.output
    assert trained == ["prune"]
    assert list(tmp_path.glob("cells/*/prune-0.json"))


@pytest.mark.slow
def test_the_quick_study(tmp_path):
    result = CliRunner().invoke(
        cli.commands, ["study", "cascade", "--quick", "--jobs", "1", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "cascade.json").read_text())["rows"]}
    for name, row in rows.items():
        assert row["ratio"] <= PUBLISHED[name].ratio + 0.005
        assert row["accuracy"] > 0.15  # ten classes: chance is 0.1
