"""Clients that add known numbers to models of chosen sizes, and a server that writes down what arrived."""

import gc
import json
import logging
import re
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedcodec.adapters.flower import CodecGrid, StreamingFedAvg, codec_mod

SHAPES = {
    "1 kB": {"weight": (250,)},
    "16 MB": {f"layer{number}": (1000, 1000) for number in range(4)},
    "48 MB": {f"layer{number}": (1000, 1000) for number in range(12)},
    "81 tensors": {
        **{f"layer{number}.weight": (90, 90) for number in range(40)},
        **{f"layer{number}.bias": (90,) for number in range(40)},
        "scale": (1,),
    },
}


def initial(model):
    return noise(model, 0, 0)


def step(model, partition, number):
    """What a client of this partition adds in the round of this number."""
    return noise(model, 1 + partition, number)


def noise(model, *seed):
    """Whole numbers: means of two and of four, and differences, are exact."""
    draw = np.random.default_rng(seed)
    return {
        name: draw.integers(-9, 10, shape).astype(np.float32)
        for name, shape in SHAPES[model].items()
    }


def plain(record):
    return {name: array.numpy() for name, array in record.items()}


client = ClientApp(mods=[codec_mod])


@client.train()
def train(message, context):
    model, partition = context.run_config["model"], int(context.node_config["partition-id"])
    number = message.content["config"]["server-round"]
    pause = str(context.run_config["pause"])  # a folder: a client in it waits for its death
    if pause and Path(pause, f"{partition}-{number}").exists():
        Path(pause, f"{partition}-{number}").rename(Path(pause, "reached"))
        time.sleep(600)
    weights, change = plain(message.content["arrays"]), step(model, partition, number)
    new = {name: Array(weights[name] + change[name]) for name in weights}
    metrics = MetricRecord({"num-examples": 1, "partition": partition})
    content = {"arrays": ArrayRecord(new), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


@client.evaluate()
def evaluate(message, context):
    weights = plain(message.content["arrays"])
    loss = float(np.mean([np.abs(array).mean() for array in weights.values()]))
    metrics = MetricRecord({"num-examples": 1, "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


class Log:
    """What every round took and brought: by its number, and by partition."""

    def __init__(self):
        self.seconds, self.arrived, self.errors, self.metrics = [], {}, [], []

    def of(self, strategy):
        """Return a kind of strategy that writes down here."""
        log = self

        class Logged(strategy):
            def configure_train(self, number, arrays, config, grid):
                log.began, log.base = time.perf_counter(), plain(arrays) if log.watches else None
                return super().configure_train(number, arrays, config, grid)

            def aggregate_train(self, number, replies):
                if log.watches:
                    replies = list(replies)
                    log.note(replies)
                arrays, metrics = super().aggregate_train(number, replies)
                log.metrics.append(dict(metrics or {}))
                return arrays, metrics

            def aggregate_evaluate(self, number, replies):
                metrics = super().aggregate_evaluate(number, replies)
                log.seconds.append(time.perf_counter() - log.began)
                return metrics

        return Logged

    watches = False

    def note(self, replies):
        for reply in replies:
            if reply.has_error():
                self.errors.append(reply.error.reason)
                continue
            partition = reply.content["metrics"]["partition"]
            weights = plain(reply.content["arrays"])
            so_far = self.arrived.setdefault(partition, dict.fromkeys(weights, 0.0))
            for name, array in weights.items():
                so_far[name] = so_far[name] + array.astype("f8") - self.base[name]


class Repeated(CodecGrid):
    """Takes every node for several clients."""

    repeat = 1

    def get_node_ids(self):
        return [node for node in super().get_node_ids() for _ in range(self.repeat)]


def memory(what):
    """Return kilobytes that this process has (VmRSS), or had at most (VmHWM)."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


server = ServerApp()


@server.main()
def main(grid, context):
    config = context.run_config
    log = Log()
    log.watches = bool(config["flush"])
    kind = log.of(StreamingFedAvg if config["streaming"] else FedAvg)
    options = {"poll_seconds": 0.2, "downlink": config["downlink"] or None}
    arrays = ArrayRecord({name: Array(a) for name, a in initial(config["model"]).items()})
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most starts at what there is now
    idle = memory("VmRSS")

    def start(uplink, rounds):
        strategy = kind(
            fraction_evaluate=float(config["evaluate"]),
            min_train_nodes=config["clients"],
            min_evaluate_nodes=config["clients"] if config["evaluate"] else 0,
            min_available_nodes=config["clients"],
        )
        codec_grid = Repeated(grid, uplink=uplink or None, **options)
        codec_grid.repeat = config["repeat"]
        return strategy.start(
            codec_grid, arrays, num_rounds=rounds, timeout=config["timeout"]
        ).arrays

    arrays = start(config["uplink"], config["rounds"])
    if config["flush"]:  # what clients hold back comes with a lossless codec
        arrays = start("raw", 1)
    peak = memory("VmHWM")
    output = Path(config["output"])
    np.savez(output / "arrays.npz", **plain(arrays))
    for partition, arrived in log.arrived.items():
        np.savez(output / f"arrived-{partition}.npz", **arrived)
    result = {
        "seconds": log.seconds,
        "metrics": log.metrics,
        "errors": log.errors,
        "idle": idle,
        "peak": peak,
    }
    (output / "result.json").write_text(json.dumps(result))
    logging.getLogger("flwr").info("done")
