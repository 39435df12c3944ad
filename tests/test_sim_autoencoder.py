"""Chandar et al.'s classifiers through an autoencoder: what is fitted, what is held out, what is measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fedcodec as fc
from fedcodec.sim.autoencoder import (
    PAST,
    TASKS,
    WAYS,
    Task,
    _grey,
    colour_steps,
    compare,
    compare_steps,
    federate_colours,
    follow,
    follow_steps,
    prepass,
    send,
    study_cells,
)
from fedcodec.sim.data import load_dataset
from fedcodec.sim.models import FlatModel, build_paper_model

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = Task(
    "mnist-classifier",
    "digits",
    latents=6,
    epochs=6,
    snapshots=8,
    autoencoder_epochs=40,
    rounds=2,
    batch_size=16,
)


@pytest.fixture(scope="module")
def found():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    counted = []
    result = follow(TASK, seed=0, on_step=lambda: counted.append(1))
    torch.set_num_threads(threads)
    assert len(counted) == follow_steps(TASK)
    return result


def test_the_papers_autoencoders_are_those_of_the_tasks():
    assert {task.dataset: task.latents for task in TASKS.values()} == {"mnist": 32, "cifar10": 320}


def test_a_payload_is_the_latents_and_35_bytes(found):
    assert found["values"] == 1510
    assert found["parameters"] == 2 * 1510 * 6 + 6 + 1510
    assert set(found["payload_bytes"].values()) == {6 * 4 + 35}
    whole, coded = (
        found["decoder_bytes"][name] for name in ("autoencoder", "autoencoder, int8 decoder")
    )
    assert 4 * (1510 * 6 + 1510) < whole < 4 * (1510 * 6 + 1510) + 300
    assert coded < 0.27 * whole


def test_every_epoch_and_round_is_measured_in_every_way(found):
    assert set(found["epochs"]) == {"original", *found["decoder_bytes"]}
    for points, count in (("epochs", TASK.epochs), ("rounds", TASK.rounds)):
        for curve in found[points].values():
            assert len(curve["accuracy"]) == len(curve["loss"]) == count
            assert all(0 <= value <= 1 for value in curve["accuracy"])


def test_the_decoded_weights_classify_nearly_as_well(found):
    original, decoded = (
        np.array(found["epochs"][name]["accuracy"]) for name in ("original", "autoencoder")
    )
    assert original[-1] > 0.9
    assert np.abs(original - decoded)[3:].max() < 0.05


def test_the_loss_falls_and_is_kept(found):
    losses = np.array(found["fit"])
    assert losses.shape[1] == 2
    assert losses[-1, 1] < 0.1 * losses[0, 1]


def test_collaborators_of_colour_and_grey_see_images_of_their_own():
    counted = []
    task = replace(TASK, colour_rounds=2, local_epochs=3)
    found = federate_colours(task, seed=0, on_step=lambda: counted.append(1))
    assert len(counted) == colour_steps(task)
    for way in ("autoencoder", "raw"):
        assert [len(curve["accuracy"]) for curve in found[way]] == [6, 6]
    first, second = (found[way][0]["accuracy"] for way in ("autoencoder", "raw"))
    assert first[:3] == second[:3]  # nothing was sent yet
    assert first[3:] != second[3:]
    assert found["payload_bytes"] == {"autoencoder": 6 * 4 + 35, "raw": 4 * 1510 + 17}


def test_decoders_need_more_room_than_a_store_has_by_default(monkeypatch):
    monkeypatch.setattr(fc.Shared.__init__, "__defaults__", (50_000,))  # one of 42 kB
    found = follow(replace(TASK, rounds=1), seed=0)
    assert len(found["epochs"]["principal components"]["accuracy"]) == TASK.epochs
    found = federate_colours(replace(TASK, colour_rounds=1, local_epochs=1), seed=0)
    assert len(found["autoencoder"]) == 2


def test_grey_images_have_equal_channels():
    digits = load_dataset("digits")
    images = torch.randn(5, 3, 4, 4)
    grey = _grey(replace(digits, train_images=images, test_images=images[:2]))
    assert torch.equal(grey.train_images[:, 0], grey.train_images[:, 2])
    torch.testing.assert_close(grey.train_images[:, 1], images.mean(1))
    assert grey.test_images.shape == (2, 3, 4, 4)


def test_autoencoders_are_counted_from_their_first_byte():
    counted = []
    task = replace(TASK, compared_rounds=3)
    found = compare(task, seed=1, on_step=lambda: counted.append(1))
    assert len(counted) == compare_steps(task)
    layer = 4 * (6 * 1510)
    for way, spent in found.items():
        assert len(spent["accuracy"]) == len(spent["payload_bytes"]) == 3
        if " float32 decoder" in way:  # two halves of an autoencoder, or two decoders
            assert 2 * layer < spent["before_bytes"] < 2 * layer + 8 * 1510 + 1000
        else:
            assert 0.25 * 2 * layer < spent["before_bytes"] < 0.27 * 2 * layer + 8 * 1510
    latents = found["autoencoder, float32 decoder each"]["payload_bytes"]
    assert latents == [2 * (6 * 4 + 35)] * 3
    repaired = found["autoencoder, int8 decoder each, then topk(0.01) | int8"]
    assert min(repaired["payload_bytes"]) > latents[0]


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_send_nothing_before_the_first_round(way):
    counted = []
    task = replace(TASK, compared_rounds=3)
    found = send(task, way, seed=1, on_step=lambda: counted.append(1))
    assert (found["way"], found["before_bytes"]) == (way, 0)
    assert len(found["accuracy"]) == len(found["payload_bytes"]) == len(counted) == 3
    raw = 2 * (4 * 1510 + 17)
    assert found["payload_bytes"] == [raw] * 3 or max(found["payload_bytes"]) < raw / 7


def test_past_averages_tell_a_part_of_the_next_update():
    task = replace(TASK, compared_rounds=8)
    repair = "topk(0.01) | int8"
    with_past, alone = (send(task, way, seed=1) for way in (PAST + repair, repair))
    assert with_past["accuracy"][-1] > alone["accuracy"][-1] + 0.05
    # A latent for each average held, at most eight of four bytes, beside what stands before them.
    more = np.subtract(with_past["payload_bytes"], alone["payload_bytes"]) / 2
    assert more.max() < 8 * 4 + 40


def test_a_cell_depends_on_no_more_than_its_own_settings():
    def about(task):
        return {name: cell.about for name, cell in study_cells({"a": task}, 0, None, "cpu").items()}

    task = replace(TASK, colour_rounds=2)
    before, after = about(task), about(replace(task, rounds=9, ways=WAYS[:1]))
    assert len(before) == len(WAYS) + 3
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"a-follow"}
    assert "a-send-past-averages-then-topk-0.01-int8" in before


def test_equal_seeds_give_equal_results(found):
    again = follow(TASK, seed=0)
    for key in ("epochs", "rounds", "fit", "payload_bytes"):
        assert again[key] == found[key]


def test_a_prepass_keeps_as_many_snapshots_as_it_is_told():
    data = load_dataset("digits")
    network = FlatModel(build_paper_model("mnist-classifier", data, seed=0))
    kept = []
    part = np.arange(300)  # 19 batches
    prepass(TASK, network, data, part, [0], lambda weights, ends: kept.append((weights, ends)))
    ends = [number for number, (_, at_end) in enumerate(kept) if at_end]
    assert len(kept) == TASK.epochs * TASK.snapshots
    assert ends == list(range(TASK.snapshots - 1, len(kept), TASK.snapshots))
    flat = [np.concatenate([array.ravel() for array in weights.values()]) for weights, _ in kept]
    assert len(np.unique(np.array(flat), axis=0)) == len(kept)
    assert np.array_equal(kept[-1][0]["1.weight"], network.named(network.weights)["1.weight"])
