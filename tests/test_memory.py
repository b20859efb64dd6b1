"""Large results lie where dropped ones lay, and never where one is still held."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from genkit import memory
from genkit.kernels.linrec.op import linrec

SHAPE = (4, 1000, 3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything from 1 kB on counts as large."""
    memory.release()
    monkeypatch.setattr(memory, "LARGE", 1000)
    monkeypatch.setattr(memory, "MOST", 200_000)
    yield
    memory.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.int64])
def test_a_dropped_block_is_used_again(dtype: torch.dtype) -> None:
    x = memory.empty(*SHAPE, dtype=dtype)
    assert (x.shape, x.dtype, x.is_contiguous()) == (SHAPE, dtype, True)
    where = x.data_ptr()
    del x
    assert memory.empty(*SHAPE, dtype=dtype).data_ptr() == where


def test_a_view_holds_its_block() -> None:
    x = memory.empty(*SHAPE)
    view, where = x[0, 3:].mT, x.data_ptr()
    del x
    y = memory.empty(*SHAPE)
    assert y.data_ptr() != where
    view.fill_(1)
    y.fill_(2)
    assert (view == 1).all()


def test_what_waits_is_bounded() -> None:
    held = [memory.empty(10_000) for _ in range(20)]
    del held
    gc.collect()
    assert 0 < sum(size * len(blocks) for size, blocks in memory._waiting.items()) <= memory.MOST
    too_large = memory.empty(60_000)
    del too_large
    assert not memory._waiting[240_000]


def test_small_results_are_torchs_own() -> None:
    del_me = memory.empty(10)
    del del_me
    assert not any(memory._waiting.values())


def test_results_of_an_operation_keep_their_values() -> None:
    torch.manual_seed(0)
    given = [(torch.rand(2, 200, 5), torch.randn(2, 200, 5)) for _ in range(30)]
    kept = [(linrec(a, b, path="cpu"), linrec(a, b, path="reference")) for a, b in given]
    for ours, reference in kept:
        torch.testing.assert_close(ours, reference)


def test_gradients_and_inference_share_blocks() -> None:
    a, b = torch.rand(2, 200, 5), torch.randn(2, 200, 5, requires_grad=True)
    with torch.inference_mode():
        linrec(a, b, path="cpu")
    first = torch.autograd.grad(linrec(a, b, path="cpu").sum(), b)[0].clone()
    again = torch.autograd.grad(linrec(a, b, path="cpu").sum(), b)[0]
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_threads_never_share_a_block() -> None:
    def fill(number: int) -> bool:
        for _ in range(50):
            x = memory.empty(*SHAPE)
            x.fill_(number)
            if not (x == number).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(8)))
