"""Tokens to bytes: the coder, its priors, the file format, clustered codebooks, lost ids, and the two verbs over all of it."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from genkit import coding
from genkit.backbones.masked import Masked
from genkit.codec import adaptive, coder, container, lanes, lost, memoryless, model, rate, stream
from genkit.codec.cluster import kmeans, whole_numbers
from genkit.codec.damaged import DamagedError
from genkit.errors import GenkitError, UsageError
from genkit.pipeline import GeneratorPipeline, TokenizerPipeline
from genkit.tokenizers.fsq import FSQ
from genkit.tokenizers.rvq import RVQ
from genkit.tokenizers.vq import VQ
from genkit.weights import module_sha256

ROOT = Path(__file__).parent.parent


def some_ids(seed: int, *shape: int, codebook_size: int) -> np.ndarray:
    """Ids that resemble their left neighbours, some far more frequent than others."""
    rng = np.random.default_rng(seed)
    drawn = (codebook_size * rng.random(shape) ** 3).astype(np.int64)
    for x in range(1, shape[-1]):
        drawn[..., x] = np.where(rng.random(shape[:-1]) < 0.6, drawn[..., x - 1], drawn[..., x])
    return drawn


# Coder


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 200), st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 2**20))
def test_what_is_coded_comes_back_and_is_as_short_as_it_should_be(S, N, seed, is_skewed, start):
    rng = np.random.default_rng(seed)
    rows = (rng.integers(0, 2**20, (N, S)) if is_skewed else np.ones((N, S))).astype(np.float64)
    rows[:, 0] += 1
    shared = rows.sum(0) + 1
    symbols = rng.integers(0, S, N)
    encoder = stream.Encoder(start)
    encoder.push(symbols, stream.Shared(shared))
    encoder.push(symbols[: N // 2], rows[: N // 2])
    coded = encoder.to_bytes()

    decoder = stream.Decoder(coded)
    assert (decoder.pop(N // 2, rows[: N // 2]) == symbols[: N // 2]).all()
    assert (decoder.pop(N, stream.Shared(shared)) == symbols).all()
    assert decoder.rest() == start

    parts = [shared[symbols] / shared.sum(), rows[np.arange(N), symbols][: N // 2] / rows[: N // 2].sum(1)]
    bits = -np.log2(np.concatenate(parts).clip(min=2.0**-24)).sum()
    # The start or the first symbol costs 24 bits; the coder's rounding of skewed rows, up to 2 % here; then a byte is not full.
    assert len(coded) <= math.ceil((24 + 1.02 * bits) / 8)


def test_every_symbol_keeps_a_part():
    weights = np.zeros((1, 2**18))
    weights[0, 7] = 1e6
    for surprise in (0, 2**18 - 1):
        encoder = stream.Encoder(2**24 - 1)
        encoder.push(np.array([surprise]), weights)
        assert 6 <= len(encoder.to_bytes()) <= 7
        assert stream.Decoder(encoder.to_bytes()).pop(1, weights) == surprise


def test_bytes_no_encoder_wrote_are_refused_or_leave_a_rest():
    with pytest.raises(DamagedError, match="end in a zero byte"):
        stream.Decoder(b"ab\0")
    decoder = stream.Decoder(b"something that was never coded")
    decoder.pop(4, stream.Shared(np.ones(7)))
    assert decoder.rest() == 2**32
    decoder.pop(4000, stream.Shared(np.ones(7)))  # long after the end
    assert decoder.rest() < 2**32


@given(st.integers(1, 5000), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_ids_are_the_digits_of_a_number(S, count, seed):
    ids = np.random.default_rng(seed).integers(0, S, count)
    raw = stream.num_raw(S, count)
    number = stream.to_number(ids[:raw], S)
    assert number < 2**stream.START_BITS
    assert (stream.to_ids(number, raw, S) == ids[:raw]).all()
    with pytest.raises(DamagedError):
        stream.to_ids(S**raw, raw, S)


@pytest.mark.parametrize("word", ["uniform", "static", "adaptive", "model", "packets"])
def test_files_stay_what_they_were(word, stripes):
    # Another outcome, of this package or of constriction, is a new version of the format.
    ids = [(np.arange(40) ** 2 * (seed + 3) // 7 % 9).reshape(2, 5, 4) for seed in range(12)]
    prior, packets = ("static", "interleaved") if word == "packets" else (word, "none")
    names, sizes, grids = tuple(f"{i}.png" for i in range(12)), ((20, 16),) * 12, ((5, 4),) * 12
    header = container.Header(b"tokenise", 2, 9, b"", "uniform", b"", packets, names, sizes, grids)
    stripes.tokenizer = SimpleNamespace(codebook_size=9)
    generator = model.Model(stripes, b"a stripe")
    stored = (ROOT / "tests/codes" / f"{word}.gtk").read_bytes()
    groups = np.stack([np.arange(9) // 3, np.arange(9) // 2])
    assert coder.encode(header, ids, prior, lambda: groups, generator) == stored
    found = coder.decode(container.read(stored), range(12), lambda: groups, lambda num_groups: generator)
    assert all((a == b).all() for a, b in zip(found, ids, strict=True))


# Priors


@pytest.mark.parametrize("packets", lanes.PACKETS)
@pytest.mark.parametrize(("Q", "S"), [(1, 512), (3, 17), (1, 1), (2, 2)])
def test_memoryless_priors_round_trip(Q, S, packets):
    grids = [(7, 7), (7, 7), (1, 5), (4, 3), (32,), (2, 3, 4), (7, 7)]
    images = [some_ids(i, Q, *grid, codebook_size=S) for i, grid in enumerate(grids)]
    for prior in (memoryless.uniform(S), memoryless.static(images, S)):
        coded = prior.encode(images, packets)
        assert len(coded) == (1 if packets == "none" else sum(lanes.count(grid, packets) for grid in grids))
        again = prior if prior.kind == "uniform" else memoryless.read_static(prior.table, Q, S)
        for ids, found in zip(images, again.decode(coded, grids, packets, Q), strict=True):
            assert (ids == found).all()


@pytest.mark.parametrize("packets", lanes.PACKETS)
@pytest.mark.parametrize("grid", [(7, 7), (1, 5), (6, 1), (1, 1), (32,), (2, 3, 4)])
def test_lanes_hold_every_position_once(grid, packets):
    parts = lanes.split(grid, packets)
    assert sorted(np.concatenate(parts).tolist()) == list(range(math.prod(grid)))
    assert len(parts) == lanes.count(grid, packets)


def test_a_lost_packet_takes_only_its_ids():
    images = [some_ids(i, 2, 6, 5, codebook_size=40) for i in range(3)]
    prior = memoryless.static(images, 40)
    coded: list[bytes | None] = [*prior.encode(images, "rows")]
    coded[6 + 4] = None
    found = prior.decode(coded, [(6, 5)] * 3, "rows", 2)
    assert (found[0] == images[0]).all()
    assert (found[1][:, 4] == -1).all()
    assert (np.delete(found[1], 4, 1) == np.delete(images[1], 4, 1)).all()


def test_uniform_ids_take_their_fixed_length():
    images = [np.random.default_rng(i).integers(0, 512, (1, 16, 16)) for i in range(20)]
    (lane,) = memoryless.uniform(512).encode(images, "none")
    assert 20 * 256 * 9 / 8 <= len(lane) <= 20 * 256 * 9 / 8 + 3
    for lane in memoryless.uniform(512).encode(images, "rows"):
        assert 16 * 9 / 8 <= len(lane) <= 16 * 9 / 8 + 1


@pytest.mark.parametrize("Q", [1, 2])
def test_adaptive_round_trips_over_any_grids(Q):
    grids = [(4, 5)] * 20 + [(3, 9), (1, 1), (12,), (2, 3, 4)] + [(4, 5)] * 3
    images = [some_ids(i, Q, *grid, codebook_size=64) for i, grid in enumerate(grids)]
    classes = np.stack([np.arange(64) // 8] * Q)
    coded = adaptive.Adaptive(classes).encode(images)
    found = adaptive.Adaptive(classes).decode(coded, grids, len(grids))
    assert all((a == b).all() for a, b in zip(images, found, strict=True))
    first = adaptive.Adaptive(classes).decode(coded, grids, 21)
    assert len(first) == 21
    assert (first[-1] == images[20]).all()


def test_priors_that_know_more_need_fewer_bits():
    images = [some_ids(i, 1, 12, 12, codebook_size=64) for i in range(60)]
    count = sum(ids.size for ids in images)
    static = memoryless.static(images, 64)
    size = {
        "uniform": len(memoryless.uniform(64).encode(images, "none")[0]),
        "static": len(static.encode(images, "none")[0]) + len(static.table),
        "adaptive": len(adaptive.Adaptive(np.arange(64)[None] // 8).encode(images)),
    }
    assert size["adaptive"] < 0.9 * size["static"] < 0.9 * size["uniform"]
    assert size["static"] < count * coding.entropy(images, 64) / 8 * 1.05


def test_a_codebook_of_one_code_takes_no_bytes():
    images = [np.zeros((1, 4, 4), np.int64)] * 3
    prior = adaptive.Adaptive(np.zeros((1, 1), np.int64))
    coded = prior.encode(images)
    assert coded == b""
    assert not any(ids.any() for ids in prior.decode(coded, [(4, 4)] * 3, 3))


def test_weights_of_logits_are_proportional_and_blind_to_the_last_digits():
    logits = torch.randn(20, 300, dtype=torch.float64)
    weights = model.weights_of(logits)
    share = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(share, logits.softmax(1).numpy(), rtol=0.05)  # a 16th of an octave is 4.4 %
    assert (model.weights_of(logits * (1 + 1e-14) + 1e-13) == weights).all()
    np.testing.assert_allclose(model._ROOTS, 2.0 ** (-np.arange(16) / 16), rtol=1e-14)
    assert np.isfinite(model.weights_of(torch.tensor([[float("nan"), 0.0], [float("-inf"), 0.0]]))).all()


# File format


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


# Clustered codebooks


def test_kmeans_is_lloyds():
    rng = np.random.default_rng(0)
    vectors, scale = whole_numbers(rng.normal(size=(200, 5)).astype(np.float32))
    assert np.abs(vectors).max() == 4095
    weights = rng.integers(0, 50, 200)
    centres, labels = kmeans(vectors, weights, 12)
    distance = np.square(vectors[:, None] - centres[None]).sum(-1)  # in whole numbers, the slow way
    assert (labels == distance.argmin(1)).all()
    for k in range(12):
        members = labels == k
        mean = (vectors[members] * weights[members, None]).sum(0) / weights[members].sum()
        assert np.abs(centres[k] - mean).max() <= 0.5
    assert scale > 0


def tokenizer(**changes) -> VQ:
    torch.manual_seed(0)
    made = VQ(
        **{"image_channels": 1, "stride": 4, "width": 8, "num_blocks": 1, "channels": 8, "codebook_size": 64} | changes
    ).eval()
    with torch.no_grad():  # some codes are used more than others, and none exactly as much
        made.quantizer.codebook.recent.copy_(torch.rand(1, changes.get("codebook_size", 64)) ** 4)
    return made.requires_grad_(False)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_clustered_tokenizer_is_a_tokenizer(cosine):
    fine = tokenizer(cosine=cosine)
    before = {name: value.clone() for name, value in fine.state_dict().items()}
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    errors = []
    for count in (2, 8, 32):
        coarse = rate.coarser(fine, count)
        encoded = coarse.encode(x)
        assert int(encoded.ids.max()) < count == coarse.codebook_size
        assert torch.equal(coarse.codes(encoded.ids), encoded.z)
        assert rate.table_checksum(coarse) == rate.table_checksum(rate.coarser(fine, count))
        rows = fine.encoder(x).permute(0, 2, 3, 1).flatten(0, 2)
        table = coarse.quantizer.codebook.embed[0]
        if cosine:
            assert torch.allclose(table.norm(dim=1), torch.ones(count))
            rows = nn.functional.normalize(rows, dim=1)
        assert torch.equal(torch.cdist(rows, table).argmin(1), encoded.ids.flatten())
        errors.append(float((rows - table[encoded.ids.flatten()]).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert all(torch.equal(before[name], value) for name, value in fine.state_dict().items())


def test_clusters_follow_use():
    made = tokenizer()
    made.quantizer.codebook.recent.zero_()
    made.quantizer.codebook.recent[0, :8] = 1.0
    coarse = rate.coarser(made, 8)
    distance = torch.cdist(made.quantizer.codebook.embed[0, :8], coarse.quantizer.codebook.embed[0]).amin(1)
    assert float(distance.max()) < 1e-3


@pytest.mark.parametrize(
    ("made", "count", "message"),
    [
        (
            RVQ(image_channels=1, width=8, num_blocks=1, channels=8, codebook_size=16, num_levels=2),
            4,
            "RVQ has 2 levels",
        ),
        (FSQ(image_channels=1, width=8, num_blocks=1, levels=[4, 4]), 4, "FSQ has 1 levels or no table"),
        (tokenizer(), 64, "--codes 64 must be at least 2 and below the tokenizer's 64"),
        (tokenizer(), 1, "--codes 1 must be at least 2"),
    ],
)
def test_codes_that_cannot_be_clustered(made, count, message):
    with pytest.raises(UsageError, match=message):
        rate.coarser(made, count)


def test_every_tokenizer_has_vectors_for_its_codes():
    for made, axes in (
        (tokenizer(), 2),
        (RVQ(image_channels=1, width=8, num_blocks=1, channels=8, codebook_size=16, num_levels=3), 2),
        (FSQ(image_channels=1, width=8, num_blocks=1, levels=[4, 4]), 2),
    ):
        vectors = rate.code_vectors(made.eval(), axes)
        assert len(vectors) == made.num_levels
        assert all(len(np.unique(level, axis=0)) == made.codebook_size for level in vectors)


# Lost ids


class Stripes(nn.Module):
    """Knows that all ids of a row are equal, and is the surer the more of the row it sees."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(codebook_size=9)

    def forward(self, x, t, cond, layout, cache=None):
        seen = nn.functional.one_hot(x, 10)[..., :9].sum(3, keepdim=True).double()  # [B, Q, Y, 1, 9]
        return (seen * 3).expand(*x.shape, 9)


@pytest.fixture
def stripes():
    return SimpleNamespace(objective={"type": "masked"}, backbone=Stripes(), device="cpu", folder="stripes")


def test_lost_ids_are_filled_in_by_the_generator(stripes):
    rows = torch.arange(7)[:, None].expand(7, 6)[None, None].expand(3, 1, 7, 6)
    holes = torch.from_numpy(np.stack(lost.lose(list(rows.numpy()), 0.3, 1, "none")))
    assert 0.15 < float((holes < 0).float().mean()) < 0.45
    assert torch.equal(lost.by_generator(stripes, holes), rows)
    odd = holes.clone()
    odd[holes >= 0] = 8  # what is given is kept, whatever the generator thinks of it
    assert torch.equal(lost.by_generator(stripes, odd), torch.full_like(odd, 8))


def test_lost_ids_are_copied_from_the_nearest():
    ids = np.full((2, 3, 4), -1)
    ids[0, 0, 0], ids[0, 2, 3] = 5, 7
    filled = lost.by_nearest(ids)
    assert filled[0].tolist() == [[5, 5, 5, 7], [5, 5, 7, 7], [5, 7, 7, 7]]
    assert not filled[1].any()


def test_losses_depend_on_seed_and_image_alone():
    images = [np.zeros((2, 6, 6), np.int64)] * 40
    first = lost.lose(images, 0.25, 3, "none")
    assert all((a == b).all() for a, b in zip(first[:5], lost.lose(images[:5], 0.25, 3, "none"), strict=True))
    assert any((a != b).any() for a, b in zip(first, lost.lose(images, 0.25, 4, "none"), strict=True))
    assert 0.2 < np.mean([ids < 0 for ids in first]) < 0.3
    assert all((ids[0] == ids[1]).all() for ids in first)  # a place is lost with all its levels
    for ids in lost.lose(images, 0.25, 3, "rows"):
        assert all(len(set(row)) == 1 for row in (ids[0] < 0).tolist())


# Both verbs, over runs that were saved


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    vq = tokenizer()
    data = {"data": {"type": "folder", "path": "nowhere", "size": [16, 16]}}
    TokenizerPipeline(vq, run_config=data).save_pretrained(folder / "vq")
    TokenizerPipeline(tokenizer(channels=9), run_config=data).save_pretrained(folder / "other")
    torch.manual_seed(1)
    backbone = Masked(codebook_size=64, num_levels=1, num_classes=0, grid=(4, 4), dim=16, depth=1, positions="sincos")
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.4)
    sampler = {"type": "masked", "guidance": 1.0, "guidance_schedule": "constant"}
    for name, own in (("masked", vq), ("masked-of-other", tokenizer(channels=9))):
        GeneratorPipeline(
            own, backbone, objective={"type": "masked"}, sampler=sampler, grid=[4, 4], run_config=data
        ).save_pretrained(folder / name)
    return SimpleNamespace(**{path.name.replace("-", "_"): str(path) for path in folder.iterdir()})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    rng = np.random.default_rng(0)
    sizes = {"a.png": (16, 16), "b/c.png": (16, 16), "b/d.png": (8, 24), "e.png": (16, 16), "f.png": (12, 12)}
    for name, size in sizes.items():
        small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
        small.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


PRIORS = ["auto", "uniform", "static", "adaptive", "masked"]


@pytest.mark.parametrize("prior", PRIORS)
def test_images_come_back_as_the_tokenizer_makes_them(runs, photos, tmp_path, prior):
    word = runs.masked if prior == "masked" else prior
    found = coding.encode(runs.vq, str(photos), str(tmp_path / "x.gtk"), prior=word, batch_size=2)
    assert found["images"] == 5
    assert found["bytes"] == (tmp_path / "x.gtk").stat().st_size
    pixels = 3 * 256 + 8 * 24 + 144
    assert found["bits_per_pixel"] == pytest.approx(8 * found["bytes"] / pixels)
    assert 0 < found["payload_bits_per_pixel"] < found["bits_per_pixel"]
    assert found["fixed_bits_per_pixel"] == pytest.approx(6 / 16)
    assert found["prior"] == {"masked": "model", "auto": min(found["tried"], key=found["tried"].get)}.get(prior, prior)
    needed = runs.masked if prior == "masked" else None
    coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path / "out"), prior=needed)
    images = read_all(photos)
    decoded = read_all(tmp_path / "out")
    assert list(decoded) == list(images)
    vq = tokenizer()
    for name, image in images.items():
        x = torch.tensor(image)[None, None].float() / 127.5 - 1
        expected = (vq(x)[0].clamp(-1, 1)[0, 0] + 1) * 127.5
        assert np.abs(decoded[name] - expected.numpy()).max() <= 0.51


def test_another_process_with_another_batch_size_does_the_same(runs, photos, tmp_path):
    words = {"uniform": "", "static": "", "adaptive": "", runs.masked: runs.masked}  # prior -> what decoding needs
    here = []
    for i, (word, needed) in enumerate(words.items()):
        path = tmp_path / f"{i}.gtk"
        coding.encode(runs.vq, str(photos), str(path), prior=word, batch_size=3)
        coding.decode(runs.vq, str(path), str(tmp_path / f"here-{i}"), prior=needed or None)
        here.append(path.read_bytes())
    program = (
        "import json, sys, torch\n"
        "torch.set_num_threads(2)\n"
        "from genkit import console, coding\n"
        "console.set_quiet(True)\n"
        "run, photos, folder, words = sys.argv[1:]\n"
        "for i, (word, needed) in enumerate(json.loads(words).items()):\n"
        "    path = f'{folder}/{i}.gtk'\n"
        "    coding.decode(run, path, f'{folder}/there-{i}', prior=needed or None, batch_size=1)\n"
        "    coding.encode(run, photos, path, prior=word, batch_size=1)\n"
    )
    given = [runs.vq, str(photos), str(tmp_path), json.dumps(words)]
    subprocess.run([sys.executable, "-c", program, *given], cwd=ROOT, check=True, capture_output=True)
    for i in range(len(words)):
        assert (tmp_path / f"{i}.gtk").read_bytes() == here[i]
        a, b = read_all(tmp_path / f"here-{i}"), read_all(tmp_path / f"there-{i}")
        assert list(a) == list(b)
        # The ids are equal; a pixel may round otherwise in another batch.
        assert max(np.abs(a[name].astype(int) - b[name]).max() for name in a) <= 1


def test_only_the_asked_images_are_decoded(runs, photos, tmp_path):
    for prior in (runs.masked, "adaptive", "static"):
        coding.encode(runs.vq, str(photos), str(tmp_path / "x.gtk"), prior=prior)
        needed = prior if prior == runs.masked else None
        out = tmp_path / Path(prior).name
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(out), only=["b/d.png"], prior=needed)
        assert list(read_all(out)) == ["b/d.png"]
    with pytest.raises(UsageError, match=r"holds no image b/x.png; did you mean 'b/\w.png'"):
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path), only=["b/x.png"])


def test_a_generator_that_computes_otherwise_is_noticed(runs, photos, tmp_path, monkeypatch):
    coding.encode(runs.vq, str(photos), str(tmp_path / "x.gtk"), prior=runs.masked)
    with pytest.raises(UsageError, match=r"was coded with generator .* name its run with --prior"):
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path / "out"))
    original = model.weights_of
    monkeypatch.setattr(model, "weights_of", lambda logits: original(logits * 1.01))
    with pytest.raises(GenkitError, match=r"x.gtk cannot be decoded: the generator computes other probabilities here"):
        coding.decode(runs.vq, str(tmp_path / "x.gtk"), str(tmp_path / "out"), prior=runs.masked)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_or_generator_is_named(runs, photos, tmp_path):
    path = str(tmp_path / "x.gtk")
    coding.encode(runs.vq, str(photos), path)
    ours = module_sha256(tokenizer())[:16]
    theirs = module_sha256(tokenizer(channels=9))[:16]
    with pytest.raises(GenkitError, match=f"was written by tokenizer {ours}, .* holds {theirs}"):
        coding.decode(runs.other, path, str(tmp_path))
    with pytest.raises(UsageError, match=f"makes tokens of tokenizer {theirs}, the codes are of {ours}"):
        coding.encode(runs.vq, str(photos), path, prior=runs.masked_of_other)
    with pytest.raises(UsageError, match="that is a tokenizer's run"):
        coding.encode(runs.vq, str(photos), path, prior=runs.vq)
    with pytest.raises(UsageError, match="no such run, and no word for a prior; did you mean 'static'"):
        coding.encode(runs.vq, str(photos), path, prior="statik")


def test_sizes_that_do_not_fit_are_padded_on_request(runs, tmp_path):
    (tmp_path / "in").mkdir()
    gradient = np.linspace(0, 255, 21 * 13).reshape(21, 13).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "in" / "odd.png")
    Image.fromarray(gradient[:1, :1]).save(tmp_path / "in" / "tiny.png")
    path = str(tmp_path / "x.gtk")
    with pytest.raises(UsageError, match=r"odd.png is 21x13, .* stride, 4 \(nearest that fit: 20x12 or 24x16\); --pad"):
        coding.encode(runs.vq, str(tmp_path / "in"), path)
    coding.encode(runs.vq, str(tmp_path / "in"), path, pad=True)
    assert container.read(Path(path).read_bytes()).header.grids == ((6, 4), (1, 1))
    coding.decode(runs.vq, path, str(tmp_path / "out"))
    assert {name: x.shape for name, x in read_all(tmp_path / "out").items()} == {
        "odd.png": (21, 13),
        "tiny.png": (1, 1),
    }
    coding.encode(runs.vq, str(tmp_path / "in"), path, fit=True)
    assert set(container.read(Path(path).read_bytes()).header.sizes) == {(16, 16)}


def test_colour_is_not_made_grey_in_silence(runs, tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    coding.encode(runs.vq, str(tmp_path), str(tmp_path / "x.gtk"))  # three equal channels are grey
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(tmp_path / "red.png")
    with pytest.raises(UsageError, match=r"red.png is in colour, but the tokenizer was trained on grey images"):
        coding.encode(runs.vq, str(tmp_path), str(tmp_path / "x.gtk"))


@pytest.mark.parametrize("prior", ["static", "adaptive"])
def test_fewer_codes_make_a_smaller_file(runs, photos, tmp_path, prior):
    sizes = []
    for codes in (4, 16, None):
        path = tmp_path / "x.gtk"
        sizes.append(coding.encode(runs.vq, str(photos), str(path), codes=codes, prior=prior)["payload_bits_per_pixel"])
        coding.decode(runs.vq, str(path), str(tmp_path / f"{codes}"))
        assert len(read_all(tmp_path / f"{codes}")) == 5
    assert sizes[0] < sizes[1] < sizes[2]
    with pytest.raises(UsageError, match="the generator knows the codebook as it was"):
        coding.encode(runs.vq, str(photos), str(path), codes=4, prior=runs.masked)


def test_clusters_that_come_out_otherwise_are_noticed(runs, photos, tmp_path, monkeypatch):
    path = tmp_path / "x.gtk"
    coding.encode(runs.vq, str(photos), str(path), codes=8)
    original = rate.kmeans
    monkeypatch.setattr(rate, "kmeans", lambda *args: (original(*args)[0] + 1, None))
    with pytest.raises(GenkitError, match="clustering the codebook gives other codes here"):
        coding.decode(runs.vq, str(path), str(tmp_path / "out"))


@pytest.mark.parametrize("packets", ["rows", "interleaved"])
def test_lost_packets_are_restored_or_refused(runs, photos, tmp_path, packets):
    path = tmp_path / "x.gtk"
    coding.encode(runs.vq, str(photos), str(path), packets=packets)
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)
    with pytest.raises(GenkitError, match=r"x.gtk: \d of 69 ids are lost; fill them in with --restore"):
        coding.decode(runs.vq, str(path), str(tmp_path / "out"))
    for restore in ("nearest", runs.masked):
        found = coding.decode(runs.vq, str(path), str(tmp_path / "out"), restore=restore, lose=0.2, seed=1)
        assert 1 < found["lost"] < found["ids"] == 69
        assert len(read_all(tmp_path / "out")) == 5
    with pytest.raises(UsageError, match="a packet must be readable without the others"):
        coding.encode(runs.vq, str(photos), str(path), packets=packets, prior="adaptive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packets": "row"}, "--packets row: did you mean 'rows'"),
        ({"out": "x.npz", "codes": 4}, "an npz holds plain ids"),
        ({"codes": 100}, "must be at least 2 and below"),
    ],
)
def test_options_of_encode_that_do_not_go_together(runs, photos, options, message):
    with pytest.raises(UsageError, match=message):
        coding.encode(runs.vq, str(photos), **{"out": "x.gtk"} | options)


@pytest.mark.parametrize("name", ["x.gtk", "x.npz"])
def test_what_is_no_codes_file_is_one_line(runs, tmp_path, name):
    path = tmp_path / name
    with pytest.raises(GenkitError, match="no such codes file"):
        coding.decode(runs.vq, str(path), str(tmp_path))
    path.write_bytes(b"something else entirely")
    with pytest.raises(GenkitError, match=r"is no codes file|is not a complete codes file"):
        coding.decode(runs.vq, str(path), str(tmp_path))
    with pytest.raises(UsageError, match=r"--lose 2 must be in \[0, 1\]"):
        coding.decode(runs.vq, str(path), str(tmp_path), lose=2)


def test_ids_outside_the_codebook_are_named(runs, photos, tmp_path):
    path = tmp_path / "x.npz"
    coding.encode(runs.vq, str(photos), str(path), fit=True)
    stored = dict(np.load(path))
    stored["ids"][0, 0, 0, 0] = 64
    np.savez(path, **stored)
    with pytest.raises(GenkitError, match=r"ids lie in \d+..64, but the codebook has 64 codes, from 0 on"):
        coding.decode(runs.vq, str(path), str(tmp_path))


def test_a_file_takes_little_beside_its_ids(runs, photos, tmp_path):
    found = coding.encode(runs.vq, str(photos / "a.png"), str(tmp_path / "x.gtk"))
    assert found["bytes"] < 80
    assert found["tokens"] == 16
    json.dumps(found)  # the command line prints it
