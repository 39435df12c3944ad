import json
from functools import partial

import pytest
import torch

import fedcodec as fc
from fedcodec.sim.cells import Kept, run_cells


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
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["none-0.json"]


def test_kept_results_of_another_study_or_half_a_file_are_none(tmp_path):
    Kept(tmp_path, ABOUT).put("a", 1)
    assert Kept(tmp_path, ABOUT | {"rounds": 4}).get("a") is None
    (tmp_path / "b.json").write_text(json.dumps({"about": ABOUT})[:20])
    (tmp_path / "c.json").write_text("[1]")
    for name in "bc":
        assert Kept(tmp_path, ABOUT).get(name) is None
