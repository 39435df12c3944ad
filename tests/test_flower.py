"""Flower's mod, Grid and strategies with Flower's own messages; engines run in test_flower_engines.py."""

import contextlib
import copy
import logging
import random

import numpy as np
import pytest

import fedcodec as fc

pytest.importorskip("flwr")

import flwr.serverapp.strategy as strategies
from flower_loopback import LoopbackGrid, Node
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedcodec.adapters.flower import CodecGrid, StreamingFedAvg, codec_mod

SIZE = 500
# Weights whose sums are powers of two: with whole numbers for values all means and differences are exact.
SAMPLES = {1: 1, 2: 3, 3: 4, 4: 8, 5: 16}


def model(**arrays):
    if not arrays:
        draw = np.random.default_rng(0)
        arrays = {
            "weight": draw.integers(-99, 99, (SIZE // 10, 10)).astype("f4"),
            "bias": np.float32(0.5),
            "steps": np.int64(7),
        }
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def plain(record):
    return {name: array.numpy() for name, array in record.items()}


def step(node_id, number):
    """What training adds to the weights: known for each node and round."""
    draw = np.random.default_rng([node_id, number])
    return draw.integers(-9, 9, (SIZE // 10, 10)).astype("f4")


class App:
    """A client that adds `step` to the weights, wherever they are; `name` outlives the node's id."""

    def __init__(self, name):
        self.name = name
        self.saw = []

    def __call__(self, message, context):
        self.saw.append(message)
        metrics = {"num-examples": SAMPLES[self.name], "name": self.name, "loss": 0.25}
        content = {"metrics": MetricRecord(metrics)}
        if message.metadata.message_type == "train":
            number = message.content["config"]["server-round"]
            weights = plain(message.content["arrays"])
            weights["weight"] = weights["weight"] + step(self.name, number)
            weights["steps"] = weights["steps"] + 10
            content["arrays"] = model(**weights)
        return Message(RecordDict(content), reply_to=message)


def loopback(names=(1, 2), mods=(codec_mod,), spoil=lambda reply: [reply], configs=None):
    apps = {name: App(name) for name in names}
    nodes = [Node(100 + name, apps[name], mods, (configs or {}).get(name)) for name in names]
    return LoopbackGrid(nodes, spoil), apps


class Recorder(CodecGrid):
    """Keeps what strategies get."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"poll_seconds": 0, **kwargs})
        self.rounds = []
        self.bases = {}  # the models that went out, by message

    def push_messages(self, messages):
        messages = list(messages)
        names = super().push_messages(messages)
        for message in messages:
            self.bases[message.metadata.message_id] = plain(message.content["arrays"])
        return names

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.rounds.append(copy.deepcopy(replies))
        return replies


class Replay(LoopbackGrid):
    """Returns what another grid returned, with no codec near it."""

    def __init__(self, rounds, nodes):
        super().__init__(nodes)
        self.rounds = iter(rounds)

    def send_and_receive(self, messages, *, timeout=None):
        list(messages)
        return next(self.rounds)


def start(strategy, grid, arrays=None, rounds=3, **options):
    random.seed(0)  # strategies sample nodes by it
    return strategy.start(grid, arrays or model(), num_rounds=rounds, timeout=1, **options)


def fedavg(kind=strategies.FedAvg, **options):
    return kind(**{"fraction_evaluate": 0.0, **options})


ALL = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.9, "server_momentum": 0.8},
    "FedAdam": {},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {"num_malicious_nodes": 1},
    "FedProx": {"proximal_mu": 0.1},
}


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_makes_of_payloads_what_it_makes_of_what_they_decode_to(name):
    def strategy():
        return getattr(strategies, name)(fraction_evaluate=1.0, **ALL[name])

    inner, _ = loopback(names=(1, 2, 3, 4))
    grid = Recorder(inner, uplink="topk(0.1) | int8", downlink="int8")
    coded = start(strategy(), grid)
    decoded = start(strategy(), Replay(grid.rounds, inner.nodes.values()))
    assert coded.arrays.keys() == decoded.arrays.keys()
    for key, array in coded.arrays.items():
        assert array.numpy().dtype == decoded.arrays[key].numpy().dtype
        assert array.data == decoded.arrays[key].data
    assert coded.train_metrics_clientapp == decoded.train_metrics_clientapp
    assert len(grid.rounds) == 6


@pytest.mark.parametrize("downlink", [None, "int8", 'cast("float16")'])
def test_a_reply_is_the_model_that_came_plus_what_its_payload_says(downlink):
    inner, apps = loopback(names=(1,))
    grid = Recorder(inner, uplink="topk(0.1) | int8", downlink=downlink)
    start(fedavg(min_train_nodes=1, min_available_nodes=1), grid, rounds=1)
    (base,) = [plain(message.content["arrays"]) for message in apps[1].saw]
    (travelled,) = [reply.content["arrays"] for reply in inner.received]
    ((_, packed),) = travelled.items()
    assert (packed.dtype, packed.stype) == ("uint8", "fedcodec.v1")
    assert packed.shape == (len(packed.data),)
    shared = fc.Shared()
    shared.add_base(base)
    delta = fc.decode(packed.data, like=base, shared=shared)
    got = plain(grid.rounds[0][0].content["arrays"])
    assert list(got) == list(base)
    assert np.array_equal(got["weight"], base["weight"] + delta["weight"])
    assert np.count_nonzero(delta["weight"]) <= SIZE // 10 + 1
    assert (got["bias"].dtype, got["bias"].shape) == (np.float32, ())
    assert got["steps"] == 17


def test_the_app_sees_no_trace_of_the_codec():
    inner, apps = loopback()
    start(fedavg(fraction_evaluate=1.0), Recorder(inner, uplink="int8", downlink="int8"))
    for app in apps.values():
        assert len(app.saw) == 6
        for message in app.saw:
            assert list(message.content) == ["arrays", "config"]
            assert {array.stype for array in message.content["arrays"].values()} == {
                "numpy.ndarray"
            }


def test_the_strategys_messages_and_records_stay_as_they_are():
    inner, _ = loopback(names=(1,))
    grid = CodecGrid(inner, uplink="int8", downlink="int8")
    record = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
    before = {name: array.data for name, array in record["arrays"].items()}
    message = Message(record, dst_node_id=101, message_type="train")
    grid.push_messages([message])
    assert message.content is record
    assert list(record) == ["arrays", "config"]
    assert {name: array.data for name, array in record["arrays"].items()} == before
    assert message.metadata.message_id == inner.sent[0].metadata.message_id != ""


def test_bytes_are_among_the_metrics():
    inner, _ = loopback()
    grid = Recorder(inner, uplink="topk(0.1) | int8")
    result = start(fedavg(fraction_evaluate=1.0), grid, rounds=1)
    whole = sum(len(array.data) for array in model().values())
    for reply, travelled in zip(grid.rounds[0], inner.received, strict=False):
        (packed,) = travelled.content["arrays"].values()
        found = reply.content["metrics"]
        assert found["fedcodec.uplink-bytes"] == len(packed.data) < whole / 10
        assert found["fedcodec.downlink-bytes"] == whole
        assert found["loss"] == 0.25
    metrics = result.evaluate_metrics_clientapp[1]
    assert metrics["fedcodec.uplink-bytes"] == 0
    assert metrics["fedcodec.downlink-bytes"] == whole


# Mixed fleets and dtypes


def test_clients_without_the_mod_take_part_where_models_come_uncompressed():
    inner, apps = loopback(names=(1, 2))
    inner.nodes[102] = Node(102, apps[2])
    mixed = start(fedavg(), Recorder(inner, uplink="raw"))
    none = start(fedavg(), loopback(names=(1, 2), mods=())[0])
    for key, array in mixed.arrays.items():
        assert np.array_equal(array.numpy(), none.arrays[key].numpy())
    assert "fedcodec.v1" in apps[2].saw[0].content


def test_a_server_without_the_grid_does_not_notice_the_mod():
    with_mod = start(fedavg(fraction_evaluate=1.0), loopback()[0])
    without = start(fedavg(fraction_evaluate=1.0), loopback(mods=())[0])
    for key, array in with_mod.arrays.items():
        assert array.data == without.arrays[key].data


def test_models_travel_in_the_dtypes_of_the_first():
    inner, apps = loopback()
    result = start(strategies.FedAdam(fraction_evaluate=0.0), CodecGrid(inner, poll_seconds=0))
    assert result.arrays["weight"].numpy().dtype == np.float64  # of Flower's own making
    for app in apps.values():
        for message in app.saw:
            dtypes = {name: str(array.dtype) for name, array in message.content["arrays"].items()}
            assert dtypes == {"weight": "float32", "bias": "float32", "steps": "int64"}


def test_models_that_take_turns_keep_their_dtypes():
    inner, apps = loopback(names=(1,))
    grid = Recorder(inner)
    for arrays in ({"a": np.ones(2, "f4")}, {"b": np.ones(3, "f4")}, {"a": np.ones(2)}):
        content = RecordDict({"arrays": model(**arrays)})
        grid.send_and_receive([Message(content, dst_node_id=101, message_type="evaluate")])
    dtypes = [plain(message.content["arrays"]) for message in apps[1].saw]
    assert [str(array.dtype) for arrays in dtypes for array in arrays.values()] == ["float32"] * 3


def test_a_reply_of_other_tensors_travels_as_it_is(caplog):
    def app(message, context):
        content = {
            "arrays": model(other=np.ones(3)),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    inner = LoopbackGrid([Node(1, app, [codec_mod])])
    grid = Recorder(inner, uplink="int8")
    with _flower_log(caplog):
        start(fedavg(min_train_nodes=1, min_available_nodes=1), grid, rounds=1)
    assert plain(grid.rounds[0][0].content["arrays"])["other"].tolist() == [1, 1, 1]
    assert "uncompressed" in caplog.text


def test_a_model_that_changed_on_the_way_is_refused_by_the_client():
    def meddler(message, context, call_next):
        message.content["arrays"] = model(
            **(plain(message.content["arrays"]) | {"bias": np.float32(1)})
        )
        return call_next(message, context)

    inner, _ = loopback(names=(1,), mods=(meddler, codec_mod))
    grid = Recorder(inner, uplink="int8")
    start(fedavg(min_train_nodes=1, min_available_nodes=1), grid, rounds=1)
    assert "the model that arrived" in grid.rounds[0][0].error.reason


def test_bad_options_are_named():
    inner, _ = loopback()
    for options, message in [
        ({"uplink": "unknown(1)"}, "unknown"),
        ({"uplink": "ternary"}, "needs a select stage"),
        ({"uplink": fc.Mask.of(np.ones(3, bool))}, "clients cannot make"),
        ({"downlink": "topk(0.1)"}, "set weights to zero"),
        ({"models": 0}, "models is 0"),
        ({"poll_seconds": -1}, "poll_seconds is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CodecGrid(inner, **options)
    with pytest.raises(TypeError, match="CodecGrid already"):
        CodecGrid(CodecGrid(inner))


# Nothing is lost, and nothing counts twice


def flushed(grid, inner, apps, rounds, strategy=None):
    """Run rounds and one more with a lossless codec: then all that was trained has arrived, once."""
    start(strategy or fedavg(), grid, rounds=rounds)
    last = Recorder(inner, uplink="raw")
    start(strategy or fedavg(), last, rounds=1)
    arrived = {name: np.zeros((SIZE // 10, 10)) for name in apps}
    for recorder in (grid, last):
        for replies in recorder.rounds:
            for reply in replies:
                if not reply.has_error():
                    name = reply.content["metrics"]["name"]
                    base = recorder.bases[reply.metadata.reply_to_message_id]
                    arrived[name] += plain(reply.content["arrays"])["weight"] - base["weight"]
    return arrived


@pytest.mark.parametrize("home", ["context", "file"])
@pytest.mark.parametrize("fault", ["none", "lost", "twice", "corrupted", "asked twice"])
def test_residuals_survive_faults(home, fault, tmp_path):
    configs = {name: {"state-dir": str(tmp_path / str(name))} for name in (1, 2)}
    seen = []

    def spoil(reply):
        seen.append(reply)
        if len(seen) != 3:  # the second round's first
            return [reply]
        if fault == "lost":
            return []
        if fault == "twice":
            return [reply, copy.deepcopy(reply)]
        if fault == "corrupted":
            return [damaged(reply, lambda data: data[:-9] + b"\1" + data[-8:])]
        return [reply]

    inner, apps = loopback(spoil=spoil, configs=configs if home == "file" else None)
    if fault == "asked twice":
        first = inner.nodes[101]
        inner.nodes[101] = _Twice(first)
    grid = Recorder(inner, uplink="topk(0.05)")
    arrived = flushed(grid, inner, apps, 4)
    for name in apps:
        once = sum(step(name, number) for number in (1, 2, 3, 4, 1))
        assert np.array_equal(arrived[name], once), (name, fault)
    assert bool(list(tmp_path.iterdir())) == (home == "file")


class _Twice:
    """A node that works on every message twice; the second reply is the one that is sent."""

    def __init__(self, node):
        self.node = node

    def reply(self, message):
        self.node.reply(message)
        return self.node.reply(message)


def test_a_restarted_node_with_a_folder_goes_on_under_another_id(tmp_path, caplog):
    configs = {name: {"state-dir": str(tmp_path / str(name))} for name in (1, 2)}
    inner, apps = loopback(configs=configs)
    grid = Recorder(inner, uplink="topk(0.05)")
    start(fedavg(), grid, rounds=2)
    del inner.nodes[101]
    inner.nodes[555] = Node(555, apps[1], [codec_mod], configs[1])
    with _flower_log(caplog):
        arrived = flushed(grid, inner, apps, 2)
    for name in apps:
        once = 2 * (step(name, 1) + step(name, 2)) + step(name, 1)
        assert np.array_equal(arrived[name], once)
    assert "residual" not in caplog.text


def test_a_restarted_node_without_a_folder_starts_at_zero_and_says_so(caplog):
    inner, apps = loopback()
    grid = Recorder(inner, uplink="topk(0.05)")
    start(fedavg(), grid, rounds=2)
    inner.nodes[101].restart()
    with _flower_log(caplog):
        arrived = flushed(grid, inner, apps, 2)
    assert "node 101 holds no residual of run 77 any more" in caplog.text
    once = {name: 2 * (step(name, 1) + step(name, 2)) + step(name, 1) for name in apps}
    assert np.array_equal(arrived[2], once[2])
    assert np.abs(arrived[1] - once[1]).max() > 0.1


def test_a_restarted_node_of_another_id_without_a_folder_says_so_too(caplog):
    inner, apps = loopback()
    grid = Recorder(inner, uplink="topk(0.05)")
    with _flower_log(caplog):
        start(fedavg(), grid, rounds=2)
        assert "residual" not in caplog.text
        del inner.nodes[101]
        inner.nodes[555] = Node(555, apps[1], [codec_mod])
        start(fedavg(), grid, rounds=2)
    joined = {text for text in caplog.messages if "with a residual of zero" in text}
    assert [text.split(";")[0] for text in joined] == [
        "node 555 joins run 77 with a residual of zero"
    ]


def test_nodes_that_share_a_folder_are_told(tmp_path):
    configs = {name: {"state-dir": str(tmp_path)} for name in (1, 2)}
    inner, _ = loopback(configs=configs)
    grid = Recorder(inner, uplink="topk(0.05)")
    start(fedavg(), grid, rounds=2)
    reasons = [r.error.reason for replies in grid.rounds for r in replies if r.has_error()]
    assert any("each needs its own" in reason for reason in reasons)


def test_nodes_of_other_configs_may_share_a_folder(tmp_path):
    configs = {name: {"state-dir": str(tmp_path), "partition-id": name} for name in (1, 2)}
    inner, apps = loopback(configs=configs)
    grid = Recorder(inner, uplink="topk(0.05)")
    arrived = flushed(grid, inner, apps, 2)
    for name in apps:
        once = step(name, 1) + step(name, 2) + step(name, 1)
        assert np.array_equal(arrived[name], once)


@pytest.mark.parametrize("folder", ["", 5, True])
def test_a_bad_folder_is_named_before_training(folder):
    inner, apps = loopback(configs={name: {"state-dir": folder} for name in (1, 2)})
    grid = Recorder(inner, uplink="topk(0.05)")
    start(fedavg(), grid, rounds=1)
    assert all("it must be a folder" in reply.error.reason for reply in grid.rounds[0])
    assert not any(app.saw for app in apps.values())


def test_feedback_may_be_switched_off_and_on():
    inner, apps = loopback()
    grid = Recorder(inner, uplink="topk(0.05)")
    start(fedavg(), grid, rounds=2)
    grid.error_feedback = False
    start(fedavg(), grid, rounds=1)
    sent_without = {}
    for reply in grid.rounds[-2]:  # after it comes an evaluation of nobody
        name = reply.content["metrics"]["name"]
        base = grid.bases[reply.metadata.reply_to_message_id]
        sent_without[name] = plain(reply.content["arrays"])["weight"] - base["weight"]
    grid.error_feedback = True
    arrived = flushed(grid, inner, apps, 1)
    for name in apps:
        once = step(name, 1) + step(name, 2) + step(name, 1) + step(name, 1)
        assert np.array_equal(arrived[name] - sent_without[name], once)


def test_of_two_messages_at_once_the_last_ones_reply_counts():
    inner, _ = loopback(names=(1,))
    grid = Recorder(inner, uplink="raw")
    base = plain(model())["weight"]

    def messages(*numbers):
        for number in numbers:
            config = ConfigRecord({"server-round": number})
            content = RecordDict({"arrays": model(), "config": config})
            yield Message(content, dst_node_id=101, message_type="train")

    replies = list(grid.send_and_receive(messages(1, 2)))
    assert [reply.has_error() for reply in replies] == [True, False]
    arrived = plain(replies[1].content["arrays"])["weight"] - base
    assert np.array_equal(arrived, step(1, 1) + step(1, 2))
    (reply,) = grid.send_and_receive(messages(3))
    arrived = plain(reply.content["arrays"])["weight"] - base
    assert np.array_equal(arrived, step(1, 3))
    assert len(grid._tickets) == 0


def test_every_node_may_have_a_model_of_its_own():
    inner, _ = loopback(names=(1, 2, 3, 4, 5))
    grid = Recorder(inner, uplink="int8")
    messages = []
    for node in inner.nodes:
        weights = plain(model()) | {"bias": np.float32(node)}
        content = {"arrays": model(**weights), "config": ConfigRecord({"server-round": 1})}
        messages.append(Message(RecordDict(content), dst_node_id=node, message_type="train"))
    replies = grid.send_and_receive(messages)
    assert [reply.content["arrays"]["bias"].numpy() for reply in replies] == list(inner.nodes)
    assert len(grid._models) == 5


def test_queries_travel_as_they_are():
    inner, apps = loopback(names=(1,))
    grid = Recorder(inner, uplink="int8", downlink="int8")
    content = RecordDict({"arrays": model(rates=np.array([0.001, 100.0]))})
    grid.send_and_receive([Message(content, dst_node_id=101, message_type="query.rates")])
    assert plain(apps[1].saw[0].content["arrays"])["rates"].tolist() == [0.001, 100]


def test_sizes_of_messages_can_be_counted():
    inner, _ = loopback()
    start(fedavg(), Recorder(inner, uplink="int8", downlink="int8"))
    for message in [*inner.sent, *inner.received]:
        for record in message.content.values():
            assert record.count_bytes() > 0


def test_a_foreign_record_in_the_context_is_named():
    inner, _ = loopback(names=(1,))
    inner.nodes[101].context.state["fedcodec.state"] = ConfigRecord({"mine": 1})
    grid = Recorder(inner, uplink="topk(0.1)")
    start(fedavg(min_train_nodes=1, min_available_nodes=1), grid, rounds=1)
    assert "fedcodec.state in Context.state is no state" in grid.rounds[0][0].error.reason


def test_without_error_feedback_nothing_is_kept():
    inner, _ = loopback()
    start(fedavg(), Recorder(inner, uplink="topk(0.05)", error_feedback=False))
    for node in inner.nodes.values():
        assert list(node.context.state) == []


def test_an_update_that_is_not_finite_is_an_error_and_keeps_the_residual():
    inner, apps = loopback()
    grid = Recorder(inner, uplink="topk(0.05)")
    honest = apps[1].__call__

    def app(message, context):
        reply = honest(message, context)
        if message.content["config"]["server-round"] == 2:
            weights = plain(reply.content["arrays"])
            weights["weight"][0, 0] = np.nan
            reply.content["arrays"] = model(**weights)
        return reply

    inner.nodes[101] = Node(101, app, [codec_mod])
    arrived = flushed(grid, inner, apps, 3)
    once = 2 * step(1, 1) + step(1, 3)
    assert np.array_equal(arrived[1], once)
    assert any(
        "NonFiniteError" in r.error.reason for rs in grid.rounds for r in rs if r.has_error()
    )


def test_another_model_drops_the_residual(caplog):
    inner, _ = loopback()
    grid = Recorder(inner, uplink="topk(0.05)")
    start(fedavg(), grid, rounds=1)
    other = model(weight=np.zeros((SIZE // 10, 10), "f4"), steps=np.int64(1))
    with _flower_log(caplog):
        start(fedavg(), grid, other, rounds=1)
    assert not any(reply.has_error() for reply in grid.rounds[-1])
    assert "the model is another one" in caplog.text


# Payloads of strangers


def damaged(reply, change, name=None):
    """Return a reply whose payload was changed."""
    spoiled = copy.deepcopy(reply)
    ((ticket, packed),) = spoiled.content["arrays"].items()
    data = change(packed.data)
    array = Array("uint8", (len(data),), packed.stype, data)
    spoiled.content["arrays"] = ArrayRecord({name or ticket: array})
    return spoiled


def _two(reply):
    spoiled = copy.deepcopy(reply)
    spoiled.content["arrays"]["more"] = Array(np.zeros(1))
    return spoiled


def _stale(inner):
    def spoiled(reply):
        ((_, earlier),) = inner.received[0].content["arrays"].items()
        return damaged(reply, lambda _: earlier.data)

    return spoiled


HOSTILE = {
    "corrupted": lambda inner: lambda r: damaged(r, lambda d: d[:20] + b"\xff" + d[21:]),
    "truncated": lambda inner: lambda r: damaged(r, lambda d: d[:-1]),
    "empty": lambda inner: lambda r: damaged(r, lambda d: b""),
    "oversized": lambda inner: lambda r: damaged(r, lambda d: d + bytes(1 << 20)),
    "of zeros": lambda inner: lambda r: damaged(r, lambda d: bytes(1 << 16)),
    "no ticket": lambda inner: lambda r: damaged(r, lambda d: d, "weight"),
    "another base": _stale,
    "other tensors": lambda inner: (
        lambda r: damaged(r, lambda d: fc.parse("int8").encode({"weight": np.ones(3, "f4")}))
    ),
    "no base": lambda inner: (
        lambda r: damaged(r, lambda d: fc.parse("int8").encode(plain(model()), framing="reference"))
    ),
    "two arrays": lambda inner: _two,
}


@pytest.mark.parametrize("kind", [strategies.FedAvg, StreamingFedAvg])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_bad_payload_spoils_nobody_elses_round(hostile, kind, caplog):
    inner, _ = loopback(names=(1, 2, 3))
    spoiled = HOSTILE[hostile](inner)

    def spoil(reply):
        second = len(inner.received) > 3
        return [spoiled(reply) if second and reply.metadata.src_node_id == 102 else reply]

    inner.spoil = spoil
    good, _ = loopback(names=(1, 2, 3))
    good.spoil = lambda reply: (
        [] if len(good.received) > 3 and reply.metadata.src_node_id == 102 else [reply]
    )
    options = {"uplink": "topk(0.1) | int8", "poll_seconds": 0.01}
    with _flower_log(caplog):
        found = start(fedavg(kind), CodecGrid(inner, **options), rounds=2)
    wanted = start(fedavg(kind), CodecGrid(good, **options), rounds=2)
    assert "node 102: its reply was refused" in caplog.text
    for key, array in found.arrays.items():
        assert array.data == wanted.arrays[key].data


def test_a_ticket_is_of_one_node_only(caplog):
    inner, _ = loopback(names=(1, 2))
    replies = []

    def spoil(reply):
        replies.append(reply)
        if len(replies) == 1:
            return []
        first, second = replies  # the second answers with the first one's ticket and payload
        stolen = copy.deepcopy(second)
        stolen.content["arrays"] = first.content["arrays"]
        return [stolen]

    inner.spoil = spoil
    with _flower_log(caplog):
        start(fedavg(), CodecGrid(inner, uplink="int8", poll_seconds=0.1), rounds=1)
    assert "it answers a message to node" in caplog.text


# Streaming


@pytest.mark.parametrize("kind", [strategies.FedAvg, StreamingFedAvg])
@pytest.mark.parametrize("downlink", [None, "raw"])
def test_arrays_of_all_kinds_come_through(kind, downlink):
    draw = np.random.default_rng(1)
    arrays = {
        "empty": np.zeros((2, 0, 3), "f4"),
        "": draw.normal(size=3).astype("f2"),
        "by columns/ä": np.asfortranarray(draw.normal(size=(3, 4))),
        "flags": np.array([True, False]),
        "bytes": np.arange(5, dtype="u1"),
        "long": np.array(-(2**62)),
    }

    def app(message, context):
        found = plain(message.content["arrays"])
        assert {name: (array.shape, array.dtype) for name, array in found.items()} == forms
        content = {"arrays": model(**found), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    forms = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    inner = LoopbackGrid([Node(number, app, [codec_mod]) for number in (1, 2)])
    grid = CodecGrid(inner, uplink="int8", downlink=downlink, poll_seconds=0)
    result = start(fedavg(kind), grid, model(**arrays), rounds=2)
    for name, array in arrays.items():
        assert np.array_equal(result.arrays[name].numpy(), array), name


@pytest.mark.parametrize("kind", [strategies.FedAvg, StreamingFedAvg])
def test_tensors_may_have_codecs_of_their_own(kind):
    inner, _ = loopback()
    rules = 'rules(topk(0.1) | int8; "bias" = raw)'
    grid = CodecGrid(
        inner, uplink=rules, downlink=rules.replace("topk(0.1) | ", ""), poll_seconds=0
    )
    result = start(fedavg(kind), grid, rounds=1)
    weight = result.arrays["weight"].numpy()
    assert np.count_nonzero(weight != plain(model())["weight"]) > 0
    assert result.arrays["bias"].numpy() == 0.5


@pytest.mark.parametrize("uplink", [None, "int8", "topk(0.1) | int8"])
def test_streaming_is_fedavg_but_for_rounding(uplink):
    options = {"uplink": uplink, "downlink": "int8", "poll_seconds": 0}
    streamed = start(fedavg(StreamingFedAvg), CodecGrid(loopback()[0], **options))
    whole = start(fedavg(), CodecGrid(loopback()[0], **options))
    for key, array in streamed.arrays.items():
        assert np.allclose(array.numpy(), whole.arrays[key].numpy(), atol=1e-5)
        assert array.dtype == str(model()[key].numpy().dtype)
    assert streamed.train_metrics_clientapp == whole.train_metrics_clientapp


def test_other_strategies_stream_before_it():
    class Streamed(strategies.FedAdam, StreamingFedAvg):
        pass

    options = {"uplink": "int8", "poll_seconds": 0}
    streamed = start(Streamed(fraction_evaluate=0.0), CodecGrid(loopback()[0], **options))
    whole = start(strategies.FedAdam(fraction_evaluate=0.0), CodecGrid(loopback()[0], **options))
    for key, array in streamed.arrays.items():
        assert np.allclose(array.numpy(), whole.arrays[key].numpy(), atol=1e-4)


@pytest.mark.parametrize("weight", [-1, float("nan"), [3], "lacks"])
def test_a_reply_with_a_bad_weight_is_refused(weight, caplog):
    inner, _ = loopback(names=(1, 2, 3))

    def spoil(reply):
        if reply.metadata.src_node_id == 102:
            metrics = {"other": 1} if weight == "lacks" else {"num-examples": weight}
            reply.content["metrics"] = MetricRecord(metrics)
        return [reply]

    inner.spoil = spoil
    grid = CodecGrid(inner, uplink="int8", poll_seconds=0)
    with _flower_log(caplog):
        result = start(fedavg(StreamingFedAvg), grid, rounds=1)
    assert "node 102: its reply was refused" in caplog.text
    assert result.arrays


@pytest.mark.parametrize("array", ["not npy", "of another shape"])
def test_streaming_refuses_arrays_that_cannot_be_added(array, caplog):
    inner, apps = loopback(names=(1, 2, 3))
    inner.nodes[102] = Node(102, apps[2])  # without the mod

    def spoil(reply):
        if reply.metadata.src_node_id == 102:
            shape = Array(np.ones((3, 3), "f4"))
            broken = Array("float32", (50, 10), "numpy.ndarray", b"\x93NUMPY rubbish")
            reply.content["arrays"]["weight"] = broken if array == "not npy" else shape
        return [reply]

    inner.spoil = spoil
    with _flower_log(caplog):
        result = start(fedavg(StreamingFedAvg), CodecGrid(inner, uplink="int8", poll_seconds=0))
    assert "node 102: its reply was refused" in caplog.text
    assert result.arrays["weight"].numpy().shape == (50, 10)


def test_streaming_never_makes_a_model_infinite(caplog):
    inner, _ = loopback(names=(1, 2))
    first = model(weight=np.full((50, 10), 2e38, "f4"), steps=np.int64(0))

    def spoil(reply):  # each is a valid payload, and the model plus it is beyond float32
        delta = {"weight": np.full((50, 10), 3e38, "f4"), "steps": np.int64(0)}
        name = fc.digest(plain(first))
        data = fc.Raw().encode(delta, framing="reference", base=name)
        return [damaged(reply, lambda _: data)]

    inner.spoil = spoil
    grid = CodecGrid(inner, uplink="int8", poll_seconds=0)
    with _flower_log(caplog):
        result = start(fedavg(StreamingFedAvg), grid, first, rounds=1)
    assert not result.arrays
    assert "'weight' would become infinite" in caplog.text


@pytest.mark.parametrize("kind", ["S1", "datetime64[s]", "complex64"])
def test_streaming_refuses_arrays_that_are_no_numbers(kind, caplog):
    inner, _ = loopback(names=(1, 2, 3), mods=())

    def spoil(reply):
        if reply.metadata.src_node_id == 102:
            reply.content["arrays"]["weight"] = Array(np.zeros((50, 10), kind))
        return [reply]

    inner.spoil = spoil
    with _flower_log(caplog):
        start(fedavg(StreamingFedAvg), CodecGrid(inner, uplink="int8", poll_seconds=0))
    assert "node 102: its reply was refused" in caplog.text


@pytest.mark.parametrize("metrics", [{"loss": [1.0, 2.0]}, {"other": 5.0}])
def test_streaming_leaves_odd_metrics_out_of_the_mean(metrics, caplog):
    inner, _ = loopback(names=(1, 2, 3))

    def spoil(reply):
        if reply.metadata.src_node_id == 102:
            reply.content["metrics"] = MetricRecord({"num-examples": 1, "name": 2, **metrics})
        return [reply]

    inner.spoil = spoil
    grid = CodecGrid(inner, uplink="int8", poll_seconds=0)
    with _flower_log(caplog):
        result = start(fedavg(StreamingFedAvg), grid, rounds=1)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.25)
    assert "other" not in result.train_metrics_clientapp[1]
    assert "1 replies have other metrics" in caplog.text


def test_streaming_needs_the_grid():
    with pytest.raises(TypeError, match="needs a CodecGrid, not a LoopbackGrid"):
        start(fedavg(StreamingFedAvg), loopback()[0])


@contextlib.contextmanager
def _flower_log(caplog):
    """Let a test see what Flower's loggers get, which they do not hand on."""
    loggers = [logging.getLogger("flwr"), logging.getLogger("fedcodec")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield
    for logger in loggers:
        logger.removeHandler(caplog.handler)
