"""Every mixer against the contract, by its word: a new file in genkit/mixers is tested by being there."""

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
from torch import Tensor

from genkit.backbones.masked import Masked
from genkit.errors import UsageError
from genkit.interfaces import Cache, Layout
from genkit.nn.layout import dense_layout
from genkit.objectives.masked import Masked as Objective
from genkit.optim import adamw
from genkit.registry import build, check, words
from genkit.rng import Rng, sample_seeds
from tests.mixing import DIM, GRID, make, tokens

pytestmark = pytest.mark.usefixtures("paths_of_users")
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


def attempt(call: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    """What a call gives, or with what words it is refused."""
    try:
        return call(), ""
    except UsageError as error:
        return None, str(error)


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
