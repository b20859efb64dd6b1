"""Every mixer against the contract, by its word: a new file in genkit/mixers is tested by being there. Then what each is, against an independent form."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genkit.backbones.masked import Masked
from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.mixers.s5 import hippo
from genkit.nn.layout import dense_layout
from genkit.nn.rope import rope_table, rotate
from genkit.nn.scan_orders import scan_order
from genkit.objectives.masked import Masked as Objective
from genkit.optim import adamw
from genkit.registry import build, check, words
from genkit.rng import Rng, sample_seeds

DIM = 32
GRID = (7, 5)
# Options under which a mixer is tested besides its defaults, and instead of them where they do not fit a tiny size.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {},
        {"is_causal": True},
        {"qk_norm": False, "rope": False, "num_heads": 2},
        {"head_dim": 6, "num_heads": 3},
    ],
    "axial": [{}, {"combine": "alternate"}],
    "block_sparse": [{"tile": 2}] + [{"pattern": p, "tile": 2, "reach": 3} for p in ("band", "axial", "random", "top")],
    "gla": [{}, {"gate_divisor": 1.0}],
    "hornet": [{"order": 2, "kernel_size": 3}, {"scale": 1 / 3}],
    "lightnet": [
        {},
        {"positions": None},
        {"positions": "cosine", "toeplitz_axes": 2},
        {"is_causal": True},
        {"is_causal": True, "positions": "cosine", "gate_rank": 3},
    ],
    "local_plus": [{}, {"mixer": {"type": "gla"}, "kernel_size": 5}],
    "multi_scan": [
        {},
        {"orders": ["raster", "reversed-raster"], "combine": "sum"},
        {"orders": ["hilbert", "reversed-hilbert"], "combine": "share", "mixer": {"type": "retention"}},
    ],
    "longconv": [
        {},
        {"size": (40,), "is_causal": True},
        {"size": (9,), "threshold": 0.01},
        {"size": (6,), "is_causal": True},
    ],
    "s5": [{"is_bidirectional": True, "state_size": 5}, {}],
    "mamba": [
        {},
        {"is_bidirectional": True, "state_size": 5},
        {"order": "zigzag-8"},
        {"order": "hilbert", "expand": 1},
    ],
    "rmt": [{}, {"form": "decomposed"}],
    "rpe_fft": [{"size": (8, 6)}, {"size": (7, 5), "num_features": 11}],
    "ssd": [{}, {"is_bidirectional": True, "state_size": 5, "num_groups": 2}, {"order": "sweep-8", "head_dim": 64}],
    "vssd": [
        {},
        {"state_size": 5, "num_groups": 2, "expand": 1},
        {"is_positive": False, "kernel_size": 5, "has_bias": True, "has_conv_bias": False},
    ],
    "window": [{}, {"size": 2}, {"size": 5}],
}
# Causal ones that take a number from the whole sequence (a transform, a largest exponent): the past is equal to rounding, not to the bit.
ROUNDED = {"longconv", "lightnet"}

CASES = [(word, options) for word in words("mixer") for options in OPTIONS.get(word, [{}])]
each = pytest.mark.parametrize(
    ("word", "options"), CASES, ids=["-".join(map(str, [word, *options.values()])) for word, options in CASES]
)


def make(word: str, options: dict[str, Any] | None = None, layer: int = 0, dim: int = DIM, seed: int = 0) -> Any:
    """A mixer with every parameter off its starting value, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    spec = check("mixer", {"type": word, **(options or {})}, "mixer")
    mixer = build("mixer", spec, dim=dim, layer=layer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def tokens(grid: tuple[int, ...] = GRID, batch: int = 2, dim: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(batch, math.prod(grid), dim, generator=torch.Generator().manual_seed(seed))


def attempt(call: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    """What a call gives, or with what words it is refused."""
    try:
        return call(), ""
    except UsageError as error:
        return None, str(error)


@pytest.fixture(autouse=True)
def _paths_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run as they do for a user: Triton's interpreter, which the tests of kernels ask for, would take minutes here."""
    monkeypatch.setattr("genkit.dispatch.is_interpreting", lambda: False)


# The contract


@each
def test_says_what_it_is(word, options):
    mixer = make(word, options)
    for name in ("is_causal", "needs_grid", "is_resolution_free"):
        assert isinstance(getattr(mixer, name), bool), name


@each
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("grid", [GRID, (1, 1), (1, 4), (5, 1)])
def test_keeps_shape_and_type_on_any_grid(word, options, grid, layer):
    x = tokens(grid)
    out = make(word, options, layer)(x, dense_layout(grid))
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.isfinite().all()


@each
@pytest.mark.parametrize("grid", [(9,), (2, 3, 3)])
def test_other_numbers_of_axes_work_or_are_refused(word, options, grid):
    mixer, x = make(word, options), tokens(grid)
    out, refusal = attempt(lambda: mixer(x, dense_layout(grid)))
    if out is None:
        assert mixer.needs_grid
        assert "axes" in refusal
    else:
        assert out.shape == x.shape
        assert out.isfinite().all()


@each
def test_tokens_without_a_grid_work_or_are_refused(word, options):
    mixer, layout, x = make(word, options), dense_layout(GRID), tokens()
    loose = Layout(coords=layout.coords, grid=None)
    if mixer.needs_grid:
        with pytest.raises(UsageError, match="grid"):
            mixer(x, loose)
    else:
        torch.testing.assert_close(mixer(x, loose), mixer(x, layout))


@each
def test_padding_reaches_nothing_or_is_refused(word, options):
    mixer, layout, x = make(word, options), dense_layout(GRID), tokens()
    valid = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
    valid[:, 0] = False  # a causal mixer then has tokens with nothing before them
    valid[1, 20:] = False
    padded = Layout(coords=layout.coords, grid=GRID, valid=valid)
    changed = torch.where(valid.unsqueeze(-1), x, 100 * torch.randn_like(x)).requires_grad_()
    expected, refusal = attempt(lambda: mixer(x, padded))
    if expected is None:
        assert "padding" in refusal
        return
    out = mixer(changed, padded)
    torch.testing.assert_close(out[valid], expected[valid], atol=1e-6, rtol=1e-5)
    out[valid].square().sum().backward()
    assert (changed.grad[~valid] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@each
def test_a_sample_does_not_depend_on_its_batch(word, options):
    mixer, layout, x = make(word, options), dense_layout(GRID), tokens(batch=3)
    torch.testing.assert_close(mixer(x, layout)[1:2], mixer(x[1:2], layout), atol=2e-5, rtol=1e-5)


@each
def test_causal_ones_do_not_see_the_future(word, options):
    mixer, layout, x = make(word, options), dense_layout(GRID), tokens()
    if not mixer.is_causal:
        return
    out = mixer(x, layout)
    for t in (1, 17, 34):
        moved = x.clone()
        moved[:, t] += 1
        other = mixer(moved, layout)
        if word in ROUNDED:
            torch.testing.assert_close(other[:, :t], out[:, :t], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(other[:, :t], out[:, :t]), t
        assert (other[:, t] != out[:, t]).any()


@each
@pytest.mark.parametrize("first", [1, 6])
def test_generation_with_a_cache_equals_the_whole_pass(word, options, first):
    mixer, layout, x = make(word, options), dense_layout(GRID), tokens()
    if not mixer.is_causal:
        cache: Cache = {}
        torch.testing.assert_close(mixer(x, layout, cache), mixer(x, layout))
        assert not cache
        return
    with torch.no_grad():
        expected = mixer(x, layout)
        for cache in ({}, {"num_tokens": x.shape[1]}):
            ends = [0, first, *range(first + 3, x.shape[1] + 1)]  # some at once, some more at once, then one by one
            parts = [
                mixer(x[:, a:b], Layout(coords=layout.coords[:, a:b], grid=None), cache)
                for a, b in itertools.pairwise(ends)
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)
            assert mixer.layer in cache


@each
def test_the_gradient_reaches_every_parameter_and_token(word, options):
    mixer, layout, x = make(word, options), dense_layout(GRID), tokens().requires_grad_()
    out = mixer(x, layout)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@each
def test_a_state_dict_holds_all_there_is(word, options):
    mixer, other, layout, x = make(word, options), make(word, options, seed=5), dense_layout(GRID), tokens()
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x, layout), mixer(x, layout))


@each
def test_gradients_in_double_precision(word, options):
    grid = (3, 2)
    mixer = make(word, options).double()
    x = tokens(grid, batch=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixer(x, dense_layout(grid)), (x,), fast_mode=True)


@each
def test_resolution_free_ones_work_on_twice_the_grid(word, options):
    mixer, large = make(word, options), (14, 10)
    x = tokens(large)
    if mixer.is_resolution_free:
        small = mixer(tokens(), dense_layout(GRID)).abs().mean()
        ratio = mixer(x, dense_layout(large)).abs().mean() / small
        assert 0.4 < ratio < 2.5
    else:
        with pytest.raises(UsageError, match="size"):
            mixer(x, dense_layout(large))


@each
def test_runs_under_autocast(word, options):
    mixer, layout, x = make(word, options), dense_layout((3, 2)), tokens((3, 2))
    expected = mixer(x, layout)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x, layout)
    assert out.isfinite().all()
    assert (out.float() - expected).abs().max() < 0.06 * expected.abs().max()


@pytest.mark.parametrize("word", words("mixer"))
def test_learns_within_the_masked_generator(word):
    """Images of one id each: what is masked can be told from the rest, but only by moving it."""
    grid, S, B = (4, 4), 8, 16
    torch.manual_seed(0)
    mixer = check("mixer", {"type": word, **OPTIONS.get(word, [{}])[0]}, "mixer")
    model = Masked(codebook_size=S, num_levels=1, num_classes=0, grid=grid, dim=DIM, depth=2, mixer=mixer, mlp_ratio=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    layout, objective, losses = dense_layout(grid), Objective(label_smoothing=0.0), []
    for step in range(45):
        ids = torch.randint(S, (B, 1, 1, 1), generator=torch.Generator().manual_seed(step)).expand(B, 1, *grid)
        loss = objective(model, ids, {}, layout, Rng(sample_seeds(0, B * step, B)))["nll"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(S), rel=1e-4)
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]  # without mixing it stays where it is


# Runs mixers in forked processes, one for each size, and prints by how many MB the peak of memory grows.
MEMORY = """
import json, os, resource, sys
import torch
from genkit.nn.layout import dense_layout
from genkit.registry import build, check

torch.set_num_threads(1)

def step(mixer, side):
    x = torch.randn(1, side * side, 32, requires_grad=True)
    mixer(x, dense_layout((side, side))).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

for word, options, side in json.loads(sys.argv[1]):
    mixer = build("mixer", check("mixer", {"type": word, **options}, "mixer"), dim=32, layer=0)
    step(mixer, 8)  # loads what is loaded once
    grown = []
    for side in (8, side, 2 * side):
        read, write = os.pipe()
        if not os.fork():
            before = peak()
            step(mixer, side)
            os.write(write, str(peak() - before).encode())
            os._exit(0)
        os.wait()
        grown.append(float(os.read(read, 100)))
    print(json.dumps([word, options, *grown]), flush=True)
"""


def test_memory_of_linear_mixers_grows_linearly():
    """Forward and backward pass of 4,096 and of 16,384 tokens: a matrix of all pairs would grow 16 times."""
    linear: list[tuple[str, dict[str, Any]]] = [
        ("aaren", {}), ("block_sparse", {"pattern": "band", "reach": 16}), ("gla", {}), ("hornet", {}), ("lightnet", {}),
        ("lightnet", {"is_causal": True}), ("longconv", {}), ("mamba", {}), ("multi_scan", {}), ("retention", {}),
        ("rpe_fft", {"size": [128, 128], "num_heads": 2, "num_features": 2}), ("s5", {}), ("ssd", {}), ("topk", {}), ("vssd", {}), ("window", {}),
    ]  # fmt: skip
    program = [sys.executable, "-c", MEMORY, json.dumps([(*case, 64) for case in linear] + [("rmt", {}, 32)])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for word, options, constant, small, large in map(json.loads, done.stdout.splitlines()):
        small, large = small - constant, large - constant
        if word == "rmt":  # all pairs: the measurement sees it
            assert large > 8 * small
        else:
            assert large < 6 * small + 6, (word, options, small, large)


# What each one is


def test_window_attends_within_windows_and_nowhere_else():
    grid = (5, 4)
    for layer, cells in ((0, lambda n: n // 2), (1, lambda n: (n + 1) // 2)):
        mixer, layout, x = make("window", {"size": 2}, layer), dense_layout(grid), tokens(grid, batch=1)
        jacobian = torch.autograd.functional.jacobian(lambda x, m=mixer, g=layout: m(x, g).sum(-1)[0], x)
        sees = jacobian[:, 0].abs().sum(-1) > 0  # [N, N]
        y, x_ = layout.coords[0].long().unbind(-1)
        cell = torch.stack([cells(y), cells(x_)], dim=-1)
        assert torch.equal(sees, (cell[:, None] == cell[None]).all(-1)), layer


def test_one_window_with_relative_bias_is_attention():
    mixer, x = make("window", {"size": 4}), tokens((4, 4))
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    scores = torch.einsum("bihk,bjhk->bhij", mixer.q_norm(q), mixer.k_norm(k)) / 8**0.5
    coords = dense_layout((4, 4)).coords[0].long()
    offset = coords[:, None] - coords[None] + 3  # [N, N, 2]
    scores = scores + mixer.bias[:, offset[..., 0] * 7 + offset[..., 1]]
    expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(mixer(x, dense_layout((4, 4))), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("word", "options"), [("axial", {}), ("block_sparse", {"reach": 9, "tile": 3})])
def test_with_nothing_left_out_it_is_plain_attention(word, options):
    mixer, attention = make(word, options), make("attention")
    attention.load_state_dict(mixer.state_dict())
    for grid in [(11,)] if word == "axial" else [(11,), GRID, (2, 3, 4)]:
        x, layout = tokens(grid), dense_layout(grid)
        torch.testing.assert_close(mixer(x, layout), attention(x, layout), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_axial_sees_its_line(axis):
    mixer, layout, x = (
        make("axial", {"combine": "alternate"}, layer=axis),
        dense_layout((4, 3)),
        tokens((4, 3), batch=1),
    )
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, layout).sum(-1)[0], x)
    coords = layout.coords[0]
    same = (coords[:, None] == coords[None])[..., 1 - axis]
    assert torch.equal(jacobian[:, 0].abs().sum(-1) > 0, same)


def test_rmt_on_one_row_is_the_same_whole_and_decomposed():
    whole, decomposed = make("rmt"), make("rmt", {"form": "decomposed"})
    decomposed.load_state_dict(whole.state_dict())
    for grid in ((1, 9), (9, 1)):
        x, layout = tokens(grid), dense_layout(grid)
        torch.testing.assert_close(whole(x, layout), decomposed(x, layout), atol=1e-6, rtol=1e-5)
    assert (whole(tokens(), dense_layout(GRID)) - decomposed(tokens(), dense_layout(GRID))).abs().max() > 1e-3


def test_rmt_equals_its_equation():
    mixer, x, layout = make("rmt", {"num_heads": 2, "first": 3.0, "spread": 5.0}), tokens(), dense_layout(GRID)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
    rates = 10_000.0 ** (-torch.arange(8) / 7)
    turn = torch.polar(torch.ones(35, 8), torch.arange(35).unsqueeze(1) * rates).unsqueeze(1)  # [N, 1, K / 2]
    q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2) for y in (q, k))
    gamma = torch.tensor([1 - 2**-3.0, 1 - 2**-5.5])
    distance = torch.cdist(layout.coords, layout.coords, p=1)  # [1, N, N]
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / 4 + distance.unsqueeze(1) * gamma.log().view(1, 2, 1, 1)
    mixed = torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2)
    image = v.flatten(2).transpose(1, 2).unflatten(2, GRID)
    expected = mixer.proj(mixed + mixer.local(image).flatten(2).transpose(1, 2))
    torch.testing.assert_close(mixer(x, layout), expected, atol=1e-5, rtol=1e-5)


def test_hornet_of_order_two_by_hand():
    mixer, x = make("hornet", {"order": 2, "scale": 0.5, "kernel_size": 3}), tokens()
    p, q = mixer.proj_in(x).split([16, 48], dim=-1)
    q = 0.5 * mixer.conv(q.transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)
    expected = mixer.proj_out(mixer.widen[0](p * q[..., :16]) * q[..., 16:])
    torch.testing.assert_close(mixer(x, dense_layout(GRID)), expected)


def test_hornet_has_the_published_widths():
    mixer = make("hornet", {"order": 5}, dim=64)
    assert mixer.widths == [4, 8, 16, 32, 64]
    assert sum(mixer.widths) + mixer.widths[0] == 128


@pytest.mark.parametrize("grid", [(4, 3), (5, 6), (1, 4)])
def test_rpe_fft_equals_the_sum(grid):
    mixer, x, layout = make("rpe_fft", {"size": (5, 6)}).double(), tokens(grid).double(), dense_layout(grid)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    q = mixer.features(nn.functional.normalize(q, dim=-1) * mixer.temperature)
    k = mixer.features(nn.functional.normalize(k, dim=-1))
    coords = layout.coords[0].long()
    offset = coords[None] - coords[:, None]  # [i, j] = j - i
    weights = torch.einsum("bihr,bjhr->bhij", q, k) * mixer.bias[:, offset[..., 0] + 4, offset[..., 1] + 5].exp()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2))
    torch.testing.assert_close(mixer(x, layout), expected)


def test_rpe_fft_approaches_softmax_attention_with_many_features():
    mixer, x, layout = make("rpe_fft", {"size": (4, 4), "num_features": 4096}), tokens((4, 4)), dense_layout((4, 4))
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    q, k = nn.functional.normalize(q, dim=-1) * mixer.temperature, nn.functional.normalize(k, dim=-1)
    coords = layout.coords[0].long()
    offset = coords[None] - coords[:, None] + 3
    scores = torch.einsum("bihk,bjhk->bhij", q, k) + mixer.bias[:, offset[..., 0], offset[..., 1]]
    expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v).flatten(2))
    assert (mixer(x, layout) - expected).abs().max() < 0.1 * expected.abs().max()


def test_topk_that_keeps_all_is_channel_attention():
    mixer, x = make("topk", {"num_heads": 32}), tokens()  # one channel per head: each map keeps it
    v = mixer.conv(mixer.qkv(x).transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)[..., 64:]
    torch.testing.assert_close(mixer(x, dense_layout(GRID)), mixer.proj(v * mixer.mixture.sum()), atol=1e-5, rtol=1e-5)


def test_topk_keeps_the_published_shares():
    mixer, x = make("topk", {"num_heads": 1}), tokens()
    qkv = mixer.conv(mixer.qkv(x).transpose(1, 2).unflatten(2, GRID)).flatten(2)  # [B, 3 D, N]
    q, k, v = qkv.chunk(3, dim=1)
    scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT * mixer.temperature[0]
    expected = torch.zeros_like(v)
    for share, count in zip(mixer.mixture, (16, 21, 24, 25), strict=True):
        threshold = scores.topk(count, dim=-1).values[..., -1:]
        expected = expected + share * scores.masked_fill(scores < threshold, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(mixer(x, dense_layout(GRID)), mixer.proj(expected.mT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("word", ["lightnet", "aaren"])
def test_softmax_over_tokens_equals_its_definition(word):
    mixer, x, layout = make(word, {"positions": None} if word == "lightnet" else {}), tokens(), dense_layout(GRID)
    if word == "aaren":
        k, v = mixer.kv(x).unflatten(-1, (2, 4, 8)).unbind(2)
        scores = (k * mixer.query).sum(-1) / 8**0.5  # [B, N, H]
        past = torch.ones(35, 35, dtype=torch.bool).tril()
        weights = scores.mT.unsqueeze(2).masked_fill(~past, -math.inf).softmax(-1)  # [B, H, N, N]
        expected = mixer.proj(torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2))
    else:
        q, g, v = (proj(x).unflatten(-1, (4, 8)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        state = torch.einsum("bnhk,bnhv->bhkv", g.softmax(1), v)
        o = torch.einsum("bnhk,bhkv->bnhv", nn.functional.silu(q), state).flatten(2) / 8**0.5
        expected = mixer.o_proj(mixer.norm(o) * nn.functional.silu(mixer.g_proj(x)))
    torch.testing.assert_close(mixer(x, layout), expected, atol=1e-5, rtol=1e-4)


def test_lightnet_without_positions_does_not_know_the_order():
    mixer, x, layout = make("lightnet", {"positions": None}), tokens(), dense_layout(GRID)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x[:, order], layout), mixer(x, layout)[:, order], atol=1e-5, rtol=1e-5)
    with_positions = make("lightnet")
    assert (with_positions(x[:, order], layout) - with_positions(x, layout)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["rotary", "cosine", None])
def test_lightnet_causal_and_not_agree_on_the_last_token(positions):
    causal = make("lightnet", {"positions": positions, "is_causal": True})
    whole = make("lightnet", {"positions": positions})
    whole.load_state_dict(causal.state_dict())
    x, layout = tokens(), dense_layout(GRID)
    torch.testing.assert_close(causal(x, layout)[:, -1], whole(x, layout)[:, -1], atol=1e-5, rtol=1e-4)


def test_retention_equals_its_matrix():
    mixer, x, layout = make("retention", {"num_heads": 2}), tokens(), dense_layout(GRID)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
    table = rope_table(layout.coords, 16, 100.0)
    scores = torch.einsum("bihk,bjhk->bhij", rotate(q, table), rotate(k, table)) / 4
    gamma = torch.tensor([1 - 2**-5.0, 1 - 2**-6.0]).view(1, 2, 1, 1)
    steps = torch.arange(35)
    age = steps[:, None] - steps
    o = torch.einsum("bhij,bjhv->bihv", scores * torch.where(age >= 0, gamma**age, 0.0), v)
    gate = nn.functional.silu(mixer.g_proj(x)).unflatten(-1, (2, 16))
    torch.testing.assert_close(mixer(x, layout), mixer.o_proj((mixer.norm(o) * gate).flatten(2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_s5_equals_its_recurrence(is_bidirectional):
    mixer, x = make("s5", {"state_size": 6, "is_bidirectional": is_bidirectional}), tokens((9,))
    eigenvalues, B, C = (torch.view_as_complex(p) for p in (mixer.eigenvalues, mixer.B, mixer.C))
    decay = (mixer.log_step.exp() * eigenvalues).exp()
    B = ((decay - 1) / eigenvalues).unsqueeze(-1) * B

    def run(x: Tensor, C: Tensor) -> Tensor:
        state, out = torch.zeros(2, 6, dtype=torch.complex64), []
        for u in x.unbind(1):
            state = decay * state + u.to(B.dtype) @ B.mT
            out.append(2 * (state @ C.mT).real)
        return torch.stack(out, dim=1)

    y = run(x, C[:, :6]) + mixer.skip * x
    if is_bidirectional:
        y = y + run(x.flip(1), C[:, 6:]).flip(1)
    expected = nn.functional.glu(mixer.proj(nn.functional.gelu(y, approximate="tanh")), dim=-1)
    torch.testing.assert_close(mixer(x, dense_layout((9,))), expected, atol=1e-5, rtol=1e-4)


def test_s5_starts_at_the_published_eigenvalues():
    eigenvalues, vectors = hippo(8)
    root = (2 * torch.arange(8) + 1.0).sqrt()
    legs = -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(8) + 1.0)  # HiPPO-LegS
    normal = legs + root[:, None] * root / 2  # plus p p^T, p = root / sqrt(2)
    rebuilt = vectors @ torch.diag(eigenvalues) @ vectors.mH
    torch.testing.assert_close(rebuilt.real, normal, atol=1e-4, rtol=1e-4)
    assert (eigenvalues[:4].imag > 0).all()


@pytest.mark.parametrize("size", [(4,), (3, 5), (7, 5)])
def test_long_convolution_equals_a_convolution(size):
    grid = GRID if len(size) == 2 else (35,)
    mixer, x = make("longconv", {"size": size}), tokens(grid)
    image = x.transpose(1, 2).unflatten(2, grid)  # [B, D, *grid]
    weight = mixer.kernel.movedim(-1, 0).unsqueeze(1).flip(tuple(range(2, 2 + len(size))))
    convolve = nn.functional.conv2d if len(size) == 2 else nn.functional.conv1d
    mixed = convolve(image, weight, padding=[s - 1 for s in size], groups=DIM).flatten(2).transpose(1, 2)
    expected = nn.functional.glu(mixer.proj(nn.functional.gelu(mixed + mixer.skip * x)), dim=-1)
    torch.testing.assert_close(mixer(x, dense_layout(grid)), expected, atol=1e-5, rtol=1e-4)


def test_vssd_with_the_sign_turned_keeps_only_the_skip():
    """y = D x + S^T C and y' = D x - S^T C: their mean is the skip alone."""
    mixer, x, layout = make("vssd"), tokens(), dense_layout(GRID)
    mixer.norm = nn.Identity()
    plain = mixer(x, layout)
    mixer.sign = make("vssd", {"is_positive": False}).sign
    turned = mixer(x, layout)
    mixer.A_log.data.fill_(-torch.inf)
    torch.testing.assert_close((plain + turned) / 2, mixer(x, layout), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, turned)


def test_vssd_without_its_convolution_does_not_know_the_order():
    mixer, x, layout = make("vssd"), tokens(), dense_layout(GRID)
    with torch.no_grad():
        middle = mixer.conv2d.weight[:, :, 1, 1].clone()
        mixer.conv2d.weight.zero_()[:, :, 1, 1] = middle
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x[:, order], layout), mixer(x, layout)[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("word", ["mamba", "ssd"])
def test_a_scan_follows_its_order(word):
    """Token order.index[i] sees exactly order.index[0 .. i]."""
    mixer, layout, x = make(word, {"order": "hilbert"}), dense_layout((3, 4)), tokens((3, 4), batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, layout).sum(-1)[0], x)
    order = scan_order("hilbert", (3, 4)).index
    sees = (jacobian[:, 0].abs().sum(-1) > 0)[order][:, order]
    assert torch.equal(sees, torch.ones(12, 12, dtype=torch.bool).tril())


@pytest.mark.parametrize("word", ["mamba", "ssd"])
def test_the_way_back_is_the_way_there_on_reversed_tokens(word):
    mixer, layout, x = make(word, {"is_bidirectional": True}), dense_layout((12,)), tokens((12,))
    swapped = make(word, {"is_bidirectional": True})
    state = mixer.state_dict()
    exchange = {"scans.0.": "scans.1.", "scans.1.": "scans.0."}
    swapped.load_state_dict({exchange.get(n[:8], n[:8]) + n[8:]: value for n, value in state.items()})
    torch.testing.assert_close(swapped(x.flip(1), layout).flip(1), mixer(x, layout), atol=1e-5, rtol=1e-4)


def test_mamba_scans_a_state_of_the_published_shape():
    mixer = make("mamba", dim=48)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes["in_proj.weight"] == (192, 48)
    assert shapes["scans.0.conv1d.weight"] == (96, 1, 4)
    assert shapes["scans.0.x_proj.weight"] == (3 + 32, 96)
    assert shapes["scans.0.dt_proj.weight"] == (96, 3)
    assert shapes["scans.0.A_log"] == (96, 16)


def test_initial_step_sizes_survive_the_block_that_holds_the_mixer():
    model = Masked(codebook_size=4, num_levels=1, num_classes=0, grid=(2, 2), dim=DIM, depth=1, mixer={"type": "mamba"})
    scan = model.blocks[0].mixer.scans[0]
    steps = nn.functional.softplus(scan.dt_proj.bias)
    assert steps.min() > 0.9e-3
    assert steps.max() < 0.11
    assert torch.equal(scan.A_log[0].exp().round(), torch.arange(1.0, 17.0))


def test_multi_scan_in_raster_order_is_the_mixer_itself():
    mixer, inner = make("multi_scan", {"orders": "raster"}), make("gla")
    inner.load_state_dict({name[9:]: value for name, value in mixer.state_dict().items()})
    torch.testing.assert_close(mixer(tokens(), dense_layout(GRID)), inner(tokens(), dense_layout(GRID)))


def test_multi_scan_there_and_back_sees_everything():
    options = {"orders": ["raster", "reversed-raster"], "combine": "share"}
    mixer, layout, x = make("multi_scan", options), dense_layout((3, 2)), tokens((3, 2), batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, layout).sum(-1)[0], x)
    assert (jacobian[:, 0].abs().sum(-1) > 0).all()


def test_block_sparse_top_follows_the_content():
    mixer, layout = make("block_sparse", {"pattern": "top", "tile": 2, "density": 0.25}), dense_layout((16, 16))
    one, other = (tokens((16, 16), batch=1, seed=seed) for seed in (1, 2))

    def chosen(x: Tensor) -> Tensor:
        q, k, _ = mixer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        return mixer.choose((16, 16), q.transpose(1, 2), k.transpose(1, 2), None).dense()

    assert (chosen(one) != chosen(other)).any()
    assert mixer(one, layout).isfinite().all()


def test_a_list_of_mixers_is_a_pattern_over_the_depth():
    pattern = [{"type": "gla"}, {"type": "window", "size": 2}, {"type": "attention"}]
    mixer = [check("mixer", part, "mixer") for part in pattern]
    model = Masked(codebook_size=4, num_levels=1, num_classes=0, grid=(3, 3), dim=DIM, depth=4, mixer=mixer)
    assert [type(block.mixer).__name__ for block in model.blocks] == ["GLA", "Window", "Attention", "GLA"]
    assert model.blocks[1].mixer.is_moved
    ids = torch.randint(5, (2, 1, 3, 3), generator=torch.Generator().manual_seed(0))
    assert model(ids, None, {}, dense_layout((3, 3))).shape == (2, 1, 3, 3, 4)


@pytest.mark.parametrize(
    ("word", "options", "message"),
    [
        ("attention", {"num_heads": 5}, "num_heads=5 does not divide"),
        ("attention", {"head_dim": 7}, "head_dim=7 .* even with rope"),
        ("hornet", {"order": 7}, "order=7"),
        ("hornet", {"kernel_size": 4}, "kernel_size=4 must be odd"),
        ("window", {"size": 0}, "size=0"),
        ("rpe_fft", {"size": (0, 3)}, "size"),
        ("block_sparse", {"density": 0.0}, "density"),
        ("block_sparse", {"block_size": 20}, "block_size=20"),
        ("mamba", {"order": "zigzig-8"}, "did you mean 'zigzag-8'"),
        ("mamba", {"state_size": 0}, "state_size=0"),
        ("ssd", {"num_groups": 3}, "num_groups=3"),
        ("ssd", {"head_dim": 5}, "head_dim=5"),
        ("vssd", {"num_groups": 3}, "num_groups=3"),
        ("vssd", {"kernel_size": 2}, "kernel_size=2 must be odd"),
        ("gla", {"gate_rank": 0}, "gate_rank=0"),
        ("rmt", {"num_heads": 32}, "must be even"),
        ("lightnet", {"is_causal": True, "toeplitz_axes": 2}, "toeplitz_axes"),
        ("lightnet", {"positions": "round"}, "positions"),
        ("multi_scan", {"mixer": {"type": "vssd"}}, "works on a grid"),
        ("multi_scan", {"orders": []}, "empty list"),
        ("longconv", {"size": (4, 4), "is_causal": True}, "one length"),
        ("longconv", {"threshold": -1.0}, "threshold"),
        ("s5", {"state_size": 0}, "state_size=0"),
        ("local_plus", {"kernel_size": 2}, "must be odd"),
    ],
)
def test_options_that_do_not_fit_are_refused(word, options, message):
    with pytest.raises(UsageError, match=message):
        make(word, options)


@pytest.mark.parametrize(("word", "names"), [("mamba", {"A_log"}), ("s5", {"eigenvalues", "B"})])
def test_decay_rates_are_not_decayed(word, names):
    mixer = build("mixer", {"type": word}, dim=16, layer=0)
    optimizer = adamw(mixer, {"weight_decay": 0.1, "lr": 1e-3, "betas": (0.9, 0.95)})
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {name.rpartition(".")[2] for name, p in mixer.named_parameters() if p.ndim >= 2 and id(p) not in decayed}
    assert spared == names
