"""Each kernel beside what a NumPy user would write by hand, in one run on the same buffers.

Where both give the same thing that is checked; then both are timed in turn. `--out FILE.json` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fedcodec as fc
from fedcodec import ops

REPEATS = 7
Row = tuple[str, Callable[[], Any], Callable[[], Any]]


def rows(values: np.ndarray[Any, Any]) -> list[Row]:
    """Name, ours and NumPy's of each measurement, over n float32 values."""
    n = values.size
    k = n // 100
    codes, scales = ops.quantize_int8(values)
    blocks = values[: n // 1024 * 1024].reshape(-1, 1024)
    kept = np.flatnonzero(np.abs(values) > ops.topk_threshold(values, k)[0])
    mask = np.abs(values) > 1
    bits = np.packbits(mask, bitorder="little")
    total, other = np.zeros(n, np.float32), np.zeros(n, np.float32)
    data = values.tobytes()

    def topk() -> Any:
        threshold, ties = ops.topk_threshold(values, k)
        return ops.compact(values, threshold, ties)[0]

    def numpy_topk() -> Any:
        return np.sort(np.argpartition(np.abs(values), n - k)[n - k :])

    def numpy_quantize() -> Any:
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        return np.rint(blocks / scale).astype(np.int8)

    def numpy_dequantize() -> Any:
        return (codes[: blocks.size].reshape(blocks.shape) * scales[: len(blocks), None]).reshape(
            -1
        )

    def numpy_add() -> Any:
        decoded = codes[: blocks.size].reshape(blocks.shape) * scales[: len(blocks), None]
        other[: blocks.size] += np.float32(3) * decoded.reshape(-1)

    def numpy_sparse() -> Any:
        return zlib.compress(np.diff(kept, prepend=0).astype(np.uint32).tobytes(), 1)

    return [
        ("top-k 1 %: threshold and compact", topk, numpy_topk),
        (
            "percentile threshold",
            lambda: ops.percentile_threshold(values, 90),
            lambda: np.percentile(np.abs(values), 90),
        ),
        ("int8 quantize, blocks of 1,024", lambda: ops.quantize_int8(values), numpy_quantize),
        ("int8 dequantize", lambda: ops.dequantize_int8(codes, scales), numpy_dequantize),
        (
            "int8 decode and weighted add",
            lambda: ops.accumulate_codes(total, codes, scales, 8, 1024, scales.size, 3.0),
            numpy_add,
        ),
        ("mask: apply", lambda: ops.apply_mask(values, mask), lambda: np.where(mask, values, 0)),
        ("mask: pack", lambda: ops.pack_mask(mask), lambda: np.packbits(mask, bitorder="little")),
        (
            "mask: unpack",
            lambda: ops.unpack_mask(bits, n),
            lambda: np.unpackbits(bits, count=n, bitorder="little").view(bool),
        ),
        (
            "signs: pack",
            lambda: ops.pack_signs(values),
            lambda: np.packbits(values < 0, bitorder="little"),
        ),
        (
            "mean magnitude",
            lambda: ops.mean_magnitude(values),
            lambda: np.abs(values).astype(np.float64).mean(),
        ),
        ("sparse positions: pack", lambda: ops.pack_sparse(kept, n), numpy_sparse),
        ("float16: narrow", lambda: ops.narrow(values, "float16"), lambda: values.astype("f2")),
        ("checksum", lambda: ops.crc32(data), lambda: zlib.crc32(data)),
    ]


def check(values: np.ndarray[Any, Any]) -> None:
    """Raise unless ours and NumPy's results agree where they are the same thing."""
    results = {name: (ours(), peer()) for name, ours, peer in rows(values)}
    for name in (
        "top-k 1 %: threshold and compact",
        "mask: apply",
        "mask: pack",
        "mask: unpack",
        "signs: pack",
        "checksum",
    ):
        ours, peer = results[name]
        if not np.array_equal(ours, peer):
            raise AssertionError(f"{name}: results differ")
    ours, peer = results["float16: narrow"]
    if not np.array_equal(ours, peer.view(np.uint16)):
        raise AssertionError("float16: narrow: results differ")


def measure(values: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Time ours and NumPy's in turn; medians in milliseconds and their ratio."""
    found = []
    for name, ours, peer in rows(values):
        times: dict[str, list[float]] = {"ours": [], "numpy": []}
        for _ in range(REPEATS):
            for who, run in (("ours", ours), ("numpy", peer)):
                start = time.perf_counter()
                run()
                times[who].append(1e3 * (time.perf_counter() - start))
        medians = {who: statistics.median(taken) for who, taken in times.items()}
        found.append({"kernel": name, **medians, "speed-up": medians["numpy"] / medians["ours"]})
    return found


def main() -> None:
    """Measure, print a Markdown table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=4_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    values = np.random.default_rng(0).standard_t(4, arguments.values).astype(np.float32)
    check(values)
    found = measure(values)
    print("| kernel | ours, ms | NumPy, ms | speed-up |\n| --- | --- | --- | --- |")
    for row in found:
        print(
            f"| {row['kernel']} | {row['ours']:.2f} | {row['numpy']:.2f} | {row['speed-up']:.1f} |"
        )
    if arguments.out:
        report = {"values": values.size, "info": fc.info(), "platform": platform.platform()}
        arguments.out.write_text(json.dumps(report | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
