"""Gradients that pass by a quantiser: straight through, rotation."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from genkit.nn.straight_through import rotation, straight_through
from tests.quantising import randn


def test_rotation_returns_the_codes_and_turns_the_gradient() -> None:
    z, codes, grad = randn(7, 5).requires_grad_(), randn(7, 5, seed=1), randn(7, 5, seed=2)
    out = rotation(z, codes)
    assert torch.equal(out, codes)
    out.backward(grad)
    ratio = codes.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(z.grad.norm(dim=1), ratio * grad.norm(dim=1))
    # The angle between gradient and code becomes the angle between gradient and vector.
    torch.testing.assert_close(F.cosine_similarity(z.grad, z), F.cosine_similarity(grad, codes))
    # What is orthogonal to both stays where it is.
    other = torch.linalg.svd(torch.stack([z[0], codes[0]])).Vh[2]
    z.grad = None
    rotation(z, codes).backward(other.expand(7, 5).clone())
    torch.testing.assert_close(z.grad[0], ratio[0] * other)


def test_rotation_survives_zero_and_opposite_vectors() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    codes = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    rotation(z, codes).backward(torch.ones(3, 2))
    assert z.grad.isfinite().all()
    torch.testing.assert_close(z.grad[2], torch.tensor([-1.0, 1.0]) / 3)


def test_straight_through_is_exact_where_a_sum_would_round() -> None:
    z, codes = torch.tensor([1e8], requires_grad=True), torch.tensor([0.1])
    out = straight_through(z, codes)
    assert torch.equal(out, codes)
    out.backward()
    assert z.grad == 1
