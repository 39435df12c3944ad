"""Sparse index sets: the layout of docs/format.md, the choices of docs/numerics.md, and the size they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcodec.errors import DecodeError
from fedcodec.ops import reference

BITMAP, LIST, RICE = 0, 1, 2


def leb(value: int) -> bytes:
    out = []
    while True:
        value, low = value >> 7, value & 127
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def bits_to_bytes(bits: str) -> bytes:
    """Character i of the string is bit i."""
    return int(bits[::-1] or "0", 2).to_bytes((len(bits) + 7) // 8, "little")


def tile_by_hand(kept: list[int], length: int, t: int) -> tuple[bytes, bytes]:
    """Every possible coding written out, the one of the rule picked."""
    flag, coded = 0, kept
    if 2 * len(kept) > length:
        flag, coded = 4, sorted(set(range(length)) - set(kept))
    c = len(coded)
    if c == 0:
        return bytes([flag | (LIST if t == 16 else RICE)]) + leb(0), b""
    gaps = [b - a - 1 for a, b in zip([-1, *coded], coded, strict=False)]
    most = int(math.log2(max(1, (coded[-1] - (c - 1)) // c)))
    rices = []
    for r in range(max(0, most - 2), most + 1):
        remainders = "".join(f"{gap % 2**r:0{r}b}"[::-1] for gap in gaps) if r else ""
        unary = "".join("0" * (gap >> r) + "1" for gap in gaps)
        data = bits_to_bytes(remainders) + bits_to_bytes(unary)
        rices.append((bytes([flag | RICE | r << 3]) + leb(c) + leb(len(unary)), data))
    choices = [min(rices, key=lambda rice: len(rice[1]))]
    if t == 16:
        listed = b"".join(p.to_bytes(2, "little") for p in coded)
        choices.insert(0, (bytes([flag | LIST]) + leb(c), listed))
    bitmap = (
        "".join("1" if i in set(kept) else "0" for i in range(length)) if length < 5000 else None
    )
    if bitmap is None:
        marks = np.zeros(length, np.uint8)
        marks[kept] = 1
        bitmap = "".join(map(str, marks))
    choices.append((bytes([BITMAP]) + leb(len(kept)), bits_to_bytes(bitmap)))
    return min(choices, key=lambda choice: len(choice[0]) + len(choice[1]))


def pack_by_hand(positions: list[int], n: int) -> bytes:
    s, k, most = 0, len(positions), 31
    if k > n // 2:
        k, most = n - k, 20
    while 16 + s < most and k * 2 ** (16 + s) < 512 * n and 2 ** (16 + s) < n:
        s += 1
    t = 16 + s
    headers, data = [], []
    for start in range(0, n, 2**t):
        length = min(2**t, n - start)
        header, body = tile_by_hand(
            [p - start for p in positions if start <= p < start + length], length, t
        )
        headers.append(header)
        data.append(body)
    return bytes([t]) + b"".join(headers) + b"".join(data)


@pytest.mark.parametrize(
    ("positions", "n", "expected"),
    [
        ([], 0, "10"),
        ([], 5, "10 01 00"),
        ([0, 1, 2, 3, 4], 5, "10 05 00"),
        ([1, 3], 5, "10 00 02 0a"),
        ([2], 1000, "10 01 01 02 00"),
        (sorted({*range(1000)} - {2}), 1000, "10 05 01 02 00"),
        (range(100_000), 100_000, "11 06 00"),
        (range(2**20 + 1), 2**20 + 1, "14 06 00 06 00"),
        # S = 100, c = 1, r0 = 6: r = 4, 5 and 6 take 2 bytes, so 4; the remainder is 4, u = 1 + (100 >> 4) = 7.
        ([100], 1_000_000, "14 22 01 07 04 40"),
    ],
)
def test_bytes_worked_out_by_hand(positions, n, expected):
    packed = reference.pack_sparse(np.array(positions, np.int64), n)
    assert packed.hex(" ") == expected
    positions_back, used = reference.unpack_sparse(packed, n)
    assert positions_back.tolist() == list(positions)
    assert used == len(packed)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 7, 8, 9, 65535, 65536, 65537, 131072, 140000, 400_000]),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_packing_follows_the_rule(n, density, dense, seed):
    rng = np.random.default_rng(seed)
    k = round(n * density**4)
    k = n - k if dense else k
    positions = np.sort(rng.choice(n, k, replace=False)).astype(np.int64)
    packed = reference.pack_sparse(positions, n)
    assert packed == pack_by_hand(positions.tolist(), n)
    back, used = reference.unpack_sparse(packed + b"more", n)
    assert back.dtype == np.int64
    assert np.array_equal(back, positions)
    assert used == len(packed)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200_000),
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 3000)), max_size=6),
)
def test_runs_and_islands(n, runs):
    mask = np.zeros(n, np.bool_)
    for start, length in runs:
        mask[start % n : start % n + length] ^= True
    for positions in (np.flatnonzero(mask), np.flatnonzero(~mask)):
        packed = reference.pack_sparse(positions, n)
        assert packed == pack_by_hand(positions.tolist(), n)
        assert np.array_equal(reference.unpack_sparse(packed, n)[0], positions)


def test_a_large_tile_of_which_all_is_kept():
    n = (8 << 17) + 300
    positions = np.concatenate([np.arange(0, n - 300, 230), np.arange(n - 300, n)])
    packed = reference.pack_sparse(positions, n)
    assert packed[0] == 17
    assert packed.count(b"\x06\x00") >= 1  # the complement, in Rice codes, of nothing
    assert packed == pack_by_hand(positions.tolist(), n)
    assert np.array_equal(reference.unpack_sparse(packed, n)[0], positions)


@pytest.mark.parametrize(
    ("density", "bar"), [(0.0001, 1.10), (0.001, 1.05), (0.01, 1.05), (0.1, 1.05), (0.5, 1.05)]
)
def test_size_is_close_to_the_entropy(density, bar):
    n = 4_000_000
    k = round(n * density)
    positions = np.sort(np.random.default_rng(7).choice(n, k, replace=False))
    packed = reference.pack_sparse(positions, n)
    entropy = -n * (density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert 8 * len(packed) <= bar * entropy


def hexed(text: str) -> bytes:
    return bytes.fromhex(text)


@pytest.mark.parametrize(
    ("data", "n", "offset"),
    [
        (b"", 5, 0),
        (hexed("0f"), 0, 0),  # t too small
        (hexed("20"), 0, 0),  # t too large
        (hexed("10"), 5, 1),  # no header
        (hexed("10 00"), 5, 2),  # no count
        (hexed("10 00 80 00 00"), 5, 2),  # a varint not in its shortest form
        (hexed("10 00 ff ff ff ff ff ff ff ff ff 02 00"), 5, 2),  # a varint above 64 bits
        (hexed("10 00 ff ff ff ff ff ff ff ff ff ff 00"), 5, 2),  # a varint that does not end
        (hexed("10 03 00"), 5, 1),  # no such mode
        (hexed("11 01 00"), 5, 1),  # a list in a large tile
        (hexed("10 04 01 01"), 5, 1),  # the complement of a bitmap
        (hexed("10 08 01 01"), 5, 1),  # a bitmap with r
        (hexed("10 09 01 00 00"), 5, 1),  # a list with r
        (hexed("10 fa 01 01 00 00 00 00 01"), 5, 1),  # r = 31
        (hexed("10 01 06"), 5, 1),  # more than the tile has
        (hexed("10 01 ff ff ff ff ff ff ff ff ff 01"), 5, 1),  # far more
        (hexed("10 02 01 ff ff ff ff ff ff ff ff ff 01"), 5, 1),  # a unary string of 2^64 - 1 bits
        (hexed("10 02 02 01 01"), 5, 1),  # fewer bits than ones
        (hexed("10 02 01 06 20"), 5, 1),  # more zeros than the tile has
        (hexed("10 00 01"), 5, 3),  # no bitmap
        (hexed("10 00 01 20"), 5, 3),  # padding set
        (hexed("10 00 01 03"), 5, 3),  # two bits set, one declared
        (hexed("10 01 02 01 00"), 5, 3),  # a list cut short
        (hexed("10 01 02 01 00 01 00"), 5, 3),  # equal positions
        (hexed("10 01 02 02 00 01 00"), 5, 3),  # falling positions
        (hexed("10 01 01 05 00"), 5, 3),  # a position outside
        (hexed("10 02 01 02 01"), 5, 4),  # the string does not end in its one
        (hexed("10 02 01 02 03"), 5, 4),  # two ones
        (hexed("10 02 01 02 06"), 5, 4),  # padding set
        (hexed("10 1a 01 01 05 01"), 5, 5),  # a remainder that leaves the tile
        (hexed("10 1a 01 01 0c 01"), 5, 4),  # padding of the remainders
        (hexed("10 0a 02 03 03 05"), 5, 5),  # positions 1 and 1 + 1 + 2 + 1 = 5
    ],
)
def test_bytes_that_are_no_index_set(data, n, offset):
    with pytest.raises(DecodeError) as caught:
        reference.unpack_sparse(data, n)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("data", "n", "positions"),
    [
        ("10 05 00", 5, [0, 1, 2, 3, 4]),
        ("1f 02 00", 5, []),
        ("10 f2 00", 5, []),  # Rice of nothing, r = 30
        ("10 00 00 00", 5, []),  # an empty bitmap
        ("12 00 01 10", 5, [4]),  # a bitmap in a large tile
        ("10 1a 01 01 04 01", 5, [4]),
        ("10 05 02 01 00 03 00", 5, [0, 2, 4]),  # a complement as a list
        ("10 06 01 02 02", 5, [0, 2, 3, 4]),  # a complement in Rice codes
    ],
)
def test_choices_that_are_not_ours_decode(data, n, positions):
    got, used = reference.unpack_sparse(hexed(data), n)
    assert got.tolist() == positions
    assert used == len(hexed(data))


def test_damage_is_refused_or_gives_a_valid_set():
    rng = np.random.default_rng(11)
    n = 140_000
    for k in (0, 3, 500, 20_000, 70_000, 139_000):
        packed = reference.pack_sparse(np.sort(rng.choice(n, k, replace=False)), n)
        cuts = range(len(packed)) if len(packed) < 600 else rng.integers(0, len(packed), 200)
        for cut in cuts:
            with pytest.raises(DecodeError):
                reference.unpack_sparse(packed[:cut], n)
        for flip in rng.integers(0, 8 * min(len(packed), 60), 300):
            damaged = bytearray(packed)
            damaged[flip // 8] ^= 1 << flip % 8
            try:
                positions, used = reference.unpack_sparse(bytes(damaged), n)
            except DecodeError:
                continue
            assert used <= len(packed)
            if positions.size:
                assert (np.diff(positions) > 0).all()
                assert 0 <= positions[0] <= positions[-1] < n


@given(st.binary(max_size=40), st.integers(0, 70_000))
def test_noise_raises_nothing_but_decode_errors(data, n):
    try:
        positions, used = reference.unpack_sparse(data, n)
    except DecodeError:
        return
    assert used <= len(data)
    assert positions.size <= n
