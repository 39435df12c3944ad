"""What a run showed: JSON, a Markdown table and a bar chart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .suite import Record


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
        f"{run['machine']}, {run['info']['active']}, one thread, {run['date']}; medians of {run['rounds']} rounds. "
        "R is a pass that reads the float32 values, M a copy of them by NumPy.",
    ]
    for heading, found in _groups(run):
        lines += ["", f"### {heading}", "", _header()]
        lines += [_line(row) for row in found]
    if run["memory"]:
        lines += ["", "### Peak memory", "", "| what | values | beyond the start | payload |"]
        lines.append("| --- | ---: | ---: | ---: |")
    for row in run["memory"]:
        sizes = f"{row['values']:,} | {row['extra_bytes']:,} B | {row['payload_bytes']:,} B"
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


def _header() -> str:
    return (
        "| what | time | roof | time/roof | time/R | time/M | others: their time over ours |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    )


def _line(row: Record) -> str:
    others = ", ".join(f"{name} {ratio:.2g}x" for name, ratio in row["peer_over_ours"].items())
    roof = row["roof_seconds"]
    cells = [
        row["name"],
        _time(row["seconds"]),
        "" if roof is None else _time(roof),
        "" if roof is None else f"{row['over_roof']:.2f}",
        f"{row['over_read']:.2f}",
        f"{row['over_copy']:.2f}",
        others,
    ]
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def draw(path: Path, run: Record) -> None:
    """Draw each row's share of the roof, ours and others', at the largest size of the first distribution."""
    from matplotlib.figure import Figure

    drawn = [row for row in run["rows"] if row["kind"] != "layout" and row["roof_seconds"]]
    if drawn:
        most = max(row["values"] for row in drawn)
        first = drawn[0]["distribution"]
        drawn = [row for row in drawn if row["values"] == most and row["distribution"] == first]
    bars = list(_bars(drawn))
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    shares = [share for _, share, _ in bars]
    colours = ["#d1495b" if ours else "#b8c0c8" for _, _, ours in bars]
    drawn_bars = axes.barh(range(len(bars)), shares, color=colours)
    axes.bar_label(
        drawn_bars,
        [f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" for share in shares],
        padding=2,
        fontsize=7,
    )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, max([1.1, *(1.1 * share for share in shares)]))
    axes.set_xlabel("share of the roof: the time of the bare memory traffic over the time taken")
    title = f"{drawn[0]['values']:,} values, {drawn[0]['distribution']}" if drawn else "no rows"
    axes.set_title(f"{title}: fedcodec in red, others in grey\n{run['machine']}", fontsize=9)
    figure.savefig(path, dpi=120)


def _bars(drawn: list[Record]) -> Iterator[tuple[str, float, bool]]:
    for row in drawn:
        yield row["name"], row["roof_seconds"] / row["seconds"], True
        for name, seconds in row["peer_seconds"].items():
            yield name, row["roof_seconds"] / seconds, False
