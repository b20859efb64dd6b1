"""The Fréchet distance of two Gaussians."""

import numpy as np
import pytest
import torch

from genkit.metrics.statistics import covariance_root, frechet_distance


def spectrum(dim, rank, seed):
    """A covariance of this rank with eigenvalues over three decades."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.logspace(0, -3, rank, dtype=torch.float64), torch.zeros(dim - rank, dtype=torch.float64)])
    sigma = basis * values @ basis.T
    return (sigma + sigma.T) / 2, basis, values


@pytest.mark.parametrize(("rank1", "rank2"), [(40, 40), (40, 7), (7, 40), (9, 7), (1, 1)])
def test_distance_of_covariances_with_the_same_axes_is_known(rank1, rank2):
    sigma1, basis, values1 = spectrum(40, rank1, 0)
    values2 = torch.cat([torch.logspace(-2, 1, rank2, dtype=torch.float64), torch.zeros(40 - rank2)])
    sigma2 = basis * values2 @ basis.T
    sigma2 = (sigma2 + sigma2.T) / 2
    mu = torch.zeros(40, dtype=torch.float64)
    expected = float((values1.sqrt() - values2.sqrt()).square().sum()) + 4 * 40
    found = frechet_distance(mu, sigma1, mu + 2, sigma2)
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu + 2, sigma2, mu, sigma1) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu, sigma1, mu + 2, sigma2, covariance_root(sigma1)) == found


def test_distance_equals_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    (sigma1, _, _), (sigma2, _, _) = spectrum(60, 60, 1), spectrum(60, 60, 2)
    mu = torch.zeros(60)
    overlap = np.trace(linalg.sqrtm(sigma1.numpy() @ sigma2.numpy())).real
    expected = float(sigma1.trace() + sigma2.trace()) - 2 * overlap
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-9)


def test_roots_have_the_rank_of_their_covariance():
    for rank in (50, 49, 26, 13, 1, 0):
        sigma, _, _ = spectrum(50, rank, rank)
        root = covariance_root(sigma)
        assert root.shape == (50, rank)
        assert torch.allclose(root @ root.T, sigma, rtol=0, atol=1e-13)
    still = torch.zeros(50, 50, dtype=torch.float64)  # whose first features never vary
    still[30:, 30:] = spectrum(20, 15, 5)[0]
    root = covariance_root(still)
    assert root.shape == (50, 15)
    assert torch.allclose(root @ root.T, still, rtol=0, atol=1e-13)
    few = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert covariance_root(torch.cov(few.T)).shape == (50, 19)


def test_distance_to_itself_is_nothing_even_without_variance():
    for rank in (30, 5, 0):
        sigma, _, _ = spectrum(30, rank, 3)
        assert frechet_distance(torch.ones(30), sigma, torch.ones(30), sigma) == pytest.approx(0, abs=1e-12)
