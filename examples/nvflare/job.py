"""Federated softmax regression on handwritten digits in NVFLARE's simulator, compressed in both directions."""

import argparse
import sys
from pathlib import Path

import numpy as np
import nvflare.client as flare
from nvflare.app_common.np.recipes import NumpyFedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.recipe import SimEnv
from sklearn.datasets import load_digits

from fedcodec.adapters.nvflare import ModelDecoder, ModelEncoder, UpdateDecoder, UpdateEncoder

CLIENTS = 3
TRAINING = 1500  # images; the others are for the test
KEY = "numpy_key"  # of the one array of NVFLARE's NumPy recipe


def digits():
    """Return the pixels of all images with a constant one, and what they show."""
    pixels, labels = load_digits(return_X_y=True)
    images = np.column_stack([pixels / 16, np.ones(len(pixels))]).astype(np.float32)
    return images, labels


def train():
    """Be a client: the script that NVFLARE runs for each of them."""
    flare.init()
    images, labels = digits()
    own = range(int(flare.get_site_name().removeprefix("site-")) - 1, TRAINING, CLIENTS)
    images, wanted = images[own], np.eye(10, dtype=np.float32)[labels[own]]
    while flare.is_running():
        model = flare.receive()
        weights = model.params[KEY].copy()
        for _ in range(20):
            scores = images @ weights
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            weights -= images.T @ (chances - wanted) / len(images)
        flare.send(flare.FLModel(params={KEY: weights}))


def main():
    """Write the job, run it, and test the model that comes out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uplink", default="topk(0.1) | int8", help="codec of updates")
    parser.add_argument("--downlink", default="int8", help="codec of models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workspace", default="out/nvflare", help="folder for logs and the model")
    options = parser.parse_args()
    recipe = NumpyFedAvgRecipe(
        name="digits",
        model=np.zeros((65, 10)).tolist(),
        min_clients=CLIENTS,
        num_rounds=options.rounds,
        train_script=Path(__file__).name,  # travels with the job
        train_args="train",
        params_transfer_type=TransferType.DIFF,  # error feedback is for differences
    )
    tasks = ["train"]
    recipe.add_server_output_filter(ModelEncoder(options.downlink), tasks=tasks)
    recipe.add_client_input_filter(ModelDecoder(), tasks=tasks)
    recipe.add_client_output_filter(UpdateEncoder(options.uplink), tasks=tasks)
    recipe.add_server_input_filter(UpdateDecoder(), tasks=tasks)
    workspace = Path(options.workspace).resolve()
    recipe.execute(SimEnv(num_clients=CLIENTS, workspace_root=str(workspace)))

    (path,) = (workspace / "digits" / "server").rglob("server.npy")
    images, labels = digits()
    found = (images[TRAINING:] @ np.load(path)).argmax(axis=1)
    print(f"test accuracy: {np.mean(found == labels[TRAINING:]):.3f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    else:
        main()
