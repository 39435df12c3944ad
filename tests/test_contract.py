"""The contract of DESIGN.md, over every registered codec and every way to put them together."""

import contextlib
import itertools
import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import registry
from fedcodec.testing import (
    DTYPES,
    check_codec,
    check_update,
    same,
    updates,
    updates_of,
)

pytestmark = pytest.mark.native

# One card a stage: texts that the whole contract is checked on. A stage without one fails below.
CARDS = {
    "raw": ["raw", "topk(0.3) | raw"],
    "sparse": ["sparse", 'sparse(scope="tensor") | int8'],
    "topk": ["topk(0.01)", 'topk(0.2, scope="tensor") | int8(block_size=16)', "topk(1)"],
    "threshold": [
        "threshold(0.4)",
        "threshold(percentile=90) | ternary",
        'threshold(percentile=60.5, interpolation="higher", scope="tensor")',
        'threshold(percentile=33, interpolation="lower") | kbit(5)',
    ],
    "randomk": ["randomk(0.2)", 'randomk(0.5, scope="tensor", seed=3) | int8(stochastic=True)'],
    "mask": [],  # made for one spec: test_mask
    "autoencoder": [],  # likewise: test_autoencoder.py
    "structured": [
        "structured",
        "structured(0.6, order=1)",
        "structured(0.3, axis=1) | int8(block_size=16)",
        "structured(0.5) | ternary",
    ],
    "int8": [
        "int8",
        "int8(block_size=None)",
        "int8(axis=1)",
        "int8(block_size=7, stochastic=True, seed=5)",
        "topk(0.05) | int8",
    ],
    "kbit": [
        "kbit(2, block_size=33)",
        "kbit(3, axis=0)",
        "kbit(7, block_size=None, stochastic=True)",
        "topk(0.1) | kbit(4)",
    ],
    "sign": ["sign"],
    "ternary": ["topk(0.05) | ternary", "randomk(0.3) | ternary"],
    "cast": ['cast("float16")', 'cast("bfloat16")', 'topk(0.3) | cast("bfloat16")'],
    "residual": [
        "residual(sign; topk(0.1) | int8)",
        "residual(randomk(0.3); kbit(4, stochastic=True)) | zstd",
    ],
    "zstd": ["raw | zstd", "topk(0.1) | kbit(4) | zstd(level=1)", "zstd"],
}
RULES = [
    'rules(topk(0.05) | int8; "*.bias" = raw; "0" = sign)',
    'rules(int8(stochastic=True) | zstd; "*.weight" = topk(0.2) | ternary; "1" = randomk(0.1) | zstd)',
]

SELECT = [
    "",
    "sparse",
    'sparse(scope="tensor")',
    "topk(0.1)",
    'topk(0.1, scope="tensor")',
    "threshold(0.4)",
    'threshold(0.4, scope="tensor")',
    "threshold(percentile=80)",
    'threshold(percentile=80, scope="tensor")',
    "randomk(0.2)",
    'randomk(0.2, scope="tensor")',
    "structured",
    "structured(0.4, axis=1)",
]
QUANTIZE = [
    "raw",
    "int8",
    "int8(block_size=5, stochastic=True)",
    "int8(block_size=None)",
    "int8(axis=0)",
    "kbit(2)",
    "kbit(5, block_size=9, stochastic=True)",
    "kbit(7, block_size=None)",
    "kbit(3, axis=1)",
    "sign",
    "ternary",
    'cast("float16")',
    'cast("bfloat16")',
]
LOSSLESS = ["", "zstd"]


def every_pipeline():
    for stages in itertools.product(SELECT, QUANTIZE, LOSSLESS):
        text = " | ".join(stage for stage in stages if stage)
        if stages[0] and (stages[1] == "sign" or "axis" in stages[1]):
            continue  # refused: test_text.py
        if stages[1] == "ternary" and not stages[0]:
            continue
        yield fc.parse(text)


PIPELINES = list(every_pipeline())


def ours(name):
    return registry.stage_class(name).__module__.startswith("fedcodec.")


def test_every_registered_stage_has_a_card():
    assert set(CARDS) == set(filter(ours, registry.stage_names()))
    for name, texts in CARDS.items():
        assert all(name in text for text in texts)


def test_every_pipeline_that_makes_sense_is_tried():
    assert len(PIPELINES) == 2 * (12 * 10 + 12)
    used = {stage.name for codec in PIPELINES for one in codec.pipelines() for stage in one.stages}
    assert used | {"residual", "mask", "autoencoder"} == set(CARDS)


@pytest.mark.parametrize("text", [*itertools.chain(*CARDS.values()), *RULES])
def test_contract(text):
    check_codec(fc.parse(text), examples=8)


MODEL = {
    "w": np.zeros((13, 7), np.float32),
    "steps": np.zeros(3, np.int64),
    "b": np.zeros(7, np.float16),
    "none": np.zeros((0, 2), np.float32),
}


@pytest.mark.parametrize(
    "after", [(), (fc.Int8(8),), (fc.Ternary(),), (fc.KBit(3), fc.Zstd())], ids=repr
)
@pytest.mark.parametrize("density", [0, 0.4, 1])
def test_mask(after, density):
    chosen = np.random.default_rng(1).random(98) < density
    codec = fc.Mask.of([chosen[:91].reshape(13, 7), chosen[91:]])
    for stage in after:
        codec = codec | stage
    check_codec(codec, updates=updates_of(fc.Spec.of(MODEL)), examples=4)


@settings(max_examples=250)
@given(st.sampled_from(PIPELINES), updates(max_size=300), st.integers(0, 2**64 - 1))
def test_every_pipeline(codec, update, seed):
    check_update(codec, update, seed=seed)


@settings(max_examples=150)
@given(st.data())
def test_values_up_to_the_largest(data):
    dtype = data.draw(st.sampled_from([name for name in DTYPES if "float" in name]))
    codec = data.draw(st.sampled_from(PIPELINES))
    update = data.draw(updates(dtypes=[dtype], extreme=True))
    try:
        check_update(codec, update)
    except fc.NonFiniteError:
        # Only what becomes infinite in a narrower type may be refused.
        assert "cast" in str(codec) or (dtype == "float64" and "raw" not in str(codec))


@settings(max_examples=60)
@given(
    st.sampled_from(
        [
            "sign",
            "kbit(2)",
            "topk(0.2) | ternary",
            "topk(0.3)",
            "randomk(0.2) | int8",
            'cast("bfloat16")',
        ]
    ),
    st.sampled_from(["raw", "int8", "sign", "sparse", "topk(0.1) | kbit(4)", 'cast("float16")']),
    updates(dtypes=["float32", "float64"], structures=["dict", "list"]),
)
def test_a_residual_is_the_sum_of_its_codings(first, second, update):
    one, two = fc.parse(first), fc.parse(second)
    spec = fc.Spec.of(update)
    untied = [
        np.ascontiguousarray(array)
        for array, tensor in zip(values(update), spec.tensors, strict=True)
        if tensor.tied_to is None
    ]
    untied = [array.astype(array.dtype.newbyteorder("=")) for array in untied]
    coded = fc.decode(one.encode(untied, seed=3))
    missed = [x - y for x, y in zip(untied, coded, strict=True)]
    rest = fc.decode(two.encode(missed, seed=3))
    payload = fc.Residual(one, two).encode(untied, seed=3)
    assume(fc.inspect(payload).codec != "raw")  # two codings can be larger than the update
    together = fc.decode(payload)
    assert same(together, [x + y for x, y in zip(coded, rest, strict=True)])


def values(update):
    return list(update.values()) if isinstance(update, dict) else update


@given(updates(structures=["dict"]))
def test_a_residual_of_raw_loses_nothing(update):
    check_update(fc.parse("residual(sparse; raw)"), update, bound=lambda given: [0 for _ in given])


@given(st.sampled_from(PIPELINES), updates(structures=["dict"]), st.binary(min_size=8, max_size=8))
def test_base_and_framing_change_the_header_only(codec, update, base):
    inline, named = codec.encode(update), codec.encode(update, framing="reference")
    based = codec.encode(update, base=base)
    assert len(based) == len(inline) + 8
    info = fc.inspect(based)
    assert (info.base, info.framing, info.spec) == (base, "inline", fc.Spec.of(update))
    assert fc.inspect(named).spec_digest == info.spec_digest == fc.Spec.of(update).digest
    body = fc.inspect(inline).body_nbytes
    assert info.body_nbytes == fc.inspect(named).body_nbytes == body
    assert inline[-4 - body : -4] == named[-4 - body : -4] == based[-4 - body : -4]
    with pytest.raises(fc.DecodeError, match=base.hex()):
        fc.decode(based, shared=fc.Shared())
    with pytest.raises(fc.DecodeError, match="pass like="):
        fc.decode(named)


@pytest.mark.parametrize(
    "text", ["int8(stochastic=True)", "randomk(0.5)", "kbit(2, stochastic=True)"]
)
def test_seeds_change_what_is_drawn(text):
    update = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    codec = fc.parse(text)
    payloads = [codec.encode(update, seed=seed) for seed in (None, 0, 1, 2**63)]
    payloads.append(fc.from_config(codec.config() | {"seed": 1}).encode(update))
    assert payloads[0] == payloads[1]
    assert len(set(payloads[1:])) == 4


def test_stochastic_rounding_is_right_on_average():
    update = np.full(200_000, 0.3, np.float32)
    update[0] = 1
    for text in (
        "kbit(2, block_size=None, stochastic=True)",
        "int8(block_size=None, stochastic=True)",
    ):
        mean = fc.decode(fc.parse(text).encode(update)).mean(dtype=np.float64)
        assert abs(mean - update.mean(dtype=np.float64)) < 0.005, text


@pytest.mark.parametrize("density", [0.001, 0.01, 0.0125, 0.5, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 49, 200, 1000])
def test_exactly_k_are_kept_and_ties_go_to_the_lower_index(n, density):
    k = max(1, round(density * n))
    equal = np.full(n, -2, np.float32)
    assert same(
        fc.decode(fc.TopK(density).encode(equal)), np.where(np.arange(n) < k, equal, np.float32(0))
    )
    kept = fc.decode(fc.RandomK(density).encode(equal))
    assert np.count_nonzero(kept) == k


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_are_64_bits(seed):
    with pytest.raises(ValueError, match="seed"):
        fc.Raw().encode(np.zeros(1, np.float32), seed=seed)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"framing": "outline"}, ValueError),
        ({"base": b"short"}, ValueError),
        ({"base": "12345678"}, ValueError),
        ({"seed": 1.5}, TypeError),
        ({"seed": "1"}, TypeError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        fc.Raw().encode(np.zeros(1, np.float32), **arguments)


@pytest.mark.parametrize(
    "text", ["topk(0.1)", "topk(0.1) | ternary", "threshold(0.5) | int8", "int8"]
)
def test_values_that_change_meanwhile_give_a_payload_or_an_error(text):
    """As where a thread trains the very model that is encoded."""
    start = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    values, codec = start.copy(), fc.parse(text)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            values[:] = 100 * start
            values[:] = start / 1000

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(100):
            with contextlib.suppress(RuntimeError):
                fc.decode(codec.encode(values))
    finally:
        stop.set()
        thread.join()
