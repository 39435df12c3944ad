"""The files of a report: all in place at the end, each in full or as it was before."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_files(folder: Path, write: Callable[[Path], None]) -> list[Path]:
    """Let ``write`` fill a folder, put its files into another, and return their paths there.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        draft = Path(unfinished)
        write(draft)
        names = sorted(path.name for path in draft.iterdir())
        for name in names:
            os.replace(draft / name, folder / name)
    return [folder / name for name in names]


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write an object, a line for each of its parts: a line for each number would be a hundred thousand of them."""
    lines = [f'"{key}": {json.dumps(part, default=str)}' for key, part in report.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that have the same names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
