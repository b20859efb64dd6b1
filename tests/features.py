"""Vectors and nets for the tests of metrics."""

import math

import torch


def vectors(n, dim, seed, shift=0.0):
    """Features [n, dim] float32 as a net's last layer makes them: not negative, correlated, away from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / math.sqrt(dim)
    return (torch.randn(n, dim, generator=generator) @ mixing + 0.3 + shift).abs()
