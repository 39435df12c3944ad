"""The size that a codec's payload could ideally have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import fedcodec as fc

BYTES_PER_SCALE = 4


def binary_entropy(probability: float) -> float:
    """Return the entropy in bits of one draw that is 1 with this probability.

    Examples
    --------
    >>> binary_entropy(0.5)
    1.0
    """
    if not 0 < probability < 1:
        return 0.0
    rest = 1 - probability
    return -probability * math.log2(probability) - rest * math.log2(rest)


def ideal_bytes(codec: fc.Codec, sizes: Sequence[int]) -> float | None:
    """Return n*H(k/n) bits of positions, the bits of the values and 4 bytes a scale, in bytes.

    Parameters
    ----------
    codec : Codec
    sizes : sequence of int
        Number of elements of each float32 tensor.

    Returns
    -------
    float or None
        None for a codec whose ideal depends on the data or is not known here (thresholds, lossless stages, ...).

    Examples
    --------
    >>> import fedcodec as fc
    >>> round(ideal_bytes(fc.parse("topk(0.002) | ternary"), [109_386]))
    316
    """
    pipelines = codec.pipelines()
    if len(pipelines) != 1:
        return None
    stages = list(pipelines[0].stages)
    kept, positions = list(sizes), 0.0
    match stages[0]:
        case fc.TopK(density=density, scope=scope) | fc.RandomK(density=density, scope=scope):
            spaces = [sum(sizes)] if scope == "update" else list(sizes)
            kept = [max(1, round(density * size)) for size in spaces]
            if isinstance(stages.pop(0), fc.TopK):
                positions = sum(
                    size * binary_entropy(count / size)
                    for size, count in zip(spaces, kept, strict=True)
                )
    match stages:
        case [] | [fc.Raw()]:
            value_bits, scales = 32, 0
        case [fc.Cast()]:
            value_bits, scales = 16, 0
        case [fc.Int8(bits=bits, block_size=int(block), axis=None)] | [
            fc.KBit(bits=bits, block_size=int(block), axis=None)
        ]:
            value_bits, scales = bits, sum(math.ceil(count / block) for count in kept)
        case [fc.Ternary() | fc.Sign()]:
            value_bits, scales = 1, len(kept)
        case _:
            return None
    return (positions + sum(kept) * value_bits) / 8 + BYTES_PER_SCALE * scales
