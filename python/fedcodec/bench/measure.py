"""Checks a case against the oracle, then times it beside its variants, its roof and its peers, in turn."""

from __future__ import annotations

import gc
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np

import fedcodec as fc
from fedcodec import ops

from .cases import Case

STORES = ("plain", "prefetched", "streamed")
# A timing takes at least the first; a call that takes less than the second is made once more before, or who comes after
# something else pays for cold caches; who took more than the third in all is timed no more.
LEAST_SECONDS = 2e-3
SHORT_SECONDS = 20e-3
PATIENCE_SECONDS = 8.0

Run = Callable[[], Any]
# In what else ours is run, by a name.
Variants = Mapping[str, Callable[[], AbstractContextManager[None]]]
_NONE: Variants = MappingProxyType({})


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let calls use so many threads."""
    before = fc.get_num_threads()
    fc.set_num_threads(number)
    try:
        yield
    finally:
        fc.set_num_threads(before)


@contextmanager
def on_isa(name: str) -> Iterator[None]:
    """Let calls run on another backend."""
    before = ops.active()
    ops.use(name)
    try:
        yield
    finally:
        ops.use(before)


@dataclass(frozen=True)
class Timing:
    """Medians in seconds over the rounds, and ratios as medians over the rounds of each round's ratio.

    A machine's slow phases outlast a round, so they leave a round's ratio alone.

    Attributes
    ----------
    seconds, read_seconds, copy_seconds : float
        Of ours, of a pass R that reads the values, and of a copy M.
    roof_seconds, store : float, str or None
        Of the fastest way for the roof to store, and which one that is.
    over_roof, over_read, over_copy : float or None
        Our time over these.
    variants, beside, peers : mapping of str to (seconds, over ours)
    """

    seconds: float
    read_seconds: float
    copy_seconds: float
    roof_seconds: float | None
    store: str | None
    over_roof: float | None
    over_read: float
    over_copy: float
    variants: Mapping[str, tuple[float, float]]
    beside: Mapping[str, tuple[float, float]]
    peers: Mapping[str, tuple[float, float]]


def check(case: Case, variants: Variants = _NONE) -> None:
    """Raise AssertionError unless the backend in use and all variants give what the oracle gives."""
    with on_isa("reference"):
        expected = _outcome(case)
    for within in (nullcontext, *variants.values()):
        with within():
            if not _equal(_outcome(case), expected):
                where = f"{ops.active()} (threads: {fc.get_num_threads()})"
                raise AssertionError(f"{where} gives another result than the reference")


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


def measure(case: Case, rounds: int, variants: Variants = _NONE) -> Timing:
    """Time everything once a round, in turn and on the same buffers."""
    roof = importlib.import_module("fedcodec._native").roof
    copy = np.zeros_like(case.values)
    a, b = [*case.reads, None, None][:2]
    stores = STORES if case.writes is not None else STORES[:1] if case.reads else ()
    read = Timed(partial(roof, case.values))
    copied = Timed(partial(np.copyto, copy, case.values))
    roofs = {store: Timed(partial(roof, a, b, case.writes, store)) for store in stores}
    ours = Timed(case.run)
    varied = {name: Timed(case.run, within=within) for name, within in variants.items()}
    beside = {name: Timed(run) for name, run in case.beside.items()}
    peers = {name: Timed(run, PATIENCE_SECONDS) for name, run in case.peers.items()}
    others = {"variants": varied, "beside": beside, "peers": peers}
    everything = [read, copied, *roofs.values(), ours]
    time_in_turn([*everything, *varied.values(), *beside.values(), *peers.values()], rounds)
    store = min(stores, key=lambda name: roofs[name].median, default=None)
    best = None if store is None else roofs[store]
    return Timing(
        seconds=ours.median,
        read_seconds=read.median,
        copy_seconds=copied.median,
        roof_seconds=None if best is None else best.median,
        store=store,
        over_roof=None if best is None else ours.over(best),
        over_read=ours.over(read),
        over_copy=ours.over(copied),
        **{
            what: {name: (timed.median, timed.over(ours)) for name, timed in found.items()}
            for what, found in others.items()
        },
    )


class Timed:
    """Something to time, and the seconds that one call of it took in each round."""

    def __init__(
        self,
        run: Run,
        patience: float = math.inf,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.seconds: list[float] = []
        self._run = run
        self._within = within
        self._patience = patience
        self._number, self._short = 1, False

    def warm_up(self) -> None:
        """Run once for caches and compilers, and once to learn how many calls a timing needs.

        Where that takes all patience, it is the only timing.
        """
        with self._within():
            self._run()
        self.time()
        if self.seconds[0] > self._patience:
            return
        seconds = self.seconds.pop()
        self._number = 1 + int(LEAST_SECONDS / max(seconds, 1e-7))
        self._short = seconds < SHORT_SECONDS

    def time(self) -> None:
        """Add a round, unless patience is at an end."""
        if self._number * sum(self.seconds) > self._patience:
            return
        run, repeats = self._run, range(self._number)
        with self._within():
            if self._short:
                run()
            start = time.perf_counter()
            for _ in repeats:
                run()
            self.seconds.append((time.perf_counter() - start) / self._number)

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return median(self.seconds)

    def over(self, other: Timed) -> float:
        """Return the median of this round by round over the other; one of them may have fewer."""
        return median(this / that for this, that in zip(self.seconds, other.seconds, strict=False))


def time_in_turn(all_timed: Sequence[Timed], rounds: int) -> None:
    """Warm all up, then time each once a round."""
    for timed in all_timed:
        timed.warm_up()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for timed in all_timed:
                timed.time()
    finally:
        if collecting:
            gc.enable()
