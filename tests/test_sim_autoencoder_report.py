"""The page of Chandar et al.'s study: the paper's figures, ours, and what they are of."""

import csv
import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torch")

from click.testing import CliRunner

from fedcodec import cli
from fedcodec.sim import autoencoder
from fedcodec.sim.autoencoder import TASKS
from fedcodec.sim.autoencoder_report import compared, costs, kept, verdicts, within, write_report

METHODS = ("autoencoder", "autoencoder, int8 decoder", "principal components")


def curve(*accuracy):
    return {"accuracy": list(accuracy), "loss": [1 - value for value in accuracy]}


RESULT = {
    "values": 550_570,
    "parameters": 352_915_690,
    "decoder_bytes": dict(zip(METHODS, (705_831_500, 176_500_000, 705_831_500), strict=True)),
    "payload_bytes": dict.fromkeys(METHODS, 1315),
    "epochs": {
        "original": curve(0.1, 0.2, 0.3, 0.5, 0.6),
        METHODS[0]: curve(0.0, 0.0, 0.0, 0.49, 0.61),
        METHODS[1]: curve(0.1, 0.2, 0.3, 0.5, 0.6),
        METHODS[2]: curve(0.1, 0.2, 0.3, 0.51, 0.62),
    },
    "rounds": {"original": curve(0.5), **{method: curve(0.25) for method in METHODS}},
    "fit": [[1.0, 2.0], [0.5, 1.5]],
    "seconds": {"prepass": 60.0, "fit": 1234.5, "encode": 0.07, "decode": 0.08},
}


def test_costs_are_of_measured_bytes():
    (cost,) = costs(TASKS, {"cifar10": RESULT})
    assert (cost.latents, cost.paper_parameters, cost.paper_ratio) == (320, 352_915_690, 1720)
    assert cost.latent_ratio == pytest.approx(1720.5, abs=0.1)
    assert cost.payload_ratio == 4 * 550_570 / 1315
    assert cost.break_even_by_formula == pytest.approx(320.7, abs=0.05)
    assert cost.break_even == 705_831_500 / (4 * 550_570 - 1315)
    assert cost.int8_break_even == 176_500_000 / (4 * 550_570 - 1315)


def test_accuracy_is_looked_at_after_the_third_epoch():
    rows = {(row.method, row.points): row for row in kept({"cifar10": RESULT})}
    row = rows[METHODS[0], "epochs"]
    assert row.count == 2
    assert row.worst_change == pytest.approx(-1)
    assert row.mean_change == pytest.approx(0)
    assert rows[METHODS[2], "epochs"].worst_change == pytest.approx(1)
    assert rows[METHODS[0], "rounds"].worst_change == pytest.approx(-25)


COLOURED = {
    "autoencoder": [curve(0.1, 0.2, 0.3, 0.4), curve(0.1, 0.2, 0.25, 0.3)],
    "raw": [curve(0.1, 0.2, 0.3, 0.4), curve(0.1, 0.2, 0.25, 0.3)],
    "payload_bytes": {"autoencoder": 1315, "raw": 2_202_305},
}
SENT = {
    "raw": {"before_bytes": 0, "payload_bytes": [100, 100], "accuracy": [0.5, 1.0]},
    "topk": {"before_bytes": 0, "payload_bytes": [5, 5], "accuracy": [0.989, 0.6]},
}
COMPARED = {"autoencoder": {"before_bytes": 1234, "payload_bytes": [2, 3], "accuracy": [0.99, 0.2]}}
CELLS = {f"cifar10-send-{way}": {"way": way, **spent} for way, spent in SENT.items()}


def test_all_bytes_count_until_the_target_is_reached():
    rows = {row.way: row for row in verdicts({"cifar10": SENT | COMPARED})}
    assert {way: row.bytes_to_target for way, row in rows.items()} == {
        "raw": 200,
        "autoencoder": 1236,
        "topk": None,
    }
    assert rows["autoencoder"].round_bytes == 2.5
    assert rows["autoencoder"].total_bytes == 1239
    assert rows["topk"].total_updates == 10 / 50
    assert (rows["topk"].best_accuracy, rows["topk"].last_accuracy) == (0.989, 0.6)


def test_accuracies_are_compared_at_equal_total_bytes():
    found = {(row.way, row.updates): row for row in within({"cifar10": SENT | COMPARED})}
    assert found["raw", 2].budget_bytes == 100
    assert [found["raw", updates].accuracy for updates in (0.8, 2, 8)] == [None, 0.5, 1.0]
    assert [found["topk", updates].accuracy for updates in (0.1, 0.3)] == [0.989, 0.989]
    assert [found["autoencoder", updates].accuracy for updates in (20, 80)] == [None, 0.99]
    assert [found["raw", updates].over for updates in (2, 8)] == [False, True]


def test_ways_of_all_cells_stand_together_and_need_those_without_compression():
    found = compared(TASKS, CELLS | {"cifar10-compare": COMPARED})
    assert found == {"cifar10": SENT | COMPARED}
    only = compared(TASKS, {"cifar10-compare": COMPARED})
    assert (verdicts(only), within(only)) == ([], [])


def test_a_page_has_ours_and_the_papers(tmp_path):
    results = {
        "cifar10-follow": RESULT,
        **CELLS,
        "cifar10-compare": COMPARED,
        "cifar10-colours": COLOURED,
    }
    paths = write_report(
        tmp_path, TASKS, 0, results, "cpu", "a <note>", {"cifar10": "CIFAR & more"}
    )
    assert [path.name for path in paths] == [
        "autoencoder.html",
        "autoencoder.json",
        "costs.csv",
        "kept.csv",
        "verdicts.csv",
        "within.csv",
    ]
    page = (tmp_path / "autoencoder.html").read_text()
    for text in (
        "a &lt;note&gt;",
        "CIFAR &amp; more",
        "352,915,690",
        "320.7",
        "1,674.7",
        "1,234.5",
        "1,236",
        "never",
        "2,202,305",
        "0.8 updates (0.0 kB)",
        "-40.00",
        "(100.00)",
    ):
        assert text in page, text
    assert json.loads((tmp_path / "autoencoder.json").read_text())["cells"] == results
    assert write_report(tmp_path / "half", TASKS, 0, {"cifar10-compare": COMPARED}, "cpu")


def test_cells_can_be_picked_and_are_not_done_again(tmp_path, monkeypatch):
    done = []

    def compare(*_):
        done.append("compare")
        return COMPARED

    def colours(*_):
        done.append("colours")
        return COLOURED

    monkeypatch.setattr(autoencoder, "compare", compare)
    monkeypatch.setattr(autoencoder, "federate_colours", colours)
    command = ["study", "autoencoder", "--quick", "--jobs", "1", "--output", str(tmp_path)]
    for cells, expected in (
        ("-compare$", ["compare"]),
        ("-compare$", ["compare"]),
        ("digits-co", ["compare", "colours"]),
    ):
        result = CliRunner().invoke(cli.commands, [*command, "--cells", cells])
        assert result.exit_code == 0, result.output
        assert done == expected
    # What was done before stands on the page of those that are picked.
    CliRunner().invoke(cli.commands, [*command, "--cells", "-compare$"])
    assert set(json.loads((tmp_path / "autoencoder.json").read_text())["cells"]) == {
        "digits-compare",
        "digits-colours",
    }
    result = CliRunner().invoke(cli.commands, [*command, "--cells", "nothing"])
    assert "no cell has a name with 'nothing' in it; they are digits-follow, " in result.output
    result = CliRunner().invoke(cli.commands, [*command, "--device", "abacus"])
    assert result.exit_code == 1
    assert "device 'abacus'" in result.output


@pytest.mark.slow
def test_the_quick_study(tmp_path):
    result = CliRunner().invoke(
        cli.commands, ["study", "autoencoder", "--quick", "--jobs", "1", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "kept.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        if row["points"] == "epochs":
            assert float(row["worst_change"]) > -5
    with (tmp_path / "verdicts.csv").open() as file:
        sent = {row["way"]: row for row in csv.DictReader(file)}
    assert int(sent["raw"]["before_bytes"]) == 0
    assert sum("decoder" in way for way in sent) == 9
