"""The true CUDA module where there may be no GPU: what it says, how large it is, what the compiler made of it."""

import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fedcodec as fc
from fedcodec import ops

SPEC = importlib.util.find_spec("fedcodec._cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SPEC is None, reason="the CUDA module is not built"),
]
if SPEC is not None:
    from fedcodec import _cuda

    pytestmark.append(pytest.mark.skipif(_cuda.emulated, reason="this is the emulated module"))


class OnGpu:
    """What any framework's array on a GPU looks like."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (1,),
        "typestr": "<f4",
        "data": (1 << 40, False),
        "version": 3,
    }


def test_importing_fedcodec_does_not_load_it():
    code = "import fedcodec, sys; assert 'fedcodec._cuda' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_says_what_is_missing():
    reason = ops.cuda_missing()
    if reason is None:
        pytest.skip("nothing is missing: there is a GPU")
    assert re.search("driver|device", reason)
    assert fc.info()["cuda"] == reason
    payload = fc.Int8().encode(np.ones(3, np.float32))
    calls = [
        lambda: fc.Int8().encode({"w": OnGpu()}),
        lambda: fc.decode(payload, device="cuda"),
        lambda: fc.Aggregator(device="cuda"),
        lambda: fc.ErrorFeedback("int8").encode([OnGpu()]),
    ]
    for call in calls:
        with pytest.raises(fc.BackendError, match=re.escape(reason)):
            call()


def packed(path):
    """What a wheel makes of a file."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path)
    return memory.tell()


def test_wheels_stay_small():
    native = Path(importlib.util.find_spec("fedcodec._native").origin)
    rest = sum(map(packed, Path(fc.__file__).parent.rglob("*.py")))
    assert packed(native) + rest <= 2_000_000
    assert packed(SPEC.origin) + packed(native) + rest <= 15_000_000


def disassembler():
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("cuobjdump")
    return next(str(file.locate()) for file in files if file.name == "cuobjdump")


@pytest.fixture(scope="module")
def assembly():
    """The instructions of each kernel for compute capability 9.0."""
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    path = f"{Path(tool).parent}:/usr/bin:/bin"
    command = [tool, "-lelf", SPEC.origin]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": path})
    if "sm_90" not in text.stdout:
        pytest.skip("built for other GPUs")
    command = [tool, "-arch", "sm_90", "-sass", SPEC.origin]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": path})
    kernels = re.split(r"\n\s*Function : ", text.stdout)[1:]
    return {kernel.split("\n", 1)[0]: kernel for kernel in kernels}


WHOLE_ROWS = {  # what walks all elements, and the 16-byte instructions that it must have
    r"encode_blocksILb0": ("LD", "ST"),
    r"encode_blocksILb1": ("LD", "ST"),
    r"collectIf": ("LD",),
    r"count_digitsIf": ("LD",),
    r"write_cutIf": ("LD",),
    r"put_denseINS\w*WriteE": ("ST",),
    r"put_denseINS\w*AddE": ("LD", "ST"),
}


@pytest.mark.parametrize("pattern", WHOLE_ROWS)
def test_hot_kernels_move_16_bytes_and_spill_nothing(assembly, pattern):
    found = [text for name, text in assembly.items() if re.search(pattern, name)]
    assert found
    for text in found:
        for kind in WHOLE_ROWS[pattern]:
            assert re.search(rf"\b{kind}G?\.E\S*\.128", text), kind
        assert not re.search(r"\b(LDL|STL)\b", text)
