"""What is measured on: values of four distributions, and tensors in the layouts of two models."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import chain, cycle

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

DISTRIBUTIONS = ("student-t", "normal", "equal", "delta")

_PIECE = 1 << 20


@lru_cache(maxsize=1)
def values(distribution: str, n: int) -> Float32:
    """Return n values; of "delta" about n.

    Parameters
    ----------
    distribution : {"student-t", "normal", "equal", "delta"}
        Student's t has 4 degrees of freedom; "delta" is what one client of the simulator would send: the change of a
        network's weights by one local epoch.

    Examples
    --------
    >>> values("equal", 3)
    array([0.01, 0.01, 0.01], dtype=float32)
    """
    if distribution == "equal":
        return np.full(n, 0.01, np.float32)
    if distribution == "delta":
        return _delta(n)
    generator, filled = np.random.default_rng(0), np.empty(n, np.float32)
    for start in range(0, n, _PIECE):
        piece = filled[start : start + _PIECE]
        if distribution == "student-t":
            piece[:] = generator.standard_t(4, piece.size)
        elif distribution == "normal":
            piece[:] = generator.standard_normal(piece.size)
        else:
            raise ValueError(f"unknown distribution {distribution!r}; {', '.join(DISTRIBUTIONS)}")
    return filled


def _delta(n: int) -> Float32:
    import torch

    from ..sim.data import load_dataset
    from ..sim.models import FlatModel, build_model

    samples, batch_size, learning_rate, momentum = 320, 32, 0.02, 0.9
    data = load_dataset("digits")
    features = data.train_images[0].numel()
    # Two hidden layers of w: features w + w w + classes w weights, and their biases.
    half = (features + data.classes + 2) / 2
    width = max(1, round(math.sqrt(half * half + n) - half))
    model = FlatModel(build_model("mlp", data, (width, width), seed=0))
    before = model.weights.clone()
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
    model.train(
        data.train_images,
        data.train_labels,
        [order[:samples]],
        batch_size,
        learning_rate,
        momentum,
    )
    change: Float32 = (model.weights - before).numpy()
    return change


def resnet50() -> dict[str, Float32]:
    """Return 161 tensors of 25,557,032 values in the shapes of ResNet-50's parameters.

    Examples
    --------
    >>> update = resnet50()
    >>> len(update), sum(array.size for array in update.values())
    (161, 25557032)
    """
    convolutions = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    normalised = [(shape, (shape[0],), (shape[0],)) for shape in convolutions]
    return _shaped([*chain.from_iterable(normalised), (1000, inputs), (1000,)])


def lora() -> dict[str, Float32]:
    """Return 400 tensors of 512 values: adapters of rank 8 to 200 matrices of 64 x 64.

    Examples
    --------
    >>> len(lora())
    400
    """
    pair = cycle(((8, 64), (64, 8)))
    return _shaped([next(pair) for _ in range(400)])


def _shaped(shapes: list[tuple[int, ...]]) -> dict[str, Float32]:
    flat = values("student-t", sum(map(math.prod, shapes)))
    update, start = {}, 0
    for number, shape in enumerate(shapes):
        size = math.prod(shape)
        update[f"layers.{number}.weight"] = flat[start : start + size].reshape(shape).copy()
        start += size
    return update
