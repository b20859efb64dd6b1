"""FiT and FiTv2: images of any size in one batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit import registry
from genkit.backbones.fit import FiT
from genkit.errors import GenkitError, UsageError
from genkit.importers import fit
from genkit.importers.names import source_of
from genkit.interfaces import Layout
from genkit.nn.extrapolation import Extrapolation, extrapolating, turning_table
from genkit.nn.layout import dense_layout
from genkit.nn.packing import Packing
from genkit.nn.patch import patchify, unpatchify
from genkit.nn.rope import rope_table, rotate
from tests.networks import noisy, run

LABELS = torch.tensor([0, 3, -1])
FIRST: dict[str, Any] = {"shared_adaln": False, "qk_norm": False, "mlp_dim": 64, "learn_sigma": True}  # FiT, not FiTv2


def network(grid: tuple[int, ...] = (6, 8), random: bool = True, **options: Any) -> FiT:
    """Small, and away from its initialisation, where it returns 0."""
    torch.manual_seed(0)
    model = FiT(channels=3, num_classes=4, grid=grid, **{"dim": 16, "depth": 2, "num_heads": 2, **options})
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def mixed(sizes: list[tuple[int, int]], channels: int = 3) -> tuple[list[Tensor], Tensor, Layout]:
    """Samples of sizes of their own, the same in one batch padded with 7, and its layout."""
    samples = [noisy(1, channels, *size, seed=i) for i, size in enumerate(sizes)]
    grid = tuple(max(lengths) for lengths in zip(*sizes, strict=True))
    x, valid = torch.full((len(sizes), channels, *grid), 7.0), torch.zeros(len(sizes), *grid, dtype=torch.bool)
    for i, (sample, (height, width)) in enumerate(zip(samples, sizes, strict=True)):
        x[i, :, :height, :width], valid[i, :height, :width] = sample[0], True
    return samples, x, Layout(coords=dense_layout(grid).coords, grid=grid, valid=valid.flatten(1))


SIZES = [(4, 4), (2, 12), (6, 2)]


# --- rotary positions


def test_plain_rotation_is_the_usual_one():
    coords = dense_layout((3, 5)).coords
    ours = turning_table(coords, torch.tensor([[3.0, 5.0]]), 24, Extrapolation())
    torch.testing.assert_close(ours, rope_table(coords, 24, 10_000.0))


def test_longer_bases_are_the_published_ones():
    # Heads of 72 channels, so 18 pairs per axis, trained on 16 tokens.
    for tokens, base in ((20.0, 12_665.16), (32.0, 20_832.32)):
        frequencies = Extrapolation("ntk").frequencies(torch.tensor([[tokens, 16.0]]), 18)
        assert frequencies[0, 0, 1].item() ** -18 == pytest.approx(base, rel=1e-4)
        assert frequencies[0, 1, 1].item() ** -18 == pytest.approx(10_000, rel=1e-4)  # the other axis is not longer


def test_yarn_keeps_the_fastest_wave_and_interpolates_the_slow_ones():
    rule, sizes = Extrapolation("yarn"), torch.tensor([[20.0, 20.0]])
    ratio = rule.frequencies(sizes, 18)[0, 0] / Extrapolation().frequencies(sizes, 18)[0, 0]
    torch.testing.assert_close(ratio, torch.tensor([1.0, 0.9, *[0.8] * 16]))
    assert rule.amplitude(sizes).item() == pytest.approx(1.0223, abs=1e-4)


@pytest.mark.parametrize(
    ("grid", "paper", "release"),
    [
        ((16, 16), 1.000, 1.125),
        ((20, 20), 1.080, 1.205),
        ((14, 28), 1.077, 1.202),
        ((10, 30), 1.029, 1.154),
        ((32, 32), 1.250, 1.375),
    ],
)
def test_gain_of_the_logits(grid, paper, release):
    for gain, expected in (("paper", paper), ("release", release), ("none", 1.0)):
        amplitude = Extrapolation("ntk", gain=gain).amplitude(torch.tensor([grid], dtype=torch.float32))
        assert amplitude.square().item() == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("method", ["plain", "interpolate", "ntk", "ntk_by_parts", "yarn"])
def test_nothing_changes_at_the_trained_size_and_below(method):
    rule, sizes = Extrapolation(method), torch.tensor([[16.0, 7.0]])
    torch.testing.assert_close(rule.frequencies(sizes, 18), Extrapolation().frequencies(sizes, 18))
    assert rule.amplitude(sizes).item() == 1


@pytest.mark.parametrize("method", ["interpolate", "ntk", "ntk_by_parts", "yarn"])
def test_one_length_for_all_axes_is_the_longest(method):
    both = Extrapolation(method, per_axis=False).frequencies(torch.tensor([[20.0, 40.0]]), 18)
    each = Extrapolation(method).frequencies(torch.tensor([[20.0, 40.0]]), 18)
    assert torch.equal(both[:, 0], both[:, 1])
    assert torch.equal(both[:, 1], each[:, 1])
    # Of any method: the fastest wave hardly changes, the slowest is the interpolated one, and nothing in between is faster than trained.
    plain = Extrapolation().frequencies(torch.tensor([[20.0, 40.0]]), 18)
    assert (each <= plain * (1 + 1e-6)).all()
    torch.testing.assert_close(each[:, 1, -1], plain[:, 1, -1] / 2.5)
    if method != "interpolate":
        assert each[0, 1, 0].item() == 1


def test_logits_depend_on_differences_of_places():
    q, k = noisy(1, 6, 2, 12), noisy(1, 6, 2, 12, seed=1)
    coords = dense_layout((2, 3)).coords
    sizes = torch.tensor([[20.0, 40.0]])
    logits = []
    for shift in (0.0, 5.0):
        table = turning_table(coords + shift, sizes, 12, Extrapolation("ntk", gain="paper"))
        logits.append(torch.einsum("bnhk,bmhk->bhnm", rotate(q, table), rotate(k, table)))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": "ntk", "dim": 8, "num_heads": 2}, "rope=ntk needs heads with at least two pairs"),
        ({"dim": 12, "num_heads": 6}, "even head width >= 4 for 2 axes, found 2"),
        ({"num_heads": 3}, "num_heads=3 does not divide the width dim=16"),
        ({"depth": 0}, "backbone.depth=0"),
        ({"rope_gain": "paper", "rope": "yarn"}, "goes neither with rope=yarn"),
        ({"rope_trained": 0}, "rope_trained=0 must be at least 1"),
        ({"rope_lengths": (8,)}, "one positive number for each of the 2 axes"),
        ({"time_shift": 0.0}, "time_shift=0.0 must be positive"),
        ({"adaln": "swiglu"}, "only with backbone.shared_adaln=false"),
        ({"qk_norm": "other"}, "a norm is one of none, layer"),
        ({"norm": "other"}, "a norm is one of none, layer"),
        ({"patch_size": 4}, r"cannot be cut into patches of \(4, 4\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        run(network(**options), noisy(1, 3, 6, 8))


# --- network


# Name: width, depth, heads, first version or second, weights with 4 channels, patches of 2 and 1000 classes.
PUBLISHED = {
    "fitv2-b": (768, 15, 12, {}, 128_149_072),
    "fitv2-xl": (1152, 36, 16, {}, 671_045_776),
    "fit-xl": (1152, 28, 16, FIRST | {"mlp_dim": 4608}, 823_599_392),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    dim, depth, num_heads, options, expected = PUBLISHED[name]
    with torch.device("meta"):
        model = FiT(channels=4, num_classes=1000, grid=(32, 32), dim=dim, depth=depth, num_heads=num_heads, **options)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.rule.trained == 16


@pytest.mark.parametrize("options", [{}, FIRST])
@pytest.mark.parametrize(("grid", "patch"), [((6, 8), 2), ((9, 6), (3, 2)), ((4, 6, 6), (1, 2, 2)), ((10,), 5)])
def test_output_has_the_shape_of_the_input(grid, patch, options):
    model = network(grid, patch_size=patch, **options)
    assert run(model, noisy(2, 3, *grid)).shape == (2, model.out_channels, *grid)


@pytest.mark.parametrize("options", [{}, FIRST])
def test_a_fresh_network_returns_zero_and_learns_everywhere_from_the_third_step(options):
    model = network(random=False, **options).train()
    x = noisy(3, 3, 6, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        out = run(model, x, label=LABELS)
        if step == 0:
            assert torch.equal(out, torch.zeros_like(out))
        optimizer.zero_grad()
        (out - noisy(*out.shape, seed=1)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:
            assert learns == {"head.linear.weight", "head.linear.bias"}
        optimizer.step()
    assert learns == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, FIRST, {"rope": "ntk", "rope_gain": "paper", "rope_trained": 2}])
def test_a_batch_of_sizes_equals_its_samples(options):
    model = network(**options)
    samples, x, layout = mixed(SIZES)
    t = torch.tensor([0.1, 0.5, 0.9])
    together = run(model, x, t, LABELS, layout)
    assert layout.valid is not None
    inside = layout.valid.view(3, 1, 6, 12)
    assert not together.masked_select(~inside).any()
    for i, (sample, (height, width)) in enumerate(zip(samples, SIZES, strict=True)):
        alone = run(model, sample, t[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1, :, :height, :width], alone, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_batch_of_sizes_are_those_of_its_samples():
    samples, x, layout = mixed(SIZES)
    gradients = []
    for packed in (True, False):
        model = network()
        model.zero_grad()
        if packed:
            run(model, x, torch.tensor(0.3), LABELS, layout).square().sum().backward()
        else:
            for i, sample in enumerate(samples):
                run(model, sample, torch.tensor(0.3), LABELS[i : i + 1]).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_padding_is_not_read():
    model = network()
    _, x, layout = mixed(SIZES)
    assert layout.valid is not None
    other = torch.where(layout.valid.view(3, 1, 6, 12), x, float("nan"))
    assert torch.equal(run(model, other, layout=layout), run(model, x, layout=layout))


def test_a_sample_without_a_token_is_zero_and_hurts_nobody():
    model = network().train()
    _, x, layout = mixed(SIZES)
    assert layout.valid is not None
    valid = layout.valid.clone()
    valid[1] = False
    out = run(model, x, layout=Layout(coords=layout.coords, grid=layout.grid, valid=valid))
    assert not out[1].any()
    torch.testing.assert_close(out[[0, 2]], run(model, x, layout=layout)[[0, 2]], atol=1e-5, rtol=1e-5)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("slack", [0.0, 0.25, 1.0])
def test_packing_goes_there_and_back(slack):
    valid = torch.tensor([[True, False, True, False, False], [False] * 5, [True, True, False, True, True], [True] * 5])
    packing = Packing.of(valid, slack)
    x = noisy(4, 5, 2)
    rows = packing.pack(x)
    assert torch.equal(rows, x[valid])
    assert packing.sample.tolist() == [0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert torch.equal(packing.unpack(rows, 5), torch.where(valid.unsqueeze(-1), x, 0))
    padded = packing.pad(rows)
    assert torch.equal(packing.unpad(padded), rows)
    lengths = {0.0: [5, 4, 2, 1], 0.25: [5, 2, 1], 1.0: [5]}[slack]
    assert [group.length for group in packing.groups] == lengths
    assert len(padded) == packing.num_places == sum(group.count * group.length for group in packing.groups)
    last = packing.groups[-1]  # the sample without a token has a place all the same, or attention would be NaN
    assert last.held is not None
    assert last.held[-1].tolist() == [True] + [False] * (last.length - 1)
    first = packing.groups[0]
    assert torch.equal(first.of(padded)[0], x[3])
    assert (first.held is None) == (slack == 0)


def test_tokens_by_coordinates_equal_the_grid():
    """Packed data sets give tokens and places; their order is free."""
    model = network(rope="ntk", rope_trained=2)
    x = noisy(2, 3, 6, 8)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    coords = dense_layout((3, 4)).coords[:, order]
    patches = patchify(x, (2, 2))[:, order].transpose(1, 2)
    out = run(model, patches, layout=Layout(coords=coords, grid=None)).transpose(1, 2)
    expected = run(model, x)
    torch.testing.assert_close(unpatchify(out[:, order.argsort()], (3, 4), (2, 2)), expected, atol=1e-5, rtol=1e-5)


def test_rows_and_columns_are_told_apart():
    x = torch.ones(1, 3, 4, 8)
    x[:, :, :2] = 0.5
    wide, tall = run(network(), x), run(network(), x.transpose(2, 3)).transpose(2, 3)
    assert (wide - tall).abs().max() > 1e-2


def test_another_mixer_finds_padding_in_its_layout():
    model = network(mixer={"type": "attention", "num_heads": 2})
    samples, x, layout = mixed([(4, 4), (4, 8)])
    out = run(model, x, torch.tensor(0.3), layout=layout)
    torch.testing.assert_close(out[:1, :, :, :4], run(model, samples[0], torch.tensor(0.3)), atol=1e-5, rtol=1e-5)
    assert not out[0, :, :, 4:].any()


def test_samples_do_not_see_each_other():
    model, x, t = network(), noisy(3, 3, 6, 8), torch.tensor([0.1, 0.5, 0.9])
    whole = run(model, x, t, LABELS)
    for i in range(3):
        one = run(model, x[i : i + 1], t[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1], atol=1e-5, rtol=1e-5)


def test_no_label_is_the_null_class_and_time_and_label_matter():
    model, x = network(), noisy(1, 3, 6, 8)
    outs = [run(model, x, torch.tensor(t), torch.tensor([label])) for t in (0.0, 1.0) for label in (-1, 0, 3)]
    assert torch.pdist(torch.stack(outs).flatten(1)).min() > 1e-3
    torch.testing.assert_close(run(model, x, torch.tensor(0.0)), outs[0])


def test_checkpointed_gradients_are_the_same():
    _, x, layout = mixed(SIZES)
    gradients = []
    for checkpointed in (False, True):
        model = network().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        run(model, x, layout=layout).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_model_survives_saving(tmp_path):
    model = network(rope="yarn", rope_per_axis=False, rope_trained=2, **FIRST)
    model.save_pretrained(tmp_path)
    again = FiT.from_pretrained(tmp_path).eval()
    x = noisy(2, 3, 6, 8)
    assert torch.equal(run(again, x), run(model, x))


# --- weights


CONFIG = {"num_heads": 2, "in_channels": 3, "context_size": 16}


def official(**options: Any) -> dict[str, Tensor]:
    """Weights under the names of whlzy/FiT, with adjacent channels as pairs."""
    state: dict[str, Tensor] = {}
    for key, value in network((8, 8), **options).state_dict().items():
        names = source_of(key, [*(fit._PLAIN if options.get("mlp") == "gelu" else fit._GATED), *fit._RULES])
        state |= dict(zip(names, value.chunk(len(names)), strict=True))
        if ".qkv." in names[0]:
            q, k, v = value.chunk(3)
            q, k, turned = (y.unflatten(0, (2, 2, -1)).transpose(1, 2).flatten(0, 2) for y in (q, k, v))
            state[names[0]] = torch.cat([q, k, turned if options.get("rope_values") else v])
        if names[0].endswith(".attn.proj.weight") and options.get("rope_values"):
            state[names[0]] = value.unflatten(1, (2, 2, -1)).transpose(2, 3).flatten(1)
        if "_norm.weight" in names[0] and ".attn." in names[0]:
            state[names[0]] = value.unflatten(0, (2, -1)).T.flatten()
    return state


@pytest.mark.parametrize("options", [{}, FIRST])
def test_importing_undoes_their_layout(options):
    imported = fit.convert(official(**options), CONFIG)
    x = noisy(2, 3, 8, 8)
    assert torch.equal(run(imported, x), run(network((8, 8), **options), x))


def test_options_of_rotation_are_read():
    config = CONFIG | {"custom_freqs": "ntk-aware-pro2", "decouple": True, "ori_max_pe_len": 3}
    assert fit.convert(official(), config).rule == Extrapolation("ntk", True, "release", 3)
    with pytest.raises(UsageError, match="custom_freqs=other"):
        fit.convert(official(), CONFIG | {"custom_freqs": "other"})
    lengths = {"custom_freqs": "yarn", "decouple": True, "ori_max_pe_len": 3, "max_pe_len_h": 8, "max_pe_len_w": 5}
    assert fit.convert(official(), CONFIG | lengths).rule == Extrapolation("yarn", True, trained=3, lengths=(8, 5))
    assert fit.convert(official(), CONFIG | lengths | {"online_rope": True}).rule.lengths is None
    assert fit.convert(official(), CONFIG | {"rel_pos_embed": None, "rope_theta": 50}).rule == Extrapolation(
        "none", False, trained=4, base=50.0
    )
    for name in ("q_norm", "norm_type"):
        with pytest.raises(UsageError, match=name):
            fit.convert(official(), CONFIG | {name: "other"})


OTHER: list[tuple[dict[str, Any], dict[str, Any]]] = [  # of ours, and what the original's config then says
    ({"mlp": "gelu", "mlp_dim": 24}, {}),
    ({"qkv_bias": False, "mlp_bias": False}, {}),
    ({"qk_norm": "scaled_rms"}, {"q_norm": "w_rmsnorm", "k_norm": "w_rmsnorm"}),
    ({"qk_norm": "scaled_layer"}, {"q_norm": "layernorm", "k_norm": "layernorm", "qk_norm_weight": True}),
    ({"norm": "scaled_rms"}, {"norm_type": "w_rmsnorm"}),
    ({"adaln": "swiglu", "shared_adaln": False}, {"q_norm": "layernorm", "k_norm": "layernorm"}),
    ({"time_shift": 3.0}, {"time_shifting": 3}),
    ({"null_class": False}, {"class_dropout_prob": 0}),
    ({"rope": "none"}, {"rel_pos_embed": None}),
    ({"rope_values": True}, {"add_rel_pe_to_v": True}),
    ({"qk_norm": "scaled_rms", "k_norm": "layer"}, {"q_norm": "w_rmsnorm", "k_norm": "layernorm"}),
]


@pytest.mark.parametrize(("options", "config"), OTHER)
def test_every_option_of_theirs_is_read_and_matters(options, config):
    imported = fit.convert(official(**options), CONFIG | config)
    x, label = noisy(2, 3, 8, 8), torch.tensor([0, 3])
    expected = run(network((8, 8), **options), x, label=label)
    assert torch.equal(run(imported, x, label=label), expected)
    plain = network((8, 8), **{k: v for k, v in options.items() if k in ("mlp_dim", "shared_adaln")})
    assert options == {"null_class": False} or (run(plain, x, label=label) - expected).abs().max() > 1e-3


def test_samples_need_labels_where_there_is_no_null_class():
    with pytest.raises(UsageError, match="knows no null class"):
        run(network(null_class=False), noisy(1, 3, 6, 8))


def test_fixed_lengths_stand_in_for_the_sizes_of_samples():
    x = noisy(1, 3, 6, 8)
    own, fixed = (network((4, 4), rope="yarn", rope_trained=2, rope_lengths=lengths) for lengths in ((3, 4), (9, 5)))
    torch.testing.assert_close(run(own, x), run(network((4, 4), rope="yarn", rope_trained=2), x))
    assert (run(own, x) - run(fixed, x)).abs().max() > 1e-3
    with extrapolating(fixed, {"trained": 2}):
        torch.testing.assert_close(run(fixed, x), run(own, x))


def test_weights_that_do_not_fit_are_named():
    state = official()
    for key in state:
        with torch.device("meta"), pytest.raises(GenkitError, match="missing: ") as caught:
            fit.convert({k: v for k, v in state.items() if k != key}, CONFIG)
        assert key in str(caught.value) or "global_adaLN" in key, key
    with pytest.raises(GenkitError, match=r"unknown: blocks\.0\.extra"):
        fit.convert(state | {"blocks.0.extra": torch.zeros(1)}, CONFIG)
    with pytest.raises(UsageError, match="no published FiT has a width of 16"):
        fit.convert(state)
    assert math.prod(state["x_embedder.proj.weight"].shape) == 16 * 12


def test_a_mixer_that_may_be_absent_is_checked_as_any_other():
    assert registry.check("backbone", {"type": "fit"}, "backbone")["mixer"] is None
    checked = registry.check("backbone", {"type": "fit", "mixer": {"type": "attention"}}, "backbone")
    assert checked["mixer"]["num_heads"] == 4  # its defaults are filled in
    with pytest.raises(UsageError, match=r"unknown key backbone\.mixer\.num_head; did you mean 'num_heads'"):
        registry.check("backbone", {"type": "fit", "mixer": {"type": "attention", "num_head": 2}}, "backbone")
