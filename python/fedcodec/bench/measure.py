"""Checks a case against the oracle, then times it beside its roof and its peers, in turn."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from fedcodec import ops

from .cases import Case

STORES = ("plain", "prefetched", "streamed")
# One timing takes at least this long; a peer that took more than that in all is asked no more.
LEAST_SECONDS = 2e-3
PATIENCE_SECONDS = 8.0

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Medians in seconds over the rounds, ratios as medians over the rounds of each round's ratio.

    The machine's slow phases outlast a round and so leave a round's ratio alone.
    """

    seconds: float
    roof_seconds: float | None
    read_seconds: float
    copy_seconds: float
    over_roof: float | None
    over_read: float
    over_copy: float
    store: str | None
    peer_seconds: Mapping[str, float]
    peer_over_ours: Mapping[str, float]


def check(case: Case) -> None:
    """Raise AssertionError unless the backend in use gives what the oracle gives."""
    ours = _outcome(case)
    before = ops.active()
    ops.use("reference")
    try:
        expected = _outcome(case)
    finally:
        ops.use(before)
    if not _equal(ours, expected):
        raise AssertionError(f"{before} gives another result than the reference")


def _outcome(case: Case) -> Any:
    case.reset()
    return _copied(case.outcome(case.run()))


def _copied(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return [_copied(part) for part in result]
    if isinstance(result, dict):
        return {name: _copied(part) for name, part in result.items()}
    return result if isinstance(result, (bytes, int, float)) else np.array(result)


def _equal(ours: Any, expected: Any) -> bool:
    if isinstance(ours, list):
        return len(ours) == len(expected) and all(map(_equal, ours, expected))
    if isinstance(ours, dict):
        return ours.keys() == expected.keys() and all(
            _equal(ours[name], expected[name]) for name in ours
        )
    if isinstance(ours, np.ndarray):
        same = ours.dtype == expected.dtype and ours.shape == expected.shape
        return bool(same and ours.tobytes() == expected.tobytes())
    return bool(ours == expected)


def measure(case: Case, rounds: int) -> Timing:
    """Time everything once a round, in turn and on the same buffers."""
    roof = importlib.import_module("fedcodec._native").roof
    copy = np.zeros_like(case.values)
    a, b = [*case.reads, None, None][:2]
    runs: dict[str, Run] = {
        "read": lambda: roof(case.values),
        "copy": lambda: np.copyto(copy, case.values),
    }
    stores = STORES if case.writes is not None else STORES[:1]
    if a is not None:
        for store in stores:
            runs[store] = partial(roof, a, b, case.writes, store)
    runs["ours"] = case.run
    peers = [f"peer {name}" for name in case.peers]
    times = time_in_turn(runs | dict(zip(peers, case.peers.values(), strict=True)), rounds, peers)

    best = None if a is None else min(stores, key=lambda store: median(times[store]))
    over = {name: _ratio(times["ours"], taken) for name, taken in times.items()}
    return Timing(
        seconds=median(times["ours"]),
        roof_seconds=None if best is None else median(times[best]),
        read_seconds=median(times["read"]),
        copy_seconds=median(times["copy"]),
        over_roof=None if best is None else over[best],
        over_read=over["read"],
        over_copy=over["copy"],
        store=best if case.writes is not None else None,
        peer_seconds={name: median(times[f"peer {name}"]) for name in case.peers},
        peer_over_ours={name: _ratio(times[f"peer {name}"], times["ours"]) for name in case.peers},
    )


def _ratio(these: list[float], those: list[float]) -> float:
    # One that was asked no more has fewer rounds.
    return median(this / that for this, that in zip(these, those, strict=False))


def time_in_turn(
    runs: Mapping[str, Run], rounds: int, impatient: list[str]
) -> dict[str, list[float]]:
    """Return the seconds that one call of each took in each round, after one call to warm up."""
    numbers = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        numbers[name] = 1 + int(LEAST_SECONDS / max(time.perf_counter() - start, 1e-7))
    times: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                if name in impatient and sum(times[name]) * numbers[name] > PATIENCE_SECONDS:
                    continue
                repeats = range(numbers[name])
                start = time.perf_counter()
                for _ in repeats:
                    run()
                times[name].append((time.perf_counter() - start) / numbers[name])
    finally:
        if collecting:
            gc.enable()
    return times
