"""Which weights or channels of a network are pruned, as masks by name, and what applies them.

Functions take weights by name, as `prunable_weights` gives them, and leave the network as it is but for the values:
torch's `prune` chooses what goes, but its reparametrisation, which renames and reorders a state dict, is not used.

Pruning with recovery (soft pruning) makes masks anew from dense weights each time. Iterative pruning goes to its amount
in steps and passes the masks of the last step on, so that what is pruned stays so:

>>> from torch import nn
>>> network = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
>>> weights, masks = prunable_weights(network), None
>>> for amount in amounts_to(0.8, steps=4):
...     masks = magnitude_masks(weights, amount, previous=masks)
...     with keep_pruned(weights, masks):
...         pass  # train here
>>> int((weights["0.weight"] == 0).sum())
160
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import prune

from fedcodec import ops

from ..codec import Scope

Weights = Mapping[str, torch.Tensor]
Masks = dict[str, torch.Tensor]


def prunable_weights(module: nn.Module, last: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights of convolutions and fully connected layers by their names in the state dict.

    Parameters
    ----------
    last : bool
        Whether the weights of the last of these layers, the classifier, are among them.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    >>> list(prunable_weights(network))
    ['0.weight']
    """
    layers = [
        (f"{name}.weight" if name else "weight", layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    return dict(layers if last else layers[:-1])


def magnitude_masks(
    weights: Weights, amount: float, scope: Scope = "update", previous: Masks | None = None
) -> Masks:
    """Prune the share of weights with the least magnitudes (torch's ``L1Unstructured``).

    Parameters
    ----------
    weights : mapping of str to torch.Tensor
    amount : float
        Share that is pruned, from 0 to 1; the number is rounded to the nearest.
    scope : {"update", "tensor"}
        Whether all weights compete (global pruning) or those of each tensor among themselves (per layer).
    previous : dict of str to torch.Tensor, optional
        Masks of an earlier step. What they prune stays pruned and counts.

    Returns
    -------
    dict of str to torch.Tensor
        Bools of the weights' shapes, true where a weight stays.

    References
    ----------
    Jeurkar et al., section 3.3, global unstructured pruning.

    Examples
    --------
    >>> magnitude_masks({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([2.0, 3.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    method = prune.L1Unstructured(amount=_checked(amount))

    def largest(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:  # those that stay are larger than any that was pruned, zeros too
            wide = values.abs().to(torch.promote_types(values.dtype, torch.float32))
            values = wide.nextafter(torch.full_like(wide, torch.inf)) * kept
        mask: torch.Tensor = method.compute_mask(values, torch.ones_like(values))  # type: ignore[no-untyped-call]
        return mask.bool()

    return _masks(largest, weights, scope, previous)


def percentile_masks(
    weights: Weights, amount: float, scope: Scope = "tensor", previous: Masks | None = None
) -> Masks:
    """Prune weights whose magnitudes are not above a percentile of all magnitudes.

    Unlike `magnitude_masks` it prunes every weight that ties with the threshold.

    Parameters
    ----------
    weights, scope, previous
        As for `magnitude_masks`.
    amount : float
        The percentile as a share, from 0 to 1.

    References
    ----------
    Yan, eq. 1 to 3 and algorithm 1.

    Examples
    --------
    >>> percentile_masks({"a": torch.tensor([1.0, -2.0, 3.0, 4.0])}, 0.5)
    {'a': tensor([False, False,  True,  True])}
    """
    percentile = 100 * _checked(amount)

    def above(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        return values.abs() > ops.percentile_threshold(values.cpu().numpy(), percentile)

    return _masks(above, weights, scope, previous)


def channel_masks(
    weights: Weights,
    scores: Weights,
    amount: float,
    scope: Scope = "tensor",
    previous: Masks | None = None,
) -> Masks:
    """Prune the output channels (filters of a convolution, neurons of a fully connected layer) with the least scores.

    Parameters
    ----------
    weights : mapping of str to torch.Tensor
        Channels lie along axis 0.
    scores : mapping of str to torch.Tensor
        One number, not below zero, for each channel: `channel_norms`, `batch_norm_scales` or
        `geometric_median_distances`. Weights without scores get no mask.
    amount : float
        Share of the channels that is pruned, from 0 to 1.
    scope : {"update", "tensor"}
        Whether the channels of all layers compete or those of each layer among themselves.
    previous : dict of str to torch.Tensor, optional
        As for `magnitude_masks`.

    References
    ----------
    Jeurkar et al., section 3.3, structured pruning of each layer: with `channel_norms` it is torch's ``ln_structured``.

    Examples
    --------
    >>> weights = {"a": torch.tensor([[3.0, 0.0], [1.0, 1.0]])}
    >>> channel_masks(weights, channel_norms(weights), 0.5)
    {'a': tensor([[ True,  True],
            [False, False]])}
    """
    kept = None
    if previous is not None:
        kept = {name: previous[name].flatten(1).any(1) for name in scores}
    channels = magnitude_masks(scores, amount, scope, kept)
    return {
        name: mask.view(-1, *[1] * (weights[name].dim() - 1)).expand_as(weights[name])
        for name, mask in channels.items()
    }


def channel_norms(weights: Weights, n: float = 2) -> dict[str, torch.Tensor]:
    """Score channels by the Ln norm of their weights.

    References
    ----------
    Jeurkar et al., section 3.3; Sprenger, structured pruning.

    Examples
    --------
    >>> channel_norms({"a": torch.tensor([[3.0, 4.0], [0.0, 2.0]])})
    {'a': tensor([5., 2.])}
    """
    return {
        name: torch.linalg.vector_norm(weight.detach().flatten(1), n, dim=1)
        for name, weight in weights.items()
    }


def batch_norm_scales(module: nn.Module) -> dict[str, torch.Tensor]:
    """Score the channels of each convolution by the scales of the batch norm that follows it (network slimming).

    Raises
    ------
    ValueError
        If no convolution is followed by a batch norm.

    References
    ----------
    Sprenger, structured pruning by batch-norm scale; Liu et al. 2017, "Learning Efficient Convolutional Networks
    through Network Slimming".

    Examples
    --------
    >>> batch_norm_scales(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    {'0.weight': tensor([1., 1.])}
    """
    layers = [(name, layer) for name, layer in module.named_modules() if not list(layer.children())]
    scores = {
        f"{name}.weight": after.weight.detach().abs()
        for (name, layer), (_, after) in itertools.pairwise(layers)
        if isinstance(layer, nn.Conv2d)
        and isinstance(after, nn.BatchNorm2d)
        and after.affine
        and layer.out_channels == after.num_features
    }
    if not scores:
        raise ValueError("no convolution of this network is followed by a batch norm with scales")
    return scores


def geometric_median_distances(weights: Weights) -> dict[str, torch.Tensor]:
    """Score channels by the sum of their distances to the others, so that those that others can stand for go first.

    References
    ----------
    Sprenger, structured pruning by geometric median; He et al. 2019, "Filter Pruning via Geometric Median for Deep
    Convolutional Neural Networks Acceleration", eq. 6.

    Examples
    --------
    >>> geometric_median_distances({"a": torch.tensor([[0.0], [1.0], [5.0]])})
    {'a': tensor([6., 5., 9.])}
    """
    scores = {}
    for name, weight in weights.items():
        channels = weight.detach().flatten(1)
        scores[name] = torch.cdist(channels, channels).sum(1)
    return scores


def amounts_to(amount: float, steps: int) -> list[float]:
    """Return the amounts of iterative pruning, in equal steps.

    Examples
    --------
    >>> amounts_to(0.5, steps=2)
    [0.25, 0.5]
    """
    if steps < 1:
        raise ValueError(f"pruning takes a step at least, not {steps}")
    return [_checked(amount) * step / steps for step in range(1, steps + 1)]


@torch.no_grad()
def apply_masks(weights: Weights, masks: Masks) -> None:
    """Set what is pruned to zero, in place.

    Examples
    --------
    >>> weights = {"a": torch.tensor([1.0, -4.0])}
    >>> apply_masks(weights, {"a": torch.tensor([False, True])})
    >>> weights
    {'a': tensor([ 0., -4.])}
    """
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask, 0)


@contextmanager
def keep_pruned(weights: Weights, masks: Masks) -> Iterator[None]:
    """Apply masks, and let no gradient reach what is pruned as long as the context lasts.

    It stays zero under an optimiser that starts in the context.
    """
    apply_masks(weights, masks)
    hooks = [weights[name].register_hook(mask.mul) for name, mask in masks.items()]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _checked(amount: float) -> float:
    if not 0 <= amount <= 1:
        raise ValueError(f"the amount to prune must be a share from 0 to 1, not {amount}")
    return float(amount)  # torch takes an int for a number of weights


def _masks(
    choose: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    weights: Weights,
    scope: Scope,
    previous: Masks | None,
) -> Masks:
    kept = None
    if previous is not None:
        kept = {name: previous[name].reshape(-1) for name in weights}
    values = {
        name: weight.detach().reshape(-1) * (1 if kept is None else kept[name])
        for name, weight in weights.items()
    }
    if scope == "tensor":
        flat = {
            name: choose(part, None if kept is None else kept[name])
            for name, part in values.items()
        }
    elif scope == "update":
        sizes = [part.numel() for part in values.values()]
        whole = torch.cat(list(values.values()))
        chosen = choose(whole, None if kept is None else torch.cat(list(kept.values())))
        flat = dict(zip(values, torch.split(chosen, sizes), strict=True))
    else:
        raise ValueError(f"scope is {scope!r}, it must be 'update' or 'tensor'")
    masks = {name: mask.view(weights[name].shape) for name, mask in flat.items()}
    return masks if previous is None else {name: masks[name] & previous[name] for name in masks}
