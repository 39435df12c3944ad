"""Codecs as text and as plain data, and messages that say what is wrong, where, and what is meant."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fedcodec as fc
from fedcodec import registry
from fedcodec.codec import Codec

TEXTS = [
    "raw",
    "topk(0.01)",
    'topk(1e-05, scope="tensor")',
    "threshold(value=0.5)",
    'threshold(percentile=99.5, interpolation="higher", scope="tensor")',
    'randomk(0.1, scope="tensor", seed=18446744073709551615)',
    "sparse",
    'sparse(scope="tensor")',
    'mask("0123456789abcdef")',
    'autoencoder("0123456789abcdef0123456789abcdef") | int8',
    "structured",
    "structured(0.7)",
    "structured(0.7, axis=1, order=1)",
    "structured(axis=31)",
    "int8",
    "int8(block_size=None)",
    "int8(axis=0, stochastic=True, seed=7)",
    "kbit(4, block_size=256)",
    "sign",
    'cast("bfloat16")',
    "topk(0.01) | int8",
    "topk(0.01) | ternary | zstd(level=19)",
    "residual(sign; topk(0.01) | int8)",
    "residual(topk(0.1) | ternary; raw) | zstd",
    'rules(topk(0.01) | int8; "*.bias" = raw; "\\"quoted\\" \\\\ \\n" = sign)',
    'rules(topk(0.01); "\u00e9\U0001f600" = residual(sign; int8))',
    "rules(raw)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_config_give_the_codec_back(text):
    codec = fc.parse(text)
    assert str(codec) == text
    assert fc.parse(str(codec)) == codec
    config = json.loads(json.dumps(codec.config()))
    assert fc.from_config(config) == codec
    assert fc.from_config(config).config() == codec.config()
    assert hash(fc.parse(text)) == hash(codec)


@pytest.mark.parametrize("text", TEXTS)
def test_repr_is_python(text):
    codec = fc.parse(text)
    assert eval(repr(codec), vars(fc)) == codec


def test_texts_name_every_stage():
    used = "".join(TEXTS)
    # Other tests and the docstrings register stages of their own in this process.
    ours = [
        name
        for name in registry.stage_names()
        if registry.stage_class(name).__module__.startswith("fedcodec.codecs")
    ]
    missing = [name for name in ours if name not in used]
    assert ours
    assert missing == []


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("  topk( 0.01 )|int8( ) ", "topk(0.01) | int8"),
        ("int8(1024, None, False, 0)", "int8"),
        ("int8(None)", "int8(block_size=None)"),
        ("topk(density=.5)", "topk(0.5)"),
        ('topk(5e-1, "tensor")', 'topk(0.5, scope="tensor")'),
        ("residual(sign, raw)", "residual(sign; raw)"),
        ("threshold(+.5)", "threshold(value=0.5)"),
        ("cast(float16)", 'cast("float16")'),
        ("topk(0.1, scope=tensor)", 'topk(0.1, scope="tensor")'),
        ("topk(0.1, tensor)", 'topk(0.1, scope="tensor")'),
        ("mask(deadbeefdeadbeef)", 'mask("deadbeefdeadbeef")'),
        ("topk(1)\n|\tternary", "topk(1) | ternary"),
    ],
)
def test_other_spellings(text, meant):
    assert str(fc.parse(text)) == meant


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "the end", "expected a stage"),
        ("   ", "the end", "expected a stage"),
        ("topk(0.01) |", "the end", "expected a stage"),
        ("| int8", "character 0 (| int8)", "expected a stage"),
        ("raw int8", "character 4 (int8)", "unexpected text"),
        ("raw)", "character 3 ())", "unexpected text"),
        ("topk(0.01", "the end", "expected ','"),
        ("topk(0.01 2)", "character 10 (2))", "expected ','"),
        ("topk(0.01,)", "character 10 ())", "expected a stage"),
        ("topk(density=)", "character 13 ())", "expected a number or a string"),
        ("topk(0.01) $ int8", "character 11 ($ int8)", "unexpected character"),
        ('cast("float16)', 'character 5 ("float16))', "unexpected character"),
        ("topk(0x10)", "character 6 (x10))", "expected ','"),
        ("topk(1__0)", "character 6 (__0))", "expected ','"),
        ("topk(007)", "character 5 (007))", "expected a number or a string"),
        ("topk(0.1) | int9", "character 12 (int9)", "unknown stage 'int9'; did you mean int8?"),
        ("top_k(0.01)", "character 0", "unknown stage 'top_k'; did you mean topk?"),
        ("raw | TopK(0.01)", "character 6", "unknown stage 'TopK'; did you mean topk?"),
        ("residual(sgn; raw)", "character 9", "unknown stage 'sgn'; did you mean sign?"),
        ("huffman", "character 0", "unknown stage 'huffman'; there are autoencoder, "),
        ("threshold(precentile=3)", "character 0", "'precentile'; did you mean percentile?"),
        ("threshold", "character 0", "threshold needs either value= or percentile="),
        ("topk(0.1, scope=layer)", "character 0", "scope is 'layer', it must be one of"),
        ("topk(0.1) | sign", "character 12", "such as topk(0.01) | ternary"),
        (
            "raw | topk(2)",
            "character 6 (topk(2))",
            "density is 2, it must be above 0 and at most 1",
        ),
        ("topk", "character 0 (topk)", "topk needs density"),
        (
            "int8(axes=1)",
            "character 0 (int8(axes=1))",
            "int8 has no parameter 'axes'; did you mean axis?",
        ),
        ("int8(axis=1, axis=2)", "character 13 (axis=2))", "axis is given twice"),
        ('rules(raw; "a" = raw; "a" = int8)', 'character 22 ("a" = int8))', "given twice"),
        ("rules(raw; a = raw)", "character 11 (a = raw))", "expected a number or a string"),
        ("rules(raw; 5 = raw)", "character 11 (5 = raw))", "expected a pattern in quotes"),
        ("rules", "the end", "expected '('"),
        ("rules()", "character 6 ())", "expected a stage"),
        ("residual(sign | zstd; raw)", "character 0", "put the lossless stage after residual(...)"),
        ("residual(ternary; raw)", "character 0", "ternary needs a select stage before it"),
        (
            "residual(raw; residual(sign; raw))",
            "character 0",
            "cannot stand inside another residual",
        ),
        (
            "residual(residual(sign; raw); raw)",
            "character 0",
            "cannot stand inside another residual",
        ),
    ],
)
def test_errors_name_the_place(text, place, what):
    with pytest.raises(ValueError, match="codec") as caught:
        fc.parse(text)
    assert f"at {place}" in str(caught.value)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10**6,
        "topk(" + "x" * 10**6 + "=1)",
        "cast(" + "x" * 10**6 + ")",
        "raw" + " " * 10**6 + "!",
        "raw | " * 10**5,
        "rules(raw" + '; "a" = raw' * 10**5,
    ],
    ids=lambda text: text[:8],
)
def test_errors_do_not_repeat_a_huge_text(text):
    with pytest.raises(ValueError, match="codec") as caught:
        fc.parse(text)
    assert len(str(caught.value)) < 600


ORDER = "a pipeline is transform | select | quantize | lossless, one stage of each kind at most"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8 | topk(0.1)", f"int8 (quantize) cannot stand before topk(0.1) (select): {ORDER}"),
        ("zstd | int8", f"zstd (lossless) cannot stand before int8 (quantize): {ORDER}"),
        ("zstd | topk(0.1)", f"zstd (lossless) cannot stand before topk(0.1) (select): {ORDER}"),
        ("raw | int8", f"raw (quantize) cannot stand before int8 (quantize): {ORDER}"),
        ("topk(0.1) | sparse", f"topk(0.1) (select) cannot stand before sparse (select): {ORDER}"),
        ("zstd | zstd", f"zstd (lossless) cannot stand before zstd (lossless): {ORDER}"),
        ("int8 | ternary", ORDER),
        ("topk(0.1) | sign", "sign cannot follow a select stage"),
        ("topk(0.1) | int8(axis=0)", "int8(block_size=1024, axis=0) cannot follow a select stage"),
        ("topk(0.1) | residual(sign; raw)", "only a lossless stage may stand beside it"),
        ("residual(sign; raw) | int8", ORDER),
    ],
)
def test_a_meaningless_order_is_refused_with_the_one_that_is_meant(text, message):
    message = message.replace("block_size=1024, ", "")
    with pytest.raises(ValueError, match="codec") as caught:
        fc.parse(text)
    assert message in str(caught.value)
    left, _, right = text.partition(" | ")
    with pytest.raises(ValueError, match=r"\w") as direct:
        fc.parse(left) | fc.parse(right)
    assert message in str(direct.value)


def test_a_stage_that_needs_another_says_so_when_it_is_used():
    with pytest.raises(ValueError, match=r"such as topk\(0.01\) \| ternary"):
        fc.Ternary().encode(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"such as topk\(0.01\) \| ternary"):
        fc.Ternary() | fc.Zstd()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fc.TopK(0.1) | "int8", r"use fedcodec.parse\('int8'\)"),
        (lambda: "topk(0.1)" | fc.Int8(), r"use fedcodec.parse\('topk\(0.1\)'\)"),
        (lambda: fc.Raw() | 5, "unsupported operand"),
        (lambda: 5 | fc.Raw(), "unsupported operand"),
        (lambda: fc.Mask(np.array([True, False])), r"digest is a ndarray: use Mask.of\(mask\)"),
        (lambda: fc.from_config({"stage": "topk", "densty": 0.1}), "did you mean density"),
        (lambda: fc.from_config({"stage": "topk"}), "^topk needs density$"),
        (lambda: fc.from_config({"stage": "residual"}), "^residual needs first$"),
    ],
)
def test_a_mistake_is_answered_with_what_is_meant(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8(stochastic=true)", "did you mean True"),
        ("int8(stochastic=FALSE)", "did you mean False"),
        ("int8(axis=none)", "did you mean None"),
        ("topk", "topk needs density"),
    ],
)
def test_a_mistake_in_a_text_is_answered_with_what_is_meant(text, message):
    with pytest.raises(ValueError, match=message):
        fc.parse(text)


def test_rules_are_the_whole_of_a_codec():
    rules = fc.Raw().for_names({"a": fc.Int8()})
    for build in (
        lambda: rules | fc.Zstd(),
        lambda: fc.TopK(0.1) | rules,
        lambda: fc.Residual(rules, fc.Raw()),
        lambda: fc.Raw().for_names({"a": rules}),
        lambda: rules.for_names({"b": fc.Raw()}),
        lambda: fc.from_config({"pipeline": [rules.config()]}),
    ):
        with pytest.raises(ValueError, match="already has rules"):
            build()


@pytest.mark.parametrize("value", [None, 5, b"raw", ["raw"], fc.Raw()])
def test_text_is_text(value):
    with pytest.raises(TypeError, match="expected the text of a codec"):
        fc.parse(value)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, ValueError),
        ({"stage": "nothing"}, ValueError),
        ({"stage": "topk"}, TypeError),
        ({"stage": "topk", "density": 2}, ValueError),
        ({"stage": "topk", "density": "0.1"}, TypeError),
        ({"stage": "topk", "density": 0.1, "more": 1}, TypeError),
        (None, TypeError),
        ("raw", TypeError),
        ({"pipeline": 3}, TypeError),
        ({"pipeline": [3]}, TypeError),
        ({"rules": 3, "default": {"stage": "raw"}}, TypeError),
        ({"rules": []}, ValueError),
        ({"rules": [3], "default": {"stage": "raw"}}, ValueError),
        ({"rules": [["*"]], "default": {"stage": "raw"}}, ValueError),
        ({"pipeline": []}, ValueError),
        ({"pipeline": [{"stage": "int8"}, {"stage": "raw"}]}, ValueError),
    ],
)
def test_bad_configs(config, error):
    with pytest.raises(error, match=r"config|topk|density|stage"):
        fc.from_config(config)


@pytest.mark.parametrize(
    ("codec", "same_as"),
    [
        (lambda: fc.TopK(np.float64(0.01)), lambda: fc.TopK(0.01)),
        (lambda: fc.TopK(np.float32(0.5)), lambda: fc.TopK(0.5)),
        (lambda: fc.TopK(np.float32(0.01)), lambda: fc.TopK(float(np.float32(0.01)))),
        (
            lambda: fc.Int8(np.int16(77), stochastic=np.bool_(True), seed=np.uint64(2**63)),
            lambda: fc.Int8(77, stochastic=True, seed=2**63),
        ),
        (lambda: fc.RandomK(np.float32(0.25), seed=np.int8(3)), lambda: fc.RandomK(0.25, seed=3)),
        (lambda: fc.Threshold(np.float16(0.1)), lambda: fc.Threshold(float(np.float16(0.1)))),
        (lambda: fc.KBit(np.int64(4)), lambda: fc.KBit(4)),
        (lambda: fc.Zstd(np.int32(5)), lambda: fc.Zstd(5)),
    ],
)
def test_numpy_numbers_are_numbers(codec, same_as):
    made, meant = codec(), same_as()
    assert (made, str(made), repr(made)) == (meant, str(meant), repr(meant))
    assert json.dumps(made.config()) == json.dumps(meant.config())
    update = np.linspace(-1, 1, 999, dtype=np.float32)
    assert made.encode(update) == meant.encode(update) == fc.parse(str(made)).encode(update)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: fc.TopK(0), ValueError),
        (lambda: fc.TopK(1.0001), ValueError),
        (lambda: fc.TopK(-1), ValueError),
        (lambda: fc.TopK(float("nan")), ValueError),
        (lambda: fc.TopK(True), TypeError),
        (lambda: fc.TopK("0.1"), TypeError),
        (lambda: fc.TopK(0.1, "layer"), ValueError),
        (lambda: fc.RandomK(0), ValueError),
        (lambda: fc.RandomK(0.1, seed=-1), ValueError),
        (lambda: fc.RandomK(0.1, seed=2**64), ValueError),
        (lambda: fc.RandomK(0.1, seed=0.5), TypeError),
        (lambda: fc.Structured(0), ValueError),
        (lambda: fc.Structured("all"), TypeError),
        (lambda: fc.Structured(0.5, 1), TypeError),
        (lambda: fc.Structured(axis=32), ValueError),
        (lambda: fc.Structured(axis=-1), ValueError),
        (lambda: fc.Structured(axis=None), TypeError),
        (lambda: fc.Structured(order=0), ValueError),
        (lambda: fc.Structured(order=3), ValueError),
        (lambda: fc.Structured(order=2.0), TypeError),
        (lambda: fc.Threshold(), ValueError),
        (lambda: fc.Threshold(1, 50), ValueError),
        (lambda: fc.Threshold(-0.1), ValueError),
        (lambda: fc.Threshold(float("inf")), ValueError),
        (lambda: fc.Threshold("a"), TypeError),
        (lambda: fc.Threshold(percentile=100.5), ValueError),
        (lambda: fc.Threshold(percentile=float("nan")), ValueError),
        (lambda: fc.Threshold(percentile="a"), TypeError),
        (lambda: fc.Threshold(0.1, interpolation="nearest"), ValueError),
        (lambda: fc.Int8(0), ValueError),
        (lambda: fc.Int8(2**41), ValueError),
        (lambda: fc.Int8(1.5), TypeError),
        (lambda: fc.Int8(axis=-1), ValueError),
        (lambda: fc.Int8(stochastic="no"), TypeError),
        (lambda: fc.KBit(1), ValueError),
        (lambda: fc.KBit(8), ValueError),
        (lambda: fc.Cast("float32"), ValueError),
        (lambda: fc.Zstd(0), ValueError),
        (lambda: fc.Zstd(23), ValueError),
        (lambda: fc.Mask("xyz"), ValueError),
        (lambda: fc.Mask("0" * 16, fc.MaskBits(b"\1", 1)), ValueError),
        (lambda: fc.Residual(fc.Raw(), "raw"), TypeError),
        (lambda: fc.parse("residual(" * 5 + "raw" + "; raw)" * 5), ValueError),
        (lambda: fc.Raw().for_names({"a": "int8"}), TypeError),
    ],
)
def test_parameters_are_checked_when_the_codec_is_made(make, error):
    with pytest.raises(error):
        make()


def test_rules_match_in_order_and_case_matters():
    rules = fc.Raw().for_names({"a*": fc.Sign(), "*": fc.Int8(), "b": fc.TopK(0.1)})
    assert [rules.pipeline_of(name) for name in ("abc", "ABC", "b", "")] == [1, 2, 2, 2]
    assert fc.Raw().for_names({"[ab]?": fc.Sign()}).pipeline_of("c.") == 0


TOKENS = st.sampled_from(
    [
        "topk",
        "int8",
        "raw",
        "rules",
        "residual",
        "zstd",
        "ternary",
        "(",
        ")",
        "|",
        ";",
        ",",
        "=",
        " ",
        "0.5",
        "1e400",
        "-1",
        '"*"',
        '"',
        "axis",
        "True",
        "None",
        "\\",
        "\n",
        "\x00",
        "\u00e9",
        "9" * 30,
    ]
)


@given(st.lists(TOKENS, max_size=14).map("".join) | st.text(max_size=20))
@example("(" * 20_000)
@example("residual(" * 20_000)
@example("rules(" * 20_000)
@example("topk(" + "1-" * 20_000)
@example("topk(" + "9" * 20_000 + ")")
def test_any_text_is_a_codec_or_a_value_error(text):
    try:
        codec = fc.parse(text)
    except ValueError:
        return
    assert isinstance(codec, Codec)
    assert fc.parse(str(codec)) == codec


@given(st.text(max_size=12), st.text(max_size=12))
def test_patterns_are_any_text(first, second):
    codec = fc.Raw().for_names({first: fc.Int8(), second: fc.Sign()})
    assert fc.parse(str(codec)) == codec
    assert fc.from_config(json.loads(json.dumps(codec.config()))) == codec
