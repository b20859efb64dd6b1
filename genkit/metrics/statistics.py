"""Mean and covariance of feature vectors, streamed in double precision and summable over processes."""

from __future__ import annotations

import io
import zipfile
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

    def update(self, features: Tensor) -> None:
        """Features [B, D]. Raises GenkitError when one of them is not finite."""
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

    def moments(self, net_sha256: str = "", protocol: str = "", source: str = "") -> Moments:
        """Raises GenkitError for fewer than two images, which have no covariance."""
        count = int(self.count)
        if count < 2:
            raise GenkitError(f"a Fréchet distance needs at least 2 images on each side, got {count}")
        mu = self.total / count
        sigma = (self.outer - count * torch.outer(mu, mu)) / (count - 1)
        return Moments(mu, (sigma + sigma.T) / 2, count, net_sha256, protocol, source)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an npz. Raises GenkitError for a file that is none, is damaged, or holds pickled objects (never unpickled)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise GenkitError(f"no such file: {path}") from None
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = (
            "it holds pickled objects, which are never loaded"
            if "pickle" in str(error)
            else str(error) or type(error).__name__
        )
        raise GenkitError(f"{path} cannot be read as npz: {reason}; save plain arrays with numpy.savez") from None


def load_moments(path: str | Path) -> Moments:
    """Statistics saved by `Moments.save`, or mu and sigma of another tool. Raises GenkitError when they are not usable."""
    arrays = read_npz(path)
    if not {"mu", "sigma"} <= arrays.keys():
        raise GenkitError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; statistics need mu [D] and sigma [D, D]"
        )
    mu, sigma = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise GenkitError(
            f"{path}: mu has shape {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; expected [D] and [D, D]"
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise GenkitError(f"{path}: mu or sigma is not finite")
    text = {key: str(arrays[key]) if key in arrays else "" for key in ("net_sha256", "protocol", "source")}
    count = int(arrays["count"]) if "count" in arrays else 0
    return Moments(mu, sigma, count, text["net_sha256"], text["protocol"], text["source"] or Path(path).name)


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982, eq. 4; Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)), in double precision. The product under the root is symmetric, unlike
    S1 S2, so that its eigenvalues are real; rounding below zero is cut. No eps is added to singular covariances: none is needed.

    Args:
        mu1, mu2: [D].
        sigma1, sigma2: [D, D], symmetric, positive semi-definite.
    """
    mu1, sigma1, mu2, sigma2 = (value.double() for value in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(0.0, float(distance))
