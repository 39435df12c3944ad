"""What others have for the same jobs, as their users would call it; on one thread, and skipped where not installed."""

from __future__ import annotations

import importlib
import os
import pickle
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Run = Callable[[], Any]
Factory = Callable[..., Run]

# Whether `find` finds any; why it did not, by who.
enabled = False
skipped: dict[str, str] = {}

_FACTORIES: dict[str, list[tuple[str, str | None, Factory]]] = {}


def hold_to_one_thread() -> None:
    """Set what libraries look at when they are loaded."""
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMEXPR_NUM_THREADS", "BLOSC_NTHREADS"):
        os.environ[name] = "1"


@lru_cache
def load(name: str) -> Any:
    """Import a library and hold it to one thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    if name == "torch":
        module.set_num_threads(1)
    return module


def find(kind: str, *given: Any) -> dict[str, Run]:
    """Return what to time for a kind of job by who does it, set up for what is given and run once."""
    found = {}
    for name, library, factory in _FACTORIES.get(kind, []) if enabled else []:
        try:
            if library is not None:
                load(library)
            run = factory(*given)
            run()
        except Exception as error:  # noqa: PERF203 - a library is missing, broken, or not as it was
            skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            found[name] = run
    return found


def _peer(kinds: str | list[str], name: str, library: str | None = None) -> Callable[..., Factory]:
    def add(factory: Factory) -> Factory:
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            _FACTORIES.setdefault(kind, []).append((name, library, factory))
        return factory

    return add


@lru_cache
def _jitted(function: Callable[..., Any]) -> Any:
    return load("numba").njit(function)


# --- selection ------------------------------------------------------------------------------------


def _partitioned(values: Any, k: int) -> tuple[Any, Any]:
    positions = np.argpartition(np.abs(values), values.size - k)[values.size - k :]
    positions.sort()
    return positions, values[positions]


@_peer("top-k", "NumPy argpartition")
def _(values: Any, k: int) -> Run:
    return lambda: _partitioned(values, k)


@_peer("top-k", "torch.topk", "torch")
def _(values: Any, k: int) -> Run:
    x = load("torch").from_numpy(values)

    def run() -> Any:
        _, positions = x.abs().topk(k, sorted=False)
        return positions, x[positions]

    return run


@_peer("top-k", "torch.kthvalue", "torch")
def _(values: Any, k: int) -> Run:
    x = load("torch").from_numpy(values)

    def run() -> Any:
        magnitudes = x.abs()
        threshold = magnitudes.kthvalue(x.numel() - k + 1).values
        positions = (magnitudes >= threshold).nonzero().squeeze(1)
        return positions, x[positions]

    return run


def _looped_topk(x: Any, k: int) -> Any:
    magnitudes = np.abs(x)
    threshold = np.partition(magnitudes, x.size - k)[x.size - k]
    positions, kept, found = np.empty(k, np.int64), np.empty(k, x.dtype), 0
    for i in range(x.size):
        if magnitudes[i] >= threshold and found < k:
            positions[found] = i
            kept[found] = x[i]
            found += 1
    return positions, kept


@_peer("top-k", "numba", "numba")
def _(values: Any, k: int) -> Run:
    compiled = _jitted(_looped_topk)
    return lambda: compiled(values, k)


@_peer("threshold", "NumPy partition")
def _(values: Any, k: int) -> Run:
    return lambda: np.partition(np.abs(values), values.size - k)[values.size - k]


@_peer("compact", "NumPy")
def _(values: Any, threshold: float) -> Run:
    def run() -> Any:
        positions = np.flatnonzero(np.abs(values) >= threshold)
        return positions, values[positions]

    return run


@_peer("random positions", "NumPy")
def _(n: int, k: int) -> Run:
    generator = np.random.default_rng(0)
    return lambda: np.sort(generator.choice(n, k, replace=False, shuffle=False))


@_peer("percentile", "NumPy")
def _(values: Any, percentile: float) -> Run:
    return lambda: np.percentile(np.abs(values), percentile)


# --- integers -------------------------------------------------------------------------------------


@_peer(["quantize 8", "encode int8"], "NumPy")
def _(values: Any, block: int = 1024) -> Run:
    blocks = values[: values.size // block * block].reshape(-1, block)

    def run() -> Any:
        scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        return np.rint(blocks / scales).astype(np.int8), scales

    return run


def _looped_quantize(x: Any, block: int) -> Any:
    n = (x.size + block - 1) // block
    codes, scales = np.empty(x.size, np.int8), np.empty(n, np.float32)
    for b in range(n):
        piece = x[b * block : (b + 1) * block]
        largest = np.float32(0)
        for value in piece:
            largest = max(largest, abs(value))
        scales[b] = largest / np.float32(127)
        inverse = np.float32(127) / largest if largest > 0 else np.float32(0)
        for i in range(piece.size):
            codes[b * block + i] = np.rint(piece[i] * inverse)
    return codes, scales


@_peer("quantize 8", "numba", "numba")
def _(values: Any, block: int) -> Run:
    compiled = _jitted(_looped_quantize)
    return lambda: compiled(values, block)


def _per_tensor(values: Any) -> Any:
    torch = load("torch")
    x = torch.from_numpy(values)
    with warnings.catch_warnings():  # torch means to drop its quantized tensors
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(x, float(x.abs().max()) / 127, 0, torch.qint8)


@_peer("quantize 8", "torch per tensor", "torch")
def _(values: Any, block: int) -> Run:
    return lambda: _per_tensor(values)


def _piquant(values: Any, codes: Any) -> tuple[float, int]:
    piquant, context = load("piquant"), _piquant_context()
    types, address = piquant.DataType, values.ctypes.data
    scale, zero = context.compute_quant_params_ptr_float32(address, types.UINT8, values.size)
    nearest = piquant.RoundMode.NEAREST
    target = codes.ctypes.data
    context.quantize_ptr(address, types.F32, target, types.UINT8, values.size, scale, zero, nearest)
    return scale, zero


@lru_cache
def _piquant_context() -> Any:
    return load("piquant").Context(1)


@_peer("quantize 8", "pi-quant per tensor", "piquant")
def _(values: Any, block: int) -> Run:
    codes = np.empty(values.size, np.uint8)
    return lambda: _piquant(values, codes)


@_peer("quantize 8", "bitsandbytes", "bitsandbytes.functional")
def _(values: Any, block: int) -> Run:
    functional = load("bitsandbytes.functional")
    x = load("torch").from_numpy(values)
    return lambda: functional.quantize_blockwise(x, blocksize=block)


@_peer("dequantize 8", "NumPy")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    whole = codes.size // block
    blocks = codes[: whole * block].reshape(-1, block)
    return lambda: blocks * scales[:whole, None]


def _looped_dequantize(codes: Any, scales: Any, block: int) -> Any:
    out = np.empty(codes.size, np.float32)
    for b in range(scales.size):
        for i in range(b * block, min((b + 1) * block, codes.size)):
            out[i] = codes[i] * scales[b]
    return out


@_peer("dequantize 8", "numba", "numba")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    compiled = _jitted(_looped_dequantize)
    return lambda: compiled(codes, scales, block)


@_peer("dequantize 8", "torch per tensor", "torch")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    quantized = _per_tensor(values)
    return lambda: quantized.dequantize()


def _piquant_restore(values: Any, operation: str) -> Run:
    piquant, types = load("piquant"), load("piquant").DataType
    codes, out = np.empty(values.size, np.uint8), np.zeros_like(values)
    scale, zero = _piquant(values, codes)
    reduce = getattr(piquant.ReduceOp, operation)
    return lambda: _piquant_context().dequantize_ptr(
        codes.ctypes.data, types.UINT8, out.ctypes.data, types.F32, codes.size, scale, zero, reduce
    )


@_peer("dequantize 8", "pi-quant per tensor", "piquant")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    return _piquant_restore(values, "SET")


@_peer("add codes", "pi-quant per tensor, no weight", "piquant")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    return _piquant_restore(values, "ADD")


@_peer("dequantize 8", "bitsandbytes", "bitsandbytes.functional")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    functional = load("bitsandbytes.functional")
    quantized, state = functional.quantize_blockwise(
        load("torch").from_numpy(values), blocksize=block
    )
    return lambda: functional.dequantize_blockwise(quantized, state)


@_peer("add codes", "NumPy")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    whole = codes.size // block
    blocks = codes[: whole * block].reshape(-1, block)
    total = np.zeros(blocks.shape, np.float32)

    def run() -> None:
        nonlocal total
        total += np.float32(3) * (blocks * scales[:whole, None])

    return run


def _looped_add(codes: Any, scales: Any, block: int, weight: Any, total: Any) -> None:
    for b in range(scales.size):
        for i in range(b * block, min((b + 1) * block, codes.size)):
            total[i] += weight * (codes[i] * scales[b])


@_peer("add codes", "numba", "numba")
def _(values: Any, codes: Any, scales: Any, block: int) -> Run:
    compiled, total = _jitted(_looped_add), np.zeros_like(values)
    return lambda: compiled(codes, scales, block, np.float32(3), total)


@_peer("pack codes", "NumPy")
def _(codes: Any) -> Run:
    even, odd = codes[: codes.size // 2 * 2 : 2], codes[1::2]
    return lambda: ((even & 15) | (odd << 4)).view(np.uint8)


@_peer("unpack codes", "NumPy")
def _(packed: Any, n: int) -> Run:
    def run() -> Any:
        codes = np.empty(2 * packed.size, np.int8)
        signed = packed.view(np.int8)
        codes[::2] = (signed << 4) >> 4
        codes[1::2] = signed >> 4
        return codes[:n]

    return run


# --- bits, halves, checksums ----------------------------------------------------------------------


@_peer("pack signs", "NumPy")
def _(values: Any) -> Run:
    return lambda: np.packbits(values < 0, bitorder="little")


@_peer("unpack signs", "NumPy")
def _(bits: Any, n: int) -> Run:
    two = np.array([0.5, -0.5], np.float32)
    return lambda: two[np.unpackbits(bits, count=n, bitorder="little")]


@_peer("mean magnitude", "NumPy")
def _(values: Any) -> Run:
    return lambda: np.abs(values).mean(dtype=np.float64)


@_peer("apply mask", "NumPy")
def _(values: Any, mask: Any) -> Run:
    return lambda: np.where(mask, values, np.float32(0))


@_peer("pack mask", "NumPy")
def _(mask: Any) -> Run:
    return lambda: np.packbits(mask, bitorder="little")


@_peer("unpack mask", "NumPy")
def _(bits: Any, n: int) -> Run:
    return lambda: np.unpackbits(bits, count=n, bitorder="little").view(bool)


@_peer("narrow float16", "NumPy")
def _(values: Any) -> Run:
    return lambda: values.astype(np.float16)


@_peer("narrow float16", "torch", "torch")
def _(values: Any) -> Run:
    x = load("torch").from_numpy(values)
    return lambda: x.half()


@_peer("narrow bfloat16", "torch", "torch")
def _(values: Any) -> Run:
    x = load("torch").from_numpy(values)
    return lambda: x.bfloat16()


@_peer("widen float16", "NumPy")
def _(bits: Any) -> Run:
    half = bits.view(np.float16)
    return lambda: half.astype(np.float32)


@_peer("widen float16", "torch", "torch")
def _(bits: Any) -> Run:
    half = load("torch").from_numpy(bits.view(np.float16))
    return lambda: half.float()


@_peer("widen bfloat16", "torch", "torch")
def _(bits: Any) -> Run:
    torch = load("torch")
    short = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return lambda: short.float()


@_peer("random words", "NumPy Philox")
def _(n: int) -> Run:
    generator = np.random.Generator(np.random.Philox(0))
    return lambda: generator.integers(1 << 32, size=n, dtype=np.uint32)


@_peer("crc32", "zlib")
def _(values: Any) -> Run:
    return lambda: zlib.crc32(values)


# --- index sets -----------------------------------------------------------------------------------


def _gaps(positions: Any) -> bytes:
    gaps: bytes = np.diff(positions, prepend=0).astype(np.uint32).tobytes()
    return gaps


@_peer("pack sparse", "zlib of gaps")
def _(positions: Any) -> Run:
    return lambda: zlib.compress(_gaps(positions), 1)


@_peer("unpack sparse", "zlib of gaps")
def _(positions: Any) -> Run:
    packed = zlib.compress(_gaps(positions), 1)
    return lambda: np.frombuffer(zlib.decompress(packed), np.uint32).cumsum(dtype=np.int64)


@_peer("pack sparse", "Zstandard of gaps", "zstandard")
def _(positions: Any) -> Run:
    compressor = load("zstandard").ZstdCompressor()
    return lambda: compressor.compress(_gaps(positions))


@_peer("unpack sparse", "Zstandard of gaps", "zstandard")
def _(positions: Any) -> Run:
    library = load("zstandard")
    packed, decompressor = library.compress(_gaps(positions)), library.ZstdDecompressor()
    return lambda: np.frombuffer(decompressor.decompress(packed), np.uint32).cumsum(dtype=np.int64)


# --- whole payloads -------------------------------------------------------------------------------


@_peer("encode topk(0.01) | int8", "SciPy CSR (float32)", "scipy.sparse")
def _(values: Any) -> Run:
    sparse = load("scipy.sparse")
    n = values.size
    k = max(1, n // 100)

    def run() -> bytes:
        magnitudes = np.abs(values)
        pruned = np.where(magnitudes >= np.partition(magnitudes, n - k)[n - k], values, 0)
        rows = sparse.csr_matrix(pruned.reshape(1, -1))
        return b"".join(part.tobytes() for part in (rows.data, rows.indices, rows.indptr))

    return run


@_peer("encode topk(0.01) | int8", "NumPy argpartition (float32)")
def _(values: Any) -> Run:
    def run() -> bytes:
        positions, kept = _partitioned(values, max(1, values.size // 100))
        return b"".join((positions.astype(np.uint32).tobytes(), kept.tobytes()))

    return run


@_peer("encode topk(0.01) | ternary", "OpenFL STC", "openfl.pipelines.stc_pipeline")
def _(values: Any) -> Run:
    stc = load("openfl.pipelines.stc_pipeline").STCPipeline(p_sparsity=0.01)
    return lambda: stc.forward(values)


@_peer("decode topk(0.01) | ternary", "OpenFL STC", "openfl.pipelines.stc_pipeline")
def _(values: Any) -> Run:
    stc = load("openfl.pipelines.stc_pipeline").STCPipeline(p_sparsity=0.01)
    payload, steps = stc.forward(values)
    return lambda: stc.backward(payload, list(steps))


@_peer("encode raw", "NumPy tobytes")
def _(values: Any) -> Run:
    return values.tobytes  # type: ignore[no-any-return]


@_peer("encode raw", "pickle")
def _(values: Any) -> Run:
    return lambda: pickle.dumps(values, protocol=5)


@_peer("encode raw", "Zstandard", "zstandard")
def _(values: Any) -> Run:
    compressor = load("zstandard").ZstdCompressor()
    return lambda: compressor.compress(values)


@_peer("decode raw", "Zstandard", "zstandard")
def _(values: Any) -> Run:
    library = load("zstandard")
    packed, decompressor = library.compress(values), library.ZstdDecompressor()
    return lambda: decompressor.decompress(packed)


@_peer("encode raw", "Blosc2", "blosc2")
def _(values: Any) -> Run:
    blosc2 = load("blosc2")
    return lambda: blosc2.compress2(values, nthreads=1)


@_peer("decode raw", "Blosc2", "blosc2")
def _(values: Any) -> Run:
    blosc2 = load("blosc2")
    packed = blosc2.compress2(values, nthreads=1)
    return lambda: blosc2.decompress2(packed, nthreads=1)


@_peer("scatter", "NumPy")
def _(positions: Any, kept: Any, n: int) -> Run:
    out = np.zeros(n, kept.dtype)

    def run() -> None:
        out[positions] = kept

    return run


@_peer("add sparse", "NumPy, ready positions")
def _(positions: Any, kept: Any, n: int) -> Run:
    total = np.zeros(n, kept.dtype)

    def run() -> None:
        total[positions] += np.float32(3) * kept

    return run


@_peer("add", "NumPy, decoded")
def _(decoded: Any) -> Run:
    total = np.zeros_like(decoded)

    def run() -> None:
        nonlocal total
        total += np.float32(3) * decoded

    return run


@_peer("feedback", "NumPy")
def _(values: Any, k: int) -> Run:
    residual = np.zeros_like(values)

    def run() -> Any:
        nonlocal residual
        compensated = values + residual
        positions, kept = _partitioned(compensated, k)
        residual = compensated
        residual[positions] = 0
        return positions, kept

    return run


@_peer("encode tensors", "pickle")
def _(update: Any) -> Run:
    return lambda: pickle.dumps(update, protocol=5)


@_peer("decode tensors", "pickle")
def _(update: Any) -> Run:
    packed = pickle.dumps(update, protocol=5)
    return lambda: pickle.loads(packed)
