"""What the study of Jeurkar et al. showed, beside the paper's own figures: a page, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

from .drawings import curves
from .files import write_csv, write_files, write_json
from .page import STYLE, Figure, Section, Table, write_page
from .provenance import provenance
from .settings import Settings
from .uplink_pruning import (
    AMOUNTS,
    COLUMNS,
    EXPERIMENTS,
    QUICK_EXPERIMENT,
    SELECTS,
    Column,
    Experiment,
    Kind,
)

MB = 1e6  # as the paper counts
DATA_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
Names = Mapping[str, str]  # of data sets, as a reader knows them


@dataclass(frozen=True)
class Published:
    """A row of Jeurkar et al.'s table 1: at 0, 10, ... 90 %."""

    accuracy: tuple[float, ...]
    megabytes: tuple[float, ...]
    best_round: tuple[int, ...]


PUBLISHED: dict[tuple[str, str, Kind], Published] = {
    ("resnet12", "cifar10", "structured"): Published(
        (0.4, 0.36, 0.36, 0.37, 0.31, 0.24, 0.16, 0.16, 0.12, 0.12),
        (155.75, 138.4, 123.58, 109.52, 97.48, 83.23, 72.24, 58.91, 48.09, 35.11),
        (29, 79, 74, 54, 77, 43, 25, 78, 68, 72),
    ),
    ("resnet12", "cifar10", "unstructured"): Published(
        (0.38, 0.38, 0.4, 0.4, 0.39, 0.4, 0.4, 0.4, 0.39, 0.36),
        (155.75, 142.45, 129.15, 115.85, 102.55, 89.25, 75.96, 62.66, 49.36, 36.06),
        (49, 30, 52, 35, 36, 25, 27, 39, 58, 46),
    ),
    ("resnet12", "mnist", "structured"): Published(
        (0.97, 0.98, 0.87, 0.78, 0.64, 0.57, 0.44, 0.36, 0.23, 0.11),
        (155.74, 141.51, 126.13, 109.48, 94.24, 77.12, 61.22, 56.46, 41.73, 32.01),
        (29, 41, 25, 48, 38, 38, 49, 41, 29, 1),
    ),
    ("resnet12", "mnist", "unstructured"): Published(
        (0.97, 0.97, 0.97, 0.97, 0.96, 0.97, 0.96, 0.97, 0.97, 0.49),
        (155.74, 142.44, 129.14, 115.84, 102.55, 89.25, 75.95, 62.65, 49.35, 36.06),
        (15, 14, 10, 15, 15, 15, 15, 15, 15, 14),
    ),
    ("simple-cnn", "mnist", "structured"): Published(
        (0.92, 0.93, 0.82, 0.73, 0.61, 0.56, 0.42, 0.34, 0.16, 0.11),
        (0.35, 0.31, 0.28, 0.25, 0.21, 0.18, 0.15, 0.11, 0.08, 0.05),
        (20, 24, 24, 25, 22, 23, 23, 24, 14, 1),
    ),
    ("simple-cnn", "mnist", "unstructured"): Published(
        (0.93, 0.93, 0.93, 0.93, 0.93, 0.93, 0.91, 0.9, 0.87, 0.32),
        (0.35, 0.32, 0.28, 0.25, 0.21, 0.18, 0.15, 0.11, 0.08, 0.05),
        (22, 20, 22, 25, 23, 23, 21, 25, 25, 25),
    ),
}


@dataclass(frozen=True)
class Size:
    """Payloads of a cell and the paper's, in bytes; `ideal_bytes` says what the ideals are."""

    model: str
    dataset: str
    kind: Kind
    amount: float
    weights_bytes: int
    delta_bytes: int
    ideal_bytes: float
    int8_weights_bytes: int
    int8_delta_bytes: int
    int8_ideal_bytes: float
    paper_bytes: float | None

    @property
    def over_ideal(self) -> float:
        """The larger payload over the ideal one."""
        return max(self.weights_bytes, self.delta_bytes) / self.ideal_bytes

    @property
    def int8_over_ideal(self) -> float:
        """The same with int8 values."""
        return max(self.int8_weights_bytes, self.int8_delta_bytes) / self.int8_ideal_bytes


@dataclass(frozen=True)
class Accuracy:
    """A cell over its seeds: means, with sample standard deviations where a name ends so.

    Attributes
    ----------
    best_accuracy, best_round
        Of the rounds' accuracies on the test set the best, which the paper reports.
    final_accuracy
        After the last round.
    difference, final_difference : float or None
        To the same cell without pruning, seed by seed; None where that is not there.
    rounds_to_target, bytes_to_target : float or None
        Until the experiment's target is reached, bytes of both clients; None where a seed never does.
    """

    model: str
    dataset: str
    kind: Kind
    amount: float
    column: Column
    seeds: int
    rounds: int
    test_images: int | None
    best_accuracy: float
    best_accuracy_deviation: float | None
    best_round: float
    final_accuracy: float
    difference: float | None
    final_difference: float | None
    payload_bytes: float
    rounds_to_target: float | None
    bytes_to_target: float | None
    paper_accuracy: float | None
    paper_best_round: int | None


Results = Mapping[str, Any]  # of cells by their names


def sizes(results: Results) -> list[Size]:
    """Return the measured payloads of all cells."""
    found = []
    for experiment in (*EXPERIMENTS, QUICK_EXPERIMENT):
        cells = {
            (cell["kind"], cell["amount"], cell["column"]): cell
            for name, sizes in results.items()
            if name.startswith(f"sizes-{experiment.slug}-")
            for cell in sizes
        }
        for kind in SELECTS:
            published = PUBLISHED.get((experiment.model, experiment.dataset, kind))
            for number, amount in enumerate(AMOUNTS):
                if (kind, amount, "weights") not in cells:
                    continue
                weights, delta = (cells[kind, amount, column] for column in COLUMNS)
                found.append(
                    Size(
                        experiment.model,
                        experiment.dataset,
                        kind,
                        amount,
                        weights["payload_bytes"],
                        delta["payload_bytes"],
                        weights["ideal_bytes"],
                        weights["int8_payload_bytes"],
                        delta["int8_payload_bytes"],
                        weights["int8_ideal_bytes"],
                        published.megabytes[number] * MB if published else None,
                    )
                )
    return found


def accuracies(results: Results) -> list[Accuracy]:
    """Return what was trained, over the seeds."""
    found = []
    for experiment in (*EXPERIMENTS, QUICK_EXPERIMENT):
        for kind in SELECTS:
            for column in COLUMNS:
                dense: dict[int, Any] = {}
                for number, amount in enumerate(AMOUNTS):
                    cells = _cells(results, experiment, kind, amount, column)
                    if not amount:
                        dense = {cell["seed"]: cell for cell in cells}
                    if cells:
                        found.append(_accuracy(experiment, cells, dense, number))
    return found


def _cells(
    results: Results, experiment: Experiment, kind: Kind, amount: float, column: Column
) -> list[Any]:
    start = f"{experiment.slug}-{kind}-{round(100 * amount)}-{column}-"
    return [result for name, result in results.items() if result and name.startswith(start)]


def _accuracy(
    experiment: Experiment, cells: Sequence[Any], dense: Mapping[int, Any], number: int
) -> Accuracy:
    first = cells[0]
    best = [cell["best_accuracy"] for cell in cells]
    paired = [(cell, dense[cell["seed"]]) for cell in cells if cell["seed"] in dense]
    reached = [_to_target(cell, experiment.target) for cell in cells]
    rounds, sent = [
        None if None in column else fmean(column) for column in zip(*reached, strict=True)
    ]
    published = PUBLISHED.get((experiment.model, experiment.dataset, first["kind"]))
    return Accuracy(
        experiment.model,
        experiment.dataset,
        first["kind"],
        first["amount"],
        first["column"],
        seeds=len(cells),
        rounds=len(first["accuracy"]),
        test_images=first["test_images"],
        best_accuracy=fmean(best),
        best_accuracy_deviation=stdev(best) if len(best) > 1 else None,
        best_round=fmean(cell["best_round"] for cell in cells),
        final_accuracy=fmean(cell["accuracy"][-1] for cell in cells),
        difference=_mean([cell["best_accuracy"] - of["best_accuracy"] for cell, of in paired]),
        final_difference=_mean([cell["accuracy"][-1] - of["accuracy"][-1] for cell, of in paired]),
        payload_bytes=fmean(
            size for cell in cells for both in cell["payload_bytes"] for size in both
        ),
        rounds_to_target=rounds,
        bytes_to_target=sent,
        paper_accuracy=published.accuracy[number] if published else None,
        paper_best_round=published.best_round[number] if published else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _to_target(cell: Any, target: float) -> tuple[float | None, float | None]:
    sent = accumulate(sum(sizes) for sizes in cell["payload_bytes"])
    for number, (accuracy, bytes_so_far) in enumerate(
        zip(cell["accuracy"], sent, strict=True), start=1
    ):
        if accuracy >= target:
            return number, bytes_so_far
    return None, None


# --- the page -----------------------------------------------------------------------------------------------------


def _heading(experiment: Experiment, kind: Kind, names: Names) -> str:
    return f"{experiment.model} on {names.get(experiment.dataset, experiment.dataset)}, {kind}"


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else format(100 * value, f"{sign}.2f")


def size_tables(found: Sequence[Size], names: Names = DATA_NAMES) -> list[Table]:
    """Return a table for each experiment and kind."""
    tables = []
    for experiment, kind in _groups():
        rows = [
            size
            for size in found
            if (size.model, size.dataset, size.kind) == (experiment.model, experiment.dataset, kind)
        ]
        if rows:
            tables.append(
                Table(
                    _heading(experiment, kind, names),
                    [
                        "pruned",
                        ("float32 values, MB", "weights"),
                        ("float32 values, MB", "delta"),
                        ("float32 values, MB", "paper"),
                        "over ideal",
                        ("int8 values, MB", "weights"),
                        ("int8 values, MB", "delta"),
                        "int8 over ideal",
                    ],
                    [
                        [
                            f"{size.amount:.0%}",
                            f"{size.weights_bytes / MB:,.3f}",
                            f"{size.delta_bytes / MB:,.3f}",
                            "" if size.paper_bytes is None else f"{size.paper_bytes / MB:,.2f}",
                            f"{size.over_ideal:.4f}",
                            f"{size.int8_weights_bytes / MB:,.3f}",
                            f"{size.int8_delta_bytes / MB:,.3f}",
                            f"{size.int8_over_ideal:.4f}",
                        ]
                        for size in rows
                    ],
                    "One client's payload, everything counted; MB = 10^6 bytes. The ideal is the kept values, the rest "
                    "of the network in float32 and, of weights pruned one by one, the entropy of positions spread "
                    "evenly: where layers lose unequal shares, a payload can be below it.",
                )
            )
    return tables


def accuracy_tables(found: Sequence[Accuracy], names: Names = DATA_NAMES) -> list[Table]:
    """Return a table for each experiment and kind that was trained."""
    tables = []
    for experiment, kind in _groups():
        cells = {
            (row.amount, row.column): row
            for row in found
            if (row.model, row.dataset, row.kind) == (experiment.model, experiment.dataset, kind)
        }
        amounts = sorted({amount for amount, _ in cells})
        if not amounts:
            continue
        first = next(iter(cells.values()))
        images = "all" if first.test_images is None else f"{first.test_images:,}"
        target = f"to {experiment.target:.0%}"
        headings: list[str | tuple[str, str]] = ["pruned"]
        for column in COLUMNS:
            headings += [
                (column, name)
                for name in (
                    "best accuracy, %",
                    "to dense, points",
                    "round",
                    f"rounds {target}",
                    f"MB {target}",
                )
            ]
        headings += [("paper", "best accuracy, %"), ("paper", "round")]
        counts = sorted({cell.seeds for cell in cells.values()})
        seeds = _count(counts[0], "seed")
        if len(counts) > 1:  # some are not done yet
            seeds = f"{counts[0]} to {_count(counts[-1], 'seed')} (in accuracy.csv), differences of those in common"
        rows = []
        for amount in amounts:
            of = {column: cells.get((amount, column)) for column in COLUMNS}
            published = next(cell for cell in of.values() if cell is not None)
            row = [f"{amount:.0%}"]
            for cell in of.values():
                row += _accuracy_columns(cell)
            if published.paper_accuracy is None:
                row += ["", ""]
            else:
                row += [f"{100 * published.paper_accuracy:.0f}", str(published.paper_best_round)]
            rows.append(row)
        tables.append(
            Table(
                _heading(experiment, kind, names),
                headings,
                rows,
                f"{_count(first.rounds, 'round')}, {seeds}, {images} test images; of the "
                "server's model. Means, ± sample standard deviation. Bytes are of both clients together; '-' "
                "where a seed does not get there.",
            )
        )
    return tables


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _accuracy_columns(row: Accuracy | None) -> list[str]:
    if row is None:
        return [""] * 5
    best = _percent(row.best_accuracy)
    if row.best_accuracy_deviation is not None:
        best += f" ± {_percent(row.best_accuracy_deviation)}"
    return [
        best,
        "" if not row.amount else _percent(row.difference, "+"),
        f"{row.best_round:.1f}",
        "-" if row.rounds_to_target is None else f"{row.rounds_to_target:.1f}",
        "-" if row.bytes_to_target is None else f"{row.bytes_to_target / MB:,.2f}",
    ]


def _groups() -> Iterator[tuple[Experiment, Kind]]:
    for experiment in (*EXPERIMENTS, QUICK_EXPERIMENT):
        for kind in SELECTS:
            yield experiment, kind


def figures(results: Results, found: Sequence[Accuracy], names: Names = DATA_NAMES) -> list[Figure]:
    """Draw the paper's figures 4 to 15, in both columns, of what was trained for more than a round."""
    drawn = []
    with rc_context(STYLE):
        for experiment, kind in _groups():
            for column in COLUMNS:
                heights = {
                    f"{amount:.0%}": np.mean(
                        [100 * np.array(cell["accuracy"]) for cell in cells], axis=0
                    )
                    for amount in AMOUNTS
                    if (cells := _cells(results, experiment, kind, amount, column))
                }
                if not heights or len(next(iter(heights.values()))) < 2:
                    continue
                heading = f"{_heading(experiment, kind, names)}, {column}"
                drawn.append(
                    Figure(
                        f"{heading}: accuracy by round",
                        curves(heights, "round", "test accuracy, %", columns=4, title="pruned"),
                        "Mean over the seeds.",
                    )
                )
                rows = [
                    row
                    for row in found
                    if (row.model, row.dataset, row.kind, row.column)
                    == (experiment.model, experiment.dataset, kind, column)
                ]
                if all(row.rounds_to_target is None for row in rows):
                    continue
                drawn.append(
                    Figure(
                        f"{heading}: rounds and bytes to {experiment.target:.0%}",
                        _targets(rows),
                        "No bar where a seed does not get there.",
                    )
                )
    return drawn


def _targets(rows: Sequence[Accuracy]) -> Drawing:
    drawing = Drawing()
    upper, lower = drawing.subplots(2, 1, sharex=True)
    names = [f"{row.amount:.0%}" for row in rows]
    upper.bar(names, [row.rounds_to_target or 0 for row in rows])
    upper.set_ylabel("rounds")
    lower.bar(names, [(row.bytes_to_target or 0) / MB for row in rows])
    lower.set_ylabel("MB")
    lower.set_xlabel("pruned")
    return drawing


DIFFERENCES = (
    "The paper counts about 4 bytes for a weight that is kept and little or nothing for its position, and its "
    "structured sizes of one network differ from data set to data set. Ours are the lengths of the payloads that were "
    "decoded.",
    "The paper names no widths: ours are chosen so that the dense networks have its sizes within 1 %. All convolutions "
    "and fully connected layers but the last are pruned; batch norm and biases travel whole.",
    "'weights' is the paper's way: clients prune the weights that they send, and the server averages. 'delta' prunes "
    "their change, and the server adds the mean to its dense model.",
    "The notebooks that the paper's authors published prune the last layer too and, weight by weight, the biases; they "
    "take channels by their L1 norm where ours are taken by the L2 norm, and count positions as SciPy's CSR has them.",
    "There is no error feedback in either column, since the paper has none.",
    "The paper's table has the best round on the test set. So has ours, for the comparison's sake; nothing was tuned.",
)


def write_report(
    folder: Path,
    settings: Settings,
    seeds: Sequence[int],
    results: Results,
    note: str = "",
    names: Names | None = None,
) -> list[Path]:
    """Write the page, the sizes, the accuracies and all results; a file is there in full or as it was before.

    ``names`` says what data sets are called on the page where that is not their usual name.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    payloads, trained, called = sizes(results), accuracies(results), DATA_NAMES | dict(names or {})
    about = {"seeds": list(seeds), **asdict(settings)}
    of_other_studies = ("data_dir", "dataset", "model", "hidden", "average_last", "evaluate_every")
    for name in (*of_other_studies, "downlink_delta", "link"):
        about.pop(name)
    sections = [
        Section(
            "Bytes of a payload",
            ["Of one client after its first training."],
            size_tables(payloads, called),
        ),
        Section("Accuracy", [], accuracy_tables(trained, called)),
        Section("Figures", [], figures(results, trained, called)),
        Section("What differs from the paper, and why", DIFFERENCES),
    ]
    introduction = [
        "Structured and unstructured pruning of what clients send, in federated averaging of "
        f"{settings.clients_per_round} of {settings.clients} clients a round: the study of Jeurkar et al., "
        '"Evaluation of Model Compression Techniques in Federated Learning under Bandwidth Considerations", every byte '
        "counted as it was sent.",
        *([note] if note else []),
    ]
    if not any(size.paper_bytes for size in payloads) and not any(
        row.paper_accuracy for row in trained
    ):
        introduction.append(
            "The paper's figures are of MNIST and CIFAR-10, to whose networks the words about sizes below refer."
        )

    def write(draft: Path) -> None:
        write_page(
            draft / "pruning.html",
            "Pruned uplinks",
            introduction,
            [section for section in sections if section.parts or section.title.startswith("What")],
            {"settings": about, **provenance()},
        )
        if payloads:
            write_csv(draft / "sizes.csv", [asdict(size) for size in payloads])
        if trained:
            write_csv(draft / "accuracy.csv", [asdict(row) for row in trained])
        write_json(draft / "pruning.json", {"settings": about, **provenance(), "cells": results})

    return write_files(folder, write)
