"""Objects for one instruction set export nothing that the linker could keep for all processors.

A weak symbol (a template or an inline function of a header) compiled with AVX may be the copy that
baseline code gets to call: an illegal instruction on an older processor, far from its cause.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def objects() -> list[Path]:
    # Sanitizers bring weak symbols of their own, and nobody ships them.
    return sorted(
        path
        for isa in ("avx2", "avx512", "neon")
        for path in (ROOT / "build").glob(f"*-Release-*/**/{isa}.cc.o")
    )


@pytest.mark.native
def test_only_the_table_is_exported() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    found = objects()
    if not found:
        pytest.skip("no objects: nothing was compiled in build/")
    for path in found:
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", "--extern-only", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if line.strip()]
        isa = path.name.split(".")[0]
        assert [name for _, name in symbols] == [f"fedcodec::kernels_{isa}"], path
        assert symbols[0][0] not in "WVu", path
