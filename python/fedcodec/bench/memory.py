"""How much memory an encode takes at its peak beyond what was there: in a process of its own.

The peak is Linux's, of resident memory, which knows what native code allocates.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from .data import values

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_extra(codec: str, n: int, threads: int = 1) -> tuple[int, int]:
    """Return the peak in bytes beyond the start's, and the length of the payload.

    Raises
    ------
    OSError
        If that process ends badly, as where the system does not say.
    """
    command = [sys.executable, "-m", "fedcodec.bench.memory", codec, str(n), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.rpartition("\n")[0].rpartition("\n")[2])
    extra, payload = map(int, done.stdout.split())
    return extra, payload


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return 1024 * int(rest.split()[0])
    raise OSError(f"{_STATUS} has no {field}")


def _main(text: str, n: int, threads: int) -> None:
    import fedcodec as fc

    fc.set_num_threads(threads)
    update, codec = values("student-t", n), fc.parse(text)
    codec.encode(update[:1000])  # what is loaded and built on first use stays out of it
    # Memory that was freed but not given back would hide what is allocated from it.
    with suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    payload = codec.encode(update)
    print(max(0, _resident("VmHWM") - before), len(payload))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
