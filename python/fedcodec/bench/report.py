"""What a run showed: JSON, a Markdown table and a bar chart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .suite import Record

HEADLINES = (
    "top-k 1 %",
    "int8 quantize",
    "int8 dequantize",
    "int8 decode and add",
    "mask: pack",
    "crc32",
    "encode topk(0.01) | int8",
    "encode topk(0.01) | ternary",
    "encode raw",
    "decode into arrays topk(0.01) | ternary",
)


def write_report(folder: Path, run: Record) -> list[Path]:
    """Write <date>-<machine>.json, .md and .png into the folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\(.*?\)", "", run["machine"].lower()))
    stem = f"{run['date']}-{machine.strip('-')}-{run['info']['active']}"
    paths = [folder / f"{stem}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(run), encoding="utf-8")
    draw(paths[2], run)
    return paths


def markdown(run: Record) -> str:
    """Return one table for each size and distribution, and one of memory."""
    lines = [
        f"{run['machine']}, {run['info']['active']}, {run['date']}; medians of {run['rounds']} rounds. {run['how']}",
    ]
    for heading, found in _groups(run):
        lines += ["", f"### {heading}", "", _header(run, found[0])]
        lines += [_line(run, row) for row in found]
    if run["memory"]:
        lines += [
            "",
            "### Peak memory",
            "",
            "| what | values | threads | beyond the start | payload |",
        ]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
    for row in run["memory"]:
        sizes = f"{row['values']:,} | {row['threads']} | {row['extra_bytes']:,} B | {row['payload_bytes']:,} B"
        lines.append(f"| {_cell(row['name'])} | {sizes} |")
    if run["skipped"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name}: {reason}" for name, reason in run["skipped"].items()]
    return "\n".join(lines) + "\n"


def _groups(run: Record) -> Iterator[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = {}
    for row in run["rows"]:
        layout = row["kind"] == "layout"
        heading = "Tensors" if layout else f"{row['values']:,} values, {row['distribution']}"
        groups.setdefault(heading, []).append(row)
    yield from groups.items()


def _header(run: Record, row: Record) -> str:
    cells = ["what", "time", "a second", "roof", "time/roof", "time/R", "time/M"]
    cells += [*_varied(run, row), "others: their time over ours"]
    return f"| {' | '.join(cells)} |\n| --- |{(len(cells) - 2) * ' ---: |'} --- |"


def _varied(run: Record, row: Record) -> dict[str, float]:
    """Return the columns of the variants by their headings: what threads gain, and what an instruction set costs."""
    over = {name: ratio for name, (_, ratio) in row["variants"].items()}
    threads, isa, columns = f"{run['threads']} threads", run["isa"], {}
    if threads in over:
        columns[f"time/{threads}"] = 1 / over[threads]
    if isa in over:
        columns[f"{isa}/time"] = over[isa]
    return columns


def _line(run: Record, row: Record) -> str:
    others = [f"{name} {_times(ratio)}" for name, (_, ratio) in row["peers"].items()]
    others += [f"({name} {_times(ratio)})" for name, (_, ratio) in row["beside"].items()]
    roof = row["roof_seconds"]
    bytes_moved = row["unit"] == "B"
    factor, unit = (1e9, "GB") if bytes_moved else (1e6, f"M {row['unit']}")
    cells = [
        row["name"],
        _time(row["seconds"]),
        "" if bytes_moved and roof is None else f"{row['per_second'] / factor:.3g} {unit}",
        "" if roof is None else _time(roof),
        "" if roof is None else f"{row['over_roof']:.2f}",
        f"{row['over_read']:.2f}",
        f"{row['over_copy']:.2f}",
        *(f"{ratio:.2f}" for ratio in _varied(run, row).values()),
        ", ".join(others),
    ]
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.2g}x"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def draw(path: Path, run: Record) -> None:
    """Draw the headlines' share of the roof, ours and others', at the largest size of the first distribution."""
    from matplotlib.figure import Figure

    found = [row for row in run["rows"] if row["roof_seconds"] and row["kind"] != "layout"]
    found = found or [row for row in run["rows"] if row["roof_seconds"]]
    found = [row for row in found if row["distribution"] == found[0]["distribution"]]
    most = max((row["values"] for row in found), default=0)
    found = [row for row in found if row["values"] == most]
    found = [row for row in found if row["name"] in HEADLINES] or found
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    heights, names, longest, at = [], [], 1.0, 0.0
    for row in found:
        heights.append(at)
        names.append(row["name"])
        bars = [("", 1.0), *((name, ratio) for name, (_, ratio) in row["peers"].items())]
        for name, over_ours in bars:
            share = 1 / (row["over_roof"] * over_ours)
            longest = max(longest, share)
            axes.barh(at, share, height=0.9, color="#b8c0c8" if name else "#c8324b")
            text = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
            axes.text(share, at, f" {text} {name}", va="center", fontsize=7)
            at += 1
        at += 0.7
    figure.set_size_inches(8, 1.5 + 0.16 * at)
    axes.set_yticks(heights, names, fontsize=8)
    axes.set_ylim(at, -1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.25 * longest)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share of the roof: time of the bare memory traffic / time taken")
    axes.set_title(f"{most:,} float32 values, {run['machine']}", fontsize=9)
    figure.savefig(path, dpi=120)
