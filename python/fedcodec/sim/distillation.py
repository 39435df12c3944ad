"""Training of a small network (the student) by the answers of a larger one (the teacher)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from .models import FlatModel


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 0.5,
    temperature: float = 2.0,
) -> torch.Tensor:
    """Weigh the teacher's answers and the labels: alpha * T^2 * soft + (1 - alpha) * hard.

    ``soft`` is the cross-entropy of softmax(student / T) with softmax(teacher / T), as eq. 8 has it; Kullback-Leibler
    divergence differs from it by the entropy of the teacher's answers, so its gradients are the same. ``hard`` is the
    cross-entropy with the labels.

    Parameters
    ----------
    student_logits, teacher_logits : torch.Tensor
        Of shape (samples, classes).
    labels : torch.Tensor
        int64 of shape (samples,).
    alpha : float
        Weight of the teacher, from 0 to 1.
    temperature : float
        T, above zero.

    Returns
    -------
    torch.Tensor
        The mean over the samples.

    References
    ----------
    Yan, eq. 7 to 9 and algorithm 3; Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".

    Examples
    --------
    >>> logits = torch.zeros(1, 4)
    >>> round(float(distillation_loss(logits, logits, torch.tensor([2]))), 3)  # (0.5 * 2^2 + 0.5) * log(4)
    3.466
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above zero, not {temperature}")
    targets = functional.softmax(teacher_logits / temperature, dim=1)
    soft = functional.cross_entropy(student_logits / temperature, targets)
    hard = functional.cross_entropy(student_logits, labels)
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def train_student(
    student: FlatModel,
    teacher: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    orders: Iterable[torch.Tensor],
    batch_size: int,
    learning_rate: float,
    momentum: float,
    alpha: float = 0.5,
    temperature: float = 2.0,
) -> float:
    """Train a student with a new SGD optimiser, one epoch for each order of sample indices.

    Parameters
    ----------
    student : FlatModel
    teacher : torch.nn.Module
        Not trained; in evaluation mode from here on.
    images, labels, orders, batch_size, learning_rate, momentum
        As for `FlatModel.train`.
    alpha, temperature : float
        As for `distillation_loss`.

    Returns
    -------
    float
        The mean loss of the batches.

    References
    ----------
    Yan, algorithm 3.

    Examples
    --------
    >>> from fedcodec.sim.data import load_dataset
    >>> from fedcodec.sim.models import build_model
    >>> data = load_dataset("digits")
    >>> student, teacher = (build_model("mlp", data, hidden, seed=0) for hidden in ((8,), (32,)))
    >>> loss = train_student(
    ...     FlatModel(student), teacher, data.train_images, data.train_labels, [torch.arange(100)], 20, 0.01, 0.9
    ... )
    """
    teacher.eval()

    def loss(student_logits: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher(images[samples])
        return distillation_loss(
            student_logits, teacher_logits, labels[samples], alpha, temperature
        )

    samples = torch.arange(len(labels), device=labels.device)
    return student.train(images, samples, orders, batch_size, learning_rate, momentum, loss)
