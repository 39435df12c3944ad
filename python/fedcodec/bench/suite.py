"""One run of all rows, as plain records."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fedcodec as fc
from fedcodec import ops

from . import data, memory, peers
from .cases import CODECS, Row, rows
from .measure import check, measure

Record = dict[str, Any]


def run(
    sizes: Sequence[int],
    distributions: Sequence[str],
    pattern: str = "",
    rounds: int = 7,
    with_peers: bool = True,
    on_row: Callable[[str], None] = lambda row: None,
) -> Record:
    """Check and measure every row; peers only on the first distribution.

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
    on_row : callable
        Called with the name of each row before it is run.

    Returns
    -------
    dict
        "date", "machine", "info", "rounds", "rows", "memory" and "skipped" (what was not measured, and why).
    """
    if ops.available() == ("reference",):
        raise fc.BackendError("nothing is compiled here, and roofs are kernels")
    peers.hold_to_one_thread()
    peers.skipped.clear()
    found = []
    chosen = rows(pattern)
    for size in sizes:
        for distribution in distributions:
            peers.enabled = with_peers and distribution == distributions[0]
            for row in chosen:
                if row.kind == "layout":
                    continue
                on_row(f"{row.name}, {size:,} values, {distribution}")
                found.append(_measured(row, rounds, distribution, data.values(distribution, size)))
    peers.enabled = with_peers
    for row in chosen:
        if row.kind == "layout":
            on_row(row.name)
            found.append(_measured(row, rounds, "student-t"))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "info": fc.info(),
        "rounds": rounds,
        "rows": found,
        "memory": _memory(max(sizes), pattern, on_row),
        "skipped": dict(peers.skipped),
    }


def _measured(row: Row, rounds: int, distribution: str, *values: Any) -> Record:
    case = row.build(*values)
    try:
        check(case)
    except AssertionError as error:
        raise AssertionError(f"{row.name} ({distribution}): {error}") from error
    timing = measure(case, rounds)
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


def _memory(n: int, pattern: str, on_row: Callable[[str], None]) -> list[Record]:
    found = []
    for codec in CODECS[:2]:
        name = f"memory of encode {codec}"
        if re.search(pattern, name):
            on_row(name)
            try:
                extra, payload = memory.peak_extra(codec, n)
            except OSError as error:
                peers.skipped[name] = str(error)
                continue
            found.append(
                {"name": name, "values": n, "extra_bytes": extra, "payload_bytes": payload}
            )
    return found


def machine() -> str:
    """Return the processor's name, as it calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        if named:
            return " ".join(named[1].split())
    return platform.processor() or platform.machine()
