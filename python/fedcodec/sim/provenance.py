"""What a study ran with and on, as every report of it says."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

import fedcodec as fc
from fedcodec.information import processor


def provenance() -> dict[str, Any]:
    """Return ``versions`` and ``machine``; nothing that changes from run to run.

    Examples
    --------
    >>> sorted(provenance())
    ['machine', 'versions']
    """
    return {
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "fedcodec": fc.info(),
        },
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cpus": os.cpu_count(),
        },
    }
