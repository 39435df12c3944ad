"""OpenFL's pipeline through its own plan, protocol buffers and TensorCodec."""

import numpy as np
import pytest

import fedcodec as fc

pytest.importorskip("openfl")

from openfl.federated import Plan
from openfl.pipelines import NoCompressionPipeline, TensorCodec
from openfl.protocols import base_pb2, utils
from openfl.utilities import TensorKey

from fedcodec.adapters.openfl import CodecPipeline, CodecTransformer


def model():
    draw = np.random.default_rng(0)
    return {
        "weight": draw.normal(size=(20, 10)).astype("f4"),
        "half": draw.normal(size=7).astype("f2"),
        "double": draw.normal(size=3),
        "scale": np.array(0.5, "f4"),
        "steps": np.array(7, "i8"),
        "none": np.zeros((0, 3), "f4"),
    }


def travelled(named):
    """Return a NamedTensor's bytes and metadata as the other end reads them."""
    proto = base_pb2.NamedTensor.FromString(named.SerializeToString())
    metadata = [
        {
            "int_to_float": part.int_to_float,
            "int_list": part.int_list,
            "bool_list": part.bool_list,
        }
        for part in proto.transformer_metadata
    ]
    return proto, metadata


@pytest.mark.parametrize(
    "codec", ["raw", "raw | zstd", "int8", 'cast("float16") | zstd', "kbit(4)"]
)
def test_a_delta_goes_through_openfl_s_tensor_codec(codec):
    tensors = TensorCodec(CodecPipeline(codec))
    for name, base in model().items():
        key = TensorKey(name, "collaborator", 1, False, ("trained",))
        delta_key, delta = tensors.generate_delta(key, base + base, base)
        packed_key, payload, metadata = tensors.compress(delta_key, delta, lossless=False)
        named = utils.construct_named_tensor(packed_key, payload, metadata, lossless=False)
        proto, metadata = travelled(named)
        got_key = TensorKey(name, "collaborator", 1, False, tuple(proto.tags))
        got_key, got = tensors.decompress(got_key, proto.data_bytes, metadata)
        wanted = fc.decode(fc.parse(codec).encode(base))
        assert (got.dtype, got.shape) == (base.dtype, base.shape)
        assert np.array_equal(got, wanted)
        assert "delta" in got_key.tags
        _, whole = tensors.apply_delta(got_key, got, base)
        assert np.array_equal(whole, base + wanted)


def test_a_model_is_stored_and_read_in_its_dtypes():
    pipeline = CodecPipeline("int8")
    stored = utils.construct_model_proto(model(), 3, pipeline).SerializeToString()
    assert len(stored) < sum(array.nbytes for array in model().values())
    read, number = utils.deconstruct_model_proto(base_pb2.ModelProto.FromString(stored), pipeline)
    assert number == 3
    for name, array in model().items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(read[name], fc.decode(fc.Int8().encode(array)))


@pytest.mark.filterwarnings("ignore:`newshape`:DeprecationWarning")  # OpenFL's own
@pytest.mark.parametrize(
    ("codec", "lossy"),
    [
        ("raw", False),
        ("raw | zstd", False),
        ("int8", True),
        ('cast("float16")', True),
        ('rules(raw; "*.bias" = int8)', True),
    ],
)
def test_a_lossy_codec_says_so_and_what_must_be_exact_goes_without_it(codec, lossy):
    pipeline = CodecPipeline(codec)
    assert pipeline.is_lossy() is lossy
    tensors = TensorCodec(pipeline)
    assert isinstance(tensors.lossless_pipeline, NoCompressionPipeline) is lossy
    key = TensorKey("accuracy", "collaborator", 1, True, ("metric",))
    metric = np.array(0.123456789, "f4")
    packed_key, payload, metadata = tensors.compress(key, metric, require_lossless=True)
    _, got = tensors.decompress(packed_key, payload, metadata, require_lossless=True)
    assert got == metric


def test_a_plan_builds_it():
    plan = Plan()
    plan.config = {
        "compression_pipeline": {
            "template": "fedcodec.adapters.openfl.CodecPipeline",
            "settings": {"codec": "int8"},
        }
    }
    pipeline = plan.get_tensor_pipe()
    assert isinstance(pipeline, CodecPipeline)
    assert str(pipeline.transformers[0].codec) == "int8"


def test_draws_differ_by_tensor_but_not_by_call():
    transformer = CodecTransformer("int8(stochastic=True)")
    first = np.linspace(0, 1, 999, dtype="f4")
    payload = transformer.forward(first)[0]
    assert payload == transformer.forward(first.copy())[0]
    assert payload != fc.parse("int8(stochastic=True)").encode(first)
    second = first.copy()
    second[0] = 1e-3
    rounded, other = (transformer.backward(transformer.forward(t)[0], {}) for t in (first, second))
    assert np.count_nonzero(rounded[1:] != other[1:]) > 100


def test_codecs_that_would_empty_stored_models_are_refused():
    for codec in ("topk(0.01)", 'rules(int8; "*.bias" = randomk(0.5))'):
        with pytest.raises(ValueError, match="set weights to zero"):
            CodecPipeline(codec)
    with pytest.raises(ValueError, match="unknown"):
        CodecPipeline("unknown(1)")
    with pytest.raises(TypeError, match="codec"):
        CodecPipeline(3)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        bytes(64),
        fc.Int8().encode(np.ones(9, "f4"))[:-1],
        fc.Int8().encode({"weight": np.ones(9, "f4")}),
        fc.Int8().encode(np.ones(9, "f4"), framing="reference"),
    ],
)
def test_bad_payloads_are_decode_errors(hostile):
    with pytest.raises(fc.DecodeError):
        CodecPipeline("int8").backward(hostile, [{}])
