"""What the study of Chandar et al. showed, beside the paper's own figures: a page, CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing
from numpy.typing import ArrayLike

import fedcodec as fc

from .autoencoder import COLLABORATORS, TARGET, Spent, Task
from .drawings import curves
from .files import write_csv, write_files, write_json
from .page import STYLE, Figure, Section, Table, write_page
from .provenance import provenance

# Chandar et al., sections 5.1 and 5.3: parameters of the autoencoder, and how many times fewer latents there are.
PUBLISHED = {"mnist": (1_034_182, 500), "cifar10": (352_915_690, 1720)}
METHOD = "autoencoder"  # whose figures stand for the paper's
LINKS = (1, 10)  # Mbit/s
BUDGETS = (0.1, 0.3, 0.8, 2, 8, 20, 80)  # in uncompressed updates
FIRST_EPOCHS = 3  # that differences are not looked at in: the weights move fast
MEASURES = (("accuracy", "test accuracy, %", 100), ("loss", "test loss", 1))
# Of `fedcodec.sim.autoencoder.follow` and the like by the names of tasks; for the page, by those of cells.
Results = Mapping[str, Any]
Names = Mapping[str, str]  # of data sets, as a reader knows them
DATA_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


@dataclass(frozen=True)
class Cost:
    """What an autoencoder costs and saves; sizes in bytes, everything counted.

    Attributes
    ----------
    latent_ratio : float
        Values over latents, all else left out: as the paper counts.
    payload_ratio : float
        Bytes of the values in float32 over those of the payload.
    break_even_by_formula, break_even, int8_break_even : float
        Rounds after which it pays, with a decoder for each collaborator: of numbers of parameters, as in the paper's
        figure 11; of measured bytes; of those with the decoder sent as int8.
    """

    task: str
    values: int
    latents: int
    parameters: int
    paper_parameters: int | None
    latent_ratio: float
    paper_ratio: float | None
    payload_bytes: int
    payload_ratio: float
    decoder_bytes: int
    int8_decoder_bytes: int
    break_even_by_formula: float
    break_even: float
    int8_break_even: float
    prepass_seconds: float
    fit_seconds: float
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Kept:
    """How much of a classifier's accuracy is left after decoding, in points: the worst and the mean change."""

    task: str
    method: str
    points: str
    count: int
    original: float
    decoded: float
    worst_change: float
    mean_change: float


def costs(tasks: Mapping[str, Task], results: Results) -> list[Cost]:
    """Return what the autoencoder of each task costs."""
    found = []
    for name, result in results.items():
        values, latents = result["values"], tasks[name].latents
        parameters, payload = result["parameters"], result["payload_bytes"][METHOD]
        decoder, coded = (
            result["decoder_bytes"][method] for method in (METHOD, f"{METHOD}, int8 decoder")
        )
        paper = PUBLISHED.get(tasks[name].dataset, (None, None))
        found.append(
            Cost(
                name,
                values,
                latents,
                parameters,
                paper[0],
                values / latents,
                paper[1],
                payload,
                4 * values / payload,
                decoder,
                coded,
                fc.break_even(values, latents, cost=parameters / 2),
                fc.break_even(4 * values, payload, cost=decoder),
                fc.break_even(4 * values, payload, cost=coded),
                *(result["seconds"][step] for step in ("prepass", "fit", "encode", "decode")),
            )
        )
    return found


def kept(results: Results) -> list[Kept]:
    """Return what is left of the accuracy, at the ends of epochs and in the rounds after."""
    found = []
    for name, result in results.items():
        for points, first in (("epochs", FIRST_EPOCHS), ("rounds", 0)):
            original = 100 * np.array(result[points]["original"]["accuracy"][first:])
            if not original.size:
                continue
            for method, curve in result[points].items():
                if method == "original":
                    continue
                decoded = 100 * np.array(curve["accuracy"][first:])
                change = decoded - original
                found.append(
                    Kept(
                        name,
                        method,
                        points,
                        original.size,
                        float(original[-1]),
                        float(decoded[-1]),
                        float(change.min()),
                        float(change.mean()),
                    )
                )
    return found


@dataclass(frozen=True)
class Verdict:
    """What a federation of two collaborators sends up, with one way to send; everything counted.

    Attributes
    ----------
    before_bytes : int
        Before the first round.
    round_bytes : float
        The mean of the rounds, of both collaborators.
    total_bytes : int
        Of all rounds and before them.
    total_updates : float
        The same in uncompressed updates of a collaborator.
    best_accuracy, last_accuracy : float
        Of the rounds.
    bytes_to_target : int or None
        Until 99 % of the best accuracy of "raw" is reached; None if it never is.
    rounds : int
    """

    task: str
    way: str
    before_bytes: int
    round_bytes: float
    total_bytes: int
    total_updates: float
    best_accuracy: float
    last_accuracy: float
    bytes_to_target: int | None
    rounds: int


@dataclass(frozen=True)
class Within:
    """The best test accuracy of a way to send by the time that it has sent so much; None before its first round.

    ``over`` says whether all rounds are over by then, with less.
    """

    task: str
    way: str
    updates: float
    budget_bytes: int
    accuracy: float | None
    over: bool


def verdicts(results: Results) -> list[Verdict]:
    """Return what each way to send needs; of the tasks in which updates were sent uncompressed too."""
    found = []
    for task, ways in results.items():
        if "raw" not in ways:
            continue
        target, update = TARGET * max(ways["raw"]["accuracy"]), _update_bytes(ways)
        for way, result in ways.items():
            spent = Spent(**result)
            total = spent.before_bytes + sum(spent.payload_bytes)
            found.append(
                Verdict(
                    task,
                    way,
                    spent.before_bytes,
                    fmean(spent.payload_bytes),
                    total,
                    total / update,
                    max(spent.accuracy),
                    spent.accuracy[-1],
                    spent.bytes_to(target),
                    len(spent.accuracy),
                )
            )
    return found


def within(results: Results) -> list[Within]:
    """Return the accuracy of all ways to send at equal total bytes; of the same tasks."""
    found = []
    for task, ways in results.items():
        if "raw" not in ways:
            continue
        for updates in BUDGETS:
            budget = round(updates * _update_bytes(ways))
            for way, result in ways.items():
                spent = Spent(**result)
                over = spent.before_bytes + sum(spent.payload_bytes) <= budget
                found.append(Within(task, way, updates, budget, spent.best_within(budget), over))
    return found


def _update_bytes(ways: Mapping[str, Any]) -> float:
    return fmean(ways["raw"]["payload_bytes"]) / COLLABORATORS


def compared(tasks: Mapping[str, Task], results: Results) -> dict[str, dict[str, Any]]:
    """Return a `Spent` by task and way, of the cells of both kinds."""
    found: dict[str, dict[str, Any]] = {}
    for name in tasks:
        ways = {
            cell["way"]: {key: value for key, value in cell.items() if key != "way"}
            for key, cell in results.items()
            if key.startswith(f"{name}-send-")
        }
        ways |= results.get(f"{name}-compare", {})
        if ways:
            found[name] = ways
    return found


# --- the page -----------------------------------------------------------------------------------------------------


def _called(task: str, names: Names) -> str:
    return names.get(task, task)


def _number(value: float | None, form: str = ",") -> str:
    return "" if value is None else format(value, form)


def cost_table(found: list[Cost], names: Names) -> Table:
    """Return sizes, ratios and break-even points."""
    return Table(
        "What an autoencoder costs and saves",
        [
            "classifier",
            "values",
            "latents",
            ("autoencoder, parameters", "ours"),
            ("autoencoder, parameters", "paper"),
            ("values / latents", "ours"),
            ("values / latents", "paper"),
            ("payload", "bytes"),
            ("payload", "ratio"),
            ("decoder", "float32"),
            ("decoder", "int8"),
        ],
        [
            [
                _called(cost.task, names),
                _number(cost.values),
                _number(cost.latents),
                _number(cost.parameters),
                _number(cost.paper_parameters),
                _number(cost.latent_ratio, ",.1f"),
                _number(cost.paper_ratio),
                _number(cost.payload_bytes),
                _number(cost.payload_ratio, ",.1f"),
                _short(cost.decoder_bytes),
                _short(cost.int8_decoder_bytes),
            ]
            for cost in found
        ],
        "The payload's ratio is to the values in float32, header and checksum counted.",
    )


def break_even_table(found: list[Cost], names: Names) -> Table:
    """Return the rounds after which an autoencoder has paid."""
    return Table(
        "Rounds until an autoencoder pays, with a decoder for each collaborator",
        [
            "classifier",
            ("by bytes", "formula"),
            ("by bytes", "measured"),
            ("by bytes", "int8 decoder"),
            *(("by time", f"{rate} Mbit/s") for rate in LINKS),
        ],
        [
            [
                _called(cost.task, names),
                _number(cost.break_even_by_formula, ",.1f"),
                _number(cost.break_even, ",.1f"),
                _number(cost.int8_break_even, ",.1f"),
                *(_rounds(fc.break_even(*times[:2], cost=times[2])) for times in _times(cost)),
            ]
            for cost in found
        ],
        "Formula: of numbers of parameters, half of the autoencoder being the decoder (Chandar et al., equations 4 to "
        "6). By time: an update's seconds on an uplink of that rate against the latents', with those of encoding and "
        "decoding; the pre-pass, the fit and the way of the decoder, in float32, come before.",
    )


def kept_table(found: list[Kept], names: Names, points: str, title: str, note: str) -> Table:
    """Return how well decoded weights classify."""
    return Table(
        title,
        [
            "classifier",
            "weights decoded by",
            ("test accuracy at the end, %", "original"),
            ("test accuracy at the end, %", "decoded"),
            ("decoded - original, points", "worst"),
            ("decoded - original, points", "mean"),
            points,
        ],
        [
            [
                _called(row.task, names),
                row.method,
                f"{row.original:.2f}",
                f"{row.decoded:.2f}",
                f"{row.worst_change:+.2f}",
                f"{row.mean_change:+.2f}",
                str(row.count),
            ]
            for row in found
            if row.points == points
        ],
        note,
    )


def time_table(found: list[Cost], names: Names) -> Table:
    """Return the seconds that were measured."""
    return Table(
        "Time on this machine",
        [
            "classifier",
            "pre-pass, s",
            "fitting the autoencoder, s",
            "encode, ms",
            "decode, ms",
        ],
        [
            [
                _called(cost.task, names),
                f"{cost.prepass_seconds:,.1f}",
                f"{cost.fit_seconds:,.1f}",
                f"{1e3 * cost.encode_seconds:,.2f}",
                f"{1e3 * cost.decode_seconds:,.2f}",
            ]
            for cost in found
        ],
        "Wall-clock time, on a processor with one thread. Encoding and decoding: medians of five.",
    )


def _times(cost: Cost) -> list[tuple[float, float, float]]:
    """Return the seconds of an update, of its latents and of all that comes before them, for each of `LINKS`."""
    return [
        (
            4 * cost.values / rate,
            cost.payload_bytes / rate + cost.encode_seconds + cost.decode_seconds,
            cost.decoder_bytes / rate + cost.prepass_seconds + cost.fit_seconds,
        )
        for rate in (1e6 * megabits / 8 for megabits in LINKS)
    ]


def _rounds(rounds: float) -> str:
    return "never" if rounds == math.inf else f"{rounds:,.1f}"


def verdict_tables(found: list[Verdict], names: Names) -> list[Table]:
    """Return what each way to send needs, a table for each task, the cheapest first."""
    tables = []
    for task in dict.fromkeys(row.task for row in found):
        rows = sorted(
            (row for row in found if row.task == task),
            key=lambda row: (row.bytes_to_target is None, row.bytes_to_target, -row.best_accuracy),
        )
        (raw,) = (row for row in rows if row.way == "raw")
        tables.append(
            Table(
                f"{_called(task, names)}: bytes to {TARGET:.0%} of the accuracy without compression",
                [
                    "updates sent by",
                    f"bytes to {TARGET:.0%}",
                    ("bytes", "before round 1"),
                    ("bytes", "a round"),
                    (f"all of {raw.rounds} rounds", "bytes"),
                    (f"all of {raw.rounds} rounds", "in updates"),
                    ("test accuracy, %", "best"),
                    ("test accuracy, %", "last"),
                    ("to raw, points", "best"),
                    ("to raw, points", "last"),
                ],
                [
                    [
                        row.way,
                        "never" if row.bytes_to_target is None else f"{row.bytes_to_target:,}",
                        f"{row.before_bytes:,}",
                        f"{row.round_bytes:,.0f}",
                        f"{row.total_bytes:,}",
                        f"{row.total_updates:,.2f}",
                        f"{100 * row.best_accuracy:.2f}",
                        f"{100 * row.last_accuracy:.2f}",
                        f"{100 * (row.best_accuracy - raw.best_accuracy):+.2f}",
                        f"{100 * (row.last_accuracy - raw.last_accuracy):+.2f}",
                    ]
                    for row in rows
                ],
                "Uplink of two collaborators, one seed; never: not in these rounds. Before the first round decoders "
                "travel and, where there is one for both, the encoder for the second collaborator. Autoencoders and "
                "principal components send weights, the other codecs what changed, with error feedback; past averages "
                "are a decoder that both ends have. In updates: in those of one collaborator without compression.",
            )
        )
    return tables


def within_tables(found: list[Within], names: Names) -> list[Table]:
    """Return the accuracy at equal total bytes, a table for each task, the best by the fewest bytes first."""
    tables = []
    for task in dict.fromkeys(row.task for row in found):
        rows: dict[str, list[Within]] = {}
        budgets = {row.updates: row.budget_bytes for row in found if row.task == task}
        for row in found:
            if row.task == task:
                rows.setdefault(row.way, []).append(row)
        tables.append(
            Table(
                f"{_called(task, names)}: test accuracy at equal total bytes",
                [
                    "updates sent by",
                    *(
                        ("test accuracy, %, within", f"{updates:g} updates ({_short(budget)})")
                        for updates, budget in budgets.items()
                    ),
                ],
                [
                    [
                        way,
                        *map(_accuracy, of),
                    ]
                    for way, of in sorted(
                        rows.items(), key=lambda row: [-(one.accuracy or 0) for one in row[1]]
                    )
                ],
                "The best round by the time that the collaborators together have sent so many bytes, decoders counted. "
                "Empty: the first round is not over by then. In brackets: all rounds are, with fewer bytes.",
            )
        )
    return tables


def _accuracy(row: Within) -> str:
    if row.accuracy is None:
        return ""
    text = f"{100 * row.accuracy:.2f}"
    return f"({text})" if row.over else text


def _short(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def verdict_figures(results: Results, names: Names) -> list[Figure]:
    """Draw accuracy against all bytes so far."""
    drawn = []
    with rc_context(STYLE):
        for task, ways in results.items():
            drawing = Drawing(figsize=(5.0, 3.0 + 0.2 * len(ways)))
            axes = drawing.add_subplot()
            markers = iter("osv^DPX*d<>")
            for way, result in ways.items():
                total = result["before_bytes"] + np.cumsum(result["payload_bytes"])
                heights = 100 * np.array(result["accuracy"])
                if result["before_bytes"]:  # lines would lie on top of each other
                    axes.plot(total[-1], heights.max(), next(markers), label=way)
                else:
                    axes.plot(total, heights, label=way)
            axes.set_xscale("log")
            axes.set_xlabel("bytes so far")
            axes.set_ylabel("test accuracy, %")
            drawing.legend(loc="outside lower center", ncols=1)
            drawn.append(
                Figure(
                    f"{_called(task, names)}: accuracy against the bytes sent",
                    drawing,
                    "Decoders counted. Where one travels, which is nearly all: the best round, at all bytes.",
                )
            )
    return drawn


def figures(results: Results, names: Names) -> list[Figure]:
    """Draw the paper's figures 4 to 7, and the rounds after the decoder was frozen."""
    drawn = []
    with rc_context(STYLE):
        for task, result in results.items():
            called = _called(task, names)
            training, validation = zip(*result["fit"], strict=True)
            drawn.append(
                Figure(
                    f"{called}: loss of the autoencoder",
                    curves(
                        {"training": training, "validation": validation},
                        "epoch",
                        "mean squared error",
                        logarithmic="y",
                    ),
                    "In squares of the standard deviation of the weights (Chandar et al., figures 4 and 6).",
                )
            )
            for points, where in (("epochs", "epoch"), ("rounds", "round")):
                of = result[points]
                if not of["original"]["accuracy"]:
                    continue
                place = {
                    "epochs": "At the end of each epoch of the pre-pass (Chandar et al., figures 5 and 7).",
                    "rounds": "Of a federation in which nothing is compressed, with the decoder as it was.",
                }[points]
                for measure, label, factor in MEASURES:
                    heights = {
                        method: factor * np.array(curve[measure]) for method, curve in of.items()
                    }
                    drawn.append(
                        Figure(
                            f"{called}: {measure} of decoded weights by {where}",
                            curves(heights, where, label),
                            place,
                        )
                    )
    return drawn


def colour_figures(results: Results, tasks: Mapping[str, Task], names: Names) -> list[Figure]:
    """Draw the paper's figures 8 and 9."""
    drawn = []
    with rc_context(STYLE):
        for task, result in results.items():
            sizes, each = result["payload_bytes"], tasks[task].local_epochs
            for measure, label, factor in MEASURES:
                heights = {
                    f"{images}, {way}": factor * np.array(curve[measure])
                    for way in ("autoencoder", "raw")
                    for images, curve in zip(("colour", "greyscale"), result[way], strict=True)
                }
                drawn.append(
                    Figure(
                        f"{_called(task, names)}: {measure} of two collaborators, colour and greyscale",
                        curves(heights, "local epoch", label),
                        f"They average after every {each} epochs, by payloads of {sizes['autoencoder']:,} bytes or, "
                        f"raw, {sizes['raw']:,} (Chandar et al., figures 8 and 9).",
                    )
                )
    return drawn


def savings_figures(found: list[Cost], names: Names) -> list[Figure]:
    """Draw the paper's figures 10 and 11, of measured bytes."""
    many = np.unique(np.geomspace(1, 1e4, 60).round().astype(int))  # rounds, or collaborators
    drawn = []
    with rc_context(STYLE):
        for cost in found:
            called = _called(cost.task, names)
            shared = {
                f"{rounds} rounds": [_ratio(cost, cost.decoder_bytes, rounds, n) for n in many]
                for rounds in (8, 41, 100)
            }
            own = {
                "float32 decoder": [_ratio(cost, cost.decoder_bytes, n, 1) for n in many],
                "int8 decoder": [_ratio(cost, cost.int8_decoder_bytes, n, 1) for n in many],
            }
            timed = {
                f"{rate} Mbit/s": [
                    fc.savings_ratio(*times[:2], rounds=n, cost=times[2]) for n in many
                ]
                for rate, times in zip(LINKS, _times(cost), strict=True)
            }
            drawn += [
                Figure(
                    f"{called}: savings ratio, one decoder for all",
                    _ratios(shared, "collaborators", many),
                    "Of measured bytes, the decoder in float32 (Chandar et al., figure 10: its break-even at 40 "
                    "collaborators is that of 8 rounds, its 120x at 1,000 that of 41).",
                ),
                Figure(
                    f"{called}: savings ratio, a decoder for each",
                    _ratios(own, "rounds", many),
                    "Of measured bytes (Chandar et al., figure 11).",
                ),
                Figure(
                    f"{called}: savings ratio in time, a decoder for each",
                    _ratios(timed, "rounds", many),
                    "Of seconds on an uplink; the pre-pass, the fit, encoding and decoding counted, on this machine.",
                ),
            ]
    return drawn


def _ratio(cost: Cost, decoder: int, rounds: int, clients: int) -> float:
    return fc.savings_ratio(
        4 * cost.values, cost.payload_bytes, rounds=rounds, clients=clients, cost=decoder
    )


def _ratios(heights: Mapping[str, list[float]], x: str, places: ArrayLike) -> Drawing:
    return curves(heights, x, "savings ratio", places=places, logarithmic="xy")


DIFFERENCES = (
    "The paper's accuracy of an autoencoder is not defined there; ours is judged by its error, and by what the "
    "classifier does with the decoded weights.",
    "The paper measures decoded weights at epochs that the autoencoder was fitted to. Ours has not seen them; but they "
    "lie between others that it has, so the rounds of a federation that starts anew stand beside them.",
    "The paper names no learning rate, optimiser, batch size, activation or first weights, of classifiers or of "
    "autoencoders. It counts latents; a payload has a header and a checksum too.",
    "Values are standardised by two numbers and biases begin at the mean snapshot: neither costs a parameter.",
)


def write_report(
    folder: Path,
    tasks: Mapping[str, Task],
    seed: int,
    results: Results,
    device: str,
    note: str = "",
    names: Names | None = None,
) -> list[Path]:
    """Write the page, the costs, what is kept of the accuracy, and all results; each in full or as it was before.

    ``names`` says what data sets are called on the page where that is not their usual name.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    called = DATA_NAMES | dict(names or {})
    followed, coloured = (
        {name: results[f"{name}-{kind}"] for name in tasks if f"{name}-{kind}" in results}
        for kind in ("follow", "colours")
    )
    sent = compared(tasks, results)
    spent, left = costs(tasks, followed), kept(followed)
    needed, equal = verdicts(sent), within(sent)
    about = {"seed": seed, "device": device}
    about |= {name: asdict(tasks[name]) for name in tasks if name in {*followed, *sent, *coloured}}
    sections = [
        Section(
            "Results",
            [],
            []
            if not followed
            else [
                cost_table(spent, called),
                break_even_table(spent, called),
                kept_table(
                    left,
                    called,
                    "epochs",
                    "Weights at the end of each epoch of the pre-pass",
                    "No autoencoder has seen these; it was fitted to weights from between them. What it decodes lies "
                    "near an average of those, which often classifies better than single ones. Without the first "
                    f"{FIRST_EPOCHS} epochs.",
                ),
                kept_table(
                    left,
                    called,
                    "rounds",
                    "Weights of a federation, with the decoder as it was",
                    "Of one of two collaborators, from the same first weights on; nothing that is decoded goes back "
                    "into the training.",
                ),
                time_table(spent, called),
            ],
        ),
        Section("Figures", [], figures(followed, called)),
        Section(
            "A federation of colour and greyscale", [], colour_figures(coloured, tasks, called)
        ),
        Section("When it pays", [], savings_figures(spent, called)),
        Section(
            "What reaches the accuracy with the fewest bytes",
            [],
            [
                *verdict_tables(needed, called),
                *within_tables(equal, called),
                *verdict_figures(sent, called),
            ],
        ),
        Section("What differs from the paper, and why", DIFFERENCES),
    ]
    introduction = [
        "Updates as the latents of an autoencoder whose decoder the server holds: the study of Chandar et al., "
        '"Communication Optimization in Large Scale Federated Learning using Autoencoder Compressed Weight Updates", '
        "with the decoder and every byte counted.",
        *([note] if note else []),
    ]

    def write(draft: Path) -> None:
        write_page(
            draft / "autoencoder.html",
            "Updates through an autoencoder",
            introduction,
            [section for section in sections if section.parts or section.paragraphs],
            {"settings": about, **provenance()},
        )
        for name, rows in (
            ("costs", spent),
            ("kept", left),
            ("verdicts", needed),
            ("within", equal),
        ):
            if rows:
                write_csv(draft / f"{name}.csv", [asdict(row) for row in rows])
        write_json(
            draft / "autoencoder.json", {"settings": about, **provenance(), "cells": results}
        )

    return write_files(folder, write)
