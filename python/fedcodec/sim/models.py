"""Networks, and their state in one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from .data import Dataset
from .settings import MODELS

Update = dict[str, NDArray[np.float32]]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

EVALUATION_BATCH = 500  # a ResNet-12 needs a gigabyte for them


# The usual widths of a ResNet-12, 64, 160, 320 and 640 (Lee et al. 2019, "Meta-Learning with Differentiable Convex
# Optimization"), times 1.77 and rounded to multiples of 8: the state of a network for CIFAR-10 is 156.31 MB then.
RESNET12_WIDTHS = (112, 280, 568, 1136)
RESNET12_SLOPE = 0.1  # of its leaky ReLU

# The networks of Yan, Jeurkar et al. and Chandar et al., as names and hidden widths for `build_model`.
PAPER_MODELS = {
    "simple-nn": ("mlp", (128, 64)),
    "student": ("mlp", (52, 32)),
    "simple-cnn": ("cnn", (52,)),
    "resnet12": ("resnet12", ()),
    "mnist-classifier": ("mlp", (20,)),
    "cifar10-classifier": ("vgg", (128,)),
}


def build_model(name: str, dataset: Dataset, hidden: Sequence[int], seed: int) -> nn.Module:
    """Build a classifier for a data set, its first weights drawn from ``seed``, by default as torch does.

    Parameters
    ----------
    name : str
        "mlp" (fully connected, ReLU), "cnn" (two 3 x 3 convolutions of 16 and 32 channels, each max-pooled), "vgg"
        (three blocks of two 3 x 3 convolutions, of 32, 64 and 128 channels, each block max-pooled; all weights drawn as
        He et al. 2015 do) or "resnet12" (four `ResidualBlock`, then the mean of each channel).
    hidden : sequence of int
        Widths of the fully connected hidden layers.
    """
    _, channels, height, width = dataset.train_images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        if name == "mlp":
            features = channels * height * width
        elif name == "cnn":
            for outputs in (16, 32):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
                channels, height, width = outputs, height // 2, width // 2
            features = channels * height * width
        elif name == "vgg":
            for outputs in (32, 64, 128):
                for inputs in (channels, outputs):
                    layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                layers.append(nn.MaxPool2d(2))
                channels, height, width = outputs, height // 2, width // 2
            features = channels * height * width
        elif name == "resnet12":
            for outputs in RESNET12_WIDTHS:
                layers.append(ResidualBlock(channels, outputs))
                channels = outputs
            layers.append(nn.AdaptiveAvgPool2d(1))
            features = channels
        else:
            raise ValueError(
                f"unknown model {name!r}; one of {', '.join((*MODELS, 'vgg', 'resnet12'))}"
            )
        layers.append(nn.Flatten())
        for size in hidden:
            layers += [nn.Linear(features, size), nn.ReLU()]
            features = size
        layers.append(nn.Linear(features, dataset.classes))
        network = nn.Sequential(*layers)
        if name == "vgg":
            network.apply(_draw_as_he)  # by torch's default eight layers stay at chance for epochs
        return network


def _draw_as_he(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def build_paper_model(name: str, dataset: Dataset, seed: int) -> nn.Module:
    """Build a network of Yan, Jeurkar et al. or Chandar et al.

    Parameters
    ----------
    name : str
        "simple-nn" (784-128-64-10) and "student" (784-52-32-10) of Yan; "simple-cnn" and "resnet12" of
        Jeurkar et al.; "mnist-classifier" (784-20-10, 15,910 parameters) and "cifar10-classifier" (550,570) of Chandar
        et al.

    Notes
    -----
    Jeurkar et al. names no widths, only the sizes of updates: 0.35 MB of SimpleCNN on MNIST, 155.75 MB of ResNet12 on
    CIFAR-10 and 155.74 MB on MNIST (MB = 10^6 bytes). Ours are chosen so that all float32 state, which is what
    travels, is within 1 % of them: 347,672 bytes for "simple-cnn" by its one hidden layer of 52, and 156,311,592 and
    156,302,632 bytes for "resnet12" by one factor on the usual widths.

    Examples
    --------
    >>> from fedcodec.sim.data import load_dataset
    >>> build_paper_model("student", load_dataset("digits"), seed=0)[-1]
    Linear(in_features=32, out_features=10, bias=True)
    """
    if name not in PAPER_MODELS:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(PAPER_MODELS)}")
    kind, hidden = PAPER_MODELS[name]
    return build_model(kind, dataset, hidden, seed)


class ResidualBlock(nn.Module):
    """A quarter of a ResNet-12: three 3 x 3 convolutions and a 1 x 1 shortcut, each with batch norm; max pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for _ in range(3):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(RESNET12_SLOPE),
            ]
            channels = outputs
        self.body = nn.Sequential(*layers[:-1])  # the last activation is that of the sum
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Halve height and width."""
        total = self.body(images) + self.shortcut(images)
        return functional.max_pool2d(functional.leaky_relu(total, RESNET12_SLOPE), 2)


class FlatModel:
    """A network whose state is views into one flat tensor, so a whole model is copied or stepped in one call.

    The state is what averaging must carry: parameters and float buffers (the running means and variances of batch
    norm), in the order of the state dict. Buffers have no gradient, so the optimiser leaves them to the network.

    Attributes
    ----------
    module : torch.nn.Module
        The network.
    weights : torch.Tensor
        All state, float32, shape (values,). Writing to it changes the network.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        self.module = module.to(device)
        state = {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()  # batch norm also counts its batches, and never reads the number
        }
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        initial = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
        self.weights = torch.zeros(
            sum(shape.numel() for shape in self._shapes.values()), device=device
        )
        self.weights.grad = torch.zeros_like(self.weights)
        self.load(initial)
        weights, gradients = self._views(self.weights), self._views(self.weights.grad)
        for name, tensor in state.items():
            tensor.data = weights[name]
            if tensor.requires_grad:
                tensor.grad = gradients[name]

    def load(self, update: Mapping[str, NDArray[np.float32]]) -> None:
        """Set all state from arrays by name."""
        for name, view in self._views(self.weights).items():
            view.copy_(torch.from_numpy(update[name]))

    def named(self, flat: torch.Tensor) -> Update:
        """Copy a tensor of the layout of ``weights`` into contiguous arrays by name."""
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
        loss: Loss = functional.cross_entropy,
        on_batch: Callable[[], None] = lambda: None,
    ) -> float:
        """Train with a new SGD optimiser, one epoch for each order of sample indices.

        Parameters
        ----------
        loss : callable
            Takes the logits of a batch and its part of ``labels``, which may be anything that this takes.
        on_batch : callable
            Called after each step.

        Returns
        -------
        float
            The mean loss of the batches.
        """
        self.module.train()
        losses = []
        optimiser = torch.optim.SGD([self.weights], lr=learning_rate, momentum=momentum)
        for order in orders:
            for batch, targets in _batches(images[order], labels[order], batch_size):
                optimiser.zero_grad(set_to_none=False)  # the network's gradients are views of it
                value = loss(self.module(batch), targets)
                value.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                losses.append(value.detach())
                on_batch()
        return float(torch.stack(losses).mean())

    @torch.inference_mode()
    def evaluate(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Return the accuracy (0 to 1) and the mean cross-entropy loss."""
        self.module.eval()
        correct, loss = 0, 0.0
        for batch, targets in _batches(images, labels, EVALUATION_BATCH):
            logits = self.module(batch)
            correct += int((logits.argmax(1) == targets).sum())
            loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        return correct / len(labels), loss / len(labels)

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        views, start = {}, 0
        for name, shape in self._shapes.items():
            piece = flat[start : start + shape.numel()]
            # Matrices lie transposed: small batches multiply them faster so (a fifth off the time of a step). Filters
            # lie with their channels last, and so does what they give: pooling it takes a third of the time.
            if len(shape) == 2:
                views[name] = piece.view(shape[1], shape[0]).t()
            elif len(shape) == 4:
                outputs, inputs, height, width = shape
                views[name] = piece.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
            else:
                views[name] = piece.view(shape)
            start += shape.numel()
        return views


def _batches(
    images: torch.Tensor, labels: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(torch.split(images, size), torch.split(labels, size), strict=True)
