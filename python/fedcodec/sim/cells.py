"""The independent pieces of a study: run in processes, on one thread each, and kept on disk as they end."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import Array, c_int
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import fedcodec as fc

POLL_SECONDS = 0.1

Result = TypeVar("Result")
# Does the work, and calls what it is given at each step.
Cell = Callable[[Callable[[], None]], Result]
_counters: Array[c_int]  # of steps, one a cell; set in each worker


def run_cells(
    cells: Sequence[Cell[Result]],
    jobs: int = 1,
    on_step: Callable[[int], None] = lambda number: None,
    on_end: Callable[[int, Result], None] = lambda number, result: None,
) -> list[Result]:
    """Run cells, each on one thread of torch and of fedcodec, so that results do not depend on ``jobs``.

    Parameters
    ----------
    cells : sequence of callable
    jobs : int
        Processes to use. Above one, the cells must pickle, and the calling module be importable (guard it by
        ``__name__``).
    on_step : callable
        Called with a cell's number for each of its steps.
    on_end : callable
        Called with a cell's number and result when it ends, in the order of the ends.

    Returns
    -------
    list
        In the order of the cells.

    Raises
    ------
    ChildProcessError
        If a process ended by itself.
    """
    if jobs == 1:
        return _run_here(cells, on_step, on_end)
    context = multiprocessing.get_context("spawn")
    counters = context.Array("i", len(cells), lock=False)
    lifeline, held = context.Pipe(duplex=False)
    with held, ProcessPoolExecutor(jobs, context, _start_worker, (counters, lifeline)) as pool:
        futures = [pool.submit(_run_cell, number, cell) for number, cell in enumerate(cells)]
        try:
            _watch(futures, counters, on_step, on_end)
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process of the study ended by itself, perhaps for want of memory"
            ) from None
        except BaseException:
            held.close()  # or leaving the pool would wait for the runs
            raise
    return [future.result() for future in futures]


def _run_here(
    cells: Sequence[Cell[Result]],
    on_step: Callable[[int], None],
    on_end: Callable[[int, Result], None],
) -> list[Result]:
    threads, own = torch.get_num_threads(), fc.get_num_threads()
    _hold_to_one_thread()
    results = []
    try:
        for number, cell in enumerate(cells):
            results.append(cell(lambda number=number: on_step(number)))  # type: ignore[misc]
            on_end(number, results[-1])
    finally:
        torch.set_num_threads(threads)
        fc.set_num_threads(own)
    return results


def _watch(
    futures: Sequence[Future[Result]],
    counters: Array[c_int],
    on_step: Callable[[int], None],
    on_end: Callable[[int, Result], None],
) -> None:
    numbers = {future: number for number, future in enumerate(futures)}
    pending, seen = set(futures), [0] * len(futures)
    while pending:
        finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for number, count in enumerate(counters):
            for _ in range(seen[number], count):
                on_step(number)
            seen[number] = count
        for future in sorted(finished, key=numbers.__getitem__):
            on_end(numbers[future], future.result())


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


def _run_cell(number: int, cell: Cell[Result]) -> Result:
    def count() -> None:
        _counters[number] += 1

    return cell(count)


class Planned(NamedTuple):
    """A cell of a study before it is run.

    Attributes
    ----------
    run : callable
    steps : int
        How often it calls back.
    dataset : str
        That it is trained on.
    about : mapping
        What its result depends on beside its name and the data, as JSON has it.
    """

    run: Cell[Any]
    steps: int
    dataset: str
    about: Mapping[str, Any]


class Kept:
    """Results of cells on disk, so that a study that was stopped goes on where it was.

    Parameters
    ----------
    folder : Path
        It gets a folder for everything that results depend on, and in that a file for each cell.
    about : mapping
        What the results depend on beside the cell, as JSON has it; a result of something else is not taken for one, and
        stays where it is.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._about = json.loads(json.dumps(about, default=str))
        self._folder = folder / _digest(self._about)[:16]

    def get(self, name: str) -> Any | None:
        """Return the result of a cell; None if there is none, or none of this study."""
        try:
            found = json.loads((self._folder / f"{name}.json").read_text())
            result = found["result"]
            same = found == self._file(name, result)
        except (FileNotFoundError, KeyError, RecursionError, TypeError, ValueError):
            return None
        return result if same else None

    def put(self, name: str, result: Any) -> None:
        """Keep the result of a cell; its file is there in full or as it was before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f".{name}.{os.getpid()}"
        result = json.loads(json.dumps(result))
        try:
            draft.write_text(json.dumps(self._file(name, result)))
            draft.replace(self._folder / f"{name}.json")
        finally:
            draft.unlink(missing_ok=True)

    def _file(self, name: str, result: Any) -> dict[str, Any]:
        about = self._about
        return {"cell": name, "about": about, "digest": _digest(result), "result": result}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
