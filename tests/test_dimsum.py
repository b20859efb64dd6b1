"""DiMSUM: scans over space and over wavelet bands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genkit.backbones.dimsum import DiMSUM, window_order
from genkit.errors import GenkitError, UsageError
from genkit.importers import dimsum
from genkit.interfaces import Layout
from genkit.nn.drop_path import DropPath
from genkit.nn.layout import dense_layout
from genkit.nn.wavelet import haar_packet, inverse_haar_packet, packet_matrix
from tests.networks import noisy, run

pytestmark = pytest.mark.usefixtures("paths_of_users")
LABELS = torch.tensor([0, 3, -1])
GRID = (8, 16)  # 4x8 tokens


def network(grid: tuple[int, ...] = GRID, random: bool = True, **options: Any) -> DiMSUM:
    """Small, and away from its initialisation, where it returns 0."""
    torch.manual_seed(0)
    options = {"dim": 32, "depth": 2, "attention_every": 2, "num_heads": 4, "fusion_heads": 2, **options}
    model = DiMSUM(channels=3, num_classes=4, grid=grid, **options)
    if random:
        for name, parameter in model.named_parameters():
            if "mixer.scans" not in name:  # a scan with any decay rates would not stay finite
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# --- wavelets and windows


def haar(x: Tensor) -> list[Tensor]:
    """LL, LH, HL, HH of images [..., Y, X], cell by cell."""
    p, q, r, s = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return [(p + q + r + s) / 2, (p + q - r - s) / 2, (p - q + r - s) / 2, (p - q - r + s) / 2]


@pytest.mark.parametrize("layout", ["release", "bands"])
def test_bands_are_two_levels_of_haar(layout):
    Y, X, C = 8, 12, 32
    x = noisy(2, Y * X, C)
    image = x.transpose(1, 2).unflatten(2, (Y, X))
    bands = torch.stack([second for first in haar(image) for second in haar(first)], dim=1) / 4  # [B, 16, C, Y/4, X/4]
    found = (
        haar_packet(x, (Y, X), layout).view(2, Y // 4, 4, X // 4, 4, C).permute(0, 2, 4, 5, 1, 3)
    )  # [B, p, q, C, ...]
    for beta in range(16):
        if layout == "bands":
            torch.testing.assert_close(found[:, beta // 4, beta % 4], bands[:, beta], atol=1e-6, rtol=1e-5)
            continue
        for place in range(16):  # features beta C / 16 and on hold the channels place, place + 16, ... of the band
            got = found[:, place // 4, place % 4, beta * C // 16 : (beta + 1) * C // 16]
            torch.testing.assert_close(got, bands[:, beta, place::16], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", ["release", "bands"])
@pytest.mark.parametrize("grid", [(4, 4), (8, 12), (16, 4)])
def test_bands_are_put_back(grid, layout):
    x = noisy(2, grid[0] * grid[1], 6)
    back = inverse_haar_packet(haar_packet(x, grid, layout), grid, layout)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(packet_matrix() @ packet_matrix().T, torch.eye(16))


def test_a_constant_is_the_first_band_alone():
    bands = haar_packet(torch.ones(1, 16, 32), (4, 4))
    assert torch.equal(bands[..., :2], torch.ones(1, 16, 2))
    assert not bands[..., 2:].any()


def test_grids_without_whole_cells_are_refused():
    with pytest.raises(UsageError, match="multiples of 4, found 6x4"):
        haar_packet(noisy(1, 24, 16), (6, 4))


@pytest.mark.parametrize(("Y", "X"), [(4, 4), (8, 8), (8, 16)])
@pytest.mark.parametrize("columns", [False, True])
def test_windows_are_visited_one_after_the_other(Y, X, columns):
    order = window_order(Y, X, columns)
    assert sorted(order.index.tolist()) == list(range(Y * X))
    visited = order.visit(torch.arange(Y * X)[None, :, None])
    assert torch.equal(order.put_back(visited).flatten(), torch.arange(Y * X))
    per_window = Y * X // 16
    windows = [
        {(i // X * 4 // Y, i % X * 4 // X) for i in order.index[k : k + per_window].tolist()}
        for k in range(0, Y * X, per_window)
    ]
    assert all(len(window) == 1 for window in windows)
    if per_window > 1:
        step = order.index[1] - order.index[0]
        assert step == (X if columns else 1)
    assert next(iter(windows[1])) == ((1, 0) if columns else (0, 1))


def test_dropped_paths_keep_the_mean():
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    x = drop(torch.ones(4000, 2, 3))
    torch.testing.assert_close(x.unique(), torch.tensor([0.0, 4 / 3]))
    assert torch.equal(x.amin((1, 2)), x.amax((1, 2)))  # whole samples
    assert x.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(UsageError, match="drop_path=1"):
        DropPath(1.0)


# --- network


def test_published_size():
    with torch.device("meta"):
        model = DiMSUM(channels=4, num_classes=1000, grid=(32, 32), dim=1024, depth=16)
    dead = 16 * 2 * (1024 * 1024 + 1024)  # the projections that the release computes and throws away
    assert sum(p.numel() for p in model.parameters()) + dead == 459_916_304


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn_sigma": True, "positions": "sincos", "band_layout": "bands"},
        {"attention_every": 0},
        {"depth": 5},
        {"mixer": {"type": "attention", "num_heads": 2}},
    ],
)
def test_output_has_the_shape_of_the_input(options):
    model = network(**options)
    for grid in (GRID, (8, 8), (16, 8)):
        out = run(model, noisy(2, 3, *grid))
        assert out.shape == (2, model.out_channels, *grid)
        assert out.isfinite().all()


def test_a_fresh_network_returns_zero_and_learns_everywhere():
    model = network(random=False).train()
    x = noisy(3, 3, *GRID)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        out = run(model, x, label=LABELS)
        if step == 0:
            assert torch.equal(out, torch.zeros_like(out))
        optimizer.zero_grad()
        (out - noisy(*out.shape, seed=1)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_initialisation_is_the_papers():
    model = network(random=False, depth=4)
    block = model.blocks[2]
    assert not block.modulation.weight.any()
    assert block.spatial.modulation.weight.any()  # so that a fresh layer is not the identity
    assert model.shared is not None
    assert model.shared.modulation.weight.any()
    assert not model.shared.modulation.bias.any()
    limit = 32**-0.5  # of the inner width, 2 x 16
    out = block.frequency.mixer.out_proj.weight
    assert limit / 2 * 0.9 < out.abs().max() <= limit / 2  # over the root of the depth


def test_the_orders_of_layers_go_round():
    model = network(depth=5, attention_every=0)
    orders = [block.spatial.mixer.order for block in model.blocks]
    assert orders == ["raster", "reversed-raster", "column", "reversed-column", "raster"]
    assert [block.columns for block in model.blocks] == [False, True, False, True, False]
    assert {block.frequency.mixer.order for block in model.blocks} == {"raster"}


def test_skips_grow_with_the_depth():
    model = network(depth=5, drop_path=0.1)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0, 0.025, 0.05, 0.075])


def test_one_block_serves_all_layers():
    model, x = network(depth=4, attention_every=2), noisy(1, 3, *GRID)
    calls: list[int] = []
    assert model.shared is not None
    model.shared.register_forward_hook(lambda *args: calls.append(1))
    run(model, x)
    assert len(calls) == 2
    assert network(depth=2, attention_every=3).shared is None


def test_samples_do_not_see_each_other():
    model, x, t = network(), noisy(3, 3, *GRID), torch.tensor([0.1, 0.5, 0.9])
    whole = run(model, x, t, LABELS)
    for i in range(3):
        one = run(model, x[i : i + 1], t[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1], atol=1e-5, rtol=1e-5)


def test_no_label_is_the_null_class_and_time_and_label_matter():
    model, x = network(), noisy(1, 3, *GRID)
    outs = [run(model, x, torch.tensor(t), torch.tensor([label])) for t in (0.0, 1.0) for label in (-1, 0, 3)]
    assert torch.pdist(torch.stack(outs).flatten(1)).min() > 1e-3
    torch.testing.assert_close(run(model, x, torch.tensor(0.0)), outs[0])


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
    model = network(drop_path=0.1)
    model.save_pretrained(tmp_path)
    again = DiMSUM.from_pretrained(tmp_path).eval()
    x = noisy(2, 3, *GRID)
    assert torch.equal(run(again, x), run(model, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (12, 8)}, "multiples of 4, found 6x4"),
        ({"grid": (8,)}, "a grid of two axes"),
        ({"depth": 0}, "backbone.depth=0"),
        ({"fusion_heads": 3}, "fusion_heads=3 does not divide half the width, 16"),
        ({"drop_path": 1.5, "depth": 4}, "drop_path=1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        run(network(**options), noisy(1, 3, *options.get("grid", GRID)))


def test_padding_is_refused():
    layout = Layout(dense_layout(GRID).coords, GRID, torch.ones(1, 128, dtype=torch.bool))
    with pytest.raises(UsageError, match="cannot be padded"):
        run(network(), noisy(1, 3, *GRID), layout=layout)


# --- weights


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    """Two layers' worth of weights under the names of the release, from the golden file."""
    from safetensors.torch import load_file

    tensors = load_file(Path(__file__).parent / "golden" / "dimsum.safetensors")
    return {key[7:]: value.float() for key, value in tensors.items() if key.startswith("weight/")}


def test_what_no_output_depends_on_is_ignored_and_nothing_else(released):
    model = dimsum.convert(released, {"use_attn_every_k_layers": 4})
    dead = [key for key in released if "cond_proj" in key]
    assert len(dead) == 8 * 2 * 2
    x = noisy(1, 4, 16, 16)
    changed = {key: torch.randn_like(value) if key in dead else value for key, value in released.items()}
    assert torch.equal(run(dimsum.convert(changed), x), run(model, x))
    with pytest.raises(GenkitError, match=r"unknown: blocks\.0\.extra"):
        dimsum.convert(released | {"blocks.0.extra": torch.zeros(1)})


def test_weights_that_do_not_fit_are_named(released):
    needed = [key for key in released if ".cond_proj" not in key and "dwt." not in key]
    some = [key for key in needed if key.startswith("blocks.0.") or not key.startswith("blocks.")][::3]
    for key in some:
        with torch.device("meta"), pytest.raises(GenkitError, match="missing: ") as caught:
            dimsum.convert({k: v for k, v in released.items() if k != key})
        assert key in str(caught.value), key
    with pytest.raises(UsageError, match="scan_type=zigma_8"):
        dimsum.convert(released, {"scan_type": "zigma_8"})
    assert (
        dimsum.convert(released, {"use_attn_every_k_layers": 9}).shared is None
    )  # it would come after the ninth of eight
