"""FIT: tiles that talk through latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.fit_interleaved import LATENTS, CrossAttention, FITInterleaved, parse_layers
from genkit.errors import UsageError
from genkit.interfaces import Layout
from genkit.nn.layout import dense_layout
from tests.networks import noisy

LABELS = torch.tensor([0, 3, -1])
GRID = (8, 16)  # 4x8 tokens in 2x4 tiles of 2x2


def network(grid: tuple[int, ...] = GRID, random: bool = True, **options: Any) -> FITInterleaved:
    """Small, and away from its initialisation, where it returns 0."""
    torch.manual_seed(0)
    options = {"dim": 16, "latent_dim": 24, "tile": 2, "latents_per_tile": 3, **options}
    model = FITInterleaved(channels=3, num_classes=4, grid=grid, **options)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def run(model: Any, x: Tensor, t: Tensor | None = None, label: Tensor | None = None, **options: Any) -> Tensor:
    t = torch.linspace(0.1, 0.9, len(x)) if t is None else t
    layout = options.pop("layout", None) or dense_layout(tuple(x.shape[2:]))
    return model(x, t, {} if label is None else {"label": label}, layout, **options)


def test_size_is_that_of_the_released_code():
    # There with a table of all 4 x 3 latents, where here 3 are learned; 12 numbers per token, and 10 classes through a linear layer with a bias.
    model = FITInterleaved(
        channels=12, num_classes=10, grid=(8, 8), dim=32, latent_dim=48, tile=4, latents_per_tile=3, patch_size=1, self_cond=0.5
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) + 9 * 48 == 216_460


def test_a_perceptron_behind_what_is_read():
    torch.manual_seed(0)
    plain = CrossAttention(dim=8, from_dim=12, num_heads=2)
    more = CrossAttention(dim=8, from_dim=12, num_heads=2, mlp_ratio=2.0)
    more.load_state_dict(plain.state_dict(), strict=False)
    x, y = noisy(2, 5, 8), noisy(2, 3, 12)
    read = plain(x, y)
    assert more.mlp is not None
    torch.testing.assert_close(more(x, y), read + more.mlp(more.norm_mlp(read)))
    stages = network(layers="(0)1(0)1(0)", cross_mlp=True).stages
    assert [stage.told.mlp is None for stage in stages[:2]] == [True, True]  # the condition is read without
    assert [part.mlp is not None for stage in stages[:2] for part in (stage.read, stage.write)] == [True] * 4


def test_layers_are_read_as_in_the_paper():
    assert parse_layers("(2)4(0)1(3)") == [(2, 4), (0, 1), (3, 0)]
    assert parse_layers("(2)") == [(2, 0)]
    for wrong in ("(2)4", "2(4)", "(2)0(2)", "", "(a)", "(1)2(1"):
        with pytest.raises(UsageError, match="must be"):
            parse_layers(wrong)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (GRID, {}),
        (GRID, {"learn_sigma": True, "self_cond": 0.5}),
        ((4, 8, 8), {"patch_size": (1, 2, 2), "tile": (4, 2, 2)}),
        ((16,), {"tile": 4}),
        (GRID, {"layers": "(2)", "tile": (2, 4)}),
        (GRID, {"layers": "(0)2(0)1(0)", "cross_mlp": True}),
        (GRID, {"global_mixer": [{"type": "attention", "num_heads": 2}]}),
    ],
)
def test_output_has_the_shape_of_the_input(grid, options):
    model = network(grid, **options)
    for shape in (grid, tuple(2 * length for length in grid)):
        assert run(model, noisy(2, 3, *shape)).shape == (2, model.out_channels, *shape)


def changed(model: FITInterleaved, where: tuple[slice, slice]) -> Tensor:
    """Which tokens' outputs change with the pixels there: bool [4, 8]."""
    x = noisy(1, 3, *GRID)
    other = x.clone()
    other[:, :, *where] += 1
    difference = (run(model, x) - run(model, other)).abs().amax((0, 1))
    return difference.view(4, 2, 8, 2).amax((1, 3)) > 1e-6


def test_latents_carry_what_tiles_see_to_all_others():
    first = (slice(0, 4), slice(0, 4))  # one tile
    assert changed(network(), first).all()
    alone = changed(network(layers="(2)"), first)
    assert alone[:2, :2].all()
    assert alone.sum() == 4


def test_equal_tiles_in_other_places_give_other_outputs():
    out = run(network(), torch.ones(1, 3, *GRID))
    tiles = out.view(3, 2, 4, 4, 4).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)
    assert torch.pdist(tiles).min() > 1e-3
    apart = run(network(layers="(2)"), torch.ones(1, 3, *GRID)).view(3, 2, 4, 4, 4)
    torch.testing.assert_close(apart[:, 0, :, 0], apart[:, 1, :, 2])  # without latents a tile does not know where it is


def test_a_fresh_network_returns_zero_and_learns_everywhere():
    model = network(random=False, self_cond=0.5).train()
    x = noisy(3, 3, *GRID)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(4):
        out = run(model, x, label=LABELS)
        if step == 0:
            assert torch.equal(out, torch.zeros_like(out))
        optimizer.zero_grad()
        (out - noisy(*out.shape, seed=1)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_padding_is_ignored_and_comes_out_as_zero():
    model, x = network(), noisy(2, 3, *GRID)
    valid = torch.zeros(2, *GRID, dtype=torch.bool)
    valid[0, :6, :10] = True  # tiles in part, in full and not at all
    valid[1] = True
    layout = Layout(dense_layout(GRID).coords, GRID, valid.flatten(1))
    out = run(model, x, layout=layout)
    assert out.isfinite().all()
    assert not out.masked_select(~valid.unsqueeze(1)).any()
    torch.testing.assert_close(out[1], run(model, x)[1], atol=1e-5, rtol=1e-5)
    other = torch.where(valid.unsqueeze(1), x, 100.0)
    torch.testing.assert_close(run(model, other, layout=layout), out)
    nothing = Layout(layout.coords, GRID, torch.zeros(2, 128, dtype=torch.bool))
    assert not run(model, x, layout=nothing).any()


def test_samples_do_not_see_each_other():
    model, x, t = network(), noisy(3, 3, *GRID), torch.tensor([0.1, 0.5, 0.9])
    whole = run(model, x, t, LABELS)
    for i in range(3):
        one = run(model, x[i : i + 1], t[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1], atol=1e-5, rtol=1e-5)


def test_no_label_is_the_null_class_and_time_and_label_matter():
    model, x = network(), noisy(1, 3, *GRID)
    outs = [run(model, x, torch.tensor(t), torch.tensor([label])) for t in (0.1, 1.0) for label in (-1, 0, 3)]
    assert torch.pdist(torch.stack(outs).flatten(1)).min() > 1e-4
    torch.testing.assert_close(run(model, x, torch.tensor(0.1)), outs[0])
    assert model(x, None, {}, dense_layout(GRID)).isfinite().all()


def test_latents_are_carried_between_calls_where_they_are_trained_to_be():
    x = noisy(2, 3, *GRID)
    cache: dict[Any, Any] = {}
    assert torch.equal(run(network(), x, cache=cache), run(network(), x))
    assert LATENTS not in cache
    model = network(self_cond=0.5)
    first = run(model, x, cache=cache)
    assert torch.equal(first, run(model, x))
    assert cache[LATENTS].shape == (2, 8 * 3, 24)
    assert (run(model, x, cache=cache) - first).abs().max() > 1e-3
    torch.nn.init.zeros_(model.gain_before.weight)  # as at first: they have no say
    torch.nn.init.zeros_(model.gain_before.bias)
    torch.testing.assert_close(run(model, x, cache=cache), run(model, x))


def test_checkpointed_gradients_are_the_same():
    gradients = []
    for checkpointed in (False, True):
        model = network().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        run(model, noisy(2, 3, *GRID)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_model_survives_saving(tmp_path):
    model = network(self_cond=0.5)
    model.save_pretrained(tmp_path)
    x = noisy(2, 3, *GRID)
    assert torch.equal(run(FITInterleaved.from_pretrained(tmp_path).eval(), x), run(model, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 3}, r"grid of \(4, 8\) cannot be cut into patches of \(3, 3\)"),
        ({"latents_per_tile": 0}, "latents_per_tile=0"),
        ({"self_cond": 1.5}, "self_cond=1.5"),
        ({"latent_dim": 20}, "latent_dim=20 must be a multiple of 8"),
        ({"num_heads": 3, "latent_heads": 3}, "3 heads do not divide the width 16"),
        ({"layers": "(1)2"}, r"layers=\(1\)2 must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        network(**options)
