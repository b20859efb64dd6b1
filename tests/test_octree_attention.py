from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.kernels.octree_attention.op import octree_attention
from genkit.kernels.octree_attention.windows import from_windows, is_seen, to_windows
from tests.parity import assert_agrees

PATHS = ["cpu", "torch"]


def some(M: int, H: int = 2, K: int = 6, V: int | None = None) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(M, H, V or K if name == "v" else K, generator=random) for name in "qkv"}


def samples(M: int) -> Tensor:
    return torch.arange(M) * 2 // M


def levels(M: int) -> Tensor:
    return torch.randint(0, 3, (M,), generator=torch.Generator().manual_seed(1))


def some_bias(M: int, H: int, window: int, dilation: int, shift: int, is_shared: bool) -> Tensor:
    count = dilation * -(-(M + shift) // (window * dilation))
    return torch.randn(1 if is_shared else count, H, window, window, generator=torch.Generator().manual_seed(2))


def test_windows_and_back():
    x = torch.arange(21)
    assert to_windows(x[:7], 4, fill=-1).tolist() == [[0, 1, 2, 3], [4, 5, 6, -1]]
    assert to_windows(x[:7], 2, dilation=2, shift=1, fill=-1).tolist() == [[-1, 1], [0, 2], [3, 5], [4, 6]]
    features = torch.randn(21, 3, 2)
    for window, dilation, shift in ((4, 1, 0), (4, 3, 5), (30, 2, 0)):
        there = to_windows(features, window, dilation=dilation, shift=shift)
        assert torch.equal(from_windows(there, 21, dilation=dilation, shift=shift), features)


def test_who_is_seen_by_hand():
    seen = is_seen(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), 2, 1, 1)  # windows (filler, 0), (1, 2)
    assert seen.tolist() == [[[True, False], [False, True]], [[True, False], [False, True]]]
    seen = is_seen(torch.tensor([0, 0]), torch.tensor([0, 1]), 2, 1, 0)
    assert seen.tolist() == [[[True, False], [True, True]]]  # the shallow node does not see the deep one


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("M", "window", "dilation", "shift"), [(5, 4, 1, 0), (7, 4, 2, 3), (63, 8, 2, 5), (100, 16, 1, 8), (130, 70, 1, 35)]
)
def test_every_path_equals_the_reference(path, M, window, dilation, shift):
    place = {"window": window, "dilation": dilation, "shift": shift}
    assert_agrees(octree_attention, path, some(M), batch_ids=samples(M), **place)
    for is_shared in (False, True):
        x = some(M, V=17) | {"bias": some_bias(M, 2, window, dilation, shift, is_shared)}
        assert_agrees(octree_attention, path, x, batch_ids=samples(M), depth=levels(M), scale=0.3, **place)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("M", "window", "dilation", "shift"), [(61, 12, 2, 3), (130, 70, 1, 35), (300, 100, 2, 0)])
def test_fillers_see_nothing_and_samples_may_come_back(path, M, window, dilation, shift):
    place = {"window": window, "dilation": dilation, "shift": shift}
    rows = {
        "a tail": torch.where(torch.arange(M) < 2 * M // 3, samples(M), -1),
        "all": torch.full((M,), -1),
        "anywhere": torch.where(levels(M) == 1, -1, samples(M)),
        "by turns": torch.arange(M) % 3 - 1,
    }
    for ids in rows.values():
        x = some(M, V=5) | {"bias": some_bias(M, 2, window, dilation, shift, True)}
        assert_agrees(octree_attention, path, x, batch_ids=ids, depth=levels(M), **place)
        found = octree_attention(**some(M), batch_ids=ids, path=path, **place)
        assert (found == 0).flatten(1).all(1).tolist() == (ids < 0).tolist()


@pytest.mark.parametrize("path", PATHS)
def test_one_window_is_plain_attention(path):
    x = some(32, K=16)
    expected = scaled_dot_product_attention(*(t.transpose(0, 1) for t in x.values())).transpose(0, 1)
    found = octree_attention(**x, batch_ids=torch.zeros(32, dtype=torch.int64), window=32, path=path)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_single_node_is_its_own_value(path):
    x = some(1)
    assert torch.equal(octree_attention(**x, batch_ids=samples(1), window=8, path=path), x["v"])


@pytest.mark.parametrize("path", PATHS)
def test_samples_and_deeper_nodes_do_not_leak(path):
    x, ids, depth = some(60), samples(60), levels(60)
    before = octree_attention(**x, batch_ids=ids, depth=depth, window=16, path=path)
    changed = {name: t.clone() for name, t in x.items()}
    for t in changed.values():
        t[(ids == 1) | (depth == 2)] = 9
    after = octree_attention(**changed, batch_ids=ids, depth=depth, window=16, path=path)
    kept = (ids == 0) & (depth < 2)
    assert torch.equal(before[kept], after[kept])


@pytest.mark.parametrize("path", PATHS)
def test_no_number_comes_back_as_such(path):
    x = some(40)
    x["q"][3] = torch.nan
    o = octree_attention(**x, batch_ids=torch.zeros(40, dtype=torch.int64), window=8, path=path)
    assert o.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [3]


def test_half_precision_and_other_memory():
    x = some(40, H=3, K=8)
    ids = samples(40)
    o = octree_attention(**x, batch_ids=ids, window=8)
    other = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in x.items()}
    assert torch.equal(octree_attention(**other, batch_ids=ids, window=8), o)
    half = octree_attention(**{name: t.bfloat16() for name, t in x.items()}, batch_ids=ids, window=8)
    torch.testing.assert_close(half, o.bfloat16(), rtol=3e-2, atol=3e-2)


def test_what_does_not_fit_is_named():
    x, ids = some(20), samples(20)
    with pytest.raises(ValueError, match=r"q must be \[M, H, K\]"):
        octree_attention(x["q"][0], x["k"], x["v"], ids, window=4)
    with pytest.raises(ValueError, match="shift 8 from 0 to below 8"):
        octree_attention(**x, batch_ids=ids, window=4, dilation=2, shift=8)
    with pytest.raises(ValueError, match=r"bias must be \[5, 2, 4, 4\]"):
        octree_attention(**x, batch_ids=ids, window=4, bias=torch.zeros(5, 2, 4, 5))
    with pytest.raises(ValueError, match=r"batch_ids must be int64 \[20\]"):
        octree_attention(**x, batch_ids=ids.int(), window=4)
    with pytest.raises(ValueError, match=r"k is torch\.float64"):
        octree_attention(x["q"], x["k"].double(), x["v"], ids, window=4)
    with pytest.raises(UsageError, match="the path cpu cannot run: it computes in float32"):
        octree_attention(**{n: t.double() for n, t in x.items()}, batch_ids=ids, window=4, path="cpu")


def test_custom_operations_and_compile():
    from genkit.kernels.octree_attention import cpu

    x = {name: t.requires_grad_() for name, t in some(20).items()}
    bias = some_bias(20, 2, 4, 2, 3, False).requires_grad_()
    torch.library.opcheck(cpu._forward, (*x.values(), samples(20), bias, levels(20), 4, 2, 3, 0.5))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return octree_attention(q, k, v, samples(20), window=4, bias=bias, dilation=2, shift=3) * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**x), call(**x))
    inputs = [*x.values(), bias]
    for a, b in zip(
        torch.autograd.grad(compiled(**x).sum(), inputs), torch.autograd.grad(call(**x).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
