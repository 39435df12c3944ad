import pytest

import fedcodec as fc
from fedcodec.sim.links import LINKS, Link, parse_link
from fedcodec.sim.sizes import binary_entropy, ideal_bytes

MLP = [784 * 128, 128, 128 * 64, 64, 64 * 10, 10]
PARAMETERS = sum(MLP)


def test_transfer_takes_latency_both_ways_and_each_direction_at_its_own_rate():
    link = Link("test", uplink=1000.0, downlink=8000.0, latency=0.25)
    assert link.seconds(downlink_bytes=2000, uplink_bytes=500) == 0.5 + 2.0 + 4.0


def test_presets_are_found_by_name_and_ordered_by_speed():
    seconds = [parse_link(name).seconds(100_000, 100_000) for name in LINKS]
    assert seconds == sorted(seconds, reverse=True)


def test_a_link_can_be_given_by_its_figures():
    link = parse_link("2,10,30")
    assert (link.uplink, link.downlink, link.latency) == (2e6, 10e6, 0.03)


@pytest.mark.parametrize(
    "text", ["", "isdn", "1,2", "1,2,3,4", "0,1,1", "1,-1,1", "1,1,-1", "nan,1,1", "inf,1,1"]
)
def test_other_links_are_refused(text):
    with pytest.raises(ValueError, match="unknown link"):
        parse_link(text)


@pytest.mark.parametrize(("probability", "entropy"), [(0, 0), (1, 0), (0.5, 1), (0.11, 0.49992)])
def test_binary_entropy(probability, entropy):
    assert binary_entropy(probability) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("density", "ratio"), [(0.05, 95), (0.02, 198), (0.01, 352), (0.002, 1389)]
)
def test_ideal_ratios_of_sparse_ternary(density, ratio):
    ideal = ideal_bytes(fc.parse(f"topk({density}) | ternary"), MLP)
    assert ideal is not None
    assert 4 * PARAMETERS / ideal == pytest.approx(ratio, rel=0.005)


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("raw", 4 * PARAMETERS),
        ('cast("bfloat16")', 2 * PARAMETERS),
        ("sign", PARAMETERS / 8 + 4 * 6),
        ("int8", PARAMETERS + 4 * (98 + 1 + 8 + 1 + 1 + 1)),
        ("int8(block_size=100000)", PARAMETERS + 4 * (2 + 5)),
        ("kbit(4)", PARAMETERS / 2 + 4 * (98 + 1 + 8 + 1 + 1 + 1)),
        ("randomk(0.01)", 4 * 1094),
        ("randomk(0.1) | int8", 10939 + 4 * 11),
        ("topk(0.5)", (PARAMETERS + 32 * PARAMETERS / 2) / 8),
    ],
)
def test_ideal_sizes_by_hand(codec, expected):
    assert ideal_bytes(fc.parse(codec), MLP) == pytest.approx(expected)


def test_scope_tensor_has_positions_and_scales_of_each_tensor():
    sizes = [4, 8]
    # 0.3 of 4 and of 8 are rounded to 1 and 2
    expected = (4 * binary_entropy(1 / 4) + 8 * binary_entropy(2 / 8) + 3) / 8 + 2 * 4
    ideal = ideal_bytes(fc.parse('topk(0.3, scope="tensor") | ternary'), sizes)
    assert ideal == pytest.approx(expected)


@pytest.mark.parametrize(
    "codec",
    [
        "threshold(value=0.1)",
        "topk(0.1) | int8 | zstd",
        "int8(axis=0)",
        "residual(sign; sign)",
        'rules(raw; "*" = sign)',
    ],
)
def test_ideals_that_are_not_known_are_none(codec):
    assert ideal_bytes(fc.parse(codec), MLP) is None
