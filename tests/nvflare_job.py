"""What a job of test_nvflare.py is made of: NVFLARE imports it in processes of its own."""

import os
import sys
from pathlib import Path

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.filter import Filter
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType

from fedcodec.adapters.nvflare import ModelDecoder, ModelEncoder, UpdateDecoder, UpdateEncoder

CLIENTS, ROUNDS = 3, 3
SHAPES = {"weight": (40, 10), "bias": (10,)}


def step(client, number):
    """What training changes, known for each client and round: whole numbers, whose sums are exact."""
    draw = np.random.default_rng([int(client.removeprefix("site-")), number])
    return {name: draw.integers(-99, 99, shape).astype("f4") for name, shape in SHAPES.items()}


class Trainer(Executor):
    """Changes the weights by `step`; the process that did so is on file."""

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        arrived = from_shareable(shareable).data
        if {name: (array.shape, str(array.dtype)) for name, array in arrived.items()} != {
            name: (shape, "float32") for name, shape in SHAPES.items()
        }:
            raise ValueError("the model did not arrive as it was sent")
        folder = Path(fl_ctx.get_workspace().get_run_dir(fl_ctx.get_job_id()))
        with open(folder / "processes.txt", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        number = shareable.get_header(AppConstants.CURRENT_ROUND)
        change = step(fl_ctx.get_identity_name(), number)
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 1}
        return DXO(DataKind.WEIGHT_DIFF, change, meta).to_shareable()


class Damage(Filter):
    """Damages the second update of site-3 on its way to the decoder."""

    def __init__(self):
        super().__init__()
        self._seen = 0

    def process(self, shareable, fl_ctx):
        if fl_ctx.get_peer_context().get_identity_name() == "site-3":
            self._seen += 1
            if self._seen == 2:
                dxo = from_shareable(shareable)
                dxo.data["payload"] = dxo.data["payload"][:-1]
                return dxo.update_shareable(shareable)
        return shareable


class Recorder(FedAvg):
    """FedAvg whose updates, as they come, are on file."""

    def __init__(self):
        super().__init__(num_clients=CLIENTS, num_rounds=ROUNDS)

    def load_model(self):
        return FLModel(params={name: np.zeros(shape, "f4") for name, shape in SHAPES.items()})

    def save_model(self, model):
        np.savez(Path(self.get_run_dir()) / f"model-{self.current_round}.npz", **model.params)

    def _aggregate_one_result(self, result):
        name = f"{result.meta['client_name']}-{self.current_round}.npz"
        np.savez(Path(self.get_run_dir()) / name, **result.params)
        return super()._aggregate_one_result(result)


def main(folder):
    job = FedJob(name="fedcodec", min_clients=CLIENTS)
    job.to_server(Recorder())
    job.to_server(ModelEncoder("int8"), filter_type=FilterType.TASK_DATA, tasks=["train"])
    job.to_server(Damage(), filter_type=FilterType.TASK_RESULT, tasks=["train"])
    job.to_server(UpdateDecoder(), filter_type=FilterType.TASK_RESULT, tasks=["train"])
    job.to_clients(Trainer(), tasks=["train"])
    job.to_clients(ModelDecoder(), filter_type=FilterType.TASK_DATA, tasks=["train"])
    encoder = UpdateEncoder("topk(0.1)")
    job.to_clients(encoder, filter_type=FilterType.TASK_RESULT, tasks=["train"])
    job.simulator_run(folder, n_clients=CLIENTS, threads=2)


if __name__ == "__main__":
    main(sys.argv[1])
