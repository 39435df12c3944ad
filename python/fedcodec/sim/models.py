"""Networks whose weights lie in one flat buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from .data import Dataset
from .settings import MODELS

Update = dict[str, NDArray[np.float32]]

EVALUATION_BATCH = 2000


def build_model(name: str, dataset: Dataset, hidden: Sequence[int], seed: int) -> nn.Module:
    """Build a classifier for a data set, with torch's default initialisation drawn from ``seed``.

    Parameters
    ----------
    name : str
        "mlp" (fully connected, ReLU) or "cnn" (two 3 x 3 convolutions of 16 and 32 channels, each max-pooled).
    hidden : sequence of int
        Widths of the fully connected hidden layers.
    """
    _, channels, height, width = dataset.train_images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            layers: list[nn.Module] = [nn.Flatten()]
            features = channels * height * width
        elif name == "cnn":
            layers = []
            for outputs in (16, 32):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
                channels, height, width = outputs, height // 2, width // 2
            layers.append(nn.Flatten())
            features = channels * height * width
        else:
            raise ValueError(f"unknown model {name!r}; one of {', '.join(MODELS)}")
        for size in hidden:
            layers += [nn.Linear(features, size), nn.ReLU()]
            features = size
        layers.append(nn.Linear(features, dataset.classes))
        return nn.Sequential(*layers)


class FlatModel:
    """A network whose parameters are views into one flat tensor, so a whole model is copied or stepped in one call.

    Attributes
    ----------
    weights : torch.Tensor
        All parameters, float32, shape (parameters,). Writing to it changes the network.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        self._module = module.to(device)
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        initial = {
            name: parameter.detach().cpu().numpy() for name, parameter in module.named_parameters()
        }
        self.weights = torch.zeros(
            sum(shape.numel() for shape in self._shapes.values()), device=device
        )
        self.weights.grad = torch.zeros_like(self.weights)
        self.load(initial)
        weights, gradients = self._views(self.weights), self._views(self.weights.grad)
        for name, parameter in module.named_parameters():
            parameter.data = weights[name]
            parameter.grad = gradients[name]

    def load(self, update: Mapping[str, NDArray[np.float32]]) -> None:
        """Set all parameters from arrays by name."""
        for name, view in self._views(self.weights).items():
            view.copy_(torch.from_numpy(update[name]))

    def named(self, flat: torch.Tensor) -> Update:
        """Copy a tensor of the layout of ``weights`` into contiguous arrays by parameter name."""
        return {
            name: view.clone(memory_format=torch.contiguous_format).cpu().numpy()
            for name, view in self._views(flat).items()
        }

    def train(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        orders: Iterable[torch.Tensor],
        batch_size: int,
        learning_rate: float,
        momentum: float,
    ) -> None:
        """Train with a new SGD optimiser, one epoch for each order of sample indices."""
        optimiser = torch.optim.SGD([self.weights], lr=learning_rate, momentum=momentum)
        for order in orders:
            for batch, targets in _batches(images[order], labels[order], batch_size):
                optimiser.zero_grad(set_to_none=False)  # the network's gradients are views of it
                functional.cross_entropy(self._module(batch), targets).backward()  # type: ignore[no-untyped-call]
                optimiser.step()

    @torch.inference_mode()
    def evaluate(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Return the accuracy (0 to 1) and the mean cross-entropy loss."""
        correct, loss = 0, 0.0
        for batch, targets in _batches(images, labels, EVALUATION_BATCH):
            logits = self._module(batch)
            correct += int((logits.argmax(1) == targets).sum())
            loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        return correct / len(labels), loss / len(labels)

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        views, start = {}, 0
        for name, shape in self._shapes.items():
            piece = flat[start : start + shape.numel()]
            # Matrices lie transposed: small batches multiply them faster so (a fifth off the time of a step).
            views[name] = (
                piece.view(shape[1], shape[0]).t() if len(shape) == 2 else piece.view(shape)
            )
            start += shape.numel()
        return views


def _batches(
    images: torch.Tensor, labels: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(torch.split(images, size), torch.split(labels, size), strict=True)
