"""A Flower app in which fedcodec is two lines: the client's mod and the server's grid."""

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from fedcodec.adapters.flower import CodecGrid, codec_mod


def samples(partition, partitions):
    """Return a client's own samples and the test set that all share."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype("f4") / 16, labels[order]
    own = slice(300 + partition, None, partitions)
    return (images[own], labels[own]), (images[:300], labels[:300])


def network(arrays=None):
    """Return a network with these weights, or with new ones."""
    made = MLPClassifier((64,), solver="sgd", learning_rate_init=0.1, random_state=0)
    made.partial_fit(np.zeros((1, 64), "f4"), [0], classes=range(10))  # draws the weights
    for place, array in zip(made.coefs_ + made.intercepts_, arrays or [], strict=False):
        place[:] = array
    return made


def weights(trained):
    return ArrayRecord([array.astype("f4") for array in trained.coefs_ + trained.intercepts_])


client = ClientApp(mods=[codec_mod])  # fedcodec


@client.train()
def train(message, context):
    trained = network(message.content["arrays"].to_numpy_ndarrays())
    own, _ = samples(context.node_config["partition-id"], context.node_config["num-partitions"])
    for _ in range(context.run_config["local-epochs"]):
        trained.partial_fit(*own)
    metrics = MetricRecord({"num-examples": len(own[1]), "loss": float(trained.loss_)})
    content = RecordDict({"arrays": weights(trained), "metrics": metrics})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message, context):
    given = network(message.content["arrays"].to_numpy_ndarrays())
    _, test = samples(0, 1)
    metrics = MetricRecord({"num-examples": len(test[1]), "accuracy": given.score(*test)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid, context):
    config = context.run_config
    grid = CodecGrid(  # fedcodec
        grid, uplink=config["uplink"] or None, downlink=config["downlink"] or None
    )
    strategy = FedAvg(min_available_nodes=config["clients"])
    strategy.start(grid=grid, initial_arrays=weights(network()), num_rounds=config["rounds"])
