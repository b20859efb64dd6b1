"""Forty rows of six features, their statistics, pictures, and files of them."""

from types import SimpleNamespace

import numpy as np
import torch

from genkit.metrics.statistics import Moments

DIM = 6
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, DIM)) @ RNG.normal(size=(DIM, DIM))
MU, SIGMA = ROWS.mean(0), np.cov(ROWS, rowvar=False)
PIXELS = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
NET = SimpleNamespace(name="inception-2015", protocol="net-v1", sha256="ab" * 32, dims={"pool": DIM})


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def moments(count=40):
    return Moments(torch.from_numpy(MU), torch.from_numpy(SIGMA), count, "ab" * 32, "net-v1", "forty rows")
