"""Every mixer against the contract, by its word: a new file in genkit/mixers is tested by being there. Then what each is, against an independent form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genkit.backbones.masked import Masked
from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.nn.layout import dense_layout
from genkit.objectives.masked import Masked as Objective
from genkit.registry import build, check, words
from genkit.rng import Rng, sample_seeds

DIM = 32
GRID = (7, 5)
# Options under which a mixer is tested besides its defaults, and instead of them where they do not fit a tiny size.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "attention": [{}, {"is_causal": True}, {"qk_norm": False, "rope": False, "num_heads": 2}],
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
    "mamba": [
        {},
        {"is_bidirectional": True, "state_size": 5},
        {"order": "zigzag-8"},
        {"order": "hilbert", "expand": 1},
    ],
    "rmt": [{}, {"form": "decomposed"}],
    "rpe_fft": [{"size": (8, 6)}, {"size": (7, 5), "num_features": 11}],
    "ssd": [{}, {"is_bidirectional": True, "state_size": 5, "num_groups": 2}, {"order": "sweep-8", "head_dim": 64}],
    "vssd": [{}, {"state_size": 5, "num_groups": 2, "expand": 1}],
    "window": [{}, {"size": 2}, {"size": 5}],
}
# Causal ones that take a number from the whole sequence (a transform, a largest exponent): the past is equal to rounding, not to the bit.
ROUNDED = {"longconv", "lightnet"}

CASES = [(word, options) for word in words("mixer") for options in OPTIONS.get(word, [{}])]
each = pytest.mark.parametrize(
    ("word", "options"), CASES, ids=["-".join(map(str, [word, *options.values()])) for word, options in CASES]
)


def make(word: str, options: dict[str, Any] | None = None, layer: int = 0, dim: int = DIM, seed: int = 0) -> nn.Module:
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
            ends = [0, first, *range(first + 1, x.shape[1] + 1)]
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
    print("LOSS", word, sum(losses[-5:]) / 5)
    assert sum(losses[-5:]) / 5 < 0.85 * losses[0]  # without mixing it stays where it is
