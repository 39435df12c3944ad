"""What a study can be told; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import fedcodec as fc

from .links import parse_link

DATASETS = ("digits", "fashion-mnist", "mnist", "cifar10")
MODELS = ("mlp", "cnn")
ENGINES = ("built-in", "flower")
DEFAULT_CODECS = (
    "raw",
    "int8",
    "kbit(4)",
    "sign",
    "topk(0.05) | int8",
    "topk(0.01) | int8",
    "topk(0.05) | ternary",
    "topk(0.01) | ternary",
)


@dataclass(frozen=True)
class Settings:
    """One study: everything but the codec and the seed.

    Attributes
    ----------
    dirichlet : float, optional
        Concentration of the label skew between clients; None shares the samples out at random (IID).
    downlink : str
        Codec of the weights that the server sends, by its text.
    downlink_delta : str, optional
        Codec of the change of the weights since the last round. Each sampled client then pays for every change that
        it missed or for the whole weights, uncompressed, whichever is less.
    average_last : int
        Rounds whose mean is the result; they are always evaluated.
    evaluate_every : int
        Evaluate each so many rounds before those.
    engine : str
        What runs the clients: a loop in one process, or Flower's simulation, which shares them out among processes.
        Both give the same accuracy for the same seed.
    """

    dataset: str = "digits"
    data_dir: Path | None = None
    model: str = "mlp"
    hidden: tuple[int, ...] = (128, 64)
    clients: int = 20
    clients_per_round: int = 10
    dirichlet: float | None = 0.5
    local_epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.9
    rounds: int = 100
    error_feedback: bool = True
    downlink: str = "raw"
    downlink_delta: str | None = None
    link: str = "lte"
    average_last: int = 20
    evaluate_every: int = 1
    device: str = "cpu"
    engine: str = "built-in"

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is trained."""
        for name in (
            *(
                "clients",
                "clients_per_round",
                "local_epochs",
                "batch_size",
                "rounds",
                "average_last",
            ),
            *("evaluate_every", "learning_rate", "dirichlet"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above zero and finite, not {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least zero and below one, not {self.momentum}")
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"{self.clients_per_round} clients a round, but only {self.clients} clients"
            )
        if self.average_last > self.rounds:
            raise ValueError(
                f"the result averages the last {self.average_last} rounds, but there are {self.rounds}"
            )
        if self.downlink_delta is not None and self.downlink != "raw":
            raise ValueError(
                "with a downlink delta, whole weights travel as raw: clients must end up with the same"
            )
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; one of {', '.join(ENGINES)}")
        if self.engine == "flower" and (self.device != "cpu" or self.downlink_delta is not None):
            raise ValueError("with the engine flower, clients are on CPUs and get whole weights")
        parse_link(self.link)
        fc.parse(self.downlink)
        fc.parse(self.downlink_delta or "raw")
