"""Several codecs on the same seeds, in parallel processes if asked."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import Array, c_int
from functools import partial
from multiprocessing.connection import Connection

import torch

import fedcodec as fc

from .federation import Run, prepare, simulate
from .settings import Settings

POLL_SECONDS = 0.1

OnRound = Callable[[str, int], None]
_counters: Array[c_int]  # of rounds, one a run; set in each worker


def check_study(settings: Settings, codecs: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Refuse before anything is trained what cannot be run, and return the codecs' standard texts.

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.
    ValueError
        If there is nothing to run, a codec or a seed appears twice, a text is no codec, or the settings do not fit the
        data set or this machine.
    """
    if not codecs or not seeds:
        raise ValueError("a study needs a codec and a seed at least")
    parsed = [fc.parse(codec) for codec in codecs]
    for codec in (*parsed, fc.parse(settings.downlink), fc.parse(settings.downlink_delta or "raw")):
        for stage in itertools.chain.from_iterable(line.stages for line in codec.pipelines()):
            if isinstance(stage, fc.Mask):
                raise ValueError(f"{stage} names a mask by its digest alone: a study has none")
    texts = [str(codec) for codec in parsed]
    for kind, values in (("codec", texts), ("seed", seeds)):
        for value, count in Counter(values).items():
            if count > 1:
                raise ValueError(f"the {kind} {value} appears twice")
    for seed in seeds:
        prepare(settings, seed)
    return texts


def run_study(
    settings: Settings,
    codecs: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 1,
    on_round: OnRound | None = None,
) -> list[Run]:
    """Simulate each codec with each seed.

    Every run computes on one torch thread, whatever ``jobs`` is, so the results do not depend on it.

    Parameters
    ----------
    settings : Settings
    codecs : sequence of str
        Texts of the uplink codecs.
    seeds : sequence of int
    jobs : int
        Processes to use. Above one, the calling module must be importable (guard it by ``__name__``).
    on_round : callable, optional
        Called with the codec's text and the seed after each round of a run.

    Returns
    -------
    list of Run
        By codec, then by seed, in the orders given.

    Raises
    ------
    FileNotFoundError, ValueError
        See `check_study`.
    NonFiniteError
        If training diverges.
    ChildProcessError
        If a process ended by itself.
    """
    texts = check_study(settings, codecs, seeds)
    cells = [(text, seed) for text in texts for seed in seeds]
    notify = on_round or (lambda codec, seed: None)
    if jobs == 1:
        threads, own = torch.get_num_threads(), fc.get_num_threads()
        _hold_to_one_thread()
        try:
            return [simulate(settings, *cell, on_round=partial(notify, *cell)) for cell in cells]
        finally:
            torch.set_num_threads(threads)
            fc.set_num_threads(own)
    context = multiprocessing.get_context("spawn")
    counters = context.Array("i", len(cells), lock=False)
    lifeline, held = context.Pipe(duplex=False)
    with held, ProcessPoolExecutor(jobs, context, _start_worker, (counters, lifeline)) as pool:
        futures = [
            pool.submit(_run_cell, number, settings, *cell) for number, cell in enumerate(cells)
        ]
        try:
            _watch(futures, cells, counters, notify)
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process of the study ended by itself, perhaps for want of memory"
            ) from None
        except BaseException:
            held.close()  # or leaving the pool would wait for the runs
            raise
    return [future.result() for future in futures]


def _watch(
    futures: Sequence[Future[Run]],
    cells: Sequence[tuple[str, int]],
    counters: Array[c_int],
    notify: OnRound,
) -> None:
    pending, seen = set(futures), [0] * len(cells)
    while pending:
        finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()
        for number, cell in enumerate(cells):
            for _ in range(seen[number], counters[number]):
                notify(*cell)
                seen[number] += 1


def _hold_to_one_thread() -> None:
    torch.set_num_threads(1)
    fc.set_num_threads(1)


def _start_worker(counters: Array[c_int], lifeline: Connection) -> None:
    global _counters
    _counters = counters
    _hold_to_one_thread()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends it to the parent too, who decides
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    """End this process as soon as the parent has closed its end, be it by its own end."""
    lifeline.poll(None)
    os._exit(1)


def _run_cell(number: int, settings: Settings, codec: str, seed: int) -> Run:
    def count() -> None:
        _counters[number] += 1

    return simulate(settings, codec, seed, on_round=count)
