import multiprocessing
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import fedcodec as fc
from fedcodec.sim import federation
from fedcodec.sim.data import load_dataset, partition_dirichlet
from fedcodec.sim.federation import Clients, Delta, Dense, encode_seed, simulate
from fedcodec.sim.models import FlatModel, build_model
from fedcodec.sim.settings import Settings
from fedcodec.sim.study import run_study

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Settings(hidden=(8,), clients=6, clients_per_round=3, rounds=3, average_last=1)
PARAMETERS = 64 * 8 + 8 + 8 * 10 + 10


@pytest.fixture
def sent(monkeypatch):
    """Record what every client's encoder is given and returns."""
    calls = []

    class Recorder(fc.ErrorFeedback):
        def encode(self, update, **options):
            payload = super().encode(update, **options)
            calls.append({"encoder": self, "payload": payload, **options})
            return payload

    monkeypatch.setattr(fc, "ErrorFeedback", Recorder)
    return calls


def test_the_same_seed_gives_the_same_history_and_another_one_does_not():
    runs = [simulate(SMALL, "randomk(0.1) | int8", seed) for seed in (3, 3, 4)]
    assert asdict(runs[0].history) == asdict(runs[1].history)
    assert runs[0].history.accuracy != runs[2].history.accuracy


def test_federated_averaging_with_raw_is_what_the_paper_says():
    # All clients, each in one full batch: neither sampling nor the order of samples matters.
    settings = replace(SMALL, clients_per_round=6, batch_size=2000, learning_rate=0.5)
    run = simulate(settings, "raw", seed=5)
    data = load_dataset("digits")
    parts = partition_dirichlet(data.train_labels.numpy(), 6, 0.5, np.random.default_rng([5, 0]))
    server = build_model("mlp", data, (8,), seed=5)
    losses = []
    for _ in range(3):
        start = {name: value.clone() for name, value in server.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for part in parts:
            server.load_state_dict(start)
            optimiser = torch.optim.SGD(server.parameters(), lr=0.5)
            optimiser.zero_grad()
            functional.cross_entropy(
                server(data.train_images[part]), data.train_labels[part]
            ).backward()
            optimiser.step()
            for name, value in server.state_dict().items():
                total[name] += len(part) * value
        server.load_state_dict(
            {name: value / len(data.train_labels) for name, value in total.items()}
        )
        losses.append(functional.cross_entropy(server(data.test_images), data.test_labels).item())
    assert run.history.loss == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("downlink", ["raw", "int8"])
def test_bytes_are_the_lengths_of_the_payloads(downlink, sent):
    run = simulate(replace(SMALL, downlink=downlink), "topk(0.1) | int8", seed=0)
    lengths = [len(call["payload"]) for call in sent]
    per_round = [lengths[first : first + 3] for first in (0, 3, 6)]
    assert run.history.uplink_bytes == [sum(three) for three in per_round]
    assert run.history.largest_payload_bytes == [max(three) for three in per_round]
    # Neither codec's size depends on the values.
    model = FlatModel(build_model("mlp", load_dataset("digits"), (8,), seed=0))
    one = len(fc.parse(downlink).encode(model.named(model.weights), framing="reference"))
    assert run.history.downlink_bytes == [3 * one] * 3
    link = federation.parse_link(SMALL.link)
    assert run.history.transfer_seconds == [link.seconds(one, max(three)) for three in per_round]
    assert {call["framing"] for call in sent} == {"reference"}
    assert run.parameters == PARAMETERS


def test_every_client_has_its_own_feedback_and_every_payload_its_own_seed(sent):
    simulate(replace(SMALL, rounds=8), "randomk(0.1)", seed=0)
    assert len({id(call["encoder"]) for call in sent}) <= 6
    assert max(call["encoder"].sequence for call in sent) > 1
    assert len({call["seed"] for call in sent}) == len(sent) == 24
    assert not any(call["encoder"].pending for call in sent)


@pytest.mark.parametrize("error_feedback", [True, False])
def test_what_a_payload_missed_is_in_the_next_one_if_there_is_feedback(error_feedback):
    clients = Clients(replace(SMALL, error_feedback=error_feedback), "topk(0.5)", seed=0)
    delta = {"weight": np.array([1, 3], np.float32)}
    received = []
    for client, number in ((0, 1), (1, 1), (0, 2)):
        payload = clients.encode(client, delta, number)
        clients.accept(client)
        received.append(fc.decode(payload, like=delta)["weight"].tolist())
    assert received[:2] == [[0, 3], [0, 3]]
    assert received[2] == [0, 3]
    payload = clients.encode(0, {"weight": np.array([1, 0], np.float32)}, 3)
    assert fc.decode(payload, like=delta)["weight"].tolist() == (
        [3, 0] if error_feedback else [1, 0]
    )


def test_codecs_are_compared_on_the_same_samples_and_batches(monkeypatch):
    seen = []
    train = FlatModel.train

    def record(self, images, labels, orders, *options):
        orders = list(orders)
        seen.append([order.tolist() for order in orders])
        train(self, images, labels, orders, *options)

    monkeypatch.setattr(FlatModel, "train", record)
    settings = replace(SMALL, local_epochs=2)
    for codec in ("raw", "topk(0.01) | ternary"):
        simulate(settings, codec, seed=1)
    assert seen[:9] == seen[9:]
    assert all(len(orders) == 2 and orders[0] != orders[1] for orders in seen)
    assert len({tuple(orders[0]) for orders in seen[:9]}) == 9


def test_rounds_are_evaluated_as_asked():
    settings = replace(SMALL, rounds=7, evaluate_every=3, average_last=2)
    history = simulate(settings, "sign", seed=0).history
    evaluated = [number for number, value in enumerate(history.accuracy, 1) if value is not None]
    assert evaluated == [3, 6, 7]
    assert [value is None for value in history.loss] == [
        value is None for value in history.accuracy
    ]


def test_a_lossless_codec_learns():
    settings = replace(SMALL, rounds=15, hidden=(32,), clients_per_round=6)
    assert simulate(settings, "raw", seed=0).history.accuracy[-1] > 0.8


def test_dense_downlink_gives_clients_what_was_decoded():
    weights = {"weight": np.linspace(-1, 1, 100, dtype=np.float32)}
    received, costs = Dense("kbit(2)").send(weights, [4, 7], seed=0)
    payload = fc.parse("kbit(2)").encode(weights, framing="reference")
    assert np.array_equal(received["weight"], fc.decode(payload, like=weights)["weight"])
    assert costs == [len(payload)] * 2


def test_delta_downlink_charges_what_was_missed_or_the_whole_weights():
    generator = np.random.default_rng(0)
    downlink = Delta("topk(0.1) | int8")
    weights = {"weight": generator.standard_normal(1000, dtype=np.float32)}
    whole = len(fc.parse("raw").encode(weights, framing="reference"))
    received, costs = downlink.send(weights, [0], seed=0)
    assert costs == [whole]
    assert np.array_equal(received["weight"], weights["weight"])
    payloads = []  # client 0 takes every one of them
    for number in range(40):
        before = received["weight"]
        weights = {"weight": weights["weight"] + generator.standard_normal(1000, dtype=np.float32)}
        clients = {0: [0, 1], 4: [0, 1], 39: [0, 1, 2]}.get(number, [0])
        received, costs = downlink.send(weights, clients, seed=number)
        payloads.append(costs[0])
        assert 0 < np.count_nonzero(received["weight"] - before) <= 100
        if number == 0:
            assert costs[1] == whole
        if number == 4:
            assert costs[1] == sum(payloads[1:5]) < whole
        if number == 39:
            assert costs[1:] == [whole, whole]
            assert sum(payloads[5:]) > whole


def test_delta_downlink_loses_nothing():
    downlink = Delta("topk(0.2)")
    weights = {"weight": np.arange(10, dtype=np.float32)}
    downlink.send({"weight": np.zeros(10, np.float32)}, [0], seed=0)
    for number in range(5):
        received, _ = downlink.send(weights, [0], seed=number)
    assert np.array_equal(received["weight"], weights["weight"])


def test_a_run_can_send_deltas_down():
    dense = simulate(replace(SMALL, clients_per_round=6), "raw", 0).history
    settings = replace(SMALL, clients_per_round=6, downlink_delta="topk(0.1) | int8")
    delta = simulate(settings, "raw", 0).history
    assert delta.downlink_bytes[0] == dense.downlink_bytes[0]
    assert max(delta.downlink_bytes[1:]) < 0.2 * dense.downlink_bytes[1]


def test_seeds_differ_by_every_part():
    seeds = {
        encode_seed(run, number, client)
        for run in range(3)
        for number in range(12)
        for client in range(12)
    }
    assert len(seeds) == 3 * 12 * 12
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**63
    # SHA-256 of "1/2/3": a new version of Python must not change a study.
    assert encode_seed(1, 2, 3) == 0x942A8D7DAF3CE99D


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be above zero"),
        ({"learning_rate": float("nan")}, "learning_rate must be above zero"),
        ({"learning_rate": float("inf")}, "learning_rate must be above zero and finite"),
        ({"dirichlet": 0.0}, "dirichlet must be above zero"),
        ({"momentum": 1.0}, "momentum"),
        ({"clients_per_round": 7}, "7 clients a round"),
        ({"average_last": 4}, "last 4 rounds"),
        ({"downlink": "int8", "downlink_delta": "topk(0.1)"}, "travel as raw"),
        ({"downlink": "nope"}, "nope"),
        ({"downlink_delta": "nope"}, "nope"),
        ({"link": "string"}, "unknown link"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_parallel_runs_give_the_same_and_report_every_round():
    codecs, seeds = ["int8", "randomk(0.1)"], [0, 1]
    reported = []
    parallel = run_study(SMALL, codecs, seeds, jobs=2, on_round=lambda *cell: reported.append(cell))
    alone = run_study(SMALL, codecs, seeds)
    assert [asdict(run.history) for run in parallel] == [asdict(run.history) for run in alone]
    cells = [(codec, seed) for codec in codecs for seed in seeds]
    assert [(run.codec, run.seed) for run in parallel] == cells
    assert sorted(reported) == sorted(cells * SMALL.rounds)


@pytest.mark.parametrize("codec", ["raw", "topk(0.1) | int8"])
def test_divergence_is_reported_with_its_place(codec):
    settings = replace(SMALL, learning_rate=1e30)
    with pytest.raises(
        fc.NonFiniteError, match=r"seed 5, round 1, client .*learning rate"
    ) as caught:
        simulate(settings, codec, seed=5)
    assert str(caught.value).startswith(codec)
    assert caught.value.tensor in str(caught.value)


def test_an_error_in_a_parallel_run_arrives_here():
    with pytest.raises(fc.NonFiniteError, match=r"round 1, client .*learning rate") as caught:
        run_study(replace(SMALL, learning_rate=1e30), ["raw", "sign"], [0], jobs=2)
    assert caught.value.tensor in str(caught.value)


def test_a_process_that_ended_by_itself_is_reported():
    def kill(codec, seed):
        for child in multiprocessing.active_children():
            child.kill()

    settings = replace(SMALL, rounds=1_000_000, evaluate_every=1_000_000)
    with pytest.raises(ChildProcessError, match="ended by itself"):
        run_study(settings, ["raw", "sign"], [0], jobs=2, on_round=kill)


def test_nothing_is_trained_where_a_data_set_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("fedcodec.sim.study.simulate", None)
    settings = replace(SMALL, dataset="mnist", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="mnist not found"):
        run_study(settings, ["raw", "sign"], [0])


@pytest.mark.parametrize(
    ("codecs", "seeds", "message"),
    [
        ([], [0], "at least"),
        (["raw"], [], "at least"),
        (["topk(0.1)|int8", "topk(0.1) | int8"], [0], r"codec topk\(0.1\) \| int8 appears twice"),
        (["raw"], [2, 1, 1], "seed 1 appears twice"),
        (["nope"], [0], "nope"),
    ],
)
def test_studies_that_make_no_sense_are_refused(codecs, seeds, message):
    with pytest.raises(ValueError, match=message):
        run_study(SMALL, codecs, seeds)
