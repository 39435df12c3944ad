"""NVFLARE's filters with its own DXOs, Shareables and contexts; a run of its simulator at the end."""

import collections
import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fedcodec as fc

pytest.importorskip("nvflare")

import nvflare_job
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_copy, make_reply
from nvflare.app_common.aggregators import InTimeAccumulateWeightedAggregator
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType

from fedcodec.adapters.client_state import FileHome
from fedcodec.adapters.nvflare import ModelDecoder, ModelEncoder, UpdateDecoder, UpdateEncoder

common_decomposers.register()

WEIGHTS, DIFF = DataKind.WEIGHTS, DataKind.WEIGHT_DIFF
SIZE = 200


def model():
    draw = np.random.default_rng(0)
    return {
        "weight": draw.normal(size=(SIZE // 10, 10)).astype("f4"),
        "half": draw.normal(size=7).astype("f2"),
        "double": draw.normal(size=3),
        "scale": np.float32(0.5).reshape(()),
        "steps": np.array(7, "i8"),
    }


def step(number):
    """Whole numbers: their sums are exact."""
    return {"weight": np.random.default_rng(number).integers(-9, 9, SIZE).astype("f4")}


def result(data, kind=DIFF, **meta):
    return DXO(kind, data, {"round": 3, **meta}).to_shareable()


class Engine:
    """All that filters ask of NVFLARE's engines."""

    def __init__(self, workspace):
        self._workspace = workspace

    def get_workspace(self):
        return self._workspace

    def fire_event(self, event_type, fl_ctx):
        """Nobody listens."""


class Federation:
    """A server and its clients, whose filters are called as NVFLARE's runners do."""

    def __init__(self, folder, encoder, decoder=None):
        self.folder, self.encoder = folder, encoder
        self.decoder = decoder or UpdateDecoder()
        self.tasks = collections.Counter()

    def context(self, here, there, task_id, task="train"):
        context, peer = FLContext(), FLContext()
        for target, name in ((context, here), (peer, there)):
            target.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=True)
        context.set_peer_context(peer)
        run = SimpleNamespace(get_run_dir=lambda job: str(self.folder / here / job))
        for key, value in {
            ReservedKey.ENGINE: Engine(run),
            ReservedKey.RUN_NUM: "job",
            FLContextKey.TASK_NAME: task,
            FLContextKey.TASK_ID: task_id,
        }.items():
            context.set_prop(key, value, private=True, sticky=False)
        return context

    def sent(self, data, client="site-1", kind=DIFF, told=True, task_id=None):
        """Return a client's answer to a task of the server, as it travels."""
        self.tasks[client] += 1
        task_id = task_id or f"{client}/{self.tasks[client]}"
        task = Shareable()
        if told:
            self.tell(task, self.context("server", client, task_id))
        context = self.context(client, "server", task_id)
        context.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
        self.encoder.handle_event(EventType.BEFORE_TASK_DATA_FILTER, context)
        shareable = data if isinstance(data, Shareable) else result(data, kind)
        travels = fobs.loads(fobs.dumps(self.encoder.process(shareable, context)))
        return SimpleNamespace(client=client, task_id=task_id, shareable=travels)

    def tell(self, task, context):
        context.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
        self.decoder.handle_event(EventType.BEFORE_TASK_DATA_FILTER, context)

    def received(self, sent):
        """Return what the server's filter makes of it."""
        context = self.context("server", sent.client, sent.task_id)
        return self.decoder.process(sent.shareable, context)

    def residual(self, client="site-1", name="train"):
        """Return what the client's file still holds once its last payload has arrived."""
        state = FileHome(self.folder / client / "job" / "fedcodec" / f"{client}-{name}.npz").load()
        return state["compensated"]["weight"] - fc.decode(state["payload"])["weight"]


def payload_of(sent):
    return from_shareable(sent.shareable).data["payload"]


# Round trips


@pytest.mark.parametrize("kind", [WEIGHTS, DIFF])
@pytest.mark.parametrize("codec", ["raw", "int8", 'cast("float16") | zstd'])
def test_an_update_arrives_as_the_codec_leaves_it(tmp_path, kind, codec):
    federation = Federation(tmp_path, UpdateEncoder(codec, error_feedback=False))
    sent = federation.sent(model(), kind=kind)
    packed = from_shareable(sent.shareable)
    assert list(packed.data) == ["payload"]
    assert (packed.data["payload"].dtype, packed.data_kind) == (np.uint8, kind)
    wanted = fc.decode(packed.data["payload"])
    assert len(packed.data["payload"]) == len(fc.parse(codec).encode(model()))
    found = from_shareable(federation.received(sent))
    assert found.data_kind == kind
    assert found.get_filter_history() == ["UpdateEncoder", "UpdateDecoder"]
    assert found.meta["round"] == 3
    assert set(found.meta) == {"round", MetaKey.FILTER_HISTORY}
    for name, array in model().items():
        assert (found.data[name].dtype, found.data[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found.data[name], wanted[name])
    assert not list(tmp_path.iterdir())


def test_a_model_arrives_as_the_codec_leaves_it():
    shareable = result(model(), WEIGHTS)
    encoded = ModelEncoder("int8").process(shareable, FLContext())
    travelled = fobs.loads(fobs.dumps(encoded))
    wanted = fc.decode(from_shareable(travelled).data["payload"])
    found = from_shareable(ModelDecoder().process(travelled, FLContext()))
    assert {name: array.dtype for name, array in found.data.items()} == {
        name: array.dtype for name, array in model().items()
    }
    assert np.array_equal(found.data["weight"], wanted["weight"])
    assert found.data["steps"] == 7
    assert np.abs(found.data["weight"] - model()["weight"]).max() < 0.05
    assert found.meta["round"] == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_s_tensors_come_back_as_torch_s(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    fobs.register(pytest.importorskip("nvflare.app_opt.pt.decomposers").TensorDecomposer)
    tensor = torch.arange(8).to(getattr(torch, dtype))
    federation = Federation(tmp_path, UpdateEncoder("raw"))
    found = from_shareable(federation.received(federation.sent({"weight": tensor}))).data["weight"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("decoder", [ModelDecoder(), UpdateDecoder()])
def test_what_is_not_marked_passes_as_it_is(tmp_path, decoder):
    context = Federation(tmp_path, None).context("server", "site-1", "1")
    data = model()
    assert from_shareable(decoder.process(result(data), context)).data is data
    metrics = result({"loss": 1.0}, DataKind.METRICS)
    assert from_shareable(decoder.process(metrics, context)).data == {"loss": 1.0}
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    assert decoder.process(failed, context) is failed


def test_a_server_without_the_decoder_gets_plain_updates(tmp_path, caplog):
    federation = Federation(tmp_path, UpdateEncoder("topk(0.1)"))
    data = model()
    sent = federation.sent(data, told=False)
    assert np.array_equal(from_shareable(sent.shareable).data["weight"], data["weight"])
    assert "the server has no UpdateDecoder" in caplog.text
    assert not list(tmp_path.iterdir())


def test_each_task_and_client_draws_differently(tmp_path):
    federation = Federation(tmp_path, UpdateEncoder("int8(stochastic=True)", error_feedback=False))
    payloads = [
        federation.sent(model(), client).shareable for client in ("site-1", "site-1", "site-2")
    ]
    drawn = {from_shareable(payload).data["payload"].tobytes() for payload in payloads}
    assert len(drawn) == 3


def test_bad_options_are_named(tmp_path):
    for kind in (ModelEncoder, UpdateEncoder):
        with pytest.raises(ValueError, match="unknown"):
            kind("unknown(1)")
        with pytest.raises(TypeError, match="codec"):
            kind(3)
    for codec in ("topk(0.1)", 'rules(int8; "*.bias" = randomk(0.5))'):
        with pytest.raises(ValueError, match="set weights to zero"):
            ModelEncoder(codec)
        with pytest.raises(ValueError, match="set weights to zero"):
            Federation(tmp_path, UpdateEncoder(codec)).sent(model(), kind=WEIGHTS)


def test_jobs_are_written_with_their_arguments(tmp_path):
    job = FedJob(name="job")
    codec = fc.TopK(0.1) | fc.Int8()
    encoder = UpdateEncoder(codec, error_feedback=False)
    for add, item, chain in [
        (job.to_server, ModelEncoder(fc.Int8()), FilterType.TASK_DATA),
        (job.to_server, UpdateDecoder(max_bytes=99), FilterType.TASK_RESULT),
        (job.to_clients, nvflare_job.Trainer(), None),
        (job.to_clients, ModelDecoder(), FilterType.TASK_DATA),
        (job.to_clients, encoder, FilterType.TASK_RESULT),
    ]:
        add(item, tasks=["train"], **({"filter_type": chain} if chain else {}))
    job.export_job(str(tmp_path))
    found = {}
    for path in tmp_path.rglob("config_fed_*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for chain in ("task_data_filters", "task_result_filters"):
            ((built,),) = [part["filters"] for part in config[chain]]
            found[built["path"].removeprefix("fedcodec.adapters.nvflare.")] = built["args"]
    assert found == {
        "ModelEncoder": {"codec": "int8"},
        "UpdateDecoder": {"max_bytes": 99},
        "ModelDecoder": {},
        "UpdateEncoder": {"codec": "topk(0.1) | int8", "error_feedback": False},
    }


def test_a_payload_beyond_the_limit_is_refused():
    encoded = ModelEncoder("int8").process(
        result({"weight": np.ones(9, "f4")}, WEIGHTS), FLContext()
    )
    with pytest.raises(fc.DecodeError, match="limit"):
        ModelDecoder(max_bytes=35).process(encoded, FLContext())
    assert len(from_shareable(ModelDecoder(36).process(encoded, FLContext())).data["weight"]) == 9


# Models: once for all clients


class Counted:
    """Counts what a filter encodes."""

    def __init__(self, encoder, monkeypatch):
        self.calls, inner = 0, encoder._parsed

        def encode(*args, **kwargs):
            self.calls += 1
            return inner.encode(*args, **kwargs)

        monkeypatch.setattr(encoder, "_parsed", SimpleNamespace(encode=encode))


def test_a_model_is_encoded_once_for_all_clients_of_a_task(monkeypatch):
    encoder = ModelEncoder("int8(stochastic=True)")
    counted = Counted(encoder, monkeypatch)
    payloads = []
    for task in ("first", "second"):
        shared = result(model(), WEIGHTS)
        for _ in range(4):
            mine = make_copy(shared)  # as NVFLARE does for each client
            mine.set_header(ReservedHeaderKey.MSG_ROOT_ID, task)
            payloads.append(from_shareable(encoder.process(mine, FLContext())).data["payload"])
    assert counted.calls == 2
    assert len({payload.tobytes() for payload in payloads[:4]}) == 1
    assert len({payload.tobytes() for payload in payloads}) == 2


def test_models_that_change_in_place_are_encoded_anew():
    encoder = ModelEncoder("raw")
    data = model()
    for task in ("first", None, None, "second"):
        shareable = result(data, WEIGHTS)
        if task is not None:
            shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, task)
        payload = from_shareable(encoder.process(shareable, FLContext())).data["payload"]
        assert np.array_equal(fc.decode(payload)["weight"], data["weight"])
        data["weight"] += 1


class Data(dict):
    """A dict to which there may be weak references."""


def test_a_model_is_held_as_long_as_its_id_stands_for_it():
    encoder = ModelEncoder("raw")
    held = []
    for task in ("first", "first", "second"):
        shareable = result(Data(model()), WEIGHTS)
        shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, task)
        held.append(weakref.ref(from_shareable(shareable).data))
        encoder.process(shareable, FLContext())
        del shareable
    gc.collect()
    assert [reference() is not None for reference in held] == [False, False, True]
    encoder.process(result(Data(model()), WEIGHTS), FLContext())
    assert held[2]() is None


def test_several_models_of_a_task_do_not_mix(monkeypatch):
    encoder = ModelEncoder("raw")
    counted = Counted(encoder, monkeypatch)
    parts = {name: DXO(WEIGHTS, step(number)) for number, name in enumerate("ab")}
    for _ in range(2):
        shareable = DXO(DataKind.COLLECTION, dict(parts)).to_shareable()
        shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, "task")
        encoded = from_shareable(encoder.process(shareable, FLContext())).data
        for number, name in enumerate("ab"):
            found = fc.decode(encoded[name].data["payload"])["weight"]
            assert np.array_equal(found, step(number)["weight"])
    assert counted.calls == 2


# Nothing is lost, and nothing counts twice


def damaged(sent):
    dxo = from_shareable(sent.shareable)
    payload = dxo.data["payload"].copy()
    payload[len(payload) // 2] ^= 255
    dxo.data["payload"] = payload
    return dxo


@pytest.mark.parametrize("fault", ["none", "lost", "twice", "damaged", "asked twice", "others"])
def test_what_came_and_the_residual_are_what_was_trained(tmp_path, fault):
    federation = Federation(tmp_path, None)
    arrived = {"site-1": np.zeros(SIZE), "site-2": np.zeros(SIZE)}
    for number in range(5):
        for client, total in arrived.items():
            federation.encoder = UpdateEncoder("topk(0.1)")  # of another process
            sent = federation.sent(step(number), client)
            spoiled = number == 2 and client == "site-1"
            if spoiled and fault == "lost":
                continue
            if spoiled and fault == "damaged":
                damaged(sent).update_shareable(sent.shareable)
                assert "DXO" not in federation.received(sent)
                continue
            if spoiled and fault == "asked twice":
                first = payload_of(sent).tobytes()
                sent = federation.sent(step(99), client, task_id=sent.task_id)
                assert payload_of(sent).tobytes() == first
            if spoiled and fault == "twice":
                federation.received(copied(sent))
            total += from_shareable(federation.received(sent)).data["weight"]
            if fault == "others":
                others(federation, client)
    trained = sum(step(number)["weight"] for number in range(5))
    for client, total in arrived.items():
        residual = federation.residual(client)
        assert np.array_equal(total + residual, trained)
        assert np.count_nonzero(residual) > SIZE // 4
    assert sorted(path.name for path in tmp_path.rglob("*.npz")) == [
        "site-1-train.npz",
        "site-2-train.npz",
    ]


def others(federation, client):
    """Let a client answer tasks that are not for updates: once with a payload, often without."""
    federation.encoder = UpdateEncoder("int8")
    answer = federation.sent(step(0), client, kind=WEIGHTS)
    federation.received(answer)
    for number in range(20):
        answer.shareable = result({"loss": 1.0}, DataKind.METRICS)
        answer.task_id = f"metrics {number}"
        federation.received(answer)


def copied(sent):
    return SimpleNamespace(
        client=sent.client,
        task_id=sent.task_id,
        shareable=fobs.loads(fobs.dumps(sent.shareable)),
    )


def test_each_part_of_a_collection_has_a_residual_of_its_own(tmp_path):
    federation = Federation(tmp_path, UpdateEncoder("topk(0.1)"))
    arrived = {"a": np.zeros(SIZE), "b": np.zeros(SIZE)}
    for number in range(3):
        parts = {"a": DXO(DIFF, step(number)), "b": DXO(DIFF, step(number + 10))}
        sent = federation.sent(DXO(DataKind.COLLECTION, parts).to_shareable())
        if number == 1:  # one part of it is damaged: none of it counts
            sent.shareable["DXO"]["data"]["b"].data["payload"] = np.zeros(9, np.uint8)
            assert "DXO" not in federation.received(sent)
            continue
        for name, part in from_shareable(federation.received(sent)).data.items():
            arrived[name] += part.data["weight"]
    for start, name in ((0, "a"), (10, "b")):
        trained = sum(step(start + number)["weight"] for number in range(3))
        residual = federation.residual(name=f"train.{name}")
        assert np.array_equal(arrived[name] + residual, trained)


def test_weights_and_what_asks_for_none_leave_no_residual(tmp_path):
    federation = Federation(tmp_path, UpdateEncoder("int8"))
    federation.sent(model(), kind=WEIGHTS)
    federation.encoder = UpdateEncoder("topk(0.1)", error_feedback=False)
    federation.sent(model())
    assert not list(tmp_path.iterdir())


def test_an_update_that_is_not_finite_is_an_error_and_keeps_the_residual(tmp_path):
    federation = Federation(tmp_path, UpdateEncoder("topk(0.1)"))
    arrived = from_shareable(federation.received(federation.sent(step(0)))).data["weight"]
    bad = step(1)
    bad["weight"][3] = np.nan
    with pytest.raises(fc.NonFiniteError, match="weight"):
        federation.sent(bad)
    arrived = arrived + from_shareable(federation.received(federation.sent(step(2)))).data["weight"]
    trained = step(0)["weight"] + step(2)["weight"]
    assert np.array_equal(arrived + federation.residual(), trained)


# Payloads of strangers

HOSTILE = {
    "corrupted": lambda dxo: None,
    "truncated": lambda dxo: dxo.data.update(payload=dxo.data["payload"][:-1]),
    "empty": lambda dxo: dxo.data.update(payload=np.zeros(0, np.uint8)),
    "of zeros": lambda dxo: dxo.data.update(payload=np.zeros(1 << 12, np.uint8)),
    "of floats": lambda dxo: dxo.data.update(payload=np.zeros(9, np.float32)),
    "no array": lambda dxo: dxo.data.update(payload="text"),
    "two arrays": lambda dxo: dxo.data.update(more=np.zeros(1, np.uint8)),
    "another name": lambda dxo: dxo.data.update(weight=dxo.data.pop("payload")),
    "no names": lambda dxo: dxo.data.update(
        payload=np.frombuffer(fc.Raw().encode(np.ones(3, np.float32)), np.uint8)
    ),
    "a base": lambda dxo: dxo.data.update(
        payload=np.frombuffer(fc.Raw().encode(step(0), base=bytes(8)), np.uint8)
    ),
    "by reference": lambda dxo: dxo.data.update(
        payload=np.frombuffer(fc.Raw().encode(step(0), framing="reference"), np.uint8)
    ),
    "an unknown mark": lambda dxo: dxo.set_meta_prop("fedcodec", "jax"),
    "no mark of ours": lambda dxo: dxo.set_meta_prop("fedcodec", np.zeros(3)),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_bad_payload_is_dropped_and_its_sender_named(hostile, tmp_path, caplog):
    federation = Federation(tmp_path, UpdateEncoder("topk(0.1)"))
    sent = federation.sent(step(0))
    dxo = damaged(sent) if hostile == "corrupted" else from_shareable(sent.shareable)
    HOSTILE[hostile](dxo)
    dxo.update_shareable(sent.shareable)
    with pytest.raises(fc.DecodeError):
        ModelDecoder().process(copied(sent).shareable, FLContext())
    dropped = federation.received(sent)
    assert "the update of site-1 is dropped" in caplog.text
    # What NVFLARE's workflows do with it: the first is FedAvg's, the second ScatterAndGather's.
    assert dropped.get_return_code() == ReturnCode.OK
    with pytest.raises(ValueError, match="not a valid DXO"):
        FLModelUtils.from_shareable(dropped)
    assert not InTimeAccumulateWeightedAggregator().accept(dropped, FLContext())
    assert federation.residual("site-1") is not None
    task = Shareable()
    federation.tell(task, federation.context("server", "site-1", "next"))
    assert task.get_header("fedcodec.taken") == []


# NVFLARE's own processes


@pytest.mark.slow
def test_the_simulator_loses_no_residual_where_processes_are_shared(tmp_path):
    script = Path(nvflare_job.__file__)
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300, cwd=tmp_path)
    log = (tmp_path / "server" / "log.txt").read_text(encoding="utf-8")
    server = tmp_path / "server" / "simulate_job"
    assert log.count("is dropped") == 1
    assert "the update of site-3 is dropped" in log
    arrived = sorted(path.name for path in server.glob("site-*.npz"))
    names = [f"site-{number + 1}" for number in range(nvflare_job.CLIENTS)]
    rounds = range(nvflare_job.ROUNDS)
    assert arrived == sorted({f"{n}-{r}.npz" for n in names for r in rounds} - {"site-3-1.npz"})
    for name in names:
        folder = tmp_path / name / "simulate_job"
        processes = (folder / "processes.txt").read_text(encoding="utf-8").split()
        assert len(processes) == len(set(processes)) == nvflare_job.ROUNDS
        state = FileHome(folder / "fedcodec" / f"{name}-train.npz").load()
        last = fc.decode(state["payload"])
        for tensor in nvflare_job.SHAPES:
            total = state["compensated"][tensor] - last[tensor]
            assert np.count_nonzero(total)
            for path in server.glob(f"{name}-*.npz"):
                with np.load(path) as update:
                    total = total + update[tensor]
            trained = sum(nvflare_job.step(name, number)[tensor] for number in rounds)
            assert np.array_equal(total, trained)
    assert (server / f"model-{nvflare_job.ROUNDS - 1}.npz").exists()


@pytest.mark.slow
def test_the_example_learns_from_payloads(tmp_path):
    pytest.importorskip("sklearn")
    folder = Path(__file__).resolve().parents[1] / "examples" / "nvflare"
    command = [sys.executable, "job.py", "--rounds", "2", "--workspace", tmp_path]
    run = subprocess.run(
        command, check=True, timeout=300, cwd=folder, text=True, capture_output=True
    )
    accuracy = re.search(r"test accuracy: (0\.\d+)", run.stdout)
    assert 0.7 < float(accuracy[1]) < 1
    sizes = [int(size) for size in re.findall(r"the update takes (\d+) bytes", run.stdout)]
    assert len(sizes) == 6
    assert max(sizes) < 65 * 10 * 4 / 15
