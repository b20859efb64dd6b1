"""DiT: the network of DiT and SiT, on grids of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.dit import DiT
from genkit.errors import GenkitError, UsageError
from genkit.importers import diffusers_dit, dit, sit
from genkit.importers.names import source_of
from genkit.interfaces import Layout
from genkit.nn.grid_positions import GridPositions, grid_waves
from genkit.nn.layout import dense_layout
from genkit.nn.patch import patchify, unpatchify
from genkit.nn.timestep import time_waves
from tests.networks import noisy, run

# Width, depth and heads of the paper's sizes, and how many weights train with patches of 2 on 32x32 latents of 4 channels and 1000 classes.
SIZES = {
    "S": (384, 12, 6, 32_865_056),
    "B": (768, 12, 12, 130_315_808),
    "L": (1024, 24, 16, 457_840_672),
    "XL": (1152, 28, 16, 674_834_720),
}
LABELS = torch.tensor([0, 3, -1])


def attention(num_heads: int) -> dict[str, Any]:
    return {"type": "attention", "num_heads": num_heads, "qk_norm": False, "rope": False}


def network(grid: tuple[int, ...] = (6, 8), random: bool = True, **options: Any) -> DiT:
    """Small, and away from its initialisation, where it returns 0."""
    torch.manual_seed(0)
    options = {"dim": 16, "depth": 2, "mixer": attention(2), **options}
    model = DiT(channels=3, num_classes=4, grid=grid, **options)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# --- parts


@pytest.mark.parametrize(("shape", "sides"), [((2, 3, 8), (4,)), ((1, 2, 6, 4), (3, 2)), ((2, 1, 2, 4, 6), (1, 2, 2))])
def test_patches_are_cut_and_put_back(shape, sides):
    x = noisy(*shape)
    tokens = tuple(length // side for length, side in zip(shape[2:], sides, strict=True))
    patches = patchify(x, sides)
    assert patches.shape == (shape[0], torch.Size(tokens).numel(), shape[1] * torch.Size(sides).numel())
    assert torch.equal(unpatchify(patches, tokens, sides), x)


def test_patches_times_a_matrix_are_a_strided_convolution():
    conv = torch.nn.Conv2d(3, 5, 2, stride=2)
    x = noisy(2, 3, 6, 8)
    expected = conv(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(x, (2, 2)) @ conv.weight.flatten(1).T + conv.bias, expected)


def test_time_waves_are_cosines_then_sines():
    waves = time_waves(torch.tensor([0.0, 10.0]), 256)
    assert torch.equal(waves[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    torch.testing.assert_close(
        waves[1, [0, 64, 128, 192]],
        torch.tensor([10.0, 0.1, 10.0, 0.1])
        .cos()
        .where(torch.tensor([True, True, False, False]), torch.tensor([10.0, 0.1, 10.0, 0.1]).sin()),
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_time_waves_equal_those_of_diffusers(shift):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 0.37, 10.0, 999.0])
    expected = embeddings.get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(time_waves(t, 256, shift), expected)


def test_position_waves_equal_those_of_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    expected = embeddings.get_2d_sincos_pos_embed(24, (5, 5), base_size=5, output_type="pt")
    torch.testing.assert_close(grid_waves((5, 5), 24)[0], expected.float(), atol=1e-6, rtol=0)


def test_position_waves_hold_columns_first():
    waves = grid_waves((3, 4), 8).view(3, 4, 8)
    assert torch.equal(waves[0, :, :4], waves[2, :, :4])  # the first half does not know the row
    assert torch.equal(waves[:, 0, 4:], waves[:, 3, 4:])
    torch.testing.assert_close(
        waves[0, 2, :4],
        torch.tensor([2.0, 0.02, 2.0, 0.02])
        .sin()
        .where(torch.tensor([True, True, False, False]), torch.tensor([2.0, 0.02, 2.0, 0.02]).cos()),
    )


def test_another_grid_is_stretched_or_continued():
    device = torch.device("cpu")
    stretch, go_on = (GridPositions(grid=(4, 4), dim=8, beyond=beyond) for beyond in ("stretch", "continue"))
    assert torch.equal(stretch((4, 4), device), go_on((4, 4), device))
    assert torch.equal(go_on((6, 6), device), grid_waves((6, 6), 8))
    # Every second token of the doubled grid lies a quarter to the left of a trained one, and its neighbour a quarter to the right.
    fine = stretch((8, 4), device).view(8, 4, 8)[:, 0, 4]  # sin(row)
    torch.testing.assert_close(fine, torch.sin((torch.arange(8) + 0.5) / 2 - 0.5))


def test_a_table_is_stretched_and_survives_a_constant():
    table = GridPositions(grid=(4, 6), dim=8, kind="table")
    device = torch.device("cpu")
    assert torch.equal(table((4, 6), device), table.table)
    with torch.no_grad():
        table.table.fill_(0.5)
    torch.testing.assert_close(table((7, 9), device), torch.full((1, 63, 8), 0.5))


# --- network


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    dim, depth, heads, expected = SIZES[size]
    with torch.device("meta"):
        model = DiT(
            channels=4,
            num_classes=1000,
            grid=(32, 32),
            dim=dim,
            depth=depth,
            patch_size=2,
            mixer=attention(heads),
            learn_sigma=True,
        )
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("grid", "patch"), [((6, 8), 2), ((9, 6), (3, 2)), ((4, 6, 6), (1, 2, 2)), ((10,), 5)])
def test_output_has_the_shape_of_the_input(grid, patch, learn_sigma):
    model = network(grid, patch_size=patch, learn_sigma=learn_sigma)
    assert model.out_channels == (6 if learn_sigma else 3)
    assert run(model, noisy(2, 3, *grid)).shape == (2, model.out_channels, *grid)


def test_a_fresh_network_returns_zero_and_learns_layer_by_layer():
    model = network(random=False).train()
    x, target = noisy(3, 3, 6, 8), noisy(3, 3, 6, 8, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    for step in range(3):
        out = run(model, x, label=LABELS)
        if step == 0:
            assert torch.equal(out, torch.zeros_like(out))
        optimizer.zero_grad()
        (out - target).square().mean().backward()
        moved.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert moved[0] == {"head.linear.weight", "head.linear.bias"}
    assert {"head.modulation.weight", "embed.weight", "blocks.0.modulation.weight"} <= moved[1]
    assert moved[2] == {name for name, _ in model.named_parameters()}


def test_initialisation_is_the_papers():
    model = network(random=False, dim=64)
    embed = model.embed.weight
    limit = (6 / (embed.shape[0] + embed.shape[1])) ** 0.5  # Xavier
    assert embed.abs().max() <= limit
    assert embed.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    qkv = model.blocks[0].mixer.qkv
    assert qkv.weight.abs().max() <= (6 / (64 + 192)) ** 0.5
    assert not qkv.bias.any()
    for tensor in (model.conditions[0].label.table.weight, model.conditions[0].time.up.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("positions", ["sincos", "table"])
def test_any_grid_is_taken(positions):
    model = network(positions=positions)
    for grid in ((2, 2), (6, 8), (8, 6), (12, 4)):
        assert run(model, noisy(2, 3, *grid)).shape == (2, 3, *grid)


def test_places_and_times_and_labels_are_told_apart():
    model = network()
    flat = torch.ones(1, 3, 6, 8)
    assert torch.pdist(patchify(run(model, flat), (2, 2))[0]).min() > 1e-3
    x = noisy(1, 3, 6, 8)
    outs = [run(model, x, torch.tensor(t), torch.tensor([label])) for t in (0.0, 1.0) for label in (-1, 0, 3)]
    assert torch.pdist(torch.stack(outs).flatten(1)).min() > 1e-3


def test_no_label_is_the_null_class_and_one_time_is_everyones():
    model, x = network(), noisy(2, 3, 6, 8)
    t = torch.tensor(0.3)
    torch.testing.assert_close(run(model, x, t), run(model, x, t.expand(2), torch.tensor([-1, -1])))
    assert torch.isfinite(model(x, None, {}, dense_layout((6, 8)))).all()
    with pytest.raises(ValueError, match=r"t is \[1\], expected a number or one per sample, \[2\]"):
        run(model, x, torch.tensor([0.3]))


def test_samples_do_not_see_each_other():
    model, x, t = network(), noisy(3, 3, 6, 8), torch.tensor([0.1, 0.5, 0.9])
    whole = run(model, x, t, LABELS)
    for i in range(3):
        torch.testing.assert_close(
            run(model, x[i : i + 1], t[i : i + 1], LABELS[i : i + 1]), whole[i : i + 1], atol=1e-5, rtol=1e-5
        )


def test_padding_is_ignored_and_comes_out_as_zero():
    model, x = network(), noisy(2, 3, 6, 8)
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    valid[0, :4, :6] = True
    valid[1, :6, :2] = True
    layout = Layout(coords=dense_layout((6, 8)).coords, grid=(6, 8), valid=valid.flatten(1))
    out = run(model, x, layout=layout)
    assert not out.masked_select(~valid.unsqueeze(1)).any()
    noise = torch.where(valid.unsqueeze(1), x, 100.0)
    assert torch.equal(run(model, noise, layout=layout), out)
    # A sample that is cut out, with the positions of the whole, gives the same.
    model.position.beyond = "continue"
    inside = run(model, x, layout=layout)[0, :, :4, :6]
    torch.testing.assert_close(run(model, x[:1, :, :4, :6], torch.tensor([0.1]))[0], inside, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=r"layout.valid is \[2, 12\], expected \[2, 48\]"):
        run(model, x, layout=Layout(coords=layout.coords, grid=(6, 8), valid=torch.ones(2, 12, dtype=torch.bool)))


def test_a_mixer_may_stand_in_for_attention():
    model = network(mixer=[{"type": "attention", "num_heads": 4}, attention(2)])
    assert run(model, noisy(2, 3, 6, 8)).shape == (2, 3, 6, 8)


def test_checkpointed_gradients_are_the_same():
    gradients = []
    for checkpointed in (False, True):
        model = network().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        run(model, noisy(2, 3, 6, 8)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_model_survives_saving(tmp_path):
    model = network(patch_size=(1, 2), learn_sigma=True, positions="table", own_conditions=True)
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path).eval()
    x = noisy(2, 3, 6, 8)
    assert torch.equal(run(again, x), run(model, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, r"grid of \(6, 8\) cannot be cut into patches of \(4, 4\)"),
        ({"patch_size": (2, 2, 2)}, "does not fit a grid of 2 axes"),
        ({"patch_size": 0}, "patch_size=0 does not fit"),
        ({"depth": 0}, "backbone.depth=0"),
        ({"dim": 2, "mixer": attention(1)}, "need dim >= 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        run(network(**options), noisy(1, 3, 6, 8))


def test_a_grid_that_patches_do_not_fill_is_refused():
    with pytest.raises(UsageError, match=r"grid of \(5, 8\) cannot be cut"):
        run(network(), noisy(1, 3, 5, 8))


# --- weights


def official(**options: Any) -> dict[str, Tensor]:
    """Weights under the names of facebookresearch/DiT."""
    model = network((8, 8), dim=16, **options)
    own = model.state_dict()
    state = {}
    for key, value in own.items():
        (name,) = source_of(key, dit.RULES)
        state[name] = value
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].view(16, 3, 2, 2)
    for kind in ("weight", "bias"):  # their rows: cells slowest, channels fastest
        rows = state[f"final_layer.linear.{kind}"]
        state[f"final_layer.linear.{kind}"] = rows.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
    return state | {"pos_embed": grid_waves((4, 4), 16)}


CONFIG = {"num_heads": 2}


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("module", [dit, sit])
def test_importing_undoes_their_layout(module, learn_sigma):
    imported = module.convert(official(learn_sigma=learn_sigma), CONFIG)
    x = noisy(2, 3, 8, 8)
    assert torch.equal(run(imported, x), run(network((8, 8), learn_sigma=learn_sigma), x))
    assert imported.config["positions"] == "sincos"
    assert imported.config["grid"] == (8, 8)


def test_positions_that_are_no_waves_become_a_table():
    table = noisy(1, 16, 16)
    imported = dit.convert(official() | {"pos_embed": table}, CONFIG)
    assert torch.equal(imported.position.table, table)


def test_weights_that_do_not_fit_are_named():
    state = official()
    for key in state:
        with torch.device("meta"), pytest.raises(GenkitError, match=f"missing: {key}"):
            dit.convert({k: v for k, v in state.items() if k != key}, CONFIG)
    with pytest.raises(GenkitError, match=r"unknown: blocks\.0\.extra"):
        dit.convert(state | {"blocks.0.extra": torch.zeros(1)}, CONFIG)
    with pytest.raises(GenkitError, match="has 7 rows, expected 12 or 24"):
        dit.convert(state | {"final_layer.linear.weight": torch.zeros(7, 16)}, CONFIG)
    with pytest.raises(GenkitError, match="15 positions are no square"):
        dit.convert(state | {"pos_embed": torch.zeros(1, 15, 16)}, CONFIG)
    with pytest.raises(UsageError, match="no published network has a width of 16"):
        dit.convert(state)


def test_weights_without_a_null_class_want_labels():
    model = dit.convert(official(), {**CONFIG, "class_dropout_prob": 0})
    rows = official()["y_embedder.embedding_table.weight"].shape[0]
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    assert model.config["num_classes"] == rows
    assert model(x, t, {"label": torch.tensor([rows - 1])}, dense_layout((8, 8))).isfinite().all()
    with pytest.raises(UsageError, match="knows no null class"):
        model(x, t, {}, dense_layout((8, 8)))


@pytest.fixture(scope="module")
def foreign() -> Any:
    """A diffusers model with random weights; every block has the same embeddings, as after conversion and training."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=4, norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    blocks = model.transformer_blocks
    blocks[1].norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return model


@torch.no_grad()
def test_the_network_of_diffusers_is_reproduced(foreign):
    imported = diffusers_dit.convert(foreign.state_dict(), dict(foreign.config))
    assert len(imported.conditions) == 1
    x, t, y = noisy(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 4])
    expected = foreign(x, t, y).sample
    torch.testing.assert_close(run(imported, x, t, LABELS), expected, atol=1e-4, rtol=1e-4)
    # The two numbers that set it apart from DiT are seen.
    imported.conditions[0].time.shift = 0
    assert (run(imported, x, t, LABELS) - expected).abs().max() > 0.1


@torch.no_grad()
def test_embeddings_that_have_become_different_are_kept(foreign):
    state = foreign.state_dict()
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    imported = diffusers_dit.convert(state | {key: state[key] + 1}, dict(foreign.config))
    assert len(imported.conditions) == 2


def test_a_config_of_diffusers_is_needed_and_read(foreign):
    state, config = foreign.state_dict(), dict(foreign.config)
    with pytest.raises(UsageError, match=r"needs its config\.json"):
        diffusers_dit.convert(state)
    with pytest.raises(UsageError, match="activation_fn=geglu"):
        diffusers_dit.convert(state, {**config, "activation_fn": "geglu"})
    with pytest.raises(UsageError, match="must say sample_size"):
        diffusers_dit.convert(state, {**config, "sample_size": None})
