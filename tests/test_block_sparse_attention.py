from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genkit.errors import UsageError
from genkit.kernels.block_sparse_attention import pattern as patterns
from genkit.kernels.block_sparse_attention import rules
from genkit.kernels.block_sparse_attention.op import block_sparse_attention
from genkit.kernels.block_sparse_attention.pattern import Pattern, build
from tests.parity import assert_agrees

PATHS = ["cpu", "torch"]


def some(B: int, H: int, N: int, K: int, L: int | None = None, V: int | None = None) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    widths = {"q": (N, K), "k": (L or N, K), "v": (L or N, V or K)}
    return {name: torch.randn(B, H, *shape, generator=random) for name, shape in widths.items()}


def padding(B: int, L: int) -> Tensor:
    valid = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) > 0.3
    valid[:, 0] = True
    return valid


RULES = {
    "band": rules.band(100, 9),
    "clamped band": rules.band(100, 9, is_clamped=True),
    "causal": rules.causal(63, 100),
    "chunks": rules.chunk_causal([1, 4, 9, 16, 25, 36]),
    "packed band": rules.segments([10, 1, 52, 37]) & rules.band(100, 12),
    "window": rules.window((5, 4, 5), (3, 3, 5)),
    "tiles": rules.window((13, 9), (3, 1), (4, 4)).permuted(rules.tile_order((13, 9), (4, 4))),
    "axial": rules.line((8, 13), 0) | rules.line((8, 13), 1),
    "frames": rules.frame_band((3, 5, 6), 4).with_prefix(7),
}


# Patterns.


@pytest.mark.parametrize("name", RULES)
def test_a_pattern_holds_exactly_what_its_rule_says(name):
    rule = RULES[name]
    for block_size in (16, 64):
        pattern = build(rule, block_size)
        assert torch.equal(pattern.dense()[0, 0], rule.dense())
        assert pattern.density == pytest.approx(rule.dense().float().mean().item())
        transposed = Pattern(
            pattern.num_keys, pattern.num_queries, block_size, (1, 1), pattern.k_lists, pattern.q_lists,
            pattern.masks.transpose(1, 2), 0, 0,
        )  # fmt: skip
        assert torch.equal(transposed.dense()[0, 0], rule.dense().T)


def test_rules_by_hand():
    place = torch.arange(12)
    assert torch.equal(rules.band(12, 2).dense(), (place[:, None] - place[None]).abs() <= 2)
    assert rules.band(12, 2, is_clamped=True).dense().sum(1).tolist() == [5] * 12
    assert torch.equal(rules.causal(3, 5).dense().int().sum(1), torch.tensor([3, 4, 5]))
    assert torch.equal(rules.line((3, 4), 1).dense(), place[:, None] // 4 == place[None] // 4)
    assert torch.equal(rules.line((3, 4), 0).dense(), place[:, None] % 4 == place[None] % 4)
    assert rules.window((6, 6), (3, 3)).dense().sum(1).unique().tolist() == [9]  # moved inside at borders, not cut
    assert rules.window((6, 6), (3, 99)).dense().sum(1).unique().tolist() == [18]  # wider than the axis: all of it
    with_text = rules.frame_band((2, 1, 4), 1).with_prefix(3).dense()
    assert with_text[:3].all()
    assert with_text[:, :3].all()
    assert with_text[3].tolist() == [True] * 3 + [True, True, False, False] * 2


def test_a_tile_sees_the_tiles_of_its_window_whole():
    grid, tile, size = (8, 12), (4, 4), (1, 3)
    order = rules.tile_order(grid, tile)
    pattern = build(rules.window(grid, size, tile).permuted(order), 16)
    assert len(pattern.masks) == 0  # whole blocks alone
    assert pattern.density == pattern.block_density == 1 / 2
    assert torch.equal(torch.arange(96)[order][order.argsort()], torch.arange(96))


def test_equal_masks_are_stored_once():
    pattern = build(rules.band(4096, 70), 64)
    assert len(pattern.masks) <= 4
    assert len(patterns.stack_heads([pattern, pattern]).masks) == len(pattern.masks)


def test_patterns_differ_per_head_and_sample():
    heads = patterns.stack_heads([build(rules.band(50, 3), 16), build(rules.everything(50), 16)])
    both = patterns.stack_samples([heads, patterns.stack_heads([build(rules.causal(50), 16)] * 2)])
    assert both.num_maps == (2, 2)
    expected = [[rules.band(50, 3), rules.everything(50)], [rules.causal(50)] * 2]
    assert torch.equal(both.dense(), torch.stack([torch.stack([r.dense() for r in row]) for row in expected]))
    assert both.density == pytest.approx(both.dense().float().mean().item())
    for path in PATHS:
        assert_agrees(block_sparse_attention, path, some(2, 2, 50, 24), pattern=both)


def test_chosen_blocks():
    x = some(2, 3, 100, 8)
    chosen = patterns.top_blocks(x["q"], x["k"], 3, 16)
    assert chosen.shape == (2, 3, 7, 7)
    assert chosen.sum(-1).min() >= 3
    assert chosen.sum(-1).max() <= 4
    assert chosen.diagonal(dim1=-2, dim2=-1).all()
    means = torch.stack([part.mean(2) for part in x["k"].split(16, 2)], 2)
    best = (x["q"][:, :, :16].mean(2)[:, :, None] * means).sum(-1).argmax(-1)
    assert chosen[:, :, 0].gather(-1, best[..., None]).all()
    at_random = patterns.random_blocks(1024, 1024, 64, 0.25, num_heads=2)
    assert at_random.sum(-1).unique().tolist() == [4]
    assert at_random.diagonal(dim1=-2, dim2=-1).all()
    causal = build(rules.causal(100), 16, blocks=chosen)
    assert causal.num_maps == (2, 3)
    assert not causal.dense().triu(1).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(10, 48), "block_size 48 must be one of 16, 32, 64, 128"),
        (lambda: build(0), "a pattern needs tokens"),
        (lambda: build(40, 16, blocks=torch.ones(2, 3)), r"blocks must be bool \[..., 3, 3\]"),
        (lambda: rules.band(4, 1) & rules.band(5, 1), "do not combine"),
        (lambda: rules.window((4, 4), (2, 3)), "sizes must be odd"),
        (lambda: rules.window((4, 4), (3,)), "one number per axis"),
        (lambda: rules.causal(3, 5).permuted(torch.arange(3)), "one index per token"),
        (lambda: patterns.stack_heads([]), "no pattern"),
        (lambda: patterns.stack_heads([build(10, 16), build(10, 32)]), "must agree"),
    ],
)
def test_what_makes_no_pattern_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Attention.


def test_the_reference_is_softmax_attention():
    x = some(2, 3, 20, 8)
    o, lse = block_sparse_attention(**x, pattern=build(20, 16), path="reference")
    torch.testing.assert_close(o, scaled_dot_product_attention(x["q"], x["k"], x["v"]))
    torch.testing.assert_close(lse, (x["q"] @ x["k"].transpose(-1, -2) * 8**-0.5).logsumexp(-1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize(("N", "L", "K", "V"), [(1, 1, 1, 1), (7, 63, 16, 24), (100, 130, 40, 64), (200, 200, 64, 20)])
def test_every_path_equals_the_reference(path, block_size, N, L, K, V):
    assert_agrees(block_sparse_attention, path, some(2, 3, N, K, L, V), pattern=build(rules.causal(N, L), block_size))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", RULES)
def test_every_path_follows_every_rule(path, name):
    rule = RULES[name]
    x = some(2, 2, rule.num_queries, 12, rule.num_keys)
    assert_agrees(block_sparse_attention, path, x, pattern=build(rule, 32), scale=0.7)
    assert_agrees(block_sparse_attention, path, x, pattern=build(rule, 16), valid=padding(2, rule.num_keys))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [1, 5])  # backward by blocks, and by whole heads
def test_backward_of_few_and_of_many_heads(path, heads):
    chosen = patterns.random_blocks(150, 150, 16, 0.4, num_heads=heads)
    x, pattern = some(1, heads, 150, 20), build(150, 16, blocks=chosen)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_agrees(block_sparse_attention, path, x, pattern=pattern)
        assert_agrees(lambda **a: block_sparse_attention(**a)[0], path, x, pattern=pattern)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_of_lse_alone(path):
    x = {name: t.requires_grad_() for name, t in some(1, 2, 40, 8).items()}
    pattern = build(rules.band(40, 5), 16)
    found = torch.autograd.grad(block_sparse_attention(**x, pattern=pattern, path=path)[1].sum(), [x["q"], x["k"]])
    expected = torch.autograd.grad(
        block_sparse_attention(**x, pattern=pattern, path="reference")[1].sum(), [x["q"], x["k"]]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", PATHS)
def test_attention_over_two_sets_of_keys_merges_by_lse(path):
    x = some(2, 2, 90, 16)
    chosen = patterns.random_blocks(90, 90, 16, 0.5, num_heads=2)
    parts = [block_sparse_attention(**x, pattern=build(90, 16, blocks=b), path=path) for b in (chosen, ~chosen)]
    whole, lse = block_sparse_attention(**x, pattern=build(90, 16), path=path)
    torch.testing.assert_close(sum((part_lse - lse).exp()[..., None] * o for o, part_lse in parts), whole)


@pytest.mark.parametrize("path", [*PATHS, "reference"])
def test_a_query_that_sees_nothing_has_zero_output_and_no_gradient(path):
    x = {name: t.requires_grad_() for name, t in some(1, 1, 40, 8).items()}
    valid = torch.arange(40)[None] >= 30  # the band of the first 26 queries lies within padding
    pattern = build(rules.band(40, 4), 16)
    o, lse = block_sparse_attention(**x, pattern=pattern, valid=valid, path=path)
    assert (o[:, :, :26] == 0).all()
    assert (lse[:, :, :26] == -torch.inf).all()
    assert o[:, :, 26:].abs().min() > 0
    gradients = torch.autograd.grad(o.sum() + lse[:, :, 26:].sum(), list(x.values()))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, :26] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_large_scores_stay_finite_and_no_number_comes_back_as_such(path):
    x = some(1, 1, 70, 16)
    pattern = build(70, 32)
    big = {"q": x["q"] * 1e4, "k": x["k"] * 1e4, "v": x["v"]}
    o, lse = block_sparse_attention(**big, pattern=pattern, path=path)
    assert o.isfinite().all()
    assert lse.isfinite().all()
    x["q"][0, 0, 3, 5] = torch.nan
    x["v"][0, 0, 68, 2] = torch.inf
    o, lse = block_sparse_attention(**x, pattern=pattern, path=path)
    assert lse.isnan().nonzero()[:, -1].tolist() == [3]
    assert o[0, 0, 3].isnan().all()
    assert (o[0, 0, :3, 2] == torch.inf).all()


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_is_computed_in_single(path):
    x = {name: t.bfloat16() for name, t in some(1, 2, 50, 16).items()}
    pattern = build(rules.band(50, 7), 16)
    o, lse = block_sparse_attention(**x, pattern=pattern, path=path)
    expected, _ = block_sparse_attention(**{n: t.float() for n, t in x.items()}, pattern=pattern, path="reference")
    assert o.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(o, expected.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_memory_laid_out_otherwise_is_the_same(path):
    x = some(2, 3, 33, 16)
    other = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in x.items()}
    pattern = build(33, 16)
    for a, b in zip(
        block_sparse_attention(**x, pattern=pattern, path=path),
        block_sparse_attention(**other, pattern=pattern, path=path),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_packed_sequences_are_as_if_alone():
    x = some(1, 2, 90, 16)
    lengths = [40, 1, 49]
    o, _ = block_sparse_attention(**x, pattern=build(rules.segments(lengths), 32))
    for part, mine in zip(
        zip(*(t.split(lengths, 2) for t in x.values()), strict=True), o.split(lengths, 2), strict=True
    ):
        torch.testing.assert_close(mine, scaled_dot_product_attention(*part))


def test_what_does_not_fit_is_named():
    x = some(2, 3, 40, 8)
    pattern = build(40, 16)
    with pytest.raises(
        ValueError, match=r"k must be \[2, 3, 40, 8\] to go with q and the pattern, got \[2, 3, 39, 8\]"
    ):
        block_sparse_attention(x["q"], x["k"][:, :, 1:], x["v"], pattern)
    with pytest.raises(ValueError, match=r"v is torch\.float64 on cpu"):
        block_sparse_attention(x["q"], x["k"], x["v"].double(), pattern)
    with pytest.raises(ValueError, match=r"valid must be bool \[2, 40\]"):
        block_sparse_attention(**x, pattern=pattern, valid=torch.ones(2, 40))
    with pytest.raises(ValueError, match="maps for 1 samples and 2 heads, q has 2 and 3"):
        block_sparse_attention(**x, pattern=patterns.stack_heads([pattern] * 2))
    with pytest.raises(ValueError, match="the pattern is on meta"):
        block_sparse_attention(**x, pattern=pattern.to("meta"))
    with pytest.raises(UsageError, match="the path cpu cannot run: it computes in float32"):
        block_sparse_attention(**{n: t.double() for n, t in x.items()}, pattern=pattern, path="cpu")


@pytest.mark.parametrize("path", PATHS)
def test_custom_operations_and_compile(path):
    import importlib

    module = importlib.import_module(f"genkit.kernels.block_sparse_attention.{path}")
    x = {name: t.requires_grad_() for name, t in some(1, 2, 20, 16).items()}
    pattern = build(rules.band(20, 3), 16)
    torch.library.opcheck(module._forward, (*x.values(), pattern.tensors, [1, 1], 16, 0.25, None))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, pattern, path=path)[0] * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**x), call(**x))
    for a, b in zip(
        torch.autograd.grad(compiled(**x).sum(), list(x.values())),
        torch.autograd.grad(call(**x).sum(), list(x.values())),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gathered_keys_stay_small(monkeypatch):
    """Plain torch works in portions: the same result, whatever their size."""
    import genkit.kernels.block_sparse_attention.torch as module

    x, pattern = some(1, 2, 300, 8), build(rules.band(300, 40), 16)
    whole = block_sparse_attention(**x, pattern=pattern, path="torch")
    monkeypatch.setattr(module, "_PORTION", 1)
    torch.testing.assert_close(block_sparse_attention(**x, pattern=pattern, path="torch"), whole)


@pytest.mark.parametrize("with_padding", [False, True])
def test_triton_equals_the_reference(with_padding):
    pytest.importorskip("triton")
    pattern = patterns.stack_heads([build(rules.causal(19, 35), 16), build(rules.everything(19, 35), 16)])

    def call(path: str, valid: Tensor | None = None, **x: Tensor) -> tuple[Tensor, Tensor]:
        where = x["q"].device
        valid = None if valid is None else valid.to(where)
        return block_sparse_attention(**x, pattern=pattern.to(where), path=path, valid=valid)

    assert_agrees(call, "triton", some(1, 2, 19, 24, 35, 17), valid=padding(1, 35) if with_padding else None)
