"""What the golden payloads hold: (file name, codec, update, arguments of encode)."""

import numpy as np

import fedcodec as fc

MASK = np.array([True, False, True, True, False] * 4)
BASE = fc.digest({"weight": np.ones(4, np.float32)})


def _ramp(*shape, dtype="float32", scale=1.0):
    n = int(np.prod(shape))
    return (((np.arange(n) * 7919 % 1009) - 504) / 64 * scale).astype(dtype).reshape(shape)


def _model():
    embedding = _ramp(9, 5)
    return {
        "embedding.weight": embedding,
        "norm.steps": np.array(12345678901, np.int64),
        "norm.bias": _ramp(5, dtype="float16"),
        "head.weight": embedding,
        "head.mask": np.array([True, False, True]),
        "head.empty": np.zeros((0, 3), np.float64),
        "head.bias": _ramp(11, dtype="float64", scale=1e-3),
    }


def _integers():
    return [
        np.array([np.iinfo(kind).min, 0, 1, np.iinfo(kind).max], kind)
        for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    ]


def _tall():
    update = np.zeros(200_000, np.float32)
    update[::997] = _ramp(201)
    update[100_000:100_400] = 1.5
    return update


def _pruned():
    filters = _ramp(6, 2, 3, 3)
    filters[[0, 3, 4]] = 0
    return filters


CASES = [
    ("raw", "raw", _model(), {}),
    ("integers", "raw", _integers(), {}),
    ("bfloat16", 'cast("bfloat16")', _ramp(13), {}),
    ("float16", 'cast("float16")', [_ramp(13), _ramp(3, dtype="float64")], {}),
    ("topk", "topk(0.2)", _model(), {}),
    ("topk-tensor-int8", 'topk(0.3, scope="tensor") | int8(block_size=4)', _model(), {}),
    ("topk-ternary-reference", "topk(0.1) | ternary", _model(), {"framing": "reference", "base": BASE}),
    ("threshold", "threshold(percentile=70) | kbit(4)", _ramp(40, 5), {}),
    ("sparse-tiles", "sparse", _tall(), {}),
    ("sparse-one-large-tile", "topk(0.0001)", _tall(), {}),
    ("sparse-complement", "topk(0.98) | kbit(3, block_size=64)", _ramp(500), {}),
    ("randomk", 'randomk(0.25, scope="tensor", seed=11)', _model(), {"seed": 2**64 - 1}),
    ("randomk-int8-stochastic", "randomk(0.5) | int8(stochastic=True, seed=5)", _ramp(301), {"seed": 77}),
    ("int8", "int8(block_size=16)", _ramp(70), {}),
    ("int8-group", "int8(block_size=None)", _model(), {}),
    ("int8-axis", "int8(axis=1)", _ramp(6, 4, 2), {}),
    ("int8-stochastic", "int8(block_size=32, stochastic=True, seed=3)", _ramp(99), {"seed": 4}),
    *((f"kbit-{bits}", f"kbit({bits}, block_size=20)", _ramp(61), {}) for bits in range(2, 8)),
    ("kbit-axis", "kbit(5, axis=0)", _ramp(3, 33), {}),
    ("sign", "sign", _model(), {}),
    ("residual", "residual(sign; topk(0.1) | int8)", _ramp(200), {}),
    ("rules", 'rules(topk(0.2) | int8; "*.bias" = raw; "norm.*" = sign)', _model(), {}),
    ("rules-reference", 'rules(topk(0.2) | int8; "*.bias" = raw)', _model(), {"framing": "reference"}),
    (
        "rules-stochastic",
        'rules(int8(block_size=9, stochastic=True); "*.bias" = kbit(5, stochastic=True, seed=2))',
        {"a": _ramp(40), "a.bias": _ramp(70), "b": _ramp(33), "b.bias": _ramp(21)},
        {"seed": 9},
    ),
    ("mask", None, _ramp(20), {}),
    ("structured", "structured(0.4)", _model(), {}),
    ("structured-axis-int8", "structured(0.6, axis=1, order=1) | int8(block_size=8)", _ramp(4, 5, 3), {}),
    ("structured-ternary", "structured | ternary", {"conv": _pruned(), "bias": _ramp(6)}, {"framing": "reference"}),
    ("zstd", "topk(0.5) | int8 | zstd", _model(), {}),
    ("rules-zstd", 'rules(raw | zstd; "*.bias" = int8)', _model(), {}),
]  # fmt: skip


def codec_of(text):
    """The codec of a case; the one without a text is the mask's."""
    return fc.Mask.of(MASK) | fc.Int8(8) if text is None else fc.parse(text)


def shared_for(codec, update):
    """What a decoder of the case must hold."""
    shared = fc.Shared()
    codec.add_shared(shared)
    shared.add_rules(codec, fc.Spec.of(update))
    shared.add_base({"weight": np.ones(4, np.float32)})
    return shared
