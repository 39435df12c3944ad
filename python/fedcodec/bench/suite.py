"""One run of all rows, as plain records."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import fedcodec as fc
from fedcodec import ops
from fedcodec.information import processor

from . import data, memory, peers
from .cases import CODECS, Row, rows
from .measure import Variants, check, measure, on_isa, on_threads

Record = dict[str, Any]


def run(
    sizes: Sequence[int],
    distributions: Sequence[str],
    pattern: str = "",
    rounds: int = 7,
    with_peers: bool = True,
    threads: int = 2,
    isa: str | None = None,
    on_row: Callable[[str], None] = lambda row: None,
) -> Record:
    """Check and measure every row on one thread; peers only on the first distribution.

    Parameters
    ----------
    sizes : sequence of int
        Numbers of values.
    distributions : sequence of str
        Of `fedcodec.bench.data.DISTRIBUTIONS`.
    pattern : str
        A regular expression; only rows whose names it finds are run.
    rounds : int
        How often each thing is timed.
    with_peers : bool
    threads : int
        Rows are run on so many threads too, at most on as many as there are processors.
    isa : str, optional
        Rows are run on this backend too; by default on "avx2" where "avx512" is in use.
    on_row : callable
        Called with the name of each row before it is run.

    Returns
    -------
    dict
        "date", "machine", "how" (what is the same for all rows), "info", "rounds", "threads", "isa" (None where it is
        the one in use), "rows", "memory" and "skipped" (what was not measured, and why).
    """
    if ops.available() == ("reference",):
        raise fc.BackendError("nothing is compiled here, and roofs are kernels")
    threads = min(threads, processors())
    if isa is None and ops.active() == "avx512":
        isa = "avx2"
    if isa == ops.active():
        isa = None
    variants: dict[str, Any] = {}
    if threads > 1:
        variants[f"{threads} threads"] = partial(on_threads, threads)
    if isa is not None:
        variants[isa] = partial(on_isa, isa)
        with on_isa(isa):
            pass  # there is such a one
    with on_threads(1):
        peers.hold_to_one_thread()
        peers.skipped.clear()
        chosen = rows(pattern)
        found = []
        for size in sizes:
            for distribution in distributions:
                peers.enabled = with_peers and distribution == distributions[0]
                for row in chosen:
                    if row.kind != "layout":
                        on_row(f"{row.name}, {size:,} values, {distribution}")
                        values = data.values(distribution, size)
                        found.append(_measured(row, rounds, variants, distribution, values))
        peers.enabled = with_peers
        for row in chosen:
            if row.kind == "layout":
                on_row(row.name)
                found.append(_measured(row, rounds, variants, "student-t"))
        return {
            "date": datetime.date.today().isoformat(),
            "machine": processor(),
            "how": "On one thread. R is a pass that reads the float32 values, M a copy of them by NumPy.",
            "info": fc.info(),
            "rounds": rounds,
            "threads": threads,
            "isa": isa,
            "rows": found,
            "memory": _memory(max(sizes), sorted({1, threads}), pattern, on_row),
            "skipped": dict(peers.skipped),
        }


def _measured(row: Row, rounds: int, variants: Variants, distribution: str, *values: Any) -> Record:
    case = row.build(*values)
    try:
        check(case, variants)
    except AssertionError as error:
        raise AssertionError(f"{row.name} ({distribution}): {error}") from error
    timing = measure(case, rounds, variants)
    moved = sum(array.nbytes for array in (*case.reads, case.writes) if array is not None)
    amount, unit = case.rate or (moved, "B")
    return {
        "name": row.name,
        "kind": row.kind,
        "distribution": distribution,
        "values": case.values.size,
        "per_second": amount / timing.seconds,
        "unit": unit,
        **asdict(timing),
    }


def _memory(
    n: int, counts: Sequence[int], pattern: str, on_row: Callable[[str], None]
) -> list[Record]:
    found = []
    for codec in CODECS:
        name = f"memory of encode {codec}"
        for threads in counts if re.search(pattern, name) else ():
            on_row(f"{name}, threads: {threads}")
            try:
                extra, payload = memory.peak_extra(codec, n, threads)
            except OSError as error:
                peers.skipped[name] = str(error)
                continue
            measured = {"extra_bytes": extra, "payload_bytes": payload}
            found.append({"name": name, "values": n, "threads": threads, **measured})
    return found


def processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
