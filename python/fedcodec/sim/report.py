"""What a study showed: tables for the terminal, JSON, CSV and PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from .federation import Run
from .files import write_csv, write_files, write_json
from .provenance import provenance
from .settings import Settings

BASELINE = "raw"
# Where one curve lies on another, that shows beside it and in its gaps.
LINES = (("-", 2.4), ("--", 1.5), (":", 1.5), ("-.", 1.2))
BYTES_PER_PARAMETER = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class Summary:
    """One codec over all its seeds: means, with sample standard deviations where a name ends so.

    Attributes
    ----------
    accuracy, loss : float
        Mean over the last ``average_last`` rounds of a run, on the test set.
    difference_to_raw : float or None
        Accuracy less that of the uncompressed runs on the same seeds; None without such runs.
    best_accuracy, best_round
        The best single round of any seed, which says little: a maximum over many noisy rounds.
    uplink_bytes_per_round, downlink_bytes_per_round, uplink_bytes, downlink_bytes : float
        Of all sampled clients together: a round, and a run.
    payload_bytes, largest_payload_bytes : float, int
        One uplink payload: the mean, and the largest of all.
    ratio : float
        Bytes of the uncompressed float32 update over ``payload_bytes``.
    bits_per_parameter : float
    ideal_bytes, largest_payload_over_ideal : float or None
        See `fedcodec.sim.sizes.ideal_bytes`.
    encode_milliseconds, decode_milliseconds : float
        Measured, a payload; decoding is adding to the weighted mean.
    transfer_seconds_per_round, transfer_seconds : float
        Simulated.
    """

    codec: str
    seeds: int
    accuracy: float
    accuracy_deviation: float | None
    difference_to_raw: float | None
    difference_to_raw_deviation: float | None
    loss: float
    best_accuracy: float
    best_round: int
    uplink_bytes_per_round: float
    downlink_bytes_per_round: float
    uplink_bytes: float
    downlink_bytes: float
    payload_bytes: float
    largest_payload_bytes: int
    ratio: float
    bits_per_parameter: float
    ideal_bytes: float | None
    largest_payload_over_ideal: float | None
    encode_milliseconds: float
    decode_milliseconds: float
    transfer_seconds_per_round: float
    transfer_seconds: float


def summarise(settings: Settings, runs: Sequence[Run]) -> list[Summary]:
    """Summarise runs, which lie together by codec, as `fedcodec.sim.study.run_study` returns them."""
    groups = {codec: list(group) for codec, group in groupby(runs, key=lambda run: run.codec)}
    baseline = {
        run.seed: _final(settings, run.history.accuracy) for run in groups.get(BASELINE, [])
    }
    return [_summary(settings, codec, group, baseline) for codec, group in groups.items()]


def _summary(
    settings: Settings, codec: str, runs: list[Run], baseline: dict[int, float]
) -> Summary:
    accuracies = [_final(settings, run.history.accuracy) for run in runs]
    differences = [
        accuracy - baseline[run.seed]
        for run, accuracy in zip(runs, accuracies, strict=True)
        if run.seed in baseline
    ]
    best_accuracy, best_round = max(
        (value, -number)
        for run in runs
        for number, value in enumerate(run.history.accuracy, start=1)
        if value is not None
    )
    payloads = settings.rounds * settings.clients_per_round
    parameters = runs[0].parameters
    uplink = fmean(sum(run.history.uplink_bytes) for run in runs)
    downlink = fmean(sum(run.history.downlink_bytes) for run in runs)
    transfer = fmean(sum(run.history.transfer_seconds) for run in runs)
    payload_bytes = uplink / payloads
    largest = max(max(run.history.largest_payload_bytes) for run in runs)
    ideal = runs[0].ideal_bytes
    return Summary(
        codec=codec,
        seeds=len(runs),
        accuracy=fmean(accuracies),
        accuracy_deviation=_deviation(accuracies),
        difference_to_raw=fmean(differences) if differences else None,
        difference_to_raw_deviation=_deviation(differences),
        loss=fmean(_final(settings, run.history.loss) for run in runs),
        best_accuracy=best_accuracy,
        best_round=-best_round,
        uplink_bytes_per_round=uplink / settings.rounds,
        downlink_bytes_per_round=downlink / settings.rounds,
        uplink_bytes=uplink,
        downlink_bytes=downlink,
        payload_bytes=payload_bytes,
        largest_payload_bytes=largest,
        ratio=BYTES_PER_PARAMETER * parameters / payload_bytes,
        bits_per_parameter=8 * payload_bytes / parameters,
        ideal_bytes=ideal,
        largest_payload_over_ideal=None if ideal is None else largest / ideal,
        encode_milliseconds=fmean(1e3 * sum(run.timing.encode_seconds) / payloads for run in runs),
        decode_milliseconds=fmean(1e3 * sum(run.timing.decode_seconds) / payloads for run in runs),
        transfer_seconds_per_round=transfer / settings.rounds,
        transfer_seconds=transfer,
    )


def _final(settings: Settings, values: Sequence[float | None]) -> float:
    return fmean(value for value in values[-settings.average_last :] if value is not None)


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def tables(settings: Settings, summaries: Sequence[Summary]) -> list[Table]:
    """Return tables of what was learnt, of the size of payloads, of traffic and of time."""
    result = [
        _table(
            f"Accuracy on the test set: mean of the last {settings.average_last} of {settings.rounds} rounds",
            ("accuracy %", f"difference to {BASELINE}", "loss", "best single round"),
            {
                row.codec: (
                    _spread(f"{100 * row.accuracy:.2f}", row.accuracy_deviation),
                    "-"
                    if row.difference_to_raw is None
                    else _spread(
                        f"{100 * row.difference_to_raw:+.2f}", row.difference_to_raw_deviation
                    ),
                    f"{row.loss:.4f}",
                    f"{100 * row.best_accuracy:.2f} (round {row.best_round})",
                )
                for row in summaries
            },
        ),
        _table(
            "One uplink payload, everything that is sent counted",
            ("bytes", "largest", "ratio", "bits/weight", "ideal bytes", "largest/ideal"),
            {
                row.codec: (
                    _figure(row.payload_bytes),
                    f"{row.largest_payload_bytes:,}",
                    f"{row.ratio:,.1f}x",
                    f"{row.bits_per_parameter:.3f}",
                    "-" if row.ideal_bytes is None else _figure(row.ideal_bytes),
                    "-"
                    if row.largest_payload_over_ideal is None
                    else f"{row.largest_payload_over_ideal:.3f}",
                )
                for row in summaries
            },
        ),
        _table(
            "Traffic of all sampled clients",
            ("up/round", "up total", "down/round", "down total"),
            {
                row.codec: (
                    _bytes(row.uplink_bytes_per_round),
                    _bytes(row.uplink_bytes),
                    _bytes(row.downlink_bytes_per_round),
                    _bytes(row.downlink_bytes),
                )
                for row in summaries
            },
        ),
        _table(
            f"Time: measured a payload; simulated transfer ({settings.link})",
            ("encode ms", "decode ms", "transfer s/round", "transfer s"),
            {
                row.codec: (
                    f"{row.encode_milliseconds:.2f}",
                    f"{row.decode_milliseconds:.2f}",
                    f"{row.transfer_seconds_per_round:.3f}",
                    f"{row.transfer_seconds:,.1f}",
                )
                for row in summaries
            },
        ),
    ]
    if summaries[0].seeds > 1:
        result[
            0
        ].caption = f"mean ± sample standard deviation of {summaries[0].seeds} seeds; differences are paired"
    return result


def _table(title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table(
        "codec", title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for codec, cells in rows.items():
        table.add_row(escape(codec), *cells)
    return table


def _spread(text: str, deviation: float | None) -> str:
    return text if deviation is None else f"{text} ± {100 * deviation:.2f}"


def _figure(count: float) -> str:
    return f"{count:,.1f}".removesuffix(".0")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{_figure(count) if unit == 'B' else f'{count:.1f}'} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def write_report(
    folder: Path, settings: Settings, runs: Sequence[Run], summaries: Sequence[Summary]
) -> list[Path]:
    """Write the study's files and return their paths; a file is there in full or as it was before.

    report.json holds everything; summary.csv one line a codec; rounds.csv one line a round of each run; the PNG files
    show accuracy against rounds and against the bytes of the uplink.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    report = {
        "settings": asdict(settings),
        "seeds": sorted({run.seed for run in runs}),
        **provenance(),
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }

    def write(draft: Path) -> None:
        write_json(draft / "report.json", report)
        write_csv(draft / "summary.csv", [asdict(summary) for summary in summaries])
        write_csv(draft / "rounds.csv", _rounds(runs))
        _plot(draft / "accuracy-rounds.png", settings, runs, against_bytes=False)
        _plot(draft / "accuracy-uplink.png", settings, runs, against_bytes=True)

    return write_files(folder, write)


def _rounds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        columns = asdict(run.history) | asdict(run.timing)
        for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
            rows.append(
                {
                    "codec": run.codec,
                    "seed": run.seed,
                    "round": number,
                    **dict(zip(columns, values, strict=True)),
                }
            )
    return rows


def _plot(path: Path, settings: Settings, runs: Sequence[Run], against_bytes: bool) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (codec, group) in enumerate(groupby(runs, key=lambda run: run.codec)):
        histories = [run.history for run in group]
        evaluated = [
            index for index, value in enumerate(histories[0].accuracy) if value is not None
        ]
        curves = 100 * np.array(
            [[history.accuracy[index] for index in evaluated] for history in histories], float
        )
        bytes_so_far = np.cumsum([history.uplink_bytes for history in histories], axis=1).mean(
            axis=0
        )[evaluated]
        positions = bytes_so_far if against_bytes else np.array(evaluated) + 1
        mean = curves.mean(axis=0)
        style, width = LINES[number % len(LINES)]
        (line,) = axes.plot(positions, mean, label=codec, linestyle=style, linewidth=width)
        if len(curves) > 1:
            deviation = curves.std(axis=0, ddof=1)
            axes.fill_between(
                positions, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15
            )
    axes.set_xscale("log" if against_bytes else "linear")
    axes.set_xlabel("uplink bytes of all clients, cumulative" if against_bytes else "round")
    axes.set_ylabel("test accuracy, %")
    seeds = len({run.seed for run in runs})
    spread = "1 seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    axes.set_title(
        f"Accuracy {'for the bytes sent' if against_bytes else 'by round'}\n{settings.dataset}, "
        f"{settings.clients_per_round} of {settings.clients} clients a round, {spread}",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
