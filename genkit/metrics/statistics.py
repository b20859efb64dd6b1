"""Mean and covariance of feature vectors, streamed in double precision and summable over processes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkit.errors import GenkitError
from genkit.files import write_bytes


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs to know of a set of images.

    Attributes:
        mu: [D] float64.
        sigma: [D, D] float64, the unbiased covariance (divided by count - 1).
        count: number of images; 0 = the file does not say.
        net_sha256: of the weights the features come from; empty = the file does not say.
        source: what the images were, one line.
    """

    mu: Tensor
    sigma: Tensor
    count: int
    net_sha256: str
    protocol: str
    source: str

    def save(self, path: str | Path) -> None:
        """An npz of mu, sigma, count, net_sha256, protocol, source; `mu` and `sigma` are where other tools look for them."""
        buffer = io.BytesIO()
        about = {"net_sha256": self.net_sha256, "protocol": self.protocol, "source": self.source}
        np.savez(buffer, mu=self.mu.numpy(), sigma=self.sigma.numpy(), count=self.count, **about)  # type: ignore[arg-type]
        write_bytes(Path(path), buffer.getvalue())


class FeatureSums:
    """Sums over the features seen so far; the order and the batches they came in change the last digits only."""

    def __init__(self, dim: int):
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor, number: Tensor | None = None, total: int | None = None) -> None:
        """Take in features [B, D]; which images they are of does not matter here. Raises GenkitError when one of them is not finite."""
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            raise GenkitError(
                f"{int((~finite).sum())} of {len(features)} images have features that are not finite; look for NaN in them"
            )
        rows = features.double().cpu()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def state(self) -> dict[str, Tensor]:
        """The sums themselves: adding another process's to them in place merges the two."""
        return {"count": self.count, "total": self.total, "outer": self.outer}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name, value in self.state().items():
            value.copy_(state[name])

    def moments(self, net_sha256: str = "", protocol: str = "", source: str = "") -> Moments:
        """Raises GenkitError for fewer than two images, which have no covariance."""
        count = int(self.count)
        if count < 2:
            raise GenkitError(f"a Fréchet distance needs at least 2 images on each side, got {count}")
        mu = self.total / count
        sigma = (self.outer - count * torch.outer(mu, mu)) / (count - 1)
        return Moments(mu, (sigma + sigma.T) / 2, count, net_sha256, protocol, source)


def covariance_root(sigma: Tensor) -> Tensor:
    """R [D, K] with R R^T = sigma, K its numerical rank, in double precision.

    Cholesky's factor, which is cheap, where sigma is safely positive definite; else eigenvectors, without those that are rounding: fewer
    images than features leave directions in which nothing varies, and the square roots of rounding errors are not small.

    Args:
        sigma: [D, D], symmetric, positive semi-definite.
    """
    sigma = sigma.double()
    smallest = 8 * len(sigma) * torch.finfo(torch.float64).eps  # what rounding leaves of a variance that is 0
    factor, failed = torch.linalg.cholesky_ex(sigma)
    pivots = factor.diagonal().square()
    if failed:
        pivots[int(failed) - 1 :] = 0
    sound = pivots > smallest * sigma.diagonal()
    if sound.all():
        return factor
    rank = int(sound.int().argmin())  # where features are in general position: as many pivots are sound
    basis = _range(sigma, rank, smallest)
    values, vectors = torch.linalg.eigh(sigma if basis is None else basis.T @ sigma @ basis)
    kept = values > smallest * values.max()
    vectors = vectors[:, kept] * values[kept].sqrt()
    return vectors if basis is None else basis @ vectors


def _range(sigma: Tensor, rank: int, smallest: float) -> Tensor | None:
    """Orthonormal [D, K] that spans all a covariance of low rank does (Halko et al. 2011, algorithm 4.1); None where K would exceed D / 2.

    Eigenvectors of the small matrix in this basis cost a fraction of those of the large one.

    Args:
        rank: an estimate.
        smallest: share of the variance that may be left out.
    """
    generator = torch.Generator().manual_seed(0)  # any directions serve; the same ones give the same last digits
    size = rank + 10
    while size <= len(sigma) // 2:
        directions = torch.randn(len(sigma), size, generator=generator, dtype=torch.float64).to(sigma.device)
        basis = torch.linalg.qr(sigma @ directions).Q
        inside = ((sigma @ basis) * basis).sum()
        # The rest is positive semi-definite too, so that its trace bounds all of it.
        if sigma.trace() - inside <= smallest * sigma.trace():
            return basis
        size *= 2
    return None


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor, root1: Tensor | None = None) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982, eq. 4; Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in double precision. With S1 = R1 R1^T and S2 = R2 R2^T the eigenvalues of S1 S2 that are
    not 0 are those of A A^T, A = R1^T R2: of a symmetric matrix, so that they are real, and no larger than the smaller rank. No eps is
    added to singular covariances: none is needed.

    Args:
        mu1, mu2: [D].
        sigma1, sigma2: [D, D], symmetric, positive semi-definite.
        root1: `covariance_root(sigma1)`, where one side is compared with many.
    """
    mu1, sigma1, mu2, sigma2 = (value.double() for value in (mu1, sigma1, mu2, sigma2))
    across = (covariance_root(sigma1) if root1 is None else root1).T @ covariance_root(sigma2)  # [K1, K2]
    product = across @ across.T if across.shape[0] <= across.shape[1] else across.T @ across
    overlap = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(0.0, float(distance))
