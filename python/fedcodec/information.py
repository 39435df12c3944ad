"""What is installed and in use."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from . import ops


def info() -> dict[str, Any]:
    """Return versions, the instruction sets with the active one, the number of threads, and the state of CUDA.

    Examples
    --------
    >>> import fedcodec as fc
    >>> fc.info()["active"] in fc.info()["instruction_sets"]
    True
    """
    packages = ("fedcodec", "numpy", "zstandard", "torch")
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in packages},
        "machine": platform.machine(),
        "instruction_sets": ops.available(),
        "active": ops.active(),
        "threads": ops.get_num_threads(),
        "cuda": ops.cuda_missing() or "ready",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the processor's name, as it calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        if named:
            return " ".join(named[1].split())
    return platform.processor() or platform.machine()
