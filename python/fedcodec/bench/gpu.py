"""Kernels and whole calls on updates that are on a GPU, beside a copy there and the way by the host.

The records are those of `suite.run`.
"""

from __future__ import annotations

import datetime
import importlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np

import fedcodec as fc
from fedcodec import ops
from fedcodec.information import processor

from . import data
from .cases import BLOCK, CODECS, DENSITY, SPARSE_CODEC
from .data import Float32
from .measure import PATIENCE_SECONDS, Run, Timed, Timing, time_in_turn
from .suite import Record

# So many copies of the values take turns, or the smaller ones would come from the GPU's cache.
COPIES = 4


class Gpu(Protocol):
    """What a framework does for the measurement; its calls may return before the work is done."""

    name: str

    def put(self, values: Float32) -> Any:
        """Return a copy on the GPU."""

    def get(self, values: Any) -> Float32:
        """Return a copy on the host."""

    def copy(self, target: Any, values: Any) -> None:
        """Copy on the GPU."""

    def read(self, values: Any) -> None:
        """Look at each value and keep next to nothing."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def topk_peers(self, values: Any, k: int) -> dict[str, Run]:
        """Return what there is for top-k, by name."""

    def block_peers(self, values: Any, total: Any) -> dict[str, dict[str, Run]]:
        """Return what there is to quantize blocks to 8 bits, and to dequantize and add them, by those names."""


class TorchGpu:
    """torch's first GPU."""

    def __init__(self) -> None:
        reason = fc.ops.cuda_missing()
        if reason is not None:
            raise fc.BackendError(reason)
        import torch

        if not torch.cuda.is_available():
            raise fc.BackendError("torch finds no GPU: this build of it may have no CUDA")
        self._torch = torch
        self.name = str(torch.cuda.get_device_name())

    def put(self, values: Float32) -> Any:
        """As `Gpu` says."""
        return self._torch.from_numpy(values).cuda()

    def get(self, values: Any) -> Float32:
        """As `Gpu` says."""
        found: Float32 = values.cpu().numpy()
        return found

    def copy(self, target: Any, values: Any) -> None:
        """As `Gpu` says."""
        target.copy_(values)

    def read(self, values: Any) -> None:
        """As `Gpu` says."""
        self._torch.sum(values)

    def synchronize(self) -> None:
        """As `Gpu` says."""
        self._torch.cuda.synchronize()

    def topk_peers(self, values: Any, k: int) -> dict[str, Run]:
        """As `Gpu` says."""
        torch = self._torch
        peers: dict[str, Run] = {
            "torch.topk": lambda: torch.topk(values.abs(), k),
            "torch.sort": lambda: torch.sort(values.abs(), descending=True),
        }
        cupy = _found("cupy")
        if cupy is not None:
            array = cupy.from_dlpack(values)
            peers["cupy.argpartition"] = lambda: cupy.argpartition(-cupy.abs(array), k)
        return peers

    def block_peers(self, values: Any, total: Any) -> dict[str, dict[str, Run]]:
        """As `Gpu` says."""
        torch = self._torch
        whole = values.numel() // BLOCK * BLOCK
        blocks = values[:whole].view(-1, BLOCK)

        def quantize() -> Any:
            scales = blocks.abs().amax(1, keepdim=True) / 127
            return torch.round(blocks / scales).to(torch.int8), scales

        codes, scales = quantize()
        peers: dict[str, dict[str, Run]] = {
            "quantize": {"torch": quantize},
            "dequantize": {"torch": lambda: codes * scales},
            "add": {"torch": lambda: total[:whole].view(-1, BLOCK).addcmul_(codes, scales)},
        }
        functional = _found("bitsandbytes.functional")
        if functional is not None:
            quantized, state = functional.quantize_blockwise(values, blocksize=BLOCK)
            peers["quantize"]["bitsandbytes"] = lambda: functional.quantize_blockwise(
                values, blocksize=BLOCK
            )
            peers["dequantize"]["bitsandbytes"] = lambda: functional.dequantize_blockwise(
                quantized, state
            )
        return peers


def _found(module: str) -> Any:
    """Return a peer that may be missing; one that cannot be loaded here is missing too."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return None


def run(
    gpu: Gpu,
    sizes: Sequence[int],
    distributions: Sequence[str],
    pattern: str = "",
    rounds: int = 7,
    with_peers: bool = True,
    on_row: Callable[[str], None] = lambda row: None,
) -> Record:
    """Check and measure every row; the parameters are those of `suite.run`.

    A row's R is a sum of the values and M a copy of them, both by the framework on the GPU. Its roof is what the copy
    would take for as many bytes as the row must read and write.
    """
    found = []
    for size, distribution in itertools.product(sizes, distributions):
        values = data.values(distribution, size)
        for name, build in rows().items():
            if not re.search(pattern, name):
                continue
            on_row(f"{name}, {size:,} values, {distribution}")
            job = build(gpu, values)
            timing = _measured(gpu, values, job, rounds, with_peers)
            found.append(
                {
                    "name": name,
                    "kind": job.kind,
                    "distribution": distribution,
                    "values": size,
                    "per_second": values.nbytes / timing.seconds,
                    "unit": "B",
                    **asdict(timing),
                }
            )
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{gpu.name}, {processor()}",
        "how": "R is a sum of the float32 values and M a copy of them, on the GPU. The roof is such a copy's time for "
        "the bytes that a kernel must read and write; of whole calls, the copy's itself.",
        "info": fc.info() | {"active": "cuda"},
        "rounds": rounds,
        "threads": 1,
        "isa": None,
        "rows": found,
        "memory": [],
        "skipped": {},
    }


class Job:
    """A call, what it must give, and what others do for the same end.

    Parameters
    ----------
    run : callable
    outcome, expected : callable
        What it gave, and what the CPU gives: compared by ``==``.
    peers : mapping of str to callable
    bytes_each : float, optional
        What it must read and write for each value; by default what a copy does.
    kind : {"call", "kernel"}
    """

    def __init__(
        self,
        run: Run,
        outcome: Callable[[], bytes],
        expected: Callable[[], bytes],
        peers: dict[str, Run],
        bytes_each: float = 8,
        kind: str = "call",
    ) -> None:
        self.run, self.outcome, self.expected, self.peers = run, outcome, expected, peers
        self.bytes_each, self.kind = bytes_each, kind


def rows() -> dict[str, Callable[[Gpu, Float32], Job]]:
    """Return what is measured, by name."""
    named: dict[str, Callable[[Gpu, Float32], Job]] = {
        "int8 quantize": _quantize,
        "int8 dequantize": _dequantize,
        "int8 decode and add": _accumulate_codes,
    }
    for density in (0.001, 0.01, 0.1):
        named[f"top-k {100 * density:g} %"] = partial(_topk, density)
    for text in CODECS:
        named[f"encode {text}"] = partial(_encode, text)
        named[f"decode into arrays {text}"] = partial(_decode, text)
        named[f"add {text}"] = partial(_add, text)
    named[f"error feedback {SPARSE_CODEC}"] = _feedback
    return named


def _turns(gpu: Gpu, values: Float32) -> Callable[[], Any]:
    return partial(next, itertools.cycle([gpu.put(values) for _ in range(COPIES)]))


def _bytes_of(gpu: Gpu, arrays: Sequence[Any]) -> bytes:
    return b"".join(gpu.get(array).tobytes() for array in arrays)


def _quantize(gpu: Gpu, values: Float32) -> Job:
    update = _turns(gpu, values)
    out = ops.quantize_int8(update())
    total = gpu.put(np.zeros_like(values))
    return Job(
        lambda: ops.quantize_int8(update(), out=out),
        lambda: _bytes_of(gpu, ops.quantize_int8(update(), out=out)),
        lambda: b"".join(array.tobytes() for array in ops.quantize_int8(values)),
        gpu.block_peers(update(), total)["quantize"],
        4 + 1 + 4 / BLOCK,
        "kernel",
    )


def _coded(gpu: Gpu, values: Float32) -> Callable[[], Any]:
    coded = [ops.quantize_int8(gpu.put(values)) for _ in range(COPIES)]
    return partial(next, itertools.cycle(coded))


def _dequantize(gpu: Gpu, values: Float32) -> Job:
    coded, out = _coded(gpu, values), gpu.put(values)
    return Job(
        lambda: ops.dequantize_int8(*coded(), out=out),
        lambda: _bytes_of(gpu, [ops.dequantize_int8(*coded(), out=out)]),
        lambda: bytes(ops.dequantize_int8(*ops.quantize_int8(values)).tobytes()),
        gpu.block_peers(gpu.put(values), gpu.put(np.zeros_like(values)))["dequantize"],
        1 + 4 / BLOCK + 4,
        "kernel",
    )


def _accumulate_codes(gpu: Gpu, values: Float32) -> Job:
    coded, total = _coded(gpu, values), _turns(gpu, np.zeros_like(values))

    def add(target: Any, codes: Any, scales: Any) -> Any:
        ops.accumulate_codes(target, codes, scales, 8, BLOCK, scales.shape[0], 0.5)
        return target

    return Job(
        lambda: add(total(), *coded()),
        lambda: _bytes_of(gpu, [add(gpu.put(np.zeros_like(values)), *coded())]),
        lambda: bytes(add(np.zeros_like(values), *ops.quantize_int8(values)).tobytes()),
        gpu.block_peers(gpu.put(values), gpu.put(np.zeros_like(values)))["add"],
        1 + 4 / BLOCK + 8,
        "kernel",
    )


def _topk(density: float, gpu: Gpu, values: Float32) -> Job:
    update, k = _turns(gpu, values), max(1, round(density * values.size))
    return Job(
        lambda: ops.topk(update(), k),
        lambda: _bytes_of(gpu, ops.topk(update(), k)),
        lambda: b"".join(array.tobytes() for array in ops.topk(values, k)),
        gpu.topk_peers(update(), k),
        4 + density * 12,
        "kernel",
    )


def _encode(text: str, gpu: Gpu, values: Float32) -> Job:
    codec, update = fc.parse(text), _turns(gpu, values)
    peers: dict[str, Run] = {
        "copy to the host, encode there": lambda: codec.encode(gpu.get(update()))
    }
    if text == SPARSE_CODEC:
        peers |= gpu.topk_peers(update(), max(1, round(DENSITY * values.size)))
    return Job(
        lambda: codec.encode(update()),
        lambda: codec.encode(update()),
        lambda: codec.encode(values),
        peers,
    )


def _decode(text: str, gpu: Gpu, values: Float32) -> Job:
    payload, out = fc.parse(text).encode(values), _turns(gpu, values)
    host = np.empty_like(values)

    def by_host() -> None:
        fc.decode(payload, out=host)
        gpu.copy(out(), gpu.put(host))

    return Job(
        lambda: fc.decode(payload, out=out()),
        lambda: gpu.get(fc.decode(payload, out=out())).tobytes(),
        lambda: bytes(fc.decode(payload).tobytes()),
        {"decode on the host, copy": by_host},
    )


def _add(text: str, gpu: Gpu, values: Float32) -> Job:
    payload = fc.parse(text).encode(values)
    there, here = (fc.Aggregator(like=values, device=device) for device in ("cuda", "cpu"))
    # Of its own: the others add up while they are timed.
    first, second = (fc.Aggregator(like=values, device=device) for device in ("cuda", "cpu"))

    def sums(aggregator: fc.Aggregator) -> bytes:
        aggregator.add(payload, 0.5)
        return bytes(aggregator.state_dict()["sums"][0].tobytes())

    return Job(
        lambda: there.add(payload, 1e-6),
        lambda: sums(first),
        lambda: sums(second),
        {"add on the host": lambda: here.add(payload, 1e-6)},
    )


def _feedback(gpu: Gpu, values: Float32) -> Job:
    update = _turns(gpu, values)
    there, here = fc.ErrorFeedback(SPARSE_CODEC), fc.ErrorFeedback(SPARSE_CODEC)

    def turn(client: fc.ErrorFeedback, update: Any) -> bytes:
        payload = client.encode(update)
        client.reject(drop=True)
        return payload

    def accepted(client: fc.ErrorFeedback, update: Any) -> None:
        client.encode(update)
        client.accept()

    first, second = fc.ErrorFeedback(SPARSE_CODEC), fc.ErrorFeedback(SPARSE_CODEC)
    return Job(
        lambda: accepted(there, update()),
        lambda: turn(first, update()),
        lambda: turn(second, values),
        {"copy to the host, feedback there": lambda: accepted(here, gpu.get(update()))},
    )


def _measured(gpu: Gpu, values: Float32, job: Job, rounds: int, with_peers: bool) -> Timing:
    if job.outcome() != job.expected():
        raise AssertionError("the GPU gives another result than the CPU")

    def waited(run: Run) -> Run:
        def both() -> None:
            run()
            gpu.synchronize()

        return both

    source, target = _turns(gpu, values), gpu.put(values)
    read = Timed(waited(lambda: gpu.read(source())))
    copied = Timed(waited(lambda: gpu.copy(target, source())))
    ours = Timed(waited(job.run))
    peers = {
        name: Timed(waited(run), PATIENCE_SECONDS)
        for name, run in (job.peers.items() if with_peers else ())
    }
    time_in_turn([read, copied, ours, *peers.values()], rounds)
    traffic = job.bytes_each / 8  # of a copy's
    return Timing(
        seconds=ours.median,
        read_seconds=read.median,
        copy_seconds=copied.median,
        roof_seconds=copied.median * traffic,
        store="copied",
        over_roof=ours.over(copied) / traffic,
        over_read=ours.over(read),
        over_copy=ours.over(copied),
        variants={},
        beside={},
        peers={name: (timed.median, timed.over(ours)) for name, timed in peers.items()},
    )
