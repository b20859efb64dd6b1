"""Metrics of feature vectors, against peers and their own definitions in double precision."""

import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from genkit.metrics import neighbours
from genkit.metrics.density_coverage import density_coverage
from genkit.metrics.fd_infinity import fd_infinity
from genkit.metrics.inception_score import inception_score
from genkit.metrics.kid import mmd2, mmd2_of_subsets
from genkit.metrics.memorisation import match
from genkit.metrics.precision_recall import precision_recall
from genkit.metrics.statistics import frechet_distance
from genkit.metrics.vendi import vendi
from tests.features import vectors


def distances(x, y):
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


# Neighbours


@pytest.mark.parametrize(("n", "m", "dim"), [(150, 130, 2), (200, 300, 64), (90, 120, 2048)])
def test_neighbours_decide_as_double_precision_does(n, m, dim):
    x, y = vectors(n, dim, 0), vectors(m, dim, 1)
    across, within = distances(x, y), distances(y, y)
    distance, number = neighbours.nearest(x, y)
    assert torch.equal(distance, across.amin(1))
    assert torch.equal(number, across.argmin(1))
    for k in (1, 5):
        radii = neighbours.kth_distance(y, k)
        assert torch.equal(radii, within.kthvalue(k + 1, dim=1).values)
        for closed, inside in ((True, across <= radii), (False, across < radii)):
            of_points, of_balls = neighbours.count_balls(x, y, radii, closed=closed)
            assert torch.equal(of_points, inside.sum(1))
            assert torch.equal(of_balls, inside.sum(0))


def test_neighbours_survive_large_offsets_and_tiny_distances():
    # Two clouds far apart, each so tight that |x|^2 + |y|^2 - 2xy in float32 is nothing but rounding.
    cloud = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    x = torch.cat([cloud[:20] + 50, cloud[20:] - 50])
    within = distances(x, x).fill_diagonal_(math.inf)
    assert torch.equal(neighbours.kth_distance(x, 2), within.kthvalue(2, dim=1).values)
    assert torch.equal(neighbours.nearest(x, x, torch.arange(40))[1], within.argmin(1))
    radii = neighbours.kth_distance(x, 3)
    # A ball of 3 neighbours holds its centre and 2 of them inside, 3 with the rim.
    for closed in (True, False):
        assert neighbours.count_balls(x, x, radii, closed=closed)[1].tolist() == [3 + closed] * 40


def test_among_equals_the_first_is_nearest():
    y = torch.zeros(30, 4)
    assert neighbours.nearest(torch.ones(3, 4), y)[1].tolist() == [0, 0, 0]
    assert neighbours.nearest(y, y, torch.arange(30))[1].tolist() == [1] + [0] * 29
    assert neighbours.kth_distance(y, 5).tolist() == [0.0] * 30


class Largest(TorchFunctionMode):
    """Remembers the number of elements of the largest tensor that was made."""

    size = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return out


def test_memory_stays_below_the_bound_and_results_do_not_depend_on_it(monkeypatch):
    x, y = vectors(150, 4, 0), vectors(180, 4, 1)
    expected = precision_recall(x, y), density_coverage(x, y), mmd2(x, y)
    monkeypatch.setattr(neighbours, "BLOCK", 1024)  # a 26th of one matrix of distances
    monkeypatch.setattr("genkit.metrics.kid.BLOCK", 1024)
    with Largest() as largest:
        found = precision_recall(x, y), density_coverage(x, y), mmd2(x, y)
    assert largest.size <= 1024
    assert found[:2] == expected[:2]
    # KID multiplies in single precision, and the order of a product's sums follows its shape: 7e-9 was seen on two threads.
    assert found[2] == pytest.approx(expected[2], abs=1e-7)


# Against peers


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_equal_torch_fidelitys(k):
    peer = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = vectors(300, 48, 0), vectors(250, 48, 1, shift=0.1)
    expected = peer.prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    assert precision_recall(real, fake, k) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-7)
    assert 0.2 < expected["precision"] < 0.95


@pytest.mark.parametrize("k", [3, 5])
def test_density_and_coverage_equal_prdcs(k):
    peer = pytest.importorskip("prdc")
    real, fake = vectors(300, 48, 0), vectors(250, 48, 1, shift=0.1)
    expected = peer.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert density_coverage(real, fake, k) == pytest.approx((expected["density"], expected["coverage"]), abs=1e-12)


def test_kid_equals_torch_fidelitys():
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    real, fake = vectors(400, 32, 0), vectors(300, 32, 1, shift=0.05)
    options = {"kid_subsets": 7, "kid_subset_size": 120, "rng_seed": 2020, "verbose": False}
    expected = peer.kid_features_to_metric(fake.double(), real.double(), **options)
    mean, std = mmd2_of_subsets(real, fake, subsets=7, subset_size=120, seed=2020)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-5)


def test_inception_score_equals_torch_fidelitys_shuffled_and_not():
    peer = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(503, 20, generator=torch.Generator().manual_seed(0)) * 3
    for seed in (None, 2020):
        expected = peer.isc_features_to_metric(logits, 10, seed is not None, 2020)
        found = inception_score(logits, splits=10, shuffle_seed=seed)
        assert found == pytest.approx(tuple(expected.values()), rel=1e-12)


# Against definitions


def test_inception_score_of_a_split_size_is_the_mean_over_contiguous_splits():
    logits = torch.randn(25, 7, generator=torch.Generator().manual_seed(1)) * 2
    parts = [inception_score(logits[i : i + 10], splits=1)[0] for i in (0, 10, 20)]
    assert inception_score(logits, split_size=10) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)
    # As many classes as there are, each certain and equally frequent; and nothing to be told apart.
    assert inception_score(torch.eye(6).repeat(5, 1) * 1e4, splits=5)[0] == pytest.approx(6)
    assert inception_score(torch.ones(30, 6), splits=3) == (pytest.approx(1), pytest.approx(0))


def test_mmd_equals_its_definition_and_is_unbiased():
    real, fake = vectors(30, 6, 0).double(), vectors(20, 6, 1).double()
    kernel = [((a @ b.T) / 6 + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake))]
    expected = sum(float(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernel[:2]) - 2 * float(
        kernel[2].mean()
    )
    assert mmd2(real, fake) == pytest.approx(expected, rel=1e-12)
    trials = [mmd2(vectors(20, 6, 2 * i), vectors(20, 6, 2 * i + 1)) for i in range(200)]
    assert abs(np.mean(trials)) < 3 * np.std(trials) / math.sqrt(200)


def test_vendi_equals_the_entropy_of_the_kernels_eigenvalues():
    rows = vectors(40, 12, 0)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T / 40).clamp_min(1e-300)
    assert vendi(unit.T @ unit / 40) == pytest.approx(float((-(values * values.log()).sum()).exp()), rel=1e-9)
    assert vendi(torch.eye(5, dtype=torch.float64) / 5) == pytest.approx(5)
    assert vendi(torch.ones(5, 5, dtype=torch.float64) / 5) == pytest.approx(1)


def test_authpct_equals_its_definition():
    real, fake = vectors(120, 8, 0), vectors(90, 8, 1)
    own = distances(real, real).fill_diagonal_(math.inf).amin(0)
    gap, number = distances(real, fake).min(0)
    found = match(real, fake)
    assert found.authpct == pytest.approx(100 * float((own[number] < gap).double().mean()))
    assert torch.equal(found.number, number)
    torch.testing.assert_close(found.ratio, gap / own[number].clamp_min(0.1 * own[number].median()))


def test_copies_are_found_even_of_images_that_are_there_twice():
    real = vectors(60, 8, 0)
    real[1] = real[0]
    fake = torch.cat([real[:10] + 1e-4, vectors(5, 8, 1, shift=3)])
    found = match(real, fake)
    assert found.ratio[:10].max() < 0.01
    assert found.ratio[10:].min() > 0.6
    assert match(real, real).authpct == 0
    assert match(real, real).ratio.max() == 0


@pytest.mark.parametrize("count", [400, 1000])
def test_fd_infinity_is_nearer_to_the_truth_than_any_count(count):
    dim = 24
    spread = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    sigma, mu = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    truth = float((spread - 1).square().sum())
    generator = torch.Generator().manual_seed(count)
    errors, biases = [], []
    for _ in range(10):
        fake = torch.randn(count, dim, generator=generator, dtype=torch.float64) * spread
        value, counts, measured = fd_infinity(mu, sigma, fake.float(), smallest=0.2, points=8)
        assert (counts[0], counts[-1], len(counts)) == (count // 5, count, 8)
        errors.append(value - truth)
        biases.append(measured[-1] - truth)
    assert abs(np.mean(errors)) < 0.3 * np.mean(biases)


def test_fd_infinity_measures_frechet_distances_and_takes_the_intercept():
    real, fake = vectors(300, 6, 0).double(), vectors(200, 6, 1, shift=0.2)
    mu, sigma = real.mean(0), real.T.cov()
    value, counts, measured = fd_infinity(mu, sigma, fake, points=5, smallest=0.5, seed=3)
    whole = fake.double()
    assert measured[-1] == pytest.approx(frechet_distance(mu, sigma, whole.mean(0), whole.T.cov()), rel=1e-9)
    n, d = 1 / np.array(counts), np.array(measured)
    slope = ((n - n.mean()) * (d - d.mean())).sum() / ((n - n.mean()) ** 2).sum()
    assert value == pytest.approx(d.mean() - slope * n.mean(), rel=1e-9)
    assert fd_infinity(mu, sigma, fake, points=5, smallest=0.5, seed=4)[2][0] != measured[0]
