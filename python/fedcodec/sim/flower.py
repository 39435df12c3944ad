"""The same experiment on Flower's simulation engine: clients in many processes, through `fedcodec.adapters.flower`."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from time import perf_counter, sleep

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedcodec.adapters.flower import CodecGrid, ReplySum, codec_mod

from .federation import Exchange, LocalTraining, Run, encode_seed, federate, prepare
from .models import Update
from .settings import Settings


def simulate_in_flower(
    settings: Settings, codec: str, seed: int, on_round: Callable[[], None] | None = None
) -> Run:
    """Do what `fedcodec.sim.federation.simulate` does, with the clients in Flower's processes.

    Replies are added in the order of that function, and every process computes on one torch thread: accuracies and
    losses are the same. Bytes are those of arrays as they travel in Flower.

    Parameters
    ----------
    settings, codec, seed, on_round
        As for `simulate`.

    Returns
    -------
    Run

    Raises
    ------
    FileNotFoundError, ValueError
        As for `simulate`.
    RuntimeError
        If a client failed or Flower did.
    """
    data, parts = prepare(settings, seed)
    weights = [len(part) for part in parts]
    runs: list[Run] = []
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(1)
        exchange = _ByMessages(settings, codec, seed, grid, weights)
        runs.append(federate(settings, codec, seed, data, exchange, on_round))

    logging.getLogger("flwr").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    client = ClientApp(mods=[_timed, codec_mod])
    client.train()(functools.partial(_train, settings, seed))
    run_simulation(
        server,
        client,
        settings.clients,
        backend_config={**resources, "init_args": {"log_to_driver": False}},
    )
    if not runs:
        raise RuntimeError("Flower's simulation ended without a result: its log says why")
    return runs[0]


class _SeededGrid(CodecGrid):
    """Tickets and seeds are those of the built-in loop."""

    def __init__(self, grid: Grid, settings: Settings, codec: str, seed: int) -> None:
        downlink = None if settings.downlink == "raw" else settings.downlink
        super().__init__(
            grid,
            uplink=codec,
            downlink=downlink,
            error_feedback=settings.error_feedback,
            poll_seconds=0.02,
        )
        self._seed = seed
        self.number = 0

    def ticket(self, message: Message) -> bytes:
        client = message.content["config"]["client"]
        return encode_seed(self._seed, self.number, client).to_bytes(8, "little")

    def downlink_seed(self, digest: bytes) -> int:
        return encode_seed(self._seed, self.number, "server")


class _ByMessages:
    """The exchange of a round as messages to nodes, each of which is one client for the whole run."""

    def __init__(
        self, settings: Settings, codec: str, seed: int, grid: Grid, weights: list[int]
    ) -> None:
        self._grid = _SeededGrid(grid, settings, codec, seed)
        while len(nodes := list(grid.get_node_ids())) < settings.clients:
            sleep(0.1)
        self._nodes = sorted(nodes)
        self._weights = weights

    def __call__(self, number: int, sampled: list[int], weights: Update) -> Exchange:
        self._grid.number = number
        record = ArrayRecord({name: Array(array) for name, array in weights.items()})
        places = {self._nodes[client]: client for client in sampled}
        messages = []
        for node, client in places.items():
            config = ConfigRecord(
                {"number": number, "client": client, "samples": self._weights[client]}
            )
            content = RecordDict({"arrays": record, "config": config})
            messages.append(Message(content, dst_node_id=node, message_type="train"))
        replies = list(self._grid.stream(messages))
        total, metrics, decode_seconds = ReplySum(self._grid), [], 0.0
        for reply in sorted(
            replies, key=lambda reply: sampled.index(places[reply.metadata.src_node_id])
        ):
            start = perf_counter()
            rest = total.add(reply)
            decode_seconds += perf_counter() - start
            if rest.has_error():
                client = places[reply.metadata.src_node_id]
                raise RuntimeError(f"round {number}, client {client}: {rest.error.reason}")
            metrics.append(rest.content["metrics"])
        start = perf_counter()
        mean = total.change()
        decode_seconds += perf_counter() - start
        return Exchange(
            mean,
            [found["fedcodec.uplink-bytes"] for found in metrics],
            [found["fedcodec.downlink-bytes"] for found in metrics],
            sum(found["encode-seconds"] for found in metrics),
            decode_seconds,
        )


@functools.lru_cache(maxsize=1)  # a process has many tasks of one run
def _training(settings: Settings, seed: int) -> LocalTraining:
    torch.set_num_threads(1)
    data, parts = prepare(settings, seed)
    return LocalTraining(settings, seed, data, parts)


def _train(settings: Settings, seed: int, message: Message, context: Context) -> Message:
    config = message.content["config"]
    weights = {name: array.numpy() for name, array in message.content["arrays"].items()}
    trained = _training(settings, seed)(config["client"], config["number"], weights)
    content = {
        "arrays": ArrayRecord({name: Array(np.asarray(a)) for name, a in trained.items()}),
        "metrics": MetricRecord(
            {"num-examples": config["samples"], "encode-seconds": perf_counter()}
        ),
    }
    return Message(RecordDict(content), reply_to=message)


def _timed(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Make of the time at which training ended the seconds since."""
    reply = call_next(message, context)
    if not reply.has_error():
        metrics = reply.content["metrics"]
        metrics["encode-seconds"] = perf_counter() - metrics["encode-seconds"]
    return reply
