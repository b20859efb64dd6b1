"""Distances of point sets against closed forms, definitions written out, and what must hold between collections."""

import itertools
import math

import pytest
import torch

from genkit.errors import UsageError
from genkit.metrics import point_sets
from genkit.metrics.point_sets import (
    chamfer,
    earth_mover,
    mmd_coverage,
    nearest_neighbour_accuracy,
    nearest_squared,
    pairwise_chamfer,
    pairwise_earth_mover,
)


def clouds(n, points, seed, scale=1.0):
    return torch.randn(n, points, 3, generator=torch.Generator().manual_seed(seed)) * scale


def lattice():
    """[1, 27, 3], unit spacing."""
    return torch.tensor(list(itertools.product(range(3), repeat=3)), dtype=torch.float32)[None]


def test_a_shifted_copy_has_the_distances_of_its_shift():
    shift = torch.tensor([0.1, 0.0, 0.0])
    assert float(chamfer(lattice(), lattice() + shift)) == pytest.approx(2 * 0.01, rel=1e-5)
    assert float(earth_mover(lattice(), lattice() + shift)) == pytest.approx(0.1, rel=1e-5)


def test_chamfer_equals_its_definition_for_sets_of_different_sizes():
    x, y = clouds(3, 7, 0), clouds(3, 11, 1)
    forth, back = nearest_squared(x, y)
    for b in range(3):
        squared = torch.tensor([[float((p - q).square().sum()) for q in y[b]] for p in x[b]])
        torch.testing.assert_close(forth[b], squared.amin(1))
        torch.testing.assert_close(back[b], squared.amin(0))
        assert float(chamfer(x, y)[b]) == pytest.approx(float(squared.amin(1).mean() + squared.amin(0).mean()))


def test_close_clouds_far_from_the_origin_keep_their_distance():
    x = clouds(1, 50, 0) + 100
    y = x.clone()
    y[0, 0, 0] += 2**-12  # |x|^2 in float32 is not even exact to 1e-3
    assert float(nearest_squared(x, y)[0][0, 0]) == pytest.approx(2.0**-24, rel=1e-6)
    assert float(chamfer(x, x)) == 0


def test_earth_mover_is_the_best_of_all_assignments():
    pytest.importorskip("scipy")
    x, y = clouds(2, 5, 0), clouds(2, 5, 1)
    for b, found in enumerate(earth_mover(x, y)):
        costs = [(x[b] - y[b][list(order)]).norm(dim=1).mean() for order in itertools.permutations(range(5))]
        assert float(found) == pytest.approx(float(min(costs)), rel=1e-6)


@pytest.mark.parametrize("block", [1, 40, 200, 2**24])
def test_pairwise_distances_are_those_of_pairs_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(point_sets, "BLOCK", block)
    x, y = clouds(4, 6, 0), clouds(5, 6, 1)
    found = pairwise_chamfer(x, y)
    assert found.shape == (4, 5)
    for i, j in itertools.product(range(4), range(5)):
        assert float(found[i, j]) == pytest.approx(float(chamfer(x[i], y[j])), rel=1e-6)


def test_pairwise_earth_mover_is_that_of_pairs():
    pytest.importorskip("scipy")
    x, y = clouds(2, 6, 0), clouds(3, 6, 1)
    found = pairwise_earth_mover(x, y)
    assert found.shape == (2, 3)
    assert float(found[1, 2]) == pytest.approx(float(earth_mover(x[1:2], y[2:3])), rel=1e-6)


def judged(reference, sample):
    across = pairwise_chamfer(reference, sample)
    told = nearest_neighbour_accuracy(pairwise_chamfer(reference, reference), across, pairwise_chamfer(sample, sample))
    return mmd_coverage(across), told


def test_copies_of_the_references_match_cover_and_are_each_others_neighbours():
    shapes = clouds(12, 20, 0)
    matched, told = judged(shapes, shapes.clone())
    assert matched == {"lgan_mmd": 0, "lgan_mmd_smp": 0, "lgan_cov": 1}
    assert told == {"acc": 0, "acc_t": 0, "acc_f": 0}


def test_one_shape_repeated_covers_one_reference_and_is_told_apart():
    references = clouds(12, 20, 0)
    matched, told = judged(references, references[:1].expand(12, -1, -1) + 1e-4)
    assert matched["lgan_cov"] == pytest.approx(1 / 12)
    assert matched["lgan_mmd_smp"] < 1e-6 < matched["lgan_mmd"]
    assert told["acc_f"] == 1
    assert told["acc"] > 0.8


def test_halves_of_one_distribution_cannot_be_told_apart():
    shapes = clouds(160, 12, 0) * torch.rand(160, 1, 3, generator=torch.Generator().manual_seed(1))
    _, told = judged(shapes[:80], shapes[80:])
    assert abs(told["acc"] - 0.5) < 3 * math.sqrt(0.25 / 160)
    _, apart = judged(shapes[:80], shapes[80:] * 3)
    assert apart["acc"] > 0.75


def test_matching_and_coverage_of_a_known_matrix():
    distance = torch.tensor(
        [[1.0, 5.0, 4.0], [2.0, 3.0, 9.0], [7.0, 8.0, 6.0], [9.0, 9.0, 9.0]]
    )  # 4 references, 3 samples
    found = mmd_coverage(distance)
    assert found["lgan_mmd"] == pytest.approx((1 + 2 + 6 + 9) / 4)
    assert found["lgan_mmd_smp"] == pytest.approx((1 + 3 + 4) / 3)
    assert found["lgan_cov"] == pytest.approx(2 / 4)  # samples vote for 0, 1, 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UsageError, match="as many samples as references, got 3 and 2"):
        nearest_neighbour_accuracy(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(UsageError, match=r"sets of one size, got \(1, 4, 3\) and \(1, 5, 3\)"):
        earth_mover(clouds(1, 4, 0), clouds(1, 5, 0))
    with pytest.raises(UsageError, match="sets of 0 and 5 points have no nearest points"):
        chamfer(clouds(1, 0, 0), clouds(1, 5, 0))
