"""Codecs, updates and comparisons that several test files share."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import fedcodec as fc

# Decoded + missed is exactly what was encoded (docs/numerics.md, section 3).
EXACT = (
    "raw",
    "sparse",
    "topk(0.3)",
    'topk(0.3, scope="tensor")',
    "threshold(value=0.5)",
    "threshold(percentile=70)",
    "randomk(0.3)",
    'randomk(0.3, scope="tensor")',
    "structured",
    "structured(0.6)",
    "structured(0.5, axis=1, order=1) | int8",
    "int8",
    "int8(block_size=None)",
    "int8(block_size=3)",
    "int8(axis=0)",
    "kbit(2)",
    "kbit(4, block_size=5)",
    "kbit(7, axis=1)",
    'cast("float16")',
    'cast("bfloat16")',
    "topk(0.3) | int8",
    "topk(0.3) | kbit(3, block_size=4)",
    'topk(0.3) | cast("bfloat16")',
    "randomk(0.3) | int8",
    "topk(0.5) | int8 | zstd",
    "raw | zstd",
    'rules(topk(0.3) | int8; "*.bias" = raw; "w*" = kbit(5))',
    'rules(int8 | zstd; "*.bias" = raw | zstd; "w*" = topk(0.2))',
)
INEXACT = (
    "sign",
    "topk(0.3) | ternary",
    "randomk(0.5) | ternary",
    "structured(0.5) | ternary",
    "threshold(percentile=60) | ternary | zstd",
    "int8(stochastic=True)",
    "topk(0.4) | kbit(3, stochastic=True)",
    "residual(sign; topk(0.2) | int8)",
    "residual(kbit(3); randomk(0.2) | int8)",
    "residual(topk(0.3); int8) | zstd",
    "residual(structured(0.3); kbit(4))",
    'rules(sign; "*.bias" = raw)',
    'rules(residual(sign; int8); "*.bias" = raw | zstd; "w*" = sign)',
)
CODECS = EXACT + INEXACT
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16)


def update(seed: int = 0, dtype: Any = np.float32, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Floats of several shapes, with zeros, and tensors that no codec may touch."""
    rng = np.random.default_rng(seed)
    floats = {
        "w1": rng.standard_normal((7, 11)) ** 3,
        "w1.bias": rng.standard_normal(7),
        "empty": np.zeros((0, 4)),
        "conv": rng.standard_normal((3, 2, 3, 3)) * (rng.random((3, 2, 3, 3)) < 0.6),
        "scalar": rng.standard_normal(()),
    }
    return {name: (np.asarray(x) * scale).astype(dtype) for name, x in floats.items()} | {
        "steps": np.array(rng.integers(-(2**62), 2**62)),
        "counts": rng.integers(0, 256, 5).astype(np.uint8),
        "flags": rng.random(9) < 0.5,
    }


def mask_for(values: dict[str, np.ndarray], seed: int = 0) -> fc.Mask:
    rng = np.random.default_rng(seed)
    return fc.Mask.of(
        {name: rng.random(x.shape) < 0.4 for name, x in values.items() if is_float(x)}
    )


def is_float(x: np.ndarray) -> bool:
    return x.dtype in FLOATS


def wide(x: np.ndarray) -> np.ndarray:
    """Values as error feedback and sums see them."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def bits(x: Any) -> bytes:
    return np.asarray(x).tobytes()


def assert_same(first: Any, second: Any) -> None:
    """The same names, dtypes, shapes and bits."""
    if isinstance(first, dict):
        assert list(first) == list(second)
        pairs = [(first[name], second[name], name) for name in first]
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        pairs = [(a, b, str(i)) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        pairs = [(first, second, "array")]
    for a, b, name in pairs:
        if a is None or b is None:
            assert a is b, name
            continue
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert bits(a) == bits(b), f"{name}: {a} {b}"
