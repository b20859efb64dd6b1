"""The benchmarks of quantisers: both sides do the same."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from genkit import bench
from tests.quantising import randn


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return bench.module("tokenizers")


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("shape", [(1, 96, 16), (2, 16, 6, 5)])
def test_both_sides_of_the_vq_benchmark_do_the_same(suite: ModuleType, shape: tuple[int, ...], gradient: str) -> None:
    x = randn(*shape).requires_grad_()
    ours, peer = suite.sides(x, 40, gradient=gradient)
    if isinstance(peer, str):
        pytest.skip(peer)
    for _ in range(3):
        codes, ids, table = ours()
        ours_grad = x.grad
        other_codes, other_ids, other_table = peer()
        assert torch.equal(ids.squeeze(-1), other_ids)
        torch.testing.assert_close(codes, other_codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(table, other_table, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_grad, x.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 96, 16), (2, 16, 6, 5)])
def test_both_sides_of_the_rvq_benchmark_do_the_same(suite: ModuleType, shape: tuple[int, ...]) -> None:
    ours, peer = suite.rvq_sides(randn(*shape).requires_grad_(), 40, depth=3)
    if isinstance(peer, str):
        pytest.skip(peer)
    for _ in range(3):
        for a, b in zip(ours(), peer(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_both_sides_of_the_benchmarks_without_tables_do_the_same(suite: ModuleType) -> None:
    for make, argument in ((suite.fsq_sides, (8, 5, 5)), (suite.lfq_sides, 64)):
        x = randn(2, 16, 6, 5).requires_grad_()
        ours, peer = make(x, argument)
        if isinstance(peer, str):
            pytest.skip(peer)
        codes, ids, *loss = ours()
        other_codes, other_ids, *other_loss = peer()
        assert torch.equal(ids.squeeze(-1), other_ids.long())
        torch.testing.assert_close(codes, other_codes)
        torch.testing.assert_close(loss, other_loss, atol=1e-4, rtol=1e-3)
