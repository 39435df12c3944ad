"""`import fedcodec` costs NumPy and nothing else."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, pathlib, sys, threading
import numpy
before, threads = set(sys.modules), threading.active_count()
{statement}
new = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
maps = pathlib.Path("/proc/self/maps").read_text() if sys.platform == "linux" else ""
tasks = len(__import__("os").listdir("/proc/self/task")) if sys.platform == "linux" else 1
print(json.dumps([new, threading.active_count() - threads, tasks, maps]))
"""

HEAVY = [
    "torch", "jax", "cupy", "scipy", "sklearn", "pandas", "matplotlib", "hypothesis", "pytest", "click", "rich",
    "ml_dtypes", "safetensors", "numba", "flwr", "multiprocessing", "concurrent",
]  # fmt: skip


def run(statement):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE.format(statement=statement)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


USE = """
import fedcodec as fc, numpy as np
update = {"w": np.ones((3, 4), np.float32), "n": np.arange(3)}
for text in ("topk(0.5) | int8", "residual(sign; raw)", "randomk(0.5) | ternary"):
    payload = fc.parse(text).encode(update)
    fc.decode(payload)
    server = fc.Aggregator(update)
    server.add(payload)
    server.mean()
    fc.ErrorFeedback(text).encode(update)
fc.inspect(payload)
"""


@pytest.mark.parametrize("statement", ["import fedcodec", "import fedcodec.ops", USE])
def test_nothing_heavy_is_loaded_and_no_thread_started(statement):
    new, threads, tasks, maps = run(statement)
    assert [name for name in HEAVY if name in new] == []
    assert threads == 0
    assert [name for name in ("libcuda", "libcudart", "libtorch", "nvrtc") if name in maps] == []
    assert tasks <= run("pass")[2]


def test_the_import_is_numpys_and_zstandards_only():
    new = set(run("import fedcodec")[0])
    foreign = {name for name in new if name not in sys.stdlib_module_names}
    assert foreign - {"_fedcodec_editable", "_zstandard"} <= {
        "fedcodec",
        "numpy",
        "zstandard",
        "_cffi_backend",
        "cffi",
    }


def test_the_probe_would_see_it():
    new, threads, _, _ = run(
        "import wave, threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    assert "wave" in new
    assert threads == 1


def test_torch_updates_work_without_an_import_of_ours():
    pytest.importorskip("torch", reason="torch is not installed")
    statement = (
        "import warnings; warnings.simplefilter('ignore'); import fedcodec, sys; assert 'torch' not in sys.modules; "
        "import torch; x = torch.ones(9); import fedcodec as fc; y = fc.decode(fc.Raw().encode(x), like=x); "
        "assert isinstance(y, torch.Tensor) and torch.equal(x, y)"
    )
    run(statement)
