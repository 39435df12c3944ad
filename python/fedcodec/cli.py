"""The command line: ``fedcodec simulate | study | bench | compress | decompress | inspect | info``."""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fedcodec as fc

from .bench.data import DISTRIBUTIONS
from .sim.links import LINKS
from .sim.settings import DATASETS, DEFAULT_CODECS, ENGINES, MODELS, Settings

if TYPE_CHECKING:
    from .sim.cells import Planned

try:
    import click
except ModuleNotFoundError:
    sys.exit("the fedcodec command needs click: pip install 'fedcodec[cli]'")

TORCH_SUFFIXES = (".pt", ".pth")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
LONGEST_ZIP_NAME = 0xFFFF
LONGEST_MESSAGE = 500

in_file = click.Path(exists=True, dir_okay=False, path_type=Path)
out_file = click.Path(dir_okay=False, path_type=Path)


class Commands(click.Group):
    """Turns the errors that a user can cause into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"this needs {error.name}, which is not installed: pip install 'fedcodec[sim]' brings it"
            ) from error
        except BrokenPipeError:  # click ends quietly
            raise
        except (fc.FedcodecError, MemoryError, OSError, ValueError) as error:
            raise click.ClickException(one_line(str(error))) from error


def one_line(message: str) -> str:
    """Bring a message to one line, without the middle of a very long one."""
    line = " ".join(message.split())
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}"


@click.group(
    cls=Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.version_option(fc.__version__, prog_name="fedcodec")
def commands() -> None:
    """Compression for federated learning."""


def parse_codec(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Bring the text of one or several codecs to its standard form."""
    try:
        if isinstance(value, tuple):
            return tuple(str(fc.parse(text)) for text in value)
        return None if value is None else str(fc.parse(value))
    except ValueError as error:
        raise click.BadParameter(one_line(str(error))) from error


def parse_widths(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read "128,64"."""
    try:
        widths = tuple(int(width) for width in value.split(",")) if value else ()
    except ValueError:
        widths = (0,)
    if any(width < 1 for width in widths):
        raise click.BadParameter(one_line(f"{value!r} is not a list of widths such as 128,64"))
    return widths


@commands.command()
@click.option("--dataset", type=click.Choice(DATASETS), default=Settings.dataset)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the IDX files; else $FEDCODEC_DATA_DIR/<dataset>, then /usr/share/datasets/<dataset>.",
)
@click.option("--model", type=click.Choice(MODELS), default=Settings.model)
@click.option(
    "--hidden",
    callback=parse_widths,
    default=",".join(map(str, Settings.hidden)),
    help="Widths of the fully connected hidden layers.",
)
@click.option("--clients", type=click.IntRange(1), default=Settings.clients)
@click.option("--clients-per-round", type=click.IntRange(1), default=Settings.clients_per_round)
@click.option(
    "--dirichlet", type=float, default=Settings.dirichlet, help="Concentration of the label skew."
)
@click.option("--iid", is_flag=True, help="Share the samples out at random instead.")
@click.option("--local-epochs", type=click.IntRange(1), default=Settings.local_epochs)
@click.option("--batch-size", type=click.IntRange(1), default=Settings.batch_size)
@click.option("--learning-rate", type=float, default=Settings.learning_rate)
@click.option("--momentum", type=float, default=Settings.momentum)
@click.option("--rounds", type=click.IntRange(1), default=Settings.rounds)
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    callback=parse_codec,
    default=DEFAULT_CODECS,
    help="Uplink codec; repeat it to compare several.",
)
@click.option("--error-feedback/--no-error-feedback", default=Settings.error_feedback)
@click.option(
    "--downlink",
    callback=parse_codec,
    default=Settings.downlink,
    help="Codec of the server's weights.",
)
@click.option(
    "--downlink-delta",
    callback=parse_codec,
    help="Send the change of the weights by this codec instead; clients that missed rounds catch up.",
)
@click.option(
    "--link",
    default=Settings.link,
    help=f"One of {', '.join(LINKS)}, or UPLINK,DOWNLINK,LATENCY in Mbit/s, Mbit/s and ms.",
)
@click.option("--seeds", type=click.IntRange(1), default=1, help="Number of runs of each codec.")
@click.option("--first-seed", type=click.IntRange(0, 2**32), default=0)
@click.option(
    "--average-last",
    type=click.IntRange(1),
    help=f"Rounds whose mean accuracy is the result.  [default: {Settings.average_last}, or all if fewer]",
)
@click.option("--evaluate-every", type=click.IntRange(1), default=Settings.evaluate_every)
@click.option("--device", default=Settings.device, help="Of torch.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=Settings.engine,
    help="What runs the clients: a loop, or Flower's simulation (needs flwr[simulation]); accuracy is the same.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=lambda: os.cpu_count() or 1,
    help="Runs in parallel, of the built-in engine.  [default: all CPUs]",
    show_default=False,
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fedcodec-results"),
    help="Folder of the JSON, CSV and PNG files.",
)
def simulate(
    codecs: tuple[str, ...],
    seeds: int,
    first_seed: int,
    jobs: int,
    output: Path,
    iid: bool,
    average_last: int | None,
    **options: Any,
) -> None:
    """Train by federated averaging with each codec, and compare accuracy and bytes.

    Runs of different codecs share initial weights, partition, sampling and batches. Every payload's real length is
    counted; what travels up is the change of the weights. For example, a study on Fashion-MNIST:

    \b
    fedcodec simulate --dataset fashion-mnist --data-dir DIR --clients 100
      --batch-size 32 --rounds 300 --seeds 5
      --codec raw --codec "topk(0.05) | ternary" --codec "topk(0.01) | int8"
    """  # noqa: D301
    if iid:
        options["dirichlet"] = None
    rounds = options["rounds"]
    try:
        settings = Settings(
            average_last=average_last or min(Settings.average_last, rounds), **options
        )
    except ValueError as error:
        raise click.UsageError(one_line(str(error))) from error

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .sim.report import summarise, tables, write_report
    from .sim.study import check_study, run_study

    run_seeds = range(first_seed, first_seed + seeds)
    check_study(settings, codecs, run_seeds)
    output.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {codec: progress.add_task(codec, total=rounds * seeds) for codec in codecs}
        runs = run_study(
            settings,
            codecs,
            run_seeds,
            min(jobs, len(codecs) * seeds),
            on_round=lambda codec, seed: progress.advance(bars[codec]),
        )
    summaries = summarise(settings, runs)
    # A file or a pipe has no width of its own; the tables need this much.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables(settings, summaries):
        console.print(table)
    for path in write_report(output, settings, runs, summaries):
        click.echo(f"wrote {click.format_filename(path)}")


def parse_pattern(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}") from error
    return value


@commands.group()
def study() -> None:
    """Reproduce the comparative studies of the papers, each in one command.

    What is done stays done: a study that was stopped goes on where it was, in the same folder.
    """


def parse_note(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse what no page can hold, before anything is run."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter(f"no text: {error}") from error
    return value


def study_options(
    folder: str, seeds: int | None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what all studies can be told; without a number of seeds, of one."""
    a_seed = click.IntRange(0, 2**32)
    several = (
        click.option("--first-seed", type=a_seed, default=0),
        click.option("--seeds", type=click.IntRange(1, 1000), default=seeds),
    )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--output",
                type=click.Path(file_okay=False, path_type=Path),
                help="Folder of the HTML, CSV and JSON files, and of what is done.  "
                f"[default: fedcodec-results/{folder}, with --quick {folder}-quick]",
            ),
            click.option(
                "--jobs",
                type=click.IntRange(1),
                default=lambda: os.cpu_count() or 1,
                help="Runs in parallel.  [default: all CPUs]",
                show_default=False,
            ),
            click.option(
                "--quick",
                is_flag=True,
                help="A try in a minute, of one seed and few rounds, on the small digits of scikit-learn.",
            ),
            click.option(
                "--note",
                default="",
                callback=parse_note,
                help="A line for the page, such as whose data it was.",
            ),
            *(several if seeds else [click.option("--seed", type=a_seed, default=0)]),
            click.option(
                "--data-dir",
                type=click.Path(exists=True, file_okay=False, path_type=Path),
                help="Folder of the data sets' folders, such as mnist/ and cifar10/, or of the files of the only one; "
                "else $FEDCODEC_DATA_DIR, then /usr/share/datasets.",
            ),
        ):
            command = option(command)

        @wraps(command)
        def placed(*, output: Path | None, quick: bool, **options: Any) -> None:
            output = output or Path("fedcodec-results") / (f"{folder}-quick" if quick else folder)
            output.mkdir(parents=True, exist_ok=True)
            command(output=output, quick=quick, **options)

        return placed

    return add


def run_kept(
    output: Path,
    cells: Mapping[str, Planned],
    data_dir: Path | None,
    jobs: int,
    pattern: str = "",
) -> dict[str, Any]:
    """Run those cells of a study whose names match and that are not done; return the results of all that are.

    A result is of its settings, of the data and the software that it was made with, and of the processor.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .sim.cells import Kept, run_cells
    from .sim.data import dataset_digest
    from .sim.provenance import provenance

    chosen = [name for name in cells if re.search(pattern, name)]
    if not chosen:
        known = ", ".join(cells)
        raise click.UsageError(f"no cell has a name with {pattern!r} in it; they are {known}")
    made_by = provenance()
    made_by["machine"] = made_by["machine"]["processor"]
    needed = {cells[name].dataset for name in chosen}
    kept = {}
    for dataset in dict.fromkeys(cell.dataset for cell in cells.values()):
        try:
            data = dataset_digest(dataset, data_dir)
        except FileNotFoundError:
            if dataset in needed:
                raise
            continue
        for name, cell in cells.items():
            if cell.dataset == dataset:
                kept[name] = Kept(output / "cells", {**cell.about, **made_by, "data": data})
    results = {name: place.get(name) for name, place in kept.items()}
    missing = [name for name in chosen if results[name] is None]
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )

    def keep(number: int, result: Any) -> None:
        name = missing[number]
        kept[name].put(name, result)
        results[name] = result

    with Progress(*columns, console=Console(stderr=True)) as progress:
        total, left = (sum(cells[name].steps for name in names) for names in (chosen, missing))
        bar = progress.add_task("rounds", total=total, completed=total - left)
        run_cells(
            [cells[name].run for name in missing],
            max(1, min(jobs, len(missing))),
            on_step=lambda number: progress.advance(bar),
            on_end=keep,
        )
    return {name: results[name] for name in cells if results.get(name) is not None}


@study.command()
@study_options("cascade", seeds=5)
@click.option("--rounds", type=click.IntRange(1), default=20)
@click.option(
    "--link",
    default=Settings.link,
    help=f"One of {', '.join(LINKS)}, or UPLINK,DOWNLINK,LATENCY in Mbit/s, Mbit/s and ms.",
)
def cascade(
    data_dir: Path | None,
    seeds: int,
    first_seed: int,
    note: str,
    quick: bool,
    jobs: int,
    output: Path,
    rounds: int,
    link: str,
) -> None:
    """Pruning, quantization and distillation, alone and together (Yan).

    Three models on thirds of Fashion-MNIST are averaged every round; the eight combinations of the three steps are
    compared by accuracy, delay and the bytes that travelled, beside the paper's figures.
    """
    from .sim.cascade import (
        COMBINATIONS,
        CascadeRun,
        CascadeSettings,
        inference_seconds,
        study_cells,
    )
    from .sim.cascade_report import write_report
    from .sim.links import parse_link

    parse_link(link)
    settings = CascadeSettings(data_dir=data_dir, rounds=rounds, link=link)
    if quick:
        settings, seeds = CascadeSettings(dataset="digits", rounds=min(rounds, 5), link=link), 1
    run_seeds = range(first_seed, first_seed + seeds)
    results = run_kept(output, study_cells(settings, run_seeds), data_dir, jobs)
    runs = {
        combination.name: [
            CascadeRun(**results[f"{combination.slug}-{seed}"]) for seed in run_seeds
        ]
        for combination in COMBINATIONS
    }
    inference = inference_seconds(settings)
    for path in write_report(output, settings, run_seeds, runs, inference, note):
        click.echo(f"wrote {click.format_filename(path)}")


data_names = click.option(
    "--data-name",
    "names",
    type=(click.Choice(DATASETS), str),
    multiple=True,
    help="What the page calls a data set that is not the usual one: --data-name cifar10 'CIFAR-10 (JPEG)'.",
)


@study.command()
@study_options("pruning", seeds=3)
@click.option("--rounds", type=click.IntRange(1), default=25)
@click.option(
    "--device",
    default="cpu",
    help="Of torch; on a GPU all of ResNet-12 is trained too.",
)
@click.option(
    "--cells",
    "pattern",
    default="",
    callback=parse_pattern,
    help="Run only those whose name this regular expression finds, as in 'simple-cnn-mnist-unstructured-80'.",
)
@data_names
def pruning(
    data_dir: Path | None,
    seeds: int,
    first_seed: int,
    note: str,
    quick: bool,
    jobs: int,
    output: Path,
    rounds: int,
    device: str,
    pattern: str,
    names: tuple[tuple[str, str], ...],
) -> None:
    """Structured and unstructured pruning of what clients send (Jeurkar et al.).

    SimpleCNN and ResNet-12 on MNIST and CIFAR-10, 2 of 100 clients a round, 0 to 90 % pruned: accuracy, rounds and the
    bytes that travelled, beside the paper's figures. What is not trained yet is left out of the page.
    """
    from .sim.federation import require_device
    from .sim.uplink_pruning import PAPER_SETTINGS, study_cells
    from .sim.uplink_pruning_report import write_report

    run_seeds = range(first_seed, first_seed + (1 if quick else seeds))
    settings = replace(
        PAPER_SETTINGS,
        data_dir=data_dir,
        device=device,
        clients=10 if quick else PAPER_SETTINGS.clients,
        rounds=min(rounds, 5) if quick else rounds,
        average_last=1,
    )
    require_device(device)
    cells = study_cells(settings, run_seeds, quick=quick)
    results = run_kept(output, cells, data_dir, jobs, pattern)
    for path in write_report(output, settings, run_seeds, results, note, dict(names)):
        click.echo(f"wrote {click.format_filename(path)}")


@study.command()
@study_options("autoencoder", seeds=None)
@click.option(
    "--device",
    default="cpu",
    help="Of torch; on a GPU with all of CIFAR-10.",
)
@click.option(
    "--cells",
    "pattern",
    default="",
    callback=parse_pattern,
    help="Run only those whose name this regular expression finds, as in 'mnist' or '-compare$'.",
)
@data_names
def autoencoder(
    data_dir: Path | None,
    seed: int,
    note: str,
    quick: bool,
    jobs: int,
    output: Path,
    device: str,
    pattern: str,
    names: tuple[tuple[str, str], ...],
) -> None:
    """Updates as the latents of an autoencoder, its decoder counted (Chandar et al.).

    Classifiers of MNIST and CIFAR-10: what is left of their accuracy after decoding, at epochs that the autoencoder has
    not seen and in a federation with the decoder as it was; and what a federation sends in all until it is as accurate
    as one without compression, beside principal components and other codecs.
    """
    from .sim.autoencoder import QUICK_TASKS, SMALL_TASKS, TASKS, study_cells
    from .sim.autoencoder_report import write_report
    from .sim.federation import require_device

    tasks = QUICK_TASKS if quick else SMALL_TASKS if device.startswith("cpu") else TASKS
    require_device(device)
    cells = study_cells(tasks, seed, data_dir, device)
    results = run_kept(output, cells, data_dir, jobs, pattern)
    for path in write_report(output, tasks, seed, results, device, note, dict(names)):
        click.echo(f"wrote {click.format_filename(path)}")


def parse_sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read "64K,1M,25.6M"."""
    factors = {"K": 1_000, "M": 1_000_000}
    try:
        sizes = tuple(
            round(float(size.rstrip("KM")) * factors.get(size[-1:], 1)) for size in value.split(",")
        )
    except (ValueError, OverflowError):
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise click.BadParameter(f"{value!r} is not a list of sizes such as 64K,1M,25.6M")
    return sizes


@commands.command()
@click.option(
    "--sizes", callback=parse_sizes, default="64K,1M,25.6M", help="Numbers of float32 values."
)
@click.option(
    "--distribution",
    "distributions",
    multiple=True,
    type=click.Choice(DISTRIBUTIONS),
    default=DISTRIBUTIONS,
    help="Of the values; repeat it for several. Other libraries are measured on the first.",
)
@click.option(
    "--rows", "pattern", callback=parse_pattern, default="", help="Regular expression of names."
)
@click.option("--rounds", type=click.IntRange(1), default=7)
@click.option("--peers/--no-peers", default=True, help="Measure other libraries too.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=2,
    help="Run all on so many threads beside one, at most on as many as there are processors.",
)
@click.option(
    "--isa",
    help="Run all on this instruction set beside the one in use.  [default: avx2 beside avx512]",
)
@click.option("--quick", is_flag=True, help="One round of 64K Student-t values.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Of the updates: on a GPU whole calls are measured, beside a copy there and the way by the host.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fedcodec-results"),
    help="Folder of the JSON, Markdown and PNG files.",
)
def bench(
    sizes: tuple[int, ...],
    distributions: tuple[str, ...],
    pattern: str,
    rounds: int,
    peers: bool,
    threads: int,
    isa: str | None,
    quick: bool,
    device: str,
    output: Path,
) -> None:
    """Measure kernels and whole calls beside their roofs and beside other libraries, on one thread.

    A roof is the best pass that reads and writes the same bytes and does nothing else. What is measured is first
    checked against the NumPy reference.
    """
    from .bench.report import write_report
    from .bench.suite import run

    if quick:
        sizes, distributions, rounds = (64_000,), ("student-t",), 1

    def on_row(name: str) -> None:
        click.echo(name, err=True)

    if device == "cuda":
        from .bench import gpu

        report = gpu.run(gpu.TorchGpu(), sizes, distributions, pattern, rounds, peers, on_row)
    else:
        report = run(sizes, distributions, pattern, rounds, peers, threads, isa, on_row)
    for name, reason in report["skipped"].items():
        click.echo(f"not measured: {name}: {reason}", err=True)
    for path in write_report(output, report):
        click.echo(f"wrote {path}")


@commands.command()
@click.argument("source", metavar="IN", type=in_file)
@click.argument("target", metavar="OUT", type=out_file)
@click.option("--codec", required=True, callback=parse_codec, help='Such as "topk(0.01) | int8".')
def compress(source: Path, target: Path, codec: str) -> None:
    """Compress the tensors of IN (.safetensors, .npz, .pt or .pth) into the payload OUT."""
    check_different(source, target)
    update = read_update(source)
    try:
        payload = fc.parse(codec).encode(update)
    except (TypeError, fc.NonFiniteError) as error:  # what has no place in a payload
        raise ValueError(f"{source}: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: {error.object!r} is not Unicode text") from error
    with write_atomically(target) as unfinished:
        unfinished.write_bytes(payload)
    size = fc.Spec.of(update).nbytes
    click.echo(f"{size:,} bytes of tensors to {len(payload):,}: {size / len(payload):.2f}x")


@commands.command()
@click.argument("source", metavar="IN", type=in_file)
@click.argument("target", metavar="OUT", type=out_file)
@click.option(
    "--max-bytes",
    type=click.IntRange(0),
    default=fc.Limits().max_bytes,
    help="Of all tensors together.",
)
def decompress(source: Path, target: Path, max_bytes: int) -> None:
    """Restore the tensors of the payload IN into OUT (.safetensors, .npz, .pt or .pth)."""
    check_different(source, target)
    write = writer(target)
    payload = source.read_bytes()
    limits = fc.Limits(max_bytes=max_bytes, max_tensors=len(payload))
    spec = fc.inspect(payload, limits=limits).spec
    if spec is None:
        raise ValueError(f"{source} leaves names and shapes to its receiver (framing by reference)")
    check_names(dict.fromkeys(tensor.name for tensor in spec.tensors), target)
    bfloat16 = any(tensor.dtype == "bfloat16" for tensor in spec.tensors)
    if bfloat16 and suffix(target) == ".npz":
        raise ValueError("bfloat16 tensors do not fit into .npz; use .safetensors, .pt or .pth")
    framework = "torch" if bfloat16 or suffix(target) in TORCH_SUFFIXES else "numpy"
    restored = fc.decode(payload, framework=framework, limits=limits)
    if spec.structure != "dict":
        tensors = restored if spec.structure == "list" else [restored]
        restored = {tensor.name: array for tensor, array in zip(spec.tensors, tensors, strict=True)}
    with write_atomically(target) as unfinished:
        write(restored, unfinished)
    click.echo(f"{len(spec.tensors):,} tensors, {spec.nbytes:,} bytes")


@commands.command()
@click.argument("file", type=in_file)
def inspect(file: Path) -> None:
    """Say what the header of a payload says; the values are not looked at."""
    payload = file.read_bytes()
    info = fc.inspect(payload, limits=fc.Limits(max_tensors=len(payload)))
    lines = {
        "format version": str(info.version),
        "framing": info.framing,
        "spec digest": info.spec_digest.hex(),
        "base digest": info.base.hex() if info.base else "none",
        "rules digest": info.table_digest.hex() if info.table_digest else "none",
        "codec": info.codec.replace("\n", "; ") if info.codec else "named by the rules digest",
        "payload": f"{info.nbytes:,} bytes, of which {info.body_nbytes:,} are body",
    }
    if info.spec is not None:
        ratio = info.spec.nbytes / info.nbytes
        lines["uncompressed"] = f"{info.spec.nbytes:,} bytes, {ratio:.2f}x the payload"
        lines["structure"] = f"{info.spec.structure} of {len(info.spec.tensors):,} tensors"
    for heading, text in lines.items():
        click.echo(f"{heading:15} {text}")
    tensors = info.spec.tensors if info.spec else ()
    for tensor in tensors:
        tied = "" if tensor.tied_to is None else f", the memory of {tensors[tensor.tied_to].name!r}"
        click.echo(f"  {tensor.name!r}  {tensor.dtype} {tensor.shape}{tied}")


@commands.command()
def info() -> None:
    """Print versions, instruction sets and the state of CUDA."""
    for heading, value in fc.info().items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        click.echo(f"{heading.replace('_', ' '):17} {value}")


def read_update(path: Path) -> dict[str, Any]:
    """Read named tensors from a file, by its extension; nothing in it is executed.

    Raises
    ------
    ValueError
        If the extension is unknown, or the file is damaged or holds something else.
    """
    check_suffix(path)
    try:
        if suffix(path) == ".npz":
            return read_npz(path)
        if suffix(path) == ".safetensors":
            return read_safetensors(path)
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each library has its own for a damaged file
        raise ValueError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a state dict: it holds a {type(state).__name__}")
    nested = [repr(name) for name, value in state.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{path} is not a state dict but holds dicts under {', '.join(nested)}: "
            "save the one with the tensors by itself"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path} is not a state dict: under {name!r} it holds a {type(value).__name__}, "
                "where names and tensors belong"
            )
    return dict(state)


def reason(error: Exception) -> str:
    """Say in a line why a library could not read or write a file."""
    text = str(error)
    # The libraries tell how to load such a file all the same, which would run what is in it.
    if "allow_pickle" in text or "weights_only" in text:
        return "it holds Python objects other than arrays, or is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the name of a temporary file
    return next(iter(text.splitlines()), "") or type(error).__name__


def read_npz(path: Path) -> dict[str, Any]:
    """Read the arrays of an .npz file; unlike ``numpy.load``, without mistaking "x.npy" for "x"."""
    update: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name in update:
                raise ValueError(f"two arrays are named {name!r}")
            with archive.open(member) as file:
                update[name] = np.lib.format.read_array(file, allow_pickle=False)
    return update


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file as NumPy arrays, or as torch tensors where it holds bfloat16."""
    from safetensors import numpy, safe_open

    with safe_open(path, framework="numpy") as file:
        bfloat16 = any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())  # noqa: SIM118
    if not bfloat16:
        return dict(numpy.load_file(path))
    from safetensors import torch

    return dict(torch.load_file(path))


def writer(path: Path) -> Callable[[dict[str, Any], Path], None]:
    """Return the function that writes named tensors in the format of a path's extension."""
    check_suffix(path)
    if suffix(path) == ".npz":
        return write_npz
    return write_safetensors if suffix(path) == ".safetensors" else write_torch


def write_npz(update: dict[str, Any], path: Path) -> None:
    """Write an .npz file; unlike ``numpy.savez``, with any names that `check_names` lets pass."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in update.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_safetensors(update: dict[str, Any], path: Path) -> None:
    """Write a .safetensors file of NumPy arrays or torch tensors; tied ones are written twice, as the format asks."""
    if all(isinstance(array, np.ndarray) for array in update.values()):
        from safetensors import numpy

        numpy.save_file(update, path)
    else:
        from safetensors import torch

        torch.save_file({name: tensor.clone() for name, tensor in update.items()}, path)


def write_torch(update: dict[str, Any], path: Path) -> None:
    """Write a torch state dict."""
    import torch

    torch.save(update, path)


def suffix(path: Path) -> str:
    """Return the extension of a path in lower case."""
    return path.suffix.lower()


def check_suffix(path: Path) -> None:
    """Refuse a path whose extension names no format."""
    if suffix(path) not in SUFFIXES:
        raise click.UsageError(f"{path}: the extension must be one of {', '.join(SUFFIXES)}")


def check_names(names: Collection[str], path: Path) -> None:
    """Refuse names that a file of a path's extension would not give back, or that lead out of it."""
    for name in names:
        fault = None
        if suffix(path) == ".safetensors" and name == "__metadata__":
            fault = "the format keeps this name for itself"
        if suffix(path) == ".npz":
            if "\0" in name:
                fault = "it has a NUL"
            elif name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
                fault = "it is a path that leads out of the archive"
            elif len(f"{name}.npy".encode()) > LONGEST_ZIP_NAME:
                fault = f"{len(name.encode()):,} bytes are too many"
            elif f"{name}.npy" in names:
                fault = f"numpy.load would return its values for {name + '.npy'!r} too"
        if fault is not None:
            raise ValueError(
                f"tensor {name!r} does not fit into {suffix(path)}: {fault}; use .pt or .pth"
            )


def check_different(source: Path, target: Path) -> None:
    """Refuse to replace the input, which a lossy codec would destroy, and what is no regular file."""
    if target.exists() and target.samefile(source):
        raise click.UsageError(f"{target} is the input too")
    if target.exists() and not target.is_file():
        raise click.UsageError(f"{target} is not a regular file")


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a path to write to, and put it in place of ``path``, or of what that links to, if all went well."""
    target = Path(os.path.realpath(path))
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~umask
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fedcodec-") as folder:
            unfinished = Path(folder) / target.name
            yield unfinished
            unfinished.chmod(mode)
            os.replace(unfinished, target)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"cannot write {path}: {reason(error)}") from error


def main() -> None:
    """Run the command line."""
    # As an exception it lets `with` and `finally` tidy up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    commands(prog_name="fedcodec")


if __name__ == "__main__":
    main()
