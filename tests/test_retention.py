from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genkit.kernels.retention.causal import log_decays, retention
from genkit.kernels.retention.manhattan import manhattan


def some(B: int, N: int, H: int, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, N, H, c, generator=random) for c in (K, K, V))
    return q, k, v


@pytest.mark.parametrize("path", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_parallel_form(path, reverse):
    q, k, v = some(2, 70, 3, 8, 10)
    place = torch.arange(70)
    steps = place[:, None] - place
    steps = -steps if reverse else steps
    weights = (log_decays(3)[:, None, None] * steps).exp().masked_fill(steps < 0, 0)
    expected = torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, weights, v) * 8**-0.5
    torch.testing.assert_close(retention(q, k, v, reverse=reverse, path=path), expected, rtol=1e-4, atol=1e-4)


def test_decays_are_those_of_retnet():
    torch.testing.assert_close(log_decays(3).exp(), torch.tensor([31 / 32, 63 / 64, 127 / 128]))


def test_a_state_is_handed_on():
    q, k, v = some(1, 20, 2, 4, 4)
    whole, last = retention(q, k, v, return_state=True)
    _, state = retention(q[:, :19], k[:, :19], v[:, :19], return_state=True)
    o, end = retention(q[:, 19:], k[:, 19:], v[:, 19:], initial_state=state, return_state=True)
    torch.testing.assert_close(o, whole[:, 19:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


def test_a_learned_decay_learns():
    q, k, v = (x.double() for x in some(1, 6, 2, 3, 3))
    decay = torch.tensor([-0.1, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: retention(q, k, v, log_decay=d, path="torch"), decay)


def weights(q: Tensor, k: Tensor, distance: Tensor, log_decay: Tensor) -> Tensor:
    """[B, H, n, n] by the definition."""
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    return (scores + distance * log_decay[:, None, None]).softmax(-1)


def test_manhattan_by_its_definition():
    Y, X = 3, 5
    q, k, v = some(2, Y * X, 2, 4, 6)
    log_decay = torch.tensor([-0.2, -1.0])
    distance = torch.tensor(
        [[abs(i // X - j // X) + abs(i % X - j % X) for j in range(Y * X)] for i in range(Y * X)], dtype=torch.float32
    )
    expected = torch.einsum("bhij,bjhv->bihv", weights(q, k, distance, log_decay), v)
    torch.testing.assert_close(manhattan(q, k, v, log_decay, (Y, X)), expected, rtol=1e-5, atol=1e-6)


def test_decomposed_is_rows_and_then_columns():
    Y, X = 3, 5
    q, k, v = some(2, Y * X, 2, 4, 6)
    log_decay = torch.tensor([-0.2, -1.0])

    def line(n: int) -> Tensor:
        place = torch.arange(n, dtype=torch.float32)
        return (place[:, None] - place).abs()

    expected = v.clone()
    for y in range(Y):
        row = slice(y * X, (y + 1) * X)
        expected[:, row] = torch.einsum("bhij,bjhv->bihv", weights(q[:, row], k[:, row], line(X), log_decay), v[:, row])
    after_rows = expected.clone()
    for x in range(X):
        column = slice(x, None, X)
        own = weights(q[:, column], k[:, column], line(Y), log_decay)
        expected[:, column] = torch.einsum("bhij,bjhv->bihv", own, after_rows[:, column])
    found = manhattan(q, k, v, log_decay, (Y, X), decomposed=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 7), (7, 1)])
def test_on_a_line_both_forms_are_one(grid):
    q, k, v = some(1, 7, 2, 4, 4)
    log_decay = torch.tensor([-0.5, -0.1])
    whole, parts = (manhattan(q, k, v, log_decay, grid, decomposed) for decomposed in (False, True))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named():
    q, k, v = some(1, 6, 2, 4, 4)
    with pytest.raises(ValueError, match=r"retention: log_decay must be \[2\] to go with v \[1, 6, 2, 4\], got \[3\]"):
        retention(q, k, v, log_decay=torch.zeros(3))
    with pytest.raises(ValueError, match=r"manhattan: q must be \[B, 8, H, channels\] for the grid 2 x 4"):
        manhattan(q, k, v, torch.zeros(2), (2, 4))
    with pytest.raises(ValueError, match=r"manhattan: log_decay must be \[2\], got \[1\]"):
        manhattan(q, k, v, torch.zeros(1), (2, 3))
