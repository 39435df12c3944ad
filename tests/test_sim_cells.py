import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner

import fedcodec as fc
from fedcodec import cli
from fedcodec.sim import data
from fedcodec.sim.cells import Kept, Planned, run_cells


def square(number, steps, on_step):
    for _ in range(steps):
        on_step()
    return number * number, torch.get_num_threads(), fc.get_num_threads()


CELLS = [partial(square, number, number + 1) for number in range(4)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_cells_run_on_one_thread_and_tell_their_steps_and_ends(jobs):
    before = torch.get_num_threads(), fc.get_num_threads()
    steps, ends = [], {}
    results = run_cells(CELLS, jobs, steps.append, ends.__setitem__)
    assert results == [(0, 1, 1), (1, 1, 1), (4, 1, 1), (9, 1, 1)]
    assert ends == dict(enumerate(results))
    assert sorted(steps) == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert (torch.get_num_threads(), fc.get_num_threads()) == before


def fail(on_step):
    raise ValueError("no such cell")


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_has_ended_before_a_failure_was_told(jobs):
    ends = []
    with pytest.raises(ValueError, match="no such cell"):
        run_cells([CELLS[0], fail], jobs, on_end=lambda number, result: ends.append(number))
    assert ends in ([0], [])  # side by side, the failure may come first
    if jobs == 1:
        assert ends == [0]


def test_no_cells_are_done_at_once():
    assert run_cells([], 2) == []


ABOUT = {"rounds": 3, "hidden": (8, 4)}


def test_kept_results_come_back(tmp_path):
    kept = Kept(tmp_path / "cells", ABOUT)
    assert kept.get("none-0") is None
    kept.put("none-0", {"accuracy": [0.5, 1 / 3]})
    again = Kept(tmp_path / "cells", ABOUT)
    assert again.get("none-0") == {"accuracy": [0.5, 1 / 3]}
    assert again.get("none-1") is None
    assert [path.name for path in tmp_path.glob("cells/*/*")] == ["none-0.json"]


def test_kept_results_of_another_study_or_half_a_file_are_none(tmp_path):
    Kept(tmp_path, ABOUT).put("a", 1)
    assert Kept(tmp_path, ABOUT | {"rounds": 4}).get("a") is None
    assert Kept(tmp_path, ABOUT).get("a") == 1
    (file,) = tmp_path.glob("*/a.json")
    whole = file.read_text()
    damaged = {
        "half": whole[:20],
        "list": "[1]",
        "empty": "",
        "deep": 200_000 * "[",
        "no-result": json.dumps({"about": ABOUT}),
        "changed": whole.replace('"result": 1', '"result": 2'),
        "exchanged": whole,
    }
    for name, text in damaged.items():
        (file.parent / f"{name}.json").write_text(text)
        assert Kept(tmp_path, ABOUT).get(name) is None


def test_a_result_that_cannot_be_written_leaves_no_draft(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    kept = Kept(tmp_path, ABOUT)
    kept.put("a", 1)
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        kept.put("a", 2)
    assert kept.get("a") == 1
    assert [path.name for path in tmp_path.glob("*/*")] == ["a.json"]


def planned(done, name, **about):
    return Planned(lambda step: done.append(name) or {"of": name}, 1, "digits", about)


def test_a_result_is_of_its_settings_and_data_and_what_was_done_stays(tmp_path, monkeypatch):
    digest = ["first"]
    monkeypatch.setattr(data, "dataset_digest", lambda name, data_dir: digest[0])
    done = []

    def run(pattern="", **about):
        cells = {name: planned(done, name, **about) for name in ("a", "b")}
        return sorted(cli.run_kept(tmp_path, cells, None, 1, pattern))

    assert run("a") == ["a"]
    assert run("b") == ["a", "b"]
    assert done == ["a", "b"]
    digest[0] = "second"
    assert run("a") == ["a"]
    assert run(rounds=2) == ["a", "b"]
    assert done == ["a", "b", "a", "a", "b"]
    digest[0] = "first"
    assert run() == ["a", "b"]
    assert done == ["a", "b", "a", "a", "b"]


def test_data_that_no_picked_cell_needs_may_be_missing(tmp_path, monkeypatch):
    def digest(name, data_dir):
        if name != "digits":
            raise FileNotFoundError(f"{name} not found")
        return name

    monkeypatch.setattr(data, "dataset_digest", digest)
    done = []
    cells = {"a": planned(done, "a"), "b": planned(done, "b")._replace(dataset="mnist")}
    assert list(cli.run_kept(tmp_path, cells, None, 1, "a")) == ["a"]
    with pytest.raises(FileNotFoundError, match="mnist not found"):
        cli.run_kept(tmp_path, cells, None, 1)
    assert done == ["a"]


def test_a_quick_study_has_a_folder_of_its_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run_kept", lambda output, *_: seen.append(output) or {})
    for options in ([], ["--quick"], ["--quick", "--output", "mine"]):
        result = CliRunner().invoke(cli.commands, ["study", "pruning", *options])
        assert result.exit_code == 0, result.output
    assert [str(path) for path in seen] == [
        "fedcodec-results/pruning",
        "fedcodec-results/pruning-quick",
        "mine",
    ]


def test_a_note_that_no_page_can_hold_is_refused_before_anything_is_run(tmp_path):
    command = [
        "study",
        "pruning",
        "--quick",
        "--note",
        "bad\udcff",
        "--output",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(cli.commands, command)
    assert result.exit_code == 2
    assert "no text" in result.output
    assert not (tmp_path / "o").exists()
