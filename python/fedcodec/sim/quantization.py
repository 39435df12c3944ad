"""Weights as quantization leaves them: what a network computes with after it was stored or sent in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import fedcodec as fc


def fake_quantize(values: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Round to multiples of max / (2^bits - 1), as Yan prints it.

    Printed so, codes of signed values run from -(2^bits - 1) to 2^bits - 1 and need bits + 1 bits: at 8 bits it is
    twice as fine as `int8_quantize`. Use it for the paper's arithmetic, not for the size of what is sent.

    Parameters
    ----------
    values : torch.Tensor
        Finite.
    bits : int
        From 1 to 16.

    Returns
    -------
    torch.Tensor
        Of the same dtype; halves round to even. No gradient passes.

    References
    ----------
    Yan, eq. 4 to 6.

    Examples
    --------
    >>> fake_quantize(torch.tensor([3.0, -1.6, 0.4]), bits=2)
    tensor([ 3., -2.,  0.])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits is {bits}, it must be from 1 to 16")
    exact = values.detach().double()  # in float32 the scale of tiny values is infinite
    largest = exact.abs().max() if exact.numel() else exact.new_zeros(())
    if not largest.isfinite():
        raise fc.NonFiniteError("values to quantize must be finite")
    if not largest:
        return values.detach().clone()
    scale = (2**bits - 1) / largest
    rounded: torch.Tensor = (exact * scale).round() / scale
    return rounded.to(values.dtype)


def int8_quantize(
    values: torch.Tensor, block_size: int | None = 1024, axis: int | None = None
) -> torch.Tensor:
    """Return what `fedcodec.Int8` decodes to: codes from -127 to 127 times a float32 scale.

    Parameters
    ----------
    values : torch.Tensor
    block_size, axis
        As for `fedcodec.Int8`; ``block_size=None`` is one scale for the tensor.

    References
    ----------
    Yan, algorithm 2 (qint8).

    Examples
    --------
    >>> int8_quantize(torch.tensor([1, 0.5, -127]))
    tensor([   1.,    0., -127.])
    """
    payload = fc.Int8(block_size=block_size, axis=axis).encode(values.detach())
    quantized: torch.Tensor = fc.decode(payload, like=values.detach())
    return quantized


@torch.no_grad()
def quantize_weights(
    weights: Mapping[str, torch.Tensor], quantize: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Quantize each tensor in place.

    Examples
    --------
    >>> weights = {"a": torch.tensor([3.0, -1.6])}
    >>> quantize_weights(weights, lambda values: fake_quantize(values, bits=2))
    >>> weights
    {'a': tensor([ 3., -2.])}
    """
    for weight in weights.values():
        weight.copy_(quantize(weight))
