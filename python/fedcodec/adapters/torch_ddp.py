"""A communication hook for torch's DistributedDataParallel: gradients travel as payloads of any codec."""

# No postponed annotations: DistributedDataParallel looks at those of hooks.
import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import fedcodec as fc

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
else:
    from torch.distributed import GradBucket

_LOG = logging.getLogger(__name__)


class _Bucket(NamedTuple):
    """What is known of a bucket: its parameters in order, and what its payloads missed."""

    parameters: list[torch.Tensor]
    feedback: fc.ErrorFeedback


class CodecState:
    """What the hook of a process keeps: the codec, and for each bucket what its payloads missed so far.

    Every process sends its payload to all others, so traffic grows with their number: this is for few nodes on slow
    links. All decode the same bytes in the same order, and where the codec promises equal bytes everywhere their models
    stay equal to the bit.

    Where a gradient is not finite the mean is not a number, and a `torch.amp.GradScaler` skips the step as it would
    without a codec. What payloads missed is kept in units of the loss, a scaler's factor included.

    Parameters
    ----------
    codec : Codec or str
        Or its text, as in "topk(0.01) | int8".
    error_feedback : bool
        Add what a payload missed to the next one.
    process_group : torch.distributed.ProcessGroup, optional
        That of the model; the default group by default.
    seed : int
        Of stochastic stages; processes, buckets and steps draw differently.

    Attributes
    ----------
    sent_bytes : int
        Of all payloads that this process has sent to each of the others.
    gradient_bytes : int
        That they stand for.

    Raises
    ------
    ValueError, TypeError
        If the codec is none, or its text is that of none.

    Examples
    --------
    In each process:

    >>> from torch.nn.parallel import DistributedDataParallel
    >>> def wrapped(network):
    ...     model = DistributedDataParallel(network)
    ...     model.register_comm_hook(CodecState("topk(0.01) | int8"), codec_hook)
    ...     return model
    """

    def __init__(
        self,
        codec: fc.Codec | str,
        *,
        error_feedback: bool = True,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        self.codec = fc.ErrorFeedback(codec).codec  # which checks it
        self.error_feedback = error_feedback
        self.process_group = process_group
        self.seed = seed
        self.sent_bytes = self.gradient_bytes = 0
        self._steps = 0
        self._buckets: dict[int, _Bucket] = {}
        # What buckets that are no more have missed, by parameter: after the first step there are others.
        self._left: dict[torch.Tensor, torch.Tensor] = {}

    def _encode(self, bucket: GradBucket) -> bytes:
        """Return the payload of a bucket; nothing if it is not finite."""
        gradient, index = bucket.buffer(), bucket.index()
        rank = dist.get_rank(self.process_group)
        words = np.random.SeedSequence([self.seed, self._steps, rank, index]).generate_state(2)
        seed = int(words[0]) << 32 | int(words[1])
        self._steps += bucket.is_last()
        try:
            if not self.error_feedback:
                return self.codec.encode(gradient, framing="reference", seed=seed)
            feedback, gradient = self._prepared(bucket)
            payload = feedback.encode(gradient, framing="reference", seed=seed)
        except fc.NonFiniteError as error:
            if self.error_feedback and gradient.isfinite().all():
                _LOG.warning("bucket %d: what was missed so far is dropped: %s", index, error)
                feedback.reset()
            return b""
        feedback.accept()
        return payload

    def _prepared(self, bucket: GradBucket) -> tuple[fc.ErrorFeedback, torch.Tensor]:
        """Return a bucket's feedback, and its gradient with what its parameters missed in other buckets."""
        index, parameters, gradient = bucket.index(), bucket.parameters(), bucket.buffer()
        known = self._buckets.get(index)
        if known is not None and _same(known.parameters, parameters):
            return known.feedback, gradient
        if known is not None:
            self._dissolve()
        feedback = fc.ErrorFeedback(self.codec)
        self._buckets[index] = _Bucket(parameters, feedback)
        gradient = gradient.clone()
        for part, parameter in zip(_split(gradient, parameters), parameters, strict=True):
            left = self._left.pop(parameter, None)
            if left is not None:
                part += left.to(part)
        return feedback, gradient

    def _dissolve(self) -> None:
        for parameters, feedback in self._buckets.values():
            if feedback.residual is not None:
                residual = torch.from_numpy(feedback.residual.copy())
                self._left |= zip(parameters, _split(residual, parameters), strict=True)
        self._buckets.clear()


def codec_hook(state: CodecState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of a bucket over all processes by payloads.

    Parameters
    ----------
    state : CodecState
    bucket : torch.distributed.GradBucket
        Floats of any dtype, on the CPU or a GPU.

    Returns
    -------
    torch.futures.Future
        Of the mean, in the bucket's own memory.

    Raises
    ------
    DecodeError
        If another process sent what is no payload of the bucket, as one with other code would.

    Examples
    --------
    >>> def wrapped(network):
    ...     model = torch.nn.parallel.DistributedDataParallel(network)
    ...     model.register_comm_hook(CodecState("int8"), codec_hook)
    ...     return model
    """
    group = state.process_group or dist.group.WORLD
    gradient: torch.Tensor = bucket.buffer()
    payload = state._encode(bucket)
    state.sent_bytes += len(payload)
    state.gradient_bytes += gradient.nbytes
    size = torch.tensor([len(payload)], device=gradient.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(length) for length in sizes]
    sent = torch.zeros(max(1, *lengths), dtype=torch.uint8)  # gathered are equal sizes
    sent.numpy()[: len(payload)] = np.frombuffer(payload, np.uint8)
    sent = sent.to(gradient.device)
    received = [torch.empty_like(sent) for _ in lengths]
    work = dist.all_gather(received, sent, group=group, async_op=True)

    def mean(_: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        if min(lengths) == 0:
            return gradient.fill_(float("nan"))
        device = None if gradient.device.type == "cpu" else str(gradient.device)
        total = fc.Aggregator(like=gradient, device=device)
        for part, length in zip(received, lengths, strict=True):
            total.add(part[:length].cpu().numpy())
        return gradient.copy_(total.mean())

    averaged: torch.futures.Future[torch.Tensor] = work.get_future().then(mean)
    return averaged


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(lambda one, other: one is other, first, second))


def _split(flat: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of a bucket that are those of its parameters, which share its memory."""
    return list(torch.split(flat, [parameter.numel() for parameter in parameters]))
