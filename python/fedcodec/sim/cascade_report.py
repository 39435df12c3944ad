"""What the study of Yan showed, beside the paper's own figures: a page, CSV and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

from .cascade import COMBINATIONS, CascadeRun, CascadeSettings, dense_bytes, transfer_seconds
from .drawings import curves
from .files import write_csv, write_files, write_json
from .page import COLOURS, STYLE, Figure, Section, Table, write_page
from .provenance import provenance


@dataclass(frozen=True)
class Published:
    """One row of Yan's table 5; the paper does not say in what unit the delay is."""

    accuracy: float
    loss: float
    delay: float
    ratio: float


PUBLISHED = dict(
    zip(
        (combination.name for combination in COMBINATIONS),
        (
            Published(93.84, 2.76, 4.21, 1.00),
            Published(90.77, 4.59, 3.82, 0.86),
            Published(91.06, 4.88, 3.97, 0.25),
            Published(88.65, 2.81, 4.06, 0.45),
            Published(92.21, 5.69, 3.05, 0.25),
            Published(90.84, 3.29, 3.23, 0.45),
            Published(90.91, 3.32, 4.05, 0.11),
            Published(91.77, 4.17, 3.06, 0.11),
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class Row:
    """One combination over all seeds: means, and sample standard deviations where a name ends so.

    Attributes
    ----------
    accuracy, train_accuracy, loss, train_loss, server_accuracy
        After the last round; see `CascadeRun`.
    difference, difference_deviation : float or None
        Of the accuracy to that of no compression, seed by seed.
    payload_bytes, ratio : float
        What one model sends a round, and its share of SimpleNN's float32 weights.
    inference_milliseconds, encode_milliseconds, decode_milliseconds : float
        Measured: one image, one payload.
    transfer_milliseconds : float
        Simulated.
    delay_milliseconds : float
        Of all four together.
    """

    name: str
    seeds: int
    parameters: int
    accuracy: float
    accuracy_deviation: float | None
    difference: float | None
    difference_deviation: float | None
    server_accuracy: float
    train_accuracy: float
    train_accuracy_deviation: float | None
    loss: float
    train_loss: float
    payload_bytes: float
    ratio: float
    inference_milliseconds: float
    encode_milliseconds: float
    transfer_milliseconds: float
    decode_milliseconds: float
    delay_milliseconds: float
    paper_accuracy: float
    paper_loss: float
    paper_delay: float
    paper_ratio: float


Runs = Mapping[str, Sequence[CascadeRun]]


def summarise(settings: CascadeSettings, runs: Runs, inference: Mapping[str, float]) -> list[Row]:
    """Summarise the runs of each combination, by its name and in the order of the seeds."""
    whole, baseline = dense_bytes(settings), [run.accuracy[-1] for run in runs["none"]]
    return [_row(settings, name, of, baseline, whole, inference[name]) for name, of in runs.items()]


def _row(
    settings: CascadeSettings,
    name: str,
    runs: Sequence[CascadeRun],
    baseline: Sequence[float],
    whole: int,
    inference: float,
) -> Row:
    accuracy = [run.accuracy[-1] for run in runs]
    train = [run.train_accuracy[-1] for run in runs]
    differences = [own - other for own, other in zip(accuracy, baseline, strict=True)]
    payload = fmean(fmean(run.payload_bytes) for run in runs)
    times = {
        "inference_milliseconds": 1e3 * inference,
        "encode_milliseconds": 1e3 * median(s for run in runs for s in run.encode_seconds),
        "transfer_milliseconds": 1e3 * transfer_seconds(settings, payload),
        "decode_milliseconds": 1e3 * median(s for run in runs for s in run.decode_seconds),
    }
    published = PUBLISHED[name]
    return Row(
        name=name,
        seeds=len(runs),
        parameters=runs[0].parameters,
        accuracy=fmean(accuracy),
        accuracy_deviation=_deviation(accuracy),
        difference=None if name == "none" else fmean(differences),
        difference_deviation=None if name == "none" else _deviation(differences),
        server_accuracy=fmean(run.server_accuracy[-1] for run in runs),
        train_accuracy=fmean(train),
        train_accuracy_deviation=_deviation(train),
        loss=fmean(run.loss[-1] for run in runs),
        train_loss=fmean(run.train_loss[-1] for run in runs),
        payload_bytes=payload,
        ratio=payload / whole,
        **times,
        delay_milliseconds=sum(times.values()),
        paper_accuracy=published.accuracy / 100,
        paper_loss=published.loss,
        paper_delay=published.delay,
        paper_ratio=published.ratio,
    )


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _percent(value: float | None, deviation: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    text = format(100 * value, f"{sign}.2f")
    return text if deviation is None else f"{text} ± {100 * deviation:.2f}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return what is compared with the paper's table 5."""
    accuracy, loss = "test accuracy, %", "test loss"
    return [
        Table(
            "Accuracy after the last round",
            [
                "model",
                (accuracy, "ours"),
                (accuracy, "paper"),
                "to none, points",
                "train accuracy, %",
                "server's average, test accuracy, %",
                (loss, "ours"),
                (loss, "paper"),
                "train loss",
            ],
            [
                [
                    row.name,
                    _percent(row.accuracy, row.accuracy_deviation),
                    _percent(row.paper_accuracy, None),
                    _percent(row.difference, row.difference_deviation, "+"),
                    _percent(row.train_accuracy, row.train_accuracy_deviation),
                    _percent(row.server_accuracy, None),
                    f"{row.loss:.3f}",
                    f"{row.paper_loss:.2f}",
                    f"{row.train_loss:.3f}",
                ]
                for row in rows
            ],
            "Of the averaged model, pruned and quantized as it would be deployed; of the server's average before that, "
            "the test accuracy too. Mean ± sample standard deviation over the seeds; differences seed by seed.",
        ),
        Table(
            "What travels, a model and round",
            [
                "model",
                "weights",
                "bytes",
                ("transmission ratio", "ours"),
                ("transmission ratio", "paper"),
            ],
            [
                [
                    row.name,
                    f"{row.parameters:,}",
                    f"{row.payload_bytes:,.0f}",
                    f"{row.ratio:.4f}",
                    f"{row.paper_ratio:.2f}",
                ]
                for row in rows
            ],
            "Bytes are the length of the payloads that were decoded, over those of SimpleNN's float32 weights: "
            "positions, scales, header and checksum are counted.",
        ),
        Table(
            "Delay of one image and one payload, milliseconds",
            ["model", "inference", "encode", "transfer", "decode", "together", "paper, no unit"],
            [
                [
                    row.name,
                    f"{row.inference_milliseconds:.3f}",
                    f"{row.encode_milliseconds:.2f}",
                    f"{row.transfer_milliseconds:.1f}",
                    f"{row.decode_milliseconds:.2f}",
                    f"{row.delay_milliseconds:.1f}",
                    f"{row.paper_delay:.2f}",
                ]
                for row in rows
            ],
            "Inference, encoding and decoding are medians measured on this machine; the transfer is simulated.",
        ),
    ]


def figures(runs: Runs, rows: Sequence[Row]) -> list[Figure]:
    """Draw the paper's figures 4 and 5."""
    accuracy = {
        name: 100 * np.mean([run.accuracy for run in of], axis=0) for name, of in runs.items()
    }
    loss = {name: np.mean([run.loss for run in of], axis=0) for name, of in runs.items()}
    mean = "On the test set, mean over the seeds (Yan, figure 4)."
    with rc_context(STYLE):
        return [
            Figure("Accuracy by round", curves(accuracy, "round", "test accuracy, %"), mean),
            Figure("Loss by round", curves(loss, "round", "test loss"), mean),
            Figure(
                "Delay",
                _bars({"ours": [row.delay_milliseconds for row in rows]}, rows, "delay, ms"),
                "Of one image and one payload (Yan, figure 5; the paper's has no unit).",
            ),
            Figure(
                "Transmission ratio",
                _bars(
                    {
                        "ours": [row.ratio for row in rows],
                        "paper": [row.paper_ratio for row in rows],
                    },
                    rows,
                    "bytes over those of the float32 weights",
                ),
                "Yan, figure 5.",
            ),
        ]


def _bars(groups: Mapping[str, Sequence[float]], rows: Sequence[Row], label: str) -> Drawing:
    drawing = Drawing()
    axes = drawing.add_subplot()
    places, height = np.arange(len(rows)), 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        axes.barh(
            places + height * (number - (len(groups) - 1) / 2),
            values,
            height,
            label=name,
            color=COLOURS[number],
        )
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if len(groups) > 1:
        drawing.legend(loc="outside lower center", ncols=len(groups))
    return drawing


DIFFERENCES = (
    "The paper's baseline, 93.84 %, is more than such a network reaches on Fashion-MNIST's test set, which is 88 to "
    "90 %; whether it is of training samples the paper does not say. We report both, of the same models.",
    "The paper does not say how it counts the bytes of its transmission ratio, or in what unit its delay is. Ours is "
    "of payloads: what is not sent is not counted, and what is sent is, positions of the kept weights included.",
    "The paper's quantizer is 8 bits with a scale a tensor, by its equation 5 with 2^8 - 1 levels, which signed values "
    "do not fit in 8 bits with. Ours has 127 levels of either sign and a scale for each 1,024 weights.",
    "Where a student is distilled, the paper does not say what becomes of its teacher between rounds. Ours stays with "
    "its client, so its bytes do not count.",
    "Pruned weights are zeros in dense matrices, and int8 weights are dequantized before the inference: on this "
    "machine only the smaller student computes faster.",
)


def write_report(
    folder: Path,
    settings: CascadeSettings,
    seeds: Sequence[int],
    runs: Runs,
    inference: Mapping[str, float],
    note: str = "",
) -> list[Path]:
    """Write the page, the rows and the rounds; a file is there in full or as it was before.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    rows = summarise(settings, runs, inference)
    about = {"seeds": list(seeds), **asdict(settings)}
    about.pop("data_dir")
    sections = [
        Section("Results", [], tables(rows)),
        Section("Figures", [], figures(runs, rows)),
        Section("What differs from the paper, and why", DIFFERENCES),
    ]
    best = min(rows, key=lambda row: row.ratio)
    introduction = [
        f"Pruning, quantization and distillation, alone and together, in federated averaging of {settings.models} "
        f'models on {settings.dataset}: the study of Yan, "Optimizing Federated Learning '
        'Efficiency: A Comparative Analysis of Model Compression Techniques for Communication Reduction", every byte '
        "counted as it was sent.",
        f"The smallest payload, of {best.name!r}, is {best.ratio:.3f} of the uncompressed weights (paper: "
        f"{best.paper_ratio:.2f}), with {100 * best.accuracy:.2f} % test accuracy; without any "
        f"compression it is {100 * rows[0].accuracy:.2f} %.",
    ]
    if note:
        introduction.append(note)
    if settings.dataset != "fashion-mnist":
        introduction.append(
            f"The paper's figures are of Fashion-MNIST: beside {settings.dataset} they are no comparison."
        )

    def write(draft: Path) -> None:
        write_page(
            draft / "cascade.html",
            "Pruning, quantization and distillation, cascaded",
            introduction,
            sections,
            {"settings": about, **provenance()},
        )
        write_csv(draft / "rows.csv", [asdict(row) for row in rows])
        write_csv(draft / "rounds.csv", _rounds(seeds, runs))
        write_json(
            draft / "cascade.json",
            {
                "settings": about,
                **provenance(),
                "rows": [asdict(row) for row in rows],
                "runs": {name: [asdict(run) for run in of] for name, of in runs.items()},
            },
        )

    return write_files(folder, write)


def _rounds(seeds: Sequence[int], runs: Runs) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, of in runs.items():
        for seed, run in zip(seeds, of, strict=True):
            columns = {
                key: values for key, values in asdict(run).items() if isinstance(values, list)
            }
            rows += [
                {
                    "model": name,
                    "seed": seed,
                    "round": number,
                    **dict(zip(columns, values, strict=True)),
                }
                for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
            ]
    return rows
