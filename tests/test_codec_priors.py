"""Ids to bits: the coder and its priors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit import coding
from genkit.codec import adaptive, lanes, memoryless, model, stream
from genkit.codec.damaged import DamagedError
from tests.coded import some_ids

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
