"""Payloads of the past decode to what they meant. The files are data: tests/golden/add.py wrote them, once."""

import sys
from pathlib import Path

import numpy as np
import pytest

import fedcodec as fc
from fedcodec.testing import same

HERE = Path(__file__).parent / "golden"
sys.path.insert(0, str(HERE))
from cases import CASES, codec_of, shared_for  # noqa: E402

pytestmark = pytest.mark.native

NAMES = [case[0] for case in CASES]


def tensors_of(update):
    if isinstance(update, dict):
        return list(update.values())
    return update if isinstance(update, list) else [update]


def test_every_case_has_its_files_and_every_file_its_case():
    assert sorted(path.stem for path in HERE.glob("*.fc")) == sorted(NAMES)
    assert sorted(path.stem for path in HERE.glob("*.npz")) == sorted(NAMES)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_golden_payload_decodes_to_golden_values(case, isa):
    name, text, update, _ = case
    codec = codec_of(text)
    decoded = fc.decode(
        (HERE / f"{name}.fc").read_bytes(), like=update, shared=shared_for(codec, update)
    )
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as expected:
        values = [expected[f"arr_{number}"] for number in range(len(expected.files))]
    assert same(tensors_of(decoded), values)
    if isinstance(update, dict):
        assert list(decoded) == list(update)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_golden_updates_encode_to_golden_payloads(case, isa):
    name, text, update, arguments = case
    codec = codec_of(text)
    payload = codec.encode(update, **arguments)
    golden = (HERE / f"{name}.fc").read_bytes()
    if codec.determinism == "version":  # of Zstandard: its bytes may change, what they say may not
        shared = shared_for(codec, update)
        assert same(fc.decode(payload, shared=shared), fc.decode(golden, shared=shared))
    else:
        assert payload == golden


def test_what_the_files_say_of_themselves():
    """Enough of the kinds of payloads are among them, so that none can leave unnoticed."""
    found = [fc.inspect((HERE / f"{name}.fc").read_bytes()) for name in NAMES]
    assert {info.version for info in found} == {1}
    assert {info.framing for info in found} == {"inline", "reference"}
    assert any(info.base for info in found)
    assert any(info.table_digest for info in found)
    text = " ".join(info.codec or "" for info in found)
    stages = ["sparse", 'scope="tensor"', "randomk", "mask(", "int8", "kbit(2", "kbit(7", "axis=", "sign", "float16",
              "bfloat16", "residual", "zstd", "block_size=None", "structured", "structured(axis=1)"]  # fmt: skip
    assert [stage for stage in stages if stage not in text] == []
