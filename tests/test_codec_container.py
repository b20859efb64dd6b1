"""The file of coded ids: what it says, that it stays what it was, which damage is noticed."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.codec import coder, container, model
from genkit.errors import GenkitError
from tests.coded import of_stripes, some_ids

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("word", ["uniform", "static", "adaptive", "model", "packets"])
def test_files_stay_what_they_were(word):
    # Another outcome, of this package or of constriction, is a new version of the format.
    ids = [(np.arange(40) ** 2 * (seed + 3) // 7 % 9).reshape(2, 5, 4) for seed in range(12)]
    prior, packets = ("static", "interleaved") if word == "packets" else (word, "none")
    names, sizes, grids = tuple(f"{i}.png" for i in range(12)), ((20, 16),) * 12, ((5, 4),) * 12
    header = container.Header(b"tokenise", 2, 9, b"", "uniform", b"", packets, names, sizes, grids)
    stripes = of_stripes()
    stripes.tokenizer = SimpleNamespace(codebook_size=9)
    generator = model.Model(stripes, b"a stripe")
    stored = (ROOT / "tests/codes" / f"{word}.gtk").read_bytes()
    groups = np.stack([np.arange(9) // 3, np.arange(9) // 2])
    assert coder.encode(header, ids, prior, lambda: groups, generator) == stored
    found = coder.decode(container.read(stored), range(12), lambda: groups, lambda num_groups: generator)
    assert all((a == b).all() for a, b in zip(found, ids, strict=True))


def a_file(prior: str = "static", packets: str = "none", count: int = 5) -> tuple[bytes, list[np.ndarray]]:
    grids = [(4, 3)] * (count - 1) + [(2, 5)]
    images = [some_ids(i, 1, *grid, codebook_size=32) for i, grid in enumerate(grids)]
    header = container.Header(
        b"tokenise",
        1,
        32,
        b"",
        "uniform",
        b"",
        packets,
        tuple(f"folder/{i}.png" for i in range(count)),
        tuple((4 * y, 4 * x) for y, x in grids),
        tuple(grids),
    )
    return coder.encode(header, images, prior, classes, None), images


def classes() -> np.ndarray:
    return np.arange(32)[None] // 8


def decode_all(data: bytes) -> list[np.ndarray]:
    file = container.read(data, "x.gtk")
    if (file.header.num_levels, file.header.codebook_size) != (1, 32) or file.header.prior == "model":
        raise GenkitError("the verbs refuse this")
    return coder.decode(file, range(len(file.header.names)), classes, lambda groups: pytest.fail("no model is needed"))


KINDS = [("uniform", "none"), ("static", "none"), ("adaptive", "none"), ("static", "rows"), ("uniform", "interleaved")]


@pytest.mark.parametrize(("prior", "packets"), KINDS)
def test_a_file_says_what_is_in_it(prior, packets):
    data, images = a_file(prior, packets)
    header = container.read(data).header
    assert (header.prior, header.packets, header.num_levels, header.codebook_size) == (prior, packets, 1, 32)
    assert header.fingerprint == b"tokenise"
    assert header.names[4] == "folder/4.png"
    assert (header.sizes[4], header.grids[4]) == ((8, 20), (2, 5))
    assert all((a == b).all() for a, b in zip(decode_all(data), images, strict=True))


def test_an_image_is_decoded_without_the_other_chunks(monkeypatch):
    monkeypatch.setattr(container, "MAX_IDS", 30)  # two images of 12 ids to a chunk
    for prior in ("uniform", "static", "adaptive"):
        data, images = a_file(prior)
        assert [len(chunk) for chunk in container.read(data).chunks] == [2, 2, 1]
        spoilt = bytearray(data)
        spoilt[-1] ^= 1  # in the last chunk
        file = container.read(bytes(spoilt), "x.gtk")
        (found,) = coder.decode(file, [2], classes, pytest.fail)
        assert (found == images[2]).all()
        with pytest.raises(GenkitError, match=r"^x.gtk is damaged in the ids of folder/4.png"):
            coder.decode(file, [0, 4], classes, pytest.fail)
        cut = container.read(data[:-1], "x.gtk")
        with pytest.raises(
            GenkitError, match=r"^x.gtk is truncated \(1 bytes are missing\) in the ids of folder/4.png"
        ):
            coder.decode(cut, [4], classes, pytest.fail)


@pytest.mark.parametrize(("prior", "packets"), KINDS)
def test_every_flipped_bit_is_noticed(prior, packets):
    data, images = a_file(prior, packets)
    payload = len(data) - container.read(data).payload_size
    for bit in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        if packets != "none" and bit // 8 >= payload:
            found = decode_all(bytes(spoilt))
            holes = [ids < 0 for ids in found]
            assert 0 < sum(hole.sum() for hole in holes) <= 5
            assert all((a == b)[~hole].all() for a, b, hole in zip(found, images, holes, strict=True))
        else:
            with pytest.raises(GenkitError) as caught:
                decode_all(bytes(spoilt))
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("prior", "packets"), KINDS)
def test_every_truncation_is_noticed(prior, packets):
    data, images = a_file(prior, packets)
    payload = len(data) - container.read(data).payload_size
    for length in range(len(data)):
        if packets != "none" and length >= payload:
            found = decode_all(data[:length])
            assert (found[-1] < 0).any()
            assert all(((a == b) | (a < 0)).all() for a, b in zip(found, images, strict=True))
        else:
            with pytest.raises(GenkitError, match="truncated" if length else "is no codes file"):
                decode_all(data[:length])
    if packets == "none":
        with pytest.raises(GenkitError, match="2 bytes too many"):
            decode_all(data + b"ab")


def signed(start: bytes, payload: bytes = b"") -> bytes:
    """A header with whatever in it, and the checksum that makes a reader believe it."""
    return start + struct.pack("<I", zlib.crc32(start)) + payload


def test_another_version_says_so():
    data, _ = a_file()
    for version, cure in ((9, "update genkit"), (1, "encode the images again")):
        with pytest.raises(GenkitError, match=f"has format version {version}, this genkit reads 2; {cure}"):
            container.read(data[:4] + bytes([version]) + data[5:], "x.gtk")


def test_a_few_bytes_cannot_claim_ids_without_end():
    grid, count = (512, 512), 1000
    header = container.Header(
        b"tokenise", 1, 32, b"", "uniform", b"", "none", ("",) * count, ((2048, 2048),) * count, (grid,) * count
    )
    data = container.write(header, [[b""]] * count)
    assert len(data) == math.ceil(count * 512 * 512 / container.MAX_PER_BYTE)
    for packets in ("none", "rows"):
        short = container.write(replace(header, packets=packets), [[b""] * (512 if packets == "rows" else 1)] * count)
        with pytest.raises(GenkitError, match=r"x.gtk is truncated: \d+ bytes are missing"):
            container.read(short[:50_000], "x.gtk")
    spoilt = bytearray(data)
    spoilt[-5] = 1
    with pytest.raises(GenkitError, match=r"x.gtk is damaged at its end"):
        container.read(bytes(spoilt), "x.gtk")


@pytest.mark.parametrize("prior", ["uniform", "static", "adaptive"])
def test_ids_that_say_nothing_are_few_bytes_and_come_back(prior):
    images = [np.full((1, 24, 24), 3 * (prior == "adaptive"))] * 2
    header = container.Header(b"tokenise", 1, 32, b"", prior, b"", "none", ("a", "b"), ((1, 1),) * 2, ((24, 24),) * 2)
    data = coder.encode(header, images, prior, classes, None)
    assert len(data) < (900 if prior == "uniform" else 130)
    assert all((a == b).all() for a, b in zip(decode_all(data), images, strict=True))


def mutated(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    out = bytearray(data)
    for at, length, new in cuts:
        at %= len(out) + 1
        out[at : at + length] = new
    return bytes(out)


def attempt(data: bytes) -> list[np.ndarray]:
    """The ids of a file, none of a file that is refused; no other error gets through."""
    try:
        return decode_all(data)
    except GenkitError as error:
        message = str(error)
    assert "\n" not in message
    return []


CUTS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4)


@settings(deadline=20_000, max_examples=150)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_in_one_line(data):
    for tried in (data, container.MAGIC + data, signed(struct.pack("<4sBI", container.MAGIC, 2, len(data)) + data)):
        with pytest.raises(GenkitError) as caught:
            decode_all(tried)
        assert "\n" not in str(caught.value)


@settings(deadline=20_000, max_examples=200)
@given(st.sampled_from(KINDS), CUTS, CUTS)
def test_a_lying_header_is_refused_or_decodes_to_something(kind, header_cuts, payload_cuts):
    data, _ = a_file(*kind)
    (length,) = struct.unpack_from("<I", data, 5)
    body = mutated(data[9 : 9 + length], header_cuts)
    start = struct.pack("<4sBI", container.MAGIC, 2, len(body)) + body
    for payload in (data[13 + length :], mutated(data[13 + length :], payload_cuts)):
        found = attempt(signed(start, payload))
        assert all((-1 <= ids).all() and (ids < 32).all() for ids in found)


@settings(deadline=20_000, max_examples=100)
@given(st.sampled_from(KINDS), CUTS)
def test_a_mutated_file_is_refused_or_the_same(kind, cuts):
    data, images = a_file(*kind)
    for ids, expected in zip(attempt(mutated(data, cuts)), images, strict=False):
        assert ((ids == expected) | (ids < 0)).all()


def test_a_packet_does_not_pass_for_its_neighbour():
    data, images = a_file("uniform", "interleaved")
    start = len(data) - container.read(data).payload_size
    for cut in range(
        1, 7
    ):  # everything behind is read `cut` bytes too early, some of it at the bounds of another packet
        found = attempt(data[:start] + data[start + cut :])
        assert all(((ids == expected) | (ids < 0)).all() for ids, expected in zip(found, images, strict=True))
        assert sum((ids >= 0).sum() for ids in found) == 0
